"""Files are whole or absent."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pathopipe.errors import StoreBusyError, StoreWriteError
from pathopipe.files import durable_file, one_at_a_time, remove_leftovers


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "file.bin"
    with durable_file(target) as file:
        file.write(b"abc")
        assert not target.exists()
    assert target.read_bytes() == b"abc"
    assert os.listdir(target.parent) == ["file.bin"]


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")
    with pytest.raises(KeyError), durable_file(target) as file:
        file.write(b"half")
        raise KeyError
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreWriteError, match="No space left on device.*free space or choose another --out"):
        with durable_file(tmp_path / "file.bin") as file:
            file.write(b"abc")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("not a folder")
    with pytest.raises(StoreWriteError), durable_file(tmp_path / "out" / "file.bin"):
        pass


def test_leftovers_of_the_dead_go_those_of_the_living_stay(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from pathopipe.files import durable_file\n"
        "with durable_file(pathlib.Path(sys.argv[1])) as f:\n"
        "    f.write(b'x'); f.flush(); print('ready', flush=True); time.sleep(60)"
    )
    target = tmp_path / "deep" / "er" / "file.bin"
    with subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert remove_leftovers(tmp_path) == 0
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(os.listdir(target.parent)) == 1
    assert remove_leftovers(tmp_path) == 1
    assert os.listdir(target.parent) == []


def test_leftovers_of_other_machines_go_after_a_day(tmp_path: Path) -> None:
    stranger = tmp_path / ".file.bin.elsewhere-77-abcdef12.partial"
    stranger.write_bytes(b"x")
    assert remove_leftovers(tmp_path) == 0
    yesterday = time.time() - 25 * 3600
    os.utime(stranger, (yesterday, yesterday))
    assert remove_leftovers(tmp_path) == 1


def test_only_one_process_holds_a_lock(tmp_path: Path) -> None:
    lock = tmp_path / "new" / ".lock"
    with one_at_a_time(lock, "this"):
        with pytest.raises(StoreBusyError, match="another process is writing this"):
            with one_at_a_time(lock, "this"):
                raise AssertionError("held twice")
    with one_at_a_time(lock, "this"):
        assert lock.exists()


def test_errors_of_what_a_lock_guards_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        with one_at_a_time(tmp_path / ".lock", "this"):
            raise FileNotFoundError("of the body")
