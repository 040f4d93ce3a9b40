"""QuPath GeoJSON: a codec that is strict when it writes, forgiving when it reads, and streamed both ways.

QuPath reads nothing at all from a file in which one feature is broken, so every feature is checked before it is
written. Coordinates are pixels of the full-resolution level as QuPath shows it: x right, y down, (0, 0) the top left
corner of the first pixel. Messages name the rule that was broken; ``RULES`` lists them.
"""

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import logging
import operator
import re
import uuid
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO

import numpy as np
import shapely
from numpy.typing import ArrayLike, NDArray
from shapely.geometry.base import BaseGeometry

from pathopipe.errors import GeoJSONError, UsageError
from pathopipe.files import durable_file

__all__ = [
    "RULES",
    "FeatureBatch",
    "ParsedFeature",
    "WriteReport",
    "feature",
    "feature_batches",
    "polygon_features",
    "read_features",
    "stable_id",
    "stable_ids",
    "write_features",
]

logger = logging.getLogger("pathopipe")

RULES: Final[Mapping[int, str]] = {
    1: "a feature is an object of type Feature",
    7: "coordinates are multiples of 0.25 px, at most 4,194,304 px from the origin",
    8: "a ring is closed and has 4 or more positions of 2 finite numbers",
    9: "polygons are valid, and every part covers 1 px2 or more",
    10: "one part is a Polygon, several are a MultiPolygon; no collection, nothing empty, no null",
    11: 'plane is {"c":..,"z":..,"t":..} with integers',
    12: "id is a canonical UUID in lower case, unique in the file",
    13: "properties.objectType is annotation, detection, cell or tile",
    14: "nucleusGeometry belongs to cells, lies inside the cell, and is left out when there is none",
    15: 'classification is {"name":..,"color":[r,g,b]} or {"names":[..],"color":[r,g,b]}; a name is not empty and has '
    'no newline, no ":" and no "*" at its end',
    16: "measurements are finite numbers by name, at most 30 on all but annotations",
    17: "name is text and color is 3 integers from 0 to 255",
    18: "isLocked is true, and on annotations only",
    19: "metadata is text by text, and on annotations only",
    20: "there are no further members",
    21: "what is empty is left out",
}
"""What QuPath asks of a feature, by the numbers that messages use."""

Feature = dict[str, Any]

_GRID_PX: Final = 0.25
# QuPath holds coordinates in single precision: beyond 2**22 px it can't hold quarters of a pixel.
_LIMIT_PX: Final = 2.0**22
_MIN_AREA_PX2: Final = 1.0
_FLOAT32_MAX: Final = 3.4028234663852886e38
_MAX_MEASUREMENTS: Final = 30
_OBJECT_TYPES: Final = ("annotation", "detection", "cell", "tile")
_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_NAMESPACE: Final = uuid.UUID("b51e2ac6-58a9-5f0b-9c1d-3d0a1f6c7e42")

_POINT, _LINE, _RING, _POLYGON, _MULTIPOINT, _MULTILINE, _MULTIPOLYGON, _COLLECTION = range(8)  # shapely's type ids

# A batch is large enough for array work and small enough for flat memory.
_BATCH_FEATURES: Final = 1024
_BATCH_POSITIONS: Final = 1 << 16
_READ_CHARS: Final = 1 << 20

# Beyond these, QuPath needs gigabytes of heap for one file.
_MANY_POLYGONS: Final = 250_000
_MANY_BYTES: Final = 200_000_000

_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_DECODER: Final = json.JSONDecoder()


class _BrokenRuleError(Exception):
    """A feature breaks a rule; turned into a GeoJSONError by whoever knows which feature it was."""

    def __init__(self, rule: int, found: str) -> None:
        super().__init__(found)
        self.text = f"rule {rule}: {found}; {RULES[rule]}"


# ---------------------------------------------------------------------------------------------------------------------
# Making features
# ---------------------------------------------------------------------------------------------------------------------


def stable_id(slide_id: str, layer: str, number: int) -> str:
    """The id of an object: the same whenever a run is repeated (UUIDv5 of slide, layer and object number)."""
    # None of the three can hold a newline, so two different triples never make one text.
    return str(uuid.uuid5(_NAMESPACE, f"{slide_id}\n{layer}\n{number}"))


def stable_ids(slide_id: str, layer: str, numbers: Iterable[int]) -> NDArray[np.uint8]:
    """(n, 16) the bytes of what :func:`stable_id` gives for each number, several times faster."""
    head = hashlib.sha1(_NAMESPACE.bytes + f"{slide_id}\n{layer}\n".encode(), usedforsecurity=False)
    digests = []
    for number in numbers:
        each = head.copy()
        each.update(b"%d" % number)
        digests.append(each.digest()[:16])
    ids = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16).copy()
    # Version and variant of RFC 9562, section 5.5.
    ids[:, 6] = ids[:, 6] & 0x0F | 0x50
    ids[:, 8] = ids[:, 8] & 0x3F | 0x80
    return ids


def feature(
    geometry: BaseGeometry | None,
    *,
    object_type: str,
    id: str,
    classification: tuple[str, tuple[int, int, int]] | None = None,
    name: str | None = None,
    color: tuple[int, int, int] | None = None,
    measurements: Mapping[str, float] | None = None,
    metadata: Mapping[str, str] | None = None,
    locked: bool = False,
    nucleus_geometry: BaseGeometry | None = None,
    offset_l0: tuple[float, float] = (0, 0),
) -> Feature | None:
    """One object as a feature that QuPath reads.

    Args:
        geometry: Polygon, MultiPolygon, Point, MultiPoint or LineString in level-0 pixels of the whole scan. It is
            made valid and snapped to multiples of 0.25 px; polygon parts of less than 1 px2 are dropped.
        object_type: ``annotation``, ``detection``, ``cell`` or ``tile``.
        id: UUID, as :func:`stable_id` makes it.
        classification: Name and colour of the class; ``Tumor: Positive`` is the class Positive within Tumor.
        name: What QuPath shows as the object's name.
        color: The object's own colour; 3 integers from 0 to 255.
        measurements: Numbers by name, the unit in the name (``Area µm^2``). NaN, infinite and None are left out, and
            numbers are rounded to 8 significant digits: QuPath holds single precision.
        metadata: Text by name; annotations only.
        locked: Keep users from dragging it; annotations only.
        nucleus_geometry: The nucleus of a cell; cut back to the inside of the cell, left out where nothing remains.
        offset_l0: Subtracted from every coordinate: x and y of the scan's bounds, where QuPath crops to them.

    Returns:
        The feature, or None where nothing of the geometry can be kept (the caller counts these).

    Raises:
        GeoJSONError: Anything but the geometry breaks a rule of QuPath.
    """
    try:
        if nucleus_geometry is not None and object_type != "cell":
            raise _BrokenRuleError(14, f"a nucleus on a {object_type}")
        properties = _make_properties(
            object_type,
            name=name,
            color=None if color is None else _make_rgb(17, color),
            classification=None if classification is None else _make_classification(*classification),
            locked=locked,
            measurements=_make_measurements(measurements.items()) if measurements else None,
            metadata=metadata,
        )
        _check_id(id)
        _check_properties(properties)
        (shape,) = _make_geometries(_object_array([geometry]), offset_l0)
        if shape is None:
            return None
        nucleus = None
        if nucleus_geometry is not None:
            (nucleus,) = _make_nuclei(_object_array([shape]), _object_array([nucleus_geometry]), offset_l0)
    except _BrokenRuleError as broken:
        raise GeoJSONError(f"feature {id} breaks {broken.text}") from None
    return _assemble(id, _one_to_json(shape), None if nucleus is None else _one_to_json(nucleus), properties)


