"""Objects that were corrected elsewhere (QuPath): from GeoJSON back into the store, or into training labels."""

import csv
import difflib
import hashlib
import io
import re
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Final, Literal

import imagecodecs
import numpy as np
import shapely
import tifffile
from numpy.typing import NDArray
from shapely.geometry.base import BaseGeometry

import pathopipe
from pathopipe.errors import GeoJSONError, UsageError
from pathopipe.files import durable_file
from pathopipe.geojson import ParsedFeature, read_features, stable_id
from pathopipe.geometry import Outlines, join_outlines, outlines_from_shapes, outlines_to_shapes, take_outlines
from pathopipe.records import ObjectClass, ObjectTable
from pathopipe.segmentation.morphology import assign_parents
from pathopipe.segmentation.trace import rasterise_outlines
from pathopipe.store import SlideStore, store_path

__all__ = [
    "Corrected",
    "Frame",
    "ImportReport",
    "LabelReport",
    "check_labels",
    "import_objects",
    "open_store",
    "read_corrected",
    "write_labels",
]

Frame = Literal["qupath", "scan"]

CLASS_PROBABILITY: Final = "Class probability"
UNCLASSIFIED: Final = ObjectClass("Unclassified", (128, 128, 128))

_BLOCK: Final = 8192
_MAX_CLASSES: Final = 256
_MAX_MEASUREMENTS: Final = 1000
_LARGEST_PNG_LABEL: Final = 65_535
_NAMED: Final = 5
_RESERVED: Final = ("tissue", "tiles", "embeddings")
_FARTHEST_L0: Final = 2.0**22
_MOST_LABEL_PX: Final = 1 << 28
_LAYER: Final = re.compile(r"[a-z0-9._-]+")
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_NUMBERED: Final = re.compile(r"(.*)-(\d+)of(\d+)(\.geojson(?:\.gz)?)", re.IGNORECASE)
_NUCLEUS: Final = "Nucleus: "
# What classes look like that come without a colour, in the order in which they turn up.
_PALETTE: Final = ((200, 0, 0), (70, 90, 220), (0, 160, 80), (230, 160, 30), (150, 60, 180), (0, 170, 190))


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrected:
    """What GeoJSON files hold: objects in centroid order, in the frame of the whole scan."""

    objects: ObjectTable
    nuclei: ObjectTable | None
    """The nuclei of cells, a row each; their ``parent`` rows are set in ``objects``."""
    object_type: str
    """What most objects were: ``annotation``, ``detection``, ``cell`` or ``tile``."""
    notes: tuple[str, ...]
    """What was passed over or changed, counted."""
    sha256: str
    """Of the files' bytes, one after the other."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_corrected(
    paths: Sequence[Path],
    *,
    slide_id: str,
    layer: str,
    classes: Sequence[str] = (),
    offset_l0: tuple[float, float] = (0.0, 0.0),
    known_classes: Sequence[ObjectClass] = (),
) -> Corrected:
    """Read outlines with classes, measurements and ids.

    Objects without a class become ``Unclassified``. UUIDs stay; objects without one get an id that is the same when
    the files are read again. Points and lines are passed over and counted, but annotations that are points are an
    error: someone set them, and a layer of outlines has no place for them.

    Args:
        paths: ``.geojson`` or ``.geojson.gz``; all numbered files of a layer that was split.
        slide_id: Goes into new ids.
        layer: Goes into new ids.
        classes: The only classes that may occur, in the order that they get; any when empty.
        offset_l0: Added to every coordinate: the corner of the slide's bounds.
        known_classes: Their order is kept, and a class that comes without a colour has theirs.

    Raises:
        GeoJSONError: A file can't be read, holds no outlines, or holds points that were set by hand.
        UsageError: A class is not among ``classes``, or a numbered file is missing.
    """
    _check_numbered(paths)
    gathered = _Gathered(classes, known_classes)
    for path in paths:
        for parsed in read_features(path):
            gathered.add(parsed)
    names = ", ".join(path.name for path in paths)
    return gathered.finish(names, slide_id, layer, offset_l0, _sha256(paths))


def _check_numbered(paths: Sequence[Path]) -> None:
    given = {path.name.lower() for path in paths}
    if len(given) != len(paths):
        raise UsageError("the same file name is given twice; give every file once")
    for path in paths:
        match = _NUMBERED.fullmatch(path.name)
        if match is None:
            continue
        head, _, n_parts, ending = match.groups()
        wanted = [f"{head}-{number}of{n_parts}{ending}" for number in range(1, int(n_parts) + 1)]
        missing = [name for name in wanted if name.lower() not in given]
        if missing:
            raise UsageError(
                f"{path.name} is one of {n_parts} files of a layer; give the others too: {', '.join(missing[:_NAMED])}"
            )


def _sha256(paths: Sequence[Path]) -> str:
    hashed = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                hashed.update(block)
    return hashed.hexdigest()


class _Notes:
    """Things that were passed over or changed: how many, and the first few by name."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, what: str, which: str, n: int = 1) -> None:
        self._counts[what] = self._counts.get(what, 0) + n
        named = self._found.setdefault(what, [])
        if len(named) < _NAMED and which not in named:
            named.append(which)

    def count(self, what: str) -> int:
        return self._counts.get(what, 0)

    def text(self, what: str) -> str:
        named = self._found[what]
        more = ", ..." if self._counts[what] > len(named) == _NAMED else ""
        return f"{self._counts[what]} {what} ({', '.join(named)}{more})"

    def texts(self) -> tuple[str, ...]:
        return tuple(self.text(what) for what in self._counts)


