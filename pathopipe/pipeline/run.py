"""The stages of one slide that ``run`` goes through: tissue, tiles, embeddings. No science in here."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

import pathopipe
from pathopipe.config import Config
from pathopipe.embeddings.catalog import find_encoder
from pathopipe.embeddings.embed import EmbedReport, Encoder, build_encoder, embed_chunks
from pathopipe.errors import TooManyBadTilesError
from pathopipe.pipeline.common import RunPlan, given_mask, inputs_below, opened, tissue_stage, write_pictures
from pathopipe.records import STATUS_OK, SlideRef, TileGrid
from pathopipe.slide.base import Slide
from pathopipe.slide.resolution import require_mpp
from pathopipe.store import EmbeddingArray, SlideStore, digest, store_path
from pathopipe.tiles.grid import GRID_VERSION, check_fit, grid_name, plan_grid
from pathopipe.tissue import find_tissue

__all__ = [
    "Prepared",
    "SlideOutcome",
    "check_plan",
    "embed_pending",
    "finish_slide",
    "prepare_slide",
    "run_slide",
]

_BATCH_SIZE = {"handcrafted": 32, "cpu": 32, "cuda": 256}
_CHUNK_ROWS = {"handcrafted": 256, "cpu": 256, "cuda": 1024}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A slide after its small stages: what is left to embed."""

    ref: SlideRef
    n_tiles: int
    pending: Mapping[str, tuple[int, ...]]
    """Chunks to compute, by encoder."""
    did: tuple[str, ...]
    """Stages that were computed now, not found in the store."""
    seconds: float
    """How long the small stages took."""


@dataclass(frozen=True, slots=True)
class SlideOutcome:
    """How one slide ended."""

    slide_id: str
    status: Literal["done", "failed"]
    reason: str = ""
    tissue_mm2: float = 0.0
    tiles: int = 0
    bad_tiles: int = 0
    mpp: str = ""
    flags: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    did: tuple[str, ...] = ()
    """What was computed now; the rest was in the store."""
    seconds: float = 0.0
    prepare_s: float = 0.0
    """Seconds of what comes before embedding: opening, tissue, tiles, pictures."""
    report: EmbedReport = field(default_factory=EmbedReport)


def check_plan(refs: Sequence[SlideRef], plan: RunPlan) -> list[str]:
    """Find what is wrong with a plan before any slide is touched; builds its encoders.

    Returns:
        What the user should know before it starts, such as random weights.

    Raises:
        UsageError: No such encoder, architecture or device, or a slide's given mask is missing.
        EncoderError: The weights don't fit.
    """
    for ref in refs:
        given_mask(ref.slide_id, plan.config)
    tile_mpp = (plan.config.tiles.mpp, plan.config.tiles.mpp)
    encoders = {name: _encoder(name, plan, tile_mpp) for name in plan.config.embed.encoder}
    return [f"{name}: {encoder.about['warning']}" for name, encoder in encoders.items() if encoder.about.get("warning")]


def run_slide(
    ref: SlideRef, plan: RunPlan, on_tiles: Callable[[str, int, int], None] = lambda slide_id, done, total: None
) -> SlideOutcome:
    """All stages of one slide, in this process.

    Args:
        ref: The slide.
        plan: What to do.
        on_tiles: Told the slide's id, tiles done and tiles in all as embedding goes on.

    Raises:
        PathopipeError: The slide can't be done; what was finished is kept.
    """
    started = time.perf_counter()
    prepared = prepare_slide(ref, plan)
    reports: dict[str, EmbedReport] = {}
    for encoder, chunks in prepared.pending.items():
        done = 0

        def count(n_tiles: int) -> None:
            nonlocal done
            done += n_tiles
            on_tiles(ref.slide_id, done, prepared.n_tiles)

        reports[encoder] = embed_pending(ref, plan, encoder, chunks, count)
    return replace(finish_slide(prepared, plan, reports), seconds=time.perf_counter() - started)


