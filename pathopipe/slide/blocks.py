"""Regions put together from the native blocks of a TIFF, each decoded once while it is remembered."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import TileReadError
from pathopipe.geometry import Region
from pathopipe.slide.base import describe, paste
from pathopipe.slide.planes import Plane, decode_block

__all__ = ["BlockReader"]

_CACHE_BYTES = 64 * 1024 * 1024


class BlockReader:
    """Reads regions of the planes of one file; safe from several threads, memory bounded.

    Args:
        path: The TIFF.
        planes: Its levels, finest first.
        slide_id: For error messages.
    """

    def __init__(self, path: Path, planes: Sequence[Plane], *, slide_id: str) -> None:
        self._path = path
        self._slide_id = slide_id
        self.planes = tuple(planes)
        self._cache = _BlockCache(_CACHE_BYTES)
        self._lock = threading.Lock()
        self._readers = 0
        self._closed = False
        self._fd = os.open(path, os.O_RDONLY)

    def read(self, region: Region, x: int, y: int) -> NDArray[np.uint8]:
        """Read a region whose corner in pixels of its level is (x, y).

        Returns:
            (height_px, width_px, 3) uint8 RGB; white outside the level and where no block was written.

        Raises:
            TileReadError: A block is damaged.
            ValueError: The reader was closed.
        """
        plane = self.planes[region.level]
        under = _blocks_under(plane, region, x, y)
        is_covered = (
            x >= 0
            and y >= 0
            and x + region.width_px <= plane.width_px
            and y + region.height_px <= plane.height_px
            and not any(plane.is_missing(row, column) for row, column in under)
        )
        canvas = np.empty((region.height_px, region.width_px, 3), np.uint8)
        if not is_covered:
            canvas.fill(255)
        # Blocks at the edge may hold padding, which must stay off the canvas.
        inside = canvas[: max(0, plane.height_px - y), : max(0, plane.width_px - x)]
        self._enter()
        try:
            for row, column in under:
                try:
                    block = self._block(region.level, row, column)
                except Exception as error:  # every codec has exceptions of its own
                    raise TileReadError(
                        f"{self._path.name}: {describe(region)} can't be read (block in row {row}, column {column}: "
                        f"{_first_line(error)}); the file is damaged there: copy it again from its source",
                        slide_id=self._slide_id,
                    ) from None
                if block is not None:
                    paste(inside, block, column * plane.block_width_px - x, row * plane.block_height_px - y)
        finally:
            self._leave()
        return canvas

    def close(self) -> None:
        """Close the file once the reads in flight have ended, and free the decoded blocks."""
        with self._lock:
            self._closed = True
            self._close_if_idle()
        self._cache.clear()

    def _block(self, number: int, row: int, column: int) -> NDArray[np.uint8] | None:
        """Decode one block to RGB, or take it from the cache; None where nothing was written."""
        plane = self.planes[number]
        key = (number, row * plane.across + column)
        block = self._cache.get(key)
        if block is None and not plane.is_missing(row, column):
            stored = [self.stored(number, index) for index in plane.segments(row, column)]
            block = decode_block(plane, row, column, stored)
            self._cache.put(key, block)
        return block

    def stored(self, number: int, index: int) -> bytes:
        """Read the bytes of one segment as they are stored; ValueError where the file ends before them."""
        plane = self.planes[number]
        count, offset = plane.counts[index], plane.offsets[index]
        # The file's own word for a length is not trusted with an allocation.
        there = max(0, min(count, os.fstat(self._fd).st_size - offset))
        if there < count:
            raise ValueError(f"{there} of {count} bytes are there, the file was cut short")
        return os.pread(self._fd, count, offset)

    def _enter(self) -> None:
        with self._lock:
            if self._closed:
                raise ValueError(f"{self._slide_id}: the slide was closed")
            self._readers += 1

    def _leave(self) -> None:
        with self._lock:
            self._readers -= 1
            self._close_if_idle()

    def _close_if_idle(self) -> None:
        # A number closed under a reader may be given to another file, whose bytes it would then decode.
        if self._closed and self._readers == 0 and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _blocks_under(plane: Plane, region: Region, x: int, y: int) -> list[tuple[int, int]]:
    """List (row, column) of the blocks that a region with its corner at (x, y) touches."""
    left, right = max(x, 0), min(x + region.width_px, plane.width_px)
    top, bottom = max(y, 0), min(y + region.height_px, plane.height_px)
    if left >= right or top >= bottom:
        return []
    rows = range(top // plane.block_height_px, (bottom - 1) // plane.block_height_px + 1)
    columns = range(left // plane.block_width_px, (right - 1) // plane.block_width_px + 1)
    return [(row, column) for row in rows for column in columns]


class _BlockCache:
    """The blocks used last, up to a number of bytes; safe from several threads."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._held_bytes = 0
        self._blocks: OrderedDict[tuple[int, int], NDArray[np.uint8]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int]) -> NDArray[np.uint8] | None:
        with self._lock:
            block = self._blocks.get(key)
            if block is not None:
                self._blocks.move_to_end(key)
            return block

    def put(self, key: tuple[int, int], block: NDArray[np.uint8]) -> None:
        if block.nbytes > self._capacity_bytes:
            return
        with self._lock:
            if key in self._blocks:
                return
            self._blocks[key] = block
            self._held_bytes += block.nbytes
            while self._held_bytes > self._capacity_bytes:
                self._held_bytes -= self._blocks.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        with self._lock:
            self._blocks.clear()
            self._held_bytes = 0


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
