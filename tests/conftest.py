"""What many tests share: a drawn slide on disk, the command line as a subprocess, the real slides where they are."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from pathopipe.synth import SynthSpec, write_slide

settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")

Cli = Callable[..., subprocess.CompletedProcess[str]]

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("shared_data") and not SHARED_DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason="the real slides are not beside this checkout"))
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def drawn_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn H&E slide of 2,400 x 1,800 px at 0.5 um/px."""
    path = tmp_path_factory.mktemp("slides") / "drawn.tiff"
    write_slide(path, SynthSpec(width_px=2400, height_px=1800, mpp=0.5, seed=11))
    return path


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Run ``pathopipe`` with arguments in a process of its own."""

    def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pathopipe", *map(str, arguments)]
        environment = {**os.environ, "COLUMNS": "200"}
        return subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=cwd, env=environment, timeout=240
        )

    return run


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real slides."""
    return SHARED_DATA
