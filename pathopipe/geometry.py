"""Frames, units and conversions: level-0 pixels, level pixels, micrometres; polygons to flat arrays and back.

The one stored frame is level 0: int64 pixels, x right, y down, top-left corner, of the whole scan.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from shapely.geometry import Polygon

__all__ = ["BoxL0", "Ragged", "Region", "polygons_from_ragged", "polygons_to_ragged"]


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
