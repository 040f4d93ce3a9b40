"""Trains over folds kept apart: the model of all tasks and modalities, and single-task baselines beside it."""

import copy
import csv
import io
import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import beta
from torch import Tensor

from pathopipe.cohort import Fold, LabelTable, nested_folds
from pathopipe.errors import UsageError
from pathopipe.files import durable_file, one_at_a_time, remove_leftovers
from pathopipe.metadata.cases import MetadataCohort, check_tasks
from pathopipe.metadata.evaluate import (
    ALL,
    BASELINE,
    MULTITASK,
    OOF_FILE,
    OutOfFold,
    View,
    oof_rows,
    read_oof,
    unescape,
)
from pathopipe.metadata.model import MODALITIES, MetadataNetwork, MetadataShape, alignment_loss, drop_modalities
from pathopipe.metadata.predict import (
    FOLDS_FILE,
    FOLDS_FOLDER,
    NGRAMS,
    Inputs,
    MetadataModel,
    ModelCard,
    Preparation,
    abstentions,
    as_mask,
    interpret,
    modality_sets,
    right_of,
    set_name,
    slide_batches,
    surety_of,
    whole_batches,
    without_class_weights,
)
from pathopipe.metadata.settings import MetadataConfig
from pathopipe.metadata.text import TextEncoder, TextVectorizer, TransformersText
from pathopipe.mil.bags import Bag, BagLoader
from pathopipe.mil.fit import find_temperature
from pathopipe.mil.scored import write_rows
from pathopipe.mil.settings import MilConfig
from pathopipe.mil.targets import (
    TargetSpec,
    fit_targets,
    label_texts,
    predict_target,
    slice_of,
    strata_of,
    target_loss,
)
from pathopipe.mil.train import Cohort as MilCohort
from pathopipe.mil.train import train_fold as train_mil_fold

__all__ = [
    "Epoch",
    "deal_folds",
    "find_threshold",
    "fit_network",
    "member_parts",
    "train",
    "train_fold",
    "weighted_loss",
]

logger = logging.getLogger("pathopipe")

