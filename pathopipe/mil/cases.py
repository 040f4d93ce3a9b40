"""From predictions to cases: checked, and one row a patient."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathopipe.errors import UsageError

__all__ = ["FEWEST_PATIENTS", "KINDS", "Cases", "Kind", "few_patients", "gather_cases", "hindrance", "patient_strata"]

Kind = Literal["binary", "multiclass", "multilabel", "ordinal", "regression", "survival_cox", "survival_discrete"]
KINDS: tuple[Kind, ...] = (
    "binary",
    "multiclass",
    "multilabel",
    "ordinal",
    "regression",
    "survival_cox",
    "survival_discrete",
)

FEWEST_PATIENTS = 2
"""With fewer patients of a class there is no interval."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cases:
    """Known labels beside predictions: one row a patient, or a bag where a patient's bags differ in label."""

    kind: Kind
    truth: Floats
    """(n,) 0 or 1, class numbers, or values; (n, K) 0, 1 or NaN for multilabel; (n, 2) time and event for survival."""
    scores: Floats
    """(n,) probability of the positive class, value or risk; (n, K) probabilities for the other kinds."""
    classes: tuple[str, ...]
    patient: NDArray[np.intp]
    """(n,) number of the patient, from 0."""
    patient_ids: tuple[str, ...]
    site: tuple[str, ...]
    """n names, empty where unknown."""
    fold: NDArray[np.intp] | None
    """(n,) which fold's model made the prediction."""
    threshold: Floats
    """(n,) or (n, K): at or above it a probability counts as positive."""
    threshold_from: str
    """Where it comes from, for the notes."""
    unit: Literal["patients", "bags"]
    n_bags: int
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.truth)

    def take(self, rows: NDArray[np.intp]) -> "Cases":
        """Some of the rows; patients keep their numbers."""
        return replace(
            self,
            truth=self.truth[rows],
            scores=self.scores[rows],
            patient=self.patient[rows],
            site=tuple(self.site[row] for row in rows.tolist()),
            fold=None if self.fold is None else self.fold[rows],
            threshold=self.threshold[rows],
        )

    def label(self, number: int) -> "Cases":
        """One label of a multilabel target, as a binary target on the rows where it is known."""
        one = replace(
            self,
            kind="binary",
            truth=self.truth[:, number],
            scores=self.scores[:, number],
            threshold=self.threshold[:, number],
            classes=(f"not {self.classes[number]}", self.classes[number]),
        )
        return one.take(np.flatnonzero(np.isfinite(one.truth)))

    def against_rest(self, number: int) -> "Cases":
        """One class of a multiclass target as a binary target."""
        return replace(
            self,
            kind="binary",
            truth=(self.truth == number).astype(np.float64),
            scores=self.scores[:, number],
            classes=("the rest", self.classes[number]),
        )


def gather_cases(
    kind: Kind,
    truth: ArrayLike,
    scores: ArrayLike,
    patients: Sequence[str],
    sites: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    *,
    folds: Sequence[int] | None = None,
    threshold: ArrayLike | None = None,
    threshold_from: str = "from validation",
) -> Cases:
    """Check predictions and make one row a patient.

    Bags of one patient are put together by the mean of their scores. Where bags of a patient differ in label (a tumour
    and a normal slide), every bag stays a row; intervals are over patients all the same. Rows without a label are left
    out.

    Args:
        kind: What is predicted.
        truth: (n,) 0 or 1 (binary), class numbers (multiclass, ordinal), values (regression); (n, K) of 0 and 1
            (multilabel); (n, 2) time and event (survival). NaN where unknown.
        scores: Probabilities: (n,), (n, 1) or (n, 2) for binary, the positive class last; (n, K) for multiclass and
            ordinal, rows that sum to 1, and for multilabel. Values (n,) for regression. Risks (n,) for survival, higher
            for an earlier event.
        patients: n patient ids.
        sites: n names, empty where unknown.
        classes: Names of the classes or labels; numbers when left out.
        folds: n numbers: which fold's model made each prediction.
        threshold: At or above it a probability counts as positive (binary, multilabel): one number, one a row, or one
            a label. It must come from validation data; 0.5 when left out.
        threshold_from: Where it comes from, for the notes.

    Raises:
        UsageError: Shapes don't fit, a score is not finite or no probability, a class number is unknown, or nothing
            is labelled.
    """
    true, score = _as_arrays(kind, truth, scores)
    n = len(true)
    _check_lengths(n, len(score), patients=patients, sites=sites, folds=folds)
    names = _class_names(kind, score, classes)
    cut = _spread_threshold(threshold, kind, n, len(names))
    known = np.isfinite(true.reshape(n, -1))
    rows = np.flatnonzero(known.any(axis=1) if kind == "multilabel" else known.all(axis=1))
    if not len(rows):
        raise UsageError("no row has a label, so there is nothing to evaluate; check the label column and the ids")
    ids = np.asarray([str(patient) for patient in patients])
    _check_values(kind, true[rows], score[rows], names, ids[rows])
    patient_ids, patient = np.unique(ids[rows], return_inverse=True)
    site = [str(sites[row]) if sites is not None else "" for row in rows.tolist()]
    fold = None if folds is None else np.asarray(folds, np.intp)[rows]
    cases = Cases(
        kind=kind,
        truth=true[rows],
        scores=score[rows],
        classes=names,
        patient=patient.astype(np.intp),
        patient_ids=tuple(patient_ids.tolist()),
        site=tuple(site),
        fold=fold,
        threshold=cut[rows],
        threshold_from="not tuned" if threshold is None else threshold_from,
        unit="bags",
        n_bags=len(rows),
    )
    left_out = n - len(rows)
    notes = (f"{left_out} of {n} bags have no label and are left out",) if left_out else ()
    return _one_row_a_patient(replace(cases, notes=notes))


