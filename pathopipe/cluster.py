"""Runs slides in this process, or over Dask workers that share out the chunks of every slide; and calls of any kind."""

import contextlib
import logging
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from pathopipe.errors import PathopipeError, StoreChangedError, StoreWriteError, UsageError
from pathopipe.files import durable_file, remove_leftovers
from pathopipe.pipeline import (
    LaneReports,
    Prepared,
    RunPlan,
    SlideOutcome,
    embed_pending,
    finish_slide,
    prepare_slide,
    run_slide,
)
from pathopipe.records import SlideRef

__all__ = ["check_writable", "run_cohort", "spread_calls", "usable_cores"]

# A worker gets a few runs of chunks a slide: few enough that a task costs nothing, enough that the last one isn't long.
_RUNS_A_WORKER = 4

_SCHEDULER_ANSWERS_S = 10

SlideDone = Callable[[SlideOutcome], None]
TilesDone = Callable[[str, int, int], None]


def usable_cores() -> int:
    """Cores that this process may use, which on a cluster are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_writable(out: Path) -> None:
    """Make sure that the output folder takes files.

    Raises:
        UsageError: It is a file.
        StoreWriteError: It does not: no permission, read-only, or full.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: this is a file; name a folder")
    probe = out / ".write-test"
    try:
        with durable_file(probe) as file:
            file.write(bytes(64 * 1024))
        probe.unlink()
        remove_leftovers(out, deep=False)
    except OSError as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise StoreWriteError(
            f"{out}: the output folder can't be written ({cause.strerror}); what was finished before is kept: "
            "free space or choose another --out, then run the same command again"
        ) from None


def run_cohort(
    refs: Sequence[SlideRef],
    plan: RunPlan,
    *,
    workers: int = 1,
    on_slide: SlideDone = lambda outcome: None,
    on_tiles: TilesDone = lambda slide_id, done, total: None,
) -> list[SlideOutcome]:
    """Run every slide; one that fails is recorded and does not stop the others.

    Args:
        refs: The slides.
        plan: What to do with each.
        workers: Processes. With one, all happens in this process.
        on_slide: Told of each slide as it ends.
        on_tiles: Told the slide's id, tiles done and tiles in all.

    Returns:
        One outcome a slide, in the order of ``refs``.

    Raises:
        StoreWriteError: The output folder no longer takes any file. What was finished is kept.
    """
    check_writable(plan.out)
    run = _run_here if workers == 1 else _run_on_workers
    outcomes: dict[str, SlideOutcome] = {}
    for outcome in run(refs, plan, workers, on_tiles):
        outcomes[outcome.slide_id] = outcome
        on_slide(outcome)
    return [outcomes[ref.slide_id] for ref in refs]


def _run_here(refs: Sequence[SlideRef], plan: RunPlan, workers: int, on_tiles: TilesDone) -> Iterator[SlideOutcome]:
    for ref in refs:
        started = time.perf_counter()
        try:
            yield run_slide(ref, plan, on_tiles)
        except Exception as error:  # whatever is wrong with one slide, the cohort goes on
            yield _failed(ref, plan, error, time.perf_counter() - started)


@dataclass(slots=True)
class _Progress:
    """A slide whose chunks are out at the workers."""

    ref: SlideRef
    started: float = field(default_factory=time.perf_counter)
    prepared: Prepared | None = None
    out: int = 0
    tiles: dict[int, int] = field(default_factory=dict)
    """Tiles that are done, by pass."""
    reports: list[LaneReports] = field(default_factory=list)
    error: Exception | None = None


def _run_on_workers(
    refs: Sequence[SlideRef], plan: RunPlan, workers: int, on_tiles: TilesDone
) -> Iterator[SlideOutcome]:
    from distributed import as_completed

    with _client(workers) as client:
        progress = {ref.slide_id: _Progress(ref) for ref in refs}
        # Slides are prepared a few at a time, so that chunks of the first slides don't wait behind all preparations.
        waiting = list(refs)
        futures = as_completed(with_results=False)

        def submit(
            slide_id: str, pass_number: int | None, work: Callable[..., Any], *arguments: Any, priority: int
        ) -> None:
            future = client.submit(_attempt, work, *arguments, pure=False, priority=priority)
            futures.add(future)
            owner[future.key] = (slide_id, pass_number)

        def prepare_next() -> None:
            if waiting:
                ref = waiting.pop(0)
                progress[ref.slide_id].started = time.perf_counter()
                submit(ref.slide_id, None, prepare_slide, ref, plan, priority=0)

        owner: dict[Any, tuple[str, int | None]] = {}
        for _ in range(workers + 1):
            prepare_next()
        for future in futures:
            slide_id, number = owner.pop(future.key)
            slide = progress[slide_id]
            lost = future.exception()  # the worker died again and again
            result = lost if lost is not None else future.result()
            future.release()
            if isinstance(result, Exception):
                slide.error = slide.error or result
            if isinstance(result, Prepared):
                slide.prepared = result
                for at, whole in enumerate(result.passes):
                    for part in whole.parts(workers * _RUNS_A_WORKER):
                        slide.out += 1
                        submit(slide_id, at, embed_pending, slide.ref, plan, part, priority=1)
            elif number is not None and slide.prepared is not None:
                slide.out -= 1
                if not isinstance(result, Exception):
                    slide.reports.append(result)
                    read = max((report.tiles for report in result.values()), default=0)
                    slide.tiles[number] = slide.tiles.get(number, 0) + read
                    on_tiles(slide_id, slide.tiles[number], slide.prepared.passes[number].n_tiles)
            if slide.out == 0:
                prepare_next()
                yield _close(slide, plan)


