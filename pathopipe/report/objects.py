"""Pictures to judge a segmentation by: fields of a slide with the outlines that were found."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import TileReadError
from pathopipe.geometry import Outlines, Region, take_outlines
from pathopipe.slide.base import Slide
from pathopipe.slide.resolution import require_mpp
from pathopipe.store import ObjectArray, SlideStore

__all__ = ["FIELD_UM", "choose_fields", "draw_fields", "draw_objects"]

FIELD_UM = 128.0
"""Side of a small field."""

_FIELD_PX = 448
_COLUMNS, _ROWS = 3, 2
_GAP_PX = 8
_SUBPIXEL_BITS = 4
_BAR_UM = 20.0
_MOST_A_FIELD = 20_000

_MOST_FIELDS = 3
_WIDE_UM = 400.0
_WIDE_PX = 800
_WIDE_BAR_UM = 100.0
_CAPTION_PX = 26
_TEXT_SCALE = 0.55
_LARGE = ("tissue_types", "glands", "lumina")
"""Layers of few objects that may be larger than a field; they are drawn first and with a thicker line."""


class _Layer:
    """The objects of a layer, looked up by place."""

    def __init__(self, array: ObjectArray) -> None:
        self.array = array
        self.centroid_l0: NDArray[np.float64] = array.column("centroid_l0")
        self.class_id: NDArray[np.integer] = array.column("class_id")
        self._all = array.outlines() if array.layer in _LARGE else None
        self.thickness_px = 2 if array.layer in _LARGE else 1
        # What was grown from other objects stands back behind them.
        paleness = 0.5 if array.parent_layer == "nuclei" else 0.0
        self.colors = [tuple(round(c + (255 - c) * paleness) for c in each.color) for each in array.classes]

    def near(
        self, corner_l0: NDArray[np.float64], side_l0: NDArray[np.float64]
    ) -> tuple[Outlines, NDArray[np.integer]]:
        """Outlines and classes of consecutive objects, among them all that reach into a field."""
        if self._all is not None:
            return self._all, self.class_id
        # Rows are sorted by y, so those near the field are consecutive; half a field is more than any nucleus is long.
        first, last = np.searchsorted(
            self.centroid_l0[:, 1], [corner_l0[1] - side_l0[1] / 2, corner_l0[1] + 1.5 * side_l0[1]]
        ).tolist()
        rows = slice(first, min(last, first + _MOST_A_FIELD))
        return self.array.outlines(rows), self.class_id[rows]


def draw_objects(slide: Slide, store: SlideStore, layers: Sequence[str]) -> NDArray[np.uint8] | None:
    """Draw six small fields of a slide with the outlines of some layers; types of tissue are left out.

    Args:
        slide: Where the pixels come from.
        store: Holds the layers.
        layers: Names, the one that chooses the fields first; later ones are drawn over earlier ones.

    Returns:
        (height, width, 3) uint8 RGB, a bar of 20 um in each field; None where there are no objects.
    """
    mpp = require_mpp(slide.info)
    side_l0 = (round(FIELD_UM / mpp[0]), round(FIELD_UM / mpp[1]))
    found = [_Layer(store.objects(layer)) for layer in layers if layer != "tissue_types"]
    fields = choose_fields(found[0].centroid_l0, side_l0, _COLUMNS * _ROWS) if found else []
    if not fields:
        return None
    step = _FIELD_PX + _GAP_PX
    rows = -(-len(fields) // _COLUMNS)
    picture = np.full((rows * step + _GAP_PX, min(len(fields), _COLUMNS) * step + _GAP_PX, 3), 255, np.uint8)
    for number, corner_l0 in enumerate(fields):
        field = _draw_field(slide, found, corner_l0, side_l0, _FIELD_PX)
        if field is None:
            continue
        _draw_bar(field, round(_BAR_UM / FIELD_UM * _FIELD_PX))
        top, left = number // _COLUMNS * step + _GAP_PX, number % _COLUMNS * step + _GAP_PX
        picture[top : top + _FIELD_PX, left : left + _FIELD_PX] = field
    return picture


def draw_fields(slide: Slide, store: SlideStore, layers: Sequence[str]) -> NDArray[np.uint8] | None:
    """Draw up to three fields of 400 um with the objects of all layers in the colours of their classes.

    They are the field with the most nuclei, that with the most glands, and the most varied one: that whose objects are
    most evenly of many classes (by their Shannon entropy). Where there are no glands or no classes, fields with the
    usual number of objects take their place.

    Args:
        slide: Where the pixels come from.
        store: Holds the layers.
        layers: Names; cells are left out.

    Returns:
        (height, width, 3) uint8 RGB with captions, a bar of 100 um and a legend; None where there are no objects.
    """
    mpp = require_mpp(slide.info)
    side_l0 = (round(_WIDE_UM / mpp[0]), round(_WIDE_UM / mpp[1]))
    order = sorted((name for name in layers if name != "cells"), key=lambda name: (name not in _LARGE, name))
    found = {name: _Layer(store.objects(name)) for name in order}
    fields = _telling_fields(found, side_l0)
    columns = []
    for caption, corner_l0 in fields:
        field = _draw_field(slide, list(found.values()), corner_l0, side_l0, _WIDE_PX)
        if field is None:
            continue
        _draw_bar(field, round(_WIDE_BAR_UM / _WIDE_UM * _WIDE_PX), f"{_WIDE_BAR_UM:.0f} um")
        column = np.full((_WIDE_PX + _CAPTION_PX + _GAP_PX, _WIDE_PX + _GAP_PX, 3), 255, np.uint8)
        column[_CAPTION_PX : _CAPTION_PX + _WIDE_PX, _GAP_PX:] = field
        _write(column, caption, (_GAP_PX, _CAPTION_PX - 8))
        columns.append(column)
    if not columns:
        return None
    picture = np.pad(np.concatenate(columns, axis=1), ((0, 0), (0, _GAP_PX), (0, 0)), constant_values=255)
    return np.concatenate([picture, _legend(list(found.values()), picture.shape[1])])


class _Field(NamedTuple):
    caption: str
    corner_l0: tuple[int, int]


def _telling_fields(layers: dict[str, _Layer], side_l0: tuple[int, int]) -> list[_Field]:
    """Fields of a fixed lattice, each once."""
    places, kinds = [], []
    n_kinds = 0
    for layer in layers.values():
        places.append(np.floor(layer.centroid_l0 / side_l0).astype(np.int64))
        kinds.append(layer.class_id.astype(np.int64) + n_kinds)
        n_kinds += len(layer.array.classes)
    if not sum(map(len, places)):
        return []
    where, at = np.unique(np.concatenate(places), axis=0, return_inverse=True)
    counts = np.zeros((len(where), n_kinds), np.int64)
    np.add.at(counts, (at.reshape(-1), np.concatenate(kinds)), 1)
    fields: list[_Field] = []
    taken = np.zeros(len(where), np.bool_)

    def take(score: NDArray[np.float64], caption: str) -> None:
        best = int(np.where(taken, -1, score).argmax())
        if not taken[best] and score[best] > 0:
            taken[best] = True
            corner = where[best] * side_l0
            fields.append(_Field(caption.format(score[best]), (int(corner[0]), int(corner[1]))))

    first = 0
    for name, layer in layers.items():
        n = len(layer.array.classes)
        if name in {"nuclei", "glands"} or len(layers) == 1:
            take(counts[:, first : first + n].sum(axis=1).astype(np.float64), f"most {name}: {{:.0f}}")
        first += n
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    entropy = -(share * np.log2(np.where(share > 0, share, 1))).sum(axis=1)
    n_objects = counts.sum(axis=1)
    # A handful of objects is varied by chance.
    take(np.where(n_objects >= np.median(n_objects), entropy, 0), "most varied")
    while len(fields) < _MOST_FIELDS and not taken.all():
        take(1 / (1 + np.abs(n_objects - np.median(n_objects))), "usual")
    return fields


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


def _draw_field(
    slide: Slide, layers: Sequence[_Layer], corner_l0: tuple[int, int], side_l0: tuple[int, int], side_px: int
) -> NDArray[np.uint8] | None:
    """A square field with the outlines of some layers; None where it can't be read."""
    try:
        pixels = slide.read(Region(*corner_l0, 0, *side_l0))
    except TileReadError:
        return None
    field = np.asarray(cv2.resize(pixels, (side_px, side_px), interpolation=cv2.INTER_AREA), np.uint8)
    corner, side = np.asarray(corner_l0, np.float64), np.asarray(side_l0, np.float64)
    for layer in layers:
        for color, rings in _outlines_in(layer, corner, side):
            points = [
                np.rint(((ring - corner) / side * side_px - 0.5) * (1 << _SUBPIXEL_BITS)).astype(np.int32)
                for ring in rings
            ]
            cv2.polylines(field, points, True, color, layer.thickness_px, cv2.LINE_AA, _SUBPIXEL_BITS)
    return field


