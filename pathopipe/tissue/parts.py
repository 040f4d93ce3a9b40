"""Connected parts of a mask: their sizes, what they hold, what lies beside them."""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["Parts", "drop_small", "fill_holes", "label_parts", "square", "widen"]


class Parts(NamedTuple):
    """The connected parts of a mask, numbered from 1; part 0 is what lies outside."""

    labels: NDArray[np.int32]
    """(height, width) number of the part."""
    n_px: NDArray[np.int32]
    """(parts,) pixels; at least 1, so that shares are defined."""

    def share(self, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Share of each part's pixels that ``mask`` holds."""
        return np.bincount(self.labels[mask], minlength=len(self.n_px)) / self.n_px

    def variance(self, values: NDArray[np.float32], where: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Variance in each part of ``values``, which are those of the pixels of ``where``."""
        labels, n = self.labels[where], np.maximum(self.n_px, 1)
        mean = np.bincount(labels, values, minlength=len(n)) / n
        return np.bincount(labels, values * values, minlength=len(n)) / n - mean**2

    def beside(self, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Share of ``mask`` among the pixels outside all parts that lie within two pixels of each part."""
        near = cv2.dilate(self.labels.astype(np.float32), square(5)).astype(np.int32)
        near[self.labels > 0] = 0
        n_near = np.maximum(np.bincount(near.ravel(), minlength=len(self.n_px)), 1)
        return np.bincount(near[mask], minlength=len(self.n_px)) / n_near

    def touching_edge(self) -> NDArray[np.int64]:
        """Pixels that each part has along the edges of the picture."""
        labels = self.labels
        edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
        return np.bincount(edge, minlength=len(self.n_px))

    def pick(self, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Mask of the chosen parts; the outside is never chosen."""
        chosen = chosen.copy()
        chosen[0] = False
        return chosen[self.labels]


def label_parts(mask: NDArray[np.bool_], connectivity: int = 8) -> Parts:
    """Number the 4- or 8-connected parts of a (height, width) mask."""
    if not mask.any():
        return Parts(np.zeros(mask.shape, np.int32), np.array([mask.size], np.int32))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=connectivity)
    return Parts(labels, np.maximum(stats[:, cv2.CC_STAT_AREA], 1))


def fill_holes(mask: NDArray[np.bool_], below_px: float) -> NDArray[np.bool_]:
    """Fill holes of fewer than ``below_px`` pixels; a gap that is open to the picture's edge is no hole."""
    holes = label_parts(~mask)
    return mask | holes.pick((holes.n_px < below_px) & (holes.touching_edge() == 0))


def drop_small(mask: NDArray[np.bool_], below_px: float) -> NDArray[np.bool_]:
    """Drop 4-connected parts of fewer than ``below_px`` pixels."""
    parts = label_parts(mask, 4)
    return parts.pick(parts.n_px >= below_px)


def square(side_px: int) -> NDArray[np.uint8]:
    """Structuring element that reaches ``side_px // 2`` pixels in every direction."""
    return np.ones((side_px, side_px), np.uint8)


def widen(mask: NDArray[np.bool_], by_px: int) -> NDArray[np.bool_]:
    """Grow a mask by some pixels in every direction."""
    grown: NDArray[np.bool_] = cv2.dilate(mask.astype(np.uint8), square(2 * by_px + 1)) > 0
    return grown
