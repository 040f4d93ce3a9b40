"""Which model is better, on the same patients: paired tests with Holm's correction, and plain words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

from pathopipe.errors import UsageError
from pathopipe.mil import weighted
from pathopipe.mil.cases import Cases, patient_strata

__all__ = ["Comparison", "compare_models", "delong", "describe_ranking", "holm", "main_metric", "main_value"]

_ALPHA = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The best model against another one, on the same rows."""

    best: str
    other: str
    difference: float
    """Main figure of the best minus that of the other."""
    low: float
    """95 % interval of the difference."""
    high: float
    p_value: float
    p_holm: float
    """Corrected for all comparisons with the best."""
    test: Literal["DeLong", "paired bootstrap"]


def main_metric(cases: Cases) -> weighted.Metric:
    """The figure by which models are ranked: AUROC (mean of classes or labels), quadratic kappa, Spearman, C-index."""
    truth, scores = cases.truth, cases.scores
    match cases.kind:
        case "binary":
            return weighted.auroc(truth == 1, scores)
        case "multiclass":
            return _mean_auroc([truth == number for number in range(len(cases.classes))], scores)
        case "multilabel":
            return _mean_auroc([truth[:, number] == 1 for number in range(truth.shape[1])], scores, np.isfinite(truth))
        case "ordinal":
            pairs = weighted.pair_counts(truth.astype(np.intp), np.argmax(scores, axis=1), len(cases.classes))
            return lambda weights: weighted.cohen_kappa(pairs(weights), quadratic=True)
        case "regression":
            return weighted.spearman(truth, scores)
        case _:
            return weighted.c_index(truth, scores)


def _mean_auroc(
    positives: Sequence[NDArray[np.bool_]], scores: NDArray[np.float64], known: NDArray[np.bool_] | None = None
) -> weighted.Metric:
    metrics = []
    for number, positive in enumerate(positives):
        rows = np.arange(len(positive)) if known is None else np.flatnonzero(known[:, number])
        if positive[rows].any() and not positive[rows].all():
            metrics.append(weighted.on_rows(weighted.auroc(positive[rows], scores[rows, number]), rows))
    return weighted.mean_over(metrics) if metrics else lambda weights: np.full(len(weights), np.nan)


def main_value(cases: Cases) -> float:
    """The main figure itself; NaN where it has no value."""
    return float(main_metric(cases)(np.ones((1, len(cases))))[0])


