"""The objects of a slide in its store: one set of flat arrays a layer."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from pathopipe.errors import StoreError
from pathopipe.files import move_tree, remove_tree
from pathopipe.geometry import Outlines
from pathopipe.records import ObjectClass, ObjectTable
from pathopipe.remote import RemotePath
from pathopipe.store.groups import Groups, Problem

__all__ = ["ObjectArray", "write_objects"]

_MEND = "find the layer anew with 'pathopipe segment --fresh', or import it again"
_BATCH_ROWS = 20_000
_CHUNK_ROWS = 65_536
_CHUNK_VERTICES = 524_288
_WRITERS = 4


class ObjectArray:
    """The objects of one layer, read in pieces; rows are in the order of their centroids: by y, then x."""

    COLUMNS: ClassVar = {
        "centroid_l0": "float64",
        "class_id": "uint8",
        "class_probability": "float32",
        "measurements": "float32",
        "id": "uint8",
        "parent": "int64",
        "vertices_l0": "float32",
        "ring_offsets": "int64",
        "polygon_offsets": "int64",
        "object_offsets": "int64",
    }
    """The arrays of a layer and their types."""

    def __init__(self, groups: Groups, layer: str) -> None:
        self.layer = layer
        self._group = f"objects/{layer}"
        self._slide_id = groups.path.stem
        self.attributes = groups.finished(self._group)
        """Inputs, classes, measurement names, parent layer, and what the finder left to know."""
        self._arrays = {}
        for name in self.COLUMNS:
            try:
                self._arrays[name] = zarr.open_array(
                    groups.zarr_store, path=f"{self._group}/{name}", mode="r", zarr_format=3
                )
            except FileNotFoundError:
                raise StoreError(f"{self._slide_id}: {self._group}/{name} is missing; {_MEND}") from None
            missing = self._arrays[name].nchunks - self._arrays[name].nchunks_initialized
            # Zarr would read them as zeros.
            if missing and self._arrays[name].size:
                raise StoreError(f"{self._slide_id}: {self._group}/{name} lacks {missing} chunks; {_MEND}")

    def __len__(self) -> int:
        return int(self._arrays["centroid_l0"].shape[0])

    @property
    def classes(self) -> tuple[ObjectClass, ...]:
        """Names and colours, in the order of ``class_id``."""
        return tuple(ObjectClass(each["name"], tuple(each["color"])) for each in self.attributes["classes"])

    @property
    def measurement_names(self) -> tuple[str, ...]:
        """Names with units, one a column of the measurements."""
        return tuple(self.attributes["measurement_names"])

    @property
    def parent_layer(self) -> str | None:
        """The layer whose rows ``parent`` names."""
        layer: str | None = self.attributes["parent_layer"]
        return layer

    @property
    def n_vertices(self) -> int:
        """Vertices of all outlines together."""
        return int(self._arrays["vertices_l0"].shape[0])

    def column(self, name: str, rows: slice = slice(None)) -> NDArray[Any]:
        """One of the arrays that have a row an object, or some rows of it."""
        try:
            return np.asarray(self._arrays[name][rows])
        except ValueError as error:
            raise StoreError(f"{self._slide_id}: {self._group}/{name} can't be read ({error}); {_MEND}") from None

    def outlines(self, rows: slice = slice(None)) -> Outlines:
        """Outlines of some consecutive rows, or of all."""
        here = self._consecutive(rows)
        offsets = []
        for name in ("object_offsets", "polygon_offsets", "ring_offsets"):
            offset = self.column(name, slice(here.start, here.stop + 1))
            offsets.append(offset - offset[0])
            here = slice(int(offset[0]), int(offset[-1]))
        return Outlines(self.column("vertices_l0", here), *reversed(offsets))

    def read(self, rows: slice = slice(None)) -> ObjectTable:
        """Some consecutive rows, or all."""
        here = self._consecutive(rows)
        return ObjectTable(
            classes=self.classes,
            measurement_names=self.measurement_names,
            centroid_l0=self.column("centroid_l0", here),
            class_id=self.column("class_id", here),
            class_probability=self.column("class_probability", here),
            measurements=self.column("measurements", here),
            outlines=self.outlines(here),
            id=self.column("id", here),
            parent=self.column("parent", here),
            parent_layer=self.parent_layer,
        )

    def _consecutive(self, rows: slice) -> slice:
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError("objects are read in consecutive rows")
        return slice(start, max(start, stop))

    def batches(self, rows: int = _BATCH_ROWS) -> Iterator[ObjectTable]:
        """All objects, ``rows`` at a time; nothing where there are none."""
        for start in range(0, len(self), rows):
            yield self.read(slice(start, start + rows))

    def problems(self) -> Iterator[Problem]:
        """Contradictions between the arrays; unreadable ones are found by :meth:`SlideStore.problems`."""
        n = len(self)
        for name in ("class_id", "class_probability", "measurements", "id", "parent"):
            if self._arrays[name].shape[0] != n:
                yield Problem(f"{self._group}/{name}", f"has {self._arrays[name].shape[0]} rows for {n} objects")
        inner = {"object_offsets": n}
        inner["polygon_offsets"] = int(self.column("object_offsets")[-1])
        inner["ring_offsets"] = int(self.column("polygon_offsets")[-1])
        for name, items in inner.items():
            offsets = self.column(name)
            if len(offsets) != items + 1 or offsets[0] != 0 or (np.diff(offsets) < 0).any():
                yield Problem(f"{self._group}/{name}", f"is not {items + 1} rising offsets from 0")
        if int(self.column("ring_offsets")[-1]) != self.n_vertices:
            yield Problem(f"{self._group}/vertices_l0", "does not end where ring_offsets says")


class _Column:
    """An array that grows by whole chunks; nothing is ever rewritten. It is made with its first rows."""

    def __init__(self, groups: Groups, name: str, dtype: str, row_shape: tuple[int, ...], chunk_rows: int) -> None:
        self._groups, self._name, self._dtype, self._row_shape = groups, name, dtype, row_shape
        self._chunk_rows = chunk_rows
        self._array: zarr.Array[Any] | None = None
        self._waiting: list[NDArray[Any]] = []
        self._n_waiting = 0

    def add(self, rows: NDArray[Any]) -> None:
        self._waiting.append(rows)
        self._n_waiting += len(rows)
        whole = self._n_waiting // self._chunk_rows * self._chunk_rows
        if whole:
            self._flush(whole)

    def close(self) -> None:
        if self._n_waiting or self._array is None:
            self._flush(self._n_waiting)

    def _flush(self, n_rows: int) -> None:
        if self._array is None:
            start, self._array = 0, self._created(n_rows)
        else:
            start = self._array.shape[0]
            self._array.resize((start + n_rows, *self._row_shape))
        if n_rows == 0:
            return
        rows = np.concatenate(self._waiting)
        if rows[:n_rows].size:
            self._array[start : start + n_rows] = rows[:n_rows].astype(self._dtype, copy=False)
        self._waiting = [rows[n_rows:]]
        self._n_waiting = len(rows) - n_rows

    def _created(self, n_rows: int) -> "zarr.Array[Any]":
        return zarr.create_array(
            self._groups.zarr_store,
            name=self._name,
            shape=(n_rows, *self._row_shape),
            chunks=(self._chunk_rows, *(max(1, side) for side in self._row_shape)),
            dtype=self._dtype,
            compressors=[ZstdCodec(level=3), Crc32cCodec()],
            config={"write_empty_chunks": True},
        )


def write_objects(groups: Groups, layer: str, tables: Iterable[ObjectTable], *, about: Mapping[str, Any]) -> int:
    """Store a layer, streamed; see :meth:`SlideStore.write_objects`."""
    whole = f"objects/{layer}"
    # A layer that is there stays until its successor is whole.
    replaces = groups.inputs(whole) is not None
    group = f"{whole}.new" if replaces else whole
    groups.clear(f"{whole}.new")  # what a kill left of an earlier one
    for name in ObjectArray.COLUMNS if not replaces else ():
        groups.clear(f"{group}/{name}")
    columns: dict[str, _Column] = {}
    head: ObjectTable | None = None
    ends = {"ring_offsets": 0, "polygon_offsets": 0, "object_offsets": 0}
    n_objects = 0
    for table in tables:
        if head is None:
            head = table
            widths = {"centroid_l0": 2, "measurements": len(table.measurement_names), "id": 16, "vertices_l0": 2}
            for name, dtype in ObjectArray.COLUMNS.items():
                row_shape = (widths[name],) if name in widths else ()
                chunk_rows = _CHUNK_VERTICES if name == "vertices_l0" else _CHUNK_ROWS
                columns[name] = _Column(groups, f"{group}/{name}", dtype, row_shape, chunk_rows)
            for name in ends:
                columns[name].add(np.zeros(1, np.int64))
        for name in ("centroid_l0", "class_id", "class_probability", "measurements", "id", "parent"):
            columns[name].add(getattr(table, name))
        columns["vertices_l0"].add(table.outlines.vertices_l0)
        for name, end in ends.items():
            offsets = getattr(table.outlines, name)
            columns[name].add(offsets[1:] + end)
            ends[name] = end + int(offsets[-1])
        n_objects += len(table)
    if head is None:
        raise ValueError(f"{layer}: write_objects needs at least one table")
    # Most of the time of a small column is waiting for the disk.
    with ThreadPoolExecutor(_WRITERS) as pool:
        for _ in pool.map(_Column.close, columns.values()):
            pass
    described = {
        "classes": [{"name": each.name, "color": list(each.color)} for each in head.classes],
        "measurement_names": list(head.measurement_names),
        "parent_layer": head.parent_layer,
        "objects": n_objects,
    }
    moves_at_once = replaces and not isinstance(groups.path, RemotePath)
    if moves_at_once:
        groups.write_attributes(group, {**about, **described})
    if replaces:
        groups.clear(whole)
        move_tree(groups.path / group, groups.path / whole)
    if not moves_at_once:
        groups.write_attributes(whole, {**about, **described})
    remove_tree(groups.path / whole / "parts")
    return n_objects
