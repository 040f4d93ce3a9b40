"""Single-task models of one source, trained beside the model of all tasks, which has to be better than they are."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray

from pathopipe.cohort import Fold, LabelTable
from pathopipe.metadata.calibration import abstentions, find_threshold, interpret
from pathopipe.metadata.evaluate import BASELINE
from pathopipe.metadata.fold import Epoch, FoldData, train_model
from pathopipe.metadata.inputs import Inputs
from pathopipe.metadata.network import MODALITIES, as_mask
from pathopipe.metadata.probabilities import right_of, surety_of, without_class_weights
from pathopipe.metadata.splits import spread_strata
from pathopipe.mil.bags import Bag
from pathopipe.mil.fit import find_temperature
from pathopipe.mil.settings import MilConfig
from pathopipe.mil.targets import predict_target, slice_of, strata_of
from pathopipe.mil.train import Cohort as MilCohort
from pathopipe.mil.train import train_fold as train_mil_fold

__all__ = ["train_baselines"]

logger = logging.getLogger("pathopipe")

# Slides a step of the image baseline, as `mil` has it: more of them train it worse.
_MOST_BASELINE_BAGS: Final = 16

Floats = NDArray[np.float64]


def train_baselines(
    data: FoldData, modality: str, on_epoch: Callable[[Epoch], None]
) -> tuple[dict[str, Floats], dict[str, NDArray[np.bool_]]]:
    """One model a task from one modality.

    Args:
        data: Of the fold.
        modality: What all of them see.
        on_epoch: Told of each epoch.

    Returns:
        By task predictions (test slides, P) of slides that they have not learnt from, and (test slides,) where they
        abstain. A task that no training slide with the modality has a record of has no prediction.
    """
    test = data.fold.test
    train_one = _image_baseline if modality == MODALITIES[0] else _branch_baseline
    inputs = replace(data.inputs, present=data.inputs.present & as_mask((modality,)))
    scores: dict[str, Floats] = {}
    abstained: dict[str, NDArray[np.bool_]] = {}
    for number, spec in enumerate(data.specs):
        if not data.labelled(number, inputs):
            logger.warning(
                "fold %s: no training slide with %s has a record of task '%s', so its baseline has no prediction",
                *(data.fold.name, modality, spec.name),
            )
            scores[spec.name] = np.full((len(test), len(spec.prediction_names)), np.nan)
            abstained[spec.name] = np.ones(len(test), bool)
            continue
        scores[spec.name], abstained[spec.name] = train_one(data, number, inputs, on_epoch)
    return scores, abstained


def _branch_baseline(
    data: FoldData, number: int, inputs: Inputs, on_epoch: Callable[[Epoch], None]
) -> tuple[Floats, NDArray[np.bool_]]:
    """Predictions of the test slides by the same branch alone, trained alike for one task; and where it abstains."""
    test, name = data.fold.test, data.specs[number].name
    model = train_model(data, f"{BASELINE} {name}", [number], inputs, on_epoch)
    scores = interpret(model.card, model.logits(inputs, test, [MODALITIES])[MODALITIES], inputs.present[test])
    return scores[name], abstentions(model.card, scores, inputs.present[test])[name]


def _image_baseline(
    data: FoldData, number: int, inputs: Inputs, on_epoch: Callable[[Epoch], None]
) -> tuple[Floats, NDArray[np.bool_]]:
    """The same by a model of ``mil train`` with its own recipe: what one would have without all this."""
    settings, fold, name = data.settings, data.fold, data.specs[number].name
    own = slice_of(data.specs, number, "truth")
    there = np.flatnonzero(inputs.present[:, 0])
    labelled = np.asarray(np.isfinite(data.truth[:, own]).any(axis=1))
    place = np.full(len(inputs.bags), -1)
    place[there] = np.arange(len(there))
    train, val, test = (place[rows[inputs.present[rows, 0]]] for rows in (fold.train, fold.val, fold.test))
    train, val = (rows[labelled[there[rows]]] for rows in (train, val))
    spec = data.specs[number]
    if not len(test):
        return np.full((len(fold.test), len(spec.prediction_names)), np.nan), np.ones(len(fold.test), bool)
    bags = tuple(cast(Bag, inputs.bags[int(row)]) for row in there)
    task = data.cohort.tasks[number].target
    truth = data.truth[there][:, own]
    patients = [data.cohort.patients[int(row)] for row in there]
    strata = [""] * len(there)
    kept = spread_strata([patients[row] for row in train], strata_of(task, truth[train]), settings.members)
    for row, stratum in zip(train, kept, strict=True):
        strata[row] = stratum
    cohort = MilCohort(
        encoder=bags[0].encoder,
        bags=tuple(replace(bag, patient_id=patient) for bag, patient in zip(bags, patients, strict=True)),
        table=LabelTable.of_slides([data.cohort.cases[int(row)].slide_id for row in there]),
        specs=(task,),
        truth=truth,
        folds=(Fold(name=fold.name, train=train, val=val, test=test),),
        strata=tuple(strata),
    )
    recipe = MilConfig(
        hidden=settings.hidden,
        attention=settings.attention,
        dropout=settings.dropout,
        members=settings.members,
        epochs=settings.epochs,
        patience=settings.patience,
        batch_bags=min(settings.batch_slides, _MOST_BASELINE_BAGS),
        cap=settings.cap,
        balanced=settings.balanced,
        bag_size=settings.bag_size,
    )
    seed = int(np.random.SeedSequence([data.seed, *fold.name.encode()]).generate_state(1)[0])
    result = train_mil_fold(
        cohort,
        settings.head,
        0,
        recipe,
        seed=seed,
        device=data.device,
        on_epoch=lambda member, epoch: on_epoch(
            Epoch(f"{BASELINE} {name}", member, epoch.epoch, epoch.train_loss, epoch.val_loss)
        ),
    )
    spec = result.model.card.targets[0]
    val_logits = without_class_weights(spec, result.val_logits)
    temperature = find_temperature([spec], 0, val_logits, truth[result.val])
    scores = np.full((len(fold.test), len(spec.prediction_names)), np.nan)
    seen = inputs.present[fold.test, 0]
    logits = without_class_weights(spec, result.test_logits)
    scores[seen] = predict_target(spec, logits, temperature=temperature)
    if not spec.classes:
        return scores, ~seen
    of_val = predict_target(spec, val_logits, temperature=temperature)
    cut = find_threshold(surety_of(spec, of_val), right_of(spec, of_val, truth[result.val]), settings.precision)
    return scores, ~(surety_of(spec, scores) >= (np.inf if cut is None else cut))
