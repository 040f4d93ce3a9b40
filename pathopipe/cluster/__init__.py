"""Runs slides in this process, or over Dask workers that share out the chunks of every slide; and calls of any kind."""

from pathopipe.cluster.attempts import Attempt, attempt_each
from pathopipe.cluster.calls import spread_calls
from pathopipe.cluster.cohort import run_cohort
from pathopipe.cluster.memory import keep_freed_memory
from pathopipe.cluster.outcomes import check_writable
from pathopipe.cluster.placement import Limits, Place, auto_workers, find_gpus, machine_limits, usable_cores
from pathopipe.cluster.settings import ClusterSettings, load_cluster_settings

__all__ = [
    "Attempt",
    "ClusterSettings",
    "Limits",
    "Place",
    "attempt_each",
    "auto_workers",
    "check_writable",
    "find_gpus",
    "keep_freed_memory",
    "load_cluster_settings",
    "machine_limits",
    "run_cohort",
    "spread_calls",
    "usable_cores",
]
