"""Figures of a model with intervals over patients: each says what it rests on, or why it has no value."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathopipe.mil import weighted
from pathopipe.mil.cases import FEWEST_PATIENTS, Cases, Kind, few_patients, gather_cases, hindrance, patient_strata
from pathopipe.mil.weighted import CALIBRATION_BINS, STEEPEST, Floats, Metric, bin_of, bootstrap

__all__ = ["MAIN_FIGURE", "TITLES", "Figure", "FigureTable", "figures", "figures_of"]

TITLES = {
    "auroc": "AUROC",
    "auroc_within_sites": "AUROC within sites",
    "auroc_within_folds": "AUROC within folds",
    "auprc": "AUPRC",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "f1": "F1",
    "kappa": "kappa",
    "kappa_quadratic": "quadratic kappa",
    "brier": "Brier score",
    "ece": "calibration error (ECE)",
    "calibration_slope": "calibration slope",
    "calibration_intercept": "calibration intercept",
    "c_index": "C-index",
    "c_index_within_folds": "C-index within folds",
    "r2": "R2",
    "mae": "mean absolute error",
    "spearman": "Spearman correlation",
}
"""How each figure is called in print."""

MAIN_FIGURE: dict[Kind, str] = {
    "binary": "auroc",
    "multiclass": "auroc",
    "multilabel": "auroc",
    "ordinal": "kappa_quadratic",
    "regression": "spearman",
    "survival_cox": "c_index",
    "survival_discrete": "c_index",
}
"""The figure that stands first, and that the table of sites shows."""

_TAIL_PERCENT = 2.5
# Chance widens the gaps of bins and resampling adds chance, so that the interval would lie above the value.
_INFLATED = "no interval, for resampling inflates it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number and what it rests on."""

    name: str
    """Key in :data:`TITLES`."""
    value: float | None
    """None where it can't be computed; ``note`` says why."""
    low: float | None
    """Lower end of the 95 % interval over patients; None where there is none."""
    high: float | None
    n_patients: int
    n_rows: int
    """Patients, or bags where a patient's bags differ in label."""
    n_positive: int | None = None
    """How many of the rows are positive, of the class, or had the event; None where that has no meaning."""
    label: str = ""
    """The class or label it is for; empty for all together."""
    site: str = ""
    """The site it is for; empty for all together."""
    note: str = ""

    @property
    def title(self) -> str:
        """Its name in print."""
        return TITLES[self.name] + (f", {self.label}" if self.label else "")

    def text(self) -> str:
        """``0.912 (0.880 to 0.941)``, or ``not computed``."""
        if self.value is None:
            return "not computed"
        if self.low is None and self.high is None:
            return f"{self.value:.3f}"
        low, high = ("-" if end is None else f"{end:.3f}" for end in (self.low, self.high))
        return f"{self.value:.3f} ({low} to {high})"


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureTable:
    """All figures of one target."""

    kind: Kind
    unit: Literal["patients", "bags"]
    """What a row is."""
    n_patients: int
    n_bags: int
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()
    """How rows, thresholds and intervals were made."""

    def find(self, name: str, *, label: str = "", site: str = "") -> Figure:
        """One figure.

        Raises:
            KeyError: There is none of this name for this label and site.
        """
        for figure in self.figures:
            if (figure.name, figure.label, figure.site) == (name, label, site):
                return figure
        raise KeyError(f"no figure {name!r} for label {label!r} and site {site!r}")

    @property
    def main(self) -> Figure:
        """The figure that stands first for this kind of target."""
        return self.find(MAIN_FIGURE[self.kind])

    def rows(self) -> list[dict[str, Any]]:
        """One flat record a figure, for CSV and JSON."""
        return [
            {
                "figure": figure.name,
                "label": figure.label,
                "site": figure.site,
                "value": figure.value,
                "low": figure.low,
                "high": figure.high,
                "patients": figure.n_patients,
                self.unit if self.unit == "bags" else "rows": figure.n_rows,
                "positive": figure.n_positive,
                "note": figure.note,
            }
            for figure in self.figures
        ]


def figures(
    kind: Kind,
    truth: ArrayLike,
    scores: ArrayLike,
    patients: Sequence[str],
    sites: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    *,
    folds: Sequence[int] | None = None,
    threshold: ArrayLike | None = None,
    seed: int = 0,
    draws: int = 1000,
) -> FigureTable:
    """All figures of one target; the arguments are those of :func:`gather_cases` and :func:`figures_of`."""
    cases = gather_cases(kind, truth, scores, patients, sites, classes, folds=folds, threshold=threshold)
    return figures_of(cases, seed=seed, draws=draws)


