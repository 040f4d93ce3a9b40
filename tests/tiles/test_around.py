"""Grids around a grid: the same places at further resolutions, tile for tile."""

import re
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathopipe.config import TilesConfig, load_config
from pathopipe.errors import SlideError, UsageError
from pathopipe.geometry import Region
from pathopipe.records import Level, SlideInfo, TileGrid, Tissue
from pathopipe.slide.array import ArraySlide
from pathopipe.slide.base import Slide
from pathopipe.slide.open import open_slide
from pathopipe.slide.openslide import OpenSlideReader
from pathopipe.store import SlideStore
from pathopipe.synth import DrawnSlide, SynthSpec
from pathopipe.tiles.cellularity import select_cellular
from pathopipe.tiles.grid import check_fit, grid_around, grid_name, plan_grid, scales_around, tiles_settings
from pathopipe.tiles.read import TileStream, read_tile

sys.path.insert(0, str(Path(__file__).parents[1] / "slide"))

from slide_files import picture, write_svs

EVERYWHERE = Tissue(np.ones((1, 1), np.uint8), (8.0, 8.0), (), ())


def grids_around(
    grid: TileGrid, info: SlideInfo, mpp_l0: tuple[float, float], tissue: Tissue, config: TilesConfig
) -> list[TileGrid]:
    return [grid_around(grid, info, mpp_l0, tissue, config, scale_um) for scale_um in scales_around(config)]


def info_of(width: int, height: int, levels: tuple[tuple[float, tuple[int, ...]], ...] = ((1.0, ()),)) -> SlideInfo:
    pyramid = tuple(Level(int(width / d), int(height / d), d, d, scales=scales) for d, scales in levels)
    return SlideInfo("s", Path("s.tiff"), "array", "test", (width, height), pyramid, 0, "", None)


def plan(
    info: SlideInfo, mpp_l0: tuple[float, float], tissue: Tissue = EVERYWHERE, **settings: Any
) -> tuple[TileGrid, list[TileGrid]]:
    config = TilesConfig.model_validate(settings)
    grid = plan_grid(info, mpp_l0, tissue, config)
    return grid, grids_around(grid, info, mpp_l0, tissue, config)


@given(
    mpp_l0=st.tuples(st.floats(0.1, 0.5), st.floats(0.1, 0.5)),
    downsamples=st.sampled_from([(1.0,), (1.0, 2.0), (1.0, 4.0003, 16.01), (1.0, 1.9)]),
    mpp=st.floats(0.5, 1.5),
    scales=st.lists(st.floats(0.5, 4), min_size=1, max_size=3, unique_by=lambda um: f"{um:g}"),
    side=st.sampled_from([63, 64, 224, 255]),
    overlap=st.sampled_from([0, 1, 32]),
    edge=st.sampled_from(["pad", "drop"]),
    share=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 2**32),
)
def test_every_place_is_there_at_every_scale(
    mpp_l0: tuple[float, float],
    downsamples: tuple[float, ...],
    mpp: float,
    scales: list[float],
    side: int,
    overlap: int,
    edge: str,
    share: float | None,
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    info = info_of(4000, 3500, tuple((d, ()) for d in downsamples))
    tissue = Tissue(random.integers(0, 2, (7, 8)).astype(np.uint8), (8.0, 8.0), (), ())
    config = TilesConfig.model_validate(
        {
            "side_px": side,
            "mpp": mpp,
            "overlap_px": overlap,
            "edge": edge,
            "scales_um": scales,
            "min_tissue": 0.6,
            "cellular_share": share,
        }
    )
    grid = plan_grid(info, mpp_l0, tissue, config)
    if share is not None:
        grid = select_cellular(grid, random.random(len(grid)).astype(np.float32), share)
    assert grid.name == grid_name(config)
    around = grids_around(grid, info, mpp_l0, tissue, config)
    assert [one.mpp for one in around] == list(scales_around(config))
    names = [grid.name, *(one.name for one in around)]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9._-]+", name) for name in names)
    middles = grid.xy_l0 + np.array(grid.side_l0) / 2
    for one in around:
        assert len(one) == len(grid)
        assert (one.side_px, one.around) == (side, grid.name)
        shift = one.xy_l0 + np.array(one.side_l0) / 2 - middles
        assert np.isin(shift, (0.0, -0.5)).all()
        for axis in (0, 1):
            assert one.side_l0[axis] == pytest.approx(side * one.mpp / mpp_l0[axis], rel=0.021, abs=1)
        assert min(one.read_px) >= side
        assert all(0 <= share <= 1 for share in one.tissue_fraction)


