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
from pathopipe.slide.base import describe, empty_pixels, paste
from pathopipe.slide.planes import SCALES, Plane, decode_block, decode_shrunk

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
        self._scratch = threading.local()
        self._lock = threading.Lock()
        self._readers = 0
        self._closed = False
        self._fd = os.open(path, os.O_RDONLY)
        self._size_bytes = os.fstat(self._fd).st_size

    def read(self, region: Region, x: int, y: int) -> NDArray[np.uint8]:
        """Read a region whose corner in pixels of its level is (x, y).

        Returns:
            (height_px, width_px, 3) uint8 RGB; white outside the level and where no block was written.

        Raises:
            TileReadError: A block is damaged.
            ValueError: The reader was closed.
        """
        canvas = empty_pixels((region.height_px, region.width_px, 3))
        self.read_into(canvas, region, x, y)
        return canvas

    def can_shrink(self, number: int, x: int, y: int, factor: int) -> bool:
        """Whether block and pixel borders of a level fall together once it is shrunk; the corner is (x, y)."""
        plane = self.planes[number]
        return not any(side % factor for side in (x, y, plane.block_width_px, plane.block_height_px))

    def read_into(
        self,
        out: NDArray[np.uint8],
        region: Region,
        x: int,
        y: int,
        *,
        factor: int = 1,
        dct: bool = False,
        keep: bool = True,
    ) -> None:
        """Read a region whose corner in pixels of its level is (x, y), shrunk; see :class:`BlockSlide`.

        Raises:
            TileReadError: A block is damaged.
            ValueError: The reader was closed, or :meth:`can_shrink` denies it.
        """
        if factor != 1 and not self.can_shrink(region.level, x, y, factor):
            raise ValueError(f"{self._slide_id}: {describe(region)} can't be shrunk {factor} times block by block")
        plane = self.planes[region.level]
        under = _blocks_under(plane, region, x, y)
        written = [at for at in under if not plane.is_missing(*at)]
        is_inside = (
            x >= 0 and y >= 0 and x + region.width_px <= plane.width_px and y + region.height_px <= plane.height_px
        )
        if not is_inside or len(written) < len(under):
            out.fill(255)
        # Blocks at the edge may hold padding, which must stay off the canvas; shrunk ones are white there already.
        inside = out[: max(0, -((y - plane.height_px) // factor)), : max(0, -((x - plane.width_px) // factor))]
        width_px, height_px = plane.block_width_px // factor, plane.block_height_px // factor
        self._enter()
        try:
            for row, column in written:
                left_px, top_px = column * width_px - x // factor, row * height_px - y // factor
                is_whole = 0 <= left_px <= inside.shape[1] - width_px and 0 <= top_px <= inside.shape[0] - height_px
                is_kept = keep or not is_whole
                place = inside[top_px : top_px + height_px, left_px : left_px + width_px] if not is_kept else None
                try:
                    block = self._block(region.level, row, column, factor, dct, place)
                except Exception as error:  # every codec has exceptions of its own
                    raise TileReadError(
                        f"{self._path.name}: {describe(region)} can't be read (block in row {row}, column {column}: "
                        f"{_first_line(error)}); the file is damaged there: copy it again from its source",
                        slide_id=self._slide_id,
                    ) from None
                if block is not place:
                    paste(inside, block, left_px, top_px)
        finally:
            self._leave()

    def close(self) -> None:
        """Close the file once the reads in flight have ended, and free the decoded blocks."""
        with self._lock:
            self._closed = True
            self._close_if_idle()
        self._cache.clear()

    def scales(self, number: int) -> tuple[int, ...]:
        """By how much the blocks of a level can be shrunk while they are decoded, tried on one of them."""
        plane = self.planes[number]
        places = (divmod(index, plane.across) for index in range(plane.across * plane.down))
        place = next((at for at in places if not plane.is_missing(*at) and not plane.is_padded(*at)), None)
        if place is None:
            return ()
        found = []
        for factor in SCALES:
            if not self.can_shrink(number, 0, 0, factor):
                break
            try:
                self._decode(number, *place, factor, dct=True)
            except Exception:  # every codec has exceptions of its own
                break
            found.append(factor)
        return tuple(found)

    def _block(
        self, number: int, row: int, column: int, factor: int, dct: bool, place: NDArray[np.uint8] | None
    ) -> NDArray[np.uint8]:
        """Decode one block to RGB, or take it from the cache.

        Args:
            number: Its level.
            row: Row of blocks.
            column: Block in that row.
            factor: By how much it is shrunk.
            dct: See :class:`BlockSlide`.
            place: Where the block is wanted; None where it is to be remembered.

        Returns:
            ``place`` itself where the block was decoded there.
        """
        if place is not None:
            return self._decode(number, row, column, factor, dct=dct, place=place)
        key = (number, row * self.planes[number].across + column, factor, dct)
        block = self._cache.get(key)
        if block is None:
            block = self._decode(number, row, column, factor, dct=dct)
            self._cache.put(key, block)
        return block

    def _decode(
        self, number: int, row: int, column: int, factor: int, *, dct: bool, place: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        plane = self.planes[number]
        stored = [self.stored(number, index) for index in plane.segments(row, column)]
        if factor != 1:
            # Fresh memory costs up to half a decode in page faults, so it is only taken for what is remembered.
            buffer = None if dct and place is None else self._buffer(plane)
            return decode_shrunk(plane, row, column, stored, factor, dct=dct, buffer=buffer, place=place)
        if place is None:
            return decode_block(plane, row, column, stored)
        if not place.flags.c_contiguous:
            return decode_block(plane, row, column, stored, self._buffer(plane))
        block = decode_block(plane, row, column, stored, place)
        return place if np.may_share_memory(block, place) else block

    def _buffer(self, plane: Plane) -> NDArray[np.uint8]:
        """Memory for one block that this thread uses again and again."""
        shape = (plane.block_height_px, plane.block_width_px, 3)
        buffer: NDArray[np.uint8] | None = getattr(self._scratch, "buffer", None)
        if buffer is None or buffer.shape != shape:
            buffer = self._scratch.buffer = empty_pixels(shape)
        return buffer

    def stored(self, number: int, index: int) -> bytes:
        """Read the bytes of one segment as they are stored; ValueError where the file ends before them."""
        plane = self.planes[number]
        count, offset = plane.counts[index], plane.offsets[index]
        # The file's own word for a length is not trusted with an allocation.
        there = max(0, min(count, self._size_bytes - offset))
        data = os.pread(self._fd, there, offset)
        if len(data) < count:
            raise ValueError(f"{len(data)} of {count} bytes are there, the file was cut short")
        return data

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
        self._blocks: OrderedDict[tuple[int, int, int, bool], NDArray[np.uint8]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int, int, bool]) -> NDArray[np.uint8] | None:
        with self._lock:
            block = self._blocks.get(key)
            if block is not None:
                self._blocks.move_to_end(key)
            return block

    def put(self, key: tuple[int, int, int, bool], block: NDArray[np.uint8]) -> None:
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