def figures_of(cases: Cases, *, seed: int = 0, draws: int = 1000) -> FigureTable:
    """All figures of one target, with 95 % intervals over patients, then by class, then by site.

    - binary: AUROC (also from pairs within a site and within a fold), AUPRC (average precision), balanced accuracy,
      accuracy, sensitivity, specificity, F1, quadratic kappa, Brier score, calibration error, slope and intercept.
    - multiclass: AUROC and AUPRC one against the rest (each, and their mean), balanced accuracy, accuracy, F1 (mean of
      classes), kappa, Brier score (summed over classes, 0 to 2), calibration error of the most probable class.
    - multilabel: the binary figures of each label, and the means of AUROC and AUPRC.
    - ordinal: quadratic kappa, accuracy, balanced accuracy, mean absolute error in classes, C-index of the expected
      class, Brier score.
    - regression: Spearman correlation, R2, mean absolute error.
    - survival: Harrell's C-index, also from pairs within a fold.

    Intervals: percentiles of ``draws`` bootstrap samples of patients, drawn within the classes (events) so that none
    vanishes. Two calls with one seed give the same numbers.

    Sources: Harrell et al. 1982 (C-index); Cox 1958 (calibration slope and intercept: logistic regression on the logit
    of the probability); Guo et al. 2017 (ECE); Broecker and Smith 2007 (what ECE a perfectly calibrated model shows);
    Efron and Tibshirani 1993 (percentile intervals).
    """
    groups = _plan_multilabel(cases) if cases.kind == "multilabel" else [_plan(cases)]
    flat = [figure for group in groups for figure in _finish(group, seed=seed, draws=draws)]
    flat.sort(key=lambda figure: figure.label != "")
    flat += _by_site(cases, seed=seed, draws=draws)
    notes = [*cases.notes]
    if cases.kind in ("binary", "multilabel"):
        cuts = np.unique(cases.threshold)
        shown = f"{cuts[0]:.3g}" if len(cuts) == 1 else f"{cuts[0]:.3g} to {cuts[-1]:.3g} (one a fold or label)"
        notes.append(f"classes are decided at {shown}, {cases.threshold_from}")
    elif cases.kind in ("multiclass", "ordinal"):
        notes.append("the most probable class is decided for")
    notes.append(f"intervals: 95 %, percentiles of {draws} bootstrap samples of patients, seed {seed}")
    return FigureTable(
        kind=cases.kind,
        unit=cases.unit,
        n_patients=len(cases.patient_ids),
        n_bags=cases.n_bags,
        figures=tuple(flat),
        notes=tuple(notes),
    )


class _Planned(NamedTuple):
    """A figure before it is computed."""

    name: str
    label: str
    metric: Metric | None
    """None where it can't be computed."""
    note: str
    n_positive: int | None
    hindrance: str
    """Why there can be no interval; empty where there can."""


class _Group(NamedTuple):
    """Figures that share rows and bootstrap samples."""

    cases: Cases
    planned: list[_Planned]
    strata: NDArray[np.intp]
    """(n,) stratum of each row's patient."""


def _plan(cases: Cases) -> _Group:
    match cases.kind:
        case "binary":
            return _plan_binary(cases, "")
        case "multiclass" | "ordinal":
            return _plan_classes(cases)
        case "regression":
            return _plan_regression(cases)
        case _:
            return _plan_survival(cases)