def _outlines_in(
    layer: _Layer, corner: NDArray[np.float64], side: NDArray[np.float64]
) -> Iterator[tuple[tuple[int, ...], list[NDArray[np.float32]]]]:
    """Colour and rings of each object of a layer that reaches into a field."""
    outlines, class_id = layer.near(corner, side)
    if not len(class_id):
        return
    starts = _vertex_bounds(outlines)
    has_outline = np.flatnonzero(np.diff(starts))
    low = np.minimum.reduceat(outlines.vertices_l0, starts[has_outline])
    high = np.maximum.reduceat(outlines.vertices_l0, starts[has_outline])
    reaches_in = ((low < corner + side) & (high > corner)).all(axis=1)
    rows = has_outline[reaches_in]
    for rings, number in zip(_rings(take_outlines(outlines, rows)), class_id[rows].tolist(), strict=True):
        yield layer.colors[number], rings


def _vertex_bounds(outlines: Outlines) -> NDArray[np.int64]:
    """(objects + 1,) where the vertices of each object begin."""
    bounds: NDArray[np.int64] = outlines.ring_offsets[outlines.polygon_offsets[outlines.object_offsets]]
    return bounds


def _rings(outlines: Outlines) -> list[list[NDArray[np.float32]]]:
    """The rings of each object."""
    rings = np.split(outlines.vertices_l0, outlines.ring_offsets[1:-1])
    bounds = outlines.polygon_offsets[outlines.object_offsets].tolist()
    return [rings[start:stop] for start, stop in itertools.pairwise(bounds)]


