"""What a process may use: cores, memory, GPUs; and how many workers fit."""

import os
from pathlib import Path

import pytest

from pathopipe.cluster.placement import Limits, auto_workers, find_gpus, machine_limits, usable_cores
from pathopipe.config import Config, load_config

GB = 2**30
HERE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def system(root: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """Files of a system as this process sees them."""
    for name, text in {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 30 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def test_without_control_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    limits = machine_limits({}, tmp_path)
    assert limits.cores == HERE
    assert limits.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_the_tightest_control_group_above_counts(tmp_path: Path) -> None:
    job = "sys/fs/cgroup/slurm/job_7"
    root = system(
        tmp_path,
        "0::/slurm/job_7/step_0\n",
        V2,
        {
            f"{job}/step_0/cpu.max": "max 100000\n",
            f"{job}/step_0/memory.max": f"{3 * GB}\n",
            f"{job}/cpu.max": "100000 100000\n",
            f"{job}/memory.max": f"{2 * GB}\n",
            "sys/fs/cgroup/slurm/memory.max": "max\n",
        },
    )
    assert machine_limits({}, root) == Limits(1, 2 * GB)


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    root = system(
        tmp_path,
        "4:memory:/job/7\n1:cpu,cpuacct:/job/7\n",
        V1,
        {
            "sys/fs/cgroup/cpu,cpuacct/job/7/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu,cpuacct/job/7/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/job/7/memory.limit_in_bytes": f"{GB}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert machine_limits({}, root) == Limits(1, GB)


def test_in_a_container_the_mount_begins_below_the_path(tmp_path: Path) -> None:
    mount = "29 23 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw\n"
    root = system(tmp_path, "0::/docker/abc\n", mount, {"sys/fs/cgroup/memory.max": f"{GB}\n"})
    assert machine_limits({}, root).memory_bytes == GB


def test_slurm_says_what_the_job_has(tmp_path: Path) -> None:
    assert usable_cores({"SLURM_CPUS_PER_TASK": "1", "SLURM_CPUS_ON_NODE": "2"}, tmp_path) == 1
    assert usable_cores({"SLURM_CPUS_ON_NODE": "1"}, tmp_path) == 1
    assert usable_cores({"SLURM_CPUS_PER_TASK": "1000"}, tmp_path) == HERE
    assert usable_cores({"SLURM_CPUS_PER_TASK": "many"}, tmp_path) == HERE
    assert usable_cores() >= 1
    assert machine_limits({"SLURM_MEM_PER_NODE": "512"}, tmp_path).memory_bytes == GB // 2
    # All of the node's memory.
    assert machine_limits({"SLURM_MEM_PER_NODE": "0"}, tmp_path) == machine_limits({}, tmp_path)
    of_cores = {"SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_ON_NODE": "2"}
    assert machine_limits(of_cores, tmp_path).memory_bytes == 200 * 2**20


NETWORK = load_config(None, ["embed.encoder=timm.test_vit"])


@pytest.mark.parametrize(
    ("limits", "config", "gpus", "expected"),
    [
        (Limits(16, 64 * GB), Config(), (), 16),
        (Limits(16, 4 * GB), Config(), (), 5),  # 800 MB each
        (Limits(16, GB // 4), Config(), (), 1),
        (Limits(16, 256 * GB), NETWORK, (), 4),
        (Limits(2, 256 * GB), NETWORK, (), 1),
        (Limits(16, 256 * GB), NETWORK, ("0", "1", "3"), 3),
    ],
)
def test_workers_by_cores_memory_and_gpus(limits: Limits, config: Config, gpus: tuple[str, ...], expected: int) -> None:
    assert auto_workers(limits, config, gpus) == expected


def test_gpus_are_those_that_this_process_may_see() -> None:
    assert find_gpus({"CUDA_VISIBLE_DEVICES": "2, GPU-5a,-1,0"}, NETWORK) == ("2", "GPU-5a")
    assert find_gpus({"CUDA_VISIBLE_DEVICES": ""}, NETWORK) == ()
    assert find_gpus({"CUDA_VISIBLE_DEVICES": "0"}, Config()) == ()
    on_cpu = load_config(None, ["embed.encoder=timm.test_vit", "embed.device=cpu"])
    assert find_gpus({"CUDA_VISIBLE_DEVICES": "0"}, on_cpu) == ()


LISTED = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb)
  MIG 3g.40gb     Device  0: (UUID: MIG-b0)
  MIG 3g.40gb     Device  1: (UUID: MIG-b1)
GPU 2: NVIDIA H100 80GB HBM3 (UUID: GPU-cccc)
"""


def test_gpus_as_the_driver_lists_them(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTED}END\n")
    program.chmod(0o755)
    assert find_gpus({"PATH": str(tmp_path)}, NETWORK) == ("GPU-aaaa", "MIG-b0", "MIG-b1", "GPU-cccc")
    program.write_text("#!/bin/sh\nexit 9\n")
    assert find_gpus({"PATH": str(tmp_path)}, NETWORK) == ()
    assert find_gpus({"PATH": str(tmp_path / "none")}, NETWORK) == ()