def _plan_binary(cases: Cases, label: str) -> _Group:
    positive, score = cases.truth == 1, cases.scores
    n, n_positive = len(cases), int(positive.sum())
    lacking = [cases.classes[number] for number, count in enumerate((n - n_positive, n_positive)) if count == 0]
    absent = f"no {cases.unit[:-1]} of class {' or '.join(lacking)}, so it has no value" if lacking else ""
    if not n:
        return _Group(cases, [_Planned("auroc", label, None, absent, 0, "")], np.zeros(0, np.intp))
    classes = positive.astype(np.intp)
    rough = hindrance(cases, classes)
    no_positive = absent if n_positive == 0 else ""
    no_negative = absent if n_positive == n else ""

    def plan(name: str, metric: Metric, note: str = "", hindered: str = absent, rough: str = rough) -> _Planned:
        return _Planned(name, label, None if hindered else metric, hindered or note, n_positive, rough)

    planned = [plan("auroc", weighted.auroc(positive, score))]
    for name, groups, many in (
        ("auroc_within_sites", _numbers(cases.site), "sites"),
        ("auroc_within_folds", cases.fold, "folds"),
    ):
        n_groups = 0 if groups is None else len(np.unique(groups))
        if groups is not None and n_groups > 1:
            both = weighted.groups_with_both(positive, groups)
            note = f"pairs within the {len(both)} of {n_groups} {many} that have both classes"
            none = "" if both else f"none of the {n_groups} {many} has both classes, so it has no value"
            planned.append(plan(name, weighted.auroc_within(positive, score, both), note, absent or none))
    chosen = (score >= cases.threshold).astype(np.intp)
    pairs = weighted.pair_counts(classes, chosen, 2)
    planned += [
        plan("auprc", weighted.average_precision(positive, score), f"chance gives {n_positive / n:.3f}"),
        plan("balanced_accuracy", lambda weights: weighted.recalls(pairs(weights)).mean(axis=1)),
        plan("accuracy", lambda weights: weighted.share_right(pairs(weights)), hindered=""),
        plan("sensitivity", weighted.recall_of(pairs, 1), hindered=no_positive),
        plan("specificity", weighted.recall_of(pairs, 0), hindered=no_negative),
        plan("f1", lambda weights: weighted.f1_scores(pairs(weights))[:, 1], hindered=no_positive),
        plan("kappa_quadratic", lambda weights: weighted.cohen_kappa(pairs(weights), quadratic=True)),
        plan("brier", weighted.mean_of((score - positive) ** 2), hindered=""),
        plan("ece", weighted.calibration_error(positive, score), _ece_note(score), "", _INFLATED),
    ]
    x = weighted.logit(score)
    parted = ""
    if not absent and (x[positive].min() >= x[~positive].max() or x[positive].max() <= x[~positive].min()):
        parted = "the scores part the classes wholly, so it has no finite value"

    def refit(number: int) -> Metric:
        return lambda weights: weighted.recalibration(positive, x, weights)[:, number]

    steep = "1 is ideal; below 1 the probabilities are too extreme"
    planned.append(plan("calibration_slope", refit(1), steep, absent or parted))
    planned.append(plan("calibration_intercept", refit(0), "0 is ideal", absent or parted))
    return _Group(cases, planned, patient_strata(cases, classes))


