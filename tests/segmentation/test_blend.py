"""Windows are blended as one computation over the whole image would blend them, whatever part is looked at."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pathopipe.geometry import Region
from pathopipe.records import ObjectClass, Tissue
from pathopipe.segmentation.blend import Said, blend_borders, common_slices
from pathopipe.segmentation.merge import merge_layers
from pathopipe.segmentation.model import Instances, Layer
from pathopipe.segmentation.segment import Plan, segment_regions
from pathopipe.slide.array import ArraySlide
from pathopipe.store import SlideStore
from pathopipe.tiles.grid import plan_windows

CORE_PX = 24


def lattice(seed: int, columns: int, rows: int, overlap_px: int, *, missing: float = 0.0) -> list[Said]:
    """Windows that contradict each other in every pixel; some are missing."""
    rng = np.random.default_rng(seed)
    side = CORE_PX + 2 * overlap_px
    return [
        Said(column * CORE_PX, row * CORE_PX, rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        for row in range(rows)
        for column in range(columns)
        if rng.uniform() >= missing
    ]


def cores(said: list[Said], shape: tuple[int, int], overlap_px: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    maps, known = np.zeros((*shape, 3), np.uint8), np.zeros(shape, np.bool_)
    own = slice(overlap_px, overlap_px + CORE_PX)
    for x, y, found in said:
        maps[y : y + CORE_PX, x : x + CORE_PX] = found[own, own]
        known[y : y + CORE_PX, x : x + CORE_PX] = True
    return maps, known


def weighted_mean(said: list[Said], shape: tuple[int, int], overlap_px: int) -> NDArray[np.float64]:
    """The same in floating point, window by window over the whole image: weights fall linearly, in sixteenths."""
    total, weight = np.zeros((*shape, 3)), np.zeros(shape)
    for x, y, found in said:
        axes = []
        for start, length in ((y, shape[0]), (x, shape[1])):
            at = np.arange(length) + 0.5 - start
            rise = np.floor(np.clip((at + overlap_px) / (2 * overlap_px), 0, 1) * 16 + 0.5)
            fall = 16 - np.floor(np.clip((at - CORE_PX + overlap_px) / (2 * overlap_px), 0, 1) * 16 + 0.5)
            axes.append(np.minimum(rise, fall))
        share = np.outer(*axes)
        padded = np.zeros((*shape, 3))
        rows, from_rows = common_slices(y - overlap_px, len(found), shape[0])
        columns, from_columns = common_slices(x - overlap_px, len(found), shape[1])
        padded[rows, columns] = found[from_rows, from_columns]
        total += padded * share[..., None]
        weight += share
    return total / np.maximum(weight, 1)[..., None]


@given(
    seed=st.integers(0, 99),
    columns=st.integers(1, 3),
    rows=st.integers(1, 3),
    overlap_px=st.integers(1, 12),
    missing=st.sampled_from([0.0, 0.3]),
)
def test_borders_are_the_weighted_mean_of_what_windows_say(
    seed: int, columns: int, rows: int, overlap_px: int, missing: float
) -> None:
    said = lattice(seed, columns, rows, overlap_px, missing=missing)
    shape = (rows * CORE_PX, columns * CORE_PX)
    maps, known = cores(said, shape, overlap_px)
    blend_borders(maps, known, said, core_px=CORE_PX, overlap_px=overlap_px)
    expected = weighted_mean(said, shape, overlap_px) * known[..., None]
    assert np.abs(maps - expected).max(initial=0) <= 0.5 + 1e-9


@given(seed=st.integers(0, 99), order=st.randoms(use_true_random=False))
def test_neither_order_nor_part_changes_a_byte(seed: int, order: Any) -> None:
    overlap_px = 5
    said = lattice(seed, 3, 3, overlap_px, missing=0.2)
    maps, known = cores(said, (72, 72), overlap_px)
    whole = maps.copy()
    blend_borders(whole, known, said, core_px=CORE_PX, overlap_px=overlap_px)
    x, y = order.randrange(40), order.randrange(40)
    part = maps[y : y + 30, x : x + 30].copy()
    moved = [Said(each.x_px - x, each.y_px - y, each.maps) for each in said]
    order.shuffle(moved)
    blend_borders(part, known[y : y + 30, x : x + 30], moved, core_px=CORE_PX, overlap_px=overlap_px)
    assert (part == whole[y : y + 30, x : x + 30]).all()


def test_classes_are_left_to_the_window_whose_core_it_is() -> None:
    said = lattice(1, 2, 2, 6)
    maps, known = cores(said, (48, 48), 6)
    before = maps.copy()
    blend_borders(maps, known, said, core_px=CORE_PX, overlap_px=6, categorical=(1,))
    assert (maps[..., 1] == before[..., 1]).all()
    assert (maps[..., 0] != before[..., 0]).any()
    assert (maps[..., 2] != before[..., 2]).any()


def test_windows_that_agree_stay_as_they_are() -> None:
    truth = np.random.default_rng(0).integers(0, 256, (84, 84, 3), dtype=np.uint8)
    said = [Said(x, y, truth[y : y + CORE_PX + 12, x : x + CORE_PX + 12]) for y in (0, 24, 48) for x in (0, 24, 48)]
    maps, known = cores(said, (72, 72), 6)
    blend_borders(maps, known, said, core_px=CORE_PX, overlap_px=6)
    assert (maps == truth[6:-6, 6:-6]).all()


class EdgyModel:
    """A model as networks are: what it says of a pixel depends on where in the window the pixel lies.

    Objects are what is above 128 in the blended first channel, dark on the slide; their class comes from the second.
    """

    layers = (
        Layer(name="nuclei", classes=(ObjectClass("A", (200, 0, 0)), ObjectClass("B", (0, 0, 200)))),
        Layer(name="tissue_types", classes=(ObjectClass("T", (0, 99, 0)),), joined=True, joined_share=0),
    )
    mpp = 0.5
    core_px, margin_px, overlap_px = 32, 16, 8
    categorical = (1,)
    halo_px = 30
    batch_size = 3
    identity: dict[str, Any] = {"name": "edgy"}  # noqa: RUF012

    def __init__(self) -> None:
        self.seen: list[NDArray[np.uint8]] = []

    def maps(self, windows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        side = windows.shape[1]
        y, x = np.mgrid[:side, :side]
        off = (np.hypot(x - side / 2, y - side / 2) / 2).astype(np.int64)
        soft = np.clip(255 - windows[..., 0].astype(np.int64) - off, 0, 255)
        kind = (windows[..., 2].astype(np.int64) + x // 8) % 2 + 1
        edge = self.margin_px - self.overlap_px
        return np.stack([soft, kind], axis=-1)[:, edge:-edge, edge:-edge].astype(np.uint8)

    def instances(self, maps: NDArray[np.uint8]) -> dict[str, Instances]:
        from scipy import ndimage

        self.seen.append(maps)
        labels, n = ndimage.label(maps[..., 0] > 128)
        class_id = (np.asarray(ndimage.mean(maps[..., 1], labels, np.arange(1, n + 1))) > 1.5).astype(np.uint8)
        area, n_areas = ndimage.label(maps[..., 1] == 2)
        nothing = np.full(n_areas, np.nan, np.float32)
        return {
            "nuclei": Instances(labels.astype(np.int32), class_id, np.full(n, 0.5, np.float32)),
            "tissue_types": Instances(area.astype(np.int32), np.zeros(n_areas, np.uint8), nothing),
        }


def slide_of_spots() -> ArraySlide:
    rng = np.random.default_rng(4)
    y, x = np.mgrid[:150, :190]
    rgb = np.full((150, 190, 3), 235, np.uint8)
    for place in range(13 * 10):
        cx, cy = place % 13 * 15 + rng.uniform(4, 10), place // 13 * 15 + rng.uniform(4, 10)
        radius = rng.uniform(3, 5)
        rgb[np.hypot(x - cx, y - cy) < radius, 0] = rng.integers(35, 115)
    rgb[..., 2] = (x // 30 + y // 25) % 2
    return ArraySlide(rgb, slide_id="s", mpp=0.5)


def segmented(folder: Path, region_px: int) -> tuple[SlideStore, EdgyModel]:
    slide, model = slide_of_spots(), EdgyModel()
    mask = np.ones((15, 19), np.uint8)
    mask[9:, 12:] = 0
    tissue = Tissue(mask=mask, mpp=(5.0, 5.0), polygons=(), areas_mm2=())
    windows = plan_windows(slide.info, (0.5, 0.5), tissue, mpp=0.5, core_px=32, margin_px=16, allow_enlarge=False)
    plan = Plan(
        model=model,
        layers=model.layers,
        windows=windows,
        tissue=tissue,
        dims_l0=slide.info.dims_l0,
        region_px=region_px,
    )
    store = SlideStore.create_or_open(folder / f"{region_px}.zarr", slide.info, created_by="test")
    for name in plan.names:
        store.begin_objects(name, {}, regions=str(region_px))
    segment_regions(slide, store, plan, threads=2)
    merge_layers(store, plan, {name: {} for name in plan.names}, {})
    return store, model


def objects(store: SlideStore, layer: str) -> list[bytes]:
    table = store.objects(layer).read()
    columns = (table.centroid_l0, table.class_id, table.measurements, *table.outlines)
    return [column.tobytes() for column in columns]


def test_any_region_size_gives_the_same_objects_where_windows_overlap(tmp_path: Path) -> None:
    whole, model = segmented(tmp_path, 512)
    assert len(model.seen) == 1
    assert len(whole.objects("nuclei")) > 30
    assert len(whole.objects("tissue_types")) > 5
    for region_px in (32, 64, 96):
        store, _ = segmented(tmp_path, region_px)
        for layer in ("nuclei", "tissue_types"):
            assert objects(store, layer) == objects(whole, layer), (region_px, layer)


def test_a_region_sees_blended_maps(tmp_path: Path) -> None:
    _, model = segmented(tmp_path, 512)
    rgb = np.pad(slide_of_spots().read(Region(0, 0, 0, 190, 150)), ((16, 64), (16, 64), (0, 0)), constant_values=255)
    said = []
    for row in range(5):
        for column in range(6):
            window = rgb[row * 32 : row * 32 + 64, column * 32 : column * 32 + 64]
            # There is no tissue beyond (120, 90); these windows begin 16 px before their core.
            if row * 32 - 16 < 90 or column * 32 - 16 < 120:
                said.append(Said(column * 32, row * 32, model.maps(window[None])[0]))
    height, width = 160, 192
    maps, known = np.zeros((height, width, 2), np.uint8), np.zeros((height, width), np.bool_)
    for x, y, found in said:
        maps[y : y + 32, x : x + 32] = found[8:40, 8:40]
        known[y : y + 32, x : x + 32] = True
    blend_borders(maps, known, said, core_px=32, overlap_px=8, categorical=(1,))
    seen = model.seen[0][30 : 30 + 150, 30 : 30 + 190]
    assert (seen == maps[:150, :190]).all()


@pytest.mark.parametrize("side", [1, 7, 40])
def test_common_slices_are_of_equal_length_and_place(side: int) -> None:
    line = np.arange(20)
    for at in range(-50, 30):
        there, here = common_slices(at, side, len(line))
        assert line[there].tolist() == [at + k for k in range(side)[here]]
