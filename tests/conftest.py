"""What many tests share: a drawn slide on disk, the command line as a subprocess, the real slides where they are."""

import contextlib
import io
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import settings

from pathopipe.cli.app import main
from pathopipe.synth import SynthSpec, write_slide

settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")


class CliResult(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Cli = Callable[..., CliResult]

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


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """Run ``pathopipe`` with arguments in this process; start-up is most of a short command."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> CliResult:
        monkeypatch.setattr(sys, "argv", ["pathopipe", *map(str, arguments)])
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return CliResult(code, out.getvalue(), err.getvalue())

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real slides."""
    return SHARED_DATA
