"""The stages of one slide that ``run`` goes through: tissue, tiles, embeddings. No science in here."""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from pathopipe.embeddings.embed import EmbedReport, Lane, begin_reading, embed_chunks
from pathopipe.errors import TooManyBadTilesError
from pathopipe.pipeline.common import RunPlan, given_mask, opened
from pathopipe.pipeline.encoders import (
    batch_size_of,
    built,
    check_weights,
    departure,
    spec_of,
    specs_of,
    tiles_of,
)
from pathopipe.pipeline.prepare import Pass, Prepared, known_grid, prepare_slide
from pathopipe.records import STATUS_OK, SlideRef
from pathopipe.slide.base import Slide
from pathopipe.store import EmbeddingArray, SlideStore, store_path
from pathopipe.store.claims import Claim, claimed
from pathopipe.tiles.read import TileStream

__all__ = [
    "BegunSlide",
    "LaneReports",
    "SlideOutcome",
    "TilesDone",
    "begin_slide",
    "check_plan",
    "embed_pending",
    "finish_slide",
    "run_slide",
]

TilesDone = Callable[[str, int, int], None]
"""Told a slide's id, tiles done and tiles in all."""


@dataclass(frozen=True, slots=True)
class SlideOutcome:
    """How one slide ended."""

    slide_id: str
    status: Literal["done", "failed"]
    reason: str = ""
    refused: bool = False
    """It failed because its store holds something else; the store is as sound as before."""
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
        What the user should know before it starts, such as random weights, or tiles that are not as an encoder's
        authors cut them.

    Raises:
        UsageError: No such encoder, architecture or device, or a slide's given mask is missing.
        EncoderError: It can't be built here, it has no weights, or they don't fit.
    """
    for ref in refs:
        given_mask(ref.slide_id, plan.config)
    check_weights(plan.config)
    notes = []
    for spec in specs_of(plan.config):
        settled = tiles_of(spec, plan.config)
        encoder = built(spec, plan, (settled.mpp, settled.mpp))
        departs = departure(spec, settled.side_px, settled.mpp)
        notes += [f"{spec.name}: {note}" for note in (encoder.about.get("warning"), departs) if note]
    return notes


def run_slide(
    ref: SlideRef,
    plan: RunPlan,
    on_tiles: TilesDone = lambda slide_id, done, total: None,
    *,
    claim: Claim | None = None,
) -> SlideOutcome:
    """All stages of one slide, in this process.

    Args:
        ref: The slide.
        plan: What to do.
        on_tiles: Told the slide's id, tiles done and tiles in all as embedding goes on.
        claim: The caller's claim to the slide; one is taken and given back where it is left out.

    Raises:
        StoreBusyError: Another process is writing the slide.
        PathopipeError: The slide can't be done; what was finished is kept.
    """
    if claim is None:
        with claimed(plan.out, ref.slide_id) as own:
            return run_slide(ref, plan, on_tiles, claim=own)
    with begin_slide(ref, plan, claim=claim) as begun:
        return begun.complete(on_tiles)


def begin_slide(ref: SlideRef, plan: RunPlan, *, claim: Claim) -> "BegunSlide":
    """Open a slide and do its small stages.

    Raises:
        PathopipeError: The slide can't be done; what was finished is kept.
    """
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        slide = stack.enter_context(opened(ref, plan.config))
        prepared = prepare_slide(slide, ref, plan, started)
        return BegunSlide(slide, prepared, plan, claim, stack.pop_all())


class BegunSlide:
    """An open slide whose small stages are done; close it, or use it as a context.

    Args:
        slide: The slide.
        prepared: What is left to embed.
        plan: What to do.
        claim: The claim to the slide.
        closing: Closes the slide.
    """

    def __init__(
        self, slide: Slide, prepared: Prepared, plan: RunPlan, claim: Claim, closing: contextlib.ExitStack
    ) -> None:
        self.prepared = prepared
        self._slide = slide
        self._plan = plan
        self._claim = claim
        self._closing = closing
        self._first: _BegunPass | None = None
        self._seconds = prepared.seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the slide; what was not embedded is left for another run."""
        with self._closing:
            if self._first is not None:
                self._first.batches.close()

    def read_ahead(self) -> None:
        """Begin to read the first tiles; another slide can be embedded meanwhile.

        Raises:
            PathopipeError: The slide can't be done.
        """
        started = time.perf_counter()
        if self.prepared.passes:
            self._first = _begin_pass(self._slide, self._plan, self.prepared.passes[0], self._claim)
        self._seconds += time.perf_counter() - started

    def complete(self, on_tiles: TilesDone = lambda slide_id, done, total: None) -> SlideOutcome:
        """Embed the tiles and close the slide's stages; see :func:`run_slide`."""
        started = time.perf_counter()
        slide_id = self.prepared.ref.slide_id
        reports: list[LaneReports] = []
        for tiles_pass in self.prepared.passes:
            begun, self._first = self._first or _begin_pass(self._slide, self._plan, tiles_pass, self._claim), None
            done = 0

            def count(n_tiles: int, total: int = tiles_pass.n_tiles) -> None:
                nonlocal done
                done += n_tiles
                on_tiles(slide_id, done, total)

            if begun is not None:
                reports.append(begun.embed(count))
        outcome = finish_slide(self.prepared, self._plan, reports)
        return replace(outcome, seconds=self._seconds + time.perf_counter() - started)


