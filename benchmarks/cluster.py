"""What Dask costs and brings: two workers against one, the overhead of a slide, the memory of the scheduler.

    python benchmarks/cluster.py [--slides 200] [--rounds 3] [--large 8] [--empty 2000]

One drawn slide stands for many: they are hard links to it. A scheduler and its workers are processes of their own that
live through a whole part, so that starting them is not measured. Each table has its baseline in the same run.

1. Throughput: ``--large`` slides of 6,000 px, with one worker and with two, in turn; each worker reads with one thread.
2. Overhead: ``--slides`` slides of 4,000 px with one worker, against the same slides in this process. A slide's seconds
   in this process, less its computing, and what Dask adds. Computing is finding tissue, decoding, features, pictures:
   all but opening and writing files.
3. What a long cohort costs the scheduler and this process, in processor time and memory: ``--empty`` slides whose
   stages do nothing, so that only tasks, claims and book-keeping are left.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from pathopipe import files
from pathopipe.cluster import Place, run_cohort
from pathopipe.config import load_config
from pathopipe.pipeline import RunPlan, SlideOutcome
from pathopipe.records import SlideRef
from pathopipe.store import embeddings, groups, objects
from pathopipe.synth import SynthSpec, write_slide

CONFIG = load_config(None, ["embed.read_threads=1"])
MB = 2**20


def main() -> None:
    """Draw two slides, run the three parts, print a table each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=200, help="slides of 4,000 px")
    parser.add_argument("--large", type=int, default=8, help="slides of 6,000 px")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--empty", type=int, default=2000, help="slides on which nothing is done")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.rounds:
            measure_throughput(folder, arguments.large, arguments.rounds)
        if arguments.slides:
            measure_overhead(folder, arguments.slides)
        if arguments.empty:
            measure_scheduler(folder, arguments.empty)


def measure_throughput(folder: Path, n_slides: int, rounds: int) -> None:
    """One worker and two, in turn."""
    refs = links(folder, "large", n_slides, side_px=6000)
    print(f"{n_slides} slides of 6,000 px, handcrafted, {len(os.sched_getaffinity(0))} cores")
    print(f"{'round':>5} {'tiles':>6} {'1 worker s':>11} {'2 workers s':>12} {'tiles/s':>8} {'tiles/s':>8} {'gain':>6}")
    with cluster(folder, 1) as (one, _), cluster(folder, 2) as (two, _):
        for number in range(rounds + 1):
            seconds = []
            for name, place in (("one", one), ("two", two)):
                started = time.perf_counter()
                outcomes = run_cohort(refs, RunPlan(out=folder / f"{name}{number}", config=CONFIG), place=place)
                seconds.append(time.perf_counter() - started)
            tiles = sum(outcome.tiles for outcome in outcomes)
            # The first round warms the file cache and imports what the workers need.
            label = str(number) if number else "warm"
            rates = [tiles / each for each in seconds]
            print(
                f"{label:>5} {tiles:6d} {seconds[0]:11.1f} {seconds[1]:12.1f} {rates[0]:8.1f} {rates[1]:8.1f} "
                f"{seconds[0] / seconds[1]:6.2f}",
                flush=True,
            )


def measure_overhead(folder: Path, n_slides: int) -> None:
    """The same slides in this process and through Dask; memory as they go by."""
    refs = links(folder, "small", n_slides, side_px=4000)
    warm = links(folder, "warm", 2, side_px=4000)
    run_cohort(warm, RunPlan(out=folder / "warm-here", config=CONFIG))
    with timed_writes() as spent:
        started = time.perf_counter()
        outcomes = run_cohort(refs, RunPlan(out=folder / "here", config=CONFIG))
        here_s = (time.perf_counter() - started) / n_slides
    within_s = sum(outcome.seconds for outcome in outcomes) / n_slides
    writing_s = spent[0] / n_slides
    with cluster(folder, 1) as (place, _):
        run_cohort(warm, RunPlan(out=folder / "warm-there", config=CONFIG), place=place)
        started = time.perf_counter()
        run_cohort(refs, RunPlan(out=folder / "there", config=CONFIG), place=place)
        there_s = (time.perf_counter() - started) / n_slides
    print(f"\n{n_slides} slides of 4,000 px, handcrafted, one worker; seconds a slide")
    print(f"in this process {here_s:.3f}, through Dask {there_s:.3f}")
    print(f"overhead: writing files {writing_s:.3f} + between slides {here_s - within_s:.3f} ", end="")
    print(f"+ Dask {there_s - here_s:.3f} = {writing_s + here_s - within_s + there_s - here_s:.3f}")