_POINTS: Final = "annotations that are points"
_NOT_AREAS: Final = "points and lines passed over"
_DOUBLED: Final = "ids that stood there twice replaced by new ones"
_STARRED: Final = "classes whose name ends in '*' renamed"
_NAMED_OBJECTS: Final = "names of single objects left out, for the store keeps classes"
_TOO_LARGE: Final = "measurements beyond single precision left out"


class _Gathered:
    """Objects as they come from the files, packed into arrays a block at a time."""

    def __init__(self, classes: Sequence[str], known_classes: Sequence[ObjectClass]) -> None:
        self.notes = _Notes()
        self._restricted = bool(classes)
        self._known: dict[str, tuple[int, int, int]] = {}
        for each in known_classes:
            self._known.setdefault(each.name, each.color)
        # Index of each class, and its colour once one was seen.
        self._classes: dict[str, int] = {}
        self._colors: list[tuple[int, int, int] | None] = []
        for name in classes:
            self._class_index(name)
        self._columns: dict[str, int] = {}
        self._types: dict[str, int] = {}
        self._ids: list[bytes] = []
        self._seen: set[bytes] = set()
        self._number = 0
        self._waiting: list[tuple[BaseGeometry, BaseGeometry | None]] = []
        self._rows: list[dict[str, float]] = []
        self._class_ids: list[int] = []
        self._probabilities: list[float] = []
        self._outlines: list[Outlines] = []
        self._nuclei: list[Outlines] = []
        self._measured: list[NDArray[np.float32]] = []

    def add(self, parsed: ParsedFeature) -> None:
        self._number += 1
        named = parsed.id or f"object {self._number}"
        if parsed.geometry.geom_type not in ("Polygon", "MultiPolygon"):
            points = parsed.geometry.geom_type in ("Point", "MultiPoint")
            n = shapely.get_num_geometries(parsed.geometry)
            class_name = ": ".join(parsed.names)
            of_class = f" of class {class_name}" if class_name else ""
            if points and parsed.object_type == "annotation":
                self.notes.add(_POINTS, f"{named}: {n} points{of_class}")
            else:
                self.notes.add(_NOT_AREAS, named)
            return
        if parsed.name is not None:
            self.notes.add(_NAMED_OBJECTS, parsed.name)
        self._class_ids.append(self._class_of(parsed, named))
        self._types[parsed.object_type] = self._types.get(parsed.object_type, 0) + 1
        self._ids.append(self._id_of(parsed))
        measurements = dict(parsed.measurements)
        self._probabilities.append(measurements.pop(CLASS_PROBABILITY, np.nan))
        self._rows.append(measurements)
        if not (np.abs(parsed.geometry.bounds) < _FARTHEST_L0).all():
            raise GeoJSONError(
                f"{named}: reaches to {max(parsed.geometry.bounds, key=abs):g}; coordinates are pixels of the slide's "
                "full resolution, of which there are never so many: mend or delete the object"
            )
        nucleus = parsed.nucleus_geometry
        if nucleus is not None and nucleus.geom_type not in ("Polygon", "MultiPolygon"):
            self.notes.add("nuclei that are points passed over", named)
            nucleus = None
        self._waiting.append((parsed.geometry, nucleus))
        if len(self._waiting) == _BLOCK:
            self._pack()

    def _id_of(self, parsed: ParsedFeature) -> bytes:
        if parsed.id is None or _UUID.fullmatch(parsed.id) is None:
            return b""  # made at the end, when all those that stay are known
        kept = uuid.UUID(parsed.id).bytes
        if kept in self._seen:
            self.notes.add(_DOUBLED, parsed.id)
            return b""
        self._seen.add(kept)
        return kept

    def _class_index(self, name: str) -> int:
        if name not in self._classes:
            if len(self._classes) == _MAX_CLASSES:
                raise GeoJSONError(
                    f"more than {_MAX_CLASSES} classes, the last {name!r}; a layer holds no more: use fewer classes"
                )
            self._classes[name] = len(self._classes)
            self._colors.append(None)
        return self._classes[name]

    def _class_of(self, parsed: ParsedFeature, named: str) -> int:
        name = " ".join(": ".join(parsed.names).split())
        bare = name.rstrip("* ")
        if bare != name:
            # QuPath leaves such classes out of its counts, and the exporter could not write them.
            self.notes.add(_STARRED, f"{name!r} to {bare!r}")
            name = bare
        name = name or UNCLASSIFIED.name
        if self._restricted and name not in self._classes:
            near = difflib.get_close_matches(name, self._classes, n=1, cutoff=0)
            what = f"{named} is of class {name!r}" if name != UNCLASSIFIED.name else f"{named} has no class"
            raise UsageError(
                f"{what}; --classes allows {', '.join(self._classes)}: the nearest is {near[0]!r}. Mend it in QuPath, "
                f"or add {name!r} to --classes"
            )
        index = self._class_index(name)
        if self._colors[index] is None and name != UNCLASSIFIED.name:
            self._colors[index] = parsed.color
        return index

    def _pack(self) -> None:
        """Turn the objects that wait into arrays."""
        if not self._waiting:
            return
        shapes = np.empty(len(self._waiting), object)
        shapes[:] = [geometry for geometry, _ in self._waiting]
        nuclei = np.empty(len(self._waiting), object)
        nuclei[:] = [nucleus for _, nucleus in self._waiting]
        self._outlines.append(_flatten(shapes))
        self._nuclei.append(_flatten(nuclei))
        for row in self._rows:
            for name in row:
                if name and name not in self._columns:
                    self._columns[name] = len(self._columns)
        if len(self._columns) > _MAX_MEASUREMENTS:
            raise GeoJSONError(
                f"more than {_MAX_MEASUREMENTS} different measurements; a layer holds no more: remove some in QuPath"
            )
        measured = np.full((len(self._rows), len(self._columns)), np.nan)
        columns = self._columns
        for index, row in enumerate(self._rows):
            for name, value in row.items():
                if name:
                    measured[index, columns[name]] = value
        large = np.abs(measured) > np.finfo(np.float32).max
        if large.any():
            self.notes.add(_TOO_LARGE, ", ".join(list(columns)[c] for c in np.flatnonzero(large.any(axis=0))[:_NAMED]))
            measured[large] = np.nan
        self._measured.append(measured.astype(np.float32))
        self._waiting, self._rows = [], []

    def finish(self, where: str, slide_id: str, layer: str, offset_l0: tuple[float, float], sha256: str) -> Corrected:
        self._pack()
        if self.notes.count(_POINTS):
            raise GeoJSONError(
                f"{where}: {self.notes.text(_POINTS)}; a layer holds outlines: draw them, or delete these and export "
                "again"
            )
        if not self._ids:
            raise GeoJSONError(
                f"{where}: no outline among the objects: {'; '.join(self.notes.texts())}; export polygons, not points"
            )
        made = count()
        for index, known in enumerate(self._ids):
            while not known:
                # The slash keeps them apart from the ids of objects that were segmented.
                fresh = uuid.UUID(stable_id(slide_id, f"{layer}/imported", next(made))).bytes
                if fresh not in self._seen:
                    self._seen.add(fresh)
                    self._ids[index] = known = fresh
        outlines, self._outlines = join_outlines(self._outlines), []
        nuclei, self._nuclei = join_outlines(self._nuclei), []
        measured = np.full((len(self._ids), len(self._columns)), np.nan, np.float32)
        first = 0
        for block in self._measured:
            measured[first : first + len(block), : block.shape[1]] = block
            first += len(block)
        self._measured = []
        object_classes, number = self._object_classes()
        table = ObjectTable(
            classes=object_classes,
            measurement_names=tuple(self._columns),
            centroid_l0=_centroids(outlines, nuclei) + offset_l0,
            class_id=number[np.asarray(self._class_ids, np.intp)],
            class_probability=np.asarray(self._probabilities, np.float32),
            measurements=measured,
            outlines=_shift(outlines, offset_l0),
            id=np.frombuffer(b"".join(self._ids), np.uint8).reshape(-1, 16),
            parent=np.full(len(self._ids), -1),
        )
        order = np.lexsort((table.centroid_l0[:, 0], table.centroid_l0[:, 1]))
        nuclei = _shift(nuclei, offset_l0)
        # What was exported comes back in order; a copy of everything is spared then.
        if (np.diff(order) < 0).any():
            table, nuclei = _take(table, order), take_outlines(nuclei, order)
        own, parent = _split_nuclei(table, nuclei)
        if own is not None:
            table = replace(table, parent=parent)
        return Corrected(
            objects=table,
            nuclei=own,
            object_type=max(self._types, key=lambda kind: self._types[kind]),
            notes=self.notes.texts(),
            sha256=sha256,
        )

    def _object_classes(self) -> tuple[tuple[ObjectClass, ...], NDArray[np.uint8]]:
        """The classes, and for each in order of appearance its number among them.

        Known classes keep their order, and those that were asked for theirs.
        """
        known = list(self._known)
        ranks = [len(known) if self._restricted or name not in known else known.index(name) for name in self._classes]
        order = np.argsort(ranks, kind="stable")
        names = list(self._classes)
        classes = []
        for index in order.tolist():
            name = names[index]
            color = self._colors[index] or self._known.get(name) or _PALETTE[index % len(_PALETTE)]
            classes.append(UNCLASSIFIED if name == UNCLASSIFIED.name else ObjectClass(name, color))
        return tuple(classes), np.argsort(order).astype(np.uint8)


