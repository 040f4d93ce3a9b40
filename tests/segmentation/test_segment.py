"""A slide goes through windows, regions and merging, and comes out as it was drawn, whatever the regions."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from numpy.typing import NDArray
from scipy import ndimage

from pathopipe.errors import TileReadError
from pathopipe.geometry import Region, outlines_to_shapes
from pathopipe.records import ObjectClass, Tissue
from pathopipe.segmentation.merge import _clean, merge_layers
from pathopipe.segmentation.model import Instances, Layer
from pathopipe.segmentation.segment import Plan, SegmentReport, segment_regions
from pathopipe.slide.array import ArraySlide
from pathopipe.slide.base import Slide
from pathopipe.store import SlideStore
from pathopipe.tiles.grid import plan_windows

NUCLEI = Layer(name="nuclei", classes=(ObjectClass("Epithelial", (200, 0, 0)), ObjectClass("Lymphocyte", (0, 0, 200))))
GLANDS = Layer(name="glands", classes=(ObjectClass("Gland", (0, 160, 0)),), joined=True)
LUMINA = Layer(name="lumina", classes=(ObjectClass("Lumen", (250, 250, 0)),), joined=True)


def coded(
    nuclei: NDArray[np.int32], glands: NDArray[np.int32] | None = None, lumina: NDArray[np.int32] | None = None
) -> NDArray[np.uint8]:
    """(height, width, 3) RGB: 16 bits for the nucleus, 4 each for gland and lumen; white where there is nothing."""
    assert nuclei.max(initial=0) < 65535
    red, green = nuclei & 255, nuclei >> 8
    blue = np.zeros_like(nuclei)
    for shift, labels in ((0, glands), (4, lumina)):
        if labels is not None:
            assert labels.max(initial=0) < 16
            blue |= labels << shift
    rgb = np.stack([red, green, blue], axis=-1).astype(np.uint8)
    rgb[(nuclei == 0) & (blue == 0)] = 255
    return rgb


def decoded(rgb: NDArray[np.uint8]) -> NDArray[np.int32]:
    """(..., 3) nucleus, gland and lumen of each pixel."""
    wide = rgb.astype(np.int32)
    nothing = (wide == 255).all(axis=-1)
    nuclei = wide[..., 0] | wide[..., 1] << 8
    planes = np.stack([nuclei, wide[..., 2] & 15, wide[..., 2] >> 4], axis=-1)
    planes[nothing] = 0
    return planes


@dataclass
class CodedModel:
    """Finds in each region exactly what the pixels say: connected pieces of each number."""

    layers: tuple[Layer, ...] = (NUCLEI, GLANDS, LUMINA)
    mpp: float = 0.5
    core_px: int = 32
    margin_px: int = 16
    overlap_px: int = 0
    categorical: tuple[int, ...] = ()
    halo_px: int = 24
    batch_size: int = 4
    identity: dict[str, Any] = field(default_factory=lambda: {"name": "coded"})
    seen_windows: int = 0

    def maps(self, windows: NDArray[np.uint8]) -> NDArray[np.int32]:
        self.seen_windows += len(windows)
        inner = slice(self.margin_px, -self.margin_px)
        return decoded(windows[:, inner, inner])

    def instances(self, maps: NDArray[np.int32]) -> dict[str, Instances]:
        found = {}
        for channel, layer in enumerate(self.layers):
            plane = maps[..., channel]
            labels = np.zeros(plane.shape, np.int32)
            of_label = []
            for number in np.unique(plane[plane > 0]).tolist():
                parts, n_parts = ndimage.label(plane == number)
                labels[parts > 0] = parts[parts > 0] + len(of_label)
                of_label += [number] * n_parts
            class_id = np.asarray(of_label, np.int64) % len(layer.classes)
            found[layer.name] = Instances(labels, class_id.astype(np.uint8), np.full(len(of_label), 0.5, np.float32))
        return found


SIDE_PX = (230, 170)
"""Width and height: no multiple of a window."""


def discs(seed: int, n: int, radius_px: float) -> NDArray[np.int32]:
    """Round nuclei, some of which touch, each in one piece."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: SIDE_PX[1], : SIDE_PX[0]]
    labels = np.zeros(SIDE_PX[::-1], np.int32)
    for number in range(1, n + 1):
        cx, cy = rng.uniform(0, SIDE_PX[0]), rng.uniform(0, SIDE_PX[1])
        labels[((x - cx) ** 2 + (y - cy) ** 2 < radius_px**2) & (labels == 0)] = number
    for number in range(1, n + 1):
        parts, n_parts = ndimage.label(labels == number)
        if n_parts > 1:
            labels[parts > 1] = 0
    return labels