def _as_arrays(kind: Kind, truth: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats]:
    if kind not in KINDS:
        raise UsageError(f"no kind of target {kind!r}; known: {', '.join(KINDS)}")
    true, score = np.asarray(truth, np.float64), np.asarray(scores, np.float64)
    wide = kind in ("multiclass", "ordinal", "multilabel")
    if kind == "binary" and score.ndim == 2 and score.shape[1] == 2:
        score = score[:, 1]
    if not wide and score.ndim == 2 and score.shape[1] == 1:
        score = score[:, 0]
    width = {"multilabel": score.shape[-1:], "survival_cox": (2,), "survival_discrete": (2,)}.get(kind, ())
    if score.ndim != (2 if wide else 1) or true.shape != (len(true), *width):
        raise UsageError(
            f"truth {np.shape(truth)} and scores {np.shape(scores)} don't fit a {kind} target; see gather_cases"
        )
    return true, score


def _check_lengths(n: int, n_scores: int, **columns: Sequence[Any] | None) -> None:
    lengths = {"scores": n_scores} | {name: len(column) for name, column in columns.items() if column is not None}
    for name, length in lengths.items():
        if length != n:
            raise UsageError(f"{n} labels but {length} {name}; give one a row")


def _class_names(kind: Kind, score: Floats, classes: Sequence[str] | None) -> tuple[str, ...]:
    if kind == "regression" or kind.startswith("survival"):
        return ()
    wanted = 2 if kind == "binary" else score.shape[1]
    names = tuple(map(str, classes)) if classes is not None else tuple(map(str, range(wanted)))
    if kind == "binary" and len(names) == 1:
        names = (f"not {names[0]}", names[0])
    if len(names) != wanted:
        raise UsageError(f"{len(names)} class names for {wanted} classes ({', '.join(names)}); name each once")
    return names


def _spread_threshold(threshold: ArrayLike | None, kind: Kind, n: int, n_classes: int) -> Floats:
    shape = (n, n_classes) if kind == "multilabel" else (n,)
    given = np.asarray(0.5 if threshold is None else threshold, np.float64)
    if kind == "multilabel" and given.shape == (n,) and n != n_classes:
        given = given[:, None]
    try:
        return np.broadcast_to(given, shape).copy()
    except ValueError:
        raise UsageError(f"thresholds of shape {given.shape} don't fit {shape}; give one, or one a row") from None


