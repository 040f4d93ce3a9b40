"""Where work goes: the cores, memory and GPUs that this process may use, and how many workers fit."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pathopipe.cluster.settings import ClusterSettings
from pathopipe.config import Config
from pathopipe.pipeline.encoders import specs_of
from pathopipe.pipeline.needs import needs_of

__all__ = ["Limits", "Place", "auto_workers", "find_gpus", "machine_limits", "usable_cores"]

_CORES_A_NETWORK = 4
_MB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a cohort is computed: one of this machine, a running Dask cluster, SLURM."""

    workers: int = 1
    """Processes on this machine; with one, all happens in this process."""
    gpus: tuple[str, ...] = ()
    """Names of GPUs as in CUDA_VISIBLE_DEVICES; workers take turns. None: workers see what this process sees."""
    scheduler: str | None = None
    """Address or scheduler file of a Dask cluster that runs already."""
    slurm: ClusterSettings | None = None
    """What to ask SLURM for."""

    @property
    def is_here(self) -> bool:
        """All happens in this process."""
        return self.scheduler is None and self.slurm is None and self.workers == 1

    @property
    def is_elsewhere(self) -> bool:
        """Workers are on other machines, which must see the same files."""
        return self.scheduler is not None or self.slurm is not None


@dataclass(frozen=True, slots=True)
class Limits:
    """What a process may use."""

    cores: int
    memory_bytes: int


def usable_cores(environ: Mapping[str, str] | None = None, root: Path = Path("/")) -> int:
    """Cores that this process may use, which on a cluster are fewer than the machine has.

    Args:
        environ: Environment with what SLURM says of the job; not asked when left out.
        root: Where the files of the system are.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [cores, *_quotas(root)]
    if environ is not None:
        a_task = _number(environ, "SLURM_CPUS_PER_TASK") or _number(environ, "SLURM_CPUS_ON_NODE")
        limits += [a_task] if a_task else []
    return max(1, min(limits))


def machine_limits(environ: Mapping[str, str], root: Path = Path("/")) -> Limits:
    """Cores and memory that this process may use: of the machine, its control groups (v1 and v2), and SLURM.

    Args:
        environ: Environment with what SLURM says of the job.
        root: Where the files of the system are.
    """
    import psutil

    memory = [psutil.virtual_memory().total, *_memory_limits(root)]
    cores = usable_cores(environ, root)
    a_node, a_core = _number(environ, "SLURM_MEM_PER_NODE"), _number(environ, "SLURM_MEM_PER_CPU")
    memory += [a_node * _MB] if a_node else []
    memory += [a_core * _MB * (_number(environ, "SLURM_CPUS_ON_NODE") or cores)] if a_core else []
    return Limits(cores, min(memory))


def auto_workers(limits: Limits, config: Config, gpus: tuple[str, ...]) -> int:
    """How many processes fit: one a GPU, else one a core, or one for four cores where a network runs on them.

    Args:
        limits: What this process may use.
        config: The settings: what an encoder needs.
        gpus: GPUs that are to be used.
    """
    in_memory = max(1, limits.memory_bytes // (needs_of(None, config)["embed"].mem_mb * _MB))
    if gpus:
        return min(len(gpus), in_memory)
    has_network = any(spec.loader != "handcrafted" for spec in specs_of(config))
    return max(1, min(limits.cores // _CORES_A_NETWORK if has_network else limits.cores, in_memory))


def find_gpus(environ: Mapping[str, str], config: Config) -> tuple[str, ...]:
    """GPUs for the encoders of a config; none where no network runs, or the config says CPU.

    Args:
        environ: Environment: CUDA_VISIBLE_DEVICES is kept to.
        config: The settings.
    """
    if config.embed.device == "cpu" or all(spec.loader == "handcrafted" for spec in specs_of(config)):
        return ()
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = []
        for name in visible.split(","):
            if not name.strip() or name.strip().startswith("-"):
                break  # CUDA ignores what stands behind
            named.append(name.strip())
        return tuple(named)
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        return ()
    listed = subprocess.run([program, "-L"], capture_output=True, text=True, check=False, timeout=60)
    return tuple(_listed_gpus(listed.stdout)) if listed.returncode == 0 else ()


def _listed_gpus(text: str) -> Iterator[str]:
    """The GPUs that ``nvidia-smi -L`` lists; parts of one in its place where it is parted."""
    whole: str | None = None
    for line in text.splitlines():
        found = re.search(r"\(UUID: ((GPU|MIG)-[^)]+)\)", line)
        if found is None:
            continue
        if found[2] == "GPU":
            if whole is not None:
                yield whole
            whole = found[1]
        else:
            whole = None
            yield found[1]
    if whole is not None:
        yield whole


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def _quotas(root: Path) -> Iterator[int]:
    for folder in _control_groups(root, "cpu"):
        quota, period = _words(folder / "cpu.max", 2)  # v2
        if not quota:
            [quota], [period] = _words(folder / "cpu.cfs_quota_us", 1), _words(folder / "cpu.cfs_period_us", 1)
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield max(1, int(quota) // int(period))


def _memory_limits(root: Path) -> Iterator[int]:
    for folder in _control_groups(root, "memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            [limit] = _words(folder / name, 1)
            if limit.isdecimal():
                yield int(limit)


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, for one controller, up to the outermost."""
    for mount, above, names in _mounts(root):
        for line in _lines(root / "proc/self/cgroup"):
            number, controllers, path = line.split(":", 2)
            is_v2 = number == "0" and not controllers
            if is_v2 if names is None else controller in controllers.split(",") and controller in names:
                # In a container the mount may begin below the root of the path.
                inner = path.removeprefix(above).strip("/") if above != "/" else path.strip("/")
                folder = mount / inner
                yield from (each for each in (folder, *folder.parents) if each.is_relative_to(mount))


def _mounts(root: Path) -> Iterator[tuple[Path, str, set[str] | None]]:
    """Where control groups are mounted, from which path on, and their controllers (None: v2, all of them)."""
    for line in _lines(root / "proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if kind and kind[0] in {"cgroup", "cgroup2"}:
            names = None if kind[0] == "cgroup2" else set(kind[-1].split(","))
            yield root / fields[4].lstrip("/"), fields[3], names


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _words(path: Path, n: int) -> list[str]:
    """The first words of a file, empty ones where it has fewer or is not there."""
    words = " ".join(_lines(path)).split()[:n]
    return words + [""] * (n - len(words))
