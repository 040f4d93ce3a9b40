"""What Dask costs and brings: two workers against one, the overhead of a slide, the memory of the scheduler.

    python benchmarks/cluster.py [--large 8] [--rounds 3] [--slides 200] [--side-px 4000] [--empty 2000]

One drawn slide stands for many: they are hard links to it. A scheduler and its workers are processes of their own that
live through a whole part, so that starting them is not measured. Each table has its baseline in the same run; 0 leaves
a part out.

1. Throughput: ``--large`` slides of 6,000 px, with one worker and with two, in turn; each worker reads with one thread.
2. Overhead: ``--slides`` slides of ``--side-px`` with one worker, against the same slides in this process, 20 and
   20 in turn. Beside wall time stands processor time, of this process, the scheduler and the worker, which a busy
   machine changes less. What Dask adds is the same for small slides, which show it sooner. Files are opened, written
   and synced on either way: what that takes is timed in this process.
3. What a long cohort costs the scheduler, this process and the worker, in processor time and memory: ``--empty`` slides
   whose stages do nothing, so that only tasks, claims and book-keeping are left.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
SLIDES_A_ROUND = 20


def main() -> None:
    """Run the three parts, print a table each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=200, help="slides whose overhead is measured")
    parser.add_argument("--side-px", type=int, default=4000)
    parser.add_argument("--large", type=int, default=8, help="slides of 6,000 px")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--empty", type=int, default=2000, help="slides on which nothing is done")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.rounds:
            measure_throughput(folder, arguments.large, arguments.rounds)
        if arguments.slides:
            measure_overhead(folder, arguments.slides, arguments.side_px)
        if arguments.empty:
            measure_scheduler(folder, arguments.empty)


def measure_throughput(folder: Path, n_slides: int, rounds: int) -> None:
    """One worker and two, in turn."""
    refs = links(folder, "large", n_slides, side_px=6000)
    print(f"{n_slides} slides of 6,000 px, handcrafted, {len(os.sched_getaffinity(0))} cores")
    print(f"{'round':>5} {'tiles':>6} {'1 worker s':>11} {'2 workers s':>12} {'tiles/s':>8} {'tiles/s':>8} {'gain':>6}")
    with cluster(folder, 1) as (one, *_), cluster(folder, 2) as (two, *_):
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


