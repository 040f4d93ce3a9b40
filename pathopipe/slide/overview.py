"""The whole slide at one coarse resolution, in bounded memory."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from pathopipe.errors import TileReadError
from pathopipe.geometry import Region
from pathopipe.records import Level, SlideInfo
from pathopipe.slide.base import Slide

__all__ = ["Overview", "overview_size", "read_overview", "scan_overview"]

_STRIP_BYTES = 48 * 1024 * 1024
_STRIP_ROWS = 1024
_BLOCK_PX = 1024
_UNKNOWN_BLOCK_PX = 256
_FLOAT_BYTES = 16 * 1024 * 1024
_FLOAT_ROWS = 64
_SIDE_WITHOUT_MPP_PX = 2048


class Overview(NamedTuple):
    """A coarse picture of a slide."""

    pixels: NDArray[np.uint8]
    """(height, width, 3) RGB. Covers the whole of level 0: a pixel is dims_l0 / (width, height) large."""
    bad_blocks: int
    """Blocks that can't be read; they are white in ``pixels``."""
    unreadable_share: float
    """Their share of the slide's area."""


def read_overview(slide: Slide, mpp: float) -> NDArray[np.uint8]:
    """Read the whole of level 0 at about ``mpp`` micrometres per pixel.

    A slide coarser than ``mpp`` comes at its own resolution; one without resolution with its longer side at 2048 px.
    Unreadable blocks are white; :func:`scan_overview` counts them.

    Returns:
        (height, width, 3) uint8 RGB; the pixel in row i and column j is the mean over the level-0 rectangle that
        starts at (j, i) * dims_l0 / (width, height) and is dims_l0 / (width, height) large.
    """
    return scan_overview(slide, mpp).pixels


