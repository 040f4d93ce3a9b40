"""Slides as lazy arrays: the pixels of tiles, no seams, only what is asked for, in any process."""

import pickle
from dataclasses import replace
from pathlib import Path

import cloudpickle
import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from pathopipe.config import TilesConfig
from pathopipe.errors import MissingResolutionError, SlideError, SlideOpenError, TileReadError, UsageError
from pathopipe.geometry import Region
from pathopipe.records import Tissue
from pathopipe.slide.array import ArraySlide
from pathopipe.slide.base import levels_from_sizes
from pathopipe.slide.open import open_slide
from pathopipe.tiles import lazy
from pathopipe.tiles.grid import plan_grid
from pathopipe.tiles.lazy import as_dask_array
from pathopipe.tiles.read import read_tile

PIXELS = np.random.default_rng(1).integers(0, 256, (301, 503, 3)).astype(np.uint8)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "_CHUNK_PX", 96)


class Counting(ArraySlide):
    """A slide that counts reads, with a bad spot if told so."""

    reads = 0
    bad_x: int | None = None

    def read(self, region: Region) -> NDArray[np.uint8]:
        self.reads += 1
        if region.x_l0 == self.bad_x:
            raise TileReadError(f"s: block at {region.x_l0} is corrupt")
        return super().read(region)


def computed(array: object) -> NDArray[np.uint8]:
    return np.asarray(array.compute(scheduler="threads"))  # type: ignore[attr-defined]


@pytest.mark.parametrize("mpp", [None, 0.5, 0.507])
def test_native_pixels_are_the_slides_own(mpp: float | None) -> None:
    array = as_dask_array(ArraySlide(PIXELS, mpp=0.5, slide_id="s"), mpp)
    assert (array.shape, array.dtype) == ((301, 503, 3), np.uint8)
    assert array.chunks == ((96, 96, 96, 13), (96, 96, 96, 96, 96, 23), (3,))
    assert np.array_equal(computed(array), PIXELS)


def test_averaging_by_whole_factors_has_no_seams_and_no_white_edge() -> None:
    array = as_dask_array(ArraySlide(PIXELS, mpp=0.25, slide_id="s"), 0.5)
    assert array.shape == (150, 251, 3)
    assert array.numblocks == (2, 3, 1)
    expected = cv2.resize(PIXELS[:300, :502], (251, 150), interpolation=cv2.INTER_AREA)
    assert np.array_equal(computed(array), expected)


@pytest.mark.parametrize("mpp", [0.5, 0.75, 1.1, 3.0])
def test_a_chunk_is_a_tile(mpp: float) -> None:
    slide = ArraySlide(PIXELS, mpp=(0.5, 0.45), slide_id="s", levels=(PIXELS[::2, ::2],))
    array = as_dask_array(slide, mpp)
    side = array.chunksize[0] if array.numblocks[0] > 1 else 96
    config = TilesConfig(side_px=side, mpp=mpp, min_tissue=0)
    grid = plan_grid(slide.info, (0.5, 0.45), Tissue(np.ones((1, 1), np.uint8), (1, 1), (), ()), config)
    pixels = computed(array)
    for row in range(len(grid)):
        x, y = (round(corner / stride) * side for corner, stride in zip(grid.xy_l0[row], grid.stride_l0, strict=True))
        crop = pixels[y : y + side, x : x + side]
        assert np.array_equal(crop, read_tile(slide, grid, row)[: crop.shape[0], : crop.shape[1]])


def test_a_level_that_fits_is_taken_as_it_is() -> None:
    coarse = np.random.default_rng(2).integers(0, 256, (75, 125, 3)).astype(np.uint8)
    slide = Counting(PIXELS[:300, :500], mpp=0.25, slide_id="s", levels=(coarse,))
    assert np.array_equal(computed(as_dask_array(slide, 1.0)), coarse)


def test_only_what_is_asked_for_is_read() -> None:
    slide = Counting(PIXELS, mpp=0.5, slide_id="s")
    array = as_dask_array(slide)
    assert slide.reads == 0
    part = array[100:110, 90:100]
    assert np.array_equal(computed(part), PIXELS[100:110, 90:100])
    assert slide.reads == 2


def test_a_bad_block_says_so_and_the_rest_is_read() -> None:
    slide = Counting(PIXELS, mpp=0.5, slide_id="s")
    slide.bad_x = 192
    array = as_dask_array(slide)
    with pytest.raises(TileReadError, match="block at 192 is corrupt"):
        computed(array)
    assert np.array_equal(computed(array[:, :192]), PIXELS[:, :192])


