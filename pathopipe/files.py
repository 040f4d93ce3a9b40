"""Files that are whole or absent: written under a temporary name, synced, then renamed; objects are put whole."""

import contextlib
import errno
import glob
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from pathopipe.errors import StoreBusyError, StoreWriteError
from pathopipe.remote import RemotePath

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["durable_file", "listing", "move_tree", "one_at_a_time", "remove_leftovers", "remove_tree", "sizes_below"]

_SUFFIX = ".partial"
_IN_MEMORY_BYTES = 32 * 2**20
_NAME_LENGTH = 100
_FORGOTTEN_AFTER_S = 24 * 3600
_OUTPUT_FAILED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


@contextlib.contextmanager
def one_at_a_time(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file, so that two processes do not write the same thing at once.

    The system lets go of the lock when the process ends, however it ends; the empty file stays. Where the system or the
    file system has no such locks, nothing is held. Of objects see :func:`pathopipe.store.claims.one_writer`.

    Raises:
        StoreBusyError: Another process holds it.
        StoreWriteError: The folder can't be written.
    """
    try:
        _make_folder(path.parent)
        file = path.open("ab")
    except OSError as error:
        raise _explain(path, error) from error
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreBusyError(f"another process is writing {what}; wait for it, then run again") from None
            except OSError:
                pass  # a file system without locks
        yield


@contextlib.contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Open ``path`` for writing so that it appears whole, on disk, or not at all.

    The bytes go to a hidden temporary name in the same folder; on leaving without an exception the file and then its
    folder are synced around the rename. Missing folders are made. An object is put when all its bytes are known.

    Raises:
        StoreWriteError: The disk is full, or the folder can't be written. The temporary file is gone.
    """
    if isinstance(path, RemotePath):
        with tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES) as spooled:
            yield cast(BinaryIO, spooled)
            try:
                path.put(cast(BinaryIO, spooled))
            except OSError as error:
                raise _explain(path, error) from error
        return
    # Host and process stand in the name, so that a later run knows whose leftover it is.
    owner = f"{socket.gethostname()}-{os.getpid()}"
    temporary = path.parent / f".{path.name[:_NAME_LENGTH]}.{owner}-{uuid.uuid4().hex[:8]}{_SUFFIX}"
    try:
        _make_folder(path.parent)
        file = temporary.open("wb")
    except OSError as error:
        raise _explain(path, error) from error
    filled = False
    try:
        with file:
            yield file
            filled = True
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # Whoever fills the file may fail with an OSError of another file; a full disk is always ours.
        if isinstance(error, OSError) and (filled or error.errno in _OUTPUT_FAILED):
            raise _explain(path, error) from error
        raise
    _sync_folder(path.parent)


def _explain(path: Path, error: OSError) -> StoreWriteError:
    reason = error.strerror or str(error)
    if isinstance(path, RemotePath):
        return StoreWriteError(
            f"{path}: can't be written ({reason}); what was finished before is kept: run the same command again when "
            "that is mended, or choose another --out"
        )
    return StoreWriteError(
        f"{path}: can't be written ({reason}); what was finished before is kept: "
        "free space or choose another --out, then run the same command again"
    )


def remove_leftovers(folder: Path, name: str = "", *, deep: bool = True) -> int:
    """Delete temporary files below ``folder`` that a killed process of this machine left; return how many.

    Args:
        folder: Where to look.
        name: Of one file that was to be written; of all when left out.
        deep: Look in the folders of the folder, too.
    """
    if isinstance(folder, RemotePath):
        return 0  # objects have no temporary names
    removed = 0
    pattern = f".{glob.escape(name[:_NAME_LENGTH])}*{_SUFFIX}"
    for temporary in folder.rglob(pattern) if deep else folder.glob(pattern):
        if not _in_use(temporary):
            temporary.unlink(missing_ok=True)
            removed += 1
    return removed


def listing(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder, sorted; none where there is no such folder."""
    if isinstance(folder, RemotePath):
        return folder.listing()
    folders: list[str] = []
    files: list[str] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            (folders if entry.is_dir() else files).append(entry.name)
    return sorted(folders), sorted(files)


def sizes_below(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by its way from there, with ``/``; objects are not asked one by one."""
    if isinstance(folder, RemotePath):
        return folder.sizes_below()
    sizes: dict[str, int] = {}
    for place, _, names in os.walk(folder):
        way = Path(place).relative_to(folder)
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                sizes[(way / name).as_posix()] = Path(place, name).stat().st_size
    return sizes


def remove_tree(folder: Path, *, first: str = "") -> None:
    """Delete a folder and all in it, a file of it before all others; nothing where there is none.

    Raises:
        StoreWriteError: Objects can't be deleted.
    """
    if isinstance(folder, RemotePath):
        try:
            if first:
                (folder / first).unlink(missing_ok=True)
            folder.remove_tree(but=(first,))
        except OSError as error:
            raise _explain(folder, error) from error
        return
    if first:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (folder / first).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def move_tree(folder: Path, target: Path) -> None:
    """Give a folder another name; objects are copied within their bucket one by one, and then deleted.

    Raises:
        StoreWriteError: Objects can't be copied.
    """
    if isinstance(folder, RemotePath):
        try:
            folder.copy_tree(cast(RemotePath, target))
        except OSError as error:
            raise _explain(target, error) from error
        remove_tree(folder)
        return
    folder.rename(target)


def _in_use(temporary: Path) -> bool:
    host, _, rest = temporary.name.removesuffix(_SUFFIX).rpartition(".")[2].rpartition("-")[0].rpartition("-")
    try:
        age_s = time.time() - temporary.stat().st_mtime
    except FileNotFoundError:
        return True
    if host != socket.gethostname() or not rest.isdigit():
        return age_s < _FORGOTTEN_AFTER_S
    try:
        os.kill(int(rest), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return int(rest) != os.getpid()


def _make_folder(folder: Path) -> None:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        _sync_folder(new.parent)


def _sync_folder(folder: Path) -> None:
    # Windows can't open a folder, and some network file systems refuse to sync one; the rename still holds there.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