@pytest.fixture(scope="module")
def truth() -> dict[str, NDArray[np.int32]]:
    nuclei = discs(0, 150, 5)
    y, x = np.mgrid[: SIDE_PX[1], : SIDE_PX[0]]
    glands, lumina = np.zeros_like(nuclei), np.zeros_like(nuclei)
    for number, (cx, cy, radius) in enumerate([(60, 60, 45), (160, 70, 50), (120, 140, 24)], 1):
        distance = np.hypot(x - cx, y - cy)
        glands[(distance < radius) & (glands == 0)] = number
        lumina[(distance < radius / 3) & (glands == number)] = number
    nuclei[lumina > 0] = 0
    for number in np.unique(nuclei).tolist()[1:]:
        parts, n_parts = ndimage.label(nuclei == number)
        if n_parts > 1:
            nuclei[parts > 1] = 0
    return {"nuclei": nuclei, "glands": glands, "lumina": lumina}


def make_plan(slide: Slide, model: CodedModel, region_px: int, *, tissue: NDArray[np.uint8] | None = None) -> Plan:
    mask = np.ones((17, 23), np.uint8) if tissue is None else tissue
    found = Tissue(mask=mask, mpp=(5.0, 5.0), polygons=(), areas_mm2=())
    windows = plan_windows(
        slide.info,
        (0.5, 0.5),
        found,
        mpp=model.mpp,
        core_px=model.core_px,
        margin_px=model.margin_px,
        allow_enlarge=False,
    )
    return Plan(
        model=model,
        layers=model.layers,
        windows=windows,
        tissue=found,
        dims_l0=slide.info.dims_l0,
        region_px=region_px,
        cell_expansion_um=2.0,
    )


def run(slide: Slide, store: SlideStore, plan: Plan) -> SegmentReport:
    for name in plan.names:
        store.begin_objects(name, {"of": name}, regions=str(plan.region_px))
    report = segment_regions(slide, store, plan, threads=2)
    merge_layers(store, plan, {name: {"of": name} for name in plan.names}, {"mpp": (0.5, 0.5)})
    return report


def segmented(truth: dict[str, NDArray[np.int32]], folder: Path, region_px: int) -> SlideStore:
    slide = ArraySlide(coded(**truth), slide_id="s", mpp=0.5)
    store = SlideStore.create_or_open(folder / "s.zarr", slide.info, created_by="test")
    run(slide, store, make_plan(slide, CodedModel(), region_px))
    return store


def everything(store: SlideStore) -> dict[str, list[object]]:
    """All that is stored of every layer, as values that compare."""
    content: dict[str, list[object]] = {}
    for layer in store.layers():
        array = store.objects(layer)
        table = array.read()
        columns = [table.centroid_l0, table.class_id, table.class_probability, table.measurements, table.id]
        content[layer] = [
            array.measurement_names,
            array.classes,
            array.parent_layer,
            *(column.tobytes() for column in (*columns, table.parent, *table.outlines)),
        ]
    return content


@pytest.fixture(scope="module")
def whole(truth: dict[str, NDArray[np.int32]], tmp_path_factory: pytest.TempPathFactory) -> SlideStore:
    return segmented(truth, tmp_path_factory.mktemp("whole"), 1024)