def _flatten(shapes: NDArray[np.object_]) -> Outlines:
    """Outlines of objects, none of whose polygons has a third dimension; no polygon where there is no shape."""
    return outlines_from_shapes(shapely.force_2d(shapes))


def _shift(outlines: Outlines, offset_l0: tuple[float, float]) -> Outlines:
    if not any(offset_l0):
        return outlines
    shifted = outlines.vertices_l0.copy()
    for axis, offset in enumerate(offset_l0):
        shifted[:, axis] += offset  # in single precision throughout: the sum is rounded once
    return outlines._replace(vertices_l0=shifted)


def _centroids(outlines: Outlines, nuclei: Outlines) -> NDArray[np.float64]:
    """(M, 2); a cell bears the centroid of its nucleus, as segmented cells do."""
    has_nucleus = np.diff(nuclei.object_offsets) > 0
    centroids = np.empty((len(has_nucleus), 2))
    for source, rows in ((outlines, np.flatnonzero(~has_nucleus)), (nuclei, np.flatnonzero(has_nucleus))):
        for start in range(0, len(rows), _BLOCK):
            some = rows[start : start + _BLOCK]
            shapes = outlines_to_shapes(take_outlines(source, some))
            centroids[some] = shapely.get_coordinates(shapely.centroid(shapes))
    return centroids


