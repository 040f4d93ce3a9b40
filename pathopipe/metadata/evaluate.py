"""What a training is worth: figures of each task from slides not learnt from, and the gain over the baseline."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import StoreError, UsageError
from pathopipe.files import durable_file
from pathopipe.metadata.probabilities import right_of, surety_of, value_of
from pathopipe.metadata.tasks import TaskSpec
from pathopipe.mil import weighted
from pathopipe.mil.cases import FEWEST_PATIENTS, Cases, Kind, gather_cases
from pathopipe.mil.evaluate import FigureTable, figures_of
from pathopipe.mil.scored import write_rows
from pathopipe.mil.targets import TargetSpec, label_texts

__all__ = [
    "ALL",
    "BASELINE",
    "MULTITASK",
    "OOF_FILE",
    "Evaluation",
    "Gain",
    "OutOfFold",
    "TaskFigures",
    "View",
    "evaluate",
    "evaluation_json",
    "oof_rows",
    "read_oof",
    "unescape",
    "write_evaluation",
]

OOF_FILE: Final = "oof.csv"
"""Out-of-fold predictions of every slide."""

MULTITASK: Final = "multitask"
"""The model of all tasks and modalities."""
BASELINE: Final = "baseline"
"""One model a task, from one modality."""
ALL: Final = "all"
"""From whatever a slide has."""

Floats = NDArray[np.float64]
View = tuple[str, str]
"""Model (:data:`MULTITASK`, :data:`BASELINE`) and what it was shown (:data:`ALL`, ``image``, ``text``, ``table``)."""

_CONFIG: Final = "config.json"
_EVALUATION: Final = "evaluation.json"
_FIGURES: Final = "figures.csv"
_TAIL_PERCENT: Final = 2.5


# --- out of fold -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class OutOfFold:
    """What was said of n slides by models that have not learnt from their patients."""

    slide_ids: tuple[str, ...]
    patients: tuple[str, ...]
    sites: tuple[str, ...]
    folds: tuple[str, ...]
    tasks: tuple[TaskSpec, ...]
    truth: Mapping[str, Floats]
    """By task (n, width) encoded records, NaN where missing."""
    scores: Mapping[View, Mapping[str, Floats]]
    """By view, then task: (n, P) calibrated probabilities or the value, NaN where there is none."""
    abstained: Mapping[View, Mapping[str, NDArray[np.bool_]]]
    """Likewise (n,)."""
    used: Mapping[View, tuple[str, ...]]
    """What each slide was predicted from: ``image+text``."""

    def __len__(self) -> int:
        return len(self.slide_ids)

    @property
    def baseline(self) -> View:
        """The view of the baseline."""
        return next(view for view in self.scores if view[0] == BASELINE)


def oof_rows(
    slides: Sequence[tuple[str, str, str]],
    fold: str,
    view: View,
    used: Sequence[str],
    specs: Sequence[TargetSpec],
    truth: Mapping[str, Floats],
    scores: Mapping[str, Floats],
    abstained: Mapping[str, NDArray[np.bool_]],
) -> list[dict[str, Any]]:
    """Flat records, one a slide: for each task the record, the prediction, its surety, and all probabilities.

    Args:
        slides: n ids of slide, patient and site.
        fold: Its name.
        view: Which model, and what it was shown.
        used: n names of the modalities.
        specs: The targets.
        truth: By target (n, width).
        scores: By target (n, P).
        abstained: By target (n,).
    """
    labels: dict[str, list[str]] = {}
    for spec in specs:
        labels |= label_texts(spec, truth[spec.name])
    rows = []
    for number, (slide_id, patient_id, site) in enumerate(slides):
        row: dict[str, Any] = {"slide_id": slide_id, "patient_id": patient_id, "site": site, "fold": fold}
        row |= {"model": view[0], "shown": view[1], "used": used[number]}
        for spec in specs:
            values = scores[spec.name][number]
            surety = float(surety_of(spec, values[None])[0])
            row[f"{spec.name}"] = labels[spec.name][number]
            row[f"{spec.name}_value"] = value_of(spec, values)
            row[f"{spec.name}_surety"] = surety if math.isfinite(surety) else None
            row[f"{spec.name}_abstained"] = str(bool(abstained[spec.name][number])).lower()
            for name, value in zip(spec.prediction_names, values.tolist(), strict=True):
                # The value of a continuous task stands there already.
                if spec.classes:
                    row[name] = value if math.isfinite(value) else None
        rows.append(row)
    return rows


def read_oof(folder: Path) -> OutOfFold:
    """Read back what ``metadata train`` wrote.

    Raises:
        UsageError: There is no training in this folder, or it was not finished.
        StoreError: A file of it is damaged.
    """
    try:
        tasks = tuple(
            TaskSpec.from_json(task) for task in json.loads((folder / _CONFIG).read_text(encoding="utf-8"))["tasks"]
        )
        with (folder / OOF_FILE).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise UsageError(
            f"{folder}: no finished training here ({Path(str(error.filename)).name} is not there); "
            "run 'pathopipe metadata train' again, it goes on where it stopped"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder}: its files can't be read ({error}); train again into another folder") from None
    try:
        return _gather(rows, tasks)
    except (KeyError, ValueError) as error:
        raise StoreError(f"{folder / OOF_FILE}: not the table of this training ({error}); train again") from None


def _gather(rows: Sequence[Mapping[str, str]], tasks: tuple[TaskSpec, ...]) -> OutOfFold:
    by_view: dict[View, list[Mapping[str, str]]] = {}
    for row in rows:
        by_view.setdefault((row["model"], row["shown"]), []).append(row)
    first = by_view[MULTITASK, ALL]
    specs = [task.target for task in tasks]
    scores: dict[View, dict[str, Floats]] = {}
    abstained: dict[View, dict[str, NDArray[np.bool_]]] = {}
    for view, own in by_view.items():
        if [row["slide_id"] for row in own] != [row["slide_id"] for row in first]:
            raise ValueError(f"slides of {view[0]} from {view[1]} are others")
        scores[view] = {spec.name: _numbers_of(spec, own) for spec in specs}
        abstained[view] = {
            spec.name: np.asarray([row[f"{spec.name}_abstained"] == "true" for row in own]) for spec in specs
        }
    return OutOfFold(
        slide_ids=tuple(unescape(row["slide_id"]) for row in first),
        patients=tuple(unescape(row["patient_id"]) for row in first),
        sites=tuple(unescape(row["site"]) for row in first),
        folds=tuple(row["fold"] for row in first),
        tasks=tasks,
        truth={spec.name: _truth_of(spec, [unescape(row[spec.name]) for row in first]) for spec in specs},
        scores=scores,
        abstained=abstained,
        used={view: tuple(row["used"] for row in own) for view, own in by_view.items()},
    )


def _numbers_of(spec: TargetSpec, rows: Sequence[Mapping[str, str]]) -> Floats:
    names = spec.prediction_names if spec.classes else (f"{spec.name}_value",)
    cells = [[float(row[name]) if row[name] else math.nan for name in names] for row in rows]
    return np.asarray(cells, np.float64).reshape(len(rows), len(names))


def _truth_of(spec: TargetSpec, cells: Sequence[str]) -> Floats:
    truth = np.full((len(cells), spec.width), np.nan)
    for number, cell in enumerate(cells):
        if not cell:
            continue
        if spec.kind == "multilabel":
            truth[number] = [float(name in cell.split(";")) for name in spec.classes]
        else:
            truth[number] = spec.classes.index(cell) if spec.classes else float(cell)
    return truth


def unescape(cell: str) -> str:
    """A cell as it was before :func:`pathopipe.mil.scored.write_rows` kept spreadsheets from running it."""
    return cell[1:] if cell[:1] == "'" and cell[1:2] in {"=", "+", "-", "@", "\t", "\r"} else cell


# --- figures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFigures:
    """How well one task is predicted, in one view."""

    task: str
    view: View
    n_slides: int
    """With a record and a prediction."""
    n_patients: int
    table: FigureTable | None
    """None where nothing can be computed."""
    why: str
    """Why not; ``""`` where there is a table."""
    classes: tuple[str, ...]
    confusion: NDArray[np.intp] | None
    """(classes, classes) slides: rows the record, columns the prediction; None for several labels and numbers."""
    n_given: int
    """Slides with a record on which the model did not abstain."""
    given_right: float | None
    """Share of these that are right; None where there is none."""

    def value(self, name: str) -> float | None:
        """The overall figure of this name, as in :data:`pathopipe.mil.evaluate.TITLES`; None where it has no value."""
        if self.table is None:
            return None
        found = (
            figure.value for figure in self.table.figures if (figure.name, figure.label, figure.site) == (name, "", "")
        )
        return next(found, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Macro AUROC of one view minus that of another, on the same patients."""

    task: str
    """``""``: mean over the tasks."""
    view: View
    over: View
    value: float | None
    """AUROC of ``view``; None where a class is missing, with ``note``."""
    baseline: float | None
    difference: float | None
    low: float | None
    """95 % interval of the difference over patients, paired."""
    high: float | None
    n_slides: int
    n_patients: int
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """All figures of a training."""

    figures: tuple[TaskFigures, ...]
    gains: tuple[Gain, ...]
    notes: tuple[str, ...]

    def find(self, task: str, view: View = (MULTITASK, ALL)) -> TaskFigures:
        """The figures of one task in one view.

        Raises:
            KeyError: There are none.
        """
        for one in self.figures:
            if (one.task, one.view) == (task, view):
                return one
        raise KeyError(f"no figures of {task!r} from {view!r}")

    def gain(self, task: str = "", view: View = (MULTITASK, ALL)) -> Gain:
        """The gain of a view over the baseline in one task, or in their mean.

        Raises:
            KeyError: There is none.
        """
        for one in self.gains:
            if (one.task, one.view) == (task, view):
                return one
        raise KeyError(f"no gain of {view!r} in {task!r}")