@given(
    mask=st.integers(0, 2**32).map(lambda seed: np.random.default_rng(seed).integers(0, 2, (11, 14))),
    scale=st.sampled_from([0.5, 1.1, 2.0, 4.0]),
)
def test_tissue_is_that_of_the_larger_field(mask: np.ndarray, scale: float) -> None:
    pixels = np.kron(mask, np.ones((12, 12)))
    height, width = pixels.shape
    tissue = Tissue(mask.astype(np.uint8), (8.0, 8.0), (), ())
    _, (one,) = plan(info_of(width, height), (0.5, 0.5), tissue, side_px=32, mpp=1.0, min_tissue=0, scales_um=[scale])
    far = np.pad(pixels, 400)
    w, h = one.side_l0
    for (x, y), fraction in zip(one.xy_l0.tolist(), one.tissue_fraction.tolist(), strict=True):
        truth = far[y + 400 : y + 400 + h, x + 400 : x + 400 + w].sum() / (w * h)
        assert fraction == pytest.approx(truth, abs=1e-5)


def test_names_of_both_options_together() -> None:
    config = TilesConfig(overlap_px=64, cellular_share=0.2, scales_um=(0.5, 1.0, 2.0))
    info = info_of(4096, 4096)
    assert grid_name(config) == "256px-0.5um-o64-cell20"
    assert scales_around(config) == (1.0, 2.0)
    grid = plan_grid(info, (0.5, 0.5), EVERYWHERE, config)
    assert grid.name == "256px-0.5um-o64"
    grid = select_cellular(grid, np.ones(len(grid), np.float32), 0.2)
    assert [one.name for one in grids_around(grid, info, (0.5, 0.5), EVERYWHERE, config)] == [
        "256px-1um-around-0.5um-o64-cell20",
        "256px-2um-around-0.5um-o64-cell20",
    ]


def test_old_settings_give_the_inputs_they_gave_before() -> None:
    before = {
        "side_px": 256,
        "mpp": 0.5,
        "overlap_px": 0,
        "min_tissue": 0.25,
        "edge": "pad",
        "allow_enlarge": False,
        "resample": "auto",
    }
    assert tiles_settings(TilesConfig()) == before
    # Another resolution added later leaves the first grid alone.
    assert tiles_settings(TilesConfig(scales_um=(1.0,))) == before
    assert tiles_settings(TilesConfig(scales_um=(1.0,)), 1.0) == {**before, "scale_um": 1.0}
    chosen = tiles_settings(TilesConfig(cellular_share=0.2))
    assert chosen.pop("cellularity_version") >= 1
    assert chosen == {**before, "cellular_share": 0.2}


@pytest.mark.parametrize(
    ("mpp_l0", "levels", "settings", "level", "read_px", "resample"),
    [
        (0.25, ((1.0, (2, 4, 8)),), {"scales_um": [1]}, 0, 1024, "dct"),
        (0.25, ((1.0, (2, 4, 8)),), {"scales_um": [2]}, 0, 2048, "dct"),
        (0.25, ((1.0, (2, 4, 8)),), {"scales_um": [0.25]}, 0, 256, "none"),
        (0.25, ((1.0, (2, 4, 8)),), {"scales_um": [1], "overlap_px": 37}, 0, 1024, "area"),
        (0.25, ((1.0, (2, 4, 8)),), {"scales_um": [1], "side_px": 248}, 0, 992, "dct"),
        # Tiles 500 and 1000 wide begin 250 apart, which 4 does not divide.
        (0.25, ((1.0, (2, 4, 8)),), {"scales_um": [1], "side_px": 250}, 0, 1000, "area"),
        (0.25, ((1.0, (2, 4, 8)),), {"scales_um": [1], "resample": "area"}, 0, 1024, "area"),
        (0.25, ((1.0, (2, 4)), (4.0, (2, 4))), {"scales_um": [1]}, 1, 256, "none"),
        (0.25, ((1.0, (2, 4)), (4.0, (2, 4))), {"scales_um": [2]}, 1, 512, "dct"),
        (0.25, ((1.0, ()), (4.0, ())), {"scales_um": [2]}, 1, 512, "area"),
    ],
)
def test_level_and_resampling(
    mpp_l0: float,
    levels: tuple[tuple[float, tuple[int, ...]], ...],
    settings: dict[str, Any],
    level: int,
    read_px: int,
    resample: str,
) -> None:
    _, (one,) = plan(info_of(20_000, 20_000, levels), (mpp_l0, mpp_l0), **settings)
    assert (one.level, one.read_px, one.resample) == (level, (read_px, read_px), resample)
    if resample == "dct":
        factor = read_px // one.side_px * levels[level][0]
        assert (one.xy_l0 % factor == 0).all()


