"""Tiles from native blocks: the pixels of the slow road, each block decoded once, one bad block few bad tiles."""

import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pathopipe.config import TilesConfig
from pathopipe.errors import SlideError
from pathopipe.geometry import Region
from pathopipe.records import TileGrid, Tissue
from pathopipe.slide import blocks
from pathopipe.slide.array import ArraySlide
from pathopipe.slide.base import Slide
from pathopipe.slide.open import open_slide
from pathopipe.slide.openslide import OpenSlideReader
from pathopipe.tiles.grid import plan_grid
from pathopipe.tiles.read import TileStream, read_tile

sys.path.insert(0, str(Path(__file__).parents[1] / "slide"))

from slide_files import damage_block, picture, set_tag, write_svs

TISSUE = Tissue(np.ones((1, 1), np.uint8), (8.0, 8.0), (), ())


@pytest.fixture(scope="module")
def svs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 40x slide of one level, in JPEG tiles of 240 px; its sides are no multiples of anything."""
    return write_svs(tmp_path_factory.mktemp("svs") / "a.svs", [picture(1501, 1203)])


def grid_of(slide: Slide, **settings: Any) -> TileGrid:
    config = TilesConfig.model_validate({"side_px": 64, "min_tissue": 0.0, **settings})
    return plan_grid(slide.info, (0.25, 0.25), TISSUE, config)


def read_all(slide: Slide, grid: TileGrid, threads: int = 2, batch_size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """All tiles and which of them are readable."""
    batches = TileStream(slide, grid, [(0, slice(0, len(grid)))], batch_size=batch_size, threads=threads)
    found = [(batch.images.copy(), batch.readable) for batch in batches]
    return np.concatenate([images for images, _ in found]), np.concatenate([readable for _, readable in found])


@pytest.mark.parametrize(
    "settings",
    [
        {"mpp": 0.25},
        {"mpp": 0.25, "side_px": 240},
        {"mpp": 0.25, "overlap_px": 32},
        {"mpp": 0.5, "resample": "area"},
        {"mpp": 0.5, "resample": "area", "overlap_px": 13},
        {"mpp": 0.4},
        {"mpp": 0.75},
        {"mpp": 1.0, "resample": "area"},
    ],
    ids=str,
)
def test_tiles_are_those_that_openslide_and_an_area_filter_give(svs: Path, settings: dict[str, Any]) -> None:
    slide = open_slide(svs)
    grid = grid_of(slide, **settings)
    found, readable = read_all(slide, grid)
    assert readable.all()
    reference = OpenSlideReader(svs, slide_id="s", files=("", 0))
    for row, (x, y) in enumerate(grid.xy_l0.tolist()):
        pixels = reference.read(Region(x, y, 0, *grid.read_px))
        if grid.resample == "area":
            pixels = cv2.resize(pixels, (grid.side_px, grid.side_px), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(found[row], pixels, err_msg=f"tile {row}")
        np.testing.assert_array_equal(read_tile(slide, grid, row), pixels)
    reference.close()


@pytest.mark.parametrize("overlap_px", [0, 16])
def test_dct_tiles_do_not_depend_on_threads_or_batches(svs: Path, overlap_px: int) -> None:
    slide = open_slide(svs)
    grid = grid_of(slide, mpp=0.5, overlap_px=overlap_px)
    assert grid.resample == "dct"
    one, _ = read_all(slide, grid, threads=1, batch_size=7)
    many, _ = read_all(open_slide(svs), grid, threads=4, batch_size=50)
    np.testing.assert_array_equal(one, many)
    area, _ = read_all(slide, grid_of(slide, mpp=0.5, overlap_px=overlap_px, resample="area"))
    difference = one.astype(float) - area
    assert 0 < np.sqrt(np.mean(difference**2)) < 8
    assert np.abs(difference.mean(axis=(0, 1, 2))).max() < 1


@pytest.mark.parametrize(
    "settings", [{"mpp": 0.25}, {"mpp": 0.25, "side_px": 480}, {"mpp": 0.5}, {"mpp": 0.5, "resample": "area"}], ids=str
)
def test_each_block_is_decoded_once(svs: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    slide = open_slide(svs)
    grid = grid_of(slide, **settings)
    decoded: list[tuple[int, int]] = []
    decode = blocks.BlockReader._decode

    def count(self: Any, number: int, row: int, column: int, *args: Any, **options: Any) -> np.ndarray:
        decoded.append((row, column))
        return decode(self, number, row, column, *args, **options)

    monkeypatch.setattr(blocks.BlockReader, "_decode", count)
    read_all(slide, grid, threads=1)
    # Opening has decoded a few to compare them with OpenSlide's.
    assert len(decoded) == len(set(decoded)) >= 7 * 6 - 3


def touches(grid: TileGrid, row: int, column: int, block_px: int = 240) -> np.ndarray:
    """Which tiles touch a block of level 0."""
    x, y = grid.xy_l0.T
    return (
        (x < (column + 1) * block_px)
        & (x + grid.side_l0[0] > column * block_px)
        & (y < (row + 1) * block_px)
        & (y + grid.side_l0[1] > row * block_px)
    )


@pytest.mark.parametrize("settings", [{"mpp": 0.25}, {"mpp": 0.5}, {"mpp": 0.5, "resample": "area"}], ids=str)
@pytest.mark.parametrize("damage", ["zeros", "count", "offset"])
def test_a_bad_block_costs_the_tiles_that_touch_it(
    svs: Path, tmp_path: Path, settings: dict[str, Any], damage: str
) -> None:
    path = tmp_path / "a.svs"
    path.write_bytes(svs.read_bytes())
    if damage == "zeros":
        damage_block(path, 0, 7 * 2 + 3)
    else:
        name = {"count": "TileByteCounts", "offset": "TileOffsets"}[damage]
        wrong = {"count": 99, "offset": 16}[damage]
        set_tag(path, 0, name, [wrong if n == 17 else value for n, value in enumerate(tag_values(path, name))])
    slide = open_slide(path)
    grid = grid_of(slide, **settings)
    batches = list(TileStream(slide, grid, [(0, slice(0, len(grid)))], batch_size=len(grid), threads=3))
    np.testing.assert_array_equal(batches[0].readable, ~touches(grid, 2, 3))
    assert len(batches[0].faults) == np.count_nonzero(~batches[0].readable)
    assert all("can't be read" in fault for fault in batches[0].faults)
    assert (batches[0].images[~batches[0].readable] == 0).all()


def tag_values(path: Path, name: str) -> list[int]:
    import tifffile

    with tifffile.TiffFile(path) as tif:
        return list(tif.pages[0].aspage().tags[name].value)


def test_a_grid_planned_for_dct_is_refused_by_a_reader_without(svs: Path) -> None:
    slide = open_slide(svs)
    grid = grid_of(slide, mpp=0.5)
    other = ArraySlide(picture(1501, 1203), mpp=0.25, slide_id="s")
    with pytest.raises(SlideError, match=r"--fresh tiles"):
        next(TileStream(other, grid, [(0, slice(0, 4))], batch_size=4, threads=1))
