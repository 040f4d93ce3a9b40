"""Cells from nuclei: each nucleus grows by a bounded distance into what is nearer to it than to any other."""

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import UsageError
from pathopipe.segmentation.trace import connect_runs, find_runs, runs_at

__all__ = ["MAX_DISTANCE_PX", "expand_labels"]

MAX_DISTANCE_PX = 120
"""Farthest expansion: 30 µm at 0.25 µm/px, more than any cell needs."""

_BAND_ROWS = 64
"""Rows that are worked on at a time, so that they stay in the processor's cache."""

_FAR = 200
"""Rows that count as out of reach: more than ``MAX_DISTANCE_PX``, and a byte with one to spare."""


def expand_labels(
    labels: NDArray[np.integer],
    distance_px: float | tuple[float, float],
    *,
    limit: NDArray[np.bool_] | None = None,
) -> NDArray[np.integer]:
    """Let every background pixel within a distance of a label join the label of the nearest pixel.

    Distances are between pixel centres. Of equally near pixels the topmost counts, then the leftmost; so a pixel gets
    the same object in every image that shows its surroundings, however the objects are numbered there. The nearest
    pixel is found exactly, first within each column and then among the columns; the cost grows with the distance and
    not with the number of labels.

    Pixels that would be cut off, in the narrow end between two other cells or by ``limit``, stay background: every
    4-connected part of a cell holds pixels of its nucleus.

    Args:
        labels: (height, width) whole numbers; 0 (or less) is background.
        distance_px: How far labels grow, 0 to ``MAX_DISTANCE_PX``; along x and y where pixels are oblong, and then
            distances are measured in these units.
        limit: (height, width), true where labels may grow; labels themselves stay outside it too.

    Returns:
        (height, width) of the type of ``labels``; pixels that had a label keep it.

    Raises:
        UsageError: The distance is negative, not finite or too large.
    """
    reach_x, reach_y = distance_px if isinstance(distance_px, tuple) else (distance_px, distance_px)
    if not (0 <= reach_x <= MAX_DISTANCE_PX and 0 <= reach_y <= MAX_DISTANCE_PX):
        raise UsageError(
            f"cells can grow by 0 to {MAX_DISTANCE_PX} px, not by {reach_x:g} x {reach_y:g}; "
            "choose a shorter expansion or a coarser resolution"
        )
    most_x, most_y = int(reach_x), int(reach_y)
    dx, dy, rank = _ranked_offsets(reach_x, reach_y)
    nothing = np.uint16(len(dx))
    inside = labels > 0
    nearest_row = _nearest_row(inside, most_y)
    height, width = labels.shape
    grown = labels.copy()
    flat, flat_grown = labels.ravel(), grown.ravel()
    shift = dy * width + dx
    for top in range(0, height, _BAND_ROWS):
        rows = nearest_row[top : top + _BAND_ROWS]
        best = np.full(rows.shape, nothing, np.uint16)
        for step in range(-min(most_x, width - 1), min(most_x, width - 1) + 1):
            to, at = slice(max(-step, 0), width - max(step, 0)), slice(max(step, 0), width - max(-step, 0))
            there = cv2.LUT(np.ascontiguousarray(rows[:, at]), rank[step + most_x])
            np.minimum(best[:, to], there, out=best[:, to])
        free = (best < nothing) & ~inside[top : top + _BAND_ROWS]
        if limit is not None:
            free &= limit[top : top + _BAND_ROWS]
        pixel = np.flatnonzero(free)
        source = pixel + shift[best.ravel()[pixel]]
        flat_grown[pixel + top * width] = flat[source + top * width]
    _drop_cut_off(grown, labels)
    return grown


def _drop_cut_off(grown: NDArray[np.integer], labels: NDArray[np.integer]) -> None:
    framed = np.pad(grown, 1)
    runs = find_runs(framed)
    region = connect_runs(runs, framed)
    holds_nucleus = np.zeros(len(runs.label), np.bool_)
    # The runs of a nucleus lie within those of its cell.
    holds_nucleus[region[runs_at(runs, find_runs(np.pad(labels, 1)).start)]] = True
    framed = framed.ravel()
    for start, stop in zip(*(edge[~holds_nucleus[region]].tolist() for edge in runs[:2]), strict=True):
        framed[start:stop] = 0
    grown[:] = framed.reshape(grown.shape[0] + 2, -1)[1:-1, 1:-1]


def _ranked_offsets(reach_x: float, reach_y: float) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint16]]:
    """The offsets within reach, nearest first, then topmost, then leftmost: their dx, dy; and the rank of each.

    The ranks are (2 * most_x + 1, 256): by column, then by row as :func:`_nearest_row` writes it.
    """
    most_x, most_y = int(reach_x), int(reach_y)
    x, y = np.arange(-most_x, most_x + 1), np.arange(-most_y, most_y + 1)
    # Where the reach is the same along both, distances are whole numbers, so that equal ones are equal.
    unit_x, unit_y, farthest = (1.0, 1.0, reach_x**2) if reach_x == reach_y else (max(reach_x, 1), max(reach_y, 1), 1.0)
    squares = (x[:, None] / unit_x) ** 2 + (y[None, :] / unit_y) ** 2
    column, row = np.nonzero(squares <= farthest)
    order = np.lexsort((column, row, squares[column, row]))
    column, row = column[order], row[order]
    rank = np.full((len(x), 256), len(column), np.uint16)
    rank[column, row] = np.arange(len(column))
    return x[column], y[row], rank


def _nearest_row(inside: NDArray[np.bool_], most_y: int) -> NDArray[np.uint8]:
    """Which row ``dy + most_y`` is the nearest within the column that is inside; 255 where none is within reach."""
    outside = inside.view(np.uint8) - np.uint8(1)  # 255 outside, 0 inside
    rows_to = []
    for lines in (range(len(outside)), range(len(outside) - 1, -1, -1)):
        distance = np.empty_like(outside)
        current = np.full(outside.shape[1], _FAR, np.uint8)
        for line in lines:
            current += 1
            np.minimum(current, _FAR, out=current)
            current &= outside[line]
            distance[line] = current
        rows_to.append(distance)
    up, down = rows_to
    code = np.where(up <= down, most_y - up, most_y + down)
    code[np.minimum(up, down) > most_y] = 255
    return code