def test_overlap_is_what_neighbours_share() -> None:
    _, (fine, coarse) = plan(info_of(4096, 4096), (0.25, 0.25), scales_um=[0.25, 1])
    assert (fine.overlap_px, coarse.overlap_px) == (0, 128)


def test_a_scale_finer_than_the_scan_is_refused_before_a_pixel_is_read() -> None:
    info = info_of(4096, 4096)
    config = TilesConfig(mpp=1.0, scales_um=(0.25,))
    with pytest.raises(SlideError, match=r"scanned at 0.5 um/px, coarser than tiles.scales_um=0.25; leave it out"):
        check_fit(info, (0.5, 0.5), config)
    _, (one,) = plan(info, (0.5, 0.5), mpp=1.0, scales_um=[0.25], allow_enlarge=True)
    assert (one.resample, one.read_px) == ("enlarge", (128, 128))


@pytest.mark.parametrize("mask", [np.zeros((4, 4)), np.eye(4)[:1].T * np.eye(4)[:1]])
def test_no_tile_and_one_tile(mask: np.ndarray) -> None:
    tissue = Tissue(mask.astype(np.uint8), (8.0, 8.0), (), ())
    grid, around = plan(info_of(1024, 1024), (0.5, 0.5), tissue, scales_um=[1, 2], edge="drop")
    assert len(grid) == mask.sum()
    for one in around:
        assert one.xy_l0.shape == (len(grid), 2)
        assert one.xy_l0.dtype == np.int64
        assert one.tissue_fraction.dtype == np.float32
    if len(grid):
        assert [one.xy_l0.tolist() for one in around] == [[[-128, -128]], [[-384, -384]]]
        assert [one.tissue_fraction.tolist() for one in around] == [[0.25], [0.0625]]


def test_settings_are_checked() -> None:
    assert load_config(None, ["tiles.scales_um=1,2"]).tiles.scales_um == (1.0, 2.0)
    assert load_config(None, ["tiles.scales_um=2"]).tiles.scales_um == (2.0,)
    for wrong in ("tiles.scales_um=1,1.0", "tiles.scales_um=0.01", "tiles.cellular_share=0", "tiles.cellular_share=2"):
        with pytest.raises(UsageError, match=wrong.partition("=")[0]):
            load_config(None, [wrong])


# ---- pixels


def read_all(slide: Slide, grid: TileGrid) -> np.ndarray:
    batches = TileStream(slide, grid, [(0, slice(0, len(grid)))], batch_size=16, threads=2)
    found = [(batch.images.copy(), batch.readable.all()) for batch in batches]
    assert all(good for _, good in found)
    return np.concatenate([images for images, _ in found])