def _check_values(kind: Kind, truth: Floats, scores: Floats, classes: tuple[str, ...], ids: NDArray[np.str_]) -> None:
    finite = np.isfinite(scores) if scores.ndim == 1 else np.isfinite(scores).all(axis=1)
    if not finite.all():
        raise UsageError(
            f"the prediction for patient {ids[~finite][0]} is not finite ({int((~finite).sum())} such); "
            "look for NaN among its features, or train anew with a lower learning rate"
        )
    if classes and (scores.min() < -1e-6 or scores.max() > 1 + 1e-6):
        raise UsageError(
            f"scores run from {scores.min():.3g} to {scores.max():.3g}, so they are no probabilities; "
            "pass probabilities, not logits"
        )
    if kind in ("multiclass", "ordinal") and np.abs(scores.sum(axis=1) - 1).max() > 1e-3:
        raise UsageError("the probabilities of a row don't sum to 1; pass softmax outputs")
    if kind in ("binary", "multilabel"):
        odd = truth[np.isfinite(truth) & (truth != 0) & (truth != 1)]
    elif kind in ("multiclass", "ordinal"):
        odd = truth[(truth != np.floor(truth)) | (truth < 0) | (truth >= len(classes))]
    elif kind.startswith("survival"):
        odd = truth[:, 1][(truth[:, 1] != 0) & (truth[:, 1] != 1)]
        if (truth[:, 0] < 0).any():
            raise UsageError(f"a survival time is {truth[:, 0].min():g}; times are 0 or more")
    else:
        odd = truth[:0]
    if len(odd):
        raise UsageError(f"label {odd[0]:g} is not one of a {kind} target with {len(classes) or 2} classes")


def _one_row_a_patient(cases: Cases) -> Cases:
    """Mean scores over the bags of a patient, where these have one label."""
    n_patients = len(cases.patient_ids)
    if n_patients == len(cases):
        return replace(cases, unit="patients")
    truth = cases.truth if cases.truth.ndim == 2 else cases.truth[:, None]
    merged = np.full((n_patients, truth.shape[1]), np.nan)
    merged[cases.patient[::-1]] = truth[::-1]
    if cases.kind == "multilabel":
        for column in range(truth.shape[1]):
            known = np.isfinite(truth[:, column])
            merged[:, column] = np.nan
            merged[cases.patient[known], column] = truth[known, column]
    differs = np.isfinite(truth) & (merged[cases.patient] != truth)
    if differs.any():
        n = len(np.unique(cases.patient[differs.any(axis=1)]))
        note = (
            f"{n} of {n_patients} patients have bags with different labels, so each of the {len(cases)} bags is a row; "
            "intervals are over patients"
        )
        return replace(cases, notes=(*cases.notes, note))
    first = np.full(n_patients, -1, np.intp)
    first[cases.patient[::-1]] = np.arange(len(cases))[::-1]
    count = np.bincount(cases.patient, minlength=n_patients)

    def mean(values: Floats) -> Floats:
        total = np.zeros((n_patients, *values.shape[1:]))
        np.add.at(total, cases.patient, values)
        return total / count.reshape(-1, *[1] * (values.ndim - 1))

    sites: list[set[str]] = [set() for _ in range(n_patients)]
    for patient, site in zip(cases.patient.tolist(), cases.site, strict=True):
        sites[patient].add(site)
    note = f"{len(cases)} bags of {n_patients} patients; a patient's score is the mean over the bags"
    return replace(
        cases,
        truth=merged if cases.truth.ndim == 2 else merged[:, 0],
        scores=mean(cases.scores),
        patient=np.arange(n_patients),
        site=tuple(" + ".join(sorted(found)) for found in sites),
        fold=None if cases.fold is None else cases.fold[first],
        threshold=mean(cases.threshold),
        unit="patients",
        notes=(*cases.notes, note),
    )


def patient_strata(cases: Cases, classes: NDArray[np.intp]) -> NDArray[np.intp]:
    """(n,) a number for each row, the same for patients who have the same set of classes."""
    if cases.unit == "patients":
        return classes
    held: dict[int, set[int]] = {}
    for patient, one in zip(cases.patient.tolist(), classes.tolist(), strict=True):
        held.setdefault(patient, set()).add(one)
    kinds = {key: number for number, key in enumerate(sorted({tuple(sorted(found)) for found in held.values()}))}
    return np.asarray([kinds[tuple(sorted(held[patient]))] for patient in cases.patient.tolist()], np.intp)


def hindrance(cases: Cases, classes: NDArray[np.intp]) -> str:
    """Why there can be no interval over patients: a class with a single patient; empty where there can."""
    for number, name in enumerate(cases.classes):
        n = len(np.unique(cases.patient[classes == number]))
        if 0 < n < FEWEST_PATIENTS:
            return f"no interval: only {n} patient of class {name}"
    return few_patients(cases)


def few_patients(cases: Cases) -> str:
    """Why there can be no interval where there are no classes; empty where there can."""
    n = len(np.unique(cases.patient))
    return f"no interval: only {n} patient" if n < FEWEST_PATIENTS else ""