def evaluate(oof: OutOfFold, *, draws: int = 1000, seed: int = 0) -> Evaluation:
    """Figures of every task in every view, and what the model of all tasks and modalities gains over the baseline.

    One row a patient where the patient's slides are recorded alike, else one a slide; intervals are over patients.

    Gains: differences of macro AUROC (one class against the rest, mean over classes; mean over labels) on the slides
    that both predict. All tasks and both views share each bootstrap sample of patients, so the interval is paired, also
    that of the mean over tasks. A class that a sample lacks is left out of that sample's mean, on both sides.

    Args:
        oof: Out-of-fold predictions.
        draws: Bootstrap samples.
        seed: Of the bootstrap.
    """
    figures = [_figures_of_task(oof, task, view, draws=draws, seed=seed) for view in oof.scores for task in oof.tasks]
    base = oof.baseline
    gains = _gains(oof, (MULTITASK, ALL), base, draws=draws, seed=seed)
    # What the other tasks and modalities do for a model that then sees what the baseline sees.
    alone = (MULTITASK, base[1])
    gains += _gains(oof, alone, base, draws=draws, seed=seed)
    notes = [
        f"baseline: one model a task, from the {base[1]} alone, the same folds",
        f"intervals: 95 %, percentiles of {draws} bootstrap samples of patients, seed {seed}",
    ]
    return Evaluation(figures=tuple(figures), gains=tuple(gains), notes=tuple(notes))