def _take(table: ObjectTable, rows: NDArray[np.intp]) -> ObjectTable:
    return replace(
        table,
        centroid_l0=table.centroid_l0[rows],
        class_id=table.class_id[rows],
        class_probability=table.class_probability[rows],
        measurements=table.measurements[rows],
        outlines=take_outlines(table.outlines, rows),
        id=table.id[rows],
        parent=table.parent[rows],
    )


def _split_nuclei(table: ObjectTable, nuclei: Outlines) -> tuple[ObjectTable | None, NDArray[np.int64]]:
    """The nuclei of cells as a table of their own, and for each cell the row of its nucleus there."""
    has = np.diff(nuclei.object_offsets) > 0
    rows = np.flatnonzero(has)
    parent = np.where(has, np.cumsum(has) - 1, -1)
    if not len(rows):
        return None, parent
    of_nucleus = np.array([name.startswith(_NUCLEUS) for name in table.measurement_names], bool)
    names = (name for name in table.measurement_names if name.startswith(_NUCLEUS))
    own = replace(
        _take(table, rows),
        measurement_names=tuple(name.removeprefix(_NUCLEUS) for name in names),
        measurements=table.measurements[rows][:, of_nucleus],
        outlines=take_outlines(nuclei, rows),
        # Files say nothing of nuclei's ids, so these hang on the cells'.
        id=np.stack([_nucleus_id(cell) for cell in table.id[rows]]),
        parent=np.full(len(rows), -1),
    )
    return own, parent