_NOTHING = """
from pathopipe.cluster import sharing
from pathopipe.pipeline import Pass, Prepared, SlideOutcome

sharing.check_plan = lambda refs, plan: []
sharing.prepare_slide = lambda ref, plan: Prepared(ref, 1, (Pass("g", 1, 1, {"e": (0,)}),), (), 0.0)
sharing.embed_pending = lambda ref, plan, part, claim: {}
sharing.finish_slide = lambda prepared, plan, reports: SlideOutcome(prepared.ref.slide_id, "done")
"""


def measure_scheduler(folder: Path, n_slides: int) -> None:
    """Slides on which nothing is done."""
    (folder / "nothing.py").write_text(_NOTHING)
    refs = [SlideRef(f"s{number:06}", folder / "none.tiff") for number in range(n_slides)]
    own = psutil.Process()
    rows = []
    with cluster(folder, 1, "--preload", str(folder / "nothing.py")) as (place, scheduler):

        def ended(outcome: SlideOutcome) -> None:
            nonlocal n_ended
            n_ended += 1
            if n_ended % max(1, n_slides // 5) == 0:
                rows.append([n_ended, *(value for one in (scheduler, own) for value in figures(one))])

        n_ended, began = 0, [value for one in (scheduler, own) for value in figures(one)]
        started = time.perf_counter()
        run_cohort(refs, RunPlan(out=folder / "empty", config=CONFIG), place=place, on_slide=ended)
        seconds = time.perf_counter() - started
    print(f"\n{n_slides} slides of three tasks that do nothing, one worker: {seconds / n_slides * 1000:.1f} ms a slide")
    print(f"{'slides':>7} {'scheduler CPU ms/slide':>23} {'MB':>7} {'this process CPU ms/slide':>26} {'MB':>7}")
    for n_done, scheduler_s, scheduler_mb, own_s, own_mb in rows:
        a_slide = [(after - before) / n_done * 1000 for after, before in ((scheduler_s, began[0]), (own_s, began[2]))]
        print(f"{n_done:7d} {a_slide[0]:23.2f} {scheduler_mb:7.1f} {a_slide[1]:26.2f} {own_mb:7.1f}")


def figures(process: psutil.Process) -> tuple[float, float]:
    """Processor seconds and megabytes of a process."""
    times = process.cpu_times()
    return times.user + times.system, process.memory_info().rss / MB


def links(folder: Path, name: str, n_slides: int, *, side_px: int) -> list[SlideRef]:
    """One drawn slide under many names."""
    drawn = folder / f"{side_px}.tiff"
    if not drawn.exists():
        write_slide(drawn, SynthSpec(width_px=side_px, height_px=side_px, mpp=0.5, seed=5))
    (folder / name).mkdir()
    refs = []
    for number in range(n_slides):
        path = folder / name / f"{name}{number:05}.tiff"
        os.link(drawn, path)
        refs.append(SlideRef(path.stem, path))
    return refs


@contextlib.contextmanager
def cluster(folder: Path, n_workers: int, *further: str) -> Iterator[tuple[Place, psutil.Process]]:
    """A scheduler and its workers, each a process; where they are, and the scheduler's process."""
    file = folder / f"scheduler{n_workers}-{time.monotonic_ns()}.json"
    dask = [sys.executable, "-m", "dask"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    options = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    with contextlib.ExitStack() as stack:
        scheduler = stack.enter_context(subprocess.Popen([*dask, "scheduler", *options], **quiet))
        stack.callback(scheduler.terminate)
        words = ["--scheduler-file", str(file), "--nthreads", "1", "--nworkers", str(n_workers), "--no-dashboard"]
        while not file.exists():
            time.sleep(0.1)
        workers = stack.enter_context(
            subprocess.Popen([*dask, "worker", *words, "--memory-limit", "0", *further], cwd=folder, **quiet)
        )
        stack.callback(workers.terminate)
        wait_for_workers(file, n_workers)
        yield Place(scheduler=str(file)), psutil.Process(scheduler.pid)


def wait_for_workers(file: Path, n_workers: int) -> None:
    """Wait until all have come: the first one would begin alone."""
    from distributed import Client

    with Client(scheduler_file=str(file)) as client:
        client.wait_for_workers(n_workers, timeout=120)


@contextlib.contextmanager
def timed_writes() -> Iterator[list[float]]:
    """The seconds that files took from being opened to being on disk, added up."""
    spent = [0.0]
    whole = files.durable_file

    @contextlib.contextmanager
    def timed(path: Path) -> Iterator[object]:
        started = time.perf_counter()
        with whole(path) as file:
            yield file
        spent[0] += time.perf_counter() - started

    users = [module for module in (groups, embeddings, objects) if hasattr(module, "durable_file")]
    for module in users:
        module.durable_file = timed  # type: ignore[attr-defined]
    try:
        yield spent
    finally:
        for module in users:
            module.durable_file = whole  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
