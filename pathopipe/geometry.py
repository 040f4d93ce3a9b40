"""Frames, units and conversions: level-0 pixels, level pixels, micrometres; polygons to flat arrays and back.

The one stored frame is level 0: int64 pixels, x right, y down, top-left corner, of the whole scan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import Polygon

__all__ = [
    "BoxL0",
    "Outlines",
    "Ragged",
    "Region",
    "join_outlines",
    "outlines_from_shapes",
    "outlines_to_shapes",
    "polygons_from_ragged",
    "polygons_to_ragged",
    "take_outlines",
]


class BoxL0(NamedTuple):
    """A rectangle in level-0 pixels, top-left corner and size."""

    x_l0: int
    y_l0: int
    width_l0: int
    height_l0: int


@dataclass(frozen=True, slots=True)
class Region:
    """What one read asks for: a corner in level-0 pixels, a size in the pixels of ``level``.

    It may reach beyond the slide; what lies outside reads as white.
    """

    x_l0: int
    y_l0: int
    level: int
    width_px: int
    height_px: int


class Ragged(NamedTuple):
    """Polygons as flat arrays, the way a store keeps them.

    ``vertices_l0`` is (V, 2) float32 with closed rings; ring r is ``vertices_l0[ring_offsets[r]:ring_offsets[r + 1]]``;
    polygon p owns the rings ``polygon_offsets[p]:polygon_offsets[p + 1]``, shell first.
    """

    vertices_l0: NDArray[np.float32]
    ring_offsets: NDArray[np.int64]
    polygon_offsets: NDArray[np.int64]


def polygons_to_ragged(polygons: Sequence[Polygon]) -> Ragged:
    """Flatten polygons with holes into offsets and vertices."""
    rings: list[NDArray[np.float64]] = []
    polygon_offsets = [0]
    for polygon in polygons:
        rings.append(np.asarray(polygon.exterior.coords)[:, :2])
        rings.extend(np.asarray(hole.coords)[:, :2] for hole in polygon.interiors)
        polygon_offsets.append(len(rings))
    ring_offsets = np.cumsum([0, *map(len, rings)], dtype=np.int64)
    vertices = np.concatenate(rings).astype(np.float32) if rings else np.empty((0, 2), np.float32)
    return Ragged(vertices, ring_offsets, np.asarray(polygon_offsets, np.int64))


def polygons_from_ragged(ragged: Ragged) -> list[Polygon]:
    """Rebuild the polygons that :func:`polygons_to_ragged` flattened."""
    rings = [ragged.vertices_l0[a:b] for a, b in zip(ragged.ring_offsets, ragged.ring_offsets[1:], strict=False)]
    return [
        Polygon(rings[a], rings[a + 1 : b])
        for a, b in zip(ragged.polygon_offsets, ragged.polygon_offsets[1:], strict=False)
    ]


class Outlines(NamedTuple):
    """The outlines of M objects as flat arrays: each object is one polygon or several, with holes.

    ``vertices_l0`` is (V, 2) float32 with closed rings; ring r is ``vertices_l0[ring_offsets[r]:ring_offsets[r + 1]]``;
    polygon p owns the rings ``polygon_offsets[p]:polygon_offsets[p + 1]``, shell first; object m owns the polygons
    ``object_offsets[m]:object_offsets[m + 1]``. Offsets are int64, one more than there are items, and begin with 0.
    """

    vertices_l0: NDArray[np.float32]
    ring_offsets: NDArray[np.int64]
    polygon_offsets: NDArray[np.int64]
    object_offsets: NDArray[np.int64]

    @classmethod
    def empty(cls) -> "Outlines":
        """No objects."""
        none = np.zeros(1, np.int64)
        return cls(np.empty((0, 2), np.float32), none, none, none)


def outlines_to_shapes(outlines: Outlines) -> NDArray[np.object_]:
    """(M,) shapely Polygon or, where an object has several parts, MultiPolygon."""
    polygons = shapely.from_ragged_array(
        shapely.GeometryType.POLYGON,
        outlines.vertices_l0.astype(np.float64),
        (outlines.ring_offsets, outlines.polygon_offsets),
    )
    n_parts = np.diff(outlines.object_offsets)
    first = outlines.object_offsets[:-1]
    shapes = np.empty(len(n_parts), object)
    single = n_parts == 1
    shapes[single] = polygons[first[single]]
    for m in np.flatnonzero(~single).tolist():
        shapes[m] = shapely.multipolygons(polygons[first[m] : first[m] + n_parts[m]])
    return shapes


def outlines_from_shapes(shapes: Sequence[object] | NDArray[np.object_]) -> Outlines:
    """Flatten polygons and multipolygons, one object each."""
    parts, owner = shapely.get_parts(shapes, return_index=True)
    kind, vertices, offsets = shapely.to_ragged_array(parts) if len(parts) else (None, np.empty((0, 2)), None)
    if offsets is None:
        return Outlines.empty()._replace(object_offsets=np.zeros(len(shapes) + 1, np.int64))
    if kind != shapely.GeometryType.POLYGON:
        raise ValueError(f"outlines are of polygons, not of {kind}")
    return Outlines(
        vertices.astype(np.float32),
        offsets[0].astype(np.int64),
        offsets[1].astype(np.int64),
        np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(shapes)))]).astype(np.int64),
    )


def take_outlines(outlines: Outlines, rows: NDArray[np.integer]) -> Outlines:
    """The outlines of some objects, in the order of ``rows``."""
    polygons, object_offsets = _take_runs(outlines.object_offsets, rows)
    rings, polygon_offsets = _take_runs(outlines.polygon_offsets, polygons)
    vertices, ring_offsets = _take_runs(outlines.ring_offsets, rings)
    return Outlines(outlines.vertices_l0[vertices], ring_offsets, polygon_offsets, object_offsets)


def join_outlines(parts: Sequence[Outlines]) -> Outlines:
    """The outlines of several sets of objects, one after the other."""
    if not parts:
        return Outlines.empty()
    offsets = [
        np.concatenate([[0], *(np.diff(part[column]) for part in parts)]).cumsum().astype(np.int64)
        for column in (1, 2, 3)
    ]
    return Outlines(np.concatenate([part.vertices_l0 for part in parts]), *offsets)


def _take_runs(offsets: NDArray[np.int64], rows: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the items that some rows own, row after row, and the offsets of these rows among them."""
    lengths = offsets[rows + 1] - offsets[rows]
    taken = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items = np.arange(taken[-1]) + np.repeat(offsets[rows] - taken[:-1], lengths)
    return items, taken
