"""Slides that are read from URLs: copies on this machine, whole, within a limit, shared by all its processes."""

import contextlib
import errno
import hashlib
import io
import os
import re
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Final, Literal

from pathopipe.config import SlideConfig
from pathopipe.errors import SlideOpenError, UsageError
from pathopipe.remote import Found, RemotePath

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["cached", "local_slide"]

_PARTIAL: Final = ".partial"
_ENTRY: Final = re.compile(r"[0-9a-f]{32}-(\d+)-.*", re.DOTALL)
# A slide whose file says nothing without those beside it.
_SEVERAL_FILES: Final = frozenset((".dcm", ".dicom", ".mrxs", ".vms", ".vmu"))
_PART_BYTES: Final = 8 * 2**20
_PARTS_AT_ONCE: Final = 4
_LOOKS_EVERY_S: Final = 0.5
_WAITS_FOR_ROOM_S: Final = 3600.0
_TRIES: Final = 5


@contextlib.contextmanager
def local_slide(path: Path, settings: SlideConfig) -> Iterator[Path]:
    """A slide's file on this machine: itself, or a copy of the object that a URL names.

    Args:
        path: The slide.
        settings: Where copies are kept, and how much.

    Raises:
        SlideOpenError: It can't be downloaded.
    """
    if not isinstance(path, RemotePath):
        yield path
        return
    folder = settings.cache_dir or Path.home() / ".cache" / "pathopipe" / "slides"
    with cached(path, folder.absolute(), int(settings.cache_gb * 1e9)) as copy:
        yield copy


@contextlib.contextmanager
def cached(path: RemotePath, folder: Path, limit_bytes: int) -> Iterator[Path]:
    """A copy of an object, which stays as long as this is entered.

    It is downloaded once for all processes of the machine, and kept afterwards; those that were not used for longest
    go where room is needed. An object that was written anew is another one. A download that was interrupted goes on
    where it stopped; nobody sees it before it is whole.

    Args:
        path: The object.
        folder: Where copies are kept; made where it is missing.
        limit_bytes: Most that all copies take up.

    Raises:
        SlideOpenError: There is no such object, it can't be had, or it is larger than the limit; the folder can't be
            written; slides in use have filled it for an hour.
    """
    if path.suffix.lower() in _SEVERAL_FILES:
        raise SlideOpenError(
            f"{path}: a {path.suffix.lower()} slide is made of several files, which can't be read from URLs; copy all "
            "of them to a local folder and give that path"
        )
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(_copy(path, folder, limit_bytes))
            os.utime(file)  # used last just now
        except OSError as error:
            if isinstance(error, SlideOpenError):
                raise
            room = " (slide.cache_dir, slide.cache_gb)" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise SlideOpenError(
                f"{path}: can't be copied to {folder}{room} ({error.strerror or error}); mend that and run again: what "
                "was downloaded is kept"
            ) from None
        yield file


@contextlib.contextmanager
def _copy(path: RemotePath, folder: Path, limit_bytes: int) -> Iterator[Path]:
    deadline = time.monotonic() + _WAITS_FOR_ROOM_S
    changes = 0
    found = _look(path, limit_bytes)
    while True:
        whole = folder / _entry(path, found)
        held = _hold(whole)
        if held is not None:
            with held:
                yield whole
            return
        part = _begin(whole, found.size, limit_bytes)
        if isinstance(part, str):
            if part == "full" and time.monotonic() > deadline:
                raise SlideOpenError(
                    f"{path}: {found.size / 1e9:.2f} GB find no room in {folder}: slides in use have filled it up to "
                    f"its limit of {limit_bytes / 1e9:g} GB; raise slide.cache_gb, or use fewer workers"
                )
            time.sleep(_LOOKS_EVERY_S)
            continue
        with part:
            try:
                _download(path, found, part)
            except OSError as error:
                changes += 1
                if error.errno != errno.ESTALE or changes == _TRIES:
                    raise
                whole.with_name(whole.name + _PARTIAL).unlink(missing_ok=True)
                found = _look(path, limit_bytes)
                continue
            whole.with_name(whole.name + _PARTIAL).replace(whole)


