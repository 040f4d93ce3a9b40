"""A slide as a lazy Dask array, for notebooks: nothing is read until something is computed."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from numpy.typing import NDArray

from pathopipe.config import TilesConfig
from pathopipe.errors import SlideError, SlideOpenError, UsageError
from pathopipe.records import SlideInfo, TileGrid, Tissue
from pathopipe.slide.base import Slide
from pathopipe.slide.open import open_slide
from pathopipe.slide.resolution import require_mpp
from pathopipe.tiles.grid import plan_grid
from pathopipe.tiles.read import read_tile

__all__ = ["as_dask_array"]

_CHUNK_PX = 1024
_SMALLEST_CHUNK_PX = 16
# A chunk is read at once; 4096 x 4096 px of the level that is read are 50 MB.
_LONGEST_READ_PX = 4096


def as_dask_array(slide: Slide, mpp: float | None = None) -> da.Array:
    """Show a slide as an array whose pixels are read when they are computed.

    Chunks are read as tiles of their size are: from the coarsest level that is at least as fine as asked, taken as it
    is where its resolution fits within 2 %, averaged otherwise. With ``f`` the wanted over the native resolution, or
    the power of two within 2 % of it, array pixel (row y, column x) begins at level-0 pixel ``(x * f, y * f)``, to the
    nearest pixel of the level at the corners of chunks.

    A side of the array is ``floor(level-0 pixels / f)``, at least 1: what is left of the last pixel is cut off, never
    filled up with white. Chunks are squares of about 1024 px that hold whole blocks of the file, where these are known
    and fit; they are smaller where much is averaged, so that none reads more than about 4096 x 4096 px.

    Any scheduler of Dask will do. Threads share ``slide``, which must stay open until all is computed; other processes
    open the file once more for themselves.

    Args:
        slide: An open slide.
        mpp: Micrometres per array pixel; left out, the array is level 0, and no resolution need be known.

    Returns:
        (Y, X, 3) uint8 RGB. Computing it raises TileReadError where a block of the file can't be read; in another
        process SlideOpenError where there is no file to open, and SlideError where it is no longer the same.

    Raises:
        UsageError: ``mpp`` is not within 0.05 to 50.
        SlideError: The slide is coarser than asked.
        MissingResolutionError: ``mpp`` is given, but the slide's own resolution is not known.
    """
    info = slide.info
    grid = _plan(info, mpp, _CHUNK_PX)
    grid = _plan(info, mpp, _chunk_side(info, grid))
    side_px = grid.side_px
    # Thousandths of a pixel are rounding of the resolution, not a pixel that is cut off.
    width_px, height_px = (
        max(1, math.floor(length * side_px / stride + 1e-3))
        for length, stride in zip(info.dims_l0, grid.stride_l0, strict=True)
    )
    source = _Source(_File(info.path.absolute(), info.slide_id, info.mpp[0] if info.mpp else None, info.fingerprint))
    source.slide = slide
    return da.map_blocks(
        partial(_read_block, source=source, grid=grid, width_px=width_px, height_px=height_px),
        chunks=(_cut(height_px, side_px), _cut(width_px, side_px), (3,)),
        dtype=np.uint8,
        meta=np.empty((0, 0, 0), np.uint8),
        name=f"slide-{tokenize(info.fingerprint, side_px, grid.side_l0, grid.level, grid.resample)}",
    )


def _plan(info: SlideInfo, mpp: float | None, side_px: int) -> TileGrid:
    """A grid of chunks instead of tiles, without its corners."""
    if mpp is not None and not 0.05 <= mpp <= 50:
        raise UsageError(f"{info.slide_id}: mpp={mpp:g} is not within 0.05 to 50 um/px")
    mpp_l0 = (1.0, 1.0) if mpp is None else require_mpp(info)
    everywhere = Tissue(np.ones((1, 1), np.uint8), mpp_l0, (), ())
    config = TilesConfig(side_px=side_px, mpp=mpp if mpp is not None else 1.0, min_tissue=0)
    try:
        grid = plan_grid(info, mpp_l0, everywhere, config)
    except SlideError:
        raise SlideError(
            f"{info.slide_id}: scanned at {max(mpp_l0):g} um/px, coarser than mpp={mpp:g}; "
            f"ask for mpp={max(mpp_l0):g} or coarser",
            slide_id=info.slide_id,
        ) from None
    return replace(grid, xy_l0=grid.xy_l0[:0], tissue_fraction=grid.tissue_fraction[:0])


def _chunk_side(info: SlideInfo, grid: TileGrid) -> int:
    """Side of a chunk in array pixels: whole blocks of the level that is read, if that comes to a sensible size."""
    level = info.levels[grid.level]
    factors = [read / grid.side_px for read in grid.read_px]  # level pixels an array pixel, x then y
    longest = min(_CHUNK_PX, max(_SMALLEST_CHUNK_PX, int(_LONGEST_READ_PX / max(factors))))
    if level.block_width_px is None or level.block_height_px is None:
        return longest
    blocks = (level.block_width_px, level.block_height_px)
    if all(factor.is_integer() for factor in factors):
        unit: float = math.lcm(*(b // math.gcd(b, int(f)) for b, f in zip(blocks, factors, strict=True)))
    else:
        unit = max(b / f for b, f in zip(blocks, factors, strict=True))  # as near as whole pixels come
    if unit > longest:  # strips as wide as the slide, or one block that is the slide
        return longest
    return max(_SMALLEST_CHUNK_PX, round(round(longest / unit) * unit))


def _cut(length_px: int, side_px: int) -> tuple[int, ...]:
    return tuple(min(side_px, length_px - first) for first in range(0, length_px, side_px))


def _read_block(
    *, source: "_Source", grid: TileGrid, width_px: int, height_px: int, block_id: tuple[int, int, int]
) -> NDArray[np.uint8]:
    row, column, _ = block_id
    corner_l0 = [math.floor(index * stride) for index, stride in zip((column, row), grid.stride_l0, strict=True)]
    tile = read_tile(source.open(), replace(grid, xy_l0=np.array([corner_l0], np.int64)), 0)
    return tile[: height_px - row * grid.side_px, : width_px - column * grid.side_px]


@dataclass(frozen=True, slots=True)
class _File:
    """What another process needs to open the same slide."""

    path: Path
    slide_id: str
    mpp: float | None
    fingerprint: str


class _Source:
    """The open slide in its own process; in any other the file, opened at the first read."""

    def __init__(self, file: _File) -> None:
        self._file = file
        self.slide: Slide | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Source, (self._file,)

    def open(self) -> Slide:
        if self.slide is not None:
            return self.slide
        with _opening:
            return _opened(self._file)


_opening = Lock()


@lru_cache(maxsize=8)
def _opened(file: _File) -> Slide:
    if not file.path.exists():
        raise SlideOpenError(
            f"{file.slide_id}: there is no {file.path} that another process could open; "
            "a slide in memory is for one process: .compute(scheduler='threads')",
            slide_id=file.slide_id,
        )
    # Some files need a resolution to be opened at all; what is read from them does not depend on it.
    slide = open_slide(file.path, slide_id=file.slide_id, mpp=file.mpp)
    if slide.info.fingerprint != file.fingerprint:
        slide.close()
        raise SlideError(f"{file.path}: is another file than when the array was made", slide_id=file.slide_id)
    return slide
