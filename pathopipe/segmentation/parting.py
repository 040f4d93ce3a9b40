"""Nuclei of a signal image: which connected parts at which level are one nucleus each, by rules of bounded reach.

A watershed floods clumps of any size, so what it finds depends on where the image was cut. Here a part counts only
while it is of a nucleus' size: every connected part at every level that fits is rated by its shape, and the best-rated
parts that do not overlap become nuclei (component trees: Jones 1999, Computer Vision and Image Understanding 75(3);
choice of disjoint parts by their rating: Arteta et al. 2012, MICCAI; this rating and all bounds are ours). All
decisions hang on whole numbers, or on the same sum of the same numbers, so that ties fall the same way in every crop.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from pathopipe.segmentation.trace import Runs, connect_runs, find_runs, paint_runs, sum_runs

__all__ = ["N_LEVELS", "NucleusSize", "grow_labels", "part_landscape", "part_nuclei", "parting_reach_px"]

Plane = NDArray[np.uint8]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Labels = NDArray[Any]
"""Whole numbers in a type that OpenCV dilates: uint16, or float32 where there are more than uint16 counts."""

_CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)
_SQUARE = np.ones((3, 3), np.uint8)

_LOW = 48
"""Signal from which a pixel may be nuclear; 128 is the usual nucleus around."""
_STEP = 8
N_LEVELS = 30
"""The landscape is cut at this many levels, in that of a signal image one ``_STEP`` apart; higher ground is level."""
_DEPTH_SIGNAL_PER_UM = 16
"""What a micrometre of distance from the edge counts in the landscape: it parts clumps that are evenly dark."""
_MAX_DEPTH_UM = 5.0
_HOLE_UM2 = 4.0
_SEED_UM2 = 4.0
"""Smaller parts are grain."""
_ROUND_ENOUGH = 0.95
"""Parts of this rating are not looked into."""
_LONG_BELOW, _LONG_COST = 0.35, 0.15
_LARGE_COST = 0.15
_GROW_UM = 4.0
_PEEL_UM = 2.5
_OWN_SHARE = 0.42
"""A nucleus ends where the signal falls below this share of its own: dark ones are not fattened by their blur."""
_MEAN_SIGNAL = 85
_SHAPE_SIGNAL, _GOOD_FIT = 384, 0.9
"""A well-shaped object (fit 0.95) may be paler by 19 than ``_MEAN_SIGNAL``, a ragged one (0.8) must be darker by 38."""

_SCORE_STEPS = 4096
"""Ratings are whole numbers of this many to one."""
_SMALL = -1
_UNFIT = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NucleusSize:
    """What counts as a nucleus by its size."""

    min_um2: float = 10.0
    max_um2: float = 400.0
    max_extent_um: float = 25.0
    """Longest side of the upright box around a nucleus' core; its rim may lie up to 4 um beyond."""
    usual_um2: float = 90.0
    """The larger an object is than this, the sooner it is taken for several nuclei."""


def parting_reach_px(mpp: float, size: NucleusSize) -> int:
    """How far from its centroid a pixel may lie that has a say in a nucleus; the steps are those of the code below."""
    hole_px = int(_HOLE_UM2 / mpp**2)
    # Holes, opening, distance from the edge, blur.
    landscape = (hole_px + 1) + 2 + _px(_MAX_DEPTH_UM, mpp) + 1
    extent, growth = int(size.max_extent_um / mpp), _px(_GROW_UM, mpp)
    # From the centroid to any pixel, from there to a seed, over the parts that hold this seed, and to their landscape.
    return (extent + 2 * growth) + growth + (extent + 1) + landscape


