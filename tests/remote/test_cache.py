"""Slides from URLs: downloaded once and whole, within the limit, never the one in use."""

import functools
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from pathopipe.config import SlideConfig
from pathopipe.errors import SlideOpenError
from pathopipe.remote import RemotePath, Version, location
from pathopipe.slide import cache
from pathopipe.slide.cache import cached, local_slide
from pathopipe.slide.open import open_slide

PART = 1000
LIMIT = 100_000


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> RemotePath:
    monkeypatch.setattr(cache, "_PART_BYTES", PART)
    monkeypatch.setattr(cache, "_LOOKS_EVERY_S", 0.005)
    path = location(f"memory://{uuid.uuid4().hex}")
    assert isinstance(path, RemotePath)
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where the ranges began that were asked for."""
    starts: list[int] = []
    read_range = RemotePath.read_range

    def counted(path: RemotePath, start: int, end: int, version: Version | None) -> bytes:
        starts.append(start)
        return read_range(path, start, end, version)

    monkeypatch.setattr(RemotePath, "read_range", counted)
    return starts


def put(path: RemotePath, size: int, seed: int = 1) -> bytes:
    data = bytes((seed + 7 * number) % 251 for number in range(size))
    path.write_bytes(data)
    return data


@pytest.mark.parametrize("size", [0, 1, PART, 4 * PART, 13 * PART + 17])
def test_a_copy_is_the_object_and_is_downloaded_once(
    bucket: RemotePath, tmp_path: Path, reads: list[int], size: int
) -> None:
    data = put(bucket / "a.svs", size)
    for _ in range(2):
        with cached(bucket / "a.svs", tmp_path / "new", LIMIT) as copy:
            assert copy.read_bytes() == data
            assert copy.suffix == ".svs"
    assert sorted(reads) == list(range(0, size, PART))


def test_a_copy_that_is_finished_this_very_moment_is_not_downloaded_again(
    bucket: RemotePath, tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = put(bucket / "a.svs", 3 * PART)
    lock, finished = cache._lock, []

    def late(file: BinaryIO, **how: bool) -> bool:
        if Path(file.name).suffix == cache._PARTIAL and not finished:
            finished.append(Path(file.name.removesuffix(cache._PARTIAL)))
            finished[0].write_bytes(data)  # another process was that quick
        return lock(file, **how)

    monkeypatch.setattr(cache, "_lock", late)
    with cached(bucket / "a.svs", tmp_path, LIMIT) as copy:
        assert copy == finished[0]
        assert copy.read_bytes() == data
    assert reads == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", copy.name]


def test_a_download_that_broke_off_goes_on_where_it_stopped(
    bucket: RemotePath, tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = put(bucket / "a.svs", 20 * PART)
    whole = RemotePath.read_range

    def breaks(path: RemotePath, start: int, end: int, version: Version | None) -> bytes:
        if start >= 10 * PART:
            raise OSError(5, "no connection", str(path))
        return whole(path, start, end, version)

    with monkeypatch.context() as patch:
        patch.setattr(RemotePath, "read_range", breaks)
        with pytest.raises(SlideOpenError, match=r"a.svs: can't be copied to .*no connection"):
            with cached(bucket / "a.svs", tmp_path, LIMIT):
                raise AssertionError("half a slide was opened")
    reads.clear()
    with cached(bucket / "a.svs", tmp_path, LIMIT) as copy:
        assert copy.read_bytes() == data
    assert sorted(reads) == list(range(10 * PART, 20 * PART, PART))


def test_an_object_that_changes_while_it_is_read_is_read_anew(
    bucket: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bucket / "a.svs", 20 * PART)
    whole = RemotePath.read_range
    new: list[bytes] = []

    def changes(path: RemotePath, start: int, end: int, version: Version | None) -> bytes:
        if start == 10 * PART and not new:
            new.append(put(path, 20 * PART, seed=3))
        return whole(path, start, end, version)

    monkeypatch.setattr(RemotePath, "read_range", changes)
    with cached(bucket / "a.svs", tmp_path, LIMIT) as copy:
        assert copy.read_bytes() == new[0]
    assert not list(tmp_path.glob("*.partial"))
    # Written anew at the same length: another slide.
    newer = put(bucket / "a.svs", 20 * PART, seed=5)
    with cached(bucket / "a.svs", tmp_path, LIMIT) as copy:
        assert copy.read_bytes() == newer


def test_what_was_not_used_for_longest_goes_first_and_what_is_in_use_stays(bucket: RemotePath, tmp_path: Path) -> None:
    for name in "abcd":
        put(bucket / name, 40, seed=ord(name))

    def held() -> str:
        return "".join(sorted(path.name[-1] for path in tmp_path.glob("*-40-*")))

    def use(name: str) -> None:
        time.sleep(0.01)
        with cached(bucket / name, tmp_path, 100):
            pass

    use("a")
    use("b")
    use("a")
    use("c")
    assert held() == "ac"
    with cached(bucket / "a", tmp_path, 100) as in_use:
        use("c")
        use("d")
        assert held() == "ad"
        assert in_use.exists()


def test_what_does_not_fit_is_said(bucket: RemotePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_WAITS_FOR_ROOM_S", 0.02)
    put(bucket / "a", 101)
    with pytest.raises(SlideOpenError, match=r"do not fit into the cache of 1e-07 GB; raise slide.cache_gb"):
        with cached(bucket / "a", tmp_path, 100):
            pass
    put(bucket / "b", 60)
    put(bucket / "c", 60)
    with cached(bucket / "b", tmp_path, 100):
        with pytest.raises(SlideOpenError, match="slides in use have filled it"):
            with cached(bucket / "c", tmp_path, 100):
                pass
    with cached(bucket / "c", tmp_path, 100) as copy:
        assert copy.stat().st_size == 60
    assert len(list(tmp_path.glob("*-60-*"))) == 1
    with pytest.raises(SlideOpenError, match="there is no such object; check the URL"):
        with cached(bucket / "none", tmp_path, 100):
            pass


@pytest.mark.parametrize("suffix", [".mrxs", ".vms", ".dcm"])
def test_slides_of_several_files_are_refused(bucket: RemotePath, tmp_path: Path, suffix: str) -> None:
    with pytest.raises(SlideOpenError, match=f"a {suffix} slide is made of several files"):
        with cached(bucket / f"a{suffix}", tmp_path, 100):
            pass


def test_many_at_once_share_one_download_and_keep_the_limit(
    bucket: RemotePath, tmp_path: Path, reads: list[int]
) -> None:
    wanted = {name: put(bucket / name, 10 * PART, seed=ord(name)) for name in "abcdef"}

    def size(path: Path) -> int:
        try:
            return path.stat().st_size
        except FileNotFoundError:  # thrown away since it was listed
            return 0

    def use(name: str) -> bool:
        with cached(bucket / name, tmp_path, 25 * PART) as copy:
            total = sum(size(path) for path in tmp_path.glob("*-10000-*"))
            return copy.read_bytes() == wanted[name] and total <= 25 * PART

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, ["a"] * 8))
        assert len(reads) == 10
        assert all(pool.map(use, list("abcdef") * 4))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_a_web_server_that_knows_no_ranges_gives_the_whole_slide(drawn_slide: Path, tmp_path: Path) -> None:
    handler = functools.partial(_Quiet, directory=str(drawn_slide.parent))
    settings = SlideConfig(cache_dir=tmp_path / "cache", cache_gb=1)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = location(f"http://127.0.0.1:{server.server_port}/{drawn_slide.name}")
        with local_slide(url, settings) as copy:
            far: Any = open_slide(copy, slide_id="far")
            near = open_slide(drawn_slide, slide_id="near")
            assert far.info.fingerprint == near.info.fingerprint
            far.close()
            near.close()
        with pytest.raises(SlideOpenError, match="there is no such object"):
            with local_slide(url.parent / "none.svs", settings):
                pass
        server.shutdown()
    with local_slide(drawn_slide, settings) as same:
        assert same == drawn_slide