def scan_overview(slide: Slide, mpp: float) -> Overview:
    """Read an overview as :func:`read_overview` does, and count the blocks that can't be read."""
    width, height = overview_size(slide.info, mpp)
    number = _coarsest_fine_enough(slide.info, width, height)
    level = slide.info.levels[number]
    reducer = _RowReducer(level.height_px, width, height)
    bad: list[int] = []
    for top, rows in _strips(level):
        strip = _read_strip(slide, number, top, rows, bad)
        step = max(1, min(_FLOAT_ROWS, _FLOAT_BYTES // (level.width_px * 12)))
        for first in range(0, rows, step):
            reducer.add(_narrow(strip[first : first + step], width))
    return Overview(reducer.pixels, len(bad), sum(bad) / (level.width_px * level.height_px))


def overview_size(info: SlideInfo, mpp: float) -> tuple[int, int]:
    """Width and height of the overview at about ``mpp``: at least one pixel, never more than level 0 has."""
    if info.mpp is None:
        shrink = max(1.0, max(info.dims_l0) / _SIDE_WITHOUT_MPP_PX)
        shrinks = (shrink, shrink)
    else:
        shrinks = (max(1.0, mpp / info.mpp[0]), max(1.0, mpp / info.mpp[1]))
    width, height = (max(1, round(side / shrink)) for side, shrink in zip(info.dims_l0, shrinks, strict=True))
    return width, height


class _RowReducer:
    """Averages rows that arrive from top to bottom into fewer rows, each by its exact share."""

    def __init__(self, source_rows: int, width: int, height: int) -> None:
        self.pixels = np.empty((height, width, 3), np.uint8)
        self._source_rows = source_rows
        self._taken = 0
        # A row of output may straddle what arrives at once: its part so far.
        self._carry = np.zeros((width, 3), np.float32)

    def add(self, lines: NDArray[np.float32]) -> None:
        """Take the next rows, (rows, width, 3)."""
        height = len(self.pixels)
        start, stop = self._taken, self._taken + len(lines)
        self._taken = stop
        if height == self._source_rows:
            self.pixels[start:stop] = np.rint(lines)
            return
        first, last = start * height // self._source_rows, -(-stop * height // self._source_rows)
        done = stop * height // self._source_rows - first
        # Most shares are zero, and a dense product would wait for threads that other work keeps busy.
        shares = csr_array(self._weights(start, stop, first, last))
        part = (shares @ lines.reshape(len(lines), -1)).reshape(-1, *lines.shape[1:])
        part[0] += self._carry
        self.pixels[first : first + done] = np.rint(part[:done]).clip(0, 255)
        self._carry = part[done] if done < len(part) else np.zeros_like(self._carry)

    def _weights(self, start: int, stop: int, first: int, last: int) -> NDArray[np.float32]:
        """Share of each source row in each output row, (last - first, stop - start)."""
        per_row = self._source_rows / len(self.pixels)
        edges = np.arange(first, last)[:, None] * per_row
        lines = np.arange(start, stop)[None, :]
        shared = np.minimum(edges + per_row, lines + 1) - np.maximum(edges, lines)
        weights: NDArray[np.float32] = (np.clip(shared, 0, 1) / per_row).astype(np.float32)
        return weights


def _narrow(lines: NDArray[np.uint8], width: int) -> NDArray[np.float32]:
    """Reduce each row to ``width`` by area; in float, so that nothing is rounded twice."""
    wide = lines.astype(np.float32)
    if wide.shape[1] == width:
        return wide
    return np.asarray(cv2.resize(wide, (width, len(wide)), interpolation=cv2.INTER_AREA), np.float32)


def _coarsest_fine_enough(info: SlideInfo, width: int, height: int) -> int:
    fine = [n for n, level in enumerate(info.levels) if level.width_px >= width and level.height_px >= height]
    return max(fine, key=lambda n: info.levels[n].downsample_x)


def _block_size(level: Level) -> tuple[int, int]:
    return level.block_width_px or _UNKNOWN_BLOCK_PX, level.block_height_px or _UNKNOWN_BLOCK_PX


def _strips(level: Level) -> Iterator[tuple[int, int]]:
    """Cut a level into (top row, rows) of bounded size, along its own blocks where they are not too tall."""
    rows = max(1, min(_STRIP_ROWS, _STRIP_BYTES // (level.width_px * 3)))
    block = _block_size(level)[1]
    if block <= 2 * rows:
        # Whole blocks, even if that is twice the bytes: cutting across them would decode each twice.
        rows = max(block, rows - rows % block)
    for top in range(0, level.height_px, rows):
        yield top, min(rows, level.height_px - top)


def _read_strip(slide: Slide, number: int, top: int, rows: int, bad: list[int]) -> NDArray[np.uint8]:
    """Read full rows of a level; the sizes in pixels of blocks that can't be read are added to ``bad``."""
    level = slide.info.levels[number]
    strip = np.full((rows, level.width_px, 3), 255, np.uint8)
    block_width = _block_size(level)[0]
    step = max(block_width, _BLOCK_PX - _BLOCK_PX % block_width)
    for left in range(0, level.width_px, step):
        part = strip[:, left : left + step]
        try:
            part[:] = _read_level(slide, number, left, top, part.shape[1], rows)
        except TileReadError:
            bad += _salvage(slide, number, part, left, top)
    return strip


def _salvage(slide: Slide, number: int, canvas: NDArray[np.uint8], left: int, top: int) -> list[int]:
    """Fill a canvas block by native block, so that one that fails costs no other; returns the sizes of those in px."""
    block_width, block_height = _block_size(slide.info.levels[number])
    bad = []
    for y, height in _cuts(top, top + canvas.shape[0], block_height):
        for x, width in _cuts(left, left + canvas.shape[1], block_width):
            try:
                pixels = _read_level(slide, number, x, y, width, height)
            except TileReadError:
                bad.append(width * height)
            else:
                canvas[y - top : y - top + height, x - left : x - left + width] = pixels
    return bad


def _cuts(start: int, stop: int, block: int) -> list[tuple[int, int]]:
    """Cut start to stop at multiples of ``block``, as (start, length)."""
    edges = [start, *range((start // block + 1) * block, stop, block), stop]
    return [(a, b - a) for a, b in pairwise(edges)]


def _read_level(slide: Slide, number: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
    level = slide.info.levels[number]
    return slide.read(Region(round(x * level.downsample_x), round(y * level.downsample_y), number, width, height))