def prepare_slide(ref: SlideRef, plan: RunPlan) -> Prepared:
    """Tissue and tiles of a slide, and the list of chunks that are still to be embedded."""
    started = time.perf_counter()
    with opened(ref, plan.config) as slide:
        store, fresh = SlideStore(store_path(plan.out, ref.slide_id)), plan.fresh
        if plan.retry_bad and store.inputs("tissue") and store.read_tissue().unreadable_share > 0:
            fresh = "tissue"  # it was looked for on a damaged picture
        if "tiles" in plan.stages:
            check_fit(slide.info, require_mpp(slide.info), plan.config.tiles)
        # Nothing is forgotten before what takes its place can be had.
        found = find_tissue(slide, plan.config.tissue) if fresh == "tissue" else None
        if found is not None:
            store.clear_stage("tissue")
        store = SlideStore.create_or_open(store.path, slide.info, created_by=f"pathopipe {pathopipe.__version__}")
        store.remove_leftovers()
        did = []
        tissue, grid = None, None
        if "tissue" in plan.stages:
            tissue, computed = tissue_stage(slide, store, plan.config, found)
            did += ["tissue"] * computed
        if "tiles" in plan.stages:
            grid, computed = _tiles_stage(slide, store, plan.config, again=fresh == "tiles")
            did += ["tiles"] * computed
        if tissue is not None or grid is not None:
            write_pictures(slide, store, plan, tissue, grid, again=bool(did))
        pending: dict[str, tuple[int, ...]] = {}
        if "embed" in plan.stages:
            grid = grid if grid is not None else _known_grid(store, plan.config)
            if fresh == "embed":
                store.clear_stage("embed", grid=grid.name, encoders=plan.config.embed.encoder)
            for encoder in plan.config.embed.encoder:
                rows = _embedding_array(slide, store, grid, encoder, plan)
                todo = set(range(rows.n_chunks)) - set(rows.done_chunks())
                if plan.retry_bad:
                    todo |= set(rows.bad_chunks())
                pending[encoder] = tuple(sorted(todo))
                if todo or not rows.attributes.get("complete"):
                    did.append(encoder)
        n_tiles = len(grid) if grid is not None else 0
        return Prepared(ref, n_tiles, pending, tuple(did), time.perf_counter() - started)


def embed_pending(
    ref: SlideRef,
    plan: RunPlan,
    encoder_name: str,
    chunks: tuple[int, ...],
    on_tiles: Callable[[int], None] = lambda n_tiles: None,
) -> EmbedReport:
    """Embed some chunks of a prepared slide."""
    if not chunks:
        return EmbedReport()
    store = SlideStore.open(store_path(plan.out, ref.slide_id))
    grid = _known_grid(store, plan.config)
    encoder = _encoder(encoder_name, plan, grid.achieved_mpp)
    batch_size = plan.config.embed.batch_size or _by_device(_BATCH_SIZE, encoder)
    with opened(ref, plan.config) as slide:
        return embed_chunks(
            slide,
            grid,
            store.embeddings(grid.name, encoder_name),
            encoder,
            chunks,
            batch_size=batch_size,
            threads=plan.config.embed.read_threads or plan.threads,
            on_tiles=on_tiles,
        )


