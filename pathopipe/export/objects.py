"""Objects of a store as GeoJSON that QuPath reads: one layer a file, several where QuPath could not hold it."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray

import pathopipe
from pathopipe.errors import StoreError, UsageError
from pathopipe.files import durable_file
from pathopipe.geojson import FeatureBatch, WriteReport, feature_batches, stable_ids, write_features
from pathopipe.geometry import outlines_to_shapes, take_outlines
from pathopipe.records import ObjectTable
from pathopipe.store import ObjectArray, SlideStore, digest

__all__ = [
    "CLASS_PROBABILITY",
    "UNCLASSIFIED",
    "ExportedFile",
    "LayerExport",
    "RowReader",
    "export_layer",
    "export_layers",
    "id_texts",
    "object_type_of",
    "write_tiles",
]

CLASS_PROBABILITY: Final = "Class probability"
"""The measurement that bears an object's class probability."""

UNCLASSIFIED: Final = "Unclassified"
"""The class of objects that have none; QuPath shows them without a class."""

_BATCH_ROWS: Final = 16_384
_MAX_MEASUREMENTS: Final = 30
# QuPath needs about 14 times the uncompressed size in memory.
_MAX_POLYGONS: Final = 250_000
_MAX_BYTES: Final = 200_000_000
_GZIP_FROM_BYTES: Final = 20_000_000
_NAMED_IDS: Final = 100

_OBJECT_TYPES: Final = {
    "nuclei": "detection",
    "cells": "cell",
    "glands": "annotation",
    "lumina": "annotation",
    "tissue_types": "annotation",
}
_KNOWN_TYPES: Final = ("annotation", "detection", "cell", "tile")