def measure_overhead(folder: Path, n_slides: int, side_px: int) -> None:
    """The same slides in this process and through Dask, in turn."""
    n_rounds = -(-n_slides // SLIDES_A_ROUND)
    refs = links(folder, "small", n_slides, side_px=side_px)
    print(f"\n{n_slides} slides of {side_px:,} px, handcrafted, one worker; milliseconds a slide")
    print(f"{'slides':>6} {'here: CPU':>10} {'wall':>8} {'Dask: CPU':>10} {'wall':>8} {'more: CPU':>10} {'wall':>8}")
    spent = {"here": Spent(), "there": Spent()}
    writing_s, n_done = 0.0, 0
    with cluster(folder, 1) as (place, scheduler, worker):
        for number in range(n_rounds + 1):
            # The first round imports what is needed.
            part = refs[:2] if number == 0 else refs[number - 1 :: n_rounds]
            for name, where, processes in (
                ("here", None, [psutil.Process()]),
                ("there", place, [psutil.Process(), scheduler, *family(worker)]),
            ):
                plan = RunPlan(out=folder / f"{name}{number}", config=CONFIG)
                before, started = sum(figures(each)[0] for each in processes), time.perf_counter()
                with timed_writes() as written:
                    outcomes = run_cohort(part, plan, place=where)
                if number:
                    spent[name].wall_s += time.perf_counter() - started
                    spent[name].cpu_s += sum(figures(each)[0] for each in processes) - before
                    writing_s += written[0]
                if any(outcome.status != "done" for outcome in outcomes):
                    raise SystemExit(outcomes[0].reason)
            if number:
                n_done += len(part)
                here, there = (each.ms_a_slide(n_done) for each in (spent["here"], spent["there"]))
                more = (there[0] - here[0], there[1] - here[1])
                print(
                    f"{n_done:6d}" + "".join(f" {cpu:10.0f} {wall:8.0f}" for cpu, wall in (here, there, more)),
                    flush=True,
                )
    print(f"of the wall time here {writing_s / n_done * 1000:.0f} ms are files being written and synced")


@dataclass(slots=True)
class Spent:
    """Seconds of some slides."""

    cpu_s: float = 0.0
    wall_s: float = 0.0

    def ms_a_slide(self, n_slides: int) -> tuple[float, float]:
        """Milliseconds of processor and of wall time."""
        return self.cpu_s / n_slides * 1000, self.wall_s / n_slides * 1000


_NOTHING = """
import contextlib
from types import SimpleNamespace

from pathopipe.cluster import sharing
from pathopipe.pipeline import Pass, Prepared, SlideOutcome


@contextlib.contextmanager
def begun(ref, plan, *, claim):
    # One chunk more than a slide of one task may have: it is prepared, embedded in two runs, and finished.
    yield SimpleNamespace(prepared=Prepared(ref, 9, (Pass("g", 9, 1, {"e": tuple(range(9))}),), (), 0.0))


sharing.check_plan = lambda refs, plan: []
sharing.begin_slide = begun
sharing.embed_pending = lambda ref, plan, part, claim: {}
sharing.finish_slide = lambda prepared, plan, reports: SlideOutcome(prepared.ref.slide_id, "done")
"""


def measure_scheduler(folder: Path, n_slides: int) -> None:
    """Slides on which nothing is done."""
    (folder / "nothing.py").write_text(_NOTHING)
    refs = [SlideRef(f"s{number:06}", folder / "none.tiff") for number in range(n_slides)]
    print(f"\n{n_slides} slides of four tasks that do nothing, one worker")
    print(f"{'':7} {'CPU, ms a slide':^32} {'memory, MB':^32} {'wall':>9}")
    names = "".join(f" {name:>10}" for name in ("scheduler", "this", "worker"))
    print(f"{'slides':>7}{names}{names} {'ms/slide':>9}")
    stops = {n_slides, *(n for n in (100, 500, 1000, 2000, 5000, 10_000) if n < n_slides)}
    with cluster(folder, 1, "--preload", str(folder / "nothing.py")) as (place, scheduler, worker):
        processes = (scheduler, psutil.Process(), family(worker)[-1])

        def ended(outcome: SlideOutcome) -> None:
            nonlocal n_ended
            n_ended += 1
            if n_ended in stops:
                now = [figures(each) for each in processes]
                cpu = "".join(
                    f" {(cpu_s - cpu_0) / n_ended * 1000:10.1f}"
                    for (cpu_s, _), (cpu_0, _) in zip(now, began, strict=True)
                )
                memory = "".join(f" {mb:10.1f}" for _, mb in now)
                wall_ms = (time.perf_counter() - started) / n_ended * 1000
                print(f"{n_ended:7d}{cpu}{memory} {wall_ms:9.1f}", flush=True)

        n_ended, began = 0, [figures(each) for each in processes]
        started = time.perf_counter()
        run_cohort(refs, RunPlan(out=folder / "empty", config=CONFIG), place=place, on_slide=ended)


def figures(process: psutil.Process) -> tuple[float, float]:
    """Processor seconds and megabytes of a process."""
    times = process.cpu_times()
    return times.user + times.system, process.memory_info().rss / MB


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and those that it started: the worker comes after its nanny, and after what keeps count for both."""
    children = process.children(recursive=True)
    return [process, *sorted(children, key=lambda each: "spawn_main" in " ".join(each.cmdline()))]


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
def cluster(folder: Path, n_workers: int, *further: str) -> Iterator[tuple[Place, psutil.Process, psutil.Process]]:
    """A scheduler and its workers, each a process; where they are, the scheduler's process, and the workers'."""
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
        yield Place(scheduler=str(file)), psutil.Process(scheduler.pid), psutil.Process(workers.pid)


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
