"""A real server: what a folder promises, a bucket keeps, through kills, rivals, missing rights and deleted objects."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathopipe.cluster import check_writable
from pathopipe.errors import StoreBusyError, StoreWriteError, UsageError
from pathopipe.files import durable_file
from pathopipe.remote import RemotePath, location, paths
from pathopipe.store import SlideStore, store_path
from pathopipe.store.claims import Claims

pytestmark = pytest.mark.slow

CHUNKS = ("--set", "embed.chunk_rows=2", "--set", "embed.batch_size=2")


@pytest.fixture
def bucket(s3_server: Any) -> RemotePath:
    path = location(s3_server.make_bucket(f"b{uuid.uuid4().hex}"))
    assert isinstance(path, RemotePath)
    return path


def started(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pathopipe", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows_of(out: Path, slide_id: str = "drawn") -> tuple[bytes, bytes]:
    """Values and status of the one encoder of a slide."""
    store = SlideStore.open(store_path(out, slide_id))
    (grid,) = store.grids()
    rows = store.embeddings(grid, "handcrafted")
    assert rows.attributes["complete"]
    return rows.read_values().tobytes(), rows.read_status().tobytes()


def test_a_killed_run_goes_on_and_ends_as_a_local_one(
    bucket: RemotePath, drawn_slide: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    out = bucket / "study"
    first = started("run", drawn_slide, "--out", out, *CHUNKS)
    chunks = out / "slides" / "drawn.zarr" / "embeddings"
    deadline = time.monotonic() + 120
    while not any("/values/c/" in name for name in chunks.sizes_below()) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    store = SlideStore.open(store_path(out, "drawn"))
    rows = store.embeddings(store.grids()[0], "handcrafted")
    before = rows.done_chunks()
    assert 0 < len(before) < rows.n_chunks
    kept = {chunk: (rows._store.path / rows._group / f"values/c/{chunk}/0").stat().st_mtime for chunk in before}
    again = cli("run", drawn_slide, "--out", out, *CHUNKS)
    assert again.code == 0, again
    for chunk, written in kept.items():
        assert (rows._store.path / rows._group / f"values/c/{chunk}/0").stat().st_mtime == written
    assert cli("run", drawn_slide, "--out", tmp_path, *CHUNKS).code == 0
    assert rows_of(out) == rows_of(tmp_path)
    assert cli("verify", out).code == 0
    # Nothing of the run is left but its results.
    assert not [name for name in out.sizes_below() if ".claim" in name or "write-test" in name]


def test_two_runs_at_once_share_the_slides(bucket: RemotePath, drawn_slide: Path, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.tiff").symlink_to(drawn_slide)
    both = [started("run", tmp_path, "--out", bucket / "study", *CHUNKS) for _ in range(2)]
    try:
        ends = [(process.communicate(timeout=200)[0], process.returncode) for process in both]
    finally:
        for process in both:
            process.kill()
    for told, code in ends:
        assert code == 0, told
        assert "3 of 3 slides done" in told
    done = {rows_of(bucket / "study", name) for name in "abc"}
    assert len(done) == 1  # the same slide three times


def test_verify_finds_a_chunk_that_was_deleted(bucket: RemotePath, drawn_slide: Path, cli: Callable[..., Any]) -> None:
    assert cli("run", drawn_slide, "--out", bucket).code == 0
    (values,) = [name for name in bucket.sizes_below() if name.endswith("values/c/0/0")]
    (bucket / values).unlink()
    found = cli("verify", bucket)
    assert found.code == 1
    assert "lacks 1 of 1 chunks" in found.out
    assert cli("run", drawn_slide, "--out", bucket).code == 0
    assert cli("verify", bucket).code == 0


def test_slides_come_from_the_bucket(
    bucket: RemotePath, drawn_slide: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    (bucket / "in" / "drawn.tiff").write_bytes(drawn_slide.read_bytes())
    manifest = tmp_path / "cohort.csv"
    manifest.write_text(f"slide_id,path\nfar,{bucket}/in/drawn.tiff\nnear,{drawn_slide}\n")
    settings = ("--set", f"slide.cache_dir={tmp_path / 'cache'}")
    assert cli("run", manifest, "--out", bucket / "out", *settings).code == 0
    assert rows_of(bucket / "out", "far") == rows_of(bucket / "out", "near")
    far, near = (SlideStore.open(store_path(bucket / "out", name)).slide["fingerprint"] for name in ("far", "near"))
    assert far == near
    manifest.write_text(f"slide_id,path\nfar,{bucket}/in/other.tiff\n")
    missing = cli("run", manifest, "--out", bucket / "out", *settings)
    assert missing.code == 2
    assert "row 2" in missing.err
    assert "no such object" in missing.err


def test_what_an_output_needs_is_looked_at_first(bucket: RemotePath) -> None:
    check_writable(bucket / "new" / "folder")
    assert bucket.sizes_below() == {}
    with pytest.raises(UsageError, match="there is no bucket 'nobody-made-this'.*AWS_ENDPOINT_URL"):
        check_writable(location("s3://nobody-made-this/out"))
    with pytest.raises(UsageError, match="a web server takes no results"):
        check_writable(location("https://127.0.0.1/out"))


def test_of_many_that_follow_a_dead_holder_one_gets_the_slide(bucket: RemotePath) -> None:
    claim = bucket / "slides" / ".a.claim"
    for _ in range(3):
        with Claims(bucket) as dead:
            dead.take("a")
            holder = json.loads(claim.read_text())
            claim.write_text(json.dumps({**holder, "pid": 999_999, "started": 1.0, "token": "dead"}))
        won: list[Claims] = []
        ready = threading.Barrier(6)

        def take(winners: list[Claims] = won, barrier: threading.Barrier = ready) -> None:
            claims = Claims(bucket)
            barrier.wait(timeout=60)
            try:
                claims.take("a")
            except StoreBusyError:
                return
            winners.append(claims)

        threads = [threading.Thread(target=take) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        won[0].__exit__()
        assert bucket.sizes_below() == {}


def test_a_large_object_goes_up_in_parts_and_is_there_at_the_end(
    bucket: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "_MULTIPART_BYTES", 6 * 2**20)
    monkeypatch.setattr(paths, "_PART_BYTES", 5 * 2**20)
    data = np.random.default_rng(0).bytes(12 * 2**20 + 7)
    with durable_file(bucket / "large.bin") as file:
        file.write(data)
        assert not (bucket / "large.bin").exists()
    assert (bucket / "large.bin").read_bytes() == data
    with pytest.raises(KeyError), durable_file(bucket / "large.bin") as file:
        file.write(b"half")
        raise KeyError
    assert (bucket / "large.bin").read_bytes() == data


class _Refuses(BaseHTTPRequestHandler):
    """Says no, as S3 does, with the key in its answer."""

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        body = (
            b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message>"
            b"<AWSAccessKeyId>a-key</AWSAccessKeyId><StringToSign>a-secret-word</StringToSign></Error>"
        )
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        pass


def test_no_rights_and_no_answer_are_said_in_seconds_and_without_keys(
    monkeypatch: pytest.MonkeyPatch, drawn_slide: Path, cli: Callable[..., Any]
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-word")
    with HTTPServer(("127.0.0.1", 0), _Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        refused = cli("run", drawn_slide, "--out", "s3://refused/out")
        server.shutdown()
    assert refused.code == 1
    assert "s3://refused/out: the output folder can't be written" in refused.err
    assert "'Access Denied'" in refused.err
    assert "s3:PutObject" in refused.err
    assert "a-key" not in refused.err
    assert "a-secret-word" not in refused.err
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    began = time.monotonic()
    with pytest.raises(StoreWriteError, match="no connection: check the network"):
        check_writable(location("s3://silent/out"))
    assert time.monotonic() - began < 30
    assert os.environ["AWS_ACCESS_KEY_ID"] == "a-key"
