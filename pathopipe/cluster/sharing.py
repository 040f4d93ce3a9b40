"""Shares out the chunks of slides among Dask workers. What waits, waits here: the scheduler holds a few tasks only."""

import contextlib
import queue
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from typing import Any

from distributed import KilledWorker

from pathopipe.cluster.clients import open_client
from pathopipe.cluster.cohort import Queue, Tell
from pathopipe.cluster.fitness import Terms, Unfit, Worker, attempt, describe, shared_terms
from pathopipe.cluster.outcomes import check_writable, failed
from pathopipe.cluster.placement import Place
from pathopipe.errors import PathopipeError, SlideError, UsageError
from pathopipe.pipeline import (
    LaneReports,
    Pass,
    Prepared,
    RunPlan,
    SlideOutcome,
    TilesDone,
    begin_slide,
    check_plan,
    embed_pending,
    finish_slide,
)
from pathopipe.records import SlideRef
from pathopipe.remote import RemotePath
from pathopipe.store.claims import Claim, Claims

__all__ = ["run_on_workers"]

# At the end of a cohort a worker gets a few runs of chunks a slide: enough that the last one isn't long.
_RUNS_A_WORKER = 4
# Slides take turns after every run of chunks, so none may be long.
_LONGEST_RUN = 8
_LOOKS_EVERY_S = 2.0
_FIRST_WORKER_S = 60.0
_NO_WORKERS_S = 600.0
_TELLS_EVERY_S = 60.0


def run_on_workers(
    refs: Sequence[SlideRef], plan: RunPlan, place: Place, on_tiles: TilesDone, on_note: Tell
) -> Generator[SlideOutcome, None, None]:
    """Run slides on Dask workers, each outcome as it comes.

    A slide of few chunks is one task. Others are prepared, cut into runs of chunks and finished on the workers, and
    take turns run by run: one giant slide fills a cluster, and small ones pass it. There are hardly more tasks out than
    workers, and hardly more slides begun than tasks, however long the cohort is.

    Raises:
        UsageError: The plan can't be carried out there, or the place is not there: nothing was computed.
        StoreWriteError: The output folder no longer takes any file. What was finished is kept.
        PathopipeError: The workers are lost. What was finished is kept.
    """
    with contextlib.ExitStack() as stack:
        logs = plan.out / "logs" / "slurm" if place.slurm and not isinstance(plan.out, RemotePath) else None
        client = stack.enter_context(open_client(place, logs))
        with _scheduler_may_go(place):
            check_writable(plan.out)
            terms = stack.enter_context(shared_terms(plan.out if place.is_elsewhere else None, refs))
            workers = _first_workers(client, place, terms, on_note)
            plan = replace(plan, threads=_threads(client, workers, plan) if place.is_elsewhere else plan.threads)
            wanted = refs if plan.config.tissue.mask is not None else ()
            for note in _result_of(client.submit(attempt, terms, check_plan, wanted, plan, pure=False)):
                on_note(note)
        claims = stack.enter_context(Claims(plan.out))
        yield from _Shared(client, place, plan, terms, claims, Queue(refs, claims, on_note), on_tiles, on_note).run()


@dataclass(slots=True)
class _Task:
    """One piece of work for a worker."""

    slide_id: str
    work: Callable[..., Any]
    arguments: tuple[Any, ...]
    pass_number: int | None = None
    """The pass it is part of; None for what comes before and after embedding."""
    deaths: int = 0
    """How often Dask gave it up because its workers had died."""


@dataclass(slots=True)
class _Slide:
    """A slide that was begun and has not ended."""

    ref: SlideRef
    claim: Claim
    started: float = field(default_factory=time.perf_counter)
    prepared: Prepared | None = None
    tasks: deque[_Task] = field(default_factory=deque)
    """Waiting for a worker."""
    n_open: int = 0
    """Tasks that have not ended, waiting ones too."""
    tiles: dict[int, int] = field(default_factory=dict)
    """Tiles that are done, by pass."""
    reports: list[LaneReports] = field(default_factory=list)
    error: Exception | None = None


