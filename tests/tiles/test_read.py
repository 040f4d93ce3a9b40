"""Streaming tiles: right pixels, right order, bounded memory, and one bad tile stops nothing."""

import math
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pathopipe.config import TilesConfig
from pathopipe.errors import TileReadError
from pathopipe.geometry import Region
from pathopipe.records import TileGrid, Tissue
from pathopipe.slide.array import ArraySlide
from pathopipe.tiles.grid import plan_grid
from pathopipe.tiles.read import TileStream, read_tile

PIXELS = np.random.default_rng(1).integers(0, 256, (300, 500, 3)).astype(np.uint8)
TISSUE = Tissue(np.ones((4, 4), np.uint8), (8.0, 8.0), (), ())


def make(mpp: float = 0.5, **config: object) -> tuple[ArraySlide, TileGrid]:
    slide = ArraySlide(PIXELS, mpp=mpp, slide_id="s")
    settings = TilesConfig.model_validate({"side_px": 32, "min_tissue": 0.0, **config})
    return slide, plan_grid(slide.info, (mpp, mpp), TISSUE, settings)


class Faulty(ArraySlide):
    """A slide with a bad spot."""

    def read(self, region: Region) -> NDArray[np.uint8]:
        if region.x_l0 == 64 and region.y_l0 == 32:
            raise TileReadError("s: block 7 is corrupt")
        return super().read(region)


@settings(deadline=None, max_examples=30)
@given(batch_size=st.integers(1, 70), threads=st.integers(1, 4), chunk_rows=st.integers(1, 200))
def test_every_tile_comes_once_in_order_with_its_pixels(batch_size: int, threads: int, chunk_rows: int) -> None:
    slide, grid = make()
    chunks = [
        (number, slice(first, min(first + chunk_rows, len(grid))))
        for number, first in enumerate(range(0, len(grid), chunk_rows))
    ]
    seen = []
    for batch in TileStream(slide, grid, chunks, batch_size=batch_size, threads=threads):
        rows = chunks[batch.chunk][1]
        assert rows.start <= batch.rows.start < batch.rows.stop <= rows.stop
        for row, image in zip(range(batch.rows.start, batch.rows.stop), batch.images, strict=True):
            seen.append(row)
            x, y = grid.xy_l0[row]
            truth = np.full((32, 32, 3), 255, np.uint8)
            crop = PIXELS[y : y + 32, x : x + 32]
            truth[: crop.shape[0], : crop.shape[1]] = crop
            assert np.array_equal(image, truth)
    assert seen == list(range(len(grid)))


def test_area_resampling_is_the_mean_of_the_pixels() -> None:
    slide, grid = make(mpp=0.25)
    assert (grid.resample, grid.read_px) == ("area", (64, 64))
    tile = read_tile(slide, grid, 0)
    means = PIXELS[:64, :64].reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(tile - means).max() <= 0.5


def test_enlarging_gives_the_wanted_size() -> None:
    slide, grid = make(mpp=1.0, allow_enlarge=True)
    assert read_tile(slide, grid, 0).shape == (32, 32, 3)


def test_one_bad_tile_is_marked_and_the_rest_is_read() -> None:
    good, grid = make()
    bad = Faulty(PIXELS, mpp=0.5, slide_id="s")
    row = int(np.flatnonzero((grid.xy_l0 == (64, 32)).all(axis=1))[0])
    chunks = [(0, slice(0, len(grid)))]
    for batch in TileStream(bad, grid, chunks, batch_size=40, threads=3):
        rows = np.arange(batch.rows.start, batch.rows.stop)
        assert batch.readable.tolist() == (rows != row).tolist()
        assert len(batch.faults) == int(row in rows)
        for at, number in enumerate(rows):
            expected = 0 if number == row else read_tile(good, grid, number)
            assert np.array_equal(batch.images[at], np.broadcast_to(expected, (32, 32, 3)))


def test_a_bug_in_a_reader_is_not_taken_for_a_bad_tile() -> None:
    class Broken(ArraySlide):
        def read(self, region: Region) -> NDArray[np.uint8]:
            raise ZeroDivisionError

    _, grid = make()
    with pytest.raises(ZeroDivisionError):
        list(TileStream(Broken(PIXELS, mpp=0.5, slide_id="s"), grid, [(0, slice(0, 9))], batch_size=4, threads=2))


def test_look_ahead_is_bounded() -> None:
    reads: list[int] = []

    class Counting(ArraySlide):
        def read(self, region: Region) -> NDArray[np.uint8]:
            reads.append(1)
            return super().read(region)

    _, grid = make()
    slide = Counting(PIXELS, mpp=0.5, slide_id="s")
    batches = TileStream(slide, grid, [(0, slice(0, len(grid)))], batch_size=8, threads=2, look_ahead=2)
    next(batches)
    deadline = time.monotonic() + 5
    while len(reads) < 24 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(reads) == 3 * 8
    batches.close()


def test_the_next_batch_is_read_while_this_one_is_used() -> None:
    asked = threading.Event()

    class Slow(ArraySlide):
        def read(self, region: Region) -> NDArray[np.uint8]:
            if region.x_l0 > 0 or region.y_l0 > 0:
                asked.set()
            return super().read(region)

    _, grid = make()
    batches = TileStream(Slow(PIXELS, mpp=0.5, slide_id="s"), grid, [(0, slice(0, 4))], batch_size=1, threads=1)
    next(batches)
    assert asked.wait(5)
    batches.close()


def test_stopping_early_ends_the_threads() -> None:
    slide, grid = make()
    before = threading.active_count()
    batches = TileStream(slide, grid, [(0, slice(0, len(grid)))], batch_size=4, threads=3)
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_buffers_come_from_the_allocator() -> None:
    slide, grid = make()
    made: list[tuple[int, ...]] = []

    def allocate(shape: tuple[int, ...]) -> NDArray[np.uint8]:
        made.append(shape)
        return np.empty(shape, np.uint8)

    list(TileStream(slide, grid, [(0, slice(0, 50))], batch_size=8, threads=1, look_ahead=2, allocate=allocate))
    # One piece for all, a little longer than they are.
    assert [math.prod(shape) - 3 * 8 * 32 * 32 * 3 for shape in made] == [32]
    assert not list(TileStream(slide, replace(grid), [], batch_size=8, threads=1))
