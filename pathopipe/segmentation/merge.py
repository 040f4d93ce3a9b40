"""Merges what regions found into the layers of a slide: in centroid order, with neighbours, parents and ids."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from pathopipe.errors import StoreError
from pathopipe.geojson import stable_ids
from pathopipe.geometry import Outlines, join_outlines, outlines_from_shapes, outlines_to_shapes, take_outlines
from pathopipe.records import ObjectClass, ObjectTable
from pathopipe.segmentation.model import Layer
from pathopipe.segmentation.morphology import (
    GLAND_NAMES,
    MEASUREMENT_NAMES,
    NEIGHBOUR_NAMES,
    SHAPE_NAMES,
    assign_parents,
    gland_measurements,
    measure_shapes,
    neighbourhood,
)
from pathopipe.segmentation.segment import CELLS, Plan
from pathopipe.segmentation.stitch import RegionPieces, Side, Strip, join_pieces
from pathopipe.store import PartTable, SlideStore

__all__ = ["CELL_MEASUREMENT_NAMES", "merge_layers"]

_SIDES: tuple[Side, ...] = ("left", "right", "top", "bottom")
_ROWS = 20_000
_RELATED = ("glands", "lumina")
"""Joined layers whose objects lie in others, or hold some."""

# A cell bears what is known of its nucleus, and of itself a few numbers only: QuPath slows with every one.
_CELL_OWN = ("Area µm^2", "Circularity", "Haematoxylin OD mean", "Eosin OD mean", "DAB OD mean")
CELL_MEASUREMENT_NAMES: tuple[str, ...] = (
    *(f"Nucleus: {name}" for name in MEASUREMENT_NAMES),
    *(f"Cell: {name}" for name in _CELL_OWN),
    "Nucleus/Cell area ratio",
)


def merge_layers(
    store: SlideStore, plan: Plan, inputs: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]
) -> None:
    """Write every layer of a plan from its parts; those that are finished already stay.

    Nuclei are streamed, a row of regions at a time; large objects, which are few, are held in memory.

    Args:
        store: Every region's parts are there.
        plan: What was done.
        inputs: What each layer was computed from, by its name.
        about: What is worth keeping beside it.
    """
    pending = [name for name in plan.names if store.inputs(f"objects/{name}") is None]
    alone = [layer for layer in plan.layers if layer.joined and layer.name in pending and layer.name not in _RELATED]
    related = [name for name in pending if name not in {layer.name for layer in alone}]
    with ThreadPoolExecutor(1, thread_name_prefix="merge") as beside:
        # Half of merging is waiting for the disk, and what lies in nothing and holds nothing need not wait its turn.
        futures = [
            beside.submit(_merge_alone, store, plan, layer, _about(about, inputs, layer.name, store)) for layer in alone
        ]
        _merge_related(store, plan, related, inputs, about)
        for future in futures:
            future.result()


def _merge_alone(store: SlideStore, plan: Plan, layer: Layer, about: Mapping[str, Any]) -> None:
    store.write_objects(layer.name, _Large(plan, store, layer).tables(store, store.path.stem, None), about=about)


def _merge_related(
    store: SlideStore,
    plan: Plan,
    pending: list[str],
    inputs: Mapping[str, Mapping[str, Any]],
    about: Mapping[str, Any],
) -> None:
    """Merge the layers whose objects lie in one another."""
    slide_id = store.path.stem
    large = {layer.name: _Large(plan, store, layer) for layer in plan.layers if layer.joined and layer.name in pending}
    glands = large["glands"].shapes if "glands" in large else _stored_shapes(store, "glands")
    if glands is not None and "glands" in large:
        # Layers of earlier runs point to no glands, or to those that these replace.
        for name in ("nuclei", "lumina"):
            if name in store.layers() and name not in pending:
                _write_parents(store, name, glands)
    for layer in plan.layers:
        if layer.name in pending and not layer.joined:
            tables = _streamed(plan, store, slide_id, layer.name, layer.classes, glands)
            store.write_objects(layer.name, tables, about=_about(about, inputs, layer.name, store))
    if CELLS in pending:
        classes = next(layer.classes for layer in plan.layers if layer.name == "nuclei")
        tables = _streamed_cells(plan, store, slide_id, classes)
        store.write_objects(CELLS, tables, about=_about(about, inputs, CELLS, store))
    # Glands count their nuclei and lumina, so they come after them.
    for name in sorted(large, key=lambda name: name == "glands"):
        tables = large[name].tables(store, slide_id, glands)
        store.write_objects(name, tables, about=_about(about, inputs, name, store))


def _write_parents(store: SlideStore, layer: str, glands: NDArray[np.object_]) -> None:
    """Store a layer again with the glands that its objects lie in; all else stays as it was."""
    array = store.objects(layer)
    kept = {
        name: value
        for name, value in array.attributes.items()
        if name not in {"classes", "measurement_names", "parent_layer"}
    }

    def tables() -> Iterator[ObjectTable]:
        for table in array.batches(_ROWS):
            inner = table.centroid_l0 if layer == "nuclei" else outlines_to_shapes(table.outlines)
            yield replace(table, parent=assign_parents(inner, glands), parent_layer="glands")
        if not len(array):
            yield replace(array.read(), parent_layer="glands")

    store.write_objects(layer, tables(), about=kept)


def _about(
    about: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any]], layer: str, store: SlideStore
) -> dict[str, Any]:
    return {**about, "inputs": inputs[layer], "bad_windows": _count_bad(store.parts(layer))}


def _count_bad(parts: PartTable) -> int:
    return sum(int(parts.read(name, ("bad_windows",))["bad_windows"]) for name in parts.done())


def _region_rows(parts: PartTable) -> list[list[str]]:
    """Names of the parts, a row of regions each, from the top."""
    rows: dict[int, list[str]] = {}
    for name in sorted(parts.done(), key=lambda name: tuple(map(int, name.split("-")))):
        rows.setdefault(int(name.split("-")[0]), []).append(name)
    return list(rows.values())


def _read_row(parts: PartTable, names: list[str]) -> dict[str, Any]:
    """The objects of a row of regions, in centroid order: no object of a lower row comes before them."""
    read = [parts.read(name) for name in names]
    outlines = join_outlines([Outlines(*(part[name] for name in Outlines._fields)) for part in read])
    columns = {
        name: np.concatenate([part[name] for part in read])
        for name in ("centroid_px", "class_id", "class_probability", "measurements")
    }
    order = np.lexsort((columns["centroid_px"][:, 0], columns["centroid_px"][:, 1]))
    return {**{name: column[order] for name, column in columns.items()}, "outlines": take_outlines(outlines, order)}


def _all_centroids_px(parts: PartTable) -> NDArray[np.float64]:
    """(M, 2) in the order of the merged layer."""
    rows = []
    for names in _region_rows(parts):
        centroids = np.concatenate([parts.read(name, ("centroid_px",))["centroid_px"] for name in names])
        rows.append(centroids[np.lexsort((centroids[:, 0], centroids[:, 1]))])
    return np.concatenate(rows) if rows else np.empty((0, 2))


def _streamed(
    plan: Plan,
    store: SlideStore,
    slide_id: str,
    layer: str,
    classes: tuple[ObjectClass, ...],
    glands: NDArray[np.object_] | None,
) -> Iterator[ObjectTable]:
    parts = store.parts(layer)
    factor, mpp = np.asarray(plan.windows.factor_l0), np.asarray(plan.windows.grid.achieved_mpp)
    centroids_px = _all_centroids_px(parts)
    neighbours = neighbourhood(centroids_px * mpp)
    names = (*MEASUREMENT_NAMES, *NEIGHBOUR_NAMES)
    parent_layer = None if glands is None else "glands"
    first = 0
    for names_of_row in _region_rows(parts):
        row = _read_row(parts, names_of_row)
        n = len(row["class_id"])
        here = slice(first, first + n)
        centroid_l0 = row["centroid_px"] * factor
        yield ObjectTable(
            classes=classes,
            measurement_names=names,
            centroid_l0=centroid_l0,
            class_id=row["class_id"],
            class_probability=row["class_probability"],
            measurements=np.concatenate([row["measurements"], neighbours[here]], axis=1),
            outlines=row["outlines"],
            id=stable_ids(slide_id, layer, range(first, first + n)),
            parent=np.full(n, -1) if glands is None else assign_parents(centroid_l0, glands),
            parent_layer=parent_layer,
        )
        first += n
    if first == 0:
        yield _empty(classes, names, parent_layer)


def _streamed_cells(
    plan: Plan, store: SlideStore, slide_id: str, classes: tuple[ObjectClass, ...]
) -> Iterator[ObjectTable]:
    """Cells in the order of their nuclei, whose centroids they bear; so a cell's parent has the same row."""
    parts, nuclei = store.parts(CELLS), store.objects("nuclei")
    factor = np.asarray(plan.windows.factor_l0)
    own = [MEASUREMENT_NAMES.index(name) for name in _CELL_OWN]
    first = 0
    for names_of_row in _region_rows(parts):
        row = _read_row(parts, names_of_row)
        n = len(row["class_id"])
        of_nucleus = nuclei.column("measurements", slice(first, first + n))[:, : len(MEASUREMENT_NAMES)]
        of_cell = row["measurements"][:, own]
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = of_nucleus[:, MEASUREMENT_NAMES.index("Area µm^2")] / of_cell[:, 0]
        yield ObjectTable(
            classes=classes,
            measurement_names=CELL_MEASUREMENT_NAMES,
            centroid_l0=row["centroid_px"] * factor,
            class_id=row["class_id"],
            class_probability=row["class_probability"],
            measurements=np.concatenate([of_nucleus, of_cell, ratio[:, None]], axis=1),
            outlines=row["outlines"],
            id=stable_ids(slide_id, CELLS, range(first, first + n)),
            parent=np.arange(first, first + n),
            parent_layer="nuclei",
        )
        first += n
    if first != len(nuclei):
        raise StoreError(
            f"{slide_id}: {first} cells for {len(nuclei)} nuclei; find both anew with 'pathopipe segment --fresh "
            "--tasks nuclei,cells'",
            slide_id=slide_id,
        )
    if first == 0:
        yield _empty(classes, CELL_MEASUREMENT_NAMES, "nuclei")


