"""Whether a worker can do the work: the same software, and the same files under the same names."""

import contextlib
import importlib.metadata
import os
import platform
import socket
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pathopipe
from pathopipe.cluster.memory import keep_freed_memory
from pathopipe.cluster.placement import usable_cores
from pathopipe.files import durable_file
from pathopipe.records import SlideRef

__all__ = ["Terms", "Unfit", "Worker", "attempt", "describe", "shared_terms"]

_SLIDES_LOOKED_FOR = 5
# What is killed first when memory runs out: 0 is an ordinary process, 1000 the first to go.
_OOM_SCORE = "300"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a worker must find; travels with every task, and each worker process looks once."""

    token: str
    versions: tuple[tuple[str, str], ...]
    out: Path | None = None
    """Output folder that must be seen and written; None where the worker is on this machine."""
    slides: tuple[Path, ...] = ()
    """Some slides that must be seen."""


@dataclass(frozen=True, slots=True)
class Worker:
    """What a worker says of itself."""

    host: str
    cores: int
    problem: str | None


@dataclass(frozen=True, slots=True)
class Unfit:
    """Came instead of a result: the worker can't do the work."""

    address: str
    problem: str


def own_versions() -> tuple[tuple[str, str], ...]:
    """What must be equal on both sides, for code and messages to be understood."""
    packages = ("dask", "distributed")
    return (
        ("pathopipe", pathopipe.__version__),
        ("Python", ".".join(platform.python_version_tuple()[:2])),
        *((name, importlib.metadata.version(name)) for name in packages),
    )


@contextlib.contextmanager
def shared_terms(out: Path | None, refs: Sequence[SlideRef]) -> Iterator[Terms]:
    """The terms of a run; where workers are elsewhere, a file in the output folder that they must find.

    Args:
        out: The output folder, an absolute path; None for workers on this machine.
        refs: The slides.
    """
    token = uuid.uuid4().hex
    if out is None:
        yield Terms(token=token, versions=own_versions())
        return
    step = max(1, len(refs) // _SLIDES_LOOKED_FOR)
    # A slide that is missing here as well is a matter of the manifest.
    slides = tuple(ref.path for ref in refs[::step][:_SLIDES_LOOKED_FOR] if ref.path.exists())
    sign = _sign(out, token)
    with durable_file(sign) as file:
        file.write(token.encode())
    try:
        yield Terms(token=token, versions=own_versions(), out=out, slides=slides)
    finally:
        sign.unlink(missing_ok=True)


def describe(terms: Terms) -> Worker:
    """Look at itself; runs on a worker."""
    return Worker(socket.gethostname(), usable_cores(), _problem(terms))


def _sign(out: Path, token: str) -> Path:
    return out / f".seen-by-workers-{token[:8]}"


def _problem(terms: Terms) -> str | None:
    """What is wrong with this process, in words."""
    for (name, wanted), (_, found) in zip(terms.versions, own_versions(), strict=True):
        if wanted != found:
            return f"has {name} {found}, this run {wanted}"
    if terms.out is None:
        return None
    sign = _sign(terms.out, terms.token)
    if not sign.exists():
        what = "is another folder there" if terms.out.exists() else "is not there"
        return f"does not see the output folder: {terms.out} {what}; it must be on a disk that all machines share"
    own = sign.with_name(f"{sign.name}-{uuid.uuid4().hex[:8]}")
    try:
        with durable_file(own) as file:
            file.write(b"written by a worker")
        own.unlink()
    except OSError as error:
        return f"can't write to the output folder {terms.out} ({error.__cause__ or error})"
    missing = [slide for slide in terms.slides if not slide.exists()]
    if missing:
        return f"does not see the slide {missing[0]}; slides must be on a disk that all machines share"
    return None


# What this process knows of itself: a worker lives longer than a task, and may serve several runs.
_verdicts: dict[str, str | None] = {}
_one_task = threading.Lock()


def attempt(terms: Terms, work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of some work, or the exception that ended it: one that is raised would fill the worker's log."""
    # Encoders and Zarr's settings belong to the process, so a worker with several threads does one task at a time.
    with _one_task:
        if terms.token not in _verdicts:
            with contextlib.suppress(OSError):
                Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)  # a worker is replaced, the run is not
            keep_freed_memory()
            _verdicts[terms.token] = _problem(terms)
        problem = _verdicts[terms.token]
        if problem is not None:
            from distributed import get_worker

            return Unfit(get_worker().address, problem)
        try:
            return work(*arguments)
        except Exception as error:
            return _with_its_traceback(error)


def _with_its_traceback(error: Exception) -> Exception:
    """The same error; its traceback as a note, for as an object it may be too large for the way."""
    text = "".join(traceback.format_exception(error))
    error.add_note(f"On {socket.gethostname()}, process {os.getpid()}:\n{text}")
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error
