"""What plots of a model show: curves with bands over patients, calibration bins, counts of decisions."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pathopipe.mil.cases import Cases, hindrance, patient_strata
from pathopipe.mil.weighted import CALIBRATION_BINS, Floats, bin_of, bootstrap, grouped, tied

__all__ = ["Band", "CalibrationBins", "calibration_bins", "confusion_counts", "precision_recall_band", "roc_band"]

_BAND_POINTS = 101


class Band(NamedTuple):
    """A curve with its 95 % band over patients, point by point."""

    x: Floats
    y: Floats
    """The curve on all rows."""
    grid: Floats
    """(101,) where the band is given."""
    low: Floats | None
    """None where there are too few patients for a band."""
    high: Floats | None


class CalibrationBins(NamedTuple):
    """Stated against found shares; empty bins are left out."""

    stated: Floats
    """(bins,) mean probability."""
    found: Floats
    """(bins,) share of positives."""
    low: Floats
    """Wilson's 95 % interval of the share."""
    high: Floats
    n_rows: NDArray[np.intp]
    """Rows in each bin."""


def roc_band(cases: Cases, *, seed: int = 0, draws: int = 500) -> Band:
    """False positive share (x) against true positive share (y) of a binary target that has both classes."""
    positive = cases.truth == 1
    order, starts = tied(-cases.scores)

    def curve(weights: Floats) -> tuple[Floats, Floats]:
        up = np.cumsum(grouped(weights, order, starts, positive), axis=1)
        down = np.cumsum(grouped(weights, order, starts, ~positive), axis=1)
        zero = np.zeros((len(weights), 1))
        return np.hstack([zero, down / down[:, -1:]]), np.hstack([zero, up / up[:, -1:]])

    return _band(cases, positive, curve, seed=seed, draws=draws)


def precision_recall_band(cases: Cases, *, seed: int = 0, draws: int = 500) -> Band:
    """Recall (x) against precision (y) of a binary target that has both classes."""
    positive = cases.truth == 1
    order, starts = tied(-cases.scores)

    def curve(weights: Floats) -> tuple[Floats, Floats]:
        up = np.cumsum(grouped(weights, order, starts, positive), axis=1)
        reached = np.cumsum(grouped(weights, order, starts, np.ones(len(positive))), axis=1)
        # Before anything is reached the precision of the first group stands in.
        precision = np.where(reached > 0, up / np.maximum(reached, 1), 1.0)
        return np.hstack([np.zeros((len(weights), 1)), up / up[:, -1:]]), np.hstack([precision[:, :1], precision])

    return _band(cases, positive, curve, seed=seed, draws=draws)


def _band(
    cases: Cases,
    positive: NDArray[np.bool_],
    curve: Callable[[Floats], tuple[Floats, Floats]],
    *,
    seed: int,
    draws: int,
) -> Band:
    x, y = (values[0] for values in curve(np.ones((1, len(cases)))))
    grid = np.linspace(0, 1, _BAND_POINTS)
    if hindrance(cases, positive.astype(np.intp)):
        return Band(x, y, grid, None, None)
    rng = np.random.default_rng(seed)
    strata = patient_strata(cases, positive.astype(np.intp))
    sampled = [
        np.interp(grid, xs, ys)
        for weights in bootstrap(cases.patient, strata, draws, rng)
        for xs, ys in zip(*curve(weights), strict=True)
    ]
    tail = 2.5  # percent, on either side
    low, high = np.percentile(sampled, [tail, 100 - tail], axis=0)
    return Band(x, y, grid, low, high)


def calibration_bins(cases: Cases, bins: int = CALIBRATION_BINS) -> CalibrationBins:
    """Bins of equal width for a plot: of the positive class, or of the most probable one where there are several."""
    if cases.kind == "binary":
        score, hit = cases.scores, cases.truth == 1
    else:
        score, hit = cases.scores.max(axis=1), cases.scores.argmax(axis=1) == cases.truth
    member = bin_of(score, bins)
    count = np.bincount(member, minlength=bins)
    used = count > 0
    stated = np.bincount(member, score, bins)[used] / count[used]
    found = np.bincount(member, hit.astype(np.float64), bins)[used] / count[used]
    n, z = count[used], 1.959964
    middle = (found + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(found * (1 - found) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return CalibrationBins(stated, found, np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1), n)


def confusion_counts(cases: Cases) -> NDArray[np.intp]:
    """(K, K) rows by truth (down) and decision (across) of a target with classes."""
    k = len(cases.classes)
    chosen = cases.scores >= cases.threshold if cases.kind == "binary" else cases.scores.argmax(axis=1)
    return np.bincount(cases.truth.astype(np.intp) * k + chosen, minlength=k * k).reshape(k, k)