LaneReports = Mapping[tuple[str, str], EmbedReport]
"""What embedding did, by grid and encoder."""


class _ClaimedRows(EmbeddingArray):
    """Embeddings that are written as long as nobody else has taken the slide over."""

    def __init__(self, store: SlideStore, group: str, claim: Claim) -> None:
        super().__init__(store, group)
        self._claim = claim

    def write_chunk(self, chunk: int, values: NDArray[Any], status: NDArray[np.uint8]) -> None:
        self._claim.check()
        super().write_chunk(chunk, values, status)


def embed_pending(
    ref: SlideRef,
    plan: RunPlan,
    tiles_pass: Pass,
    on_tiles: Callable[[int], None] = lambda n_tiles: None,
    *,
    claim: Claim | None = None,
) -> LaneReports:
    """Embed some chunks of a prepared slide; those that an earlier try has finished are passed over.

    Args:
        ref: The slide.
        plan: What to do.
        tiles_pass: The chunks.
        on_tiles: Told of the tiles of each batch.
        claim: The claim to the slide under which this is done.

    Raises:
        StoreBusyError: Another process has taken the slide over.
    """
    with opened(ref, plan.config) as slide:
        begun = _begin_pass(slide, plan, tiles_pass, claim)
        return begun.embed(on_tiles) if begun is not None else {}


@dataclass(frozen=True, slots=True)
class _BegunPass:
    """A pass whose first tiles are being read."""

    grid: str
    lanes: Mapping[str, Lane]
    """By encoder."""
    batches: TileStream

    def embed(self, on_tiles: Callable[[int], None]) -> LaneReports:
        reports = embed_chunks(self.batches, tuple(self.lanes.values()), on_tiles=on_tiles)
        return {(self.grid, name): report for name, report in zip(self.lanes, reports, strict=True)}


def _begin_pass(slide: Slide, plan: RunPlan, tiles_pass: Pass, claim: Claim | None) -> _BegunPass | None:
    """Begin to read what is still to be embedded; None where that is nothing."""
    store = SlideStore.open(store_path(plan.out, slide.info.slide_id))
    grid = known_grid(store, tiles_pass.grid)
    lanes: dict[str, Lane] = {}
    for name, wanted in tiles_pass.chunks.items():
        rows = store.embeddings(grid.name, name)
        if claim is not None:
            rows = _ClaimedRows(store, f"embeddings/{grid.name}/{name}", claim)
        # Work of a worker that died comes here again. Chunks with bad tiles are done, but wanted all the same.
        chunks = frozenset(wanted).difference(() if plan.retry_bad else rows.done_chunks())
        if chunks:
            encoder = built(spec_of(name, plan.config), plan, grid.achieved_mpp)
            lanes[name] = Lane(rows, encoder, chunks, batch_size_of(encoder, plan))
    if not lanes:
        return None
    threads = plan.config.embed.read_threads or plan.threads
    return _BegunPass(grid.name, lanes, begin_reading(slide, grid, tuple(lanes.values()), threads=threads))


def finish_slide(prepared: Prepared, plan: RunPlan, reports: Iterable[LaneReports]) -> SlideOutcome:
    """Close the stages of a slide and say how it went.

    Args:
        prepared: The slide.
        plan: What was to be done.
        reports: What embedding did.

    Raises:
        TooManyBadTilesError: More tiles were quarantined than ``embed.max_bad_share`` allows.
    """
    slide_id = prepared.ref.slide_id
    store = SlideStore.open(store_path(plan.out, slide_id))
    done: dict[tuple[str, str], EmbedReport] = {}
    whole = EmbedReport()
    for pass_reports in reports:
        for lane, report in pass_reports.items():
            done.setdefault(lane, EmbedReport()).add(report)
            whole.add(report)
    bad_tiles, bad_share = 0, 0.0
    for each in prepared.passes:
        for encoder in each.chunks:
            rows = store.embeddings(each.grid, encoder)
            bad = int(np.count_nonzero(rows.read_status() != STATUS_OK))
            bad_tiles, bad_share = max(bad_tiles, bad), max(bad_share, bad / max(rows.rows, 1))
            report = done.get((each.grid, encoder), EmbedReport())
            if report.tiles or not rows.attributes.get("complete"):
                rows.finish(bad_tiles=bad, seconds=report.seconds(), limited_by=report.limited_by())
    if bad_share > plan.config.embed.max_bad_share:
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