def _plan_classes(cases: Cases) -> _Group:
    truth, k = cases.truth.astype(np.intp), len(cases.classes)
    counts = np.bincount(truth, minlength=k)
    chosen = np.argmax(cases.scores, axis=1)
    pairs = weighted.pair_counts(truth, chosen, k)
    one_hot = np.eye(k)[truth]
    lacking = [name for name, count in zip(cases.classes, counts, strict=True) if count == 0]
    absent = f"no {cases.unit[:-1]} of class {', '.join(lacking)}, so it has no value" if lacking else ""
    only_one = f"all are of class {cases.classes[truth[0]]}, so it has no value" if (counts > 0).sum() < 2 else ""
    present = f"mean over the {k - len(lacking)} classes that are there" if lacking else ""

    def plan(name: str, metric: Metric, note: str = "", hindered: str = "") -> _Planned:
        return _Planned(name, "", None if hindered else metric, hindered or note, None, few_patients(cases))

    kappa = plan(
        "kappa_quadratic" if cases.kind == "ordinal" else "kappa",
        lambda weights: weighted.cohen_kappa(pairs(weights), quadratic=cases.kind == "ordinal"),
        hindered=only_one,
    )
    shared = [
        plan(
            "balanced_accuracy", lambda weights: np.nanmean(weighted.recalls(pairs(weights)), axis=1), present, only_one
        ),
        plan("accuracy", lambda weights: weighted.share_right(pairs(weights))),
        plan("f1", lambda weights: np.nanmean(weighted.f1_scores(pairs(weights)), axis=1), "mean over classes"),
        plan("brier", weighted.mean_of(((cases.scores - one_hot) ** 2).sum(axis=1)), "summed over classes, 0 to 2"),
    ]
    if cases.kind == "ordinal":
        expected = cases.scores @ np.arange(k)
        as_time = np.stack([-truth.astype(np.float64), np.ones(len(truth))], axis=1)
        planned = [
            kappa,
            plan(
                "c_index",
                weighted.c_index(as_time, expected),
                "pairs of different classes by their expected class",
                only_one,
            ),
            *shared,
            plan("mae", weighted.mean_of(np.abs(chosen - truth).astype(np.float64)), "in classes"),
        ]
    else:
        ranked = [weighted.auroc(truth == c, cases.scores[:, c]) for c in range(k)]
        precise = [weighted.average_precision(truth == c, cases.scores[:, c]) for c in range(k)]
        right, confidence = chosen == truth, cases.scores.max(axis=1)
        planned = [
            plan("auroc", weighted.mean_over(ranked), "mean of one class against the rest", absent),
            plan("auprc", weighted.mean_over(precise), "mean of one class against the rest", absent),
            *shared,
            kappa,
            plan(
                "ece",
                weighted.calibration_error(right, confidence),
                f"of the most probable class; {_ece_note(confidence)}",
            )._replace(hindrance=_INFLATED),
        ]
        for c, name in enumerate(cases.classes):
            n = int(counts[c])
            lack = f"{'no' if n == 0 else 'every'} {cases.unit[:-1]} is of class {name}, so it has no value"
            why = lack if n in (0, len(truth)) else ""
            rough = hindrance(replace(cases, classes=("any other", name)), (truth == c).astype(np.intp))
            planned += [
                _Planned("auroc", name, None if why else ranked[c], why or "against the rest", n, rough),
                _Planned(
                    "auprc", name, None if why else precise[c], why or f"chance gives {n / len(truth):.3f}", n, rough
                ),
                _Planned("sensitivity", name, weighted.recall_of(pairs, c) if n else None, "" if n else lack, n, rough),
            ]
    return _Group(cases, planned, patient_strata(cases, truth))


def _plan_multilabel(cases: Cases) -> list[_Group]:
    k = len(cases.classes)
    each = [_plan_binary(cases.label(number), cases.classes[number]) for number in range(k)]
    means: list[_Planned] = []
    for name, make in (("auroc", weighted.auroc), ("auprc", weighted.average_precision)):
        metrics, lacking = [], []
        for number in range(k):
            known = np.flatnonzero(np.isfinite(cases.truth[:, number]))
            positive = cases.truth[known, number] == 1
            if positive.all() or not positive.any():
                lacking.append(cases.classes[number])
            metrics.append(weighted.on_rows(make(positive, cases.scores[known, number]), known))
        why = f"one class of {', '.join(lacking)} is absent, so the mean has no value" if lacking else ""
        note = why or "mean over labels; samples in which a label's class vanishes are left out"
        means.append(_Planned(name, "", None if why else weighted.mean_over(metrics), note, None, few_patients(cases)))
    alone = np.zeros(len(cases), np.intp)
    return [_Group(cases, means, alone), *each]


def _plan_regression(cases: Cases) -> _Group:
    truth, score = cases.truth, cases.scores
    constant = f"all {len(truth)} labels are the same, so it has no value" if np.ptp(truth) == 0 else ""
    flat = "all predictions are the same, so it has no value" if np.ptp(score) == 0 else ""
    rank_note = constant or flat
    few = few_patients(cases)
    planned = [
        _Planned("spearman", "", None if rank_note else weighted.spearman(truth, score), rank_note, None, few),
        _Planned("r2", "", None if constant else weighted.r2(truth, score), constant or "the mean gives 0", None, few),
        _Planned("mae", "", weighted.mean_of(np.abs(truth - score)), "in units of the label", None, few),
    ]
    return _Group(cases, planned, np.zeros(len(cases), np.intp))


def _plan_survival(cases: Cases) -> _Group:
    events = cases.truth[:, 1].astype(np.intp)
    n = int(events.sum())
    few = few_patients(cases) or (f"no interval: only {n} with an event" if n < FEWEST_PATIENTS else "")

    def plan(name: str, metric: Metric, note: str) -> _Planned:
        nothing = not np.isfinite(metric(np.ones((1, len(cases))))[0])
        why = "no pair can be compared, so it has no value" if nothing else ""
        return _Planned(name, "", None if why else metric, why or note, n, few)

    planned = [
        plan(
            "c_index",
            weighted.c_index(cases.truth, cases.scores),
            "pairs of which the earlier time is an event",
        )
    ]
    if cases.fold is not None and len(np.unique(cases.fold)) > 1:
        groups = [np.flatnonzero(cases.fold == fold) for fold in np.unique(cases.fold)]
        within = weighted.c_index(cases.truth, cases.scores, groups)
        planned.append(plan("c_index_within_folds", within, "risks of different models share no scale"))
    return _Group(cases, planned, patient_strata(cases, events))


