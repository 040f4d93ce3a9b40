"""Who writes to a slide: a file beside its store that names the process and shows that it is alive."""

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

from pathopipe.errors import StoreBusyError, StoreWriteError

__all__ = ["Claim", "Claims", "Holder", "claimed"]

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
        path = self._folder / f".{slide_id}.claim"
        token = uuid.uuid4().hex
        for _ in range(_TRIES):
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                if not self._create(path, token) and not self._take_over(path, slide_id, token):
                    continue
            except OSError as error:
                raise StoreWriteError(f"{path}: can't be written ({error.strerror or error})") from error
            claim = Claim(path, token)
            self._held[slide_id] = claim
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)
                self._thread.start()
            return claim
        raise StoreBusyError(f"{slide_id}: several processes are after it at once; run again", slide_id=slide_id)

    def release(self, slide_id: str) -> None:
        """Give a slide back; nothing happens where another process has taken it over."""
        claim = self._held.pop(slide_id, None)
        if claim is None:
            return
        holder = _read(claim.path)
        if holder is not None and holder.token == claim.token:
            with contextlib.suppress(OSError):
                claim.path.unlink(missing_ok=True)

    def _create(self, path: Path, token: str) -> bool:
        """Write the claim where there is none."""
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_said(token))
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return True

    def _take_over(self, path: Path, slide_id: str, token: str) -> bool:
        """Put the claim in the place of a dead process's; StoreBusyError where it lives."""
        try:
            seen = path.read_bytes()
        except FileNotFoundError:
            return False
        holder = _parse(seen)
        if holder is not None and holder.machine == _machine():
            alive, sign = _started(holder.pid) == holder.started, ""
        else:
            age_s = self._age_s(path)
            if age_s is None:
                return False
            alive, sign = age_s < self._dead_after_s, f"; last sign of life {age_s:.0f} s ago"
        if alive:
            who = str(holder) if holder is not None else "a process that has not said its name yet"
            raise StoreBusyError(
                f"{slide_id}: another run is writing it ({who}{sign}); wait for it, then run again", slide_id=slide_id
            )
        # Of all that follow the same dead claim, one can give it this second name. The first name is never free in
        # between, so nobody new slips in; and who comes late finds a living claim under both names, and lets it be.
        second = path.with_name(f"{path.name}.{hashlib.sha256(seen).hexdigest()[:16]}")
        try:
            os.link(path, second)
        except FileNotFoundError:
            return False
        except FileExistsError:
            # A process may have died right here.
            with contextlib.suppress(FileNotFoundError):
                if time.time() - second.stat().st_ctime > self._dead_after_s:
                    second.unlink()
            time.sleep(0.01)
            return False
        own = path.with_name(f"{path.name}.{token[:8]}")
        try:
            if second.read_bytes() != seen:
                return False
            own.write_bytes(_said(token))
            own.replace(path)
        finally:
            own.unlink(missing_ok=True)
            second.unlink(missing_ok=True)
        return True

    def _age_s(self, path: Path) -> float | None:
        """Seconds since the last sign of life, by the clock of the file system; None where the claim is gone."""
        probe = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            probe.touch()
            now = probe.stat().st_mtime
            return now - path.stat().st_mtime
        except FileNotFoundError:
            return None
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(self._beats_every_s):
            for claim in list(self._held.values()):
                holder = _read(claim.path)
                if holder is not None and holder.token == claim.token:
                    with contextlib.suppress(OSError):
                        os.utime(claim.path)


@contextlib.contextmanager
def claimed(out: Path, slide_id: str) -> Iterator[Claim]:
    """Hold the claim to one slide.

    Raises:
        StoreBusyError: Another process has it; the message says which, and since when.
    """
    with Claims(out) as claims:
        yield claims.take(slide_id)


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
