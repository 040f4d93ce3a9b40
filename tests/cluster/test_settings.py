"""The section ``cluster`` of a config."""

from pathlib import Path

import pytest

from pathopipe.cluster.settings import load_cluster_settings
from pathopipe.errors import UsageError


def test_a_file_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("tiles: {mpp: 1.0}\ncluster: {queue: short, walltime: 2:30:00, directives: --gres=gpu:1}\n")
    settings = load_cluster_settings(file, ["cluster.workers=20", "cluster.queue=long"])
    assert (settings.queue, settings.workers, settings.directives) == ("long", 20, ("--gres=gpu:1",))
    assert settings.walltime == "2:30:00"
    assert settings.walltime_s == 9000


@pytest.mark.parametrize(
    ("walltime", "seconds"), [("30", 1800), ("45:30", 2730), ("1-00:00:00", 86_400), ("2-12", 216_000)]
)
def test_walltimes_as_slurm_takes_them(walltime: str, seconds: int) -> None:
    assert load_cluster_settings(None, [f"cluster.walltime='{walltime}'"]).walltime_s == seconds


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.que=short", "unknown config key 'cluster.que'; did you mean 'queue'"),
        ("cluster.walltime=soon", "no time of the form"),
        ("cluster.workers=0", "cluster.workers"),
        ("tiles.mpp=1", "write it as cluster.key=value"),
    ],
)
def test_what_is_wrong_is_named(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_cluster_settings(None, [override])


def test_the_example_states_the_defaults() -> None:
    assert load_cluster_settings(Path(__file__).parents[2] / "configs" / "slurm.yaml") == load_cluster_settings()
