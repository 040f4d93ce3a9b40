"""Puts the objects of regions together: small ones owned by their centroid, large ones joined where they overlap.

Every step is linear in the number of objects and does not depend on the order of regions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

__all__ = ["BoxPx", "RegionPieces", "Side", "Strip", "cut_strips", "join_pieces", "owned_by", "regions_of"]

Side = Literal["left", "right", "top", "bottom"]

_OPPOSITE: tuple[tuple[Side, Side, tuple[int, int]], ...] = (("right", "left", (0, 1)), ("bottom", "top", (1, 0)))


class BoxPx(NamedTuple):
    """A rectangle of the working grid: corner and size in its pixels."""

    x_px: int
    y_px: int
    width_px: int
    height_px: int


def regions_of(size_px: tuple[int, int], region_px: int) -> dict[tuple[int, int], BoxPx]:
    """Cut the working grid (width, height) into regions; by row and column, in rows from the top."""
    width_px, height_px = size_px
    return {
        (y // region_px, x // region_px): BoxPx(x, y, min(region_px, width_px - x), min(region_px, height_px - y))
        for y in range(0, height_px, region_px)
        for x in range(0, width_px, region_px)
    }


def owned_by(box: BoxPx, centroid_px: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which centroids (n, 2) a region owns: its left and top edges are its own, so each point has one owner."""
    x, y = centroid_px[:, 0], centroid_px[:, 1]
    inside: NDArray[np.bool_] = (
        (x >= box.x_px) & (x < box.x_px + box.width_px) & (y >= box.y_px) & (y < box.y_px + box.height_px)
    )
    return inside


@dataclass(frozen=True, slots=True)
class Strip:
    """The labels that a region sees on both sides of one of its borders; background is left out."""

    at: NDArray[np.int64]
    """Places of the pixels within the strip, in rows; the neighbour's strip numbers the same pixels alike."""
    label: NDArray[np.int32]


def cut_strips(labels: NDArray[np.int32], halo_px: int, reach_px: int) -> dict[Side, Strip]:
    """What the neighbours of a region need to know of its labels.

    Args:
        labels: (height, width) of a region with ``halo_px`` around it.
        halo_px: At least ``reach_px``.
        reach_px: How far a strip reaches to either side of the border.
    """
    height, width = labels.shape
    along_y, along_x = slice(halo_px, height - halo_px), slice(halo_px, width - halo_px)
    windows: dict[Side, NDArray[np.int32]] = {
        "left": labels[along_y, halo_px - reach_px : halo_px + reach_px],
        "right": labels[along_y, width - halo_px - reach_px : width - halo_px + reach_px],
        "top": labels[halo_px - reach_px : halo_px + reach_px, along_x],
        "bottom": labels[height - halo_px - reach_px : height - halo_px + reach_px, along_x],
    }
    strips = {}
    for side, window in windows.items():
        flat = window.ravel()
        at = np.flatnonzero(flat)
        strips[side] = Strip(at.astype(np.int64), flat[at])
    return strips


@dataclass(frozen=True, slots=True)
class RegionPieces:
    """The pieces of large objects in one region's core, and what it saw at its borders."""

    label: NDArray[np.int32]
    """(n,) the number of each piece in the region; one object may have several pieces with one number."""
    shape: NDArray[np.object_]
    """(n,) shapely polygons or multipolygons in level-0 pixels, cut at the core's border."""
    strips: Mapping[Side, Strip] = field(default_factory=dict)


def join_pieces(
    regions: Mapping[tuple[int, int], RegionPieces], *, joined_share: float = 0.5
) -> tuple[NDArray[np.object_], NDArray[np.int64], NDArray[np.int64]]:
    """Join the pieces of objects that cross regions.

    Args:
        regions: By row and column. Regions without objects may be missing.
        joined_share: Two labels are one object when they share this much of the smaller one, within the strip that both
            regions see.

    Returns:
        (M,) whole objects in level-0 pixels: valid, without points on straight lines, in a canonical form that does not
        depend on how they were cut; (P,) for each piece, in the order of ``regions`` and within them, its object; and
        (M,) for each object the piece that comes first.
    """
    node: dict[tuple[tuple[int, int], int], int] = {}
    owner: list[NDArray[np.int64]] = []
    for key, pieces in regions.items():
        numbers = pieces.label.tolist()
        for number in numbers:
            node.setdefault((key, number), len(node))
        owner.append(np.asarray([node[key, number] for number in numbers], np.int64))
    first, second = _links(regions, node, joined_share)
    graph = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(len(node), len(node)))
    _, group_of_node = connected_components(graph, directed=False)
    nodes = np.concatenate(owner) if owner else np.zeros(0, np.int64)
    shapes = np.concatenate([pieces.shape for pieces in regions.values()]) if regions else np.empty(0, object)
    groups = group_of_node[nodes] if len(nodes) else np.zeros(0, np.int64)
    _, first_piece, object_of_piece = np.unique(groups, return_index=True, return_inverse=True)
    order = np.argsort(object_of_piece, kind="stable")
    bounds = np.searchsorted(object_of_piece[order], np.arange(len(first_piece) + 1))
    joined = np.empty(len(first_piece), object)
    for number, (start, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        own = shapes[order[start:stop]]
        joined[number] = shapely.union_all(own) if len(own) > 1 else own[0]
    canonical = shapely.normalize(joined)
    # Seams leave points on straight lines. Normalised rings begin at a corner, so all of these points can go.
    has_seams = np.flatnonzero(np.diff(bounds) > 1)
    canonical[has_seams] = shapely.normalize(shapely.simplify(canonical[has_seams], 0, preserve_topology=True))
    return canonical, object_of_piece.astype(np.int64), first_piece.astype(np.int64)


def _links(
    regions: Mapping[tuple[int, int], RegionPieces],
    node: Mapping[tuple[tuple[int, int], int], int],
    joined_share: float,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of nodes that are one object, by what neighbours see in the strip they share."""
    first: list[int] = []
    second: list[int] = []
    for key, pieces in regions.items():
        for side, opposite, (down, right) in _OPPOSITE:
            other_key = (key[0] + down, key[1] + right)
            other = regions.get(other_key)
            if other is None or side not in pieces.strips or opposite not in other.strips:
                continue
            for a, b in _matching(pieces.strips[side], other.strips[opposite], joined_share):
                # A label may lie wholly in the halo: then its piece is the neighbour's.
                one, two = node.get((key, a)), node.get((other_key, b))
                if one is not None and two is not None:
                    first.append(one)
                    second.append(two)
    return np.asarray(first, np.int64), np.asarray(second, np.int64)


def _matching(one: Strip, other: Strip, joined_share: float) -> Sequence[tuple[int, int]]:
    """Labels of two regions that are the same object."""
    seen = np.zeros(max(one.at.max(initial=-1), other.at.max(initial=-1)) + 1, np.int64)
    seen[other.at] = other.label
    met = seen[one.at]
    area_one, area_other = np.bincount(one.label), np.bincount(other.label)
    # One number a pair, for pairs are slow to sort.
    key = one.label[met > 0].astype(np.int64) * len(area_other) + met[met > 0]
    pairs, shared = np.unique(key, return_counts=True)
    first, second = np.divmod(pairs, max(len(area_other), 1))
    same = shared >= joined_share * np.minimum(area_one[first], area_other[second])
    return list(zip(first[same].tolist(), second[same].tolist(), strict=True))