def polygon_features(
    geometries: Sequence[BaseGeometry | None] | NDArray[np.object_],
    *,
    object_type: str,
    ids: Sequence[str],
    classifications: Sequence[tuple[str, tuple[int, int, int]] | None] | None = None,
    names: Sequence[str | None] | None = None,
    measurements: Mapping[str, ArrayLike] | None = None,
    nucleus_geometries: Sequence[BaseGeometry | None] | NDArray[np.object_] | None = None,
    offset_l0: tuple[float, float] = (0, 0),
) -> Iterator[Feature | None]:
    """Many objects as features: what :func:`feature` makes of each, several times faster.

    To write them, :func:`feature_batches` is faster still.

    Args:
        geometries: N geometries in level-0 pixels of the whole scan.
        object_type: ``annotation``, ``detection``, ``cell`` or ``tile``; the same for all.
        ids: N UUIDs.
        classifications: N names and colours, None where an object has no class.
        names: N names, None where an object has none.
        measurements: N numbers by name, NaN where an object lacks one.
        nucleus_geometries: N nuclei, None where a cell has none; cells only.
        offset_l0: Subtracted from every coordinate.

    Yields:
        N features in order, None where nothing of a geometry can be kept.

    Raises:
        GeoJSONError: Something else breaks a rule of QuPath.
        UsageError: The sequences differ in length.
    """
    for batch in feature_batches(
        geometries,
        object_type=object_type,
        ids=ids,
        classifications=classifications,
        names=names,
        measurements=measurements,
        nucleus_geometries=nucleus_geometries,
        offset_l0=offset_l0,
    ):
        yield from batch


class FeatureBatch:
    """About a thousand features that are still arrays: :func:`write_features` writes them without making dicts.

    Iterating gives the features one by one, None where nothing of a geometry could be kept.
    """

    __slots__ = ("_ids", "_measured", "_names", "_nuclei", "_properties", "_shapes")

    def __init__(
        self,
        shapes: NDArray[np.object_],
        nuclei: NDArray[np.object_],
        ids: list[str],
        properties: list[Feature],
        names: tuple[str, ...],
        measured: NDArray[np.float64],
    ) -> None:
        """For :func:`feature_batches` only, which checks what goes in.

        ``properties`` lack the measurements: ``names``, and in ``measured`` (N, names) their values.
        """
        self._shapes = shapes
        self._nuclei = nuclei
        self._ids = ids
        self._properties = properties
        self._names = names
        self._measured = measured

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def dropped_ids(self) -> list[str]:
        """Ids of the objects of which nothing could be kept."""
        return [self._ids[index] for index in np.flatnonzero(shapely.is_missing(self._shapes)).tolist()]

    def __iter__(self) -> Iterator[Feature | None]:
        nuclei = _to_json(self._nuclei)
        for id, geometry, nucleus, properties, row in zip(
            self._ids, _to_json(self._shapes), nuclei, self._properties, self._measured.tolist(), strict=True
        ):
            if geometry is None:
                yield None
                continue
            measurements = _make_measurements(zip(self._names, row, strict=True))
            whole = {**properties, "measurements": measurements} if measurements else {**properties}
            yield _assemble(id, geometry, nucleus, whole)

    def _encode(self, first_number: int) -> "_Encoded":
        here = np.flatnonzero(~shapely.is_missing(self._shapes))
        kept = here.tolist()
        nuclei = [""] * len(self)
        cells = np.flatnonzero(~shapely.is_missing(self._nuclei))
        for index, text in zip(cells.tolist(), _shape_texts(self._nuclei[cells]), strict=True):
            nuclei[index] = text
        texts = _shape_texts(self._shapes[here])
        properties = self._property_texts()
        return _Encoded(
            lines=[
                _line(self._ids[index], text, nuclei[index], properties[index])
                for index, text in zip(kept, texts, strict=True)
            ],
            ids=[self._ids[index] for index in kept],
            numbers=[first_number + index for index in kept],
            n_dropped=len(self) - len(kept),
            n_polygons=int(np.count_nonzero(np.isin(shapely.get_type_id(self._shapes), (_POLYGON, _MULTIPOLYGON)))),
        )

    def _property_texts(self) -> list[str]:
        """The properties of all rows as JSON: what the encoder makes of their dicts, many times faster."""
        # Rows of one class share what is before their measurements.
        heads: dict[int, str] = {}
        for properties in self._properties:
            if id(properties) not in heads:
                heads[id(properties)] = _ENCODER.encode(properties)
        texts = [heads[id(properties)] for properties in self._properties]
        if not self._names:
            return texts
        quoted = [f"{_ENCODER.encode(name)}:".replace("%", "%%") for name in self._names]
        is_given = ~np.isnan(self._measured)
        # Near 1e8 and beyond the two ways of writing a number part.
        is_plain = (np.abs(np.where(is_given, self._measured, 0)) < 9e7).all(axis=1)
        patterns, pattern_of_row = np.unique(is_given, axis=0, return_inverse=True)
        for number, columns in enumerate(patterns):
            template = ",".join(f"{quoted[column]}%.8g" for column in np.flatnonzero(columns).tolist())
            if not template:
                continue
            rows = np.flatnonzero(is_plain & (pattern_of_row == number))
            values = (self._measured[np.ix_(rows, columns)] + 0.0).tolist()  # adding zero turns -0.0 into 0.0
            for index, row in zip(rows.tolist(), values, strict=True):
                texts[index] = f'{texts[index][:-1]},"measurements":{{{template % tuple(row)}}}}}'
        for index in np.flatnonzero(~is_plain).tolist():
            made = _make_measurements(zip(self._names, self._measured[index].tolist(), strict=True))
            if made:
                texts[index] = f'{texts[index][:-1]},"measurements":{_ENCODER.encode(made)}}}'
        return texts


def feature_batches(
    geometries: Sequence[BaseGeometry | None] | NDArray[np.object_],
    *,
    object_type: str,
    ids: Sequence[str],
    classifications: Sequence[tuple[str, tuple[int, int, int]] | None] | None = None,
    names: Sequence[str | None] | None = None,
    measurements: Mapping[str, ArrayLike] | None = None,
    nucleus_geometries: Sequence[BaseGeometry | None] | NDArray[np.object_] | None = None,
    offset_l0: tuple[float, float] = (0, 0),
) -> Iterator[FeatureBatch]:
    """Many objects for :func:`write_features`; arguments and errors are those of :func:`polygon_features`.

    Yields:
        The N features in order, a batch at a time.
    """
    shapes = _object_array(geometries)
    nuclei = None if nucleus_geometries is None else _object_array(nucleus_geometries)
    columns = {key: np.asarray(column, np.float64) for key, column in (measurements or {}).items()}
    given = {"ids": ids, "classifications": classifications, "names": names, "nucleus_geometries": nuclei, **columns}
    for key, values in given.items():
        if values is not None and len(values) != len(shapes):
            raise UsageError(f"{key}: {len(values)} values for {len(shapes)} geometries; give one for each")
    try:
        if nuclei is not None and object_type != "cell":
            raise _BrokenRuleError(14, f"nuclei on a {object_type}")
        # What all rows share is checked once; the numbers are made good row by row.
        _check_properties(_make_properties(object_type, measurements=dict.fromkeys(columns, 0.0)))
        classes = {each: _make_classification(*each) for each in set(classifications or ()) if each is not None}
        for made in classes.values():
            _check_classification(made)
    except _BrokenRuleError as broken:
        raise GeoJSONError(f"features break {broken.text}") from None
    for start, stop in _runs(shapes):
        at = slice(start, stop)
        batch_ids = [*ids[at]]
        try:
            kept = _make_geometries(shapes[at], offset_l0)
            empty = _object_array([None] * len(kept))
            kept_nuclei = empty if nuclei is None else _make_nuclei(kept, nuclei[at], offset_l0)
        except _BrokenRuleError as broken:
            raise GeoJSONError(f"features {start + 1} to {stop} break {broken.text}") from None
        measured = np.stack([column[at] for column in columns.values()], axis=1) if columns else None
        shared: dict[tuple[Any, Any], Feature] = {}
        rows: list[Feature] = []
        for row, id in enumerate(batch_ids):
            name = None if names is None else names[start + row]
            given_class = None if classifications is None else classifications[start + row]
            try:
                _check_id(id)
                if name:
                    _check_name(name)
            except _BrokenRuleError as broken:
                raise GeoJSONError(f"feature {start + row + 1} (id {id}) breaks {broken.text}") from None
            if (name, given_class) not in shared:
                shared[name, given_class] = _make_properties(
                    object_type, name=name, classification=None if given_class is None else classes[given_class]
                )
            rows.append(shared[name, given_class])
        if measured is None:
            measured = np.empty((len(kept), 0))
        yield FeatureBatch(kept, kept_nuclei, batch_ids, rows, tuple(columns), measured)


