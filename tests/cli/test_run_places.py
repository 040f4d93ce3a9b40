"""Where ``run`` computes: options that exclude each other, clusters that are not there, jobs of a batch system."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pathopipe.store import SlideStore, store_path


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Make some programs the first ones on the PATH."""
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "2", "--cluster", "slurm"], "--cluster and --workers exclude each other"),
        (["--scheduler", "tcp://h:1", "--cluster", "slurm"], "--scheduler and --cluster exclude each other"),
        (["--workers", "many"], "--workers many: give a number from 1, or auto"),
        (["--workers", "0"], "--workers 0: give a number from 1, or auto"),
        (["--set", "cluster.queue=short"], "settings of a cluster are used with --cluster slurm"),
        (["--cluster", "slurm", "--set", "cluster.que=short"], "unknown config key 'cluster.que'"),
        (["--scheduler", "none/scheduler.json"], "none/scheduler.json: no such file"),
    ],
)
def test_wrong_use_is_one_line_before_any_work(
    drawn_slide: Path, tmp_path: Path, cli: Callable[..., Any], options: list[str], message: str
) -> None:
    result = cli("run", drawn_slide, "--out", tmp_path / "out", *options)
    assert result.code == 2
    assert message in result.err
    assert len(result.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_is_not_there(
    drawn_slide: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = cli("run", drawn_slide, "--out", tmp_path / "out", "--cluster", "slurm")
    assert result.code == 2
    assert result.err.startswith("pathopipe: --cluster slurm: there is no 'sbatch' on this machine; run it on a login")
    assert not (tmp_path / "out").exists()


def test_jobs_that_the_batch_system_refuses(
    drawn_slide: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dask_jobqueue")
    refuses = (
        "#!/bin/sh\ngrep -q -- '-p nosuch' && echo 'sbatch: error: invalid partition specified: nosuch' >&2\nexit 1\n"
    )
    programs(tmp_path / "bin", monkeypatch, sbatch=refuses)
    options = ("--cluster", "slurm", "--set", "cluster.queue=nosuch")
    result = cli("run", drawn_slide, "--out", tmp_path / "out", *options)
    assert result.code == 2
    assert "sbatch refuses such jobs (invalid partition specified: nosuch); set queue" in result.err
    assert not (tmp_path / "out" / "slides").exists()


def test_auto_says_what_it_found(
    drawn_slide: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    result = cli("run", drawn_slide, "--out", tmp_path / "out", "--workers", "auto")
    assert result.code == 0
    assert "note: 1 worker for 1 cores, " in result.err.splitlines()[0]


# What is a batch system to pathopipe: it takes scripts and runs them somewhere.
SBATCH = """#!/bin/sh
if [ "$1" = --test-only ]; then exec cat >/dev/null; fi
grep '^#SBATCH' "$1" >> "{log}"
cp "$1" "{log}.$$"
setsid sh "{log}.$$" >/dev/null 2>&1 &
echo "Submitted batch job $!"
"""
SCANCEL = '#!/bin/sh\necho "cancel $1" >> "{log}"\nkill -TERM -- "-$1"\n'


@pytest.mark.slow
def test_workers_are_jobs_that_end_with_the_run(
    drawn_slide: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("dask_jobqueue")
    log, out = tmp_path / "jobs.log", tmp_path / "out"
    programs(tmp_path / "bin", monkeypatch, sbatch=SBATCH.format(log=log), scancel=SCANCEL.format(log=log))
    settings = [
        "workers=2",
        "cores=1",
        "memory=2GB",
        "queue=short",
        "account=lab",
        "walltime='1:00:00'",
        "directives=--gres=gpu:1",
    ]
    options = [word for setting in settings for word in ("--set", f"cluster.{setting}")]
    result = cli("run", drawn_slide, "--out", out, "--cluster", "slurm", "--set", "embed.chunk_rows=16", *options)
    assert result.code == 0, result.err
    assert list(SlideStore.open(store_path(out, "drawn")).problems()) == []
    lines = log.read_text().splitlines()
    for wanted in ("-p short", "-A lab", "-t 1:00:00", "--gres=gpu:1", "--mem=2G"):
        assert sum(line == f"#SBATCH {wanted}" for line in lines) == 2, lines
    assert sum(line.startswith("cancel ") for line in lines) == 2