@pytest.mark.parametrize("region_px", [32, 64, 96, 160])
def test_any_region_size_gives_the_same_objects_to_the_last_byte(
    truth: dict[str, NDArray[np.int32]], whole: SlideStore, tmp_path: Path, region_px: int
) -> None:
    store = segmented(truth, tmp_path, region_px)
    assert everything(store) == everything(whole)
    assert not list(store.path.glob("objects/*/parts"))
    assert not [problem for problem in store.problems() if problem.where.startswith("objects")]


@pytest.mark.parametrize("layer", ["nuclei", "glands", "lumina"])
def test_the_objects_are_those_that_were_drawn(
    truth: dict[str, NDArray[np.int32]], whole: SlideStore, layer: str
) -> None:
    table = whole.objects(layer).read()
    labels = truth[layer]
    numbers = np.unique(labels[labels > 0])
    shapes = outlines_to_shapes(table.outlines)
    assert len(table) == len(numbers) > 2
    assert shapely.is_valid(shapes).all()
    centroids = ndimage.center_of_mass(labels > 0, labels, numbers)
    drawn = sorted((y + 0.5, x + 0.5, int((labels == n).sum())) for (y, x), n in zip(centroids, numbers, strict=True))
    found = [(y, x, area) for (x, y), area in zip(table.centroid_l0.tolist(), shapely.area(shapes), strict=True)]
    assert np.asarray(found) == pytest.approx(np.asarray(drawn))
    area_um2 = table.measurements[:, table.measurement_names.index("Area µm^2")]
    assert area_um2 == pytest.approx(shapely.area(shapes) * 0.25)


def test_classes_probabilities_and_ids_stay_with_their_objects(
    truth: dict[str, NDArray[np.int32]], whole: SlideStore
) -> None:
    table = whole.objects("nuclei").read()
    at = np.floor(table.centroid_l0).astype(int)
    number = truth["nuclei"][at[:, 1], at[:, 0]]
    there = number > 0  # the centroid of a nucleus that a neighbour cuts into may lie outside it
    assert there.mean() > 0.9
    assert (table.class_id[there] == number[there] % 2).all()
    assert set(table.class_probability.tolist()) == {0.5}
    assert len(np.unique(table.id, axis=0)) == len(table)


def test_nuclei_know_their_gland_and_glands_what_they_hold(
    truth: dict[str, NDArray[np.int32]], whole: SlideStore
) -> None:
    nuclei, glands, lumina = (whole.objects(layer).read() for layer in ("nuclei", "glands", "lumina"))
    at = np.floor(nuclei.centroid_l0).astype(int)
    inside = truth["glands"][at[:, 1], at[:, 0]] > 0
    assert ((nuclei.parent >= 0) == inside).all()
    assert 0 < inside.sum() < len(nuclei)
    counts = glands.measurements[:, glands.measurement_names.index("Nucleus count")]
    assert counts.tolist() == np.bincount(nuclei.parent[inside], minlength=len(glands)).tolist()
    assert sorted(lumina.parent.tolist()) == [0, 1, 2]
    share = glands.measurements[:, glands.measurement_names.index("Lumen share")]
    area = shapely.area(outlines_to_shapes(lumina.outlines))[np.argsort(lumina.parent)]
    assert share == pytest.approx(area / shapely.area(outlines_to_shapes(glands.outlines)))


def test_cells_hold_their_nucleus_and_do_not_overlap(whole: SlideStore) -> None:
    cells, nuclei = whole.objects("cells").read(), whole.objects("nuclei").read()
    assert cells.parent.tolist() == list(range(len(nuclei)))
    assert whole.objects("cells").parent_layer == "nuclei"
    cell_shapes, nucleus_shapes = outlines_to_shapes(cells.outlines), outlines_to_shapes(nuclei.outlines)
    assert shapely.covers(cell_shapes, nucleus_shapes).all()
    assert shapely.union_all(cell_shapes).area == pytest.approx(shapely.area(cell_shapes).sum())
    assert (shapely.hausdorff_distance(cell_shapes, nucleus_shapes) <= 4 + 1.5).all()  # 2 um are 4 px
    names = cells.measurement_names
    ratio = cells.measurements[:, names.index("Nucleus/Cell area ratio")]
    assert ratio == pytest.approx(shapely.area(nucleus_shapes) / shapely.area(cell_shapes), rel=1e-5)