def delong(positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """AUROC of several models on the same independent cases, and their covariance.

    Source: DeLong, DeLong and Clarke-Pearson 1988, Biometrics 44, 837; by mid-ranks as in Sun and Xu 2014, IEEE Signal
    Processing Letters 21, 1389.

    Args:
        positive: (n,) which cases are positive; at least two of each class.
        scores: (models, n).

    Returns:
        (models,) AUROC and (models, models) covariance.

    Raises:
        UsageError: Fewer than two cases of a class.
    """
    n_up, n_down = int(positive.sum()), int((~positive).sum())
    if min(n_up, n_down) < 2:
        raise UsageError(f"DeLong's test needs two cases of each class, found {n_up} and {n_down}")
    up, down = scores[:, positive], scores[:, ~positive]
    among_all = rankdata(np.concatenate([up, down], axis=1), axis=1)
    # For each case, the share of the other class that it stands on the right side of.
    of_up = (among_all[:, :n_up] - rankdata(up, axis=1)) / n_down
    of_down = 1 - (among_all[:, n_up:] - rankdata(down, axis=1)) / n_up
    covariance = np.atleast_2d(np.cov(of_up)) / n_up + np.atleast_2d(np.cov(of_down)) / n_down
    return of_up.mean(axis=1), covariance


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for their number; source: Holm 1979, Scand. J. Stat. 6, 65."""
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def compare_models(cases: Mapping[str, Cases], *, draws: int = 1000, seed: int = 0) -> list[Comparison]:
    """The best model by its main figure against each other one, on the rows of all.

    DeLong's test for AUROC of independent cases (each row a patient); otherwise bootstrap samples of patients, the same
    ones for both models.

    Args:
        cases: By name; the same bags and labels in all.
        draws: Bootstrap samples.
        seed: Of the bootstrap.

    Raises:
        UsageError: The models were not tested on the same rows.
    """
    first = next(iter(cases.values()))
    for name, other in cases.items():
        if len(other) != len(first) or not np.array_equal(other.truth, first.truth, equal_nan=True):
            raise UsageError(f"{name}: tested on other bags than the first model; compare on the same folds")
    values = {name: main_value(one) for name, one in cases.items()}
    ranked = sorted((name for name in cases if np.isfinite(values[name])), key=lambda name: -values[name])
    if len(ranked) < 2:
        return []
    best, *others = ranked
    independent = first.kind == "binary" and len(np.unique(first.patient)) == len(first)
    if independent and min((first.truth == 1).sum(), (first.truth == 0).sum()) >= 2:
        found = _by_delong(cases, best, others)
        test: Literal["DeLong", "paired bootstrap"] = "DeLong"
    else:
        found = _by_bootstrap(cases, best, others, draws, seed)
        test = "paired bootstrap"
    corrected = holm([p_value for _, _, _, p_value in found])
    return [
        Comparison(
            best=best, other=other, difference=difference, low=low, high=high, p_value=p_value, p_holm=p_holm, test=test
        )
        for other, (difference, low, high, p_value), p_holm in zip(others, found, corrected, strict=True)
    ]


def _by_delong(cases: Mapping[str, Cases], best: str, others: Sequence[str]) -> list[tuple[float, float, float, float]]:
    names = [best, *others]
    values, covariance = delong(cases[best].truth == 1, np.stack([cases[name].scores for name in names]))
    found = []
    for place in range(1, len(names)):
        difference = float(values[0] - values[place])
        variance = float(covariance[0, 0] + covariance[place, place] - 2 * covariance[0, place])
        spread = max(variance, 0.0) ** 0.5
        p_value = float(2 * norm.sf(abs(difference) / spread)) if spread > 0 else float(difference == 0)
        margin = float(norm.ppf(1 - _ALPHA / 2)) * spread
        found.append((difference, difference - margin, difference + margin, p_value))
    return found


def _by_bootstrap(
    cases: Mapping[str, Cases], best: str, others: Sequence[str], draws: int, seed: int
) -> list[tuple[float, float, float, float]]:
    first = cases[best]
    if first.kind in ("binary", "multiclass", "ordinal"):
        strata = patient_strata(first, first.truth.astype(np.intp))
    elif first.kind.startswith("survival"):
        strata = patient_strata(first, first.truth[:, 1].astype(np.intp))
    else:
        strata = np.zeros(len(first), np.intp)
    metrics = {name: main_metric(cases[name]) for name in (best, *others)}
    samples: dict[str, list[NDArray[np.float64]]] = {name: [] for name in metrics}
    for weights in weighted.bootstrap(first.patient, strata, draws, np.random.default_rng(seed)):
        for name, metric in metrics.items():
            samples[name].append(metric(weights))
    drawn = {name: np.concatenate(blocks) for name, blocks in samples.items()}
    once = np.ones((1, len(first)))
    found = []
    for other in others:
        difference = float((metrics[best](once) - metrics[other](once))[0])
        spread = drawn[best] - drawn[other]
        spread = spread[np.isfinite(spread)]
        low, high = (float(end) for end in np.percentile(spread, [2.5, 97.5]))
        below, above = int((spread <= 0).sum()), int((spread >= 0).sum())
        # One more on both sides: a finite number of samples proves no p value of zero.
        p_value = min(1.0, 2 * (1 + min(below, above)) / (1 + len(spread)))
        found.append((difference, low, high, p_value))
    return found


def describe_ranking(comparisons: Sequence[Comparison]) -> list[str]:
    """What the tests say, in plain sentences."""
    if not comparisons:
        return []
    best = comparisons[0].best
    beaten = [one.other for one in comparisons if one.p_holm < _ALPHA]
    level = [one.other for one in comparisons if one.p_holm >= _ALPHA]
    test = comparisons[0].test
    lines = []
    if not beaten:
        lines.append(f"No significant winner: {best} is first, but no difference passes {test} with Holm's correction.")
    elif level:
        lines.append(
            f"{best} is significantly better than {', '.join(beaten)}, but not than {', '.join(level)} ({test}, Holm)."
        )
    else:
        lines.append(f"{best} is significantly better than every other ({test}, Holm).")
    lines.append("Ranking on the test folds is optimistic for the winner; the nested choice is not.")
    return lines
