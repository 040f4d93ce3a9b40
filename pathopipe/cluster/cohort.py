"""Runs a cohort: every slide once, whatever becomes of the others; slides that another run is writing come last."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from pathopipe.cluster.outcomes import check_writable, failed
from pathopipe.cluster.placement import Place
from pathopipe.errors import StoreBusyError
from pathopipe.pipeline import BegunSlide, RunPlan, SlideOutcome, TilesDone, begin_slide, check_plan
from pathopipe.records import SlideRef
from pathopipe.store.claims import Claim, Claims

__all__ = ["Queue", "run_cohort"]

_ASKS_AGAIN_S = 2.0

SlideDone = Callable[[SlideOutcome], None]
Tell = Callable[[str], None]


def run_cohort(
    refs: Sequence[SlideRef],
    plan: RunPlan,
    *,
    workers: int = 1,
    place: Place | None = None,
    on_slide: SlideDone = lambda outcome: None,
    on_tiles: TilesDone = lambda slide_id, done, total: None,
    on_note: Tell = lambda note: None,
) -> list[SlideOutcome]:
    """Run every slide; one that fails is recorded and does not stop the others.

    A slide that another process is writing is put off until the others are done, and then waited for.

    Args:
        refs: The slides.
        plan: What to do with each.
        workers: Processes on this machine. With one, all happens in this process.
        place: Where else to compute; takes the place of ``workers``.
        on_slide: Told of each slide as it ends.
        on_tiles: Told the slide's id, tiles done and tiles in all.
        on_note: Told what the user should know: of the plan, of workers, of other runs.

    Returns:
        One outcome a slide, in the order of ``refs``.

    Raises:
        UsageError: The plan can't be carried out, or the place is not there: nothing was computed.
        StoreWriteError: The output folder no longer takes any file. What was finished is kept.
        PathopipeError: The workers are lost. What was finished is kept.
    """
    place = place if place is not None else Place(workers=workers)
    if place.is_here:
        for note in check_plan(refs, plan):
            on_note(note)
        check_writable(plan.out)
        run = _run_here(refs, plan, on_tiles, on_note)
    else:
        from pathopipe.cluster.sharing import run_on_workers

        if place.is_elsewhere:
            refs, plan = [_with_whole_path(ref) for ref in refs], _with_whole_paths(plan)
        run = run_on_workers(refs, plan, place, on_tiles, on_note)
    outcomes: dict[str, SlideOutcome] = {}
    with contextlib.closing(run):  # whatever stops it, claims are given back now, not when someone clears up
        for outcome in run:
            outcomes[outcome.slide_id] = outcome
            on_slide(outcome)
    return [outcomes[ref.slide_id] for ref in refs]


class Queue:
    """The slides that wait for their turn; each is claimed when it is taken out.

    Args:
        refs: The slides.
        claims: What this process claims.
        on_note: Told whom it waits for.
    """

    def __init__(self, refs: Sequence[SlideRef], claims: Claims, on_note: Tell) -> None:
        self._claims = claims
        self._on_note = on_note
        self._waiting = deque(refs)
        self._busy: deque[tuple[SlideRef, str]] = deque()
        self._ask_again = 0.0
        self._told: set[str] = set()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._busy)

    def take(self) -> tuple[SlideRef, Claim] | None:
        """The next slide and the claim to it; None where there is none, or none that is free at present.

        Raises:
            StoreWriteError: The output folder takes no files.
        """
        while self._waiting:
            ref = self._waiting.popleft()
            try:
                return ref, self._claims.take(ref.slide_id)
            except StoreBusyError as error:
                self._busy.append((ref, str(error)))
        if time.monotonic() >= self._ask_again:
            self._ask_again = time.monotonic() + _ASKS_AGAIN_S
            for _ in range(len(self._busy)):
                ref, _ = self._busy.popleft()
                try:
                    claim = self._claims.take(ref.slide_id)
                except StoreBusyError as error:
                    self._busy.append((ref, str(error)))
                else:
                    self._ask_again = 0.0
                    return ref, claim
        return None

    def tell_whom_it_waits_for(self) -> None:
        """Say, once a slide, that there is nothing left to do but to wait for another process."""
        for ref, reason in self._busy:
            if ref.slide_id not in self._told:
                self._told.add(ref.slide_id)
                self._on_note(f"waiting: {reason.removesuffix('; wait for it, then run again')}")


def _run_here(
    refs: Sequence[SlideRef], plan: RunPlan, on_tiles: TilesDone, on_note: Tell
) -> Generator[SlideOutcome, None, None]:
    """One slide after the other; while one is embedded, the next one's tissue is found and its first tiles are read."""
    with Claims(plan.out) as claims, ThreadPoolExecutor(1, thread_name_prefix="next-slide") as pool:
        queue = Queue(refs, claims, on_note)
        current: _Begun | None = None
        following = _begin_next(queue, plan, pool)
        try:
            while following is not None or queue:
                if following is None:
                    queue.tell_whom_it_waits_for()
                    time.sleep(_ASKS_AGAIN_S)
                    following = _begin_next(queue, plan, pool)
                    continue
                current, following = following, None
                ref, future = current
                started = time.perf_counter()
                try:
                    with future.result() as begun:
                        following = _begin_next(queue, plan, pool)
                        outcome = begun.complete(on_tiles)
                except Exception as error:  # whatever is wrong with one slide, the cohort goes on
                    outcome = failed(ref, plan, error, time.perf_counter() - started)
                finally:
                    claims.release(ref.slide_id)
                yield outcome
                following = following or _begin_next(queue, plan, pool)
        finally:
            for _, future in filter(None, (current, following)):
                if not future.cancel() and future.exception() is None:
                    future.result().close()


_Begun = tuple[SlideRef, Future[BegunSlide]]


def _begin_next(queue: Queue, plan: RunPlan, pool: ThreadPoolExecutor) -> _Begun | None:
    """The next slide that is free, and its beginning."""
    taken = queue.take()
    return None if taken is None else (taken[0], pool.submit(_begin, *taken, plan))


def _begin(ref: SlideRef, claim: Claim, plan: RunPlan) -> BegunSlide:
    begun = begin_slide(ref, plan, claim=claim)
    try:
        begun.read_ahead()
    except BaseException:
        begun.close()
        raise
    return begun


def _with_whole_path(ref: SlideRef) -> SlideRef:
    return replace(ref, path=ref.path.absolute())


def _with_whole_paths(plan: RunPlan) -> RunPlan:
    """The plan with paths that mean the same on every machine."""
    config = plan.config
    embed = config.embed
    weights = embed.weights
    whole = {
        "weights": {name: path.absolute() for name, path in weights.items()}
        if isinstance(weights, dict)
        else weights and weights.absolute(),
        "weights_dir": embed.weights_dir and embed.weights_dir.absolute(),
        "catalog": embed.catalog and embed.catalog.absolute(),
    }
    mask = config.tissue.mask
    tissue = config.tissue.model_copy(update={"mask": mask and str(Path(mask).absolute())})
    cache_dir = config.slide.cache_dir
    slide = config.slide.model_copy(update={"cache_dir": cache_dir and cache_dir.absolute()})
    config = config.model_copy(update={"embed": embed.model_copy(update=whole), "tissue": tissue, "slide": slide})
    return replace(plan, out=plan.out.absolute(), config=config)