def _finish(group: _Group, *, seed: int, draws: int, site: str = "") -> list[Figure]:
    """Values and intervals of a group of planned figures."""
    rows = group.cases
    once = np.ones((1, len(rows)))
    values = [math.nan if planned.metric is None else float(planned.metric(once)[0]) for planned in group.planned]
    sampled = [
        planned.metric
        for planned, value in zip(group.planned, values, strict=True)
        if planned.metric is not None and not planned.hindrance and math.isfinite(value)
    ]
    blocks: list[list[Floats]] = []
    if sampled and draws:
        rng = np.random.default_rng(seed)
        samplings = bootstrap(rows.patient, group.strata, draws, rng)
        blocks = [[metric(weights) for metric in sampled] for weights in samplings]
    samples = iter(np.concatenate(block) for block in zip(*blocks, strict=True))
    finished = []
    for planned, value in zip(group.planned, values, strict=True):
        low, high, notes = None, None, [planned.note] if planned.note else []
        if planned.metric is not None and not math.isfinite(value):
            notes = ["0 / 0, so it has no value"]
        elif planned.metric is not None and planned.hindrance:
            notes.append(planned.hindrance)
        elif planned.metric is not None and draws:
            low, high, more = _percentiles(next(samples))
            notes += more
        finished.append(
            Figure(
                name=planned.name,
                value=value if math.isfinite(value) else None,
                low=low,
                high=high,
                n_patients=len(np.unique(rows.patient)),
                n_rows=len(rows),
                n_positive=planned.n_positive,
                label=planned.label,
                site=site,
                note="; ".join(notes),
            )
        )
    return finished


def _by_site(cases: Cases, *, seed: int, draws: int) -> list[Figure]:
    """The main figure of each site, largest first; nothing where there is one site only."""
    names, count = np.unique(np.asarray(cases.site), return_counts=True)
    if len(names) < 2:
        return []
    found = []
    for name in names[np.argsort(-count, kind="stable")].tolist():
        part = cases.take(np.flatnonzero(np.asarray(cases.site) == name))
        group = _plan_multilabel(part)[0] if part.kind == "multilabel" else _plan(part)
        main = [planned for planned in group.planned if planned.name == MAIN_FIGURE[cases.kind] and not planned.label]
        found += _finish(group._replace(planned=main), seed=seed, draws=draws, site=name or "unknown")
    return found


def _ece_note(score: Floats, draws: int = 200) -> str:
    """What calibration error a perfectly calibrated model shows by chance, with scores like these."""
    rng = np.random.default_rng(0)
    member = np.eye(CALIBRATION_BINS)[bin_of(score)]
    truth = rng.random((draws, len(score))) < score
    chance = np.abs((score - truth) @ member).sum(axis=1) / len(score)
    return f"{CALIBRATION_BINS} equal bins; perfect calibration shows {chance.mean():.3f} on so many by chance"


def _percentiles(sample: Floats) -> tuple[float | None, float | None, list[str]]:
    usable = sample[~np.isnan(sample)]
    if len(usable) < len(sample) / 2:
        return None, None, ["no interval: most bootstrap samples give no value"]
    notes = []
    if len(usable) < len(sample):
        notes.append(f"interval from {len(usable)} of {len(sample)} samples")
    # Slopes of separated samples are infinite; capped, percentiles between them stay defined.
    ends = np.percentile(np.clip(usable, -STEEPEST, STEEPEST), [_TAIL_PERCENT, 100 - _TAIL_PERCENT]).tolist()
    low, high = (None if abs(end) >= STEEPEST / 10 else end for end in ends)
    if low is None or high is None:
        notes.append("in some samples the scores part the classes wholly, so the interval is open")
    elif low == high:
        notes.append("all samples agree, so the interval does not show the uncertainty")
    return low, high, notes


def _numbers(names: Sequence[str]) -> NDArray[np.intp]:
    return np.unique(np.asarray(names), return_inverse=True)[1].astype(np.intp)