def test_each_window_is_seen_once(truth: dict[str, NDArray[np.int32]], tmp_path: Path) -> None:
    slide, model = ArraySlide(coded(**truth), slide_id="s", mpp=0.5), CodedModel()
    store = SlideStore.create_or_open(tmp_path / "s.zarr", slide.info, created_by="test")
    plan = make_plan(slide, model, 64)
    report = run(slide, store, plan)
    assert report.windows == model.seen_windows == len(plan.windows.grid) == 8 * 6


def test_the_model_is_at_the_next_windows_while_regions_are_put_together(
    truth: dict[str, NDArray[np.int32]], whole: SlideStore, tmp_path: Path
) -> None:
    """Windows that are read ahead must not be overwritten under the model that looks at them."""
    told: list[int] = []

    class Slow(CodedModel):
        def maps(self, windows: NDArray[np.uint8]) -> NDArray[np.int32]:
            before = windows.copy()
            time.sleep(0.02)  # all buffers of the stream are filled again meanwhile, if they can be
            assert (windows == before).all()
            told.append(len(windows))
            return super().maps(windows)

    slide = ArraySlide(coded(**truth), slide_id="s", mpp=0.5)
    store = SlideStore.create_or_open(tmp_path / "s.zarr", slide.info, created_by="test")
    seen: list[tuple[int, int]] = []

    def on_windows(done: int, total: int) -> None:
        # One batch ahead, and no more: memory is bounded.
        seen.append((done, sum(told)))
        assert total == 48

    plan = replace(make_plan(slide, Slow(), 64), cell_expansion_um=None)
    for name in plan.names:
        store.begin_objects(name, {"of": name}, regions="64")
    report = segment_regions(slide, store, plan, threads=2, on_windows=on_windows)
    merge_layers(store, plan, {name: {"of": name} for name in plan.names}, {"mpp": (0.5, 0.5)})
    assert [done for done, _ in seen] == list(range(4, 49, 4))
    assert all(done <= mapped <= done + 4 for done, mapped in seen)
    assert report.model_s >= 12 * 0.02
    assert everything(store) == {layer: of for layer, of in everything(whole).items() if layer != "cells"}


def test_regions_that_are_there_are_not_done_again(
    truth: dict[str, NDArray[np.int32]], whole: SlideStore, tmp_path: Path
) -> None:
    class StoppedError(Exception):
        pass

    class Stopping(CodedModel):
        def maps(self, windows: NDArray[np.uint8]) -> NDArray[np.int32]:
            if self.seen_windows > 30:
                raise StoppedError
            return super().maps(windows)

    slide = ArraySlide(coded(**truth), slide_id="s", mpp=0.5)
    store = SlideStore.create_or_open(tmp_path / "s.zarr", slide.info, created_by="test")
    # Without cells, whose wide halo would want nearly all of this small slide for the first region.
    with pytest.raises(StoppedError):
        run(slide, store, replace(make_plan(slide, Stopping(), 64), cell_expansion_um=None))
    n_done = len(store.parts("nuclei").done())
    assert 0 < n_done < 12
    assert not store.layers()
    model = CodedModel()
    report = run(slide, store, replace(make_plan(slide, model, 64), cell_expansion_um=None))
    assert report.regions == 12 - n_done
    assert model.seen_windows < 48
    assert everything(store) == {layer: of for layer, of in everything(whole).items() if layer != "cells"}