class _Large:
    """The joined objects of one layer, in centroid order."""

    def __init__(self, plan: Plan, store: SlideStore, layer: Layer) -> None:
        self._layer = layer
        self._pixel_l0 = plan.windows.factor_l0
        self._mpp = (
            plan.windows.grid.achieved_mpp[0] / plan.windows.factor_l0[0],
            plan.windows.grid.achieved_mpp[1] / plan.windows.factor_l0[1],
        )
        parts = store.parts(layer.name)
        regions: dict[tuple[int, int], RegionPieces] = {}
        columns: dict[str, list[NDArray[Any]]] = {"class_id": [], "class_probability": [], "area_px": []}
        for name in sorted(parts.done()):
            part = parts.read(name)
            row, column = map(int, name.split("-"))
            regions[row, column] = RegionPieces(
                part["label"],
                outlines_to_shapes(Outlines(*(part[name] for name in Outlines._fields))),
                {side: Strip(part[f"{side}_at"], part[f"{side}_label"]) for side in _SIDES},
            )
            for key, values in columns.items():
                values.append(part[key])
        shapes, object_of_piece, _ = join_pieces(regions, joined_share=layer.joined_share)
        class_id, class_probability, area_px = (
            np.concatenate(values) if values else np.empty(0) for values in columns.values()
        )
        shapes = _clean(shapes, layer, self._mpp)
        self._class_id, self._probability = _vote(
            object_of_piece, class_id, class_probability, area_px, len(shapes), len(layer.classes)
        )
        centroid = shapely.get_coordinates(shapely.centroid(shapes)) if len(shapes) else np.empty((0, 2))
        kept = np.flatnonzero(~shapely.is_empty(shapes))
        # An emptied object has no centroid: get_coordinates leaves it out.
        order = np.lexsort((centroid[:, 0], centroid[:, 1]))
        self.shapes: NDArray[np.object_] = shapes[kept][order]
        self._centroid_l0 = centroid[order]
        self._class_id, self._probability = self._class_id[kept][order], self._probability[kept][order]

    def tables(self, store: SlideStore, slide_id: str, glands: NDArray[np.object_] | None) -> Iterator[ObjectTable]:
        """The rows of the layer."""
        layer, n = self._layer, len(self.shapes)
        names, measurements = SHAPE_NAMES, measure_shapes(self.shapes, mpp=self._mpp, pixel_l0=self._pixel_l0)
        parent, parent_layer = np.full(n, -1), None
        if layer.name == "glands":
            names = (*SHAPE_NAMES, *GLAND_NAMES)
            measurements = np.concatenate([measurements, self._gland_measurements(store)], axis=1)
        elif layer.name == "lumina" and glands is not None:
            parent, parent_layer = assign_parents(self.shapes, glands), "glands"
        if n == 0:
            yield _empty(layer.classes, names, parent_layer)
        outlines = outlines_from_shapes(self.shapes)
        for first in range(0, n, _ROWS):
            rows = np.arange(first, min(first + _ROWS, n))
            yield ObjectTable(
                classes=layer.classes,
                measurement_names=names,
                centroid_l0=self._centroid_l0[rows],
                class_id=self._class_id[rows],
                class_probability=self._probability[rows],
                measurements=measurements[rows].astype(np.float32),
                outlines=take_outlines(outlines, rows),
                id=stable_ids(slide_id, layer.name, rows.tolist()),
                parent=parent[rows],
                parent_layer=parent_layer,
            )

    def _gland_measurements(self, store: SlideStore) -> NDArray[np.float32]:
        """What glands hold, from the layers of nuclei and lumina where these are there; NaN otherwise."""
        layers = store.layers()
        nucleus_parent = store.objects("nuclei").column("parent") if "nuclei" in layers else None
        lumina = store.objects("lumina") if "lumina" in layers else None
        lumen_parent = lumen_um2 = None
        if lumina is not None:
            lumen_parent = lumina.column("parent")
            lumen_um2 = lumina.column("measurements")[:, lumina.measurement_names.index("Area µm^2")]
        return gland_measurements(
            self.shapes,
            mpp=self._mpp,
            nucleus_parent=nucleus_parent,
            lumen_parent=lumen_parent,
            lumen_area_um2=lumen_um2,
        )