def _object_array(values: Sequence[Any] | NDArray[np.object_]) -> NDArray[np.object_]:
    out = np.empty(len(values), object)
    for index, value in enumerate(values):
        out[index] = value
    return out


def _runs(shapes: NDArray[np.object_]) -> Iterator[tuple[int, int]]:
    """Start and stop of batches that are bounded in features and, but for a single huge one, in positions."""
    start = positions = 0
    for index, count in enumerate(shapely.get_num_coordinates(shapes).tolist()):
        if index > start and (index - start == _BATCH_FEATURES or positions + count > _BATCH_POSITIONS):
            yield start, index
            start, positions = index, 0
        positions += count
    if start < len(shapes):
        yield start, len(shapes)


def _assemble(id: str, geometry: Feature, nucleus: Feature | None, properties: Feature) -> Feature:
    made: Feature = {"type": "Feature", "id": id, "geometry": geometry}
    if nucleus is not None:
        made["nucleusGeometry"] = nucleus
    made["properties"] = properties
    return made


def _make_properties(
    object_type: str,
    *,
    name: str | None = None,
    color: list[int] | None = None,
    classification: Feature | None = None,
    locked: bool = False,
    measurements: dict[str, float] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Feature:
    properties: Feature = {"objectType": object_type}
    if name:
        properties["name"] = name
    if color is not None:
        properties["color"] = color
    if classification is not None:
        properties["classification"] = classification
    if locked:
        properties["isLocked"] = True
    if measurements:
        properties["measurements"] = measurements
    if metadata:
        properties["metadata"] = dict(metadata)
    return properties


def _make_rgb(rule: int, color: Sequence[int]) -> list[int]:
    try:
        return [operator.index(part) for part in color]
    except TypeError:
        raise _BrokenRuleError(rule, f"colour {color!r}") from None


def _make_classification(name: str, color: Sequence[int]) -> Feature:
    if not isinstance(name, str):
        raise _BrokenRuleError(15, f"class name {name!r}")
    names = [part.strip() for part in name.split(":")]
    rgb = _make_rgb(15, color)
    return {"name": names[0], "color": rgb} if len(names) == 1 else {"names": names, "color": rgb}


def _make_measurements(items: Iterable[tuple[str, Any]]) -> dict[str, float]:
    kept: dict[str, float] = {}
    for name, value in items:
        if value is None or isinstance(value, (bool, np.bool_, str, bytes)):
            continue
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise _BrokenRuleError(16, f"{name} = {_brief(value)}") from None
        # False for NaN too.
        if -_FLOAT32_MAX <= number <= _FLOAT32_MAX:
            rounded = float(f"{number:.8g}")
            kept[name] = int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
    return kept


def _make_geometries(geometries: NDArray[np.object_], offset_l0: tuple[float, float]) -> NDArray[np.object_]:
    """Shift, snap and repair; None where nothing can be kept.

    Rounding the vertices leaves nearly every polygon valid and costs a tenth of a true snap (54 us for 24 vertices),
    which only the others go through.
    """
    for geometry in geometries:
        if geometry is not None and not isinstance(geometry, BaseGeometry):
            raise _BrokenRuleError(10, f"a {type(geometry).__name__} in place of a geometry")
    shapes = shapely.force_2d(geometries)
    xy, owner = shapely.get_coordinates(shapes, return_index=True)
    xy -= offset_l0
    counts = np.bincount(owner, minlength=len(shapes))
    outside = ~(np.abs(xy) < _LIMIT_PX).all(axis=1)  # NaN too
    if outside.any():
        counts[owner[outside]] = 0
        xy = xy[counts[owner] > 0]
    shapes[counts == 0] = None
    # Far finer than the grid, but without the near-zero numbers that a repair stumbles over.
    shifted = shapely.set_coordinates(shapes.copy(), np.rint(xy * 2**16) / 2**16)
    shapes = shapely.set_coordinates(shapes, _snap(xy))
    kinds = shapely.get_type_id(shapes)
    polygons = np.flatnonzero(kinds == _POLYGON)
    if len(polygons):
        good = shapely.is_valid(shapes[polygons]) & (shapely.area(shapes[polygons]) >= _MIN_AREA_PX2)
        shapes[polygons[good]] = shapely.remove_repeated_points(shapes[polygons[good]], 0.0)
        for index in polygons[~good]:
            shapes[index] = _repair(shifted[index])
        if len(polygons) == len(shapes):
            return _as_objects(shapes)
    for index, kind in enumerate(kinds.tolist()):
        if kind in (_MULTIPOLYGON, _COLLECTION):
            shapes[index] = _repair(shifted[index])
        elif kind == _MULTILINE:
            raise _BrokenRuleError(10, "a MultiLineString; write one LineString each")
        elif kind in (_LINE, _RING):
            line = shapely.linestrings(shapely.get_coordinates(shapes[index]))
            shapes[index] = shapely.remove_repeated_points(line, 0.0) if line.length > 0 else None
        elif kind == _MULTIPOINT and shapely.get_num_geometries(shapes[index]) == 1:
            shapes[index] = shapely.get_geometry(shapes[index], 0)
    return _as_objects(shapes)


def _as_objects(shapes: Any) -> NDArray[np.object_]:
    """Give what shapely returns the type that it has."""
    objects: NDArray[np.object_] = shapes
    return objects


def _snap(xy: NDArray[np.float64]) -> NDArray[np.float64]:
    # Adding zero turns -0.0 into 0.0.
    snapped: NDArray[np.float64] = np.floor(xy / _GRID_PX + 0.5) * _GRID_PX + 0.0
    return snapped


def _repair(geometry: BaseGeometry) -> BaseGeometry | None:
    """The polygon parts of at least 1 px2 of a geometry that was made valid and then snapped, or None."""
    try:
        fixed = _make_valid(_join(_polygon_parts(geometry)))
        with np.errstate(all="ignore"):
            parts = _polygon_parts(shapely.set_precision(fixed, _GRID_PX))
    except shapely.errors.GEOSException:
        return None
    kept = _join(parts[shapely.area(parts) >= _MIN_AREA_PX2])
    if kept.is_empty or not kept.is_valid:
        return None
    return shapely.set_coordinates(kept, _snap(shapely.get_coordinates(kept)))


def _make_valid(geometry: BaseGeometry) -> BaseGeometry:
    """The polygon parts of a repaired geometry; empty where none is left."""
    if geometry.is_valid:
        return geometry
    # GEOS divides by zero on its way to a good result, and shapely passes on the warning.
    with np.errstate(all="ignore"):
        return _join(_polygon_parts(shapely.make_valid(geometry)))


def _polygon_parts(geometry: BaseGeometry) -> NDArray[np.object_]:
    parts = shapely.get_parts(_object_array([geometry]))
    while (shapely.get_type_id(parts) > _POLYGON).any():
        parts = shapely.get_parts(parts)
    return _as_objects(parts[(shapely.get_type_id(parts) == _POLYGON) & ~shapely.is_empty(parts)])


def _join(parts: NDArray[np.object_]) -> BaseGeometry:
    return parts[0] if len(parts) == 1 else shapely.multipolygons(parts)


def _make_nuclei(
    cells: NDArray[np.object_], nuclei: NDArray[np.object_], offset_l0: tuple[float, float]
) -> NDArray[np.object_]:
    """Nuclei on the grid and inside their cells; None where there is none or nothing of it is left."""
    kept = _make_geometries(nuclei, offset_l0)
    kept[shapely.is_missing(cells)] = None
    for index in np.flatnonzero(~shapely.is_missing(kept) & ~shapely.covers(cells, kept)):
        # Half a pixel is more than a snap can move a vertex, so what is left stays inside.
        inside = shapely.intersection(kept[index], shapely.buffer(cells[index], -2 * _GRID_PX))
        fitted = _repair(inside)
        kept[index] = fitted if fitted is not None and shapely.covers(cells[index], fitted) else None
    return kept


def _to_json(shapes: NDArray[np.object_]) -> list[Any]:
    """GeoJSON objects of snapped geometries, None for None."""
    kinds = shapely.get_type_id(shapes)
    polygons = kinds == _POLYGON
    rings, owners = shapely.get_rings(shapes[polygons], return_index=True)
    ring_lists = _position_lists(rings)
    last = np.cumsum(np.bincount(owners, minlength=np.count_nonzero(polygons))).tolist()
    bounds = zip([0, *last], last, strict=False)
    made: list[Any] = []
    for shape, kind in zip(shapes, kinds.tolist(), strict=True):
        if kind == _POLYGON:
            first, stop = next(bounds)
            made.append({"type": "Polygon", "coordinates": ring_lists[first:stop]})
        elif shape is None:
            made.append(None)
        else:
            made.append(_one_to_json(shape))
    return made


def _one_to_json(shape: BaseGeometry) -> Feature:
    kind = shape.geom_type
    if kind == "Polygon":
        return {"type": kind, "coordinates": _position_lists(shapely.get_rings(shape))}
    if kind == "MultiPolygon":
        return {"type": kind, "coordinates": [_position_lists(shapely.get_rings(part)) for part in shape.geoms]}
    positions = shapely.get_coordinates(shape).tolist()
    return {"type": kind, "coordinates": positions[0] if kind == "Point" else positions}


def _position_lists(rings: NDArray[np.object_]) -> list[list[list[float]]]:
    positions = shapely.get_coordinates(rings).tolist()
    if len(rings) == 1:
        return [positions]
    ends = np.cumsum(shapely.get_num_coordinates(rings)).tolist()
    return [positions[a:b] for a, b in zip([0, *ends], ends, strict=False)]


# ---------------------------------------------------------------------------------------------------------------------
# Checking and writing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WriteReport:
    """What :func:`write_features` did."""

    written: int
    dropped: int
    """How many None were among the features: objects whose geometry could not be kept."""


def write_features(path: Path, features: Iterable[Feature | FeatureBatch | None]) -> WriteReport:
    """Write a FeatureCollection, one feature a line, as a stream; the file is there whole or not at all.

    The same features make the same bytes, gzip included. Memory does not grow with the number of features, but for 24
    bytes each that find doubled ids.

    Args:
        path: Ends in ``.geojson`` or ``.geojson.gz``; a file of that name is replaced, missing folders are made.
        features: As :func:`feature` makes them, or in batches of :func:`feature_batches`, which is the fast way for
            many; None is counted and left out.

    Raises:
        UsageError: The name ends otherwise.
        GeoJSONError: A feature breaks a rule of QuPath; nothing is left on the disk.
        StoreWriteError: The disk is full, or the folder can't be written; nothing is left on the disk.
    """
    lowered = path.name.lower()
    if not lowered.endswith((".geojson", ".geojson.gz")):
        raise UsageError(f"{path}: QuPath reads '.geojson' and '.geojson.gz' only; choose one of these endings")
    ids = bytearray()
    numbers = array("q")
    n_dropped = n_polygons = n_bytes = 0
    # Level 2 takes half the time of 5 for a seventh more bytes of these texts; zlib writes no date and no name.
    compressor = zlib.compressobj(2, zlib.DEFLATED, 31) if lowered.endswith(".gz") else None
    with durable_file(path) as file:

        def write(text: str) -> int:
            data = text.encode("utf-8")
            file.write(compressor.compress(data) if compressor else data)
            return len(data)

        n_bytes += write('{"type":"FeatureCollection","features":[')
        for encoded in _encode_all(features, path):
            n_dropped += encoded.n_dropped
            n_polygons += encoded.n_polygons
            if encoded.lines:
                n_bytes += write((",\n" if numbers else "\n") + ",\n".join(encoded.lines))
                ids += bytes.fromhex("".join(encoded.ids).replace("-", ""))
                numbers.extend(encoded.numbers)
        _check_unique(ids, numbers, path)
        n_bytes += write("\n]}\n")
        if compressor:
            file.write(compressor.flush())
    if n_polygons > _MANY_POLYGONS or n_bytes > _MANY_BYTES:
        logger.warning(
            "%s: %d polygons, %d MB uncompressed; QuPath needs about 14 times that in memory, so split the layer "
            "or write points",
            path.name,
            n_polygons,
            n_bytes // 1_000_000,
        )
    return WriteReport(len(numbers), n_dropped)


class _Encoded(NamedTuple):
    """Features that were checked, as lines of the file."""

    lines: list[str]
    ids: list[str]
    numbers: list[int]
    """Where each stood among all that came in, from 1."""
    n_dropped: int
    n_polygons: int


def _encode_all(features: Iterable[Feature | FeatureBatch | None], path: Path) -> Iterator[_Encoded]:
    waiting: list[tuple[int, Feature | None]] = []
    positions = 0
    number = 0
    for item in features:
        if isinstance(item, FeatureBatch):
            if waiting:
                yield _encode_singles(waiting, path)
                waiting, positions = [], 0
            yield item._encode(number + 1)
            number += len(item)
            continue
        number += 1
        waiting.append((number, item))
        positions += _count_positions(item)
        if len(waiting) == _BATCH_FEATURES or positions >= _BATCH_POSITIONS:
            yield _encode_singles(waiting, path)
            waiting, positions = [], 0
    if waiting:
        yield _encode_singles(waiting, path)


def _encode_singles(numbered: list[tuple[int, Feature | None]], path: Path) -> _Encoded:
    kept = [(number, made) for number, made in numbered if made is not None]
    lines = _check_and_encode(kept, path) if kept else []
    return _Encoded(
        lines=lines,
        ids=[made["id"] for _, made in kept],
        numbers=[number for number, _ in kept],
        n_dropped=len(numbered) - len(kept),
        n_polygons=sum(made["geometry"]["type"] in ("Polygon", "MultiPolygon") for _, made in kept),
    )


def _count_positions(made: Any) -> int:
    """About how many positions a feature has; it was not checked yet, so it may be anything."""
    try:
        coordinates = made["geometry"]["coordinates"]
        if made["geometry"]["type"] == "MultiPolygon":
            return sum(len(ring) for part in coordinates for ring in part)
        return sum(map(len, coordinates))
    except (TypeError, KeyError):
        return 1


def _check_and_encode(kept: list[tuple[int, Feature]], path: Path) -> list[str]:
    try:
        return _encode([made for _, made in kept])
    except _BrokenRuleError as broken:
        if len(kept) == 1:
            number, made = kept[0]
            id = made.get("id") if isinstance(made, dict) else None
            named = f" (id {id})" if isinstance(id, str) and _UUID.fullmatch(id) else ""
            raise GeoJSONError(f"{path.name}: feature {number}{named} breaks {broken.text}") from None
    # Arrays say that something is wrong, not where; one at a time the first culprit gives its name.
    for single in kept:
        _check_and_encode([single], path)
    raise AssertionError("a batch breaks a rule that none of its features breaks")


def _encode(batch: list[Feature]) -> list[str]:
    """Check features and make their lines."""
    for made in batch:
        _check_members(made)
    shapes, texts = _check_geometries([made["geometry"] for made in batch])
    cells = [index for index, made in enumerate(batch) if "nucleusGeometry" in made]
    nucleus_texts = [""] * len(batch)
    if cells:
        nuclei, encoded = _check_geometries([batch[index]["nucleusGeometry"] for index in cells])
        for inside, index, text in zip(shapely.covers(shapes[cells], nuclei), cells, encoded, strict=True):
            if not inside:
                raise _BrokenRuleError(14, "the nucleus reaches beyond its cell")
            nucleus_texts[index] = text
    return [
        _line(made["id"], text, nucleus, _ENCODER.encode(made["properties"]))
        for made, text, nucleus in zip(batch, texts, nucleus_texts, strict=True)
    ]


def _line(id: str, geometry: str, nucleus: str, properties: str) -> str:
    if nucleus:
        nucleus = f'"nucleusGeometry":{nucleus},'
    return f'{{"type":"Feature","id":"{id}","geometry":{geometry},{nucleus}"properties":{properties}}}'


_MEMBERS: Final = frozenset(("type", "id", "geometry", "nucleusGeometry", "properties"))


def _check_members(made: Any) -> None:
    if not isinstance(made, dict) or made.get("type") != "Feature":
        raise _BrokenRuleError(1, f"{_brief(made)}")
    if "objectType" in made:
        raise _BrokenRuleError(13, "objectType stands beside properties, not inside")
    if not made.keys() <= _MEMBERS:
        raise _BrokenRuleError(20, f"a feature with {_brief(sorted(map(str, made.keys() - _MEMBERS)))}")
    _check_id(made.get("id"))
    if made.get("geometry") is None:
        raise _BrokenRuleError(10, "no geometry")
    properties = made.get("properties")
    if not isinstance(properties, dict):
        raise _BrokenRuleError(13, "no properties")
    _check_properties(properties)
    if "nucleusGeometry" in made and (properties["objectType"] != "cell" or made["nucleusGeometry"] is None):
        raise _BrokenRuleError(14, f"{_brief(made['nucleusGeometry'])} on a {properties['objectType']}")


def _check_id(id: Any) -> None:
    if not isinstance(id, str) or not _UUID.fullmatch(id):
        raise _BrokenRuleError(12, f"id {_brief(id)}")


def _check_properties(properties: Mapping[str, Any]) -> None:
    object_type = properties.get("objectType")
    if object_type not in _OBJECT_TYPES:
        raise _BrokenRuleError(13, f"objectType {_brief(object_type)}")
    for key, value in properties.items():
        if key == "objectType":
            continue
        if key == "classification":
            _check_classification(value)
        elif key == "measurements":
            _check_measurements(value, object_type)
        elif key == "name":
            _check_name(value)
        elif key == "color":
            _check_rgb(17, value)
        elif key == "isLocked":
            if value is not True or object_type != "annotation":
                raise _BrokenRuleError(18, f"isLocked {_brief(value)} on a {object_type}")
        elif key == "metadata":
            _check_metadata(value, object_type)
        else:
            raise _BrokenRuleError(20, f"properties with {_brief(key)}")


def _check_name(value: Any) -> None:
    if not isinstance(value, str):
        raise _BrokenRuleError(17, f"name {_brief(value)}")
    if not value:
        raise _BrokenRuleError(21, "an empty name")
    _check_text(17, value)


def _check_classification(value: Any) -> None:
    if not isinstance(value, dict) or not (value.keys() == {"name", "color"} or value.keys() == {"names", "color"}):
        raise _BrokenRuleError(15, f"classification {_brief(value)}")
    _check_rgb(15, value["color"])
    names = value["names"] if "names" in value else [value["name"]]
    if not isinstance(names, (list, tuple)) or not names:
        raise _BrokenRuleError(15, f"names {_brief(names)}")
    for name in names:
        if not isinstance(name, str) or not name.strip() or name[-1] == "*" or _UNNAMEABLE.search(name):
            raise _BrokenRuleError(15, f"class name {_brief(name)}")
        _check_text(15, name)


_UNNAMEABLE: Final = re.compile(r"[:\r\n]")


def _check_rgb(rule: int, value: Any) -> None:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise _BrokenRuleError(rule, f"colour {_brief(value)}")
    for part in value:
        if type(part) is not int or not 0 <= part <= 255:
            raise _BrokenRuleError(rule, f"colour {_brief(value)}")


def _check_measurements(value: Any, object_type: str) -> None:
    if not isinstance(value, dict):
        raise _BrokenRuleError(16, f"measurements {_brief(value)}")
    if not value:
        raise _BrokenRuleError(21, "empty measurements")
    if len(value) > _MAX_MEASUREMENTS and object_type != "annotation":
        raise _BrokenRuleError(16, f"{len(value)} measurements on a {object_type}")
    for name, number in value.items():
        if not isinstance(name, str) or not name:
            raise _BrokenRuleError(16, f"measurement name {_brief(name)}")
        kind = type(number)
        if (kind is not float and kind is not int) or not -_FLOAT32_MAX <= number <= _FLOAT32_MAX:
            raise _BrokenRuleError(16, f"{name} = {_brief(number)}")
        _check_text(16, name)


def _check_metadata(value: Any, object_type: str) -> None:
    if object_type != "annotation":
        raise _BrokenRuleError(19, f"metadata on a {object_type}")
    if not isinstance(value, dict):
        raise _BrokenRuleError(19, f"metadata {_brief(value)}")
    if not value:
        raise _BrokenRuleError(21, "empty metadata")
    for pair in value.items():
        for text in pair:
            if not isinstance(text, str):
                raise _BrokenRuleError(19, f"metadata {_brief(pair)}")
            _check_text(19, text)


def _check_text(rule: int, text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _BrokenRuleError(rule, f"{text!a} is not text that UTF-8 can hold") from None


def _check_geometries(geometries: list[Any]) -> tuple[NDArray[np.object_], list[str]]:
    """Check GeoJSON geometries; their shapes and their JSON texts.

    Everything is laid out flat first, so that arrays do the work: paths (rings, lines, sets of points) over positions,
    polygon parts over paths, geometries over parts.
    """
    paths: list[Any] = []
    rings_of_part: list[int] = []
    parts_of_geometry: list[int] = []
    for geometry in geometries:
        _check_geometry_members(geometry)
        coordinates = geometry["coordinates"]
        kind = geometry["type"]
        if kind == "Polygon":
            paths += coordinates
            rings_of_part.append(len(coordinates))
            parts_of_geometry.append(1)
        elif kind == "MultiPolygon":
            for part in coordinates:
                if not isinstance(part, (list, tuple)) or not part:
                    raise _BrokenRuleError(10, f"a part {_brief(part)}")
                paths += part
                rings_of_part.append(len(part))
            parts_of_geometry.append(len(coordinates))
        else:
            paths.append([coordinates] if kind == "Point" else coordinates)
            rings_of_part.append(1)
            parts_of_geometry.append(1)
    xy, lengths = _check_positions(paths)
    kinds = [geometry["type"] for geometry in geometries]
    shapes = _check_shapes(kinds, xy, lengths, np.asarray(rings_of_part), np.asarray(parts_of_geometry))
    return shapes, _geometry_texts(geometries, xy, lengths, rings_of_part, parts_of_geometry)


def _check_geometry_members(geometry: Any) -> None:
    if not isinstance(geometry, dict) or geometry.get("type") not in _GEOMETRY_TYPES:
        raise _BrokenRuleError(10, f"geometry {_brief(geometry)}")
    if len(geometry) > 2:
        if geometry.keys() != {"type", "coordinates", "plane"}:
            raise _BrokenRuleError(20, f"a geometry with {_brief(sorted(map(str, geometry)))}")
        plane = geometry["plane"]
        if (
            not isinstance(plane, dict)
            or plane.keys() != {"c", "z", "t"}
            or not all(type(value) is int for value in plane.values())
        ):
            raise _BrokenRuleError(11, f"plane {_brief(plane)}")
    coordinates = geometry.get("coordinates")
    if not isinstance(coordinates, (list, tuple)) or not coordinates:
        raise _BrokenRuleError(10, f"coordinates {_brief(coordinates)}")
    if geometry["type"] == "MultiPolygon" and len(coordinates) == 1:
        raise _BrokenRuleError(10, "a MultiPolygon of one part")


_GEOMETRY_TYPES: Final = ("Polygon", "MultiPolygon", "Point", "MultiPoint", "LineString")


def _check_positions(paths: list[Any]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """All positions as (V, 2), and how many each path has."""
    try:
        lengths = np.fromiter(map(len, paths), np.int64, len(paths))
        positions = list(itertools.chain.from_iterable(paths))
        sizes = set(map(len, positions))
        values = list(itertools.chain.from_iterable(positions))
    except TypeError:
        raise _BrokenRuleError(8, "coordinates are not lists of positions") from None
    if sizes - {2}:
        raise _BrokenRuleError(8, f"a position of {min(sizes - {2})} numbers")
    for kind in set(map(type, values)) - {int, float}:
        raise _BrokenRuleError(8, f"a coordinate of type {kind.__name__}")
    try:
        xy = np.asarray(values, np.float64).reshape(-1, 2)
    except OverflowError:
        raise _BrokenRuleError(7, "a coordinate too large for any slide") from None
    if not np.isfinite(xy).all():
        raise _BrokenRuleError(8, "a coordinate that is not finite")
    if (np.abs(xy) > _LIMIT_PX).any():
        raise _BrokenRuleError(7, f"coordinate {xy[np.abs(xy) > _LIMIT_PX][0]:.17g}")
    off_grid = xy != _snap(xy)
    if off_grid.any():
        raise _BrokenRuleError(7, f"coordinate {xy[off_grid][0]:.17g}")
    return xy, lengths


def _check_shapes(
    kinds: list[str],
    xy: NDArray[np.float64],
    lengths: NDArray[np.int64],
    rings_of_part: NDArray[np.int64],
    parts_of_geometry: NDArray[np.int64],
) -> NDArray[np.object_]:
    areal = np.fromiter((kind.endswith("Polygon") for kind in kinds), bool, len(kinds))
    part_owner = np.repeat(np.arange(len(kinds)), parts_of_geometry)
    path_owner = np.repeat(part_owner, rings_of_part)
    is_ring = areal[path_owner]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    if (lengths[is_ring] < 4).any():
        raise _BrokenRuleError(8, f"a ring of {lengths[is_ring].min()} positions")
    if (xy[starts[is_ring]] != xy[ends[is_ring] - 1]).any():
        raise _BrokenRuleError(8, "a ring that is not closed")

    shapes = np.empty(len(kinds), object)
    if is_ring.any():
        ring_numbers = np.cumsum(is_ring) - 1
        in_ring = np.repeat(is_ring, lengths)
        rings = shapely.linearrings(xy[in_ring], indices=np.repeat(ring_numbers, lengths)[in_ring])
        areal_parts = areal[part_owner]
        part_numbers = np.cumsum(areal_parts) - 1
        parts = shapely.polygons(rings, indices=np.repeat(part_numbers, rings_of_part)[is_ring])
        if (shapely.area(parts) < _MIN_AREA_PX2).any():
            # An invalid polygon may have any area; the reason says more.
            _check_valid(parts)
            raise _BrokenRuleError(9, f"a part of {shapely.area(parts).min():g} px2")
        one_part = parts_of_geometry[part_owner[areal_parts]] == 1
        shapes[areal & (parts_of_geometry == 1)] = parts[one_part]
        many = areal & (parts_of_geometry > 1)
        if many.any():
            owners = (np.cumsum(many) - 1)[part_owner[areal_parts]][~one_part]
            shapes[many] = shapely.multipolygons(parts[~one_part], indices=owners)
        _check_valid(shapes[areal])
    for index, path in zip(np.flatnonzero(~areal), np.flatnonzero(~is_ring), strict=True):
        points = xy[starts[path] : ends[path]]
        if kinds[index] != "LineString":
            shapes[index] = shapely.multipoints(points)
        elif len(points) < 2 or (points == points[0]).all():
            raise _BrokenRuleError(10, "a line of one point")
        else:
            shapes[index] = shapely.linestrings(points)
    return shapes


def _check_valid(shapes: NDArray[np.object_]) -> None:
    for shape in shapes[~shapely.is_valid(shapes)]:
        raise _BrokenRuleError(9, f"a polygon that is not valid ({shapely.is_valid_reason(shape)})")


def _geometry_texts(
    geometries: list[Any],
    xy: NDArray[np.float64],
    lengths: NDArray[np.int64],
    rings_of_part: list[int],
    parts_of_geometry: list[int],
) -> list[str]:
    paths = iter(_path_texts(xy, lengths))
    parts = iter(["[" + ",".join(f"[{next(paths)}]" for _ in range(n)) + "]" for n in rings_of_part])
    texts = []
    for geometry, n_parts in zip(geometries, parts_of_geometry, strict=True):
        kind = geometry["type"]
        if kind == "MultiPolygon":
            coordinates = "[" + ",".join(next(parts) for _ in range(n_parts)) + "]"
        elif kind == "Polygon":
            coordinates = next(parts)
        elif kind == "Point":
            coordinates = next(parts)[2:-2]
        else:
            coordinates = next(parts)[1:-1]
        plane = f',"plane":{_ENCODER.encode(geometry["plane"])}' if "plane" in geometry else ""
        texts.append(f'{{"type":"{kind}","coordinates":{coordinates}{plane}}}')
    return texts


def _shape_texts(shapes: NDArray[np.object_]) -> list[str]:
    """GeoJSON texts of snapped geometries."""
    if not len(shapes):
        return []
    if (shapely.get_type_id(shapes) != _POLYGON).any():
        return _check_geometries([_one_to_json(shape) for shape in shapes])[1]
    rings, owners = shapely.get_rings(shapes, return_index=True)
    paths = _path_texts(shapely.get_coordinates(rings), shapely.get_num_coordinates(rings))
    ends = np.cumsum(np.bincount(owners)).tolist()
    return [
        f'{{"type":"Polygon","coordinates":[[{"],[".join(paths[a:b])}]]}}'
        for a, b in zip([0, *ends], ends, strict=False)
    ]


def _words(texts: Iterable[bytes]) -> NDArray[np.uint32]:
    """Texts of up to 4 bytes as one integer each, filled up with null bytes."""
    return np.frombuffer(b"".join(text.ljust(4, b"\0") for text in texts), np.uint32)


_DIGITS: Final = _words(b"%d" % number for number in range(10_000))
_PADDED_DIGITS: Final = _words(b"%04d" % number for number in range(10_000))
_X_FRACTION: Final = _words((b"", b".25", b".5", b".75"))
_Y_FRACTION: Final = _words((b"]", b".25]", b".5]", b".75]"))
_X_BEGIN: Final = _words((b",[", b",[-", b"\n[", b"\n[-"))
_Y_BEGIN: Final = _words((b",", b",-"))


def _path_texts(xy: NDArray[np.float64], lengths: NDArray[np.int64]) -> list[str]:
    """The positions of each path as JSON, ``[1,2.25],[3.5,4]``.

    Every number is put together from four words of four bytes that tables hold, and the null bytes that fill them are
    taken out of the whole: far faster than formatting floats one by one.
    """
    quarters = np.rint(np.abs(xy) / _GRID_PX).astype(np.int32)  # (V, 2)
    whole = quarters >> 2
    upper = whole // 10_000
    lower = whole - 10_000 * upper
    fraction = quarters & 3
    negative = (xy < 0).astype(np.intp)
    first = np.zeros(len(xy), np.intp)
    first[np.cumsum(lengths) - lengths] = 2
    words = np.empty((len(xy), 2, 4), np.uint32)
    words[:, 0, 0] = _X_BEGIN[first + negative[:, 0]]
    words[:, 1, 0] = _Y_BEGIN[negative[:, 1]]
    words[:, :, 1] = np.where(upper > 0, _DIGITS[upper], 0)
    words[:, :, 2] = np.where(upper > 0, _PADDED_DIGITS[lower], _DIGITS[lower])
    words[:, 0, 3] = _X_FRACTION[fraction[:, 0]]
    words[:, 1, 3] = _Y_FRACTION[fraction[:, 1]]
    return words.tobytes().translate(None, b"\0").decode("ascii").split("\n")[1:]


def _check_unique(ids: bytearray, numbers: "array[int]", path: Path) -> None:
    words = np.frombuffer(bytes(ids), ">u8").reshape(-1, 2)
    order = np.lexsort((words[:, 1], words[:, 0]))
    equal = (words[order[1:]] == words[order[:-1]]).all(axis=1)
    if equal.any():
        first, second = sorted(order[np.flatnonzero(equal)[0] :][:2].tolist())
        doubled = uuid.UUID(bytes=bytes(ids[16 * first : 16 * first + 16]))
        raise GeoJSONError(
            f"{path.name}: features {numbers[first]} and {numbers[second]} break rule 12: both bear the id {doubled}; "
            "give every object its own number"
        )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ParsedFeature:
    """One object of a GeoJSON file."""

    geometry: BaseGeometry
    """Polygon, MultiPolygon, Point, MultiPoint, LineString or MultiLineString in the pixels that the file uses."""
    object_type: str
    """``annotation``, ``detection``, ``cell`` or ``tile``; ``annotation`` where the file does not say."""
    id: str | None = None
    """Where it is a UUID; older files have the object's type there."""
    names: tuple[str, ...] = ()
    """Names of the class and its subclasses; empty without a classification."""
    color: tuple[int, int, int] | None = None
    """Colour of the class, else of the object."""
    name: str | None = None
    measurements: dict[str, float] = field(default_factory=dict)
    """Finite numbers only."""
    nucleus_geometry: BaseGeometry | None = None


def read_features(path: Path) -> Iterator[ParsedFeature]:
    """Read the objects of a GeoJSON file, one at a time.

    Reads a FeatureCollection, one bare Feature, a bare array of features or a bare geometry, gzipped or not, as any
    QuPath from 0.1 and its helpers wrote them. Broken polygons are repaired (polygon parts are kept), features without
    a geometry are passed over; one warning at the end counts and names them. Objects inside an object follow it.

    Raises:
        GeoJSONError: The file can't be read, is empty, cut off or not GeoJSON, or holds no feature; or a feature can't
            be understood. Features before the fault were handed out by then.
    """
    notes = _Notes()
    n_features = 0
    try:
        with _open_text(path) as stream:
            for number, raw in enumerate(_raw_features(_Scanner(stream)), 1):
                try:
                    parsed = _parse(raw, number, notes)
                except (_UnreadableError, RecursionError) as error:
                    raise GeoJSONError(f"{path}: feature {number}: {error}") from None
                n_features = number
                yield from parsed
    except GeoJSONError:
        raise
    except _UnreadableError as error:
        raise GeoJSONError(f"{path}: {error}") from None
    except json.JSONDecodeError as error:
        raise GeoJSONError(
            f"{path}: not JSON, or cut off, {_place(n_features)} ({error.msg}); export or copy it again"
        ) from None
    except UnicodeDecodeError:
        raise GeoJSONError(f"{path}: not UTF-8 text {_place(n_features)}; save it as GeoJSON in UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise GeoJSONError(f"{path}: gzip data cut off or damaged {_place(n_features)}; copy the file again") from None
    except (RecursionError, ValueError) as error:
        raise GeoJSONError(f"{path}: not GeoJSON {_place(n_features)} ({error})") from None
    except OSError as error:
        raise GeoJSONError(f"{path}: can't be read ({error.strerror or error}); check the path") from None
    finally:
        notes.log(path)
    if n_features == 0:
        raise GeoJSONError(f"{path}: holds no features; export the objects again")


def _place(n_features: int) -> str:
    return f"after feature {n_features}" if n_features else "before the first feature"


class _UnreadableError(Exception):
    """What was found can't be understood; turned into a GeoJSONError that says where."""


class _Notes:
    """What was repaired or passed over while reading; a few numbers each, so that memory stays flat."""

    def __init__(self) -> None:
        self._found: dict[str, list[int]] = {}
        self._counts: dict[str, int] = {}

    def add(self, what: str, number: int) -> None:
        self._counts[what] = self._counts.get(what, 0) + 1
        numbers = self._found.setdefault(what, [])
        if len(numbers) < 10:
            numbers.append(number)

    def log(self, path: Path) -> None:
        if not self._counts:
            return
        parts = []
        for what, count in self._counts.items():
            more = ", ..." if count > len(self._found[what]) else ""
            parts.append(f"{count} {what} (feature {', '.join(map(str, self._found[what]))}{more})")
        logger.warning("%s: %s", path, "; ".join(parts))


_REPAIRED: Final = "broken polygons repaired"
_LOST: Final = "broken polygons passed over, nothing left to repair"
_MISSING: Final = "features without geometry passed over"
_UNMEASURED: Final = "features with measurements that are no finite numbers, which are left out"


@contextlib.contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    with path.open("rb") as raw:
        packed = raw.peek(2)[:2] == b"\x1f\x8b"
        binary = gzip.GzipFile(fileobj=raw) if packed else raw
        with binary, io.TextIOWrapper(binary, encoding="utf-8-sig") as text:
            yield text


class _Scanner:
    """Takes JSON values one after another from a text stream; holds one of them, never the document."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._text = ""
        self._at = 0

    def _more(self) -> bool:
        # Reading as much again as is waiting keeps the work on one huge value linear.
        block = self._stream.read(max(_READ_CHARS, len(self._text) - self._at))
        self._text = self._text[self._at :] + block
        self._at = 0
        return bool(block)

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, wanted: str) -> str:
        """Step over one character that must be among those wanted."""
        found = self.peek()
        if not found or found not in wanted:
            raise json.JSONDecodeError(
                f"expected {' or '.join(wanted)}, found {found or 'the end'}", self._text, self._at
            )
        self._at += 1
        return found

    def value(self) -> Any:
        """Step over one value and return it."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # A value cut off by the block's end fails near there, or where an unfinished text began.
                cut = error.pos > len(self._text) - 32 or not error.msg.startswith("Expecting")
                if cut and self._more():
                    continue
                raise
            # A number at the block's end may go on in the next.
            if end < len(self._text) or not self._more():
                self._at = end
                return value

    def items(self) -> Iterator[Any]:
        """Step through an array."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def members(self) -> Iterator[str]:
        """Step through the keys of an object; the caller steps over the value before it asks for the next key."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            key = self.value()
            if not isinstance(key, str):
                raise json.JSONDecodeError("a key that is not text", self._text, self._at)
            self.take(":")
            yield key
            if self.take(",}") == "}":
                return


_SPACE: Final = re.compile(r"[ \t\r\n]*")


def _raw_features(scanner: _Scanner) -> Iterator[Any]:
    first = scanner.peek()
    if not first:
        raise _UnreadableError("is empty; export the objects again")
    if first == "[":
        yield from scanner.items()
    elif first == "{":
        yield from _raw_members(scanner)
    else:
        raise _UnreadableError(f"not GeoJSON: begins with {first!r}; export the objects as GeoJSON")
    if scanner.peek():
        raise _UnreadableError("text after the end of the document; one file holds one collection")


def _raw_members(scanner: _Scanner) -> Iterator[Any]:
    members: dict[str, Any] = {}
    streamed = False
    for key in scanner.members():
        if key == "features" and scanner.peek() == "[":
            yield from scanner.items()
            streamed = True
        else:
            members[key] = scanner.value()
    kind = members.get("type")
    if streamed or kind == "FeatureCollection":
        return
    if kind != "Feature" and kind not in _READABLE_TYPES:
        raise _UnreadableError(f"JSON, but not GeoJSON (type {_brief(kind)}); export the objects as GeoJSON")
    yield members


_READABLE_TYPES: Final = (*_GEOMETRY_TYPES, "MultiLineString", "GeometryCollection")


def _parse(raw: Any, number: int, notes: _Notes) -> list[ParsedFeature]:
    """The object of a raw feature and those inside it."""
    if raw is None:
        notes.add(_MISSING, number)
        return []
    if isinstance(raw, dict) and raw.get("type") in _READABLE_TYPES:
        raw = {"geometry": raw}
    if not isinstance(raw, dict) or "geometry" not in raw:
        raise _UnreadableError(f"not a feature: {_brief(raw)}")
    properties = raw.get("properties")
    if not isinstance(properties, dict):
        properties = {}
    parsed = []
    geometry = _read_geometry(raw["geometry"], number, notes)
    if geometry is not None:
        names, class_color = _read_classification(properties.get("classification"))
        name = properties.get("name")
        nucleus = raw.get("nucleusGeometry")
        parsed.append(
            ParsedFeature(
                geometry=geometry,
                object_type=_read_object_type(raw, properties),
                id=_read_id(raw.get("id")),
                names=names,
                color=class_color or _read_rgb(properties.get("color")) or _read_rgb(properties.get("colorRGB")),
                name=name if isinstance(name, str) and name else None,
                measurements=_read_measurements(properties.get("measurements"), number, notes),
                nucleus_geometry=None if nucleus is None else _read_geometry(nucleus, number, notes),
            )
        )
    for child in raw.get("childObjects") or ():
        parsed += _parse(child, number, notes)
    return parsed


def _read_object_type(raw: Mapping[str, Any], properties: Mapping[str, Any]) -> str:
    for place in (properties, raw):
        for key in ("objectType", "object_type", "id"):
            kind = place.get(key)
            if isinstance(kind, str):
                kind = kind.strip().lower().removeprefix("path").removesuffix("object")
                if kind in _OBJECT_TYPES:
                    return kind
    return "annotation"


def _read_id(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or re.fullmatch(r"Path\w+Object|", str(value)):
        return None
    return str(value)


def _read_classification(value: Any) -> tuple[tuple[str, ...], tuple[int, int, int] | None]:
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        return (), None
    names = value.get("names")
    if not isinstance(names, list):
        name = value.get("name")
        names = name.split(":") if isinstance(name, str) else []
    kept = tuple(name.strip() for name in names if isinstance(name, str) and name.strip())
    return kept, _read_rgb(value.get("color")) or _read_rgb(value.get("colorRGB"))


def _read_rgb(value: Any) -> tuple[int, int, int] | None:
    """Three numbers, ``#rrggbb``, or the packed integer that QuPath 0.1 and 0.2 wrote."""
    if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        value = int(value[1:], 16)
    if type(value) is int:
        return value >> 16 & 255, value >> 8 & 255, value & 255
    if (
        isinstance(value, list)
        and len(value) >= 3
        and all(type(c) in (int, float) and 0 <= c <= 255 for c in value[:3])
    ):
        return round(value[0]), round(value[1]), round(value[2])
    return None


def _read_measurements(value: Any, feature_number: int, notes: _Notes) -> dict[str, float]:
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = [(item.get("name"), item.get("value")) for item in value if isinstance(item, dict)]
    else:
        return {}
    kept = {
        name: float(number)
        for name, number in pairs
        if isinstance(name, str) and type(number) in (int, float) and -_DOUBLE_MAX <= number <= _DOUBLE_MAX
    }
    if len(kept) < len(pairs):
        notes.add(_UNMEASURED, feature_number)
    return kept


_DOUBLE_MAX: Final = float(np.finfo(np.float64).max)


def _read_geometry(value: Any, number: int, notes: _Notes) -> BaseGeometry | None:
    if value is None:
        notes.add(_MISSING, number)
        return None
    if not isinstance(value, dict):
        raise _UnreadableError(f"not a geometry: {_brief(value)}")
    kind = value.get("type")
    coordinates = value.get("coordinates")
    if kind == "GeometryCollection":
        raise _UnreadableError("a GeometryCollection; write one feature for each of its geometries")
    if kind not in _READABLE_TYPES:
        raise _UnreadableError(f"unknown geometry type {_brief(kind)}; known: {', '.join(_READABLE_TYPES[:-1])}")
    if not isinstance(coordinates, list):
        raise _UnreadableError(f"{kind} with coordinates {_brief(coordinates)}")
    if not coordinates:
        notes.add(_MISSING, number)
        return None
    if kind == "Point":
        return shapely.points(_read_positions([coordinates])[0])
    if kind == "MultiPoint":
        return shapely.multipoints(_read_positions(coordinates))
    if kind == "LineString":
        return _read_line(coordinates)
    if kind == "MultiLineString":
        return shapely.multilinestrings([_read_line(line) for line in coordinates])
    return _read_polygons([coordinates] if kind == "Polygon" else coordinates, number, notes)


def _read_line(coordinates: Any) -> BaseGeometry:
    positions = _read_positions(coordinates)
    if len(positions) < 2:
        raise _UnreadableError(f"a line of {len(positions)} positions")
    return shapely.linestrings(positions)


def _read_polygons(coordinates: list[Any], number: int, notes: _Notes) -> BaseGeometry | None:
    parts = []
    broken = False
    for part in coordinates:
        if not isinstance(part, list):
            raise _UnreadableError(f"a polygon with coordinates {_brief(part)}")
        rings: list[NDArray[np.float64]] = []
        for ring_number, ring in enumerate(part):
            positions = _read_positions(ring)
            if len(positions) and (positions[0] != positions[-1]).any():
                positions = np.concatenate([positions, positions[:1]])
                broken = True
            if len(positions) >= 4:
                rings.append(positions)
                continue
            broken = True
            if ring_number == 0:
                break  # holes mean nothing without their shell
        if rings:
            parts.append(shapely.polygons(rings[0], holes=rings[1:] or None))
        broken |= not rings
    shapes = _object_array(parts)
    shape = _join(shapes)
    if not shape.is_valid:
        broken = True
        shape = _make_valid(shape)
    if shape.is_empty:
        notes.add(_LOST, number)
        return None
    if broken:
        notes.add(_REPAIRED, number)
    return shape


def _read_positions(value: Any) -> NDArray[np.float64]:
    try:
        positions = np.asarray([position[:2] for position in value], np.float64).reshape(len(value), 2)
    except (TypeError, ValueError, KeyError, OverflowError):
        raise _UnreadableError(f"coordinates that are not lists of numbers: {_brief(value)}") from None
    if not np.isfinite(positions).all():
        raise _UnreadableError("a coordinate that is not finite")
    return positions
