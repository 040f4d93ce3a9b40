"""Predictions as tables: what the folds of a training wrote, what a prediction writes, thresholds from validation."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathopipe.cohort import LabelTable
from pathopipe.errors import StoreError
from pathopipe.files import durable_file
from pathopipe.mil.cases import Cases, gather_cases
from pathopipe.mil.predict import Ensemble, Prediction
from pathopipe.mil.targets import TargetSpec, encode_targets, label_texts, scores_of, slice_of

__all__ = [
    "ScoredBags",
    "cases_of_folds",
    "cases_of_predictions",
    "fold_thresholds",
    "prediction_rows",
    "read_scored",
    "read_targets",
    "validation_threshold",
    "write_rows",
]

_FEWEST_ROWS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredBags:
    """The ``predictions.csv`` of one fold."""

    fold: str
    bag_ids: tuple[str, ...]
    patients: tuple[str, ...]
    sites: tuple[str, ...]
    parts: tuple[str, ...]
    """``val`` or ``test``."""
    truth: NDArray[np.float64]
    """(n, W) encoded labels of all targets."""
    predictions: tuple[NDArray[np.float64], ...]
    """For each target (n, P)."""


def read_targets(folder: Path) -> tuple[TargetSpec, ...]:
    """What a saved model predicts, without loading its weights.

    Raises:
        StoreError: The model's card is damaged.
    """
    path = folder / "model.json"
    try:
        return tuple(TargetSpec.from_json(record) for record in json.loads(path.read_text(encoding="utf-8"))["targets"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: can't be read ({error}); train the model again, or copy it again") from None


def read_scored(folder: Path, targets: Sequence[TargetSpec]) -> ScoredBags:
    """Read what a fold's model said of its validation and test bags.

    Raises:
        StoreError: The table is missing or lacks a column.
    """
    path = folder / "predictions.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise StoreError(f"{folder}: no predictions.csv; run 'mil train' again, it goes on where it stopped") from None
    try:
        columns: dict[str, tuple[str, ...]] = {}
        for spec in targets:
            for column, written in zip(spec.columns, label_texts(spec, np.zeros((0, spec.width))), strict=True):
                columns[column] = tuple(row[written] for row in rows)
        table = LabelTable(
            source=str(path),
            slide_ids=tuple(row["bag_id"] for row in rows),
            patient_ids=tuple(row["patient_id"] for row in rows),
            sites=tuple(row["site"] for row in rows),
            split=None,
            columns=columns,
        )
        predictions = tuple(
            np.array([[float(row[name]) for name in spec.prediction_names] for row in rows]).reshape(
                len(rows), len(spec.prediction_names)
            )
            for spec in targets
        )
        parts = tuple(row["part"] for row in rows)
    except (KeyError, ValueError) as error:
        raise StoreError(f"{path}: not a table of this model ({error}); run 'mil train' again") from None
    return ScoredBags(
        fold=folder.name,
        bag_ids=table.slide_ids,
        patients=table.patient_ids,
        sites=table.sites,
        parts=parts,
        truth=encode_targets(targets, table),
        predictions=predictions,
    )


def fold_thresholds(fold: ScoredBags, targets: Sequence[TargetSpec], number: int) -> NDArray[np.float64]:
    """(1,) the threshold of a binary target that the fold's validation bags ask for, (K,) those of several labels.

    0.5 for other kinds, and where the bags are too few.
    """
    spec, own = targets[number], slice_of(targets, number, "truth")
    cuts = np.full(len(spec.classes) if spec.kind == "multilabel" else 1, 0.5)
    if spec.kind in ("binary", "multilabel"):
        rows = np.array([part == "val" for part in fold.parts], bool)
        # Of a binary target the last column is the positive class.
        scores = fold.predictions[number][:, -len(cuts) :]
        for column in range(len(cuts)):
            found = validation_threshold(fold.truth[rows, own][:, column], scores[rows, column])
            cuts[column] = 0.5 if found is None else found
    return cuts


def cases_of_folds(
    folds: Sequence[ScoredBags], targets: Sequence[TargetSpec], number: int, *, threshold: float | None = None
) -> Cases:
    """The test bags of all folds for one target, each decided at its own fold's threshold.

    Args:
        folds: Of one head and encoder.
        targets: All targets, in the order of the model.
        number: Which target.
        threshold: One for all folds; where left out, that of each fold's validation bags (0.5 where these are too few).
    """
    spec, own = targets[number], slice_of(targets, number, "truth")
    rows = [np.flatnonzero([part == "test" for part in fold.parts]) for fold in folds]
    pairs = list(zip(folds, rows, strict=True))
    cuts = [fold_thresholds(fold, targets, number) if threshold is None else np.array([threshold]) for fold in folds]
    scores = np.concatenate([fold.predictions[number][test] for fold, test in pairs])
    spread = np.concatenate([np.tile(cut, (len(test), 1)) for cut, test in zip(cuts, rows, strict=True)])
    return gather_cases(
        spec.kind,
        _as_truth(spec, np.concatenate([fold.truth[test, own] for fold, test in pairs])),
        scores if spec.kind == "multilabel" else scores_of(spec, scores),
        [fold.patients[row] for fold, test in pairs for row in test],
        [fold.sites[row] for fold, test in pairs for row in test],
        spec.classes or None,
        folds=[position for position, test in enumerate(rows) for _ in test],
        threshold=spread if spec.kind == "multilabel" else spread[:, 0],
        threshold_from="from validation" if threshold is None else "as given",
    )


def cases_of_predictions(
    predictions: Sequence[Prediction],
    ensemble: Ensemble,
    truth: NDArray[np.float64],
    number: int,
    *,
    threshold: float | None = None,
) -> Cases:
    """Predictions of bags beside their labels (n, W), for one target.

    Without a threshold, the mean of those that the folds' validation bags ask for decides.
    """
    spec = ensemble.targets[number]
    found = np.array([one.probabilities[spec.name] for one in predictions])
    cut: NDArray[np.float64] | float | None = threshold
    if threshold is None and all((folder / "predictions.csv").is_file() for folder in ensemble.folders):
        folds = [read_scored(folder, ensemble.targets) for folder in ensemble.folders]
        mean = np.mean([fold_thresholds(fold, ensemble.targets, number) for fold in folds], axis=0)
        spread = np.tile(mean, (len(found), 1))
        cut = spread if spec.kind == "multilabel" else spread[:, 0]
    return gather_cases(
        spec.kind,
        _as_truth(spec, truth[:, slice_of(ensemble.targets, number, "truth")]),
        found if spec.kind == "multilabel" else scores_of(spec, found),
        [one.bag.patient_id for one in predictions],
        [one.bag.site for one in predictions],
        spec.classes or None,
        threshold=cut,
        threshold_from="from validation" if threshold is None else "as given",
    )


def _as_truth(spec: TargetSpec, truth: NDArray[np.float64]) -> NDArray[np.float64]:
    return truth if spec.kind == "multilabel" or spec.kind.startswith("survival") else truth[:, 0]


def validation_threshold(truth: NDArray[np.float64], score: NDArray[np.float64]) -> float | None:
    """The cut through validation bags with the best balanced accuracy; of equal ones that nearest to 0.5.

    Returns:
        None where there are fewer than ten bags or one class only.
    """
    known = np.isfinite(truth)
    truth, score = truth[known], score[known]
    n_positive = int((truth == 1).sum())
    if len(truth) < _FEWEST_ROWS or n_positive in (0, len(truth)):
        return None
    levels = np.unique(score)
    # Cuts between neighbouring scores: what lies on one is then never a matter of rounding.
    cuts = (levels[1:] + levels[:-1]) / 2
    if not len(cuts):
        return None
    above = score >= cuts[:, None]
    accuracy = above[:, truth == 1].mean(axis=1) + (~above[:, truth == 0]).mean(axis=1)
    best = np.flatnonzero(accuracy >= accuracy.max() - 1e-12)
    return float(cuts[best[np.argmin(np.abs(cuts[best] - 0.5))]])


def prediction_rows(
    predictions: Sequence[Prediction], ensemble: Ensemble, truth: NDArray[np.float64] | None = None
) -> list[dict[str, Any]]:
    """One record a bag: ids, what it was to the models, labels where there are some, predictions, logits.

    Args:
        predictions: Of bags.
        ensemble: That made them.
        truth: (n, W) encoded labels.
    """
    targets = ensemble.targets
    labels: dict[str, list[str]] = {}
    if truth is not None:
        for number, spec in enumerate(targets):
            labels |= label_texts(spec, truth[:, slice_of(targets, number, "truth")])
    rows = []
    for at, one in enumerate(predictions):
        row: dict[str, Any] = {
            "bag_id": one.bag.bag_id,
            "patient_id": one.bag.patient_id,
            "site": one.bag.site,
            "slides": len(one.bag.sources),
            "tiles": one.bag.n_tiles,
            "seen": one.seen,
            "folds": " ".join(ensemble.folds[model] for model in one.models),
        }
        row |= {name: cells[at] for name, cells in labels.items()}
        for number, spec in enumerate(targets):
            values = one.probabilities[spec.name]
            row |= {name: f"{value:.6g}" for name, value in zip(spec.prediction_names, values, strict=True)}
            own = one.logits[slice_of(targets, number, "logits")]
            row |= {f"{spec.name}_logit_{place}": f"{value:.6g}" for place, value in enumerate(own)}
        rows.append(row)
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write records as CSV, whole or not at all; cells that a spreadsheet would run are escaped, None is empty."""
    text = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(row.get(name)) for name in names} for row in rows)
    with durable_file(path) as file:
        file.write(text.getvalue().encode())


def _cell(value: object) -> object:
    is_formula = isinstance(value, str) and value[:1] in {"=", "+", "-", "@", "\t", "\r"}
    return f"'{value}" if is_formula and not _is_number(str(value)) else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
