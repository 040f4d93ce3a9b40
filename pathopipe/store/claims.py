"""Who writes to a slide: a file beside its store that names the process and shows that it is alive.

On a disk the file is made, moved and touched; in a bucket the object is put on condition of what was there before,
which the server decides.
"""

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Protocol, Self

from pathopipe.errors import StoreBusyError, StoreWriteError
from pathopipe.files import one_at_a_time
from pathopipe.remote import RemotePath, Version

__all__ = ["Claim", "Claims", "Holder", "claimed", "one_writer"]

_BEATS_EVERY_S = 10.0
_DEAD_AFTER_S = 90.0
_TRIES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process that holds a claim."""

    host: str
    machine: str
    """Which running system it is, and which process numbers hold there: containers may share a host's name."""
    pid: int
    started: float
    """When the process began, in the system's own count: its number may be given out again."""
    since: str
    token: str
    """Different for every claim."""
    beats: int = 0
    """Signs of life in a bucket, where an object changes only when its bytes do."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@dataclass(frozen=True, slots=True)
class Claim:
    """One slide's claim as it travels to those who work under it."""

    path: Path
    token: str

    def check(self) -> None:
        """Make sure that no other process has taken the slide over.

        Raises:
            StoreBusyError: Another one has; what is written from now on could mix with what it writes.
        """
        holder = _read(self.path)
        if holder is not None and holder.token != self.token:
            slide_id = _slide_id(self.path)
            raise StoreBusyError(
                f"{slide_id}: taken over by {holder}, which had no sign of life from this run; let that one finish, "
                "then run again",
                slide_id=slide_id,
            )


class Claims:
    """The claims that this process holds; a thread shows every few seconds that it is alive.

    A claim of a process that has died is taken over: at once where it ran on this machine, after a minute and a half
    without a sign of life where it ran on another one. Nothing depends on locks of the file system.

    Args:
        out: The output folder.
        beats_every_s: Seconds between signs of life.
        dead_after_s: Seconds without a sign of life after which a process on another machine counts as dead.
    """

    def __init__(
        self, out: Path, *, beats_every_s: float = _BEATS_EVERY_S, dead_after_s: float = _DEAD_AFTER_S
    ) -> None:
        self._folder = out / "slides"
        self._beats_every_s = beats_every_s
        self._dead_after_s = dead_after_s
        self._held: dict[str, Claim] = {}
        self._places: dict[str, _Place] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        for slide_id in list(self._held):
            self.release(slide_id)

    def take(self, slide_id: str) -> Claim:
        """Claim a slide.

        Raises:
            StoreBusyError: Another process has it; the message says which, and since when.
            StoreWriteError: The folder takes no files.
        """
        return self.take_file(self._folder / f".{slide_id}.claim", slide_id, f"{slide_id}: another run is writing it")

    def take_file(self, path: Path, slide_id: str, busy: str) -> Claim:
        """Claim what a file stands for.

        Args:
            path: The file.
            slide_id: What :meth:`release` calls it.
            busy: How the message begins where another process has it.

        Raises:
            StoreBusyError: Another process has it; the message says which, and since when.
            StoreWriteError: The folder takes no files.
        """
        place = _place(path)
        token = uuid.uuid4().hex
        for _ in range(_TRIES):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                if not place.create(_said(token)) and not self._take_over(place, slide_id, token, busy):
                    continue
            except OSError as error:
                raise StoreWriteError(f"{path}: can't be written ({error.strerror or error})") from error
            claim = Claim(path, token)
            self._held[slide_id] = claim
            self._places[slide_id] = place
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)
                self._thread.start()
            return claim
        raise StoreBusyError(f"{slide_id}: several processes are after it at once; run again", slide_id=slide_id)

    def release(self, slide_id: str) -> None:
        """Give a slide back; nothing happens where another process has taken it over."""
        claim = self._held.pop(slide_id, None)
        self._places.pop(slide_id, None)
        if claim is None:
            return
        holder = _read(claim.path)
        if holder is not None and holder.token == claim.token:
            with contextlib.suppress(OSError):
                claim.path.unlink(missing_ok=True)

    def _take_over(self, place: "_Place", slide_id: str, token: str, busy: str) -> bool:
        """Put the claim in the place of a dead process's; StoreBusyError where it lives."""
        seen = place.look()
        if seen is None:
            return False
        holder = _parse(seen)
        if holder is not None and holder.token == token:
            return True  # it was created, and only the answer was lost
        if holder is not None and holder.machine == _machine():
            alive, sign = _started(holder.pid) == holder.started, ""
        else:
            age_s = place.age_s()
            if age_s is None:
                return False
            alive, sign = age_s < self._dead_after_s, f"; last sign of life {age_s:.0f} s ago"
        if alive:
            who = str(holder) if holder is not None else "a process that has not said its name yet"
            raise StoreBusyError(f"{busy} ({who}{sign}); wait for it, then run again", slide_id=slide_id)
        return place.take_over(seen, _said(token), self._dead_after_s)

    def _beat(self) -> None:
        while not self._ended.wait(self._beats_every_s):
            for slide_id, claim in list(self._held.items()):
                place = self._places.get(slide_id)
                if place is not None:
                    with contextlib.suppress(OSError):
                        place.beat(claim.token)


