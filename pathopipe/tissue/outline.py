"""Masks to polygons along pixel edges, and polygons back to masks; exact in both directions."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy import ndimage
from shapely.geometry import Polygon

__all__ = ["rasterise", "trace"]


class _Corners(NamedTuple):
    """Every turn of every boundary, sorted by row, then column, then leftward before rightward edge."""

    row: NDArray[np.int64]
    column: NDArray[np.int64]
    goes_down: NDArray[np.bool_]
    """The vertical edge at this corner leads down; else up."""


def trace(mask: NDArray[np.uint8] | NDArray[np.bool_]) -> list[Polygon]:
    """Outline the 4-connected regions of a mask along the edges of its pixels.

    A boundary alternates between horizontal and vertical runs, so its corners, sorted along a row, pair up into the
    horizontal runs, and sorted along a column into the vertical ones; walking the pairs in turn gives the rings.
    Where two pixels touch only at a corner, they are joined if they belong to the same region and kept apart
    otherwise: then no ring meets itself, and every polygon is valid without repair.

    Args:
        mask: (height, width), above 0 inside.

    Returns:
        One polygon a region with its holes, in pixel edges: pixel (0, 0) is the square (0, 0) to (1, 1). Largest
        first, then by row and column of the top-left corner. The areas sum to the number of pixels inside, exactly.
    """
    # The frame of background makes every boundary closed and every 2 x 2 neighbourhood complete.
    inside = np.pad(mask.astype(np.bool_), 1)
    regions = _label(inside)
    corners = _find_corners(inside, regions)
    shells: dict[int, NDArray[np.int64]] = {}
    holes: dict[int, list[NDArray[np.int64]]] = {}
    for ring in _walk(corners):
        x, y = ring[0]  # the top-left corner: the pixel below and to the right of it is within the ring
        region = int(regions[y + 1, x + 1])
        if region:
            shells[region] = ring
        else:
            holes.setdefault(int(regions[y, x + 1]), []).append(ring)
    polygons = [
        Polygon(shell.astype(np.float64), [hole.astype(np.float64) for hole in holes.get(region, [])])
        for region, shell in shells.items()
    ]
    return sorted(polygons, key=lambda polygon: -float(polygon.area))


def _label(inside: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Number the 4-connected regions from 1."""
    labels = np.empty(inside.shape, np.int32)
    ndimage.label(inside, output=labels)
    return labels


def _find_corners(inside: NDArray[np.bool_], regions: NDArray[np.int32]) -> _Corners:
    nw, ne, sw, se = inside[:-1, :-1], inside[:-1, 1:], inside[1:, :-1], inside[1:, 1:]
    single = nw ^ ne ^ sw ^ se  # one or three pixels inside: one turn
    crossing = (nw == se) & (ne == sw) & (nw != ne)  # two diagonal pixels: two turns at one point
    row_1, column_1 = np.nonzero(single)
    goes_right_1 = (ne != se)[single]
    goes_down_1 = (sw != se)[single]

    row_2, column_2 = np.nonzero(crossing)
    falling = nw[crossing]  # the pixels inside are upper left and lower right
    joined = np.where(
        falling,
        (regions[:-1, :-1] == regions[1:, 1:])[crossing],
        (regions[:-1, 1:] == regions[1:, :-1])[crossing],
    )
    # Rings run round the inside pixels where these are kept apart and round the outside ones where they are joined;
    # either way one ring has the left edge and the other the right one, and this says which of them goes down.
    right_goes_down = falling != joined
    row = np.concatenate([row_1, row_2, row_2])
    column = np.concatenate([column_1, column_2, column_2])
    goes_right = np.concatenate([goes_right_1, np.zeros(len(row_2), bool), np.ones(len(row_2), bool)])
    goes_down = np.concatenate([goes_down_1, ~right_goes_down, right_goes_down])
    order = np.lexsort((goes_right, column, row))
    return _Corners(row[order], column[order], goes_down[order])


def _walk(corners: _Corners) -> Iterator[NDArray[np.int64]]:
    """Yield closed rings (n, 2) of (x, y) corners, each from its top-left one, in order of that."""
    n = len(corners.row)
    by_column = np.lexsort((corners.goes_down, corners.row, corners.column))
    vertical = np.empty(n, np.int64)
    vertical[by_column[0::2]] = by_column[1::2]
    vertical[by_column[1::2]] = by_column[0::2]
    # Sorted along rows, corner 2k pairs with 2k + 1.
    partner = vertical.tolist()
    points = np.stack([corners.column, corners.row], axis=1)
    seen = bytearray(n)
    for start in range(n):
        if seen[start]:
            continue
        path: list[int] = []
        at = start
        while not seen[at]:
            across = at ^ 1
            seen[at] = seen[across] = 1
            path += (at, across)
            at = partner[across]
        path.append(start)
        yield points[path]


def rasterise(
    polygons: Sequence[Polygon], width_px: int, height_px: int, scale: tuple[float, float]
) -> NDArray[np.uint8]:
    """Draw polygons that do not overlap: a pixel is inside when its centre is (even-odd rule).

    Args:
        polygons: In any frame, for instance level-0 pixels.
        width_px: Width of the mask.
        height_px: Height of the mask.
        scale: Size of a mask pixel in the frame of the polygons, x then y.

    Returns:
        (height_px, width_px) uint8, 1 inside. ``rasterise(trace(mask), ...)`` is ``mask``.
    """
    # Each ring edge toggles the rest of every row whose centre line it crosses; the running parity is the inside.
    toggles = np.zeros((height_px, width_px + 1), np.uint8)
    xy, ring = shapely.get_coordinates(shapely.get_rings(list(polygons)), return_index=True)
    edges = np.flatnonzero(ring[1:] == ring[:-1])
    xy /= scale
    _toggle(toggles, xy[edges], xy[edges + 1])
    inside: NDArray[np.uint8] = np.bitwise_xor.accumulate(toggles, axis=1)[:, :width_px]
    return np.ascontiguousarray(inside)


def _toggle(toggles: NDArray[np.uint8], start: NDArray[np.float64], end: NDArray[np.float64]) -> None:
    """Flip the first pixel right of each crossing of the edges ``start`` to ``end``, (n, 2) of (x, y) in pixels."""
    height_px, width_px = toggles.shape[0], toggles.shape[1] - 1
    upper, lower = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    # A row counts where upper <= row + 0.5 < lower, so a shared vertex is counted once.
    first = np.clip(np.ceil(upper - 0.5), 0, height_px).astype(np.int64)
    counts = np.clip(np.ceil(lower - 0.5), 0, height_px).astype(np.int64) - first
    edge = np.repeat(np.arange(len(counts)), counts)
    if len(edge) == 0:
        return
    row = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    (x_0, y_0), (x_1, y_1) = start[edge].T, end[edge].T
    x = x_0 + (row + 0.5 - y_0) * (x_1 - x_0) / (y_1 - y_0)
    column = np.clip(np.ceil(x - 0.5), 0, width_px).astype(np.int64)
    np.bitwise_xor.at(toggles, (row, column), np.uint8(1))
