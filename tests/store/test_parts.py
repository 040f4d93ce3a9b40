"""What regions found comes back as it was stored, or not at all."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pathopipe.errors import StoreError
from pathopipe.store import PartTable

DTYPES = st.sampled_from([np.uint8, np.bool_, np.int32, np.int64, np.float32, np.float64]).map(np.dtype)
ARRAYS = DTYPES.flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
)
COLUMNS = st.dictionaries(st.text("abc_", min_size=1, max_size=5), ARRAYS, min_size=1, max_size=5)


@given(COLUMNS)
def test_every_column_comes_back(columns: dict[str, np.ndarray]) -> None:
    with TemporaryDirectory() as folder:
        parts = PartTable(Path(folder, "parts"))
        parts.write("3-4", columns)
        assert parts.done() == {"3-4"}
        whole = parts.read("3-4")
        assert list(whole) == list(columns)
        for name, column in columns.items():
            for found in (whole[name], parts.read("3-4", [name])[name]):
                assert (found.dtype, found.shape) == (column.dtype, column.shape)
                assert found.tobytes() == column.tobytes()


@given(st.data())
def test_a_flipped_bit_or_a_missing_end_is_found(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        parts = PartTable(Path(folder))
        parts.write("0-0", {"x": np.arange(7), "y": np.ones((2, 3), np.float32)})
        (path,) = Path(folder).iterdir()
        whole = bytearray(path.read_bytes())
        if data.draw(st.booleans()):
            del whole[data.draw(st.integers(0, len(whole) - 1)) :]
        else:
            bit = data.draw(st.integers(0, 8 * len(whole) - 1))
            whole[bit // 8] ^= 1 << bit % 8
        path.write_bytes(whole)
        with pytest.raises(StoreError, match=r"0-0\.part: can't be read.*delete this file"):
            parts.read("0-0")