def _nucleus_id(cell: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.frombuffer(uuid.uuid5(uuid.UUID(bytes=cell.tobytes()), "nucleus").bytes, np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Into the store
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What became of an import."""

    objects: dict[str, int]
    """How many objects each layer that was written has."""
    replaced: dict[str, int]
    """How many objects were in those layers before; only of layers that were there."""
    classes: dict[str, int]
    """How many objects of each class there are."""
    notes: tuple[str, ...]
    """What was passed over or changed, counted."""


def open_store(out: Path, slide_id: str) -> SlideStore:
    """The store of a slide in an output folder.

    Raises:
        UsageError: The slide has none.
    """
    path = store_path(out, slide_id)
    if not path.exists():
        known = sorted(each.stem for each in path.parent.glob("*.zarr"))
        near = difflib.get_close_matches(slide_id, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? If not, make it" if near else "make it"
        raise UsageError(
            f"{path}: slide {slide_id!r} has no store; {hint} with: "
            f"pathopipe tissue SLIDE --slide-id {slide_id} --out {out}"
        )
    return SlideStore.open(path)


def import_objects(
    store: SlideStore,
    paths: Sequence[Path],
    layer: str,
    *,
    replace_layer: bool = False,
    classes: Sequence[str] = (),
    frame: Frame = "qupath",
) -> ImportReport:
    """Put corrected objects into the store of their slide, as a layer.

    Cells with nuclei make two layers: ``cells`` and ``nuclei``, or for another name ``<layer>`` and ``<layer>-nuclei``.
    Nuclei and lumina are assigned to the slide's glands again. Layers that refer to rows of a replaced one are led to
    the new rows.

    Args:
        store: The slide.
        paths: GeoJSON; all numbered files of a layer that was split.
        layer: Name of the layer; ``[a-z0-9._-]+``.
        replace_layer: Put it in the place of a layer of that name.
        classes: The only classes that may occur; any when empty.
        frame: ``qupath``: coordinates begin at the corner of the scanned part, where the slide states one; ``scan``:
            at that of the whole scan.

    Raises:
        GeoJSONError: A file can't be read, or does not fit the slide.
        UsageError: The layer is there already, its name or a class is wrong, or a numbered file is missing.
    """
    if _LAYER.fullmatch(layer) is None or not layer.strip("."):
        raise UsageError(f"--layer {layer!r}: a name has the characters a-z, 0-9, '.', '_' and '-' only, like nuclei-2")
    if layer in _RESERVED:
        raise UsageError(f"--layer {layer}: this name is taken by another stage; choose one like {layer}-regions")
    with store.writing_objects():
        return _import(store, paths, layer, replace_layer, classes, frame)


def _import(
    store: SlideStore, paths: Sequence[Path], layer: str, replace_layer: bool, classes: Sequence[str], frame: Frame
) -> ImportReport:
    _check_free(store, [layer], replace_layer)
    slide = store.slide
    bounds = slide["bounds_l0"] if frame == "qupath" else None
    offset_l0 = (float(bounds[0]), float(bounds[1])) if bounds is not None else (0.0, 0.0)
    layers = sorted(store.layers(), key=lambda name: name != layer)
    known = [each for name in layers for each in store.objects(name).classes]
    corrected = read_corrected(
        paths, slide_id=str(slide["id"]), layer=layer, classes=classes, offset_l0=offset_l0, known_classes=known
    )
    where = ", ".join(path.name for path in paths)
    notes = [*corrected.notes, *_check_frame(corrected.objects, where, slide, frame, offset_l0)]
    tables = {layer: corrected.objects}
    if corrected.nuclei is not None:
        if layer == "nuclei":
            raise UsageError(
                f"{where}: holds cells with nuclei; --layer cells makes the layers cells and nuclei of them"
            )
        below = "nuclei" if layer == "cells" else f"{layer}-nuclei"
        _check_free(store, [below], replace_layer)
        old_ids = _nucleus_ids(store, layer)
        nuclei = replace(corrected.nuclei, id=_known_ids(corrected, old_ids))
        # What others refer to is there before they are.
        tables = {below: nuclei, layer: replace(corrected.objects, parent_layer=below)}
    source = {
        "imported": corrected.sha256,
        "frame": frame,
        "slide": slide["fingerprint"],
        "version": f"pathopipe {pathopipe.__version__}",
    }
    replaced: dict[str, int] = {}
    for name, table in tables.items():
        if name in store.layers():
            replaced[name] = len(store.objects(name))
        about = {
            "inputs": {**source, "layer": name, "classes": list(classes)},
            "object_type": corrected.object_type if name == layer else "detection",
            "mpp": slide["mpp"],
        }
        notes += _write_layer(store, name, table, about, replacing=name in replaced, with_it=tables.keys())
    of_class = np.bincount(corrected.objects.class_id, minlength=len(corrected.objects.classes)).tolist()
    return ImportReport(
        objects={name: len(table) for name, table in tables.items()},
        replaced=replaced,
        classes={each.name: n for each, n in zip(corrected.objects.classes, of_class, strict=True)},
        notes=tuple(notes),
    )


def _check_free(store: SlideStore, layers: Sequence[str], replace_layer: bool) -> None:
    for layer in layers:
        if layer in store.layers() and not replace_layer:
            raise UsageError(
                f"{store.path.stem}: layer {layer} is there already, with {len(store.objects(layer))} objects; "
                "--replace puts the imported ones in their place, another --layer keeps both"
            )


def _check_frame(
    table: ObjectTable, where: str, slide: dict[str, Any], frame: Frame, offset_l0: tuple[float, float]
) -> list[str]:
    """Refuse objects of which most lie outside their slide."""
    size = np.asarray(slide["dims_l0"], np.float64)

    def count_outside(xy_l0: NDArray[np.float64]) -> int:
        return int(np.count_nonzero(((xy_l0 < 0) | (xy_l0 > size)).any(axis=1)))

    outside = count_outside(table.centroid_l0)
    if outside == 0:
        return []
    if outside <= len(table) / 2:
        return [f"{outside} objects lie outside the slide; they were kept"]
    low, high = table.outlines.vertices_l0.min(axis=0) - offset_l0, table.outlines.vertices_l0.max(axis=0) - offset_l0
    bounds = slide["bounds_l0"]
    corner = np.asarray(bounds[:2] if bounds is not None else (0, 0), np.float64)
    other, moved = ("scan", -corner) if frame == "qupath" else ("qupath", corner)
    if count_outside(table.centroid_l0 + moved) < outside:
        cause = f"they fit with --frame {other} (the scanned part begins at {corner[0]:g}, {corner[1]:g})"
    else:
        factor = max(high / size)
        cause = "they are of another slide" + (
            f", or of another resolution: they reach {factor:.3g} times as far as the slide" if factor > 1.5 else ""
        )
    raise GeoJSONError(
        f"{where}: {outside} of {len(table)} objects lie outside slide {slide['id']}: they reach from x {low[0]:g}, "
        f"y {low[1]:g} to x {high[0]:g}, y {high[1]:g}, the slide from 0, 0 to {size[0]:g}, {size[1]:g}; most likely "
        f"{cause}",
        slide_id=slide["id"],
    )


def _nucleus_ids(store: SlideStore, layer: str) -> dict[bytes, bytes]:
    """For the cells of a layer that is there, the ids of their nuclei."""
    if layer not in store.layers():
        return {}
    cells = store.objects(layer)
    if cells.parent_layer is None or cells.parent_layer not in store.layers():
        return {}
    parent, ids = cells.column("parent"), cells.column("id")
    nuclei = store.objects(cells.parent_layer).column("id")
    rows = np.flatnonzero((parent >= 0) & (parent < len(nuclei)))
    return dict(zip(_as_bytes(ids[rows]), _as_bytes(nuclei[parent[rows]]), strict=True))


def _known_ids(corrected: Corrected, of_cell: dict[bytes, bytes]) -> NDArray[np.uint8]:
    """Ids of the nuclei: those that they had, where their cell was there before."""
    assert corrected.nuclei is not None
    cells = corrected.objects.id[corrected.objects.parent >= 0]
    new = _as_bytes(corrected.nuclei.id)
    ids = [of_cell.get(cell, fallback) for cell, fallback in zip(_as_bytes(cells), new, strict=True)]
    return np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 16)


def _as_bytes(ids: NDArray[np.uint8]) -> list[bytes]:
    joined = np.ascontiguousarray(ids).tobytes()
    return [joined[at : at + 16] for at in range(0, len(joined), 16)]


def _write_layer(
    store: SlideStore,
    layer: str,
    table: ObjectTable,
    about: dict[str, Any],
    *,
    replacing: bool,
    with_it: Collection[str],
) -> list[str]:
    """Write a layer; lead those that refer to the one that it replaces to the new rows."""
    if layer in ("nuclei", "lumina") and "glands" in store.layers():
        glands = outlines_to_shapes(store.objects("glands").read().outlines)
        table = replace(table, parent=assign_parents(shapely.points(table.centroid_l0), glands), parent_layer="glands")
    followers = {
        name: store.attributes(f"objects/{name}")
        for name in store.layers()
        if name != layer and store.objects(name).parent_layer == layer
    }
    old_ids = store.objects(layer).column("id") if replacing else np.empty((0, 16), np.uint8)
    for name, attributes in followers.items():
        # Until they know the new rows they refer to none.
        store.write_attributes(f"objects/{name}", {**attributes, "parent_layer": None})
    store.write_objects(layer, _in_blocks(table), about=about)
    row_of = {id: row for row, id in enumerate(_as_bytes(table.id))} if followers else {}
    notes = []
    for name, attributes in followers.items():
        if name in with_it:
            continue  # replaced itself in a moment
        child = store.objects(name)
        if layer == "glands":
            centroids = shapely.points(child.column("centroid_l0"))
            parent = assign_parents(centroids, outlines_to_shapes(table.outlines))
        else:
            rows = np.array([row_of.get(id, -1) for id in _as_bytes(old_ids)] + [-1], np.int64)
            parent = rows[child.column("parent")]  # -1 takes the last, which is -1
        store.clear(f"objects/{name}/parent")
        store.write_table(f"objects/{name}/parent", parent.astype(np.int64))
        store.write_attributes(f"objects/{name}", attributes)
        notes.append(
            f"layer {name} refers to {layer}: {np.count_nonzero(parent >= 0)} of {len(parent)} objects still do"
        )
    return notes


def _in_blocks(table: ObjectTable) -> Iterator[ObjectTable]:
    for start in range(0, max(1, len(table)), _BLOCK):
        yield _take(table, np.arange(start, min(start + _BLOCK, len(table))))


# ---------------------------------------------------------------------------------------------------------------------
# Into training labels
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelReport:
    """What a label image holds."""

    image: Path
    table: Path
    objects: int
    """Objects with a pixel at least."""
    unseen: int
    """Objects without one: outside the image, below its resolution, or wholly behind others."""
    contested_px: int
    """Pixels that more than one object claims; the first has them."""


def check_labels(path: Path, size_px: tuple[int, int], downsample: float) -> None:
    """Refuse what :func:`write_labels` can't write, before anything is read.

    Raises:
        UsageError: The name ends in nothing that is known, or a number is not above 0.
    """
    if path.suffix.lower() not in _ENCODERS:
        raise UsageError(f"{path}: labels are written as {', '.join(_ENCODERS)}; choose one of these endings")
    if min(size_px) < 1 or not 0 < downsample < np.inf:
        raise UsageError(f"{size_px[0]}x{size_px[1]} px at downsample {downsample:g}: give numbers above 0")
    if size_px[0] * size_px[1] > _MOST_LABEL_PX:
        raise UsageError(
            f"{size_px[0]}x{size_px[1]} px: a label image has at most {_MOST_LABEL_PX / 1e6:.0f} megapixels; "
            "draw it in pieces with --origin, or coarser with --downsample"
        )


def write_labels(
    path: Path,
    corrected: Corrected,
    size_px: tuple[int, int],
    *,
    origin_l0: tuple[float, float] = (0.0, 0.0),
    downsample: float = 1.0,
    nuclei: bool = False,
) -> LabelReport:
    """Write objects as a label image, and beside it ``<stem>.classes.csv`` with label, id and class of each.

    A pixel belongs to the object that its centre lies in; where objects overlap, the first in centroid order has it.
    Labels run from 1 without gaps.

    Args:
        path: ``.png`` (16 bits), ``.tif`` (32 bits) or ``.npy`` (int32).
        corrected: The objects.
        size_px: Width and height of the image.
        origin_l0: Where the image's corner lies in the frame of the objects.
        downsample: Side of a pixel in that frame.
        nuclei: Draw the nuclei of the cells in place of the cells.

    Raises:
        UsageError: The name ends otherwise, the size is not positive, there are more objects than a PNG can number, no
            nuclei, or no object lies in the image.
        StoreWriteError: The disk is full, or the folder can't be written.
    """
    check_labels(path, size_px, downsample)
    kind = path.suffix.lower()
    table = corrected.nuclei if nuclei else corrected.objects
    if table is None:
        raise UsageError("no cell has a nucleus; leave out --nuclei to draw the objects themselves")
    corner = np.asarray(origin_l0, np.float64)
    low, high = _boxes(table.outlines)
    touching = (high > corner).all(axis=1) & (low < corner + np.asarray(size_px) * downsample).all(axis=1)
    rows = np.flatnonzero(touching)
    if kind == ".png" and len(rows) > _LARGEST_PNG_LABEL:
        raise UsageError(
            f"{path}: {len(rows)} objects, but a 16-bit PNG numbers {_LARGEST_PNG_LABEL}; write .tif or .npy"
        )
    shifted = _shift(take_outlines(table.outlines, rows), (-corner[0], -corner[1]))
    labels, contested_px = rasterise_outlines(shifted, *size_px, scale_l0=(downsample, downsample))
    seen = np.flatnonzero(np.bincount(labels.ravel(), minlength=len(rows) + 1)[1:])
    if not len(seen):
        raise UsageError(
            f"{path}: no object lies in the image: they reach from x {low[:, 0].min():g}, y {low[:, 1].min():g} to "
            f"x {high[:, 0].max():g}, y {high[:, 1].max():g}, the image from {corner[0]:g}, {corner[1]:g} on; set "
            "--origin, --size or --downsample"
        )
    # Numbers without gaps.
    number = np.zeros(len(rows) + 1, np.int32)
    number[seen + 1] = np.arange(1, len(seen) + 1)
    labels = number[labels]
    with durable_file(path) as file:
        file.write(_ENCODERS[kind](labels))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("label", "id", "class"))
    for label, row in enumerate(rows[seen].tolist(), 1):
        name = table.classes[table.class_id[row]].name
        writer.writerow((label, uuid.UUID(bytes=table.id[row].tobytes()), _safe_cell(name)))
    beside = path.with_name(f"{path.stem}.classes.csv")
    with durable_file(beside) as file:
        file.write(text.getvalue().encode())
    return LabelReport(
        image=path, table=beside, objects=len(seen), unseen=len(table) - len(seen), contested_px=contested_px
    )


def _boxes(outlines: Outlines) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(M, 2) least and greatest x, y of each object."""
    first = outlines.ring_offsets[outlines.polygon_offsets[outlines.object_offsets]][:-1]
    xy = outlines.vertices_l0.astype(np.float64)
    return np.minimum.reduceat(xy, first), np.maximum.reduceat(xy, first)


def _encode_png(labels: NDArray[np.int32]) -> bytes:
    return bytes(imagecodecs.png_encode(labels.astype(np.uint16)))


def _encode_tiff(labels: NDArray[np.int32]) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, labels.astype(np.uint32), compression="zlib", metadata=None, software=False)
    return file.getvalue()


def _encode_npy(labels: NDArray[np.int32]) -> bytes:
    file = io.BytesIO()
    np.save(file, labels, allow_pickle=False)
    return file.getvalue()


_ENCODERS: Final[dict[str, Callable[[NDArray[np.int32]], bytes]]] = {
    ".png": _encode_png,
    ".tif": _encode_tiff,
    ".tiff": _encode_tiff,
    ".npy": _encode_npy,
}


def _safe_cell(text: str) -> str:
    # A spreadsheet would run it.
    return f"'{text}" if text[:1] in "=+-@\t\r" else text