class _Place(Protocol):
    """Where a claim is written."""

    def create(self, said: bytes) -> bool:
        """Write the claim where there is none."""
        ...

    def look(self) -> bytes | None:
        """What the claim says; None where it is gone."""
        ...

    def take_over(self, seen: bytes, said: bytes, dead_after_s: float) -> bool:
        """Write it in the place of what was seen; False where another process was quicker."""
        ...

    def age_s(self) -> float | None:
        """Seconds since the last sign of life, by the clock of where it is; None where the claim is gone."""
        ...

    def beat(self, token: str) -> None:
        """Give a sign of life; nothing where the claim is another's."""
        ...


class _LocalPlace:
    """A file: made exclusively, moved into the place of a dead one under a second name, touched."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def create(self, said: bytes) -> bool:
        try:
            handle = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(said)
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        return True

    def look(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def take_over(self, seen: bytes, said: bytes, dead_after_s: float) -> bool:
        # Of all that follow the same dead claim, one can give it this second name. The first name is never free in
        # between, so nobody new slips in; and who comes late finds a living claim under both names, and lets it be.
        second = self._path.with_name(f"{self._path.name}.{hashlib.sha256(seen).hexdigest()[:16]}")
        try:
            os.link(self._path, second)
        except FileNotFoundError:
            return False
        except FileExistsError:
            # A process may have died right here.
            with contextlib.suppress(FileNotFoundError):
                if time.time() - second.stat().st_ctime > dead_after_s:
                    second.unlink()
            time.sleep(0.01)
            return False
        own = self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex[:8]}")
        try:
            if second.read_bytes() != seen:
                return False
            own.write_bytes(said)
            own.replace(self._path)
        finally:
            own.unlink(missing_ok=True)
            second.unlink(missing_ok=True)
        return True

    def age_s(self) -> float | None:
        probe = self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex[:8]}")
        try:
            probe.touch()
            return probe.stat().st_mtime - self._path.stat().st_mtime
        except FileNotFoundError:
            return None
        finally:
            probe.unlink(missing_ok=True)

    def beat(self, token: str) -> None:
        holder = _read(self._path)
        if holder is not None and holder.token == token:
            os.utime(self._path)


class _RemotePlace:
    """An object: put where there is none, or in the place of the very bytes that were seen."""

    def __init__(self, path: RemotePath) -> None:
        self._path = path
        self._version: Version | None = None

    def create(self, said: bytes) -> bool:
        return self._path.create(said) is not None

    def look(self) -> bytes | None:
        found = self._path.read_version()
        if found is None:
            return None
        seen, self._version = found
        return seen

    def take_over(self, seen: bytes, said: bytes, dead_after_s: float) -> bool:
        return self._version is not None and self._path.exchange(said, self._version) is not None

    def age_s(self) -> float | None:
        probe = self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex[:8]}")
        try:
            probe.put(b"")
            now, then = probe.found(), self._path.found()
            return now.modified_s - then.modified_s if now is not None and then is not None else None
        finally:
            probe.unlink(missing_ok=True)

    def beat(self, token: str) -> None:
        found = self._path.read_version()
        holder = _parse(found[0]) if found is not None else None
        if found is not None and holder is not None and holder.token == token:
            # Whoever has taken the claim over since has changed its version, and is left alone.
            self._path.exchange(_written(replace(holder, beats=holder.beats + 1)), found[1])


def _place(path: Path) -> _Place:
    return _RemotePlace(path) if isinstance(path, RemotePath) else _LocalPlace(path)


@contextlib.contextmanager
def claimed(out: Path, slide_id: str) -> Iterator[Claim]:
    """Hold the claim to one slide.

    Raises:
        StoreBusyError: Another process has it; the message says which, and since when.
    """
    with Claims(out) as claims:
        yield claims.take(slide_id)


@contextlib.contextmanager
def one_writer(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file as :func:`pathopipe.files.one_at_a_time` does; of a bucket, which has no locks, a claim.

    Raises:
        StoreBusyError: Another process holds it.
        StoreWriteError: The folder can't be written.
    """
    if not isinstance(path, RemotePath):
        with one_at_a_time(path, what):
            yield
        return
    with Claims(path.parent) as claims:
        claims.take_file(path, what, f"another process is writing {what}")
        yield


def _said(token: str) -> bytes:
    """What this process writes into a claim."""
    pid = os.getpid()
    holder = Holder(
        host=socket.gethostname(),
        machine=_machine(),
        pid=pid,
        started=_started(pid),
        since=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z"),
        token=token,
    )
    return _written(holder)


def _written(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()


def _slide_id(path: Path) -> str:
    return path.name.removeprefix(".").removesuffix(".claim")


def _read(path: Path) -> Holder | None:
    try:
        return _parse(path.read_bytes())
    except OSError:
        return None


def _parse(text: bytes) -> Holder | None:
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _machine() -> str:
    """What tells one running system, and one set of process numbers in it, from all others."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _started(pid: int) -> float:
    """When a process of this machine began; -1 where there is none."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # In ticks since the system began: a date would move with the clock.
        return -1.0 if state in "ZX" else float(numbers[18])
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return -1.0
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return -1.0