_CONFIG: Final = "config.json"
_HISTORY: Final = "history.csv"
_TILES_FOR_STATISTICS: Final = 256
_WARMUP: Final = 0.1
# Slides a step of the image baseline, as `mil` has it: more of them train it worse.
_MOST_BASELINE_BAGS: Final = 16
_TEMPERATURES: Final = (0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
# Chance at most that the true precision lies below the bound.
_RISK: Final = 0.1

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Epoch:
    """One line of a training's history."""

    model: str
    """``multitask``, or ``baseline`` with its task."""
    member: int
    epoch: int
    train_loss: float
    val_loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldResult:
    """A trained model, and what it and the baseline say of slides that they have not learnt from."""

    model: MetadataModel
    rows: list[dict[str, Any]]
    """Out-of-fold predictions, as :func:`pathopipe.metadata.evaluate.oof_rows` gives them."""
    history: tuple[Epoch, ...]


# --- one network -------------------------------------------------------------------------------------------------


def fit_network(
    network: MetadataNetwork,
    specs: Sequence[TargetSpec],
    weights: Sequence[float],
    inputs: Inputs,
    truth: Floats,
    train: NDArray[np.intp],
    val: NDArray[np.intp],
    settings: MetadataConfig,
    *,
    seed: int,
    device: str = "cpu",
    where: str = "",
    on_epoch: Callable[[int, float, float], None] = lambda epoch, train_loss, val_loss: None,
) -> MetadataNetwork:
    """Train a network in place; nothing but ``train`` and ``val`` is looked at.

    Slides without a label, or without any modality, are passed over. The validation loss is the mean of that from all
    modalities and that from the image alone, where there is an image branch beside others: both are asked for at
    prediction.

    Args:
        network: With standardisation set.
        specs: Targets, fitted on the training part.
        weights: Of each target in the loss.
        inputs: All slides.
        truth: (n, W) encoded labels, NaN where missing.
        train: Rows to learn from.
        val: Rows whose loss decides when to stop and which epoch is kept.
        settings: The recipe.
        seed: Decides order, samples and dropout. Torch's own generators are left as they were.
        device: ``cpu`` or ``cuda``.
        where: What is trained, for messages.
        on_epoch: Told of each epoch.

    Raises:
        UsageError: The loss is not finite.
    """
    labelled = np.asarray(np.isfinite(truth).any(axis=1) & inputs.present.any(axis=1))
    train, val = train[labelled[train]], val[labelled[val]]
    if not len(train):
        return network.eval()
    network.to(device)
    labels = torch.from_numpy(truth).float().to(device)
    branches = network.shape.branches
    hides = sum(branches) > 1 and settings.modality_dropout > 0
    aligns = branches[0] and branches[1] and settings.alignment > 0
    # Biases, norms and the weights of modalities are not pulled to zero.
    matrices = [weight for name, weight in network.named_parameters() if weight.ndim > 1 and name != "weights"]
    others = [weight for name, weight in network.named_parameters() if weight.ndim <= 1 or name == "weights"]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        fused=True,
    )
    steps = settings.epochs * -(-len(train) // settings.batch_slides)
    rise = max(1, round(_WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * min(1, max(0, step - rise) / max(1, steps - rise)))
        ),
    )
    chance = torch.Generator().manual_seed(seed)
    best_loss, best_epoch, best = math.inf, 0, copy.deepcopy(network.state_dict())
    with torch.random.fork_rng(devices=["cuda"] if device == "cuda" else []):
        torch.manual_seed(seed)
        for epoch in range(settings.epochs):
            network.train()
            losses = []
            for rows, batch in slide_batches(
                inputs,
                train,
                size=settings.batch_slides,
                cap=settings.cap,
                seed=seed,
                epoch=epoch,
                shuffle=True,
                device=device,
            ):
                vectors, _ = network.encode(batch)
                seen = drop_modalities(batch.present, settings.modality_dropout, chance) if hides else batch.present
                own = torch.from_numpy(rows).to(device)
                loss = weighted_loss(specs, weights, network.decide(vectors, seen), labels[own])
                if aligns:
                    both = batch.present[:, 0] & batch.present[:, 1]
                    patients = torch.from_numpy(inputs.patient[rows]).to(device)[both]
                    loss = loss + settings.alignment * alignment_loss(vectors[both, 0], vectors[both, 1], patients)
                if not bool(torch.isfinite(loss)):
                    raise UsageError(
                        f"{where}: the loss is {loss.item()} in epoch {epoch}; lower metadata.learning_rate (now "
                        f"{settings.learning_rate:g}), or look for huge values among the features"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(network.parameters(), settings.gradient_clip)
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
            train_loss = float(np.mean(losses))
            val_loss = _validate(network, specs, weights, inputs, labels, val, device) if len(val) else train_loss
            on_epoch(epoch, train_loss, val_loss)
            if val_loss < best_loss:
                best_loss, best_epoch, best = val_loss, epoch, copy.deepcopy(network.state_dict())
            elif epoch - best_epoch >= settings.patience:
                break
    network.load_state_dict(best)
    return network.cpu().eval()


def weighted_loss(specs: Sequence[TargetSpec], weights: Sequence[float], logits: Tensor, truth: Tensor) -> Tensor:
    """Sum over tasks of weight times mean loss over the slides with a label."""
    loss = logits.sum() * 0
    for number, (spec, weight) in enumerate(zip(specs, weights, strict=True)):
        own_logits, own_truth = slice_of(specs, number, "logits"), slice_of(specs, number, "truth")
        loss = loss + weight * target_loss([spec], logits[:, own_logits], truth[:, own_truth])
    return loss


def _validate(
    network: MetadataNetwork,
    specs: Sequence[TargetSpec],
    weights: Sequence[float],
    inputs: Inputs,
    labels: Tensor,
    val: NDArray[np.intp],
    device: str,
) -> float:
    """Mean of the losses from all modalities and from the image alone."""
    network.eval()
    views = [as_mask(MODALITIES)]
    if network.shape.branches[0] and sum(network.shape.branches) > 1:
        views.append(as_mask(("image",)))
    with torch.inference_mode():
        parts = [
            (rows, network.encode(batch)[0], batch.present) for rows, batch in whole_batches(inputs, val, device=device)
        ]
        truth = labels[torch.from_numpy(np.concatenate([rows for rows, _, _ in parts])).to(device)]
        vectors, present = torch.cat([part for _, part, _ in parts]), torch.cat([part for _, _, part in parts])
        losses = []
        for view in views:
            seen = present & torch.from_numpy(view).to(device)
            some = seen.any(dim=1)
            if bool(some.any()):
                losses.append(_tempered_loss(specs, weights, network.decide(vectors[some], seen[some]), truth[some]))
    return float(np.mean(losses))


def _tempered_loss(specs: Sequence[TargetSpec], weights: Sequence[float], logits: Tensor, truth: Tensor) -> float:
    """As :func:`weighted_loss`, each task at the temperature that suits it best.

    Networks grow too sure long before they order slides any worse, and temperatures are found afterwards in any case:
    without this, training would stop at the first task that grows too sure.
    """
    total = 0.0
    for number, (spec, weight) in enumerate(zip(specs, weights, strict=True)):
        own_logits = logits[:, slice_of(specs, number, "logits")]
        own_truth = truth[:, slice_of(specs, number, "truth")]
        temperatures = _TEMPERATURES if spec.classes else (1.0,)
        losses = [float(target_loss([spec], own_logits / temperature, own_truth)) for temperature in temperatures]
        # The least of some numbers passes over NaN; a network that has gone astray must not.
        total += weight * (min(losses) if all(map(math.isfinite, losses)) else math.inf)
    return total


def _tile_statistics(bags: Sequence[Bag], seed: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of features over a sample of the tiles of each slide."""
    count, total, squares = 0, np.zeros(bags[0].features), np.zeros(bags[0].features)
    for batch in BagLoader(bags, cap=_TILES_FOR_STATISTICS, seed=seed).epoch():
        tiles = batch.tiles[0].astype(np.float64)
        count, total, squares = count + len(tiles), total + tiles.sum(axis=0), squares + (tiles**2).sum(axis=0)
    mean = total / count
    variance = squares / count - mean**2
    # Below what float32 features can tell, a feature is constant and the difference rounding.
    std = np.sqrt(np.where(variance > 1e-12 * (mean**2 + 1e-30), variance, 0))
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()


# --- one fold ----------------------------------------------------------------------------------------------------


def deal_folds(cohort: MetadataCohort, settings: MetadataConfig, *, seed: int) -> list[Fold]:
    """Part the patients into test folds, and take a validation part out of what remains of each.

    Classes are spread evenly for the task that has most of them, whose rare ones need it most.

    Raises:
        SplitError: Too few patients or sites.
    """
    return nested_folds(
        cohort.patients,
        _strata(cohort),
        folds=settings.folds,
        # Several members validate on parts of the training side in turn; one alone needs a part of its own.
        val_share=settings.val_share if settings.members == 1 else 0.0,
        seed=seed,
        sites=cohort.sites if any(cohort.sites) else None,
        by_site=settings.leave_sites_out,
    )


def _strata(cohort: MetadataCohort) -> list[str]:
    """Classes of the task that has most of them, by name, for messages; numbers by quarters."""
    specs = sorted(
        (spec for task in cohort.tasks if (spec := task.target).kind != "multilabel"),
        key=lambda spec: -len(spec.classes),
    )
    if not specs:
        return [""] * len(cohort)
    truth = cohort.truth[specs[0].name]
    return label_texts(specs[0], truth)[specs[0].name] if specs[0].classes else strata_of(specs[0], truth)


def _spread(patients: Sequence[str], strata: Sequence[str], parts: int) -> list[str]:
    """The strata, without those of fewer patients than parts, and none where but one is left."""
    counts = Counter(stratum for _, stratum in set(zip(patients, strata, strict=True)))
    kept = {stratum for stratum, n in counts.items() if stratum and n >= parts}
    return [stratum if stratum in kept and len(kept) > 1 else "" for stratum in strata]


def member_parts(
    cohort: MetadataCohort, fold: Fold, members: int, *, seed: int
) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Rows that each member learns from, and rows that it stops on and is calibrated on; patients stay whole.

    Several members keep parts of the training side back in turn; one alone has the fold's own validation part. There
    are fewer members where there are fewer patients.
    """
    patients = [cohort.patients[int(row)] for row in fold.train]
    members = min(members, len(set(patients)))
    if members < 2:
        return [(fold.train, fold.val)]
    strata = _strata(cohort)
    parts = nested_folds(
        patients,
        _spread(patients, [strata[int(row)] for row in fold.train], members),
        folds=members,
        val_share=0,
        seed=seed,
    )
    return [(fold.train[part.train], fold.train[part.test]) for part in parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class _FoldData:
    """What the models of one fold have in common."""

    cohort: MetadataCohort
    fold: Fold
    settings: MetadataConfig
    seed: int
    device: str
    preparation: Preparation
    inputs: Inputs
    specs: tuple[TargetSpec, ...]
    """Fitted on the training part."""
    truth: Floats
    """(n, W) of all tasks."""
    tile_statistics: tuple[Tensor, Tensor] | None
    """Mean and spread of the training tiles."""
    parts: Sequence[tuple[NDArray[np.intp], NDArray[np.intp]]]
    """Training and validation rows of each member."""

    def labelled(self, number: int, inputs: Inputs) -> bool:
        """Whether any training slide has something to see and a record of this task."""
        own = self.truth[self.fold.train][:, slice_of(self.specs, number, "truth")]
        return bool((np.isfinite(own).any(axis=1) & inputs.present[self.fold.train].any(axis=1)).any())


def train_fold(
    cohort: MetadataCohort,
    fold: Fold,
    settings: MetadataConfig,
    *,
    seed: int = 0,
    device: str = "cpu",
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> FoldResult:
    """Train the model and the baselines of one fold; its test slides are scored once, at the end.

    Vocabulary, table columns, scales and class weights come from the training side alone; when to stop, temperatures
    and thresholds from the part of it that a network did not learn from.

    The baseline is one model a task from one modality. That is the image, by what ``mil train`` would make of it with
    the recipe that is its own; where no slide has an image the report, else the table, by the same branch trained as
    here.

    Args:
        cohort: Slides and tasks.
        fold: Its parts.
        settings: The recipe.
        seed: With the fold and the member it decides everything random.
        device: ``cpu`` or ``cuda``.
        on_epoch: Told of each epoch.

    Raises:
        UsageError: No training slide has a modality, or none a record of some task, or a loss is not finite.
    """
    truth = np.concatenate([cohort.truth[task.name] for task in cohort.tasks], axis=1)
    preparation = Preparation.fit(cohort, fold.train, _text_encoder(settings, seed))
    inputs = preparation.inputs(cohort)
    bags = [bag for row in fold.train if (bag := inputs.bags[int(row)]) is not None]
    data = _FoldData(
        cohort=cohort,
        fold=fold,
        settings=settings,
        seed=seed,
        device=device,
        preparation=preparation,
        inputs=inputs,
        specs=fit_targets([task.target for task in cohort.tasks], truth[fold.train], balanced=settings.balanced),
        truth=truth,
        tile_statistics=_tile_statistics(bags, seed) if bags else None,
        parts=member_parts(cohort, fold, settings.members, seed=seed),
    )
    for number, task in enumerate(cohort.tasks):
        if not data.labelled(number, inputs):
            raise UsageError(
                f"fold {fold.name}: no training slide has both a record of task '{task.name}' and anything to learn it "
                "from; take fewer folds, leave the task out, or check that features and reports fit the manifest"
            )
    history: list[Epoch] = []

    def note(epoch: Epoch) -> None:
        history.append(epoch)
        on_epoch(epoch)

    model = _train_model(data, MULTITASK, range(len(data.specs)), inputs, note)
    rows: list[dict[str, Any]] = []
    names = (ALL, *model.card.shape.modalities)
    asked = {name: MODALITIES if name == ALL else (name,) for name in names}
    logits = model.logits(inputs, fold.test, list(asked.values()))
    for name, chosen in asked.items():
        used = inputs.present[fold.test] & as_mask(chosen)
        scores = interpret(model.card, logits[chosen], used)
        rows += _rows_of(data, (MULTITASK, name), used, scores, abstentions(model.card, scores, used))
    rows += _baseline(data, model.card.shape.modalities[0], note)
    return FoldResult(model=model, rows=rows, history=tuple(history))


def _text_encoder(settings: MetadataConfig, seed: int) -> TextEncoder:
    if settings.text_encoder == NGRAMS:
        return TextVectorizer(width=settings.text_features, seed=seed)
    return TransformersText(settings.text_encoder)


def _train_model(
    data: _FoldData, name: str, numbers: Sequence[int], inputs: Inputs, on_epoch: Callable[[Epoch], None]
) -> MetadataModel:
    """A calibrated model of some of the tasks, from what ``inputs`` shows."""
    settings, fold = data.settings, data.fold
    specs = [data.specs[number] for number in numbers]
    tasks = tuple(data.cohort.tasks[number] for number in numbers)
    truth = np.concatenate([data.truth[:, slice_of(data.specs, number, "truth")] for number in numbers], axis=1)
    there = np.asarray(inputs.present[fold.train].any(axis=0))
    shape = MetadataShape(
        tile_features=data.preparation.tile_features if there[0] else 0,
        text_features=inputs.text.shape[1] if there[1] else 0,
        table_features=inputs.table.shape[1] if there[2] else 0,
        outputs=tuple(spec.outputs for spec in specs),
        head=settings.head,
        width=settings.width,
        hidden=settings.hidden,
        attention=settings.attention,
        dropout=settings.dropout,
        bag_size=settings.bag_size,
    )
    networks = []
    for member, (train, val) in enumerate(data.parts):
        seed = int(np.random.SeedSequence([data.seed, *fold.name.encode(), member]).generate_state(1)[0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = MetadataNetwork(shape)
        if network.image is not None and data.tile_statistics is not None:
            shown = fold.train[inputs.present[fold.train, 0]]
            described = [
                network.image.describe(batch.tiles, batch.real, batch.sizes)
                for _, batch in slide_batches(inputs, shown, size=settings.batch_slides, cap=settings.cap, seed=seed)
                if batch.tiles is not None and batch.real is not None and batch.sizes is not None
            ]
            network.image.standardise(data.tile_statistics, torch.cat(described))
        if network.text is not None:
            told = fold.train[inputs.present[fold.train, 1]]
            network.text.standardise(torch.from_numpy(inputs.text[told]))
        fitted = fit_network(
            network,
            specs,
            [task.weight for task in tasks],
            inputs,
            truth,
            train,
            val,
            settings,
            seed=seed,
            device=data.device,
            where=f"fold {fold.name}, {name}",
            on_epoch=lambda epoch, train_loss, val_loss, member=member: on_epoch(  # type: ignore[misc]
                Epoch(name, member, epoch, train_loss, val_loss)
            ),
        )
        networks.append(fitted)
    bag = next((bag for bag in inputs.bags if bag is not None), None) if shape.tile_features else None
    card = ModelCard(
        shape=shape,
        tasks=tasks,
        targets=tuple(specs),
        members=len(networks),
        text_encoder=settings.text_encoder if shape.text_features else "",
        table_columns=data.preparation.table_columns if shape.table_features else (),
        encoder=bag.encoder if bag is not None else "",
        encoder_id=bag.encoder_id if bag is not None else "",
        grid=bag.sources[0].grid if bag is not None else "",
        precision=settings.precision,
        temperatures={spec.name: {} for spec in specs},
        thresholds={spec.name: {} for spec in specs},
        training={
            "fold": fold.name,
            "seed": data.seed,
            "slides": len(fold.train) + len(fold.val),
            "patients": len({data.cohort.patients[int(row)] for row in (*fold.train, *fold.val)}),
            "settings": settings.model_dump(mode="json"),
        },
    )
    # Each slide by the member that did not learn from it.
    sets = modality_sets(shape.modalities)
    found = [
        MetadataModel(card, data.preparation, [network], device=data.device).logits(inputs, val, sets)
        for network, (_, val) in zip(networks, data.parts, strict=True)
    ]
    rows = np.concatenate([val for _, val in data.parts])
    logits = {chosen: np.concatenate([one[chosen] for one in found]) for chosen in sets}
    calibrated = _calibrate(card, logits, inputs.present[rows], truth[rows])
    return MetadataModel(calibrated, data.preparation, networks, device=data.device)


def _baseline(data: _FoldData, modality: str, on_epoch: Callable[[Epoch], None]) -> list[dict[str, Any]]:
    """Out-of-fold predictions of one model a task from one modality."""
    mask, test = as_mask((modality,)), data.fold.test
    train_one = _image_baseline if modality == MODALITIES[0] else _branch_baseline
    inputs = replace(data.inputs, present=data.inputs.present & mask)
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
    return _rows_of(data, (BASELINE, modality), inputs.present[test], scores, abstained)


def _branch_baseline(
    data: _FoldData, number: int, inputs: Inputs, on_epoch: Callable[[Epoch], None]
) -> tuple[Floats, NDArray[np.bool_]]:
    """Predictions of the test slides by the same branch alone, trained alike for one task; and where it abstains."""
    test, name = data.fold.test, data.specs[number].name
    model = _train_model(data, f"{BASELINE} {name}", [number], inputs, on_epoch)
    scores = interpret(model.card, model.logits(inputs, test, [MODALITIES])[MODALITIES], inputs.present[test])
    return scores[name], abstentions(model.card, scores, inputs.present[test])[name]


def _image_baseline(
    data: _FoldData, number: int, inputs: Inputs, on_epoch: Callable[[Epoch], None]
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
    kept = _spread([patients[row] for row in train], strata_of(task, truth[train]), settings.members)
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


def _rows_of(
    data: _FoldData,
    view: View,
    used: NDArray[np.bool_],
    scores: Mapping[str, Floats],
    abstained: Mapping[str, NDArray[np.bool_]],
) -> list[dict[str, Any]]:
    cases = [data.cohort.cases[int(row)] for row in data.fold.test]
    return oof_rows(
        [(case.slide_id, case.patient_id, case.site) for case in cases],
        data.fold.name,
        view,
        [set_name(row) for row in used],
        data.specs,
        {task.name: data.cohort.truth[task.name][data.fold.test] for task in data.cohort.tasks},
        scores,
        abstained,
    )


# --- calibration and abstention ----------------------------------------------------------------------------------


def find_threshold(surety: Floats, right: Floats, precision: float) -> float | None:
    """The lowest surety above which at least this share of predictions is right, as far as the slides can prove it.

    Proven: the lower end of the one-sided 90 % interval of the share (Clopper and Pearson 1934, Biometrika 26, 404) is
    not below what is asked for; few slides prove little. Source of the bound's use: Geifman and El-Yaniv 2017,
    Selective classification for deep neural networks, arXiv:1705.08500.

    Args:
        surety: (n,) of validation slides.
        right: (n,) 1 or 0; NaN where nothing is recorded.
        precision: Share asked for.

    Returns:
        None where no threshold reaches it.
    """
    known = np.isfinite(right) & np.isfinite(surety)
    order = np.argsort(-surety[known], kind="stable")
    surety, right = surety[known][order], right[known][order]
    if not len(surety):
        return None
    # Slides of one surety stand or fall together: a cut is after the last of them.
    last = np.flatnonzero(np.append(surety[1:] < surety[:-1], True))
    n, n_right = last + 1.0, np.cumsum(right)[last]
    bound = np.where(n_right > 0, beta.ppf(_RISK, np.maximum(n_right, 1), n - n_right + 1), 0)
    reached = last[bound >= precision]
    return float(surety[reached[-1]]) if len(reached) else None


def _calibrate(
    card: ModelCard, logits: Mapping[tuple[str, ...], Floats], present: NDArray[np.bool_], truth: Floats
) -> ModelCard:
    """The card with temperatures and thresholds of every task for every choice of modalities.

    Args:
        card: Of the model.
        logits: By modalities (n, K), of slides that were not learnt from.
        present: (n, 3) what they have.
        truth: (n, W).
    """
    temperatures: dict[str, dict[str, float]] = {spec.name: {} for spec in card.targets}
    thresholds: dict[str, dict[str, float | None]] = {spec.name: {} for spec in card.targets}
    for chosen, values_of_set in logits.items():
        mask = as_mask(chosen)
        name = set_name(mask)
        rows = np.flatnonzero((present | ~mask).all(axis=1))
        own_logits, own_truth = values_of_set[rows], truth[rows]
        for number, spec in enumerate(card.targets):
            temperatures[spec.name][name] = find_temperature(card.targets, number, own_logits, own_truth)
        calibrated = replace(card, temperatures=temperatures)
        scores = interpret(calibrated, own_logits, np.tile(mask, (len(rows), 1)))
        for number, spec in enumerate(card.targets):
            known = own_truth[:, slice_of(card.targets, number, "truth")]
            values = scores[spec.name]
            # A number is neither right nor wrong, so there is nothing to abstain from.
            if spec.classes:
                right = right_of(spec, values, known)
                thresholds[spec.name][name] = find_threshold(surety_of(spec, values), right, card.precision)
    return replace(card, temperatures=temperatures, thresholds=thresholds)


# --- all folds ---------------------------------------------------------------------------------------------------


def train(
    cohort: MetadataCohort,
    settings: MetadataConfig,
    out: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    on_line: Callable[[str], None] = lambda line: None,
) -> OutOfFold:
    """Train every fold that isn't there yet, and write what each says of the slides it has not learnt from.

    In ``out``: ``config.json`` (settings, tasks, what was trained on), ``folds.csv``, ``folds/<name>/`` with weights,
    card, history and predictions, and ``oof.csv`` with those of all folds. The same call gives the same bytes, whether
    or not it was stopped in between, on the same machine with as many threads.

    Args:
        cohort: Slides and tasks.
        settings: The recipe.
        out: The folder; a training of the same cohort and settings is gone on with.
        seed: Decides folds, weights, order, samples and dropout.
        device: ``cpu`` or ``cuda``.
        on_line: Told what happens, a line each.

    Returns:
        The out-of-fold predictions, as :func:`pathopipe.metadata.evaluate.read_oof` reads them.

    Raises:
        UsageError: A task can't be learnt, ``out`` holds another training, or a loss is not finite.
        StoreBusyError: Another process is training there.
        StoreWriteError: ``out`` can't be written.
    """
    check_tasks(cohort)
    folds = [replace(fold, name=f"fold{fold.name}") for fold in deal_folds(cohort, settings, seed=seed)]
    with one_at_a_time(out / ".lock", f"{out}"):
        _check_output(cohort, settings, folds, out, seed)
        for number, fold in enumerate(folds, 1):
            folder = out / FOLDS_FOLDER / fold.name
            if folder.exists():
                on_line(f"[{number}/{len(folds)}] {fold.name}: was there already")
                continue
            result = train_fold(cohort, fold, settings, seed=seed, device=device)
            _save_fold(folder, result)
            epochs = sum(1 for epoch in result.history if epoch.model == MULTITASK)
            on_line(
                f"[{number}/{len(folds)}] {fold.name}: {len(fold.train)} slides, {settings.members} networks, "
                f"{epochs} epochs"
            )
        _join_folds(cohort, folds, out)
    return read_oof(out)


def _check_output(
    cohort: MetadataCohort, settings: MetadataConfig, folds: Sequence[Fold], out: Path, seed: int
) -> None:
    """Write config and folds into a new output folder, or make sure that they are those of the present call."""
    found = {
        "seed": seed,
        "settings": settings.model_dump(mode="json"),
        "tasks": [task.to_json() for task in cohort.tasks],
        "table_columns": list(cohort.table_columns),
        "slides": _digest(cohort),
    }
    found = json.loads(json.dumps(found))
    path = out / _CONFIG
    remove_leftovers(out)
    if path.exists():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: can't be read ({error}); choose another --out") from None
        differing = [key for key in found if known.get(key) != found[key]]
        if differing:
            old, new = known.get("settings", {}), found["settings"]
            inner = [f"{name} was {old.get(name)}, now {new[name]}" for name in new if old.get(name) != new[name]]
            if differing[0] == "seed":
                what = f"seed was {known.get('seed')}, now {seed}"
            elif differing[0] == "settings":
                what = inner[0]
            else:
                what = f"other {differing[0]}"
            raise UsageError(
                f"{out}: holds models of another training ({what}); choose another --out, delete this folder, "
                "or repeat its settings"
            )
        return
    rows = []
    for fold in folds:
        for part in ("train", "val", "test"):
            for row in getattr(fold, part):
                case = cohort.cases[int(row)]
                rows.append([case.slide_id, case.patient_id, case.site, fold.name, part])
    _write_csv(out / FOLDS_FILE, ["slide_id", "patient_id", "site", "fold", "part"], rows)
    with durable_file(path) as file:
        file.write(json.dumps(found, indent=1).encode())


def _digest(cohort: MetadataCohort) -> str:
    """Changes with anything that models learn from or are tested on."""
    digest = sha256()
    for case in cohort.cases:
        bag = case.bag
        tiles = "" if bag is None else f"{bag.n_tiles} {bag.features} {bag.encoder_id}"
        record = [case.slide_id, case.patient_id, case.site, tiles, case.text, sorted(case.row.items())]
        digest.update(json.dumps(record).encode())
    for task in cohort.tasks:
        digest.update(np.ascontiguousarray(cohort.truth[task.name]).tobytes())
    return digest.hexdigest()[:16]


def _save_fold(folder: Path, result: FoldResult) -> None:
    """Write a model with its predictions; the folder appears whole or not at all."""
    partial = folder.parent / f".{folder.name}.unfinished"
    shutil.rmtree(partial, ignore_errors=True)
    result.model.save(partial)
    _write_csv(
        partial / _HISTORY, list(Epoch.__dataclass_fields__), [list(asdict(epoch).values()) for epoch in result.history]
    )
    write_rows(partial / OOF_FILE, result.rows)
    partial.replace(folder)


def _join_folds(cohort: MetadataCohort, folds: Sequence[Fold], out: Path) -> None:
    """Write the predictions of all folds as one table, view by view in the order of the cohort."""
    place = {case.slide_id: number for number, case in enumerate(cohort.cases)}
    rows: list[dict[str, str]] = []
    for fold in folds:
        with (out / FOLDS_FOLDER / fold.name / OOF_FILE).open(encoding="utf-8", newline="") as file:
            rows += csv.DictReader(file)
    views = list(dict.fromkeys((row["model"], row["shown"]) for row in rows))
    rows.sort(key=lambda row: (views.index((row["model"], row["shown"])), place[unescape(row["slide_id"])]))
    write_rows(out / OOF_FILE, rows)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    with durable_file(path) as file:
        file.write(text.getvalue().encode())