def _kind_of(spec: TargetSpec) -> Kind:
    # The classes of an ordinal task against the rest, as those of any other.
    return "multiclass" if spec.kind == "ordinal" else spec.kind


def _cases_of(oof: OutOfFold, spec: TargetSpec, rows: NDArray[np.intp], view: View) -> Cases:
    truth = oof.truth[spec.name][rows]
    return gather_cases(
        _kind_of(spec),
        truth if spec.kind == "multilabel" else truth[:, 0],
        oof.scores[view][spec.name][rows],
        [oof.patients[row] for row in rows],
        [oof.sites[row] for row in rows],
        spec.classes or None,
        folds=np.unique(oof.folds, return_inverse=True)[1][rows].tolist(),
    )


def _known(oof: OutOfFold, spec: TargetSpec, view: View) -> NDArray[np.bool_]:
    scored = np.isfinite(oof.scores[view][spec.name]).all(axis=1)
    return np.asarray(scored & np.isfinite(oof.truth[spec.name]).any(axis=1))


def _figures_of_task(oof: OutOfFold, task: TaskSpec, view: View, *, draws: int, seed: int) -> TaskFigures:
    spec = task.target
    rows = np.flatnonzero(_known(oof, spec, view))
    scores, truth = oof.scores[view][spec.name][rows], oof.truth[spec.name][rows]
    table, why, confusion = None, "", None
    if not len(rows):
        why = f"no slide has both a record and a prediction from {_shown(view)}"
    else:
        cases = _cases_of(oof, spec, rows, view)
        # Sites have a report of their own; here they would be a figure for each and each task.
        table = figures_of(replace(cases, site=("",) * len(cases)), seed=seed, draws=draws)
        if spec.kind == "ordinal":
            ordered = figures_of(replace(cases, kind="ordinal", site=("",) * len(cases)), seed=seed, draws=draws)
            extra = [figure for figure in ordered.figures if figure.name in ("kappa_quadratic", "mae", "c_index")]
            table = replace(table, figures=(*table.figures, *extra))
    if spec.classes and spec.kind != "multilabel":
        confusion = np.zeros((len(spec.classes), len(spec.classes)), np.intp)
        np.add.at(confusion, (truth[:, 0].astype(np.intp), scores.argmax(axis=1) if len(rows) else np.zeros(0, int)), 1)
    right = right_of(spec, scores, truth)
    given = ~oof.abstained[view][spec.name][rows] & np.isfinite(right)
    return TaskFigures(
        task=task.name,
        view=view,
        n_slides=len(rows),
        n_patients=len({oof.patients[row] for row in rows}),
        table=table,
        why=why,
        classes=spec.classes,
        confusion=confusion,
        n_given=int(given.sum()),
        given_right=float(right[given].mean()) if given.any() else None,
    )


