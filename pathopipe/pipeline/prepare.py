"""The small stages of a slide: tissue, tiles, and the list of what is to be embedded."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import pathopipe
from pathopipe.config import TilesConfig
from pathopipe.embeddings.recipe import EncoderSpec
from pathopipe.pipeline.common import RunPlan, inputs_below, tissue_stage, write_pictures
from pathopipe.pipeline.encoders import built, chunk_rows_of, departure, tilings_of
from pathopipe.records import SlideRef, TileGrid
from pathopipe.slide.base import Slide
from pathopipe.slide.resolution import require_mpp
from pathopipe.store import EmbeddingArray, SlideStore, digest, store_path
from pathopipe.tiles.cellularity import cellularity, select_cellular
from pathopipe.tiles.grid import (
    GRID_VERSION,
    check_fit,
    grid_around,
    grid_name,
    name_around,
    plan_grid,
    scales_around,
    tiles_settings,
)
from pathopipe.tissue import find_tissue

__all__ = ["Pass", "Prepared", "known_grid", "prepare_slide"]

# A chunk is held in memory until it is whole; grids of tokens have rows of half a megabyte.
_LARGEST_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Pass:
    """What one reading of the tiles of a grid is to serve; encoders whose chunks are equally long share it."""

    grid: str
    n_tiles: int
    chunk_rows: int
    chunks: Mapping[str, tuple[int, ...]]
    """Chunks to compute, by encoder; none for one that is done."""

    def parts(self, n_parts: int, longest: int | None = None) -> "Iterator[Pass]":
        """Cut into at most ``n_parts`` passes over runs of chunks; into more where a run would be too long.

        Args:
            n_parts: How many parts are wanted.
            longest: Most chunks of a run.
        """
        wanted = sorted(set().union(*self.chunks.values()))
        length = max(1, -(-len(wanted) // n_parts))
        if longest is not None:
            length = min(length, longest)
        for first in range(0, len(wanted), length):
            run = set(wanted[first : first + length])
            taken = {encoder: tuple(sorted(run.intersection(chunks))) for encoder, chunks in self.chunks.items()}
            yield replace(self, chunks={encoder: chunks for encoder, chunks in taken.items() if chunks})


@dataclass(frozen=True, slots=True)
class Prepared:
    """A slide after its small stages: what is left to embed."""

    ref: SlideRef
    n_tiles: int
    """Of its largest grid."""
    passes: tuple[Pass, ...]
    did: tuple[str, ...]
    """Stages that were computed now, not found in the store."""
    seconds: float
    """How long the small stages took."""

    @property
    def n_chunks(self) -> int:
        """Chunks to embed, one for several encoders that share it."""
        return sum(len(set().union(*each.chunks.values())) for each in self.passes)


def prepare_slide(slide: Slide, ref: SlideRef, plan: RunPlan, started: float) -> Prepared:
    """Tissue and tiles of a slide, and the list of chunks that are still to be embedded.

    Args:
        slide: The slide, open.
        ref: Where it is.
        plan: What to do.
        started: When work on it began, by ``time.perf_counter``.

    Raises:
        PathopipeError: The slide can't be done; what was finished is kept.
    """
    store, fresh = SlideStore(store_path(plan.out, ref.slide_id)), plan.fresh
    if plan.retry_bad and store.inputs("tissue") and store.read_tissue().unreadable_share > 0:
        fresh = "tissue"  # it was looked for on a damaged picture
    tilings = tilings_of(plan.config)
    if "tiles" in plan.stages:
        for settled in tilings:
            check_fit(slide.info, require_mpp(slide.info), settled)
    # Nothing is forgotten before what takes its place can be had.
    found = find_tissue(slide, plan.config.tissue) if fresh == "tissue" else None
    if found is not None:
        # Someone may be looking for objects in there at this moment.
        with store.writing_objects() if store.children("objects") else contextlib.nullcontext():
            store.clear_stage("tissue")
    store = SlideStore.create_or_open(store.path, slide.info, created_by=f"pathopipe {pathopipe.__version__}")
    store.remove_leftovers()
    did = []
    tissue = None
    if "tissue" in plan.stages:
        tissue, computed = tissue_stage(slide, store, plan.config, found)
        did += ["tissue"] * computed
    grids: list[TileGrid] = []
    passes: list[Pass] = []
    for settled, specs in tilings.items():
        if "tiles" in plan.stages:
            found_grids, computed = _tiles_stage(slide, store, settled, plan, again=fresh == "tiles")
            did += ["tiles"] * (computed and "tiles" not in did)
        elif "embed" in plan.stages:
            found_grids = [known_grid(store, name) for name in _grid_names(settled)]
        else:
            continue
        grids += found_grids
        for grid in found_grids if "embed" in plan.stages else ():
            if fresh == "embed":
                store.clear_stage("embed", grid=grid.name, encoders=tuple(spec.name for spec in specs))
            arrays = _embedding_arrays(store, grid, specs, plan)
            passes += _passes(grid, arrays, plan)
            did += [name for name, rows in arrays.items() if not (rows.attributes.get("complete") or name in did)]
    did += [name for each in passes for name, chunks in each.chunks.items() if chunks and name not in did]
    if tissue is not None or "tiles" in plan.stages:
        write_pictures(slide, store, plan, tissue, grids[0] if grids else None, again=bool(did))
    n_tiles = max((len(grid) for grid in grids), default=0)
    return Prepared(ref, n_tiles, tuple(passes), tuple(did), time.perf_counter() - started)


def _grid_names(config: TilesConfig) -> list[str]:
    name = grid_name(config)
    return [name, *(name_around(name, scale_um) for scale_um in scales_around(config))]


def _tiles_stage(
    slide: Slide, store: SlideStore, config: TilesConfig, plan: RunPlan, *, again: bool
) -> tuple[list[TileGrid], bool]:
    """The grid, then those around it, and whether any was laid now."""
    tissue_inputs = digest(inputs_below(store, "tissue", "tissue"))

    def inputs_of(scale_um: float | None) -> dict[str, Any]:
        return {"version": GRID_VERSION, "tissue": tissue_inputs, "config": tiles_settings(config, scale_um)}

    names = dict(zip((None, *scales_around(config)), _grid_names(config), strict=True))
    missing = [
        scale_um
        for scale_um, name in names.items()
        if again or not store.require_inputs(f"tiles/{name}", "tiles", inputs_of(scale_um))
    ]
    if not missing:
        return [store.read_grid(name) for name in names.values()], False
    mpp_l0, tissue = require_mpp(slide.info), store.read_tissue()
    if None in missing:
        grid = plan_grid(slide.info, mpp_l0, tissue, config)
        if config.cellular_share is not None:
            dark_field = "dark-field" in tissue.flags
            shares = cellularity(slide, grid, threads=plan.threads, dark_field=dark_field)
            grid = select_cellular(grid, shares, config.cellular_share)
    else:
        grid = store.read_grid(names[None])
    for scale_um in missing:
        if again:
            store.clear_stage("tiles", grid=names[scale_um])
        laid = grid if scale_um is None else grid_around(grid, slide.info, mpp_l0, tissue, config, scale_um)
        store.write_grid(laid, inputs_of(scale_um))
    return [store.read_grid(name) for name in names.values()], True


def _embedding_arrays(
    store: SlideStore, grid: TileGrid, specs: Sequence[EncoderSpec], plan: RunPlan
) -> dict[str, EmbeddingArray]:
    """The arrays of some encoders on a grid, made where they are missing."""
    encoders = {spec.name: built(spec, plan, grid.achieved_mpp) for spec in specs}
    # Equally long chunks let encoders share a pass; the longest are those of the slowest to start, a GPU's.
    wanted = max(chunk_rows_of(encoder, plan) for encoder in encoders.values())
    arrays = {}
    for spec in specs:
        encoder = encoders[spec.name]
        inputs = {"tiles": digest(inputs_below(store, f"tiles/{grid.name}", "tiles")), "encoder": encoder.identity}
        if store.require_inputs(f"embeddings/{grid.name}/{spec.name}", "embed", inputs):
            arrays[spec.name] = store.embeddings(grid.name, spec.name)
            continue
        row_bytes = encoder.features * np.dtype(spec.dtype).itemsize
        about = {"inputs": inputs, **encoder.about, "departs": departure(spec, grid.side_px, grid.mpp)}
        arrays[spec.name] = store.create_embeddings(
            grid.name,
            spec.name,
            rows=len(grid),
            features=encoder.features,
            dtype=spec.dtype,
            chunk_rows=max(1, min(wanted, _LARGEST_CHUNK_BYTES // row_bytes)),
            about=about,
        )
    return arrays


def _passes(grid: TileGrid, arrays: Mapping[str, EmbeddingArray], plan: RunPlan) -> list[Pass]:
    """What is still to be computed, encoders with equal chunks together."""
    by_length: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, rows in arrays.items():
        todo = set(range(rows.n_chunks)) - set(rows.done_chunks())
        if plan.retry_bad:
            todo |= set(rows.bad_chunks())
        by_length.setdefault(rows.chunk_rows, {})[name] = tuple(sorted(todo))
    return [Pass(grid.name, len(grid), chunk_rows, chunks) for chunk_rows, chunks in by_length.items()]


def known_grid(store: SlideStore, name: str) -> TileGrid:
    """A grid that is finished; StoreError where it is not."""
    inputs_below(store, f"tiles/{name}", "tiles")
    return store.read_grid(name)