Kind = Literal["polygons", "points"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedFile:
    """One file that was written."""

    path: Path
    kind: Kind
    objects: int
    dropped: int
    """Objects of whose outline nothing could be kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerExport:
    """What became of one layer of one slide."""

    slide_id: str
    layer: str
    object_type: str
    files: tuple[ExportedFile, ...]
    manifest: Path
    dropped_ids: tuple[str, ...]
    """The first hundred of the objects that were dropped."""
    left_out: tuple[str, ...]
    """Measurements beyond the thirty that QuPath bears."""
    removed: tuple[Path, ...]
    """Files of an earlier export of this layer that no longer fitted."""

    @property
    def objects(self) -> int:
        """Objects in the polygon files, or in the points files where there are no others."""
        kind = "polygons" if any(file.kind == "polygons" for file in self.files) else "points"
        return sum(file.objects for file in self.files if file.kind == kind)

    @property
    def dropped(self) -> int:
        """How many objects were dropped from the polygon files."""
        return sum(file.dropped for file in self.files if file.kind == "polygons")

    @property
    def split(self) -> bool:
        """Whether the polygons needed more than one file."""
        return sum(file.kind == "polygons" for file in self.files) > 1


def object_type_of(array: ObjectArray) -> str:
    """What the objects of a layer are in QuPath: ``detection``, ``cell``, ``annotation`` or ``tile``.

    An imported layer remembers what it was; nuclei are detections, cells cells, glands, lumina and tissue types
    annotations; any other layer holds detections, for annotations in their thousands bring QuPath to a stand.
    """
    stated = array.attributes.get("object_type")
    if stated in _KNOWN_TYPES:
        return str(stated)
    return _OBJECT_TYPES.get(array.layer, "detection")


def id_texts(ids: NDArray[np.uint8]) -> list[str]:
    """UUIDs as canonical text.

    Args:
        ids: (M, 16) bytes.
    """
    joined = np.ascontiguousarray(ids).tobytes().hex()
    return [
        f"{joined[at : at + 8]}-{joined[at + 8 : at + 12]}-{joined[at + 12 : at + 16]}"
        f"-{joined[at + 16 : at + 20]}-{joined[at + 20 : at + 32]}"
        for at in range(0, len(joined), 32)
    ]


class RowReader:
    """Rows of a layer in any order, fast where they lie near those asked for before.

    Holds three blocks of rows at most, whatever is asked for.
    """

    _BLOCKS: Final = 3

    def __init__(self, array: ObjectArray) -> None:
        self.array = array
        self._blocks: dict[int, ObjectTable] = {}

    def _block(self, number: int) -> ObjectTable:
        table = self._blocks.pop(number, None)
        if table is None:
            table = self.array.read(slice(number * _BATCH_ROWS, (number + 1) * _BATCH_ROWS))
        self._blocks[number] = table  # the latest used stands last
        if len(self._blocks) > self._BLOCKS:
            del self._blocks[next(iter(self._blocks))]
        return table

    def _visit(self, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.intp], ObjectTable, NDArray[np.int64]]]:
        """By block: the places in ``rows`` that it serves, the block, and the rows within it."""
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self.array)):
            raise StoreError(
                f"objects/{self.array.layer}: row {rows.max()} is asked for, but there are {len(self.array)}; the "
                "layer was replaced after the one that refers to it: compute or import that one again"
            )
        blocks = rows // _BATCH_ROWS
        for number in np.unique(blocks).tolist():
            places = np.flatnonzero(blocks == number)
            yield places, self._block(number), rows[places] - number * _BATCH_ROWS

    def shapes(self, rows: NDArray[np.int64]) -> NDArray[np.object_]:
        """(M,) polygons and multipolygons of some rows.

        Raises:
            StoreError: There is no such row.
        """
        shapes = np.empty(len(rows), object)
        for places, table, inside in self._visit(rows):
            shapes[places] = outlines_to_shapes(take_outlines(table.outlines, inside))
        return shapes

    def ids(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(M, 16) ids of some rows.

        Raises:
            StoreError: There is no such row.
        """
        ids = np.empty((len(rows), 16), np.uint8)
        for places, table, inside in self._visit(rows):
            ids[places] = table.id[inside]
        return ids


# ---------------------------------------------------------------------------------------------------------------------
# One layer
# ---------------------------------------------------------------------------------------------------------------------


def export_layer(
    store: SlideStore,
    layer: str,
    folder: Path,
    *,
    stem: str | None = None,
    classes: Sequence[str] = (),
    points: bool = False,
    compress: bool | None = None,
) -> LayerExport:
    """Write the objects of one layer for QuPath, with a sidecar that says where they came from.

    The frame is QuPath's: level-0 pixels from the corner of the scanned part, where the slide states one. A layer of
    more than 250,000 polygons or about 200 MB goes into numbered files, each a horizontal band of the slide, and a
    file of points is written beside them. Memory does not grow with the number of objects, but for some 30 bytes each.

    Args:
        store: The slide.
        layer: Which objects.
        folder: Where the files go; made where it is missing. Files that an earlier export of this layer left there
            and that belong to other data or another number of parts are removed.
        stem: Beginning of the names; ``<slide_id>.<layer>`` when left out, followed by the classes that are written.
        classes: Names of the classes to write; all when empty.
        points: Write the centroids as points in place of polygons.
        compress: Write ``.geojson.gz``; when left out, from 20 MB on.

    Raises:
        StoreError: The layer is not there, or it refers to rows of another layer that are not.
        UsageError: The layer has no class of such a name.
        GeoJSONError: A name or colour in the layer can't be written for QuPath.
        StoreWriteError: The disk is full, or the folder can't be written.
    """
    array = store.objects(layer)
    job = _Job(store, array, _chosen_classes(array, classes))
    if stem is None:
        # Some classes must not take the place of all.
        some = "." + re.sub(r"\W+", "-", " ".join(classes).lower()).strip("-") if classes else ""
        stem = f"{job.slide_id}.{layer}{some}"
    source = {"slide": job.slide["fingerprint"], "inputs": digest(array.attributes["inputs"]), "rows": len(array)}
    manifest = folder / f"{stem}.export.json"

    kinds: list[Kind] = ["points"] if points else ["polygons"]
    plans = {kinds[0]: job.plan(kinds[0])}
    if kinds == ["polygons"] and len(plans["polygons"].cuts) > 2:
        kinds.append("points")
        plans["points"] = job.plan("points")
    earlier, removed = _clear_earlier(folder, stem, manifest, kinds, source)
    files: list[ExportedFile] = []
    dropped_ids: list[str] = []
    for kind in kinds:
        plan = plans[kind]
        ending = ".geojson.gz" if (plan.n_bytes > _GZIP_FROM_BYTES if compress is None else compress) else ".geojson"
        middle = "-points" if kind == "points" else ""
        for number, (start, stop) in enumerate(pairwise(plan.cuts), 1):
            n_parts = len(plan.cuts) - 1
            part = f"-{number}of{n_parts}" if n_parts > 1 else ""
            path = folder / f"{stem}{middle}{part}{ending}"
            report = write_features(path, job.features(kind, start, stop, dropped_ids))
            files.append(ExportedFile(path=path, kind=kind, objects=report.written, dropped=report.dropped))
    about = {
        "created_by": f"pathopipe {pathopipe.__version__}",
        "slide": {key: job.slide[key] for key in ("id", "fingerprint", "dims_l0", "bounds_l0", "mpp")},
        "layer": layer,
        "object_type": job.object_type,
        "source": source,
        "frame": "level-0 pixels as QuPath shows them; add offset_l0 for those of the whole scan",
        "offset_l0": list(job.offset_l0),
        "classes": [each.name for each in array.classes if job.wants(each.name)],
        "measurements": [CLASS_PROBABILITY, *job.measured],
        "measurements_left_out": list(job.left_out),
        "dropped_ids": dropped_ids[:_NAMED_IDS],
        "files": [
            *(entry for entry in earlier if entry["kind"] not in kinds),
            *({"name": f.path.name, "kind": f.kind, "objects": f.objects, "dropped": f.dropped} for f in files),
        ],
    }
    with durable_file(manifest) as file:
        file.write((json.dumps(about, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
    return LayerExport(
        slide_id=job.slide_id,
        layer=layer,
        object_type=job.object_type,
        files=tuple(files),
        manifest=manifest,
        dropped_ids=tuple(dropped_ids[:_NAMED_IDS]),
        left_out=job.left_out,
        removed=tuple(removed),
    )


def export_layers(store: SlideStore, folder: Path, *, layers: Sequence[str] = ()) -> list[Path]:
    """Write some layers of a slide, or all, as :func:`export_layer` does; the files for QuPath, manifests left out."""
    exports = [export_layer(store, layer, folder) for layer in layers or store.layers()]
    return [file.path for export in exports for file in export.files]


def _chosen_classes(array: ObjectArray, names: Sequence[str]) -> NDArray[np.bool_] | None:
    """Whether each class is wanted; None where all are."""
    if not names:
        return None
    known = [each.name for each in array.classes]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UsageError(
                f"objects/{array.layer} has no class {name!r}; {hint}it has: {', '.join(known) or 'no classes'}"
            )
    return np.array([name in names for name in known], bool)


@dataclass(frozen=True, slots=True)
class _Plan:
    cuts: tuple[int, ...]
    """Rows at which files begin, and the number of rows at the end."""
    n_bytes: float
    """About how large all files are together, uncompressed."""


class _Job:
    """One layer on its way to files."""

    def __init__(self, store: SlideStore, array: ObjectArray, wanted: NDArray[np.bool_] | None) -> None:
        self.slide = store.slide
        self.slide_id = str(self.slide["id"])
        self.array = array
        self.wanted = wanted
        self.object_type = object_type_of(array)
        bounds = self.slide["bounds_l0"]
        self.offset_l0 = (float(bounds[0]), float(bounds[1])) if bounds is not None else (0.0, 0.0)
        self.nuclei: RowReader | None = None
        if self.object_type == "cell" and array.parent_layer is not None:
            self.nuclei = RowReader(store.objects(array.parent_layer))
        # One place is kept for the class probability.
        room = _MAX_MEASUREMENTS - 1 if self.object_type != "annotation" else len(array.measurement_names)
        self.measured = array.measurement_names[:room]
        self.left_out = array.measurement_names[room:]

    def wants(self, class_name: str) -> bool:
        names = [each.name for each in self.array.classes]
        return self.wanted is None or bool(self.wanted[names.index(class_name)])

    def plan(self, kind: Kind) -> _Plan:
        """Where to cut the rows so that each file stays within what QuPath can hold."""
        measured = 0 if kind == "points" else sum(len(name) + 15 for name in (CLASS_PROBABILITY, *self.measured))
        fixed = 190 + measured + max((len(each.name) for each in self.array.classes), default=0)
        position = 2 * (len(str(max(self.slide["dims_l0"]))) + self._fraction_bytes()) + 4
        loads = []
        n_bytes = 0.0
        for start in range(0, len(self.array), _BATCH_ROWS):
            rows = slice(start, start + _BATCH_ROWS)
            n_polygons, n_vertices = self._sizes(rows)
            if kind == "points":
                n_polygons, n_vertices = np.zeros(len(n_polygons)), np.ones(len(n_vertices))
            elif self.nuclei is not None:
                # A cell's nucleus is a polygon more; it has about as many vertices.
                doubled = self.array.column("parent", rows) >= 0
                n_polygons, n_vertices = n_polygons + doubled, n_vertices * (1 + doubled)
            text = fixed + n_vertices * position
            load = np.maximum(n_polygons / _MAX_POLYGONS, text / _MAX_BYTES)
            if self.wanted is not None:
                chosen = self.wanted[self.array.column("class_id", rows)]
                load, text = np.where(chosen, load, 0.0), text * chosen
            loads.append(load)
            n_bytes += float(text.sum())
        summed = np.cumsum(np.concatenate([np.zeros(1), *loads]))  # of the rows before each
        n_parts = max(1, int(np.ceil(round(float(summed[-1]), 6))))
        inner = np.searchsorted(summed, [summed[-1] * part / n_parts * (1 - 1e-9) for part in range(1, n_parts)])
        return _Plan((0, *inner.tolist(), len(self.array)), n_bytes)

    def _sizes(self, rows: slice) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Polygons and vertices of some objects."""
        ends = self.array.column("object_offsets", slice(rows.start, rows.stop + 1))
        rings = self.array.column("polygon_offsets", slice(int(ends[0]), int(ends[-1]) + 1))[ends - ends[0]]
        vertices = self.array.column("ring_offsets", slice(int(rings[0]), int(rings[-1]) + 1))[rings - rings[0]]
        return np.diff(ends).astype(np.float64), np.diff(vertices).astype(np.float64)

    def _fraction_bytes(self) -> int:
        """How long the fractions of coordinates are, going by the first objects."""
        some = self.array.read(slice(0, 1000)).outlines.vertices_l0
        return 0 if (some == np.rint(some)).all() else 3

    def _chosen(self, table: ObjectTable) -> NDArray[np.bool_] | None:
        return None if self.wanted is None else self.wanted[table.class_id]

    def features(self, kind: Kind, start: int, stop: int, dropped_ids: list[str]) -> Iterator[FeatureBatch]:
        """The features of some rows; notes the ids of polygons of which nothing is left."""
        classes = [None if each.name == UNCLASSIFIED else (each.name, each.color) for each in self.array.classes]
        for first in range(start, stop, _BATCH_ROWS):
            table = self.array.read(slice(first, min(first + _BATCH_ROWS, stop)))
            chosen = self._chosen(table)
            rows = np.arange(len(table)) if chosen is None else np.flatnonzero(chosen)
            classifications = [classes[each] for each in table.class_id[rows].tolist()]
            if kind == "points":
                yield from feature_batches(
                    shapely.points(table.centroid_l0[rows]),
                    object_type="detection",
                    # The same object in two files must not bear one id: QuPath would ask which to keep.
                    ids=id_texts(stable_ids(self.slide_id, f"{self.array.layer}-points", (first + rows).tolist())),
                    classifications=classifications,
                    offset_l0=self.offset_l0,
                )
                continue
            columns: dict[str, ArrayLike] = {CLASS_PROBABILITY: table.class_probability[rows]}
            columns |= {name: table.measurements[rows, column] for column, name in enumerate(self.measured)}
            nuclei = None
            if self.nuclei is not None:
                parent = table.parent[rows]
                nuclei = np.full(len(parent), None, object)
                nuclei[parent >= 0] = self.nuclei.shapes(parent[parent >= 0])
            outlines = table.outlines if chosen is None else take_outlines(table.outlines, rows)
            for batch in feature_batches(
                outlines_to_shapes(outlines),
                object_type=self.object_type,
                ids=id_texts(table.id[rows]),
                classifications=classifications,
                measurements=columns,
                nucleus_geometries=nuclei,
                offset_l0=self.offset_l0,
            ):
                dropped_ids += batch.dropped_ids[: _NAMED_IDS - len(dropped_ids)]
                yield batch


def _clear_earlier(
    folder: Path, stem: str, manifest: Path, kinds: Sequence[Kind], source: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Remove what an earlier export left of this layer, but for the other kind of the very same objects.

    Returns:
        The entries of the earlier sidecar that still hold, and the files that were removed.
    """
    if not folder.is_dir():
        return [], []
    entries: list[dict[str, Any]] = []
    try:
        known = json.loads(manifest.read_bytes())
        if known["source"] == source:
            entries = [entry for entry in known["files"] if entry["kind"] not in kinds]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, or not ours: then nothing vouches for the files beside it
    kept = {entry["name"] for entry in entries}
    pattern = re.compile(re.escape(stem) + r"(-points)?(-\d+of\d+)?\.geojson(\.gz)?")
    removed = [path for path in sorted(folder.iterdir()) if pattern.fullmatch(path.name) and path.name not in kept]
    # Without a sidecar, files are those of an export that did not end.
    for path in (manifest, *removed):
        path.unlink(missing_ok=True)
    return entries, removed


# ---------------------------------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------------------------------


def write_tiles(
    path: Path,
    slide_id: str,
    layer: str,
    xy_l0: NDArray[np.integer],
    side_l0: tuple[float, float],
    values: Mapping[str, ArrayLike],
    *,
    offset_l0: tuple[float, float] = (0, 0),
) -> WriteReport:
    """Write tiles of a grid as QuPath tile objects that bear measurements, such as attention.

    Args:
        path: A ``.geojson`` or ``.geojson.gz`` file.
        slide_id: Goes into the ids of the tiles.
        layer: Goes into the ids of the tiles too; tell one model's tiles from another's.
        xy_l0: (N, 2) top-left corners in level-0 pixels of the whole scan.
        side_l0: Width and height of a tile in level-0 pixels.
        values: By name, at most 30: (N,) numbers, NaN where a tile has none.
        offset_l0: Subtracted from every coordinate: the corner of the slide's bounds.

    Raises:
        GeoJSONError: There are too many values a tile, or a name can't be written.
        StoreWriteError: The disk is full, or the folder can't be written.
        UsageError: There are not as many values as tiles.
    """
    corner = np.asarray(xy_l0, np.float64)
    squares = shapely.box(corner[:, 0], corner[:, 1], corner[:, 0] + side_l0[0], corner[:, 1] + side_l0[1])
    return write_features(
        path,
        feature_batches(
            squares,
            object_type="tile",
            ids=id_texts(stable_ids(slide_id, layer, range(len(squares)))),
            measurements=values,
            offset_l0=offset_l0,
        ),
    )
