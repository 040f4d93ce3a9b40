"""Label images to outlines along pixel edges, and outlines back to label images; exact in both directions."""

from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from pathopipe.geometry import Outlines, take_outlines

__all__ = [
    "Runs",
    "connect_runs",
    "find_runs",
    "paint_runs",
    "rasterise_outlines",
    "runs_at",
    "sum_runs",
    "trace_labels",
    "trace_runs",
]

# A corner has the edges of one of the four pixels around a lattice point. It is convex where this pixel is the inside,
# and a notch where the inside is around it. The order is such that the corners whose horizontal edge leads west come
# first, and that even ones have the inside below that edge, odd ones above it.
_SW, _NW, _NOTCH_NW, _NOTCH_SW, _SE, _NE, _NOTCH_NE, _NOTCH_SE = range(8)
_INSIDE_OF_KIND = np.array([2, 0, 1, 3, 3, 1, 0, 2])
"""A pixel of the inside (0 NW, 1 NE, 2 SW, 3 SE) for each kind of corner."""
_INSIDE_IS_EAST = np.isin(np.arange(8), [_SE, _NE, _NOTCH_NW, _NOTCH_SW])
_LEADS_SOUTH = np.isin(np.arange(8), [_SW, _SE, _NOTCH_SW, _NOTCH_SE])

_RASTER_BATCH = 2_000_000
"""Vertices that are drawn at a time; some tens of bytes each."""


class Runs(NamedTuple):
    """Horizontal runs of pixels of one label, row by row; background has none."""

    start: NDArray[np.int64]
    """Flat index of the first pixel in the framed image (one pixel of background on each side)."""
    stop: NDArray[np.int64]
    """Flat index behind the last pixel."""
    label: NDArray[np.integer]


def find_runs(framed: NDArray[np.integer]) -> Runs:
    """Cut a label image, framed with one pixel of background, into horizontal runs; what is not above 0 is none."""
    flat = framed.ravel()  # a row's last pixel and the next row's first are background
    before = np.flatnonzero(flat[:-1] != flat[1:])
    left, right = flat[before], flat[before + 1]
    return Runs(before[right > 0] + 1, before[left > 0] + 1, right[right > 0])


def connect_runs(runs: Runs, framed: NDArray[np.integer]) -> NDArray[np.int32]:
    """Number of the 4-connected region that each run belongs to; from 0, in the order of their first runs."""
    flat, width = framed.ravel(), framed.shape[1]
    pairs = []
    # Runs of two rows that meet do so where one of them begins.
    for step in (-width, width):
        begins = np.flatnonzero(flat[runs.start + step] == runs.label)
        pairs.append((begins, runs_at(runs, runs.start[begins] + step)))
    one, other = np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])
    n = len(runs.label)
    _, region = connected_components(
        csr_array((np.ones(len(one), np.int8), (one, other)), shape=(n, n)), directed=False
    )
    n_regions = int(region.max(initial=-1)) + 1
    first = np.empty(n_regions, np.int64)
    first[region[::-1]] = np.arange(n)[::-1]  # the last to be written is the first run
    number = np.empty(n_regions, np.int32)
    number[np.argsort(first)] = np.arange(n_regions, dtype=np.int32)
    return number[region]