def _draw_bar(field: NDArray[np.uint8], bar_px: int, label: str = "") -> None:
    bottom = field.shape[0]
    if label:
        width_px = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, _TEXT_SCALE, 1)[0][0]
        cv2.rectangle(field, (6, bottom - 40), (20 + max(bar_px, width_px), bottom - 6), (255, 255, 255), cv2.FILLED)
        _write(field, label, (12, bottom - 24))
    cv2.rectangle(field, (12, bottom - 18), (12 + bar_px, bottom - 12), (0, 0, 0), cv2.FILLED)


def _legend(layers: Sequence[_Layer], width_px: int) -> NDArray[np.uint8]:
    """The classes of all layers beside their colours, in as many lines as they need."""
    lines: list[NDArray[np.uint8]] = []
    left = width_px
    for layer in layers:
        for each, color in zip(layer.array.classes, layer.colors, strict=True):
            text = f"{layer.array.layer.replace('_', ' ')}: {each.name}"
            text = text.encode("ascii", "replace").decode()  # OpenCV's letters are ASCII
            needs = 40 + cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, _TEXT_SCALE, 1)[0][0]
            if left + needs > width_px:
                lines.append(np.full((_CAPTION_PX, width_px, 3), 255, np.uint8))
                left = _GAP_PX
            cv2.line(lines[-1], (left, 13), (left + 18, 13), color, layer.thickness_px + 1)
            _write(lines[-1], text, (left + 24, 18))
            left += needs
    return np.concatenate(lines)


def _write(picture: NDArray[np.uint8], text: str, at: tuple[int, int]) -> None:
    cv2.putText(picture, text, at, cv2.FONT_HERSHEY_SIMPLEX, _TEXT_SCALE, (0, 0, 0), 1, cv2.LINE_AA)
