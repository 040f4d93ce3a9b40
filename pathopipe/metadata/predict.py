"""The models of a training together: what they say of the fields of slides, in a catalogue's form."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import StoreError, UsageError
from pathopipe.files import durable_file
from pathopipe.metadata.calibration import interpret, thresholds_of
from pathopipe.metadata.cases import MetadataCohort
from pathopipe.metadata.model import MetadataModel
from pathopipe.metadata.network import MODALITIES, set_name
from pathopipe.metadata.probabilities import surety_of, value_of
from pathopipe.metadata.tasks import TaskSpec
from pathopipe.mil.scored import write_rows
from pathopipe.mil.targets import TargetSpec

__all__ = [
    "FOLDS_FILE",
    "FOLDS_FOLDER",
    "MetadataEnsemble",
    "Prediction",
    "load_ensemble",
    "predict",
    "write_csv",
    "write_json_lines",
]

FOLDS_FILE: Final = "folds.csv"
"""Which patient was in which part of which fold."""
FOLDS_FOLDER: Final = "folds"
"""Holds a folder a fold."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One field of one slide, as a catalogue takes it."""

    slide_id: str
    task: str
    value: str
    """The class, ``;`` between several labels, or the number; ``""`` where the slide has nothing to predict from."""
    code: str
    """The value in the terms that the task file names, ``;`` between several; ``""`` where it names none."""
    probability: float | None
    """How sure it is, calibrated; None for continuous tasks."""
    abstained: bool
    """The model is less sure than the precision asked for needs; the value is then not to be entered unseen."""
    model_id: str
    modalities: str
    """What it was predicted from: ``image+text``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataEnsemble:
    """The models of the folds of one training."""

    models: tuple[MetadataModel, ...]
    folds: tuple[str, ...]
    parts: Mapping[str, Mapping[str, str]]
    """By patient, then fold: ``train``, ``val`` or ``test``."""

    @property
    def tasks(self) -> tuple[TaskSpec, ...]:
        """What is predicted."""
        return self.models[0].card.tasks

    @property
    def targets(self) -> tuple[TargetSpec, ...]:
        """The same as ``mil`` knows it; what was fitted in the first fold."""
        return self.models[0].card.targets

    @property
    def model_id(self) -> str:
        """Tells this training from any other: a hash of all weights."""
        text = " ".join(model.weights_id for model in self.models)
        return f"pathopipe-metadata@{sha256(text.encode()).hexdigest()[:12]}"

    def choose(self, patient_id: str) -> tuple[int, ...]:
        """Which models may say something of a patient: those that have learnt nothing from it; all for a new one."""
        parts = self.parts.get(patient_id, {})
        held_out = [number for number, fold in enumerate(self.folds) if parts.get(fold) == "test"]
        return tuple(held_out or range(len(self.models)))

    def predict(self, cohort: MetadataCohort) -> tuple[dict[str, Floats], dict[str, NDArray[np.bool_]], list[str]]:
        """Predictions of every slide, from all modalities that it has.

        The calibrated probabilities of models are averaged. The threshold is the median of the models', each found on
        its own validation part.

        Returns:
            By task (n, P) predictions, NaN where a slide has nothing to predict from; by task (n,) whether the models
            abstain; and what each slide was predicted from.

        Raises:
            EncoderError: Embeddings are of another encoder.
        """
        n = len(cohort.cases)
        asked = MODALITIES
        choice = [self.choose(case.patient_id) for case in cohort.cases]
        totals = {spec.name: np.zeros((n, len(spec.prediction_names))) for spec in self.targets}
        cuts = {spec.name: np.full((n, len(self.models)), np.nan) for spec in self.targets}
        used = np.zeros((n, len(MODALITIES)), bool)
        for number, model in enumerate(self.models):
            rows = np.flatnonzero([number in chosen for chosen in choice])
            if not len(rows):
                continue
            part = cohort.take(rows)
            if model.card.shape.tile_features:
                model.check_features([case.bag for case in part.cases if case.bag is not None])
            inputs = model.preparation.inputs(part)
            used[rows] = inputs.present
            logits = model.logits(inputs, np.arange(len(rows)), [asked])[asked]
            for task, values in interpret(model.card, logits, inputs.present).items():
                totals[task][rows] += values
                cuts[task][rows, number] = thresholds_of(model.card, task, inputs.present)
        count = np.asarray([len(chosen) for chosen in choice])[:, None]
        predicted = {task: total / count for task, total in totals.items()}
        abstained = {}
        for spec in self.targets:
            surety = surety_of(spec, predicted[spec.name])
            nothing = ~np.isfinite(predicted[spec.name]).all(axis=1)
            unsure = ~(surety >= np.nanmedian(cuts[spec.name], axis=1)) if spec.classes else np.zeros(n, bool)
            abstained[spec.name] = nothing | unsure
        return predicted, abstained, [set_name(row) for row in used]


def load_ensemble(folder: Path, *, device: str = "cpu") -> MetadataEnsemble:
    """Open what :func:`pathopipe.metadata.train.train` wrote.

    Raises:
        UsageError: There are no models in this folder.
        StoreError: They are damaged, or of a newer version.
    """
    folders = sorted((folder / FOLDS_FOLDER).glob("*/")) if (folder / FOLDS_FOLDER).is_dir() else []
    folders = [path for path in folders if not path.name.startswith(".")]
    if not folders:
        raise UsageError(f"{folder}: no models here; give the folder that 'pathopipe metadata train --out' wrote")
    parts: dict[str, dict[str, str]] = {}
    try:
        with (folder / FOLDS_FILE).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                parts.setdefault(row["patient_id"], {})[row["fold"]] = row["part"]
    except (OSError, KeyError, UnicodeDecodeError) as error:
        raise StoreError(
            f"{folder / FOLDS_FILE}: can't be read ({error}); without it nobody knows which patients the models have "
            "seen: copy the folder again, or train again"
        ) from None
    return MetadataEnsemble(
        models=tuple(MetadataModel.load(path, device=device) for path in folders),
        folds=tuple(path.name for path in folders),
        parts=parts,
    )


def predict(model_folder: Path, cohort: MetadataCohort, *, device: str = "cpu") -> list[Prediction]:
    """Fields of a catalogue for every slide of a cohort, recorded or not.

    A patient of the training cohort is predicted by the models that did not learn from it.

    Args:
        model_folder: What ``metadata train`` wrote.
        cohort: Slides with whatever there is of them.
        device: ``cpu`` or ``cuda``.

    Returns:
        One for each slide and task, in the order of the cohort.

    Raises:
        UsageError: No model there, or embeddings of another encoder.
        StoreError: The model is damaged.
    """
    ensemble = load_ensemble(model_folder, device=device)
    predicted, abstained, used = ensemble.predict(cohort)
    model_id = ensemble.model_id
    rows = []
    for row, case in enumerate(cohort.cases):
        for task, spec in zip(ensemble.tasks, ensemble.targets, strict=True):
            probabilities = predicted[task.name][row]
            value = value_of(spec, probabilities)
            surety = float(surety_of(spec, probabilities[None])[0])
            named = value.split(";") if spec.kind == "multilabel" else [value]
            rows.append(
                Prediction(
                    slide_id=case.slide_id,
                    task=task.name,
                    value=value,
                    code=";".join(task.codes[name] for name in named if name in task.codes),
                    probability=round(surety, 6) if np.isfinite(surety) else None,
                    abstained=bool(abstained[task.name][row]),
                    model_id=model_id,
                    modalities=used[row],
                )
            )
    return rows


def write_csv(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions as CSV, whole or not at all; cells that a spreadsheet would run are escaped."""
    write_rows(path, [{**asdict(one), "abstained": str(one.abstained).lower()} for one in predictions])


def write_json_lines(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions as one JSON object a line, whole or not at all."""
    with durable_file(path) as file:
        file.writelines((json.dumps(asdict(one), ensure_ascii=False) + "\n").encode() for one in predictions)
