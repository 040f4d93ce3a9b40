"""Blends the maps of neighbouring windows where they overlap, exactly: the same bytes in whichever order and part."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Said", "blend_borders", "common_slices"]

_FULL = 16
"""Weight of a window along an axis where it is alone: 255 times 16 times 16 is 65,280, which 16 bits hold."""


class Said(NamedTuple):
    """What one window says, and where its core begins."""

    x_px: int
    y_px: int
    maps: NDArray[np.uint8]
    """(core + 2 overlap, core + 2 overlap, channels)"""


def common_slices(at: int, side: int, length: int) -> tuple[slice, slice]:
    """The part of ``side`` pixels that begin ``at`` which lies within ``length``: seen from there, and from itself."""
    start = max(at, 0)
    stop = max(min(at + side, length), start)
    return slice(start, stop), slice(start - at, stop - at)


def blend_borders(
    maps: NDArray[np.uint8],
    known: NDArray[np.bool_],
    said: Sequence[Said],
    *,
    core_px: int,
    overlap_px: int,
    categorical: Sequence[int] = (),
) -> None:
    """Blend maps along the borders between cores, in place; elsewhere there is but one window.

    Along each axis the weight of a window falls linearly over the overlap, in sixteenths, and those of neighbours add
    up to one. Where a neighbour is missing, the others share its weight. All sums are of whole numbers.

    Args:
        maps: (height, width, channels), filled with what each window says of its own core.
        known: (height, width) False where no window has its core; nothing is changed there.
        said: The windows that reach into ``maps``; their cores lie on one lattice.
        core_px: Side of a core, at least twice the overlap.
        overlap_px: How far maps reach beyond it, 1 or more.
        categorical: Channels that are left as they are.
    """
    if not said:
        return
    height, width = known.shape
    blended = [channel for channel in range(maps.shape[-1]) if channel not in categorical]
    ramp = _ramp(core_px, overlap_px)
    first_x, first_y = said[0].x_px % core_px - core_px, said[0].y_px % core_px - core_px
    for first, length, is_row in ((first_x, width, False), (first_y, height, True)):
        for border in range(first, length + overlap_px, core_px):
            band, _ = common_slices(border - overlap_px, 2 * overlap_px, length)
            if band.start < band.stop:
                rows, columns = (band, slice(0, width)) if is_row else (slice(0, height), band)
                means, is_said = _weighted_means(said, rows, columns, blended, ramp, overlap_px)
                is_said &= known[rows, columns]
                for channel, mean in zip(blended, means, strict=True):
                    np.copyto(maps[rows, columns, channel], mean, where=is_said)


def _weighted_means(
    said: Sequence[Said], rows: slice, columns: slice, blended: list[int], ramp: NDArray[np.uint16], overlap_px: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """(channels, height, width) what the windows say of a part, and (height, width) whether any says something."""
    height, width = rows.stop - rows.start, columns.stop - columns.start
    total = np.zeros((len(blended), height, width), np.uint16)
    weight = np.zeros((height, width), np.uint16)
    for x_px, y_px, maps in said:
        into_y, from_y = common_slices(y_px - overlap_px - rows.start, len(ramp), height)
        into_x, from_x = common_slices(x_px - overlap_px - columns.start, len(ramp), width)
        if into_y.start < into_y.stop and into_x.start < into_x.stop:
            share = np.outer(ramp[from_y], ramp[from_x])
            for at, channel in enumerate(blended):
                total[at, into_y, into_x] += maps[from_y, from_x, channel] * share
            weight[into_y, into_x] += share
    is_said = weight > 0
    if (weight == _FULL * _FULL).all():  # as nearly always; a shift is ten times as fast as a division
        return ((total + _FULL * _FULL // 2) >> 8).astype(np.uint8), is_said
    divisor = np.maximum(weight, 1)
    return ((total + divisor // 2) // divisor).astype(np.uint8), is_said


def _ramp(core_px: int, overlap_px: int) -> NDArray[np.uint16]:
    """(core + 2 overlap,) the weight of a window along an axis."""
    step = np.arange(2 * overlap_px)
    rise = ((2 * step + 1) * _FULL + 2 * overlap_px) // (4 * overlap_px)
    return np.concatenate([rise, np.full(core_px - 2 * overlap_px, _FULL), _FULL - rise]).astype(np.uint16)
