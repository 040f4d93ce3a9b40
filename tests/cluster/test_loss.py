"""What is left when workers are killed, the scheduler goes, or two runs meet: real processes, real signals."""

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pathopipe.cluster import run_cohort
from pathopipe.config import load_config
from pathopipe.pipeline import RunPlan
from pathopipe.records import SlideRef
from pathopipe.store import SlideStore, store_path
from pathopipe.synth import SynthSpec, write_slide

SETTINGS = ["--set", "embed.chunk_rows=8", "--set", "embed.batch_size=1"]
PLAIN = {**os.environ, "PYTHONWARNINGS": ""}


def arrays_of(out: Path) -> dict[str, bytes]:
    """Every array object of every store below a folder: chunk data and array metadata, not attributes of groups."""
    found = {}
    for path in sorted((out / "slides").rglob("*")):
        if path.is_file() and (path.name != "zarr.json" or json.loads(path.read_bytes())["node_type"] == "array"):
            found[path.relative_to(out).as_posix()] = path.read_bytes()
    return found


def chunks_done(out: Path) -> int:
    return sum(1 for _ in (out / "slides").glob("*/embeddings/*/*/values/c/*/0"))


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    for number in range(3):
        spec = SynthSpec(width_px=1400, height_px=1200, mpp=0.5, seed=20 + number)
        write_slide(folder / f"s{number}.tiff", spec)
    return folder


@pytest.fixture(scope="module")
def undisturbed(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    refs = [SlideRef(path.stem, path) for path in sorted(slides.iterdir())]
    run_cohort(refs, RunPlan(out=out, config=load_config(None, ["embed.chunk_rows=8"])))
    return arrays_of(out)


def start(slides: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pathopipe", "run", str(slides), "--out", str(out), *SETTINGS, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=PLAIN,
    )


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str] | None = None, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline and (process is None or process.poll() is None):
        time.sleep(0.02)