def spread_calls(
    work: Callable[..., Any], calls: Sequence[tuple[Any, ...]], *, workers: int, scheduler: str | None = None
) -> Iterator[tuple[int, Any]]:
    """Call a function with each of some arguments on Dask workers; number and result of each as it ends.

    An object that stands in several calls is sent to the workers once.

    Args:
        work: Found by its name on the workers.
        calls: Arguments of each call.
        workers: Processes that are started on this machine.
        scheduler: Address of a Dask scheduler whose workers are used instead.

    Raises:
        UsageError: There is no scheduler at that address.
        Exception: What a call raised; those that have not ended are given up.
    """
    from distributed import as_completed

    objects = {id(argument): argument for arguments in calls for argument in arguments}
    uses = Counter(id(argument) for arguments in calls for argument in arguments)
    with _client(workers, scheduler) as client:
        sent = {key: client.scatter(objects[key], hash=False) for key, n_uses in uses.items() if n_uses > 1}
        numbers = {
            client.submit(_attempt, work, *(sent.get(id(one), one) for one in arguments), pure=False): number
            for number, arguments in enumerate(calls)
        }
        for future in as_completed(list(numbers)):
            result = future.result()
            if isinstance(result, Exception):
                raise result
            yield numbers.pop(future), result
            future.release()


def _attempt(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of some work, or the exception that ended it: one that is raised would fill the worker's log."""
    try:
        return work(*arguments)
    except Exception as error:
        return error


def _close(slide: _Progress, plan: RunPlan) -> SlideOutcome:
    seconds = time.perf_counter() - slide.started
    try:
        if slide.error is not None:
            raise slide.error
        assert slide.prepared is not None
        return replace(finish_slide(slide.prepared, plan, slide.reports), seconds=seconds)
    except Exception as error:
        return _failed(slide.ref, plan, error, seconds)


def _failed(ref: SlideRef, plan: RunPlan, error: Exception, seconds: float) -> SlideOutcome:
    if isinstance(error, StoreWriteError):
        check_writable(plan.out)  # a full disk fails every slide behind this one: say so once, now
    reason = str(error)
    if not isinstance(error, PathopipeError):
        log = plan.out / "logs" / f"{ref.slide_id}.txt"
        with durable_file(log) as file:
            file.write("".join(traceback.format_exception(error)).encode())
        reason = f"{ref.slide_id}: unexpected {type(error).__name__} ({error}); the traceback is in {log}"
    return SlideOutcome(
        slide_id=ref.slide_id,
        status="failed",
        reason=" ".join(reason.split()),
        refused=isinstance(error, StoreChangedError),
        seconds=seconds,
    )


@contextlib.contextmanager
def _client(workers: int, scheduler: str | None = None) -> Iterator[Any]:
    import dask
    from distributed import Client, LocalCluster

    quiet = {"distributed.comm.timeouts.connect": "60s", "logging.distributed": "critical"}
    with dask.config.set(quiet), contextlib.ExitStack() as stack:
        if scheduler is not None:
            try:
                client = Client(scheduler, timeout=_SCHEDULER_ANSWERS_S)
            except (OSError, ValueError) as error:
                raise UsageError(
                    f"--scheduler {scheduler}: no Dask scheduler answers there ({error}); start one with 'dask "
                    "scheduler' and give its address, such as tcp://host:8786, or use --workers"
                ) from None
            yield stack.enter_context(client)
            return
        with _keyboard_interrupt_held_back():
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                memory_limit=0,  # Dask's own limits would pause or kill a worker for pages that the file cache holds
                dashboard_address=":0",
                silence_logs=logging.CRITICAL,
            )
            stack.enter_context(cluster)
        yield stack.enter_context(Client(cluster))


@contextlib.contextmanager
def _keyboard_interrupt_held_back() -> Iterator[None]:
    """Hold SIGINT back while workers are started.

    A terminal sends Ctrl-C to the workers as well, and each would answer with a traceback. They inherit the mask of the
    thread that starts them, so it stays with them; this process gets its interrupt when the mask is lifted.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Starting it lifts the mask of the thread that starts it, which would be the one that starts the first worker.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
