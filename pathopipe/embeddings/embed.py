"""The embedding stage: runs one encoder over chunks of a slide's tiles and stores each chunk whole."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pathopipe.config import EmbedConfig
from pathopipe.embeddings.handcrafted import FEATURE_NAMES, HANDCRAFTED_VERSION, handcrafted_features
from pathopipe.embeddings.recipe import EncoderSpec
from pathopipe.records import STATUS_NOT_FINITE, STATUS_OK, STATUS_OVERFLOW, STATUS_UNREADABLE, TileGrid
from pathopipe.slide.base import Slide
from pathopipe.store import EmbeddingArray
from pathopipe.tiles.read import TileBatch, TileStream

__all__ = ["EmbedReport", "Encoder", "HandcraftedEncoder", "Lane", "begin_reading", "build_encoder", "embed_chunks"]


class Encoder(Protocol):
    """Turns tiles into vectors."""

    features: int
    """Length of a vector."""
    identity: dict[str, Any]
    """What decides the numbers: name, weights, precision, transform. Goes into the inputs of the stage."""
    about: dict[str, Any]
    """What is worth knowing beside it: licence, device, versions."""
    ahead: int
    """Batches that may be started before the result of the first is fetched; 0 where all is computed at the start."""

    def allocate(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """A buffer for tiles that this encoder reads fast."""
        ...

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, side, side, 3) uint8 -> (n, features) float32."""
        ...

    def start(self, images: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
        """Begin to encode; the function that is returned waits for what :meth:`encode` would return.

        When this returns, ``images`` is read no more and may be written to.
        """
        ...


class HandcraftedEncoder:
    """The statistics of :mod:`pathopipe.embeddings.handcrafted` behind the encoder protocol."""

    features = len(FEATURE_NAMES)
    ahead = 0

    def __init__(self, spec: EncoderSpec, *, mpp: tuple[float, float]) -> None:
        self._mpp = mpp
        self.identity: dict[str, Any] = {"name": spec.name, "version": HANDCRAFTED_VERSION}
        self.about: dict[str, Any] = {"license": spec.license, "device": "cpu", "feature_names": list(FEATURE_NAMES)}

    def allocate(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """A plain array."""
        return np.empty(shape, np.uint8)

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, side, side, 3) uint8 -> (n, features) float32; a row depends on its own tile alone."""
        return handcrafted_features(images, self._mpp)

    def start(self, images: NDArray[np.uint8]) -> Callable[[], NDArray[np.float32]]:
        """Encode at once."""
        computed = self.encode(images)
        return lambda: computed


Limit = Literal["reading", "model", "writing"]


@dataclass(slots=True)
class EmbedReport:
    """What a run over some chunks did.

    The loop over batches is always in one of three places, whose wall seconds add up to its length: it waits for
    tiles, it is with the model, or it writes. Seconds of reading are those of the reading threads, added up; they pass
    beside the loop.
    """

    tiles: int = 0
    read_s: float = 0.0
    """Decoding and resampling."""
    model_s: float = 0.0
    """On a CPU the readers take their share of the cores meanwhile; on a GPU this is waiting for the device."""
    waiting_s: float = 0.0
    """The model waited for tiles."""
    write_s: float = 0.0
    faults: tuple[str, ...] = ()
    """Reasons of the first unreadable tiles."""

    def add(self, other: "EmbedReport") -> None:
        """Take another run's figures in."""
        self.tiles += other.tiles
        self.read_s += other.read_s
        self.model_s += other.model_s
        self.waiting_s += other.waiting_s
        self.write_s += other.write_s
        self.faults = (self.faults + other.faults)[:_FAULTS_KEPT]

    def seconds(self) -> dict[str, float]:
        """The times, rounded, as the store keeps them."""
        named = {"read": self.read_s, "model": self.model_s, "waiting": self.waiting_s, "write": self.write_s}
        return {name: round(value, 3) for name, value in named.items()}

    def limited_by(self) -> Limit | None:
        """Where the loop spent most of its time, which is what more of would make it faster; None where it did nothing.

        ``reading``: waiting for tiles; more reading threads or a faster disk help. ``model``: a faster device or a
        smaller network helps. ``writing``: the output folder is slow.
        """
        if not self.tiles:
            return None
        places: dict[Limit, float] = {"model": self.model_s, "reading": self.waiting_s, "writing": self.write_s}
        return max(places, key=lambda place: places[place])


_FAULTS_KEPT = 5


def build_encoder(spec: EncoderSpec, config: EmbedConfig, *, mpp: tuple[float, float], threads: int) -> Encoder:
    """Build an encoder. torch is imported for networks only.

    Args:
        spec: Its row of the catalogue.
        config: Weights, device, precision, seed.
        mpp: Micrometres per pixel of the tiles, x then y.
        threads: Threads of encoders that run on the CPU.

    Raises:
        UsageError: No such architecture or device.
        EncoderError: It can't be built here, there are no weights, or they don't fit.
    """
    if spec.loader == "handcrafted":
        # Its many small array operations hold the interpreter's lock: a second thread gains nothing (measured).
        return HandcraftedEncoder(spec, mpp=mpp)
    import torch

    from pathopipe.embeddings.encoder import NetworkEncoder

    torch.set_num_threads(threads)
    return NetworkEncoder(spec, config)


@dataclass(frozen=True, slots=True)
class Lane:
    """One encoder's part in a pass over the tiles of a grid."""

    rows: EmbeddingArray
    """Where its numbers go. All lanes of a pass have equal chunks."""
    encoder: Encoder
    chunks: frozenset[int]
    """Indices of the chunks that it computes."""
    batch_size: int
    """Tiles that it sees at once."""


def begin_reading(slide: Slide, grid: TileGrid, lanes: Sequence[Lane], *, threads: int) -> TileStream:
    """Begin to read the tiles that some lanes want, each tile once for all of them.

    Args:
        slide: Where the pixels come from.
        grid: The tiles.
        lanes: The encoders, at least one.
        threads: Reading threads.
    """
    wanted = sorted(frozenset().union(*(lane.chunks for lane in lanes)))
    return TileStream(
        slide,
        grid,
        [(chunk, lanes[0].rows.chunk_slice(chunk)) for chunk in wanted],
        # So that the borders of every lane's own batches are where they would be if it were alone.
        batch_size=math.lcm(*(lane.batch_size for lane in lanes)),
        threads=threads,
        allocate=lanes[_order(lanes)[0]].encoder.allocate,
    )


def _order(lanes: Sequence[Lane]) -> list[int]:
    """Those that compute beside this thread begin first."""
    return sorted(range(len(lanes)), key=lambda number: -lanes[number].encoder.ahead)


def embed_chunks(
    batches: TileStream,
    lanes: Sequence[Lane],
    *,
    on_tiles: Callable[[int], None] = lambda n_tiles: None,
) -> list[EmbedReport]:
    """Compute and store some chunks of one or several encoders.

    A tile that can't be read, or whose numbers are not finite or too large for the store, is quarantined: its row is
    NaN and its status says why. Whatever ends the run early, the chunks that were finished stay. An encoder sees the
    same batches in company as alone, so company does not change its numbers.

    Args:
        batches: What :func:`begin_reading` began for the same lanes; it is closed at the end, however that comes.
        lanes: The encoders.
        on_tiles: Told of the tiles of each batch when all encoders are done with it.

    Returns:
        A report a lane. What reading took is shared out evenly among those that a batch was read for.
    """
    reports = [EmbedReport() for _ in lanes]
    writers = [_ChunkWriter(lane.rows) for lane in lanes]
    order = _order(lanes)
    ahead = lanes[order[0]].encoder.ahead
    started: deque[tuple[TileBatch, list[tuple[int, _Result]]]] = deque()

    def finish_first() -> None:
        batch, results = started.popleft()
        for number, result in results:
            asked = time.perf_counter()
            computed = result()
            got = time.perf_counter()
            writers[number].add(batch, computed)
            reports[number].add(
                EmbedReport(tiles=len(computed), model_s=got - asked, write_s=time.perf_counter() - got)
            )
        on_tiles(batch.rows.stop - batch.rows.start)

    try:
        asked = time.perf_counter()
        for batch in batches:
            waiting_s = time.perf_counter() - asked
            takers = [number for number in order if batch.chunk in lanes[number].chunks]
            results = []
            for number in takers:
                began = time.perf_counter()
                # Unreadable tiles go in as well (black), so that their neighbours are in the same batch as ever.
                results.append((number, _start(lanes[number], batch.images)))
                reports[number].add(
                    EmbedReport(
                        read_s=batch.reading_s / len(takers),
                        model_s=time.perf_counter() - began,
                        waiting_s=waiting_s / len(takers),
                        faults=batch.faults,
                    )
                )
            started.append((batch, results))
            while len(started) > ahead:
                finish_first()
            asked = time.perf_counter()
        while started:
            finish_first()
    finally:
        batches.close()
    return reports


_Result = Callable[[], NDArray[np.float32]]


def _start(lane: Lane, images: NDArray[np.uint8]) -> _Result:
    """Begin to encode the tiles of a batch, in batches of the lane's own size."""
    step = lane.batch_size
    parts = [lane.encoder.start(images[at : at + step]) for at in range(0, len(images), step)]
    return parts[0] if len(parts) == 1 else lambda: np.concatenate([part() for part in parts])


class _ChunkWriter:
    """Gathers the rows of batches and writes a chunk when its last one is there."""

    def __init__(self, rows: EmbeddingArray) -> None:
        self._rows = rows
        self._dtype = np.dtype(rows.dtype)
        self._values = np.empty((0, rows.features), self._dtype)
        self._status = np.empty(0, np.uint8)

    def add(self, batch: TileBatch, computed: NDArray[np.float32]) -> None:
        """Take in the (n, features) vectors of a batch; batches come in the order of their rows."""
        chunk_rows = self._rows.chunk_slice(batch.chunk)
        if batch.rows.start == chunk_rows.start:
            self._values = np.full((chunk_rows.stop - chunk_rows.start, self._rows.features), np.nan, self._dtype)
            self._status = np.zeros(len(self._values), np.uint8)
        at = slice(batch.rows.start - chunk_rows.start, batch.rows.stop - chunk_rows.start)
        self._status[at] = judge_rows(computed, batch.readable, self._dtype)
        good = self._status[at] == STATUS_OK
        self._values[at][good] = computed[good].astype(self._dtype)
        if batch.rows.stop == chunk_rows.stop:
            self._rows.write_chunk(batch.chunk, self._values, self._status)


def judge_rows(computed: NDArray[np.float32], readable: NDArray[np.bool_], dtype: np.dtype[Any]) -> NDArray[np.uint8]:
    """(n,) status of computed rows (n, features): ok, unreadable, not finite, or too large for ``dtype``."""
    status = np.full(len(computed), STATUS_OK, np.uint8)
    with np.errstate(invalid="ignore"):
        status[(np.abs(computed) > np.finfo(dtype).max).any(axis=1)] = STATUS_OVERFLOW
    status[~np.isfinite(computed).all(axis=1)] = STATUS_NOT_FINITE
    status[~readable] = STATUS_UNREADABLE
    return status
