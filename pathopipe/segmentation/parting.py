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

__all__ = ["N_LEVELS", "NucleusSize", "part_landscape", "part_nuclei", "parting_reach_px"]

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
    _grow(labels, nuclear, _px(_GROW_UM, mpp))
    _peel(labels, n, signal, _px(_PEEL_UM, mpp))
    labels, n = _opened(labels)
    return _checked(labels, n, signal, mpp, size)


def part_landscape(landscape: Plane, nuclear: Plane, mpp: float, size: NucleusSize) -> NDArray[np.int32]:
    """Find the nuclei of a landscape that rises from their edges to their middles, as networks draw it.

    Args:
        landscape: (height, width) 0 to 255.
        nuclear: (height, width) 1 where there are nuclei, 0 elsewhere; small holes are filled.
        mpp: Micrometres per pixel.
        size: What counts as a nucleus.

    Returns:
        (height, width) 0 for background, nuclei 1 to n in the order of their first pixels; local as those of
        :func:`part_nuclei` are.
    """
    nuclear = _fill_holes(nuclear, _HOLE_UM2 / mpp**2)
    levels = ((landscape.astype(np.uint16) * N_LEVELS) >> 8).astype(np.uint8) + nuclear
    labels, n = _choose(np.minimum(levels, N_LEVELS) * nuclear, mpp, size)
    if n == 0:
        return np.zeros(landscape.shape, np.int32)
    _grow(labels, nuclear, _px(_GROW_UM, mpp))
    labels, n = _opened(labels)
    return _of_size(labels, n, mpp, size)


def _px(length_um: float, mpp: float) -> int:
    return max(round(length_um / mpp), 1)


def _fill_holes(mask: Plane, most_px: float) -> Plane:
    """Add the holes of at most ``most_px`` pixels to a mask of zeros and ones."""
    parts = cv2.connectedComponents(mask ^ 1, connectivity=4, ltype=cv2.CV_32S)[1].ravel()
    # Nearly all background is part 1; looking at the others alone saves most of the work.
    other = np.flatnonzero(parts > 1)
    part = parts[other]
    filled = mask.copy()
    filled.ravel()[other[(np.bincount(part) <= most_px)[part]]] = 1
    n_first = mask.size - cv2.countNonZero(mask) - len(other)
    if 0 < n_first <= most_px:
        filled.ravel()[parts == 1] = 1
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
    """The connected parts at one level: rows are parts, row 0 is none."""

    at: Ints
    """(pixels,) where, in rows of the image."""
    part: NDArray[np.int32]
    """(pixels,) which part."""
    parent: NDArray[np.int32]
    """(parts,) the part one level below that holds it."""
    area_px: Floats
    """(parts,)"""
    rating: Ints
    """(parts,) in ``_SCORE_STEPS``; ``_UNFIT`` where too large, ``_SMALL`` where too small for a nucleus."""


def _choose(levels: Plane, mpp: float, size: NucleusSize) -> tuple[Labels, int]:
    """The best-rated parts that do not overlap, as labels."""
    levels = levels.copy()
    flat = levels.ravel()
    at = np.flatnonzero(flat > 0)
    level = flat[at]
    row = at // levels.shape[1]
    x, y = (at - row * levels.shape[1]).astype(np.float64), row.astype(np.float64)
    tiers: list[_Tier] = []
    parts: NDArray[np.int32] | None = None
    for height in range(1, N_LEVELS + 1):
        if not len(at):
            break
        n, found = cv2.connectedComponents((levels >= height).view(np.uint8), connectivity=8, ltype=cv2.CV_32S)
        part = found.ravel()[at]
        any_pixel = np.zeros(n, np.int64)
        any_pixel[part] = at
        shapes = _shapes(part, n, x, y)
        rating = _rate(shapes, mpp, size)
        parent = np.zeros(n, np.int32) if parts is None else parts.ravel()[any_pixel]
        tiers.append(_Tier(at, part, parent, shapes.area_px, rating))
        parts = found
        # Nothing within a part that is too small, or round enough, is of interest.
        closed = (rating == _SMALL) | (rating >= round(_ROUND_ENOUGH * _SCORE_STEPS))
        on = ~closed[part] & (level > height)
        flat[at[~on]] = 0
        at, x, y, level = at[on], x[on], y[on], level[on]
    pixels, numbers, n_nuclei = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)], 0
    for tier, taken in zip(tiers, _best(tiers), strict=True):
        number = np.cumsum(taken, dtype=np.int32) + n_nuclei
        hit = taken[tier.part]
        pixels.append(tier.at[hit])
        numbers.append(number[tier.part[hit]])
        n_nuclei = int(number[-1])
    return _painted(levels.shape, np.concatenate(pixels), np.concatenate(numbers), n_nuclei), n_nuclei