def _clean(shapes: NDArray[np.object_], layer: Layer, mpp: tuple[float, float]) -> NDArray[np.object_]:
    """Fill small holes and empty small objects."""
    pixel_um2 = mpp[0] * mpp[1]
    cleaned = shapes.copy()
    if layer.min_hole_um2:
        for index in np.flatnonzero(_counts_holes(shapes)).tolist():
            polygons = [
                _without_holes(part, layer.min_hole_um2 / pixel_um2) for part in shapely.get_parts(shapes[index])
            ]
            cleaned[index] = shapely.normalize(polygons[0] if len(polygons) == 1 else shapely.union_all(polygons))
    small = shapely.area(cleaned) * pixel_um2 < layer.min_um2
    cleaned[small] = shapely.Polygon()
    return cleaned


def _counts_holes(shapes: NDArray[np.object_]) -> NDArray[np.int64]:
    """(n,) holes of each shape."""
    parts, owner = shapely.get_parts(shapes, return_index=True)
    return np.bincount(owner, shapely.get_num_interior_rings(parts), minlength=len(shapes)).astype(np.int64)


def _without_holes(polygon: shapely.Polygon, below_l0: float) -> shapely.Polygon:
    """The polygon with its holes of less than an area filled."""
    rings = shapely.get_rings(polygon)
    kept = shapely.area(shapely.polygons(rings[1:])) >= below_l0
    filled: shapely.Polygon = shapely.polygons(rings[0], rings[1:][kept])
    return filled


