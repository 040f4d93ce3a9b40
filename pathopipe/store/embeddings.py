"""The embeddings of a slide in its store: chunk by chunk, ``status`` first, ``values`` last."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from pathopipe.errors import StoreError
from pathopipe.files import sizes_below
from pathopipe.store.groups import Groups, Problem

__all__ = ["EmbeddingArray"]

_CHECKSUM_BYTES = 4


class EmbeddingArray:
    """The embeddings of one encoder on one grid: rows in grid order, complete chunk by chunk."""

    def __init__(self, store: Groups, group: str) -> None:
        self._group = group
        self._store = store
        self._values = self._open("values")
        self._status = self._open("status")

    def _open(self, name: str) -> Any:
        try:
            array = zarr.open_array(self._store.zarr_store, path=f"{self._group}/{name}", mode="r+", zarr_format=3)
        except FileNotFoundError:
            raise StoreError(
                f"{self._store.path.stem}: {self._group}/{name} is missing; compute it anew with --fresh embed"
            ) from None
        # Zarr keeps this setting in memory only: without it a chunk of nothing but NaN would never be there.
        return array.with_config({"write_empty_chunks": True})

    @property
    def rows(self) -> int:
        """Number of tiles."""
        return int(self._values.shape[0])

    @property
    def features(self) -> int:
        """Numbers a tile."""
        return int(self._values.shape[1])

    @property
    def dtype(self) -> str:
        """Type of the stored numbers."""
        return str(self._values.dtype)

    @property
    def chunk_rows(self) -> int:
        """Tiles a chunk; the last chunk may hold fewer."""
        return int(self._values.chunks[0])

    @property
    def n_chunks(self) -> int:
        """Number of chunks."""
        return -(-self.rows // self.chunk_rows)

    @property
    def attributes(self) -> dict[str, Any]:
        """Inputs, recipe, and after the end ``complete``, bad tiles and timings."""
        return self._store.attributes(self._group)

    def chunk_slice(self, chunk: int) -> slice:
        """The rows of one chunk."""
        return slice(chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.rows))

    def done_chunks(self) -> list[int]:
        """The chunks whose ``values`` object is there with its exact length; nothing else says so."""
        length = self.chunk_rows * self.features * self._values.dtype.itemsize + _CHECKSUM_BYTES
        sizes = sizes_below(self._store.path / self._group / "values" / "c")
        return [chunk for chunk in range(self.n_chunks) if sizes.get(f"{chunk}/0") == length]

    def bad_chunks(self) -> list[int]:
        """Done chunks that hold a row whose status is not ok, or that can't be read back."""
        return [chunk for chunk in self.done_chunks() if not self._is_good(chunk)]

    def _is_good(self, chunk: int) -> bool:
        rows = self.chunk_slice(chunk)
        try:
            np.asarray(self._values[rows])
            return bool((np.asarray(self._status[rows]) == 1).all())
        except (ValueError, OSError):
            return False

    def write_chunk(self, chunk: int, values: NDArray[Any], status: NDArray[np.uint8]) -> None:
        """Store one chunk. ``values`` goes last, for its presence means that the chunk is done.

        Args:
            chunk: Its index.
            values: (rows of the chunk, features), NaN in rows whose status is not ok.
            status: (rows of the chunk,) as in ``records``.
        """
        rows = self.chunk_slice(chunk)
        folder = self._store.path / self._group / "values" / "c"
        # A chunk that is computed again must not look done while its new status stands beside its old values.
        (folder / str(chunk) / "0").unlink(missing_ok=True)
        self._status[rows] = status
        self._values[rows] = values

    def read_values(self, rows: slice = slice(None)) -> NDArray[Any]:
        """(rows, features) float; NaN where a tile is bad or not computed."""
        return np.asarray(self._values[rows])

    def read_status(self) -> NDArray[np.uint8]:
        """(N,) status of every tile: 0 not computed, 1 ok, 2 unreadable, 3 not finite, 4 overflow."""
        return np.asarray(self._status[:])

    def finish(self, **report: Any) -> None:
        """Write ``complete`` and the report (bad tiles, seconds) into the group's attributes.

        Raises:
            StoreError: A chunk is missing.
        """
        missing = self.n_chunks - len(self.done_chunks())
        if missing:
            raise StoreError(
                f"{self._store.path.stem}: {self._group} lacks {missing} of {self.n_chunks} chunks; run again"
            )
        self._store.write_attributes(self._group, {**self.attributes, **report, "complete": True})

    def problems(self, rows_expected: int | None) -> Iterator[Problem]:
        """What is missing or contradictory; unreadable chunks are found by :meth:`SlideStore.problems`."""
        if rows_expected is not None and self.rows != rows_expected:
            yield Problem(self._group, f"has {self.rows} rows for {rows_expected} tiles")
        missing = sorted(set(range(self.n_chunks)) - set(self.done_chunks()))
        if missing:
            named = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            yield Problem(
                self._group, f"lacks {len(missing)} of {self.n_chunks} chunks ({named}); run again to compute them"
            )
            return
        if not self.attributes.get("complete"):
            yield Problem(self._group, "all chunks are there, but the stage was not closed; run again to close it")
        for chunk in range(self.n_chunks):
            with contextlib.suppress(ValueError, OSError):
                rows = self.chunk_slice(chunk)
                finite = np.isfinite(np.asarray(self._values[rows])).all(axis=1)
                ok = np.asarray(self._status[rows]) == 1
                if (finite != ok).any():
                    yield Problem(
                        self._group,
                        f"chunk {chunk}: status and values contradict each other; compute it again with --retry-bad",
                    )
