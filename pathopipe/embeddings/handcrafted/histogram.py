"""Statistics of bytes from their histograms: exact whole numbers until the last division."""

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["describe", "histogram", "shares"]

_VALUES = np.arange(256, dtype=np.float64)


def histogram(image: NDArray[np.uint8], channel: int = 0) -> NDArray[np.float64]:
    """(256,) counts of the bytes of one channel; exact up to 2^24 pixels of one value."""
    counts: NDArray[np.float32] = cv2.calcHist([image], [channel], None, [256], [0, 256])
    return counts.ravel().astype(np.float64)


def shares(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Counts (..., n) divided by their sum; zero where there is none."""
    whole: NDArray[np.float64] = np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    return counts / whole


def describe(counts: NDArray[np.float64], percent: tuple[int, ...]) -> NDArray[np.float64]:
    """Mean, standard deviation and percentiles of histograms.

    Args:
        counts: (k, 256) histograms.
        percent: Percentiles, 0 to 100; each is the least value that at least this share of the pixels does not exceed.

    Returns:
        (k, 2 + len(percent)), in bytes; zeros for an empty histogram.
    """
    n = counts.sum(axis=1)
    some = np.maximum(n, 1)
    mean = (counts * _VALUES).sum(axis=1) / some
    variance = (counts * (_VALUES - mean[:, None]) ** 2).sum(axis=1) / some
    # One more than the number of values whose cumulated share stays below: compared as whole numbers.
    cumulated = 100 * np.cumsum(counts, axis=1)
    columns = [mean, np.sqrt(variance)]
    columns += [np.where(n > 0, (cumulated < p * n[:, None]).sum(axis=1), 0) for p in percent]
    return np.stack(columns, axis=1)