def _look(path: RemotePath, limit_bytes: int) -> Found:
    try:
        found = path.found()
    except UsageError as error:  # no such bucket: this slide's fault, not the cohort's
        raise SlideOpenError(str(error)) from None
    if found is None:
        raise SlideOpenError(f"{path}: there is no such object; check the URL")
    if found.size > limit_bytes:
        raise SlideOpenError(
            f"{path}: {found.size / 1e9:.2f} GB do not fit into the cache of {limit_bytes / 1e9:g} GB; raise "
            "slide.cache_gb"
        )
    return found


def _entry(path: RemotePath, found: Found) -> str:
    """Name of the copy: of this content of the object, and no other."""
    tag = found.version.e_tag if found.version is not None else found.modified_s
    digest = hashlib.sha256(f"{path}\n{tag}\n{found.size}".encode()).hexdigest()[:32]
    return f"{digest}-{found.size}-{path.name[-80:]}"


def _hold(whole: Path) -> BinaryIO | None:
    """Keep a copy from being thrown away; None where there is none."""
    try:
        file = whole.open("rb")
    except FileNotFoundError:
        return None
    _lock(file, shared=True)
    if os.fstat(file.fileno()).st_nlink:
        return file
    file.close()  # thrown away just before
    return None


def _begin(whole: Path, size: int, limit_bytes: int) -> BinaryIO | Literal["busy", "full", "there"]:
    """The unfinished copy, with its room set aside, for this process alone; or why there is none."""
    partial = whole.with_name(whole.name + _PARTIAL)
    with (whole.parent / ".lock").open("ab") as lock:
        _lock(lock)  # one process at a time counts and sets aside
        if whole.exists():
            return "there"
        file = partial.open("a+b")
        if not _lock(file, wait=False):
            file.close()
            return "busy"
        if whole.exists():  # finished since it was looked for; what was opened is it, or a new file
            partial.unlink(missing_ok=True)
            file.close()
            return "there"
        if _make_room(whole.parent, limit_bytes - size, but=partial.name):
            return file
        if not os.fstat(file.fileno()).st_size:
            partial.unlink()
        file.close()
        return "full"


def _make_room(folder: Path, most_bytes: int, *, but: str) -> bool:
    """Throw copies away that nobody uses, the one that was not used for longest first; whether that was enough."""
    entries = []
    for entry in os.scandir(folder):
        match = _ENTRY.fullmatch(entry.name)
        if match is not None and entry.name != but:
            with contextlib.suppress(FileNotFoundError):
                # An unfinished one counts as whole: its room is set aside.
                entries.append((entry.stat().st_mtime, int(match[1]), Path(entry.path)))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= most_bytes:
            break
        with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
            if _lock(file, wait=False):
                path.unlink()
                total -= size
    return total <= most_bytes


def _download(path: RemotePath, found: Found, file: BinaryIO) -> None:
    """Fill an unfinished copy, from where it stopped, several parts at once."""
    done = os.fstat(file.fileno()).st_size // _PART_BYTES * _PART_BYTES
    file.truncate(done)
    waiting: deque[tuple[int, Future[bytes]]] = deque()
    starts = iter(range(done, found.size, _PART_BYTES))
    pool = ThreadPoolExecutor(_PARTS_AT_ONCE)
    try:
        while True:
            for start in starts:
                end = min(start + _PART_BYTES, found.size)
                waiting.append((end - start, pool.submit(path.read_range, start, end, found.version)))
                if len(waiting) == _PARTS_AT_ONCE:
                    break
            if not waiting:
                break
            length, part = waiting.popleft()
            data = part.result()
            if len(data) != length:
                raise OSError(errno.EIO, f"the server sent {len(data)} bytes in place of {length}")
            file.write(data)
    except io.UnsupportedOperation:  # a server that gives whole files only
        file.truncate(0)
        for block in path.blocks():
            file.write(block)
    finally:
        pool.shutdown(cancel_futures=True)
    file.flush()
    os.fsync(file.fileno())
    size = os.fstat(file.fileno()).st_size
    if size != found.size:
        file.truncate(0)
        raise OSError(errno.EIO, f"the server sent {size} bytes in place of {found.size}")


def _lock(file: BinaryIO, *, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file until it is closed; False where another one has it."""
    if fcntl is not None:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
    return True
