"""The arrays of any Zarr hierarchy, one folder at a time: what kind each is, and its rows block by block."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

__all__ = ["array_blocks", "describe_array"]

_ROWS = 65_536


def describe_array(path: Path) -> tuple[str, tuple[int, ...]]:
    """Type (a character of NumPy's) and shape of the array in a folder.

    Raises:
        ValueError: It can't be read.
    """
    array = _open(path)
    return str(array.dtype.kind if array.dtype != np.uint8 else "B"), tuple(array.shape)


def array_blocks(path: Path) -> Iterator[NDArray[Any]]:
    """The rows of the array in a folder, some at a time.

    Raises:
        ValueError: It can't be read.
    """
    array = _open(path)
    if not array.shape:
        yield np.asarray(array[()])
    for start in range(0, array.shape[0] if array.shape else 0, _ROWS):
        try:
            yield np.asarray(array[start : start + _ROWS])
        except Exception as error:  # damage shows in a dozen ways
            raise ValueError(f"can't be read ({type(error).__name__})") from error


def _open(path: Path) -> Any:
    try:
        return zarr.open_array(path, mode="r")
    except Exception as error:
        raise ValueError(f"can't be read ({type(error).__name__})") from error