@pytest.mark.parametrize(
    ("block", "factor", "side"),
    [
        ((256, 256), 1, 1024),
        ((240, 240), 1, 960),
        ((240, 240), 2, 1080),
        ((512, 256), 1, 1024),
        ((225, 225), 2, 1125),
        ((240, 240), 3.2, 1050),
        ((90_000, 16), 1, 1024),
        (None, 1, 1024),
        (None, 8, 512),
        ((256, 256), 8, 512),
        ((256, 256), 1024, 16),
    ],
)
def test_chunks_hold_whole_blocks_and_are_bounded(
    monkeypatch: pytest.MonkeyPatch, block: tuple[int, int] | None, factor: float, side: int
) -> None:
    monkeypatch.setattr(lazy, "_CHUNK_PX", 1024)

    class Huge(ArraySlide):
        info = replace(  # type: ignore[assignment]
            ArraySlide(PIXELS, mpp=0.05, slide_id="s").info,
            dims_l0=(90_000, 80_000),
            levels=levels_from_sizes([(90_000, 80_000)], [block]),
            mpp=(0.05, 0.05) if factor < 1024 else (0.04, 0.04),
        )

    slide = Huge(PIXELS, mpp=0.05, slide_id="s")
    array = as_dask_array(slide, slide.info.mpp[0] * factor)
    assert array.chunksize == (side, side, 3)
    assert array.shape == (int(80_000 / factor), int(90_000 / factor), 3)


def test_a_drawn_tiff_equals_its_reads(drawn_slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "_CHUNK_PX", 1024)
    slide = open_slide(drawn_slide)
    level = slide.info.levels[0]
    array = as_dask_array(slide, 0.5)
    assert array.shape == (level.height_px, level.width_px, 3)
    assert array.chunksize[0] % (level.block_height_px or 1) == 0
    assert np.array_equal(computed(array), slide.read(Region(0, 0, 0, level.width_px, level.height_px)))
    slide.close()


def test_other_processes_open_the_file_again(drawn_slide: Path) -> None:
    slide = open_slide(drawn_slide)
    expected = slide.read(Region(90, 90, 0, 20, 10))
    array = as_dask_array(slide)[90:100, 90:110]
    sent = cloudpickle.dumps(array)
    slide.close()
    with pytest.raises(ValueError, match="closed"):
        computed(array)
    there = array.compute(scheduler="processes", num_workers=1)
    assert np.array_equal(there, expected)
    lazy._opened.cache_clear()
    assert np.array_equal(computed(cloudpickle.loads(sent)), expected)
    assert lazy._opened.cache_info().misses == 1
    lazy._opened.cache_clear()


def test_what_another_process_cannot_open_is_said(tmp_path: Path) -> None:
    in_memory = as_dask_array(ArraySlide(PIXELS, mpp=0.5, slide_id="s"))
    with pytest.raises(SlideOpenError, match="a slide in memory is for one process"):
        computed(cloudpickle.loads(cloudpickle.dumps(in_memory)))
    path = tmp_path / "s.tiff"
    tifffile.imwrite(path, PIXELS, tile=(64, 64), photometric="rgb", compression="deflate")
    slide = open_slide(path, mpp=0.5)
    sent = cloudpickle.dumps(as_dask_array(slide, 1.0))
    expected = computed(as_dask_array(slide, 1.0))
    slide.close()
    assert np.array_equal(computed(cloudpickle.loads(sent)), expected)
    lazy._opened.cache_clear()
    tifffile.imwrite(path, 255 - PIXELS, tile=(64, 64), photometric="rgb", compression="deflate")
    with pytest.raises(SlideError, match="is another file than when the array was made"):
        computed(cloudpickle.loads(sent))


def test_what_cannot_be_shown_is_refused() -> None:
    slide = ArraySlide(PIXELS, mpp=0.5, slide_id="s")
    with pytest.raises(SlideError, match="s: scanned at 0.5 um/px, coarser than mpp=0.25; ask for mpp=0.5 or coarser"):
        as_dask_array(slide, 0.25)
    with pytest.raises(UsageError, match="mpp=0.01 is not within 0.05 to 50"):
        as_dask_array(slide, 0.01)
    unknown = ArraySlide(PIXELS, mpp=None, slide_id="s")
    with pytest.raises(MissingResolutionError):
        as_dask_array(unknown, 0.5)
    assert as_dask_array(unknown).shape == (301, 503, 3)


def test_equal_slides_share_their_keys_and_others_do_not() -> None:
    one, same = (as_dask_array(ArraySlide(PIXELS, mpp=0.5, slide_id="s")) for _ in range(2))
    other = as_dask_array(ArraySlide(255 - PIXELS, mpp=0.5, slide_id="s"))
    assert one.name == same.name != other.name
    assert one.name != as_dask_array(ArraySlide(PIXELS, mpp=0.5, slide_id="s"), 1.0).name
    assert pickle.loads(pickle.dumps(lazy._Source(lazy._File(Path("x"), "s", None, "f")))).slide is None
