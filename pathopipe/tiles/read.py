"""Streams tiles as uint8 batches: threads read ahead while the consumer computes, in bounded memory."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import TileReadError
from pathopipe.geometry import Region
from pathopipe.records import TileGrid
from pathopipe.slide.base import Slide, empty_pixels
from pathopipe.tiles.plan import ReadPlan, plan_reading

__all__ = ["TileBatch", "TileStream", "read_tile"]

# Neighbouring tiles share the file's own compressed blocks, so a thread takes a few in a row.
_MOST_TILES_A_TASK = 8

_FILTERS = {"area": cv2.INTER_AREA, "enlarge": cv2.INTER_CUBIC}


@dataclass(frozen=True, slots=True)
class TileBatch:
    """Consecutive tiles of one chunk."""

    chunk: int
    rows: slice
    """Which rows of the grid these are."""
    images: NDArray[np.uint8]
    """(n, side_px, side_px, 3) RGB, black where a tile can't be read. A buffer that is used again: valid until the next
    batch is asked for."""
    readable: NDArray[np.bool_]
    """(n,) False where a tile can't be read."""
    faults: tuple[str, ...]
    """Why, for each unreadable tile."""
    reading_s: float
    """Seconds that threads spent on reading this batch, added up."""


def read_tile(slide: Slide, grid: TileGrid, row: int) -> NDArray[np.uint8]:
    """One tile as (side_px, side_px, 3) uint8 RGB.

    Raises:
        TileReadError: The slide can't be read there.
    """
    tile = empty_pixels((grid.side_px, grid.side_px, 3))
    _read_into(tile, slide, grid, plan_reading(slide, grid), row)
    return tile


def _read_into(tile: NDArray[np.uint8], slide: Slide, grid: TileGrid, plan: ReadPlan, row: int) -> None:
    x_l0, y_l0 = grid.xy_l0[row].tolist()
    region = Region(x_l0, y_l0, grid.level, *grid.read_px)
    if plan.blocks is not None:
        plan.blocks.read_into(tile, region, factor=plan.factor, dct=plan.dct, keep=plan.keep)
    elif grid.resample == "none":
        tile[...] = slide.read(region)
    else:
        tile[...] = cv2.resize(slide.read(region), tile.shape[:2], interpolation=_FILTERS[grid.resample])


class TileStream(Iterator[TileBatch]):
    """The tiles of some chunks as batches, in order; threads read ahead from the moment that it is made.

    A batch never crosses a chunk. A tile that can't be read is marked and does not stop the others. Memory is
    ``look_ahead + 1`` batches, however large the slide.

    Args:
        slide: Read from several threads at once.
        grid: Its tiles.
        chunks: Index and rows of each chunk.
        batch_size: Most tiles a batch.
        threads: How many read.
        look_ahead: Batches read before they are asked for.
        allocate: Makes the bytes that all buffers lie in; a GPU wants them pinned.
    """

    def __init__(
        self,
        slide: Slide,
        grid: TileGrid,
        chunks: Iterable[tuple[int, slice]],
        *,
        batch_size: int,
        threads: int,
        look_ahead: int = 3,
        allocate: Callable[[tuple[int, ...]], NDArray[np.uint8]] = lambda shape: np.empty(shape, np.uint8),
    ) -> None:
        self._slide, self._grid = slide, grid
        self._plan = plan_reading(slide, grid)
        self._free = deque(empty_pixels((look_ahead + 1, batch_size, grid.side_px, grid.side_px, 3), allocate))
        self._todo: Iterator[tuple[int, slice]] = (
            (chunk, slice(first, min(first + batch_size, rows.stop)))
            for chunk, rows in chunks
            for first in range(rows.start, rows.stop, batch_size)
        )
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        # Two tasks a thread at least: while the end of a batch is waited for, none shall be idle.
        self._task_tiles = max(1, min(_MOST_TILES_A_TASK, (look_ahead + 1) * batch_size // (2 * threads)))
        self._waiting: deque[_Pending] = deque()
        self._in_use: NDArray[np.uint8] | None = None
        self._read_ahead()

    def __next__(self) -> TileBatch:
        """The next batch; the buffer of the last one is used again."""
        if self._in_use is not None:
            self._free.append(self._in_use)
            self._in_use = None
        self._read_ahead()
        if not self._waiting:
            self.close()
            raise StopIteration
        pending = self._waiting.popleft()
        try:
            batch = pending.batch()
        except BaseException:
            self.close()
            raise
        self._in_use = pending.buffer
        return batch

    def close(self) -> None:
        """End the threads; what they are at is finished, nothing else is begun."""
        self._todo = iter(())
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._waiting.clear()

    def _read_ahead(self) -> None:
        while self._free:
            following = next(self._todo, None)
            if following is None:
                return
            pending = _Pending(self._slide, self._grid, self._plan, *following, self._free.popleft())
            pending.begin(self._pool, self._task_tiles)
            self._waiting.append(pending)


class _Pending:
    """A batch that threads are filling."""

    def __init__(
        self,
        slide: Slide,
        grid: TileGrid,
        plan: ReadPlan,
        chunk: int,
        rows: slice,
        buffer: NDArray[np.uint8],
    ) -> None:
        self.buffer = buffer
        self._slide, self._grid, self._plan = slide, grid, plan
        self._chunk = chunk
        self._rows = rows
        self._images = buffer[: rows.stop - rows.start]
        self._tasks: list[Future[tuple[list[tuple[int, str]], float]]] = []

    def begin(self, pool: ThreadPoolExecutor, task_tiles: int) -> None:
        """Hand it to the threads, so many tiles at a time."""
        for first in range(self._rows.start, self._rows.stop, task_tiles):
            self._tasks.append(pool.submit(self._fill, slice(first, min(first + task_tiles, self._rows.stop))))

    def _fill(self, rows: slice) -> tuple[list[tuple[int, str]], float]:
        started = time.perf_counter()
        faults = []
        for row in range(rows.start, rows.stop):
            at = row - self._rows.start
            try:
                _read_into(self._images[at], self._slide, self._grid, self._plan, row)
            except TileReadError as error:
                self._images[at] = 0
                faults.append((at, str(error)))
        return faults, time.perf_counter() - started

    def batch(self) -> TileBatch:
        """Wait for the threads."""
        # The last task is waited for first: to wake up for each would take the interpreter from the readers.
        done = [task.result() for task in reversed(self._tasks)][::-1]
        readable = np.ones(len(self._images), np.bool_)
        faults = [fault for found, _ in done for fault in found]
        readable[[at for at, _ in faults]] = False
        return TileBatch(
            chunk=self._chunk,
            rows=self._rows,
            images=self._images,
            readable=readable,
            faults=tuple(reason for _, reason in faults),
            reading_s=sum(seconds for _, seconds in done),
        )
