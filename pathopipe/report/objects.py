"""A picture to judge a segmentation by: small fields from crowded to sparse, with the outlines that were found."""

import itertools
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import TileReadError
from pathopipe.geometry import Outlines, Region, take_outlines
from pathopipe.slide.base import Slide
from pathopipe.slide.resolution import require_mpp
from pathopipe.store import ObjectArray, SlideStore

__all__ = ["FIELD_UM", "choose_fields", "draw_objects"]

FIELD_UM = 128.0
"""Side of a field."""

_FIELD_PX = 448
_COLUMNS, _ROWS = 3, 2
_GAP_PX = 8
_SUBPIXEL_BITS = 4
_BAR_UM = 20.0
_MOST_A_FIELD = 20_000


def draw_objects(slide: Slide, store: SlideStore, layers: Sequence[str]) -> NDArray[np.uint8] | None:
    """Draw six fields of a slide with the outlines of some layers.

    Args:
        slide: Where the pixels come from.
        store: Holds the layers.
        layers: Names, the one that chooses the fields first; later ones are drawn over earlier ones.

    Returns:
        (height, width, 3) uint8 RGB, a bar of 20 um in each field; None where there are no objects.
    """
    mpp = require_mpp(slide.info)
    side_l0 = (round(FIELD_UM / mpp[0]), round(FIELD_UM / mpp[1]))
    arrays = [store.objects(layer) for layer in layers]
    fields = choose_fields(arrays[0].column("centroid_l0"), side_l0, _COLUMNS * _ROWS)
    if not fields:
        return None
    step = _FIELD_PX + _GAP_PX
    rows = -(-len(fields) // _COLUMNS)
    picture = np.full((rows * step + _GAP_PX, min(len(fields), _COLUMNS) * step + _GAP_PX, 3), 255, np.uint8)
    for number, (x_l0, y_l0) in enumerate(fields):
        try:
            pixels = slide.read(Region(x_l0, y_l0, 0, *side_l0))
        except TileReadError:
            continue
        field = cv2.resize(pixels, (_FIELD_PX, _FIELD_PX), interpolation=cv2.INTER_AREA)
        for array in arrays:
            _draw_layer(field, array, (x_l0, y_l0), side_l0)
        bar_px = round(_BAR_UM / FIELD_UM * _FIELD_PX)
        cv2.rectangle(field, (12, _FIELD_PX - 18), (12 + bar_px, _FIELD_PX - 12), (0, 0, 0), cv2.FILLED)
        top, left = number // _COLUMNS * step + _GAP_PX, number % _COLUMNS * step + _GAP_PX
        picture[top : top + _FIELD_PX, left : left + _FIELD_PX] = field
    return picture


def choose_fields(centroid_l0: NDArray[np.float64], side_l0: tuple[int, int], n: int) -> list[tuple[int, int]]:
    """Corners (x, y) of up to ``n`` fields of a fixed lattice, from the most crowded to rather sparse ones."""
    if not len(centroid_l0):
        return []
    place = np.floor(centroid_l0 / side_l0).astype(np.int64)
    places, counts = np.unique(place, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    # The sparsest quarter is the edge of the tissue, where a field shows glass.
    chosen = np.unique(np.rint(np.linspace(0, (len(order) - 1) * 0.75, n)).astype(np.int64))
    return [(int(x) * side_l0[0], int(y) * side_l0[1]) for x, y in places[order[chosen]].tolist()]


def _draw_layer(
    field: NDArray[np.uint8], array: ObjectArray, corner_l0: tuple[int, int], side_l0: tuple[int, int]
) -> None:
    corner, side = np.asarray(corner_l0), np.asarray(side_l0)
    centroid = array.column("centroid_l0")
    # Centroids are sorted by y, so those near the field are consecutive; half a field is more than any nucleus is long.
    first, last = np.searchsorted(centroid[:, 1], [corner[1] - side[1] / 2, corner[1] + 1.5 * side[1]]).tolist()
    table = array.read(slice(first, min(last, first + _MOST_A_FIELD)))
    # What was grown from other objects stands back behind them.
    paleness = 0.5 if array.parent_layer == "nuclei" else 0.0
    colors = [tuple(round(c + (255 - c) * paleness) for c in each.color) for each in array.classes]
    near = (np.abs(table.centroid_l0[:, 0] - corner[0] - side[0] / 2) < side[0]).nonzero()[0]
    for shape, class_id in zip(_rings(take_outlines(table.outlines, near)), table.class_id[near].tolist(), strict=True):
        points = [
            np.rint(((ring - corner) / side * _FIELD_PX - 0.5) * (1 << _SUBPIXEL_BITS)).astype(np.int32)
            for ring in shape
        ]
        cv2.polylines(field, points, True, colors[class_id], 1, cv2.LINE_AA, _SUBPIXEL_BITS)


def _rings(outlines: Outlines) -> list[list[NDArray[np.float32]]]:
    """The rings of each object."""
    rings = np.split(outlines.vertices_l0, outlines.ring_offsets[1:-1])
    bounds = outlines.polygon_offsets[outlines.object_offsets].tolist()
    return [rings[start:stop] for start, stop in itertools.pairwise(bounds)]