def test_two_runs_on_one_folder_share_the_slides_and_both_finish(
    slides: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    runs = [start(slides, tmp_path) for _ in range(2)]
    told = [run.communicate(timeout=250) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    assert all("3 of 3 slides done" in out for out, _ in told)
    assert arrays_of(tmp_path) == undisturbed
    assert list((tmp_path / "slides").glob(".*")) == []
    with (tmp_path / "summary.csv").open() as file:
        assert {row["slide_id"]: row["status"] for row in csv.DictReader(file)} == dict.fromkeys(
            ("s0", "s1", "s2"), "done"
        )
    # Each slide was computed once.
    computed = [line for _, err in told for line in err.splitlines() if "model" in line]
    assert len(computed) == 3


def test_a_run_that_was_killed_is_followed_at_once(slides: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    run = start(slides, tmp_path)
    wait_until(lambda: chunks_done(tmp_path) > 0, run)
    run.kill()
    run.communicate()
    # The slide that was embedded, and often the next one, which was begun beside it.
    assert len(list((tmp_path / "slides").glob(".*.claim"))) in (1, 2)
    again = start(slides, tmp_path)
    _, told = again.communicate(timeout=250)
    assert again.returncode == 0, told
    assert "waiting: " not in told
    assert arrays_of(tmp_path) == undisturbed


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "spawn_main" in " ".join(child.cmdline()):
                    found.append(child)
    return found


@pytest.mark.slow
def test_killed_workers_are_replaced_and_no_work_is_lost(
    slides: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    rng = random.Random(3)
    run = start(slides, tmp_path, "--workers", "2")
    kills = 0
    for wanted in (1, 4, 7):
        wait_until(lambda: chunks_done(tmp_path) >= wanted, run)  # noqa: B023
        if run.poll() is None and workers_of(run):
            rng.choice(workers_of(run)).kill()
            kills += 1
    out, told = run.communicate(timeout=280)
    assert run.returncode == 0, told
    assert kills >= 2
    assert "Traceback" not in told
    assert "3 of 3 slides done" in out
    assert arrays_of(tmp_path) == undisturbed


@pytest.fixture
def dask_processes() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start_one(*words: str, **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            list(words),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            **options,
        )
        started.append(process)
        return process

    yield start_one
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


DASK = (sys.executable, "-m", "dask")


def start_scheduler(start_one: Callable[..., Any], file: Path) -> Any:
    environ = {**PLAIN, "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}
    options = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
    process = start_one(*DASK, "scheduler", *options, env=environ)
    wait_until(file.exists)
    return process


def worker_words(file: Path, *options: str) -> tuple[str, ...]:
    return (*DASK, "worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-dashboard", *options)


@pytest.mark.slow
def test_a_scheduler_that_dies_ends_the_run_with_a_sound_store(
    slides: Path, undisturbed: dict[str, bytes], tmp_path: Path, dask_processes: Callable[..., Any]
) -> None:
    file, out = tmp_path / "scheduler.json", tmp_path / "out"
    scheduler = start_scheduler(dask_processes, file)
    dask_processes(*worker_words(file), cwd=tmp_path, env=PLAIN)
    run = start(slides, out, "--scheduler", str(file))
    wait_until(lambda: chunks_done(out) > 2, run)
    scheduler.kill()
    _, told = run.communicate(timeout=200)
    assert run.returncode == 1, told
    assert "Traceback" not in told
    assert told.splitlines()[-1].startswith(f"pathopipe: the Dask scheduler {file} does not answer any more (")
    again = start(slides, out)
    _, told = again.communicate(timeout=250)
    assert again.returncode == 0, told
    for store in ("s0", "s1", "s2"):
        assert list(SlideStore.open(store_path(out, store)).problems()) == []
    assert arrays_of(out) == undisturbed


KILLER = """
import os
from pathopipe.pipeline import run

def dying(whole):
    def begin_reading(slide, *arguments, **named):
        if slide.info.slide_id == "s1":
            os.kill(os.getpid(), 9)
        return whole(slide, *arguments, **named)

    return begin_reading

run.begin_reading = dying(run.begin_reading)
"""


@pytest.mark.slow
def test_a_slide_that_kills_every_worker_fails_alone(
    slides: Path, undisturbed: dict[str, bytes], tmp_path: Path, dask_processes: Callable[..., Any]
) -> None:
    file, out, killer = tmp_path / "scheduler.json", tmp_path / "out", tmp_path / "killer.py"
    killer.write_text(KILLER)
    start_scheduler(dask_processes, file)
    dask_processes(*worker_words(file, "--preload", str(killer)), cwd=tmp_path, env=PLAIN)
    run = start(slides, out, "--scheduler", str(file), "--set", "embed.chunk_rows=1000")
    printed, told = run.communicate(timeout=280)
    assert run.returncode == 1, told
    assert "2 of 3 slides done" in printed, told
    assert "failed: s1: workers died each time they came to it, most often for want of memory" in printed
    # On healthy workers the same command goes on.
    again = start(slides, out, "--set", "embed.chunk_rows=1000")
    _, told = again.communicate(timeout=250)
    assert again.returncode == 0, told


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="gives a worker other mounts")
def test_a_worker_that_does_not_see_the_output_folder_is_named(
    slides: Path, tmp_path: Path, dask_processes: Callable[..., Any]
) -> None:
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode != 0:
        pytest.skip("no right to other mounts")
    file, out = tmp_path / "scheduler.json", tmp_path / "out"
    out.mkdir()
    start_scheduler(dask_processes, file)
    elsewhere = f'mount -t tmpfs tmpfs "{out}" && exec "$@"'
    unshare = shutil.which("unshare")
    assert unshare is not None
    words = (unshare, "--mount", "sh", "-c", elsewhere, "sh", *worker_words(file))
    dask_processes(*words, cwd=tmp_path, env=PLAIN)
    run = start(slides, out, "--scheduler", str(file))
    _, told = run.communicate(timeout=200)
    assert run.returncode == 2, told
    assert f"does not see the output folder: {out} is another folder there; it must be on a disk" in told
    assert not (out / "slides").exists()
