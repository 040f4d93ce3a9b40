"""What single regions of a slide found: one file a region, whole or absent, read column by column.

A file is the length and the CRC-32 of its head (4 bytes each, little-endian), the head, and the columns' bytes one
after the other. The head is JSON: for each column its type, shape, first byte after the head and CRC-32. There are
thousands of such files, and a zip of .npy files takes four times as long to read.
"""

import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import StoreError
from pathopipe.files import durable_file, listing

__all__ = ["PartTable"]

_SUFFIX = ".part"
_LONGEST_HEAD = 1 << 20
_PREFIX = struct.Struct("<II")


class PartTable:
    """What the regions of one layer found."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def done(self) -> set[str]:
        """Names of the regions that are there."""
        return {name.removesuffix(_SUFFIX) for name in listing(self._folder)[1] if name.endswith(_SUFFIX)}

    def write(self, region: str, columns: Mapping[str, NDArray[Any]]) -> None:
        """Store the arrays of one region."""
        head: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        pieces = []
        start = 0
        for name, column in columns.items():
            data = column.tobytes()
            head[name] = (column.dtype.str, column.shape, start, zlib.crc32(data))
            pieces.append(data)
            start += len(data)
        text = json.dumps(head).encode()
        with durable_file(self._path(region)) as file:
            file.write(_PREFIX.pack(len(text), zlib.crc32(text)))
            file.write(text)
            for data in pieces:
                file.write(data)

    def read(self, region: str, names: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """The arrays of one region, or some of them; they can't be written to.

        Raises:
            StoreError: The file is damaged.
        """
        path = self._path(region)
        try:
            with path.open("rb") as file:
                length, crc = _PREFIX.unpack(file.read(_PREFIX.size))
                text = file.read(min(length, _LONGEST_HEAD))
                if zlib.crc32(text) != crc:
                    raise ValueError("its head is damaged")
                head = json.loads(text)
                found: dict[str, NDArray[Any]] = {}
                for name in names or head:
                    code, shape, start, crc = head[name]
                    dtype = np.dtype(code)
                    file.seek(_PREFIX.size + length + start)
                    data = file.read(math.prod(shape) * dtype.itemsize)
                    if zlib.crc32(data) != crc:
                        raise ValueError(f"'{name}' is damaged")
                    found[name] = np.frombuffer(data, dtype).reshape(shape)
                return found
        except (OSError, ValueError, KeyError, struct.error) as error:
            raise StoreError(
                f"{path}: can't be read ({error}); delete this file and run the same command again"
            ) from None

    def _path(self, region: str) -> Path:
        return self._folder / f"{region}{_SUFFIX}"
