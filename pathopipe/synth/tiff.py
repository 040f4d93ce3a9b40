"""A pyramidal TIFF of JPEG tiles that takes its tiles in any order; the directories come last."""

import struct
from dataclasses import dataclass, field
from fractions import Fraction
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

__all__ = ["TILE_PX", "TiffPyramid"]

TILE_PX = 256
_HEADER_BYTES = 16  # room for the header of either kind of file; which one is known at the end
_CLASSIC_LIMIT = 2**32 - 2**20
_SHORT, _LONG, _RATIONAL, _ASCII, _LONG8 = 3, 4, 5, 2, 16
_BYTES = {_SHORT: 2, _LONG: 4, _RATIONAL: 8, _ASCII: 1, _LONG8: 8}


@dataclass(slots=True)
class _Directory:
    width_px: int
    height_px: int
    offsets: NDArray[np.uint64] = field(init=False)
    lengths: NDArray[np.uint64] = field(init=False)

    def __post_init__(self) -> None:
        n = self.columns * -(-self.height_px // TILE_PX)
        self.offsets, self.lengths = np.zeros(n, np.uint64), np.zeros(n, np.uint64)

    @property
    def columns(self) -> int:
        return -(-self.width_px // TILE_PX)


class TiffPyramid:
    """Writes tiles as they come. Memory: 16 bytes a tile."""

    def __init__(self, file: BinaryIO, dims_px: list[tuple[int, int]], mpp: float, description: str) -> None:
        self._file = file
        self._levels = [_Directory(*dims) for dims in dims_px]
        self._mpp = mpp
        self._description = description.encode("ascii", "replace") + b"\0"
        file.write(bytes(_HEADER_BYTES))
        self._end = _HEADER_BYTES

    def add_tile(self, level: int, column: int, row: int, jpeg: bytes) -> None:
        """Append one tile; a tile beyond the level's edge is passed over, for the caller's grid may be larger."""
        directory = self._levels[level]
        number = row * directory.columns + column
        if column >= directory.columns or number >= len(directory.offsets):
            return
        directory.offsets[number], directory.lengths[number] = self._end, len(jpeg)
        self._file.write(jpeg)
        self._end += len(jpeg)

    def finish(self) -> None:
        """Write the directories, then the header: classic TIFF where offsets of 32 bits will do, else BigTIFF."""
        tables = sum(32 * len(level.offsets) + 4096 for level in self._levels)
        big = self._end + tables > _CLASSIC_LIMIT
        first = previous_link = 0
        for number, level in enumerate(self._levels):
            start, link = self._write_directory(number, level, big)
            if number == 0:
                first = start
            else:
                self._patch(previous_link, start, big)
            previous_link = link
        self._file.seek(0)
        if big:
            self._file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, first))
        else:
            self._file.write(struct.pack("<2sHI", b"II", 42, first))
        self._file.seek(self._end)

    def _patch(self, place: int, value: int, big: bool) -> None:
        self._file.seek(place)
        self._file.write(struct.pack("<Q" if big else "<I", value))
        self._file.seek(self._end)

    def _write(self, data: bytes) -> int:
        """Append on an even offset, as TIFF asks; returns the offset."""
        if self._end % 2:
            self._file.write(b"\0")
            self._end += 1
        start = self._end
        self._file.write(data)
        self._end += len(data)
        return start

    def _write_directory(self, number: int, level: _Directory, big: bool) -> tuple[int, int]:
        offset_kind = _LONG8 if big else _LONG
        per_cm = Fraction(10_000 / (self._mpp * self._levels[0].width_px / level.width_px)).limit_denominator(100_000)
        resolution = struct.pack("<II", per_cm.numerator, per_cm.denominator)
        entries: list[tuple[int, int, bytes]] = [
            (254, _LONG, struct.pack("<I", int(number > 0))),  # a reduced copy
            (256, _LONG, struct.pack("<I", level.width_px)),
            (257, _LONG, struct.pack("<I", level.height_px)),
            (258, _SHORT, struct.pack("<3H", 8, 8, 8)),
            (259, _SHORT, struct.pack("<H", 7)),  # JPEG
            (262, _SHORT, struct.pack("<H", 6)),  # YCbCr
            (270, _ASCII, self._description),
            (277, _SHORT, struct.pack("<H", 3)),
            (282, _RATIONAL, resolution),
            (283, _RATIONAL, resolution),
            (284, _SHORT, struct.pack("<H", 1)),
            (296, _SHORT, struct.pack("<H", 3)),  # per centimetre
            (305, _ASCII, b"pathopipe synth\0"),
            (322, _LONG, struct.pack("<I", TILE_PX)),
            (323, _LONG, struct.pack("<I", TILE_PX)),
            (324, offset_kind, level.offsets.astype("<u8" if big else "<u4").tobytes()),
            (325, _LONG, level.lengths.astype("<u4").tobytes()),
            (530, _SHORT, struct.pack("<2H", 2, 2)),  # chroma at half resolution
        ]
        inline = 8 if big else 4
        body = b""
        for tag, kind, data in entries:
            count = len(data) // _BYTES[kind]
            value = data.ljust(inline, b"\0") if len(data) <= inline else None
            if value is None:
                value = struct.pack("<Q" if big else "<I", self._write(data))
            body += struct.pack("<HHQ" if big else "<HHI", tag, kind, count) + value
        head = struct.pack("<Q" if big else "<H", len(entries))
        start = self._write(head + body + bytes(inline))
        return start, self._end - inline