class _Shared:
    """The slides that are being computed, and the tasks that are out."""

    def __init__(
        self,
        client: Any,
        place: Place,
        plan: RunPlan,
        terms: Terms,
        claims: Claims,
        waiting: Queue,
        on_tiles: TilesDone,
        on_note: Tell,
    ) -> None:
        self._client, self._place, self._plan, self._terms = client, place, plan, terms
        self._claims, self._waiting = claims, waiting
        self._on_tiles, self._on_note = on_tiles, on_note
        self._slides: dict[str, _Slide] = {}
        self._turns: deque[str] = deque()
        """Slides with waiting tasks; the first one's turn comes next."""
        self._out: dict[Any, _Task] = {}
        self._suspects: deque[_Task] = deque()
        """Tasks with which workers died: tried once more, alone, when there is nothing else to do."""
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._workers: tuple[str, ...] = ()
        self._unfit: set[str] = set()
        self._looked = -_LOOKS_EVERY_S
        self._seen_workers = self._told = time.monotonic()

    def run(self) -> Iterator[SlideOutcome]:
        """Outcomes as they come."""
        while self._waiting or self._slides:
            with _scheduler_may_go(self._place):
                self._look()
            self._begin_slides()
            with _scheduler_may_go(self._place):
                self._send()
            if not self._out:
                # Every slide that is left is being written by another run.
                self._waiting.tell_whom_it_waits_for()
                time.sleep(_LOOKS_EVERY_S / 4)
                continue
            with contextlib.suppress(queue.Empty):
                yield from self._take_in(self._ended.get(timeout=_LOOKS_EVERY_S))

    @property
    def _room(self) -> int:
        """How many tasks may be out: a few more than workers, so that none waits for the way here and back."""
        n_workers = max(1, len(self._workers))
        return n_workers + 1 + n_workers // 4

    def _look(self) -> None:
        """Count the workers, now and then."""
        now = time.monotonic()
        if now - self._looked < _LOOKS_EVERY_S:
            return
        self._looked = now
        if self._client.status != "running":
            raise OSError("the connection is closed")
        there = self._client.nthreads()
        self._unfit &= set(there)
        self._workers = tuple(address for address in there if address not in self._unfit)
        if self._workers:
            self._seen_workers = now
            return
        gone_s = now - self._seen_workers
        if gone_s > _NO_WORKERS_S and self._place.slurm is None:
            raise PathopipeError(
                f"there has been no worker for {gone_s:.0f} s; what was finished is kept: start workers, then run the "
                "same command again"
            )
        if gone_s > _TELLS_EVERY_S and now - self._told > _TELLS_EVERY_S:
            self._told = now
            self._on_note(f"no worker for {gone_s:.0f} s; waiting for one")

    def _begin_slides(self) -> None:
        while len(self._slides) < self._room:
            taken = self._waiting.take()
            if taken is None:
                return
            ref, claim = taken
            slide = _Slide(ref, claim)
            self._slides[ref.slide_id] = slide
            # As long as other slides wait, this one need not keep all workers busy.
            is_shared = len(self._workers) > 1 and len(self._waiting) < self._room
            self._add(slide, _Task(ref.slide_id, _begin, (claim, ref, self._plan, 1 if is_shared else _LONGEST_RUN)))

    def _add(self, slide: _Slide, *tasks: _Task) -> None:
        if not slide.tasks:
            self._turns.append(slide.ref.slide_id)
        slide.tasks.extend(tasks)
        slide.n_open += len(tasks)

    def _send(self) -> None:
        """Give tasks to the scheduler as long as there is room, one slide after the other."""
        while self._turns and len(self._out) < self._room:
            slide = self._slides[self._turns.popleft()]
            self._submit(slide.tasks.popleft())
            if slide.tasks:
                self._turns.append(slide.ref.slide_id)
        if self._suspects and not self._out:
            self._submit(self._suspects.popleft())

    def _submit(self, task: _Task) -> None:
        # Names of workers only where some must be left out: a worker that comes later may take the task, too.
        chosen = {"workers": self._workers} if self._unfit and self._workers else {}
        future = self._client.submit(attempt, self._terms, task.work, *task.arguments, pure=False, **chosen)
        self._out[future.key] = task
        future.add_done_callback(self._ended.put)

    def _take_in(self, future: Any) -> Iterator[SlideOutcome]:
        """Go on with the slide of a task that has ended."""
        task = self._out.pop(future.key)
        slide = self._slides[task.slide_id]
        if future.status in ("cancelled", "lost"):
            raise _lost(self._place, "the connection broke")
        try:
            result = future.result()
        except Exception as error:
            # Errors of the work itself come as results: this is one of the way here, of one task or of all.
            if isinstance(error, CancelledError) or self._client.status != "running":
                raise _lost(self._place, str(error)) from None
            result = error
        future.release()
        if isinstance(result, Unfit):
            if result.address not in self._unfit:
                self._on_note(f"worker {result.address} {result.problem}; it gets no work")
            self._unfit.add(result.address)
            self._looked = -_LOOKS_EVERY_S
            slide.n_open -= 1
            self._add(slide, task)
            return
        if isinstance(result, KilledWorker):
            task.deaths += 1
            if task.deaths == 1:
                # Dask blames all that stood in line at the worker as well.
                self._suspects.append(task)
                return
            result = SlideError(
                f"{task.slide_id}: workers died each time they came to it, most often for want of memory; what was "
                "finished is kept: use fewer --workers, a smaller embed.batch_size or more memory, then run again",
                slide_id=task.slide_id,
            )
        slide.n_open -= 1
        if isinstance(result, Exception):
            slide.error = slide.error or result
            slide.n_open -= len(slide.tasks)
            slide.tasks.clear()
            with contextlib.suppress(ValueError):
                self._turns.remove(task.slide_id)
        elif isinstance(result, SlideOutcome):
            if slide.prepared is None:
                self._on_tiles(task.slide_id, result.tiles, result.tiles)
            yield self._end(slide, replace(result, seconds=time.perf_counter() - slide.started))
            return
        elif isinstance(result, Prepared):
            slide.prepared = result
            self._add(slide, *self._runs(slide, result))
        elif task.pass_number is not None and slide.prepared is not None:
            slide.reports.append(result)
            read = max((report.tiles for report in result.values()), default=0)
            slide.tiles[task.pass_number] = slide.tiles.get(task.pass_number, 0) + read
            self._on_tiles(
                task.slide_id, slide.tiles[task.pass_number], slide.prepared.passes[task.pass_number].n_tiles
            )
        if slide.n_open == 0:
            if slide.error is not None:
                seconds = time.perf_counter() - slide.started
                yield self._end(slide, failed(slide.ref, self._plan, slide.error, seconds))
            else:
                arguments = (slide.claim, slide.prepared, self._plan, slide.reports)
                self._add(slide, _Task(task.slide_id, _finish, arguments))

    def _runs(self, slide: _Slide, prepared: Prepared) -> Iterator[_Task]:
        # As long as enough other slides wait, a slide need not keep all workers busy.
        n_parts = 1 if len(self._waiting) >= self._room else max(1, len(self._workers)) * _RUNS_A_WORKER
        for number, whole in enumerate(prepared.passes):
            for part in whole.parts(n_parts, _LONGEST_RUN):
                yield _Task(slide.ref.slide_id, _embed, (slide.claim, slide.ref, self._plan, part), pass_number=number)

    def _end(self, slide: _Slide, outcome: SlideOutcome) -> SlideOutcome:
        del self._slides[slide.ref.slide_id]
        self._claims.release(slide.ref.slide_id)
        return outcome