def part_nuclei(signal: Plane, mpp: float, size: NucleusSize) -> NDArray[np.int32]:
    """Find the nuclei of a signal image.

    Args:
        signal: (height, width) 0 is background, 128 the usual nucleus around.
        mpp: Micrometres per pixel.
        size: What counts as a nucleus.

    Returns:
        (height, width) 0 for background, nuclei 1 to n in the order of their first pixels, row by row. A nucleus is
        the same, pixel for pixel, in every crop that reaches :func:`parting_reach_px` beyond its centroid.
    """
    nuclear = _fill_holes((signal >= _LOW).view(np.uint8), _HOLE_UM2 / mpp**2)
    nuclear = cv2.morphologyEx(nuclear, cv2.MORPH_OPEN, _CROSS, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    labels, n = _choose(_levels(signal, nuclear, mpp), mpp, size)
    if n == 0:
        return np.zeros(signal.shape, np.int32)
    labels = grow_labels(labels, nuclear, _px(_GROW_UM, mpp))
    _peel(labels, n, signal, _px(_PEEL_UM, mpp))
    labels, n = _opened(labels)
    return _checked(labels, n, signal, mpp, size)


def part_landscape(
    landscape: Plane,
    nuclear: Plane,
    inside: Plane,
    mpp: float,
    size: NucleusSize,
    *,
    sure: float,
    wanted: tuple[slice, slice] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Find the nuclei of a landscape that rises from their edges to their middles, as networks draw it.

    Args:
        landscape: (height, width) 0 to 255.
        nuclear: (height, width) 1 where there are nuclei, 0 elsewhere; small holes are filled.
        inside: (height, width) how probable a nucleus is, 0 to 255 for 0 to 1.
        mpp: Micrometres per pixel.
        size: What counts as a nucleus.
        sure: Least mean probability of a nucleus.
        wanted: Rows and columns; nuclei that lie beyond may be left out. All that have their centroid there are found,
            and they are what they would be among all.

    Returns:
        (height, width) 0 for background, nuclei 1 to n in the order of their first pixels, local as those of
        :func:`part_nuclei` are; and (n,) their mean probabilities.
    """
    nuclear = _fill_holes(nuclear, _HOLE_UM2 / mpp**2)
    whole = np.zeros(landscape.shape, np.int32)
    box = (slice(0, landscape.shape[0]), slice(0, landscape.shape[1]))
    if wanted is not None:
        nuclear, box = _reaching(nuclear, wanted)
        if not nuclear.size:
            return whole, np.zeros(0, np.float32)
    level_of = np.minimum((np.arange(256) * N_LEVELS >> 8) + 1, N_LEVELS).astype(np.uint8)
    labels, n = _choose(cv2.LUT(landscape[box], level_of) * nuclear, mpp, size)
    if n == 0:
        return whole, np.zeros(0, np.float32)
    labels = grow_labels(labels, nuclear, _px(_GROW_UM, mpp))
    labels, n = _opened(labels)
    runs, part = _runs_and_parts(labels)
    area_px = np.bincount(part, runs.stop - runs.start, minlength=n)
    share = (np.bincount(part, sum_runs(runs, inside[box]), minlength=n) / area_px / 255).astype(np.float32)
    area_um2 = area_px * mpp**2
    kept = (area_um2 >= size.min_um2) & (area_um2 <= size.max_um2) & (share >= sure)
    whole[box] = _kept_only(runs, part, kept, labels.shape)
    return whole, share[kept]


def _px(length_um: float, mpp: float) -> int:
    return max(round(length_um / mpp), 1)


def _fill_holes(mask: Plane, most_px: float) -> Plane:
    """Add the holes of at most ``most_px`` pixels to a mask of zeros and ones."""
    framed = np.pad(mask ^ 1, 1)
    runs = find_runs(framed)
    part = connect_runs(runs, framed)
    small = (np.bincount(part, runs.stop - runs.start) <= most_px)[part]
    holes = Runs(runs.start[small], runs.stop[small], runs.label[small])
    filled: Plane = mask | paint_runs(holes, holes.label, mask.shape)
    return filled


def _levels(signal: Plane, nuclear: Plane, mpp: float) -> Plane:
    """The landscape: 0 outside, else 1 to ``N_LEVELS`` by signal and by distance from the edge."""
    depth, left = nuclear.copy(), nuclear
    deepest = _px(_MAX_DEPTH_UM, mpp)
    for step in range(deepest - 1):
        # A cross and a square in turn: nearly a circle.
        left = cv2.erode(left, _CROSS if step % 2 else _SQUARE, borderType=cv2.BORDER_CONSTANT, borderValue=1)
        depth += left
    scale = 255 // deepest
    depth = cv2.blur(depth * np.uint8(scale), (3, 3), borderType=cv2.BORDER_REPLICATE)
    smooth = cv2.blur(signal, (3, 3), borderType=cv2.BORDER_REPLICATE)
    # In 64ths of a level, so that int16 holds the sum and little is lost by rounding.
    byte = np.arange(256)
    height = cv2.LUT(smooth, np.rint((byte - _LOW) * 64 / _STEP).astype(np.int16))
    height += cv2.LUT(depth, np.rint(byte * (mpp * _DEPTH_SIGNAL_PER_UM * 64 / _STEP / scale)).astype(np.int16))
    height >>= 6
    np.clip(height, 0, N_LEVELS - 1, out=height)
    height += 1
    levels: Plane = height.astype(np.uint8) * nuclear
    return levels


class _Tier(NamedTuple):
    """The connected parts at one level, as runs of pixels in a framed image."""

    start: NDArray[np.int32]
    """(runs,)"""
    length: Ints
    """(runs,)"""
    part: NDArray[np.int32]
    """(runs,) which part, from 0."""
    parent: NDArray[np.int32]
    """(parts,) the part one level below that holds it; 0 at the lowest."""
    area_px: Floats
    """(parts,)"""
    rating: Ints
    """(parts,) in ``_SCORE_STEPS``; ``_UNFIT`` where too large, ``_SMALL`` where too small for a nucleus."""


def _choose(levels: Plane, mpp: float, size: NucleusSize) -> tuple[Labels, int]:
    """The best-rated parts that do not overlap, as labels."""
    framed = np.pad(levels, 1)
    width = framed.shape[1]
    at = np.flatnonzero(framed).astype(np.int32)  # half as many bytes to move
    level = framed.ravel()[at]
    tiers: list[_Tier] = []
    for height in range(1, N_LEVELS + 1):
        if not len(at):
            break
        first = np.flatnonzero(np.diff(at, prepend=-1) != 1)
        start, length = at[first], np.diff(first, append=len(at))
        n, part = _connect_diagonally(start, start + length.astype(np.int32), width)
        shapes = _shapes(part, n, start.astype(np.int64), length, width)
        rating = _rate(shapes, mpp, size)
        parent = np.zeros(n, np.int32)
        if tiers:
            parent[part] = tiers[-1].part[np.searchsorted(tiers[-1].start, start, side="right") - 1]
        tiers.append(_Tier(start, length, part, parent, shapes.area_px, rating))
        # Nothing within a part that is too small, or round enough, is of interest.
        closed = (rating == _SMALL) | (rating >= round(_ROUND_ENOUGH * _SCORE_STEPS))
        on = np.repeat(~closed[part], length) & (level > height)
        at, level = at[on], level[on]
    starts, lengths, numbers = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    n_nuclei = 0
    for tier, taken in zip(tiers, _best(tiers), strict=True):
        number = np.cumsum(taken, dtype=np.int32) + np.int32(n_nuclei)
        hit = taken[tier.part]
        starts.append(tier.start[hit])
        lengths.append(tier.length[hit])
        numbers.append(number[tier.part[hit]])
        n_nuclei = int(number[-1])
    order = np.argsort(np.concatenate(starts))
    chosen = np.concatenate(starts)[order].astype(np.int64)
    runs = Runs(chosen, chosen + np.concatenate(lengths)[order], np.concatenate(numbers)[order])
    return _painted(runs, n_nuclei, levels.shape), n_nuclei


def _reaching(nuclear: Plane, wanted: tuple[slice, slice]) -> tuple[Plane, tuple[slice, slice]]:
    """Those 8-connected parts of a mask whose upright box meets some rows and columns, cut out; and where it was cut.

    The box of a part holds its nuclei with their centroids, and no other part has a say in them.
    """
    runs, width = find_runs(np.pad(nuclear, 1)), nuclear.shape[1] + 2
    if not len(runs.label):
        return nuclear[:0, :0], (slice(0, 0), slice(0, 0))
    n, part = _connect_diagonally(runs.start.astype(np.int32), runs.stop.astype(np.int32), width)
    y, x = np.divmod(runs.start, width)
    meets = np.ones(n, np.bool_)
    for low, high, span in ((y, y + 1, wanted[0]), (x, x + runs.stop - runs.start, wanted[1])):
        least, most = np.full(n, nuclear.size), np.zeros(n, np.int64)
        np.minimum.at(least, part, low)
        np.maximum.at(most, part, high)
        meets &= (least - 1 < span.stop) & (most - 1 > span.start)  # the frame is one pixel wide
    kept = meets[part]
    if not kept.any():
        return nuclear[:0, :0], (slice(0, 0), slice(0, 0))
    runs = Runs(runs.start[kept], runs.stop[kept], runs.label[kept])
    rows = slice(int(y[kept][0]) - 1, int(y[kept][-1]))
    left, right = int(x[kept].min()) - 1, int((x[kept] + runs.stop - runs.start).max()) - 1
    box = (rows, slice(left, right))
    return paint_runs(runs, runs.label, (nuclear.shape[0], nuclear.shape[1]))[box], box


def _connect_diagonally(start: NDArray[np.int32], stop: NDArray[np.int32], width: int) -> tuple[int, NDArray[np.int32]]:
    """How many 8-connected parts runs of a framed image make, and the part of each; in the order of their pixels."""
    # The runs of the next row that touch a run stand in a row themselves.
    first = np.searchsorted(stop, start + np.int32(width))
    count = np.searchsorted(start, stop + np.int32(width), side="right") - first
    offsets = np.concatenate([[0], np.cumsum(count)])
    below = np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], count)
    graph = csr_array(
        (np.ones(len(below)), below.astype(np.int32), offsets.astype(np.int32)), shape=(len(start), len(start))
    )
    n, part = connected_components(graph, directed=False)
    return int(n), part


class _Shapes(NamedTuple):
    """Of parts given by their runs."""

    area_px: Floats
    extent_px: Floats
    """Longer side of the upright box."""
    fit: Floats
    """Area over that of the ellipse with the same second moments: 1 for ellipses, 0.89 for two touching circles."""
    axis_ratio: Floats
    """Short over long axis of that ellipse."""


def _shapes(part: NDArray[np.integer], n: int, start: Ints, length: Ints, width: int) -> _Shapes:
    """Shapes of parts 0 to n - 1 from sums over pixels: whole numbers below 2**53, hence exact in any order.

    Runs are in the order of their pixels in an image of ``width``, and every part has some.
    """
    y = start // width
    x = start - y * width

    def total(values: Ints) -> Floats:
        return np.bincount(part, weights=values, minlength=n).astype(np.float64, copy=False)

    left, right = np.full(n, width), np.zeros(n, np.int64)
    np.minimum.at(left, part, x)
    np.maximum.at(right, part, x + length - 1)
    top, bottom = np.empty(n, np.int64), np.empty(n, np.int64)
    top[part[::-1]], bottom[part] = y[::-1], y  # the last to be written stays
    of_x = length * (2 * x + length - 1) // 2
    area, sum_x, sum_y = total(length), total(of_x), total(length * y)
    # About each part's own corner: the same numbers wherever the part lies in the image.
    of_xx = length * x * (x + length - 1) + (length - 1) * length * (2 * length - 1) // 6
    sum_xx = total(of_xx) + (area * left - 2 * sum_x) * left
    sum_yy = total(length * y * y) + (area * top - 2 * sum_y) * top
    sum_xy = total(of_x * y) + area * left * top - left * sum_y - top * sum_x
    sum_x -= area * left
    sum_y -= area * top
    # A pixel is a square, not a point, which adds 1 / 12.
    xx = (area * sum_xx - sum_x * sum_x) / area**2 + 1 / 12
    yy = (area * sum_yy - sum_y * sum_y) / area**2 + 1 / 12
    xy = (area * sum_xy - sum_x * sum_y) / area**2
    ellipse = 4 * np.pi * np.sqrt(np.maximum(xx * yy - xy * xy, 1e-6))
    half_sum, half_difference = (xx + yy) / 2, np.sqrt(((xx - yy) / 2) ** 2 + xy * xy)
    return _Shapes(
        area_px=area,
        extent_px=np.maximum(right - left, bottom - top) + 1.0,
        fit=np.minimum(area / ellipse, 1),
        axis_ratio=np.sqrt(np.maximum(half_sum - half_difference, 0) / (half_sum + half_difference)),
    )


def _rate(shapes: _Shapes, mpp: float, size: NucleusSize) -> Ints:
    """How much each part looks like one nucleus."""
    area_um2 = shapes.area_px * mpp**2
    score = shapes.fit - _LONG_COST * np.maximum(_LONG_BELOW - shapes.axis_ratio, 0)
    score -= _LARGE_COST * np.maximum(np.log(area_um2 / size.usual_um2), 0)
    rating = np.maximum(np.rint(score * _SCORE_STEPS), _UNFIT + 1).astype(np.int64)
    rating[(shapes.extent_px > size.max_extent_um / mpp) | (area_um2 > size.max_um2)] = _UNFIT
    rating[area_um2 < _SEED_UM2] = _SMALL
    return rating


def _best(tiers: list[_Tier]) -> list[NDArray[np.bool_]]:
    """Which parts to take: a part goes before what lies within it where its rating is no worse than their mean."""
    taken: list[NDArray[np.bool_]] = []
    area_above = weighted_above = np.zeros(0)
    parent = np.zeros(0, np.int32)
    for tier in reversed(tiers):
        n = len(tier.rating)
        # Of what is best within each part: area, and area times rating.
        area = np.bincount(parent, weights=area_above, minlength=n)
        weighted = np.bincount(parent, weights=weighted_above, minlength=n)
        take = (tier.rating > _UNFIT) & (tier.rating * area >= weighted)
        small = tier.rating == _SMALL
        area_above = np.where(take, tier.area_px, np.where(small, 0, area))
        weighted_above = np.where(take, tier.area_px * tier.rating, np.where(small, 0, weighted))
        parent = tier.parent
        taken.append(take)
    taken.reverse()
    covered = np.zeros(1, np.bool_)
    for tier, take in zip(tiers, taken, strict=True):
        within = covered[tier.parent]
        take &= ~within
        covered = take | within
    return taken


def _painted(runs: Runs, n: int, shape: tuple[int, int]) -> Labels:
    """A label image, numbered anew by first pixels: of any two labels the order is then the same in every crop."""
    first = np.empty(n + 1, np.int64)
    first[runs.label[::-1]] = runs.start[::-1]  # the last to be written is the first run
    first[0] = -1
    number = np.empty(n + 1, np.uint16 if n <= 65535 else np.float32)
    number[np.argsort(first)] = np.arange(n + 1)
    return paint_runs(runs, number[runs.label], shape)


def grow_labels(labels: Labels, into: Plane, steps: int) -> Labels:
    """Labels grown into what is marked, by crosses and squares in turn; where two meet, the higher one gets the pixel.

    Args:
        labels: (height, width), 0 for background.
        into: (height, width) 1 where they may grow, 0 elsewhere.
        steps: How many pixels far.
    """
    framed = np.pad(labels, 1)
    flat, width = framed.ravel(), framed.shape[1]
    free = np.flatnonzero(np.pad(into, 1).view(np.bool_)).astype(np.int32)
    free = free[flat[free] == 0]
    sides, corners = (-1, 1, -width, width), (-width - 1, -width + 1, width - 1, width + 1)
    for step in range(steps):
        if not len(free):
            break
        near = flat[free]
        for offset in (*sides, *corners) if step % 2 else sides:
            np.maximum(near, flat[free + np.int32(offset)], out=near)
        hit = near > 0
        flat[free[hit]] = near[hit]
        free = free[~hit]
    return np.ascontiguousarray(framed[1:-1, 1:-1])


def _peel(labels: Labels, n: int, signal: Plane, steps: int) -> None:
    """Take pixels off the rim of each nucleus, in place, while they are paler than its own threshold."""
    at = np.flatnonzero(labels > 0)
    label = labels.ravel()[at].astype(np.int64)
    value = signal.ravel()[at].astype(np.float64)
    count = np.maximum(np.bincount(label, minlength=n + 1), 1)
    mean = np.bincount(label, weights=value, minlength=n + 1) / count
    # The mean of the darker part: the paler part may be what has to go.
    darker = value >= mean[label]
    total = np.bincount(label[darker], weights=value[darker], minlength=n + 1)
    own = _OWN_SHARE * total / np.maximum(np.bincount(label[darker], minlength=n + 1), 1)
    pale = np.zeros(labels.shape, np.uint8)
    pale.ravel()[at[value < own[label]]] = 1
    for _ in range(steps):
        rim = pale & ~_inner(labels)
        if not rim.any():
            break
        labels[rim > 0] = 0
        pale ^= rim


def _inner(labels: Labels) -> Plane:
    """1 where all four neighbours bear the same label as the pixel."""
    # Beyond the image there is nothing: with OpenCV's default border an object at the edge would have no rim there.
    least = cv2.erode(labels, _CROSS, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    same = (cv2.dilate(labels, _CROSS) == least) & (labels > 0)
    inner: Plane = same.view(np.uint8)
    return inner


def _opened(labels: Labels) -> tuple[Labels, int]:
    """Open each nucleus by a cross, which takes off spikes; what falls apart becomes objects of their own."""
    inner = _inner(labels)
    # Inner pixels of two labels are never neighbours, so parts can be numbered without looking at labels.
    framed = np.pad(inner, 1)
    runs = find_runs(framed)
    part = connect_runs(runs, framed)
    n = int(part.max(initial=-1)) + 1
    pieces = paint_runs(runs, (part + 1).astype(np.uint16 if n <= 65535 else np.float32), labels.shape)
    return cv2.dilate(pieces, _CROSS), n


def _checked(labels: Labels, n: int, signal: Plane, mpp: float, size: NucleusSize) -> NDArray[np.int32]:
    """Keep what is of a nucleus' size, and dark enough for how well it is shaped; 1 to n again."""
    runs, part = _runs_and_parts(labels)
    shapes = _shapes(part, n, runs.start, runs.stop - runs.start, labels.shape[1] + 2)
    area_um2 = shapes.area_px * mpp**2
    mean = np.bincount(part, weights=sum_runs(runs, signal), minlength=n) / shapes.area_px
    kept = (area_um2 >= size.min_um2) & (area_um2 <= size.max_um2)
    kept &= mean >= _MEAN_SIGNAL + _SHAPE_SIGNAL * (_GOOD_FIT - shapes.fit)
    return _kept_only(runs, part, kept, labels.shape)


def _runs_and_parts(labels: Labels) -> tuple[Runs, Ints]:
    """The runs of labels, and for each its label - 1."""
    runs = find_runs(np.pad(labels, 1))
    return runs, runs.label.astype(np.int64) - 1


def _kept_only(runs: Runs, part: Ints, kept: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.int32]:
    number = np.cumsum(kept, dtype=np.int32)
    number[~kept] = 0
    labels: NDArray[np.int32] = paint_runs(runs, number[part], (shape[0], shape[1]))
    return labels