def _shown(view: View) -> str:
    return "all modalities" if view[1] == ALL else f"the {view[1]} alone"


# --- gains -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """One task in two views, on the same rows."""

    task: str
    metrics: tuple[weighted.Metric, weighted.Metric]
    patient: NDArray[np.intp]
    """(rows,) number of the patient among those of all tasks."""
    n_slides: int
    n_patients: int


def _gains(oof: OutOfFold, view: View, over: View, *, draws: int, seed: int) -> list[Gain]:
    names, pairs, gains = sorted(set(oof.patients)), [], []
    number_of = {name: number for number, name in enumerate(names)}
    for task in oof.tasks:
        spec = task.target
        rows = np.flatnonzero(_known(oof, spec, view) & _known(oof, spec, over))
        n_patients = len({oof.patients[row] for row in rows})
        why = _hindrance(spec, oof.truth[spec.name][rows], n_patients)
        if why:
            gains.append(_no_gain(task.name, view, over, len(rows), n_patients, why))
            continue
        both = [_cases_of(oof, spec, rows, one) for one in (view, over)]
        patient = np.asarray([number_of[both[0].patient_ids[place]] for place in both[0].patient], np.intp)
        metrics = (_macro_auroc(both[0]), _macro_auroc(both[1]))
        pairs.append(_Pair(task=task.name, metrics=metrics, patient=patient, n_slides=len(rows), n_patients=n_patients))
    if not pairs:
        everyone = len(oof), len(names)
        return [*gains, _no_gain("", view, over, *everyone, "no task has an AUROC")]
    values = np.asarray([[float(metric(np.ones((1, len(p.patient))))[0]) for metric in p.metrics] for p in pairs])
    samples = []
    everyone_once = np.arange(len(names))
    for weights in weighted.bootstrap(everyone_once, np.zeros(len(names), np.intp), draws, np.random.default_rng(seed)):
        drawn = [[metric(weights[:, pair.patient]) for metric in pair.metrics] for pair in pairs]
        samples.append(np.asarray(drawn))  # (tasks, 2, draws)
    differences = np.concatenate(samples, axis=2)
    differences = differences[:, 0] - differences[:, 1]
    for number, pair in enumerate(pairs):
        low, high = _ends(differences[number])
        gains.append(
            Gain(
                task=pair.task,
                view=view,
                over=over,
                value=float(values[number, 0]),
                baseline=float(values[number, 1]),
                difference=float(values[number, 0] - values[number, 1]),
                low=low,
                high=high,
                n_slides=pair.n_slides,
                n_patients=pair.n_patients,
            )
        )
    mean = values.mean(axis=0)
    low, high = _ends(differences.mean(axis=0))
    left_out = len(oof.tasks) - len(pairs)
    together = Gain(
        task="",
        view=view,
        over=over,
        value=float(mean[0]),
        baseline=float(mean[1]),
        difference=float(mean[0] - mean[1]),
        low=low,
        high=high,
        n_slides=max(pair.n_slides for pair in pairs),
        n_patients=max(pair.n_patients for pair in pairs),
        note=f"mean over {len(pairs)} tasks" + (f"; {left_out} have no AUROC" if left_out else ""),
    )
    return [together, *gains]