def _begin(claim: Claim, ref: SlideRef, plan: RunPlan, most_chunks: int) -> SlideOutcome | Prepared:
    """The whole of a slide with few chunks; the small stages of any other."""
    claim.check()
    with begin_slide(ref, plan, claim=claim) as begun:
        return begun.complete() if begun.prepared.n_chunks <= most_chunks else begun.prepared


def _embed(claim: Claim, ref: SlideRef, plan: RunPlan, part: Pass) -> LaneReports:
    return embed_pending(ref, plan, part, claim=claim)


def _finish(claim: Claim, prepared: Prepared, plan: RunPlan, reports: Sequence[LaneReports]) -> SlideOutcome:
    claim.check()
    return finish_slide(prepared, plan, reports)


def _first_workers(client: Any, place: Place, terms: Terms, on_note: Tell) -> dict[str, Worker]:
    """What the first workers say of themselves, when one at least is there.

    Raises:
        UsageError: There is none, or one can't do the work.
    """
    began = time.monotonic()
    told = began - _TELLS_EVERY_S + _LOOKS_EVERY_S * 2
    while not client.nthreads():
        now = time.monotonic()
        if place.slurm is None and now - began > _FIRST_WORKER_S:
            raise UsageError(
                f"--scheduler {place.scheduler}: no worker has come in {_FIRST_WORKER_S:.0f} s; start some with "
                f"'dask worker {place.scheduler} --nworkers -1 --nthreads 1'"
            )
        if now - told > _TELLS_EVERY_S:
            told = now
            on_note("waiting for the first worker")
        time.sleep(0.2)
    if not place.is_elsewhere:
        return {}
    answers = client.run(describe, terms, on_error="return")
    problems = []
    for address, answer in sorted(answers.items()):
        if isinstance(answer, Worker) and answer.problem is not None:
            problems.append(f"worker {address} on {answer.host} {answer.problem}")
        elif isinstance(answer, BaseException):
            problems.append(
                f"worker {address} can't run pathopipe {dict(terms.versions)['pathopipe']} "
                f"({type(answer).__name__}: {answer})"
            )
    if problems:
        more = f" (and {len(problems) - 1} more workers)" if len(problems) > 1 else ""
        raise UsageError(problems[0] + more)
    threads = {address: n for address, n in client.nthreads().items() if n > 1}
    if threads:
        address, n = next(iter(threads.items()))
        on_note(
            f"worker {address} has {n} threads, but does one task at a time; for one process a core start it with "
            "'--nworkers -1 --nthreads 1'"
        )
    return {address: answer for address, answer in answers.items() if isinstance(answer, Worker)}


def _threads(client: Any, workers: dict[str, Worker], plan: RunPlan) -> int:
    """Threads that every worker may keep busy: the same for all, because they can change a network's numbers."""
    a_host: dict[str, int] = {}
    for worker in workers.values():
        a_host[worker.host] = a_host.get(worker.host, 0) + 1
    shares = [max(1, worker.cores // a_host[worker.host]) for worker in workers.values()]
    return min(shares, default=plan.threads)


def _result_of(future: Any) -> Any:
    """What a task brings; its error is raised."""
    result = future.result()
    if isinstance(result, Unfit):
        raise UsageError(f"worker {result.address} {result.problem}")
    if isinstance(result, Exception):
        raise result
    return result


@contextlib.contextmanager
def _scheduler_may_go(place: Place) -> Iterator[None]:
    """Say in one line that the connection to the scheduler is lost."""
    try:
        yield
    except PathopipeError:
        raise
    except (OSError, CancelledError) as error:
        raise _lost(place, str(error)) from None


def _lost(place: Place, why: str) -> PathopipeError:
    where = place.scheduler or "of this run"
    return PathopipeError(
        f"the Dask scheduler {where} does not answer any more ({' '.join(why.split())}); what was finished is kept, "
        "the same command goes on from there"
    )