def paint_runs(runs: Runs, values: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """The image of (height, width), without the frame, that has a value on each run and 0 elsewhere.

    Args:
        runs: In the order of their pixels.
        values: One for each run.
        shape: Height and width.
    """
    start = _unframed(runs.start, shape[1])
    stop = start + (runs.stop - runs.start)
    count = np.empty(2 * len(start) + 1, np.int64)
    count[1::2] = stop - start
    count[0:-1:2] = start
    count[-1] = shape[0] * shape[1]
    count[2::2] -= stop
    painted = np.zeros(len(count), values.dtype)
    painted[1::2] = values
    return np.repeat(painted, count).reshape(shape)


def sum_runs(runs: Runs, plane: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The sum of each run's pixels in (height, width), which is without the frame."""
    # Four corners of sums over all that is above and to the left; what overflows, all four have lost.
    total = cv2.integral(plane, sdepth=cv2.CV_32S).ravel()
    width = plane.shape[1] + 1
    row, column = np.divmod(runs.start, plane.shape[1] + 2)
    above = (row - 1) * width + column - 1
    length = runs.stop - runs.start
    below = above + width
    return np.asarray(total[below + length] - total[below] - total[above + length] + total[above], np.int64)


def _unframed(pixel: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Flat indices in the image of pixels given in the framed one."""
    return pixel - (width + 1) - 2 * (pixel // (width + 2))


def runs_at(runs: Runs, pixel: NDArray[np.int64]) -> NDArray[np.int64]:
    """The run that holds each pixel, given as flat indices of pixels that are inside."""
    return np.searchsorted(runs.start, pixel, side="right") - 1


class _Corners(NamedTuple):
    """Every turn of every ring; a ring turns once at a lattice point. Sorted by row, column, kind."""

    row: NDArray[np.int64]
    column: NDArray[np.int64]
    kind: NDArray[np.int64]
    inside: NDArray[np.int64]
    """Flat index in the framed image of a pixel that the ring is an edge of."""
    next: NDArray[np.int64]
    """The corner that follows, walking with the inside at the right hand."""


def trace_labels(
    labels: NDArray[np.integer],
    *,
    origin_px: tuple[int, int] = (0, 0),
    scale_l0: tuple[float, float] = (1.0, 1.0),
    numbers: NDArray[np.integer] | None = None,
) -> Outlines:
    """Outline every label of a label image along the edges of its pixels.

    A ring alternates between horizontal and vertical edges. With the inside on a given side, its corners sorted along a
    row pair up into the horizontal edges, and sorted along a column into the vertical ones; these pairs link each
    corner to the next, for all rings at once. Where two pixels of a label touch only at a corner, they are joined if
    they are connected elsewhere and kept apart otherwise: then no ring meets itself, holes touch a shell or another
    hole in a point at most, and every polygon is valid without repair.

    An object gives the same vertices in any image that holds it whole: rings begin at their top-left corner (top row
    first) and lead round with the inside at the right hand; parts stand from the largest to the smallest, then by their
    top-left corner; holes by theirs.

    Args:
        labels: (height, width) whole numbers; 0 (or less) is background. Labels may touch, have holes and several
            parts.
        origin_px: Where the image's top-left corner lies, x then y, in its own pixels.
        scale_l0: Size of a pixel in the frame of the outlines, x then y.
        numbers: Labels to trace, each once; by default 1 to the highest there is.

    Returns:
        One object a label, in the order of ``numbers``; one that is not in the image has no polygon. A vertex is
        ``(origin_px + corner) * scale_l0``, in float64, then rounded to float32; no vertex lies on a straight line.
    """
    if numbers is None:
        numbers = np.arange(1, max(int(labels.max(initial=0)), 0) + 1)
    if not len(numbers):
        return Outlines.empty()
    framed = np.pad(labels, 1)
    return trace_runs(framed, find_runs(framed), numbers, origin_px=origin_px, scale_l0=scale_l0)


def trace_runs(
    framed: NDArray[np.integer],
    runs: Runs,
    numbers: NDArray[np.integer],
    *,
    origin_px: tuple[int, int],
    scale_l0: tuple[float, float],
) -> Outlines:
    """What :func:`trace_labels` gives, from a label image that is framed with background and was cut into runs."""
    if not len(numbers):
        return Outlines.empty()
    region_of_run = connect_runs(runs, framed)
    corners = _find_corners(framed, runs, region_of_run, numbers)
    ring_of_corner, rank = _walk(corners.next)
    n_rings = int(ring_of_corner.max(initial=-1)) + 1
    length = np.bincount(ring_of_corner, minlength=n_rings)
    first = np.cumsum(length) - length
    sequence = np.empty(len(rank), np.int64)
    sequence[first[ring_of_corner] + rank] = np.arange(len(rank))
    start = sequence[first]

    region = region_of_run[runs_at(runs, corners.inside[start])]
    is_shell = corners.kind[start] == _SE
    area_px = _areas(corners, ring_of_corner, n_rings)
    area_of_region = np.bincount(region, area_px, minlength=len(runs.label))
    shell_of_region = np.zeros(len(runs.label), np.int64)
    shell_of_region[region[is_shell]] = start[is_shell]
    row_of_number = np.argsort(numbers)
    owner = row_of_number[np.searchsorted(numbers, framed.ravel()[corners.inside[start]], sorter=row_of_number)]
    order = np.lexsort((start, shell_of_region[region], -area_of_region[region], owner))

    # Each ring in its place, and its first corner once more to close it.
    length, first = length[order], first[order]
    ring_offsets = np.concatenate([[0], np.cumsum(length + 1)]).astype(np.int64)
    step = np.arange(ring_offsets[-1]) - np.repeat(ring_offsets[:-1], length + 1)
    step[ring_offsets[1:] - 1] = 0
    corner = sequence[np.repeat(first, length + 1) + step]
    vertices = np.empty((len(corner), 2), np.float32)
    vertices[:, 0] = (corners.column[corner] + origin_px[0]) * np.float64(scale_l0[0])
    vertices[:, 1] = (corners.row[corner] + origin_px[1]) * np.float64(scale_l0[1])
    shells = np.flatnonzero(is_shell[order])
    per_object = np.bincount(owner[order][shells], minlength=len(numbers))
    return Outlines(
        vertices,
        ring_offsets,
        np.append(shells, n_rings).astype(np.int64),
        np.concatenate([[0], np.cumsum(per_object)]).astype(np.int64),
    )


def _find_corners(
    framed: NDArray[np.integer], runs: Runs, region_of_run: NDArray[np.int32], numbers: NDArray[np.integer]
) -> _Corners:
    width, flat = framed.shape[1], framed.ravel()
    steps = np.array([0, 1, width, width + 1])
    # A corner lies at the end of a run in the row above or below it.
    near = np.zeros(framed.size, np.bool_)
    for before in (runs.start - 1, runs.stop - 1):
        near[before] = True
        near[before - width] = True
    north = np.flatnonzero(near)
    around = np.stack([flat[north + step] for step in steps.tolist()])
    turning = (around[0] != around[2]) | (around[1] != around[3])
    north, (nw, ne, sw, se) = north[turning], around[:, turning]
    row, column = np.divmod(north, width)
    top, bottom, left, right = nw == ne, sw == se, nw == sw, ne == se
    falling, rising = (nw == se) & (nw > 0), (ne == sw) & (ne > 0)
    for diagonal, one, other in ((falling, 0, 3), (rising, 1, 2)):
        crossing = np.flatnonzero(diagonal & ~top & ~bottom)
        ends = [region_of_run[runs_at(runs, north[crossing] + steps[end])] for end in (one, other)]
        diagonal[crossing[ends[0] != ends[1]]] = False
    turns = np.empty((len(row), 8), np.bool_)
    turns[:, _NW] = (nw > 0) & ~top & ~left & ~falling
    turns[:, _NE] = (ne > 0) & ~top & ~right & ~rising
    turns[:, _SW] = (sw > 0) & ~bottom & ~left & ~rising
    turns[:, _SE] = (se > 0) & ~bottom & ~right & ~falling
    turns[:, _NOTCH_NW] = rising & ~top
    turns[:, _NOTCH_SE] = rising & ~bottom
    turns[:, _NOTCH_NE] = falling & ~top
    turns[:, _NOTCH_SW] = falling & ~bottom
    turn = np.flatnonzero(turns)
    point, kind = turn >> 3, turn & 7
    inside = north[point] + steps[_INSIDE_OF_KIND][kind]
    wanted = np.isin(flat[inside], numbers)
    point, kind, inside = point[wanted], kind[wanted], inside[wanted]
    row, column = row[point], column[point]

    following = np.empty(len(point), np.int64)
    is_above = (kind & 1).astype(np.bool_)
    eastward, westward = np.flatnonzero(~is_above), np.flatnonzero(is_above)
    following[eastward[0::2]] = eastward[1::2]
    following[westward[1::2]] = westward[0::2]

    # The same along columns; at one point the corner whose vertical edge leads north comes first.
    along = np.argsort(column.astype(np.min_scalar_type(width)), kind="stable")
    is_east, leads_south = _INSIDE_IS_EAST[kind[along]], _LEADS_SOUTH[kind]
    northward, southward = along[is_east], along[~is_east]
    for corner in (northward, southward):
        late = np.flatnonzero((np.diff(point[corner]) == 0) & leads_south[corner[:-1]])
        corner[late], corner[late + 1] = corner[late + 1], corner[late]
    following[northward[1::2]] = northward[0::2]
    following[southward[0::2]] = southward[1::2]
    return _Corners(row, column, kind, inside, following)


def _walk(following: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ring of each corner and its place in the ring, counted from the ring's first corner.

    Rings are numbered by their first corner. Places are found by pointer doubling: the steps that are left to the end
    of the ring, from corners ever further ahead.
    """
    n = len(following)
    graph = csr_array((np.ones(n, np.int8), following, np.arange(n + 1)), shape=(n, n))
    n_rings, found = connected_components(graph, directed=True, connection="weak")
    first = np.full(n_rings, n)
    first[found[::-1]] = np.arange(n)[::-1]
    number = np.empty(n_rings, np.int64)
    number[np.argsort(first)] = np.arange(n_rings)
    ring = number[found]
    left = np.ones(n, np.int64)
    left[first] = 0
    ahead = following.copy()
    ahead[first] = first
    moving = np.flatnonzero(left[ahead])
    while len(moving):
        target = ahead[moving]
        left[moving] += left[target]
        ahead[moving] = ahead[target]
        moving = moving[left[ahead[moving]] > 0]
    length = np.bincount(ring, minlength=n_rings)
    place = length[ring] - left
    place[first] = 0
    return ring, place


def _areas(corners: _Corners, ring: NDArray[np.int64], n_rings: int) -> NDArray[np.float64]:
    """Pixels within each ring, negative for holes; whole numbers, hence exact."""
    # The integral of x dy; only vertical edges count.
    dy = corners.row[corners.next] - corners.row
    return np.asarray(np.bincount(ring, corners.column * dy, minlength=n_rings), np.float64)


def rasterise_outlines(
    outlines: Outlines,
    width_px: int,
    height_px: int,
    scale_l0: tuple[float, float] = (1.0, 1.0),
    origin_px: tuple[int, int] = (0, 0),
) -> tuple[NDArray[np.int32], int]:
    """Draw objects into a label image: a pixel belongs to the object that its centre lies in (even-odd rule).

    The inverse of :func:`trace_labels`. Where objects overlap, the first has the pixel.

    Args:
        outlines: Closed rings with finite vertices, in any frame, for instance level-0 pixels.
        width_px: Width of the image.
        height_px: Height of the image.
        scale_l0: Size of a pixel in the frame of the outlines, x then y.
        origin_px: Where the image's top-left corner lies, x then y, in its own pixels.

    Returns:
        (height_px, width_px) int32, ``i + 1`` on object ``i``, 0 elsewhere; and the number of pixels that more than one
        object claims.
    """
    image = np.zeros(height_px * width_px, np.int32)
    contested = np.zeros(height_px * width_px, np.bool_)
    ring_of_object = outlines.polygon_offsets[outlines.object_offsets]
    vertex_of_object = outlines.ring_offsets[ring_of_object]
    first = 0
    while first < len(vertex_of_object) - 1:
        stop = int(np.searchsorted(vertex_of_object, vertex_of_object[first] + _RASTER_BATCH, side="right")) - 1
        stop = max(stop, first + 1)
        owner, row, left, right = _spans(
            take_outlines(outlines, np.arange(first, stop)), (width_px, height_px), scale_l0, origin_px
        )
        length = right - left
        pixel = np.arange(length.sum()) + np.repeat(row * width_px + left - (np.cumsum(length) - length), length)
        label = np.repeat((owner + (first + 1)).astype(np.int32), length)
        free = image[pixel] == 0
        # Later writes win, so the objects are written from the last to the first.
        image[pixel[free][::-1]] = label[free][::-1]
        contested[pixel[image[pixel] != label]] = True
        first = stop
    return image.reshape(height_px, width_px), int(np.count_nonzero(contested))


def _spans(
    outlines: Outlines, size_px: tuple[int, int], scale_l0: tuple[float, float], origin_px: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Object, row, first column and column behind the last of each run of pixels inside; by object and row."""
    width_px, height_px = size_px
    xy = outlines.vertices_l0.astype(np.float64) / np.asarray(scale_l0, np.float64) - np.asarray(origin_px, np.float64)
    vertex_of_object = outlines.ring_offsets[outlines.polygon_offsets[outlines.object_offsets]]
    object_of_vertex = np.repeat(np.arange(len(vertex_of_object) - 1), np.diff(vertex_of_object))
    is_last = np.zeros(len(xy), np.bool_)
    is_last[outlines.ring_offsets[1:] - 1] = True
    # A row counts where upper <= row + 0.5 < lower, so a vertex that edges share is counted once.
    y = np.clip(np.ceil(xy[:, 1] - 0.5), 0, height_px).astype(np.int64)
    edge = np.flatnonzero((y[:-1] != y[1:]) & ~is_last[:-1])
    top = np.minimum(y[edge], y[edge + 1])
    count = np.maximum(y[edge], y[edge + 1]) - top
    row = np.arange(count.sum()) + np.repeat(top - (np.cumsum(count) - count), count)
    edge = np.repeat(edge, count)
    (x_0, y_0), (x_1, y_1) = xy[edge].T, xy[edge + 1].T
    crossing = x_0 + (row + 0.5 - y_0) * (x_1 - x_0) / (y_1 - y_0)
    column = np.clip(np.ceil(crossing - 0.5), 0, width_px).astype(np.int64)
    # Rings are closed, so each row of an object is crossed an even number of times, in and out by turns.
    owner = object_of_vertex[edge]
    order = np.argsort((owner * height_px + row) * (width_px + 1) + column)
    left, right = order[0::2], order[1::2]
    return owner[left], row[left], column[left], column[right]
