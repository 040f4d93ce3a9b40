"""The embedding stage: runs one encoder over chunks of a slide's tiles and stores each chunk whole."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pathopipe.config import EmbedConfig
from pathopipe.embeddings.catalog import EncoderSpec, find_encoder
from pathopipe.embeddings.handcrafted import FEATURE_NAMES, HANDCRAFTED_VERSION, handcrafted_features
from pathopipe.records import STATUS_NOT_FINITE, STATUS_OK, STATUS_OVERFLOW, STATUS_UNREADABLE, TileGrid
from pathopipe.slide.base import Slide
from pathopipe.store import EmbeddingArray
from pathopipe.tiles.read import stream_batches

__all__ = ["EmbedReport", "Encoder", "HandcraftedEncoder", "build_encoder", "embed_chunks"]


class Encoder(Protocol):
    """Turns tiles into vectors."""

    features: int
    """Length of a vector."""
    identity: dict[str, Any]
    """What decides the numbers: name, weights, precision, transform. Goes into the inputs of the stage."""
    about: dict[str, Any]
    """What is worth knowing beside it: licence, device, versions."""

    def allocate(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """A buffer for tiles that this encoder reads fast."""
        ...

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, side, side, 3) uint8 -> (n, features) float32."""
        ...


class HandcraftedEncoder:
    """The statistics of :mod:`pathopipe.embeddings.handcrafted` behind the encoder protocol."""

    features = len(FEATURE_NAMES)

    def __init__(self, spec: EncoderSpec, *, mpp: tuple[float, float], threads: int) -> None:
        self._mpp = mpp
        self._threads = threads
        self.identity: dict[str, Any] = {"name": spec.name, "version": HANDCRAFTED_VERSION}
        self.about: dict[str, Any] = {"license": spec.license, "device": "cpu", "feature_names": list(FEATURE_NAMES)}

    def allocate(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """A plain array."""
        return np.empty(shape, np.uint8)

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, side, side, 3) uint8 -> (n, features) float32; a row depends on its own tile alone."""
        return handcrafted_features(images, self._mpp, threads=self._threads)


@dataclass(slots=True)
class EmbedReport:
    """What a run over some chunks did. Seconds of reading are of threads, added up; the others are wall time."""

    tiles: int = 0
    read_s: float = 0.0
    model_s: float = 0.0
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


_FAULTS_KEPT = 5


def build_encoder(name: str, config: EmbedConfig, *, mpp: tuple[float, float], threads: int) -> Encoder:
    """Build an encoder by name. torch is imported for networks only.

    Args:
        name: A name of the catalogue.
        config: Weights, device, precision, seed.
        mpp: Micrometres per pixel of the tiles, x then y.
        threads: Threads of encoders that run on the CPU.

    Raises:
        UsageError: No such encoder, architecture or device.
        EncoderError: The weights don't fit.
    """
    spec = find_encoder(name)
    if spec.loader == "handcrafted":
        return HandcraftedEncoder(spec, mpp=mpp, threads=threads)
    import torch

    from pathopipe.embeddings.encoder import NetworkEncoder

    torch.set_num_threads(threads)
    return NetworkEncoder(
        spec, weights=config.weights, seed=config.seed, device=config.device, precision=config.precision
    )


def embed_chunks(
    slide: Slide,
    grid: TileGrid,
    rows: EmbeddingArray,
    encoder: Encoder,
    chunks: Iterable[int],
    *,
    batch_size: int,
    threads: int,
    on_tiles: Callable[[int], None] = lambda n_tiles: None,
) -> EmbedReport:
    """Compute and store some chunks.

    A tile that can't be read, or whose numbers are not finite or too large for the store, is quarantined: its row is
    NaN and its status says why. Whatever ends the run early, the chunks that were finished stay.

    Args:
        slide: Where the pixels come from.
        grid: The tiles.
        rows: Where the numbers go.
        encoder: Makes the numbers.
        chunks: Indices of the chunks to compute.
        batch_size: Tiles the encoder sees at once.
        threads: Reading threads.
        on_tiles: Told of the tiles of each finished batch.
    """
    report = EmbedReport()
    todo = [(chunk, rows.chunk_slice(chunk)) for chunk in chunks]
    batches = stream_batches(slide, grid, todo, batch_size=batch_size, threads=threads, allocate=encoder.allocate)
    dtype = np.dtype(rows.dtype)
    try:
        asked = time.perf_counter()
        for batch in batches:
            got = time.perf_counter()
            chunk_rows = rows.chunk_slice(batch.chunk)
            if batch.rows.start == chunk_rows.start:
                values = np.full((chunk_rows.stop - chunk_rows.start, rows.features), np.nan, dtype)
                status = np.zeros(len(values), np.uint8)
            # Unreadable tiles go in as well (black), so that their neighbours are computed in the same batch as ever.
            computed = encoder.encode(batch.images)
            at = slice(batch.rows.start - chunk_rows.start, batch.rows.stop - chunk_rows.start)
            status[at] = judge_rows(computed, batch.readable, dtype)
            good = status[at] == STATUS_OK
            values[at][good] = computed[good].astype(dtype)
            encoded = time.perf_counter()
            if batch.rows.stop == chunk_rows.stop:
                rows.write_chunk(batch.chunk, values, status)
            report.add(
                EmbedReport(
                    tiles=len(computed),
                    read_s=batch.reading_s,
                    model_s=encoded - got,
                    waiting_s=got - asked,
                    write_s=time.perf_counter() - encoded,
                    faults=batch.faults,
                )
            )
            on_tiles(len(computed))
            asked = time.perf_counter()
    finally:
        batches.close()
    return report


def judge_rows(computed: NDArray[np.float32], readable: NDArray[np.bool_], dtype: np.dtype[Any]) -> NDArray[np.uint8]:
    """(n,) status of computed rows (n, features): ok, unreadable, not finite, or too large for ``dtype``."""
    status = np.full(len(computed), STATUS_OK, np.uint8)
    with np.errstate(invalid="ignore"):
        status[(np.abs(computed) > np.finfo(dtype).max).any(axis=1)] = STATUS_OVERFLOW
    status[~np.isfinite(computed).all(axis=1)] = STATUS_NOT_FINITE
    status[~readable] = STATUS_UNREADABLE
    return status
