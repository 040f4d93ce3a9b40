"""The slide protocol that every reader keeps, and the arithmetic they share."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pathopipe.geometry import Region
from pathopipe.records import Level, SlideInfo

__all__ = [
    "BlockSlide",
    "Slide",
    "check_region",
    "describe",
    "empty_pixels",
    "level_corner",
    "levels_from_sizes",
    "paste",
]

_VECTOR_BYTES = 32


class Slide(Protocol):
    """An open slide. Reads are safe from several threads at once; a slide does not cross process borders."""

    @property
    def info(self) -> SlideInfo:
        """What is known without reading pixels."""
        ...

    def read(self, region: Region) -> NDArray[np.uint8]:
        """Read one region as RGB, as OpenSlide's ``read_region`` shows it over white.

        The corner in level pixels is ``x_l0 / downsample_x``. Where that is not whole, OpenSlide blends neighbouring
        pixels; readers without OpenSlide take the nearest pixel.

        Returns:
            (height_px, width_px, 3) uint8; white outside the slide and where nothing was scanned.

        Raises:
            TileReadError: A block under the region can't be read. The slide stays usable for other regions.
            ValueError: The level does not exist, a size is negative, or the slide was closed.
        """
        ...

    def close(self) -> None:
        """Free file handles and caches."""
        ...


@runtime_checkable
class BlockSlide(Slide, Protocol):
    """A slide that is put together from native blocks, at once at the place and size where they are wanted."""

    def read_into(
        self, out: NDArray[np.uint8], region: Region, *, factor: int = 1, dct: bool = False, keep: bool = True
    ) -> None:
        """Read one region as :meth:`Slide.read` does, shrunk, into an array.

        Args:
            out: (height_px / factor, width_px / factor, 3); holds anything after an error.
            region: Its sides are multiples of ``factor``.
            factor: By how much it is shrunk.
            dct: Let the JPEG decoder shrink, where the level's ``scales`` has the factor and the corner is a multiple
                of it; else each pixel is the mean of those it covers.
            keep: Remember blocks that lie wholly in the region; say no where no other region will ask for them.

        Raises:
            TileReadError: A block under the region can't be read.
            ValueError: As :meth:`Slide.read`, or ``dct`` is not possible there.
        """
        ...


def levels_from_sizes(
    sizes: Sequence[tuple[int, int]], blocks: Sequence[tuple[int, int] | None] | None = None
) -> tuple[Level, ...]:
    """Describe a pyramid by its sizes (width, height), finest first.

    The downsample of a level is OpenSlide's: the mean of the ratios of widths and of heights, the same for both axes.
    """
    width_l0, height_l0 = sizes[0]
    levels = []
    for number, (width_px, height_px) in enumerate(sizes):
        downsample = (width_l0 / width_px + height_l0 / height_px) / 2 if number else 1.0
        block = blocks[number] if blocks is not None else None
        block_width_px, block_height_px = block if block is not None else (None, None)
        levels.append(Level(width_px, height_px, downsample, downsample, block_width_px, block_height_px))
    return tuple(levels)


def check_region(info: SlideInfo, region: Region) -> Level:
    """Return the level that a region asks for; ValueError where there is no such level or a size is negative."""
    if not 0 <= region.level < len(info.levels):
        raise ValueError(f"{info.slide_id}: no level {region.level}; there are {len(info.levels)}, counted from 0")
    if region.width_px < 0 or region.height_px < 0:
        raise ValueError(f"{info.slide_id}: a region can't be {region.width_px} x {region.height_px} px")
    return info.levels[region.level]


def level_corner(level: Level, region: Region) -> tuple[int, int]:
    """Corner of a region in pixels of its level (x, y), to the nearest pixel."""
    return int(np.floor(region.x_l0 / level.downsample_x + 0.5)), int(np.floor(region.y_l0 / level.downsample_y + 0.5))


def empty_pixels(
    shape: tuple[int, ...],
    allocate: Callable[[tuple[int, ...]], NDArray[np.uint8]] = lambda shape: np.empty(shape, np.uint8),
) -> NDArray[np.uint8]:
    """Make memory for decoded pixels, its first byte off every multiple of 16.

    libjpeg-turbo writes rows that begin at a multiple of its vectors' 32 bytes to memory past the cache: decoding takes
    up to 40 % longer, and the next who reads the pixels waits for them. Where rows are as long as a multiple of 16
    bytes, none begins there.

    Args:
        shape: Of the array.
        allocate: Makes the bytes it lies in.
    """
    size = math.prod(shape)
    memory = allocate((size + _VECTOR_BYTES,))
    first = (_VECTOR_BYTES // 4 - memory.ctypes.data) % _VECTOR_BYTES
    return memory[first : first + size].reshape(shape)


def paste(canvas: NDArray[np.uint8], block: NDArray[np.uint8], x_px: int, y_px: int) -> None:
    """Copy the part of a block that lies on the canvas; (x_px, y_px) is its corner there, negative where it sticks out.

    Args:
        canvas: (height, width, 3), changed in place.
        block: (height, width, 3).
        x_px: Column of the block's left edge on the canvas.
        y_px: Row of the block's top edge on the canvas.
    """
    top, left = max(y_px, 0), max(x_px, 0)
    bottom = min(y_px + block.shape[0], canvas.shape[0])
    right = min(x_px + block.shape[1], canvas.shape[1])
    if top < bottom and left < right:
        canvas[top:bottom, left:right] = block[top - y_px : bottom - y_px, left - x_px : right - x_px]


def describe(region: Region) -> str:
    """Say where a region lies, for an error message."""
    return (
        f"region at level-0 ({region.x_l0}, {region.y_l0}), {region.width_px} x {region.height_px} px "
        f"of level {region.level}"
    )
