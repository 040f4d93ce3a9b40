"""The section ``cluster`` of a config: what to ask a batch system for."""

import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pathopipe.config import read_section, settle_section

__all__ = ["ClusterSettings", "load_cluster_settings"]

_WALLTIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


class ClusterSettings(BaseModel):
    """Which jobs carry the workers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    queue: str | None = None
    """Partition; the system's own choice when left out."""
    account: str | None = None
    """Account that pays."""
    workers: int = Field(default=4, ge=1)
    """Worker processes in all, in jobs of ``workers_per_job``."""
    workers_per_job: int = Field(default=1, ge=1)
    """Worker processes that share a job's cores and memory."""
    cores: int = Field(default=4, ge=1)
    """Cores a job."""
    memory: str = "16GB"
    """Memory a job."""
    walltime: str = "12:00:00"
    """Longest time of a job, ``[days-]hours:minutes:seconds``. Jobs that end are followed by new ones."""
    directives: tuple[str, ...] = ()
    """Further options of a job, for example ``--gres=gpu:1``."""
    prologue: tuple[str, ...] = ()
    """Lines of shell before the worker starts, for example ``module load cuda``."""
    interface: str | None = None
    """Network interface that jobs and this process share, for example ``ib0``."""
    local_directory: Path | None = None
    """Folder on a disk of the node for what workers keep for a while."""

    @field_validator("walltime")
    @classmethod
    def _walltime_is_a_time(cls, walltime: str) -> str:
        if _seconds(walltime) is None:
            raise ValueError(f"no time of the form [days-]hours:minutes:seconds: {walltime}")
        return walltime

    @property
    def walltime_s(self) -> int:
        """The longest time of a job in seconds."""
        seconds = _seconds(self.walltime)
        assert seconds is not None
        return seconds


def load_cluster_settings(path: Path | None = None, overrides: Sequence[str] = ()) -> ClusterSettings:
    """Defaults, then the section of a YAML file, then ``cluster.key=value`` overrides.

    Raises:
        UsageError: The file can't be read, a key is unknown (the nearest is named), or a value is out of range.
    """
    settings = read_section(path, overrides, "cluster", example="cluster.queue=gpu")
    for name in ("directives", "prologue"):
        if isinstance(settings.get(name), str):
            settings[name] = [settings[name]]
    # YAML takes 12:00:00 for a number in base 60.
    if isinstance(settings.get("walltime"), int):
        seconds = settings["walltime"]
        settings["walltime"] = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return settle_section(ClusterSettings, settings, "cluster", path)


def _seconds(walltime: str) -> int | None:
    match = _WALLTIME.fullmatch(walltime.strip())
    if match is None:
        return None
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is None and len(numbers) < 3:
        numbers.insert(0, 0)  # minutes, or minutes:seconds
    numbers += [0] * (3 - len(numbers))
    return int(days or 0) * 86_400 + numbers[0] * 3600 + numbers[1] * 60 + numbers[2]