def finish_slide(prepared: Prepared, plan: RunPlan, reports: Mapping[str, EmbedReport]) -> SlideOutcome:
    """Close the stages of a slide and say how it went.

    Args:
        prepared: The slide.
        plan: What was to be done.
        reports: What embedding did, by encoder.

    Raises:
        TooManyBadTilesError: More tiles were quarantined than ``embed.max_bad_share`` allows.
    """
    slide_id = prepared.ref.slide_id
    store = SlideStore.open(store_path(plan.out, slide_id))
    bad_tiles = 0
    whole = EmbedReport()
    for encoder in prepared.pending:
        report = reports.get(encoder, EmbedReport())
        whole.add(report)
        rows = store.embeddings(grid_name(plan.config.tiles), encoder)
        bad = int(np.count_nonzero(rows.read_status() != STATUS_OK))
        bad_tiles = max(bad_tiles, bad)
        if encoder in prepared.did:
            rows.finish(bad_tiles=bad, seconds=report.seconds(), limited_by=report.limited_by())
    if bad_tiles > plan.config.embed.max_bad_share * prepared.n_tiles:
        first = f"; the first: {whole.faults[0]}" if whole.faults else ""
        raise TooManyBadTilesError(
            f"{slide_id}: {bad_tiles} of {prepared.n_tiles} tiles are bad, more than embed.max_bad_share="
            f"{plan.config.embed.max_bad_share:g}; the good ones are kept; mend the file and use --retry-bad{first}",
            slide_id=slide_id,
        )
    slide = store.slide
    tissue = store.read_tissue() if store.inputs("tissue") is not None else None
    unreadable = tissue.unreadable_share if tissue is not None else 0.0
    if unreadable > plan.config.embed.max_bad_share:
        raise TooManyBadTilesError(
            f"{slide_id}: {unreadable:.0%} of the slide's area can't be read, more than embed.max_bad_share="
            f"{plan.config.embed.max_bad_share:g}; what could be read is kept; mend the file and use --retry-bad",
            slide_id=slide_id,
        )
    return SlideOutcome(
        slide_id=slide_id,
        status="done",
        tissue_mm2=round(sum(tissue.areas_mm2), 3) if tissue is not None else 0.0,
        tiles=prepared.n_tiles,
        bad_tiles=bad_tiles,
        mpp=" x ".join(f"{mpp:g}" for mpp in dict.fromkeys(slide["mpp"])),
        flags=tissue.flags if tissue is not None else (),
        problems=tuple(slide["problems"]),
        did=prepared.did,
        prepare_s=prepared.seconds,
        report=whole,
    )


def _tiles_stage(slide: Slide, store: SlideStore, config: Config, *, again: bool) -> tuple[TileGrid, bool]:
    inputs = {
        "version": GRID_VERSION,
        "tissue": digest(inputs_below(store, "tissue", "tissue")),
        "config": config.tiles.model_dump(mode="json"),
    }
    name = grid_name(config.tiles)
    if not again and store.require_inputs(f"tiles/{name}", "tiles", inputs):
        return store.read_grid(name), False
    grid = plan_grid(slide.info, require_mpp(slide.info), store.read_tissue(), config.tiles)
    if again:
        store.clear_stage("tiles", grid=name)
    store.write_grid(grid, inputs)
    return grid, True


def _embedding_array(slide: Slide, store: SlideStore, grid: TileGrid, name: str, plan: RunPlan) -> EmbeddingArray:
    encoder = _encoder(name, plan, grid.achieved_mpp)
    inputs = {"tiles": digest(inputs_below(store, f"tiles/{grid.name}", "tiles")), "encoder": encoder.identity}
    if store.require_inputs(f"embeddings/{grid.name}/{name}", "embed", inputs):
        return store.embeddings(grid.name, name)
    return store.create_embeddings(
        grid.name,
        name,
        rows=len(grid),
        features=encoder.features,
        dtype=find_encoder(name).dtype,
        chunk_rows=plan.config.embed.chunk_rows or _by_device(_CHUNK_ROWS, encoder),
        about={"inputs": inputs, **encoder.about},
    )


def _known_grid(store: SlideStore, config: Config) -> TileGrid:
    name = grid_name(config.tiles)
    inputs_below(store, f"tiles/{name}", "tiles")
    return store.read_grid(name)


# Building a network takes seconds, so a process keeps the last ones; there are no more than a run names.
_encoders: dict[tuple[object, ...], Encoder] = {}


def _encoder(name: str, plan: RunPlan, tile_mpp: tuple[float, float]) -> Encoder:
    # Only handcrafted numbers depend on the exact size of a tile's pixels.
    key = (name, plan.config.embed, plan.threads, tile_mpp if find_encoder(name).loader == "handcrafted" else None)
    if key not in _encoders:
        _encoders[key] = build_encoder(name, plan.config.embed, mpp=tile_mpp, threads=plan.threads)
    return _encoders[key]


def _by_device(sizes: Mapping[str, int], encoder: Encoder) -> int:
    name = encoder.identity["name"]
    return sizes[name] if name in sizes else sizes[encoder.about["device"]]