@pytest.fixture(scope="module")
def svs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 40x slide of one level, in JPEG tiles of 240 px; its sides are no multiples of anything."""
    return write_svs(tmp_path_factory.mktemp("svs") / "a.svs", [picture(701, 503)])


@pytest.mark.parametrize("settings", [{"resample": "area"}, {"side_px": 61, "mpp": 0.7}, {"overlap_px": 13}], ids=str)
@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0, 1.3])
def test_native_tiles_are_those_of_openslide_beyond_the_edge_too(
    svs: Path, settings: dict[str, Any], scale: float
) -> None:
    slide = open_slide(svs)
    config = {"side_px": 64, "min_tissue": 0.0, **settings, "scales_um": [scale]}
    _, (one,) = plan(slide.info, (0.25, 0.25), **config)
    assert one.resample != "dct"
    assert scale == 0.25 or (one.xy_l0 < 0).any()
    found = read_all(slide, one)
    reference = OpenSlideReader(svs, slide_id="s", files=("", 0))
    for row, (x, y) in enumerate(one.xy_l0.tolist()):
        # OpenSlide itself is only asked for what is on the slide.
        w, h = one.side_l0
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, 701), min(y + h, 503)
        pixels = np.full((h, w, 3), 255, np.uint8)
        if right > left and bottom > top:
            inside = reference.read(Region(left, top, 0, right - left, bottom - top))
            pixels[top - y : bottom - y, left - x : right - x] = inside
        np.testing.assert_array_equal(reference.read(Region(x, y, 0, w, h)), pixels, err_msg=f"OpenSlide, tile {row}")
        if one.resample == "area":
            pixels = cv2.resize(pixels, (one.side_px, one.side_px), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(found[row], pixels, err_msg=f"tile {row}")
    reference.close()


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_reduced_decoding_begins_outside_the_slide_too(svs: Path, scale: float) -> None:
    slide = open_slide(svs)
    _, (quick,) = plan(slide.info, (0.25, 0.25), side_px=64, min_tissue=0.0, scales_um=[scale])
    _, (slow,) = plan(slide.info, (0.25, 0.25), side_px=64, min_tissue=0.0, scales_um=[scale], resample="area")
    assert (quick.resample, slow.resample) == ("dct", "area")
    difference = read_all(slide, quick).astype(float) - read_all(slide, slow)
    assert np.sqrt(np.mean(difference**2)) < 8
    assert np.abs(difference.mean(axis=(0, 1, 2))).max() < 1
    white = read_all(slide, quick)[0]
    shift = round(-quick.xy_l0[0, 0] / quick.side_l0[0] * 64)
    assert shift >= 16
    assert (white[:shift] == 255).all()
    assert (white[:, :shift] == 255).all()
    assert (white[shift:, shift:] < 250).any()


@pytest.mark.parametrize("levels", [0, 2])
def test_the_middle_of_a_coarser_tile_is_the_tile(levels: int) -> None:
    drawn = DrawnSlide(SynthSpec(width_px=1024, height_px=900, mpp=0.5, seed=3))
    pixels = drawn.read(0, 0, 1024, 900)
    coarser = [cv2.resize(pixels, (1024 // by, 900 // by), interpolation=cv2.INTER_AREA) for by in (2, 4)[:levels]]
    slide = ArraySlide(pixels, mpp=0.5, slide_id="s", levels=coarser)
    grid, (twice, four) = plan(slide.info, (0.5, 0.5), side_px=128, min_tissue=0.0, scales_um=[1, 2])
    assert [one.level for one in (twice, four)] == [min(levels, 1), levels]
    for one, by in ((twice, 2), (four, 4)):
        edge = 64 - 64 // by
        for row in range(len(grid)):
            shrunk = cv2.resize(read_tile(slide, grid, row), (128 // by, 128 // by), interpolation=cv2.INTER_AREA)
            middle = read_tile(slide, one, row)[edge : 128 - edge, edge : 128 - edge]
            difference = np.abs(shrunk.astype(int) - middle)
            assert difference.max() <= (1 if levels == 0 or by == 2 else 3), row


def test_a_grid_around_another_is_stored_as_it_is(tmp_path: Path) -> None:
    info = info_of(4096, 4096)
    grid, around = plan(info, (0.5, 0.5), scales_um=[1, 2])
    store = SlideStore.create_or_open(tmp_path / "s.zarr", info, created_by="test")
    for one in (grid, *around):
        store.write_grid(one, {})
    assert store.grids() == sorted(one.name for one in (grid, *around))
    assert store.read_grid("256px-1um-around-0.5um").around == "256px-0.5um"
    assert "around" not in store.attributes("tiles/256px-0.5um")
    for one in (grid, *around):
        again = store.read_grid(one.name)
        for name in TileGrid.__slots__:
            assert np.array_equal(getattr(again, name), getattr(one, name)), name
