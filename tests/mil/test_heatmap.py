"""Maps of tiles: percentiles, rasters with and without overlap, pyramids, and what is read from a store."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathopipe.errors import StoreError, UsageError
from pathopipe.mil.heatmap import extreme_tiles, pyramid, read_maps, tile_percentiles, tile_raster
from pathopipe.records import TileGrid
from pathopipe.store import SlideStore


def grid_of(columns: int, rows: int, *, stride: float = 100.0, side: int = 100) -> TileGrid:
    """All tiles of a grid, row by row."""
    x, y = np.meshgrid(np.floor(np.arange(columns) * stride), np.floor(np.arange(rows) * stride))
    return TileGrid(
        name="256px-0.5um",
        side_px=256,
        mpp=0.5,
        achieved_mpp=(0.5, 0.5),
        overlap_px=0,
        side_l0=(side, side),
        stride_l0=(stride, stride),
        level=0,
        read_px=(side, side),
        resample="none",
        xy_l0=np.stack([x.ravel(), y.ravel()], axis=1).astype(np.int64),
        tissue_fraction=np.ones(columns * rows, np.float32),
    )


def test_percentiles_by_hand() -> None:
    values = np.array([0.2, np.nan, 5.0, 0.2, 0.1], np.float32)
    assert tile_percentiles(values) == pytest.approx([2.5 / 4, np.nan, 1.0, 2.5 / 4, 1 / 4], nan_ok=True)
    assert np.isnan(tile_percentiles(np.full(3, np.nan, np.float32))).all()


def test_a_tile_is_a_cell() -> None:
    grid = grid_of(4, 3)
    values = np.arange(12, dtype=np.float32)
    values[5] = np.nan
    raster = tile_raster(grid, (400, 300), values)
    expected = values.reshape(3, 4)
    assert np.array_equal(raster.values, expected, equal_nan=True)
    assert raster.cell_l0 == (100.0, 100.0)


@given(stride=st.floats(17, 600), columns=st.integers(1, 40))
def test_fractional_strides_keep_every_tile_in_its_cell(stride: float, columns: int) -> None:
    grid = grid_of(columns, 1, stride=stride, side=round(stride))
    dims = (int(stride * columns), round(stride))
    values = np.arange(columns, dtype=np.float32)
    raster = tile_raster(grid, dims, values)
    # A side that is rounded up reaches into the next cell by less than a pixel's share.
    assert raster.values[0, : columns - 1] == pytest.approx(values[:-1], abs=1 / stride * 2)


def test_overlapping_tiles_are_averaged_by_shared_area() -> None:
    # Steps of 100, tiles of 150: a tile covers its own cell and half of the next, in both directions.
    grid = grid_of(3, 1, side=150)
    raster = tile_raster(grid, (300, 100), np.array([0.0, 6.0, 3.0], np.float32))
    assert raster.values[0] == pytest.approx([0, (6 + 0.5 * 0) / 1.5, (3 + 0.5 * 6) / 1.5])
    # A cell without a tile of its own shows what reaches into it.
    raster = tile_raster(grid, (300, 100), np.array([2.0, np.nan, np.nan], np.float32))
    assert raster.values[0] == pytest.approx([2, 2, np.nan], nan_ok=True)


def test_overlap_of_a_constant_is_the_constant() -> None:
    grid = grid_of(7, 5, stride=64.5, side=129)
    raster = tile_raster(grid, (500, 400), np.full(35, 0.25, np.float32))
    assert raster.values[np.isfinite(raster.values)] == pytest.approx(0.25)


def test_a_pyramid_halves_and_passes_over_empty_cells() -> None:
    values = np.array([[1, 3, np.nan], [5, np.nan, np.nan]], np.float32)
    levels = pyramid(values)
    assert len(levels) == 2
    assert levels[1] == pytest.approx(np.array([[3, np.nan]]), nan_ok=True)
    assert [level.shape for level in pyramid(np.zeros((300, 130), np.float32))] == [
        (300, 130),
        (150, 65),
        (75, 33),
        (38, 17),
    ]
    assert [level.shape for level in pyramid(np.zeros((1, 1), np.float32))] == [(1, 1)]


def test_extremes_never_share_a_tile() -> None:
    values = np.array([3, np.nan, 1, 2, 5, 4], np.float32)
    top, bottom = extreme_tiles(values, 2)
    assert (top.tolist(), bottom.tolist()) == ([4, 5], [2, 3])
    top, bottom = extreme_tiles(values, 9)
    assert (top.tolist(), bottom.tolist()) == ([4, 5], [2, 3])


# ---- from a store


def store_with(tmp_path: Path, attention: np.ndarray | None) -> SlideStore:
    store = SlideStore(tmp_path / "slide.zarr")
    grid = grid_of(3, 2)
    store.write_grid(grid, {"made": "here"})
    maps = [{"kind": "attention", "label": ""}, {"kind": "contribution", "label": "tumour"}]
    store.write_predictions("abmil", np.array([0.5], np.float32), attention, grid=grid.name, about={"maps": maps})
    return store


def test_maps_come_back_as_they_were_stored(tmp_path: Path) -> None:
    attention = np.random.default_rng(0).random((6, 2)).astype(np.float32)
    attention[4] = np.nan
    store = store_with(tmp_path, attention)
    grid, maps, about = read_maps(store, "abmil")
    assert len(grid) == 6
    assert [(one.name, one.kind, one.label) for one in maps] == [
        ("Attention", "attention", ""),
        ("Contribution: tumour", "contribution", "tumour"),
    ]
    assert np.array_equal(maps[1].values, attention[:, 1], equal_nan=True)
    assert about["grid"] == "256px-0.5um"


def test_what_cannot_be_shown_is_said(tmp_path: Path) -> None:
    store = store_with(tmp_path, None)
    with pytest.raises(UsageError, match="without weighing tiles"):
        read_maps(store, "abmil")
    with pytest.raises(UsageError, match="did you mean 'abmil'"):
        read_maps(store, "abmill")
    store = store_with(tmp_path / "other", np.ones((5, 2), np.float32))
    with pytest.raises(StoreError, match="5 predicted tiles for 6"):
        read_maps(store, "abmil")
