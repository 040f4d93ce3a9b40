"""Nuclei as columns, and the rule that keeps them apart."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from pathopipe.synth.noise import hash01
from pathopipe.synth.shapes import ENDOTHELIAL, EPITHELIAL, LONGEST_UM, SEMI_AXES_UM
from pathopipe.synth.stars import BoxUm

__all__ = ["NO_NUCLEI", "Nuclei", "joined", "without_overlaps"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Nuclei(NamedTuple):
    """Nuclei as columns."""

    x_um: Floats
    y_um: Floats
    kind: Ints
    variant: Ints
    angle: Floats
    id: Ints
    parent: Ints
    """Gland id, 0 for none."""

    def take(self, index: NDArray[np.bool_] | Ints) -> "Nuclei":
        """A selection of rows."""
        return Nuclei(
            self.x_um[index],
            self.y_um[index],
            self.kind[index],
            self.variant[index],
            self.angle[index],
            self.id[index],
            self.parent[index],
        )


def joined(parts: list[Nuclei]) -> Nuclei:
    """All rows of some tables, in order."""
    return Nuclei(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


NO_NUCLEI = Nuclei(*(np.zeros(0, kind) for kind in (float, float, int, int, float, int, int)))


def without_overlaps(nuclei: Nuclei, seed: int, box: BoxUm) -> Nuclei:
    """Drop each nucleus in the box that overlaps one of higher rank, whether or not that one stays itself.

    The rule looks one neighbour far, so every box decides alike.
    """
    rank = (nuclei.kind == EPITHELIAL) + (nuclei.kind == ENDOTHELIAL) + hash01(seed, 80, nuclei.id)
    points = np.stack([nuclei.x_um, nuclei.y_um], axis=1)
    pairs = np.zeros((0, 2), np.int64)
    if len(points):
        pairs = cKDTree(points).query_pairs(2 * LONGEST_UM, output_type="ndarray")
    i, j = pairs[:, 0], pairs[:, 1]
    delta = points[j] - points[i]
    toward = np.arctan2(delta[:, 1], delta[:, 0])
    reach = np.zeros(len(pairs))
    for side in (i, j):
        long, short = SEMI_AXES_UM[nuclei.kind[side], nuclei.variant[side]].T
        off = toward - nuclei.angle[side]
        reach += long * short / np.hypot(short * np.cos(off), long * np.sin(off))
    clash = np.hypot(delta[:, 0], delta[:, 1]) < 0.95 * reach
    lower = np.where(rank[i] < rank[j], i, j)[clash]
    keep = np.ones(len(points), np.bool_)
    keep[lower] = False
    # Owned by the square that holds the centre.
    x, y = nuclei.x_um, nuclei.y_um
    keep &= (x >= box.left) & (x < box.right) & (y >= box.top) & (y < box.bottom)
    return nuclei.take(keep)