def _no_gain(task: str, view: View, over: View, n_slides: int, n_patients: int, why: str) -> Gain:
    return Gain(
        task=task,
        view=view,
        over=over,
        value=None,
        baseline=None,
        difference=None,
        low=None,
        high=None,
        n_slides=n_slides,
        n_patients=n_patients,
        note=why,
    )


def _hindrance(spec: TargetSpec, truth: Floats, n_patients: int) -> str:
    """Why a task has no macro AUROC; ``""`` where it has."""
    if not spec.classes:
        return "a number has no AUROC; see its correlation"
    if n_patients < FEWEST_PATIENTS:
        return f"{n_patients} patients have a record and both predictions"
    if spec.kind == "multilabel":
        lacking = [
            name
            for number, name in enumerate(spec.classes)
            if len(set(truth[np.isfinite(truth[:, number]), number].tolist())) < 2
        ]
        return f"one side of {', '.join(lacking)} is missing" if lacking else ""
    counts = np.bincount(truth[:, 0].astype(np.intp), minlength=len(spec.classes))
    lacking = [name for name, count in zip(spec.classes, counts, strict=True) if count == 0]
    return f"no slide of class {', '.join(lacking)}" if lacking else ""


def _macro_auroc(cases: Cases) -> weighted.Metric:
    """Mean over classes (labels) of one against the rest; classes that a sample lacks are left out of it."""
    metrics: list[weighted.Metric] = []
    if cases.kind == "binary":
        return weighted.auroc(cases.truth == 1, cases.scores)
    for number in range(len(cases.classes)):
        if cases.kind == "multilabel":
            rows = np.flatnonzero(np.isfinite(cases.truth[:, number]))
            positive = cases.truth[rows, number] == 1
        else:
            rows, positive = np.arange(len(cases)), cases.truth == number
        metrics.append(weighted.on_rows(weighted.auroc(positive, cases.scores[rows, number]), rows))

    def mean(weights: Floats) -> Floats:
        each = np.asarray([metric(weights) for metric in metrics])
        there = np.isfinite(each)
        return weighted.divide(np.where(there, each, 0).sum(axis=0), there.sum(axis=0).astype(np.float64))

    return mean


def _ends(differences: Floats) -> tuple[float | None, float | None]:
    usable = differences[np.isfinite(differences)]
    if len(usable) < len(differences) / 2:
        return None, None
    low, high = np.percentile(usable, [_TAIL_PERCENT, 100 - _TAIL_PERCENT])
    return float(low), float(high)


# --- files -------------------------------------------------------------------------------------------------------


def figure_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Every figure as one flat record."""
    rows: list[dict[str, Any]] = []
    for one in evaluation.figures:
        head = {"task": one.task, "model": one.view[0], "shown": one.view[1], "slides": one.n_slides}
        if one.table is None:
            rows.append({**head, "figure": "", "patients": one.n_patients, "note": one.why})
            continue
        for record in one.table.rows():
            known = {key: value for key, value in record.items() if key not in ("site", "rows", "bags")}
            rows.append({**head, **known})
        share = {"figure": "given_right", "value": one.given_right, "patients": one.n_patients}
        note = f"share right among the {one.n_given} of {one.n_slides} slides on which the model does not abstain"
        rows.append({**head, **share, "note": note})
    return rows


def evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    """All of it as plain values."""
    return {
        "figures": figure_rows(evaluation),
        "confusion": [
            {
                "task": one.task,
                "model": one.view[0],
                "shown": one.view[1],
                "classes": list(one.classes),
                "slides": one.confusion.tolist(),
            }
            for one in evaluation.figures
            if one.confusion is not None
        ],
        "gains": [
            {
                "task": one.task or "mean",
                "model": one.view[0],
                "shown": one.view[1],
                "over": one.over[0],
                "over_shown": one.over[1],
                "auroc": one.value,
                "baseline_auroc": one.baseline,
                "difference": one.difference,
                "low": one.low,
                "high": one.high,
                "slides": one.n_slides,
                "patients": one.n_patients,
                "note": one.note,
            }
            for one in evaluation.gains
        ],
        "notes": list(evaluation.notes),
    }


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write ``figures.csv`` and ``evaluation.json``, each whole or not at all."""
    write_rows(folder / _FIGURES, figure_rows(evaluation))
    with durable_file(folder / _EVALUATION) as file:
        file.write(json.dumps(evaluation_json(evaluation), indent=1).encode())