def _vote(
    object_of_piece: NDArray[np.int64],
    class_id: NDArray[Any],
    class_probability: NDArray[Any],
    area_px: NDArray[Any],
    n_objects: int,
    n_classes: int,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Class of each object: that of most of its area; its probability: the mean over that area."""
    votes = np.zeros((n_objects, n_classes))
    weighed = np.zeros((n_objects, n_classes))
    at = (object_of_piece, class_id.astype(np.int64))
    np.add.at(votes, at, area_px)
    np.add.at(weighed, at, area_px * class_probability.astype(np.float64))
    best = votes.argmax(axis=1)
    rows = np.arange(n_objects)
    probability = weighed[rows, best] / np.maximum(votes[rows, best], 1)
    return best.astype(np.uint8), probability.astype(np.float32)


def _stored_shapes(store: SlideStore, layer: str) -> NDArray[np.object_] | None:
    return outlines_to_shapes(store.objects(layer).read().outlines) if layer in store.layers() else None


def _empty(classes: tuple[ObjectClass, ...], names: tuple[str, ...], parent_layer: str | None) -> ObjectTable:
    return ObjectTable(
        classes=classes,
        measurement_names=names,
        centroid_l0=np.empty((0, 2)),
        class_id=np.empty(0, np.uint8),
        class_probability=np.empty(0, np.float32),
        measurements=np.empty((0, len(names)), np.float32),
        outlines=Outlines.empty(),
        id=np.empty((0, 16), np.uint8),
        parent=np.empty(0, np.int64),
        parent_layer=parent_layer,
    )
