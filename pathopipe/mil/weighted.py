"""Metrics over weighted rows, for many weightings at once: a bootstrap sample is a row of weights."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CALIBRATION_BINS",
    "STEEPEST",
    "Floats",
    "Metric",
    "auroc",
    "auroc_within",
    "average_precision",
    "bin_of",
    "bootstrap",
    "c_index",
    "calibration_error",
    "cohen_kappa",
    "divide",
    "f1_scores",
    "grouped",
    "groups_with_both",
    "logit",
    "mean_of",
    "mean_over",
    "on_rows",
    "pair_counts",
    "r2",
    "recalibration",
    "recall_of",
    "recalls",
    "share_right",
    "spearman",
    "tied",
]

Floats = NDArray[np.float64]
Metric = Callable[[Floats], Floats]
"""From (draws, n) weights of the rows to (draws,) values, NaN where a sample has none."""

CALIBRATION_BINS = 10
"""Equal-width bins of probability for the calibration error and its plot."""

STEEPEST = 1e4
"""A slope beyond this is that of separated classes, which has no finite value."""

_BLOCK_NUMBERS = 2_000_000
_NEWTON_STEPS = 40
_NEWTON_TOLERANCE = 1e-8
_LEAST_PROBABILITY = 1e-6


def bootstrap(
    patient: NDArray[np.intp], strata: NDArray[np.intp], draws: int, rng: np.random.Generator
) -> Iterator[Floats]:
    """Blocks of (draws, n) weights: how often each row's patient was drawn, with replacement, within its stratum."""
    numbers, first, member = np.unique(patient, return_index=True, return_inverse=True)
    stratum = strata[first]
    members = [np.flatnonzero(stratum == number) for number in np.unique(stratum)]
    block = max(1, min(draws, _BLOCK_NUMBERS // max(1, len(patient))))
    for start in range(0, draws, block):
        d = min(block, draws - start)
        counts = np.zeros((d, len(numbers)))
        offsets = np.arange(d)[:, None] * len(numbers)
        for chosen in members:
            drawn = chosen[rng.integers(0, len(chosen), (d, len(chosen)))]
            counts += np.bincount((drawn + offsets).ravel(), minlength=counts.size).reshape(counts.shape)
        yield counts[:, member]


def tied(score: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The ascending order of scores, and where in it each group of equal ones begins."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(score[order]) > 0]))
    return order, starts


def grouped(weights: Floats, order: NDArray[np.intp], starts: NDArray[np.intp], chosen: NDArray[Any]) -> Floats:
    """(draws, groups) weight of the chosen rows in each group of tied scores."""
    summed: Floats = np.add.reduceat(weights[:, order] * chosen[order], starts, axis=1)
    return summed


def divide(above: Floats, below: Floats) -> Floats:
    """NaN where both are zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Floats = above / below
    return ratio


def _ranked_pairs(positive: NDArray[np.bool_], score: Floats) -> Callable[[Floats], tuple[Floats, Floats]]:
    order, starts = tied(score)

    def count(weights: Floats) -> tuple[Floats, Floats]:
        up = grouped(weights, order, starts, positive)
        down = grouped(weights, order, starts, ~positive)
        below = np.cumsum(down, axis=1) - down
        return (up * (below + down / 2)).sum(axis=1), up.sum(axis=1) * down.sum(axis=1)

    return count


def auroc(positive: NDArray[np.bool_], score: Floats) -> Metric:
    """Share of pairs (positive, negative) in which the positive has the higher score; ties count half."""
    count = _ranked_pairs(positive, score)
    return lambda weights: divide(*count(weights))


def groups_with_both(positive: NDArray[np.bool_], groups: NDArray[np.intp] | None) -> list[NDArray[np.intp]]:
    """The rows of each group that has positives and negatives."""
    if groups is None:
        return []
    each = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    return [rows for rows in each if positive[rows].any() and not positive[rows].all()]


def auroc_within(positive: NDArray[np.bool_], score: Floats, groups: list[NDArray[np.intp]]) -> Metric:
    """AUROC from the pairs within groups only: nothing that sets groups apart can help or harm."""
    counts = [(rows, _ranked_pairs(positive[rows], score[rows])) for rows in groups]

    def within(weights: Floats) -> Floats:
        won, pairs = np.zeros(len(weights)), np.zeros(len(weights))
        for rows, count in counts:
            more_won, more_pairs = count(weights[:, rows])
            won += more_won
            pairs += more_pairs
        return divide(won, pairs)

    return within


def average_precision(positive: NDArray[np.bool_], score: Floats) -> Metric:
    """Average precision: precision at each threshold, weighted by the recall it adds."""
    order, starts = tied(-score)

    def average(weights: Floats) -> Floats:
        up = grouped(weights, order, starts, positive)
        reached = grouped(weights, order, starts, np.ones(len(positive)))
        precision = np.cumsum(up, axis=1) / np.maximum(np.cumsum(reached, axis=1), 1)
        return divide((up * precision).sum(axis=1), up.sum(axis=1))

    return average


def pair_counts(truth: NDArray[np.intp], chosen: NDArray[np.intp], k: int) -> Metric:
    """(draws, k, k) confusion matrices: rows are the truth, columns what was decided."""
    cell = np.eye(k * k)[truth * k + chosen]
    return lambda weights: (weights @ cell).reshape(-1, k, k)


def share_right(pairs: Floats) -> Floats:
    """(draws,) accuracy from confusion matrices."""
    return divide(np.trace(pairs, axis1=1, axis2=2), pairs.sum(axis=(1, 2)))


def recalls(pairs: Floats) -> Floats:
    """(draws, k) share of each class that was decided rightly; NaN for an absent class."""
    return divide(np.diagonal(pairs, axis1=1, axis2=2), pairs.sum(axis=2))


def recall_of(pairs: Metric, number: int) -> Metric:
    """The recall of one class, sensitivity or specificity."""
    return lambda weights: recalls(pairs(weights))[:, number]


def f1_scores(pairs: Floats) -> Floats:
    """(draws, k); NaN for a class that is neither there nor decided for."""
    return divide(2 * np.diagonal(pairs, axis1=1, axis2=2), pairs.sum(axis=2) + pairs.sum(axis=1))


def cohen_kappa(pairs: Floats, *, quadratic: bool) -> Floats:
    """Cohen's kappa; quadratic: disagreement weighs as the squared distance of the classes."""
    k = pairs.shape[1]
    steps = np.arange(k)
    weight = (steps[:, None] - steps) ** 2.0 if quadratic else 1.0 - np.eye(k)
    expected = pairs.sum(axis=2)[:, :, None] * pairs.sum(axis=1)[:, None, :] / pairs.sum(axis=(1, 2))[:, None, None]
    return 1 - divide((pairs * weight).sum(axis=(1, 2)), (expected * weight).sum(axis=(1, 2)))


def mean_of(values: Floats) -> Metric:
    """Weighted mean of a number a row."""
    return lambda weights: weights @ values / weights.sum(axis=1)


def mean_over(metrics: list[Metric]) -> Metric:
    """Mean of several metrics."""
    return lambda weights: np.mean([metric(weights) for metric in metrics], axis=0)


def on_rows(metric: Metric, rows: NDArray[np.intp]) -> Metric:
    """A metric that was made on some of the rows."""
    return lambda weights: metric(weights[:, rows])


def bin_of(score: Floats, bins: int = CALIBRATION_BINS) -> NDArray[np.intp]:
    """(n,) which of the equal-width bins of probability each row falls into."""
    return np.clip((score * bins).astype(np.intp), 0, bins - 1)


def calibration_error(positive: NDArray[np.bool_], score: Floats) -> Metric:
    """Mean over rows of the gap between stated and found share in the row's bin."""
    member = np.eye(CALIBRATION_BINS)[bin_of(score)]
    gap = member * (score - positive)[:, None]
    return lambda weights: np.abs(weights @ gap).sum(axis=1) / weights.sum(axis=1)


def logit(score: Floats) -> Floats:
    """Log odds; probabilities within 1e-6 of 0 or 1 are taken for that far."""
    clipped = np.clip(score, _LEAST_PROBABILITY, 1 - _LEAST_PROBABILITY)
    x: Floats = np.log(clipped) - np.log1p(-clipped)
    return x


def recalibration(positive: NDArray[np.bool_], x: Floats, weights: Floats) -> Floats:
    """(draws, 2) intercept and slope of the logistic regression of the truth on the logit; infinite where separated."""
    beta = np.tile([0.0, 1.0], (len(weights), 1))
    going = np.arange(len(weights))
    for _ in range(_NEWTON_STEPS):
        eta = np.clip(beta[going, :1] + beta[going, 1:] * x, -35, 35)
        share = 1 / (1 + np.exp(-eta))
        part = weights[going]
        rest, curve = part * (positive - share), part * share * (1 - share)
        g0, g1 = rest.sum(axis=1), rest @ x
        h00, h01, h11 = curve.sum(axis=1), curve @ x, curve @ (x * x)
        det = h00 * h11 - h01 * h01
        step = np.stack([divide(h11 * g0 - h01 * g1, det), divide(h00 * g1 - h01 * g0, det)], axis=1)
        beta[going] += step
        lost = ~np.isfinite(step).all(axis=1) | (np.abs(beta[going]) > STEEPEST).any(axis=1)
        beta[going[lost]] = np.where(np.sign(beta[going[lost], 1:]) < 0, -np.inf, np.inf)
        going = going[~lost & (np.abs(step).max(axis=1) > _NEWTON_TOLERANCE)]
        if not len(going):
            break
    # What has not settled by now runs away slowly: separated but for a tie.
    beta[going] = np.inf
    return beta


def c_index(truth: Floats, risk: Floats, groups: list[NDArray[np.intp]] | None = None) -> Metric:
    """Harrell's C: of two rows, the one with the earlier event should have the higher risk; equal risks count half.

    A row that is censored at the very time of another's event counts as later, as is usual.

    Args:
        truth: (n, 2) time and event.
        risk: (n,), higher for an earlier event.
        groups: Rows that are compared with each other, pairs of two groups don't count; all when left out.
    """
    block = max(1, _BLOCK_NUMBERS // max(1, len(truth)))

    def index(weights: Floats) -> Floats:
        won, pairs = np.zeros(len(weights)), np.zeros(len(weights))
        for group in [np.arange(len(truth))] if groups is None else groups:
            time, event, score, own = truth[group, 0], truth[group, 1] == 1, risk[group], weights[:, group]
            rows = np.flatnonzero(event)
            for start in range(0, len(rows), block):
                some = rows[start : start + block]
                later = (time > time[some, None]) | ((time == time[some, None]) & ~event)
                better = later * ((score < score[some, None]) + 0.5 * (score == score[some, None]))
                won += (own[:, some] * (own @ better.T)).sum(axis=1)
                pairs += (own[:, some] * (own @ later.T.astype(np.float64))).sum(axis=1)
        return divide(won, pairs)

    return index


def _weighted_ranks(values: Floats) -> Callable[[Floats], Floats]:
    order, starts = tied(values)
    group = np.empty(len(values), np.intp)
    group[order] = np.repeat(np.arange(len(starts)), np.diff([*starts, len(values)]))

    def ranks(weights: Floats) -> Floats:
        held = grouped(weights, order, starts, np.ones(len(values)))
        middle = np.cumsum(held, axis=1) - held / 2
        return middle[:, group]

    return ranks


def spearman(truth: Floats, score: Floats) -> Metric:
    """Correlation of ranks; ties have their mean rank."""
    of_truth, of_score = _weighted_ranks(truth), _weighted_ranks(score)

    def correlate(weights: Floats) -> Floats:
        total = weights.sum(axis=1, keepdims=True)
        a, b = of_truth(weights), of_score(weights)
        a = a - (weights * a).sum(axis=1, keepdims=True) / total
        b = b - (weights * b).sum(axis=1, keepdims=True) / total
        spread = np.sqrt((weights * a * a).sum(axis=1) * (weights * b * b).sum(axis=1))
        return divide((weights * a * b).sum(axis=1), spread)

    return correlate


def r2(truth: Floats, score: Floats) -> Metric:
    """One minus the squared error over the spread around the mean."""

    def explained(weights: Floats) -> Floats:
        mean = weights @ truth / weights.sum(axis=1)
        spread = weights @ truth**2 - weights.sum(axis=1) * mean**2
        return 1 - divide(weights @ (truth - score) ** 2, spread)

    return explained
