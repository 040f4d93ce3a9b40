"""The arithmetic of the grid."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathopipe.config import TilesConfig
from pathopipe.errors import SlideError
from pathopipe.records import Level, SlideInfo, TileGrid, Tissue
from pathopipe.tiles.grid import BLOCK_TILES, grid_name, plan_grid, tile_starts


def info_of(width: int, height: int, downsamples: tuple[float, ...] = (1.0,)) -> SlideInfo:
    levels = tuple(Level(int(width / d), int(height / d), d, d) for d in downsamples)
    return SlideInfo("s", Path("s.tiff"), "array", "test", (width, height), levels, 0, "", None)


def tissue_of(mask: np.ndarray) -> Tissue:
    return Tissue(mask.astype(np.uint8), (8.0, 8.0), (), ())


def plan(
    width: int,
    height: int,
    mpp_l0: tuple[float, float] = (0.5, 0.5),
    downsamples: tuple[float, ...] = (1.0,),
    mask: np.ndarray | None = None,
    **settings: object,
) -> TileGrid:
    mask = np.ones((20, 30)) if mask is None else mask
    config = TilesConfig.model_validate(settings)
    return plan_grid(info_of(width, height, downsamples), mpp_l0, tissue_of(mask), config)


@given(length=st.integers(1, 9_000), stride=st.floats(1, 700))
def test_each_pixel_has_one_owner(length: int, stride: float) -> None:
    starts = tile_starts(length, stride)
    owned = np.diff(np.append(starts, length))
    assert starts[0] == 0
    assert owned.sum() == length
    assert (owned >= 0).all()
    assert (owned <= stride + 1).all()


@given(
    width=st.integers(1, 4000),
    height=st.integers(1, 4000),
    mpp_x=st.floats(0.1, 0.6),
    mpp_y=st.floats(0.1, 0.6),
    side=st.sampled_from([64, 100, 224, 256]),
)
def test_tiles_cover_the_slide_without_gap(width: int, height: int, mpp_x: float, mpp_y: float, side: int) -> None:
    grid = plan(width, height, (mpp_x, mpp_y), side_px=side, mpp=0.6, min_tissue=0.0)
    for axis, length in ((0, width), (1, height)):
        starts = np.unique(grid.xy_l0[:, axis])
        ends = starts + grid.side_l0[axis]
        assert starts[0] == 0
        assert ends[-1] >= length
        # Rounding may part two neighbours by no more than the last half of a pixel.
        assert (starts[1:] <= ends[:-1] + 1).all()
    assert len(grid) == len(np.unique(grid.xy_l0, axis=0))


def test_a_starts_at_floor_of_k_times_stride() -> None:
    grid = plan(5000, 900, (0.27, 0.27), side_px=200, mpp=0.6, min_tissue=0.0)
    assert grid.stride_l0[0] == pytest.approx(200 * 0.6 / 0.27)
    x = np.unique(grid.xy_l0[:, 0])
    assert x.tolist() == [int(np.floor(k * grid.stride_l0[0])) for k in range(len(x))]


def test_order_is_by_blocks_of_16_by_16() -> None:
    grid = plan(256 * 40, 256 * 35, min_tissue=0.0)
    column, row = grid.xy_l0[:, 0] // 256, grid.xy_l0[:, 1] // 256
    keys = list(zip(row // BLOCK_TILES, column // BLOCK_TILES, row, column, strict=True))
    assert keys == sorted(keys)
    assert len(keys) == 40 * 35
    first_block = grid.xy_l0[: BLOCK_TILES**2] // 256
    assert first_block.max() == BLOCK_TILES - 1


@pytest.mark.parametrize(
    ("mpp", "downsamples", "wanted", "level", "read_px", "achieved", "resample"),
    [
        (0.5, (1,), 0.5, 0, 256, 0.5, "none"),
        (0.499, (1,), 0.5, 0, 256, 0.499, "none"),
        (0.2485, (1, 2, 4), 0.5, 1, 256, 0.497, "none"),
        (0.2485, (1, 4), 0.5, 0, 512, 0.497, "area"),
        (0.25, (1, 4.0002, 16.01), 1.0, 1, 256, 1.0, "none"),
        (0.25, (1, 4, 16), 2.0, 1, 512, 2.0, "area"),
        (0.45, (1,), 0.5, 0, 284, 0.4992, "area"),
        (0.505, (1,), 0.5, 0, 256, 0.505, "none"),
    ],
)
def test_level_and_resampling(
    mpp: float,
    downsamples: tuple[float, ...],
    wanted: float,
    level: int,
    read_px: int,
    achieved: float,
    resample: str,
) -> None:
    grid = plan(20_000, 20_000, (mpp, mpp), downsamples, mpp=wanted)
    assert (grid.level, grid.read_px, grid.resample) == (level, (read_px, read_px), resample)
    assert grid.achieved_mpp[0] == pytest.approx(achieved, abs=1e-4)


def test_anisotropic_pixels_get_square_tiles_of_tissue() -> None:
    grid = plan(4000, 4000, (0.25, 0.5), mpp=0.5, min_tissue=0.0)
    assert grid.side_l0 == (512, 256)
    assert grid.read_px == (512, 256)
    assert grid.resample == "area"
    assert grid.achieved_mpp == (0.5, 0.5)


def test_enlarging_is_refused_unless_allowed() -> None:
    with pytest.raises(SlideError, match=r"scanned at 1 um/px, coarser than tiles.mpp=0.5.*--set tiles.mpp=1"):
        plan(4000, 4000, (1.0, 1.0), mpp=0.5)
    grid = plan(4000, 4000, (1.0, 1.0), mpp=0.5, allow_enlarge=True)
    assert (grid.read_px, grid.resample) == ((128, 128), "enlarge")


@given(
    mask=st.integers(0, 2**32).map(lambda seed: np.random.default_rng(seed).integers(0, 2, (13, 17))),
    side=st.integers(16, 300),
)
def test_tissue_fraction_is_the_exact_share(mask: np.ndarray, side: int) -> None:
    # 12 level-0 pixels a mask pixel, so that the truth can be counted.
    pixels = np.kron(mask, np.ones((12, 12)))
    height, width = pixels.shape
    grid = plan(width, height, side_px=side, mask=mask, min_tissue=0.0)
    for (x, y), fraction in zip(grid.xy_l0.tolist(), grid.tissue_fraction.tolist(), strict=True):
        truth = pixels[y : y + side, x : x + side].sum() / side**2
        assert fraction == pytest.approx(truth, abs=1e-5)


def test_only_tiles_with_enough_tissue_are_kept() -> None:
    mask = np.zeros((8, 8))
    mask[:, :4] = 1
    grid = plan(2048, 2048, mask=mask, min_tissue=0.5)
    assert grid.xy_l0[:, 0].max() == 768
    assert (grid.tissue_fraction >= 0.5).all()
    assert len(plan(2048, 2048, mask=np.zeros((8, 8)), min_tissue=0.01)) == 0


def test_overlap_shortens_the_stride() -> None:
    grid = plan(2048, 2048, overlap_px=64, min_tissue=0.0)
    assert grid.stride_l0 == (192.0, 192.0)
    assert grid.name == "256px-0.5um-o64"


def test_edge_rule() -> None:
    assert np.unique(plan(1000, 600, min_tissue=0.0).xy_l0[:, 0]).tolist() == [0, 256, 512, 768]
    assert np.unique(plan(1000, 600, min_tissue=0.0, edge="drop").xy_l0[:, 0]).tolist() == [0, 256, 512]


def test_a_slide_smaller_than_a_tile() -> None:
    grid = plan(100, 80, min_tissue=0.0)
    assert grid.xy_l0.tolist() == [[0, 0]]
    assert grid.tissue_fraction[0] == pytest.approx(100 * 80 / 256**2)
    with pytest.raises(SlideError, match=r"100 x 80 px is smaller than one tile of 256 x 256.*tiles.edge=pad"):
        plan(100, 80, edge="drop")


def test_grid_names_say_side_and_mpp() -> None:
    assert grid_name(TilesConfig()) == "256px-0.5um"
    assert grid_name(TilesConfig(side_px=512, mpp=1)) == "512px-1um"


@pytest.mark.parametrize(
    ("mpp", "wanted", "scales", "settings", "resample"),
    [
        (0.25, 0.5, (2, 4, 8), {}, "dct"),
        (0.2485, 0.5, (2, 4, 8), {}, "dct"),
        (0.125, 1.0, (2, 4, 8), {}, "dct"),
        (0.25, 0.5, (2, 4, 8), {"resample": "area"}, "area"),
        (0.25, 0.5, (), {}, "area"),
        (0.125, 1.0, (2, 4), {}, "area"),
        (0.125, 2.0, (2, 4, 8), {}, "area"),
        (0.24, 0.5, (2, 4, 8), {}, "area"),
        (0.25, 0.75, (2, 4, 8), {}, "area"),
        (0.5, 0.5, (2, 4, 8), {}, "none"),
        (0.25, 0.5, (2, 4, 8), {"overlap_px": 37}, "dct"),
    ],
)
def test_jpeg_blocks_are_shrunk_where_the_factor_is_exact(
    mpp: float, wanted: float, scales: tuple[int, ...], settings: dict[str, object], resample: str
) -> None:
    info = info_of(20_000, 20_000)
    info = replace(info, levels=(replace(info.levels[0], scales=scales),))
    config = TilesConfig.model_validate({"mpp": wanted, **settings})
    grid = plan_grid(info, (mpp, mpp), tissue_of(np.ones((20, 30))), config)
    assert grid.resample == resample
    if resample == "dct":
        assert (grid.xy_l0 % (grid.read_px[0] // grid.side_px) == 0).all()


def test_a_level_that_fits_is_read_as_it_is() -> None:
    info = info_of(20_000, 20_000, (1.0, 2.0))
    info = replace(info, levels=tuple(replace(level, scales=(2, 4, 8)) for level in info.levels))
    grid = plan_grid(info, (0.25, 0.25), tissue_of(np.ones((20, 30))), TilesConfig())
    assert (grid.level, grid.resample) == (1, "none")
    # The coarsest level that is still finer is shrunk, not the finest.
    grid = plan_grid(info, (0.25, 0.25), tissue_of(np.ones((20, 30))), TilesConfig(mpp=2))
    assert (grid.level, grid.resample, grid.read_px) == (1, "dct", (1024, 1024))
