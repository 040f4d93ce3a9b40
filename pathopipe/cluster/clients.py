"""Dask clients: workers on this machine, at an address, or in jobs of SLURM."""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import dask
from distributed import Client, Nanny, Scheduler, SpecCluster

from pathopipe.cluster.placement import Place
from pathopipe.cluster.settings import ClusterSettings
from pathopipe.errors import UsageError

__all__ = ["open_client"]

_SCHEDULER_ANSWERS_S = 10
_SBATCH_ANSWERS_S = 120
_QUIET = {
    "distributed.comm.timeouts.connect": "60s",
    "logging.distributed": "critical",
    # A task that takes two workers with it is tried once more when all else is done: see sharing.py.
    "distributed.scheduler.allowed-failures": 1,
}
# A job that ends by itself hands its work back in good order; one that is ended at its walltime does not.
_LEAVES_EARLY_S = 300


@contextlib.contextmanager
def open_client(place: Place, logs: Path | None = None) -> Iterator[Any]:
    """A client of the workers of a place, which are started where they are not there, and end with it.

    Args:
        place: Where the workers are.
        logs: Folder for the logs of batch jobs.

    Raises:
        UsageError: No scheduler answers at the address, or there is no SLURM here.
    """
    with dask.config.set(_QUIET), _logs_held_back(), contextlib.ExitStack() as stack:
        if place.scheduler is not None:
            yield stack.enter_context(_client_at(place.scheduler))
            return
        if place.slurm is not None:
            cluster = stack.enter_context(_slurm_cluster(place.slurm, logs))
        else:
            cluster = stack.enter_context(_local_cluster(place))
        yield stack.enter_context(Client(cluster))


def _client_at(scheduler: str) -> Client:
    is_file = "://" not in scheduler and (scheduler.endswith(".json") or os.sep in scheduler)
    if is_file and not Path(scheduler).is_file():
        raise UsageError(
            f"--scheduler {scheduler}: no such file; 'dask scheduler --scheduler-file {scheduler}' writes it"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of versions, which are compared elsewhere
            if is_file:
                return Client(scheduler_file=scheduler, timeout=_SCHEDULER_ANSWERS_S)
            return Client(scheduler, timeout=_SCHEDULER_ANSWERS_S)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--scheduler {scheduler}: no Dask scheduler answers there ({' '.join(str(error).split())}); start one "
            "with 'dask scheduler' and give its address, such as tcp://host:8786, or use --workers"
        ) from None


@contextlib.contextmanager
def _local_cluster(place: Place) -> Iterator[SpecCluster]:
    """Worker processes on this machine, each with one GPU where there are GPUs."""
    common = {
        "host": "127.0.0.1",
        "nthreads": 1,
        "memory_limit": 0,  # Dask's own limits would pause or kill a worker for pages that the file cache holds
        "dashboard": False,
        "silence_logs": logging.CRITICAL,
    }
    workers: dict[int, dict[str, Any]] = {}
    for number in range(place.workers):
        environ = {"CUDA_VISIBLE_DEVICES": place.gpus[number % len(place.gpus)]} if place.gpus else {}
        workers[number] = {"cls": Nanny, "options": {**common, "env": environ}}
    options = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": ":0"}
    with _keyboard_interrupt_held_back():
        cluster = SpecCluster(
            workers=workers, scheduler={"cls": Scheduler, "options": options}, silence_logs=logging.CRITICAL
        )
    with cluster:
        yield cluster


@contextlib.contextmanager
def _slurm_cluster(settings: ClusterSettings, logs: Path | None) -> Iterator[Any]:
    if shutil.which("sbatch") is None:
        raise UsageError(
            "--cluster slurm: there is no 'sbatch' on this machine; run it on a login node of a SLURM cluster, or use "
            "--workers N here or --scheduler ADDRESS of a running Dask cluster"
        )
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError:
        raise UsageError("--cluster slurm needs dask-jobqueue; pip install 'pathopipe[slurm]'") from None
    a_job = settings.workers_per_job
    extra = ["--nthreads", "1", "--memory-limit", "0"]  # SLURM keeps to the job's memory itself
    if settings.walltime_s > 4 * _LEAVES_EARLY_S:
        extra += ["--lifetime", f"{settings.walltime_s - _LEAVES_EARLY_S}s", "--lifetime-stagger", "120s"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cluster = SLURMCluster(
            queue=settings.queue,
            account=settings.account,
            cores=settings.cores,
            memory=settings.memory,
            processes=a_job,
            walltime=settings.walltime,
            job_extra_directives=list(settings.directives),
            job_script_prologue=list(settings.prologue),
            interface=settings.interface,
            local_directory=str(settings.local_directory) if settings.local_directory else None,
            log_directory=str(logs) if logs else None,
            worker_extra_args=extra,
            python=sys.executable,
            scheduler_options={"dashboard_address": ":0"},
            silence_logs=logging.CRITICAL,
        )
    with cluster:
        _try_job(cluster.job_script())
        # As many at least as at most: a job that ends is followed by another.
        jobs = -(-settings.workers // a_job)
        cluster.adapt(minimum_jobs=jobs, maximum_jobs=jobs)
        yield cluster


@contextlib.contextmanager
def _logs_held_back() -> Iterator[None]:
    """Keep Dask from writing to the terminal: what matters is told in lines of our own."""
    loggers = [logging.getLogger(name) for name in ("distributed", "tornado.application", "asyncio")]
    # These have levels of their own, which Dask sets when it is imported.
    loggers += [logging.getLogger(name) for name in sorted(logging.root.manager.loggerDict) if "distributed." in name]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _try_job(script: str) -> None:
    """Let SLURM look at a job without starting it: what is refused later is refused in silence.

    Raises:
        UsageError: It would be refused.
    """
    tried = subprocess.run(
        ["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False, timeout=_SBATCH_ANSWERS_S
    )
    if tried.returncode != 0:
        why = "; ".join(line.removeprefix("sbatch: error: ") for line in tried.stderr.splitlines() if line.strip())
        raise UsageError(
            f"--cluster slurm: sbatch refuses such jobs ({why}); set queue, account, cores, memory or walltime in the "
            "section cluster of the config, or with --set cluster.KEY=VALUE"
        )


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