def test_nothing_is_found_outside_tissue(truth: dict[str, NDArray[np.int32]], tmp_path: Path) -> None:
    slide = ArraySlide(coded(**truth), slide_id="s", mpp=0.5)
    store = SlideStore.create_or_open(tmp_path / "s.zarr", slide.info, created_by="test")
    mask = np.zeros((17, 23), np.uint8)
    mask[:, :9] = 1
    plan = make_plan(slide, CodedModel(), 64, tissue=mask)
    run(slide, store, plan)
    x_l0 = store.objects("nuclei").read().centroid_l0[:, 0]
    assert len(x_l0) > 0
    assert x_l0.max() < 90
    assert len(plan.windows.grid) < 48


def test_a_slide_without_tissue_has_empty_layers(truth: dict[str, NDArray[np.int32]], tmp_path: Path) -> None:
    slide = ArraySlide(coded(**truth), slide_id="s", mpp=0.5)
    store = SlideStore.create_or_open(tmp_path / "s.zarr", slide.info, created_by="test")
    run(slide, store, make_plan(slide, CodedModel(), 64, tissue=np.zeros((17, 23), np.uint8)))
    assert {layer: len(store.objects(layer)) for layer in store.layers()} == dict.fromkeys(
        ("cells", "glands", "lumina", "nuclei"), 0
    )
    assert not [problem for problem in store.problems() if problem.where.startswith("objects")]


def test_unreadable_windows_hold_nothing_and_are_counted(
    truth: dict[str, NDArray[np.int32]], whole: SlideStore, tmp_path: Path
) -> None:
    class Torn(ArraySlide):
        def read(self, region: Region) -> NDArray[np.uint8]:
            if (region.x_l0, region.y_l0) == (64 - 16, 32 - 16):
                raise TileReadError("torn")
            return super().read(region)

    slide = Torn(coded(**truth), slide_id="s", mpp=0.5)
    store = SlideStore.create_or_open(tmp_path / "s.zarr", slide.info, created_by="test")
    report = run(slide, store, make_plan(slide, CodedModel(), 64))
    assert report.bad_windows == 1
    assert report.faults == ("torn",)
    assert store.objects("nuclei").attributes["bad_windows"] == 1
    centroid = store.objects("nuclei").read().centroid_l0
    inside = (np.abs(centroid - [80, 48]) < 10).all(axis=1)
    assert not inside.any()
    assert 0 < len(centroid) < len(whole.objects("nuclei"))


def test_small_joined_objects_go_only_after_joining(truth: dict[str, NDArray[np.int32]], tmp_path: Path) -> None:
    slide = ArraySlide(coded(**truth), slide_id="s", mpp=0.5)
    store = SlideStore.create_or_open(tmp_path / "s.zarr", slide.info, created_by="test")
    plan = make_plan(slide, CodedModel(), 32)
    areas = sorted((truth["glands"] == number).sum() * 0.25 for number in (1, 2, 3))
    glands = replace(plan.layers[1], min_um2=(areas[0] + areas[1]) / 2)
    run(slide, store, replace(plan, layers=(plan.layers[0], glands, plan.layers[2])))
    found = store.objects("glands").read()
    assert sorted(found.measurements[:, 0].tolist()) == pytest.approx(areas[1:])


def test_small_holes_of_large_objects_are_filled_and_small_parts_go() -> None:
    def square(x: int, y: int, side: int) -> list[tuple[int, int]]:
        return [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]

    holed = shapely.Polygon(square(0, 0, 100), [square(10, 10, 2), square(30, 30, 20), square(60, 60, 3)])
    parts = shapely.MultiPolygon(
        [shapely.Polygon(square(300, 0, 40), [square(310, 9, 2)]), shapely.box(400, 0, 440, 9)]
    )
    shapes = np.array([holed, parts, shapely.box(0, 200, 1, 201)], object)
    layer = replace(GLANDS, min_um2=1.0, min_hole_um2=5.0)
    cleaned = _clean(shapes, layer, (0.5, 0.5))
    assert cleaned[0].equals(shapely.Polygon(square(0, 0, 100), [square(30, 30, 20)]))
    assert cleaned[1].equals(shapely.union(shapely.box(300, 0, 340, 40), shapely.box(400, 0, 440, 9)))
    assert cleaned[2].is_empty