class _Shapes(NamedTuple):
    """Of parts given by their pixels; row 0 means nothing."""

    area_px: Floats
    extent_px: Floats
    """Longer side of the upright box."""
    fit: Floats
    """Area over that of the ellipse with the same second moments: 1 for ellipses, 0.89 for two touching circles."""
    axis_ratio: Floats
    """Short over long axis of that ellipse."""


def _shapes(part: NDArray[np.int32], n: int, x: Floats, y: Floats) -> _Shapes:
    """Shapes of parts 0 to n - 1 from sums over pixels: whole numbers below 2**53, hence exact in any order."""

    def total(weights: Floats) -> Floats:
        return np.bincount(part, weights=weights, minlength=n).astype(np.float64, copy=False)

    area = np.maximum(np.bincount(part, minlength=n), 1).astype(np.float64)
    left, top = np.full(n, np.inf), np.full(n, np.inf)
    right, bottom = np.full(n, -np.inf), np.full(n, -np.inf)
    for least, most, value in ((left, right, x), (top, bottom, y)):
        np.minimum.at(least, part, value)
        np.maximum.at(most, part, value)
    left[0] = right[0] = top[0] = bottom[0] = 0
    sum_x, sum_y = total(x), total(y)
    # About each part's own corner: the same numbers wherever the part lies in the image.
    sum_xx = total(x * x) + (area * left - 2 * sum_x) * left
    sum_yy = total(y * y) + (area * top - 2 * sum_y) * top
    sum_xy = total(x * y) + area * left * top - left * sum_y - top * sum_x
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
        extent_px=np.maximum(right - left, bottom - top) + 1,
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
    rating[0] = _SMALL
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


def _painted(shape: tuple[int, int], at: Ints, label: NDArray[np.int32], n: int) -> Labels:
    """A label image, numbered anew by first pixels: of any two labels the order is then the same in every crop."""
    first = np.full(n + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, label, at)
    first[0] = -1
    number = np.empty(n + 1, np.int32)
    number[np.argsort(first, kind="stable")] = np.arange(n + 1, dtype=np.int32)
    labels: Labels = np.zeros(shape, np.uint16 if n <= 65535 else np.float32)
    labels.ravel()[at] = number[label]
    return labels


def _grow(labels: Labels, nuclear: Plane, steps: int) -> None:
    """Grow labels in place into what is nuclear; where two meet, the later one in raster order gets the pixel."""
    free = nuclear & (labels == 0).view(np.uint8)
    for step in range(steps):
        near = cv2.dilate(labels, _SQUARE if step % 2 else _CROSS)
        cv2.copyTo(near, free, labels)
        free &= (labels == 0).view(np.uint8)


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
    n, pieces = cv2.connectedComponents(inner, connectivity=4, ltype=cv2.CV_32S)
    at = np.flatnonzero(inner > 0)
    return cv2.dilate(_painted(labels.shape, at, pieces.ravel()[at], n - 1), _CROSS), n - 1


def _checked(labels: Labels, n: int, signal: Plane, mpp: float, size: NucleusSize) -> NDArray[np.int32]:
    """Keep what is of a nucleus' size, and dark enough for how well it is shaped; 1 to n again."""
    at, label, shapes = _at_and_shapes(labels, n)
    area_um2 = shapes.area_px * mpp**2
    mean = np.bincount(label, weights=signal.ravel()[at], minlength=n + 1) / shapes.area_px
    kept = (area_um2 >= size.min_um2) & (area_um2 <= size.max_um2)
    kept &= mean >= _MEAN_SIGNAL + _SHAPE_SIGNAL * (_GOOD_FIT - shapes.fit)
    return _kept_only(labels.shape, at, label, kept)


def _of_size(labels: Labels, n: int, mpp: float, size: NucleusSize) -> NDArray[np.int32]:
    """Keep what is of a nucleus' size; 1 to n again."""
    at, label, shapes = _at_and_shapes(labels, n)
    area_um2 = shapes.area_px * mpp**2
    return _kept_only(labels.shape, at, label, (area_um2 >= size.min_um2) & (area_um2 <= size.max_um2))


def _at_and_shapes(labels: Labels, n: int) -> tuple[Ints, NDArray[np.int32], _Shapes]:
    at = np.flatnonzero(labels > 0)
    label = labels.ravel()[at].astype(np.int32)
    y = at // labels.shape[1]
    return at, label, _shapes(label, n + 1, (at - y * labels.shape[1]).astype(np.float64), y.astype(np.float64))


def _kept_only(
    shape: tuple[int, ...], at: Ints, label: NDArray[np.int32], kept: NDArray[np.bool_]
) -> NDArray[np.int32]:
    kept[0] = False
    number = np.cumsum(kept, dtype=np.int32)
    number[~kept] = 0
    out = np.zeros(shape, np.int32)
    out.ravel()[at] = number[label]
    return out
