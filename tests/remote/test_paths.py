"""URLs as paths: their arithmetic, what is below them, contents whole or absent, and what they refuse."""

import io
import os
import pickle
import sys
import uuid
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathopipe.cohort import read_manifest
from pathopipe.errors import StoreBusyError, StoreWriteError, UsageError
from pathopipe.files import durable_file, listing, move_tree, one_at_a_time, remove_leftovers, remove_tree, sizes_below
from pathopipe.remote import RemotePath, Version, check_rights, explained, location
from pathopipe.store.claims import Claims, claimed, one_writer

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=("Cs", "Cc")), min_size=1)


@pytest.fixture
def bucket() -> RemotePath:
    path = location(f"memory://{uuid.uuid4().hex}")
    assert isinstance(path, RemotePath)
    return path


@given(names=st.lists(NAMES.filter(lambda name: name not in (".", "..")), min_size=1, max_size=4))
def test_a_url_is_taken_apart_as_a_path_is(names: list[str]) -> None:
    path, like = location("s3://bucket"), PurePosixPath("/bucket")
    for name in names:
        path, like = path / name, like / name
    assert str(path) == f"s3:/{like}"
    assert isinstance(path, RemotePath)
    assert path.key == "/".join(names)
    assert (path.name, path.stem, path.suffix) == (like.name, like.stem, like.suffix)
    assert str(path.parent) == f"s3:/{like.parent}"
    assert path.parent.parent / path.parent.name / path.name == path or len(names) == 1
    assert path.relative_to(location("s3://bucket")) == like.relative_to("/bucket")
    assert location(str(path)) == path
    assert hash(location(str(path))) == hash(path)
    again = pickle.loads(pickle.dumps(path))
    assert (type(again), again) == (RemotePath, path)
    assert str(path.with_name(f".{path.name}.claim")) == str(path.parent / f".{path.name}.claim")


def test_a_bucket_is_its_own_parent_and_what_is_absolute_stays() -> None:
    path = location("s3://bucket/a/b.zarr")
    assert str(path.parents[1]) == "s3://bucket"
    assert path.parent.parent.parent == location("s3://bucket")
    assert path.absolute() is path.resolve() is path.expanduser() is path
    assert path.is_relative_to(location("s3://bucket/a"))
    with pytest.raises(ValueError, match="is not below"):
        path.relative_to(location("s3://bucket/ab"))
    assert sorted([path, path.parent]) == [path.parent, path]


def test_what_is_no_url_is_a_local_path() -> None:
    assert location("a/b") == Path("a/b")
    assert type(location("a/b")) is type(Path("a/b"))
    assert location("file:///a/b") == Path("/a/b")
    assert location(Path("x")) == Path("x")
    assert str(location("https://host/My%20slide.svs")) == "https://host/My slide.svs"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://host/a", "ftp://: no such kind of place; s3://"),
        ("https://me:secret@host/a", "https://host: a URL with a password or a signature"),
        ("https://host/a?X-Amz-Signature=secret", "https://host: a URL with a password or a signature"),
        ("s3:///a", "names no bucket"),
    ],
)
def test_urls_that_are_refused_do_not_show_secrets(url: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as refused:
        location(url)
    assert "secret" not in str(refused.value)


def test_a_url_never_becomes_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    url = location("memory://bucket/a")
    with pytest.raises(UsageError, match="memory://bucket/a: this takes a local file"):
        os.open(url, os.O_RDONLY)
    with pytest.raises(ValueError, match="null"):
        Path(url).mkdir(parents=True)
    with pytest.raises(io.UnsupportedOperation, match="can't be renamed"):
        url.rename(tmp_path / "b")
    with pytest.raises(io.UnsupportedOperation, match="mode 'wb'"):
        url.open("wb")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["disk", "bucket"])
def test_folders_are_listed_alike(kind: str, tmp_path: Path, bucket: RemotePath) -> None:
    top = tmp_path if kind == "disk" else bucket / "top"
    for name in ("b/2.txt", "b/c/3.txt", "1.txt", ".hidden", "b.zarr/zarr.json"):
        with durable_file(top / name) as file:
            file.write(name.encode())
    assert listing(top) == (["b", "b.zarr"], [".hidden", "1.txt"])
    assert listing(top / "none") == ([], [])
    assert sizes_below(top / "b") == {"2.txt": 7, "c/3.txt": 9}
    assert sizes_below(top / "none") == {}
    assert sorted(path.name for path in top.glob("*.zarr")) == ["b.zarr"]
    assert sorted(str(path.relative_to(top)) for path in top.glob("b/*.txt")) == ["b/2.txt"]
    assert sorted(str(path.relative_to(top)) for path in top.rglob("*.txt")) == ["1.txt", "b/2.txt", "b/c/3.txt"]
    assert sorted(path.name for path in (top / "b").iterdir()) == ["2.txt", "c"]
    assert [(top / name).is_dir() for name in ("b", "1.txt", "none", "b/c")] == [True, False, False, True]
    assert [(top / name).is_file() for name in ("b", "1.txt", "none")] == [False, True, False]
    assert (top / "b" / "2.txt").stat().st_size == 7
    assert (top / "b" / "2.txt").read_text(encoding="utf-8") == "b/2.txt"
    with (top / "b" / "2.txt").open(encoding="utf-8", newline="") as text:
        assert text.read() == "b/2.txt"
    move_tree(top / "b", top / "moved")
    assert sizes_below(top / "moved") == {"2.txt": 7, "c/3.txt": 9}
    assert not (top / "b").exists()
    remove_tree(top / "moved", first="2.txt")
    remove_tree(top / "none", first="2.txt")
    assert not (top / "moved").exists()
    assert remove_leftovers(top) == 0
    for name in ("absent", "b.zarr/absent"):
        with pytest.raises(FileNotFoundError):
            (top / name).read_bytes()
        with pytest.raises(FileNotFoundError):
            (top / name).unlink(missing_ok=False) if kind == "disk" else (top / name).stat()
        (top / name).unlink(missing_ok=True)


def test_an_object_appears_whole_or_not_at_all(bucket: RemotePath) -> None:
    target = bucket / "a" / "file.bin"
    with durable_file(target) as file:
        file.write(b"abc")
        assert not target.exists()
    with pytest.raises(KeyError), durable_file(target) as file:
        file.write(b"half")
        raise KeyError
    assert target.read_bytes() == b"abc"
    assert sizes_below(bucket) == {"a/file.bin": 3}


def test_an_object_is_exchanged_only_for_what_was_seen(bucket: RemotePath) -> None:
    path = bucket / "one"
    first = path.create(b"1")
    assert first is not None
    assert path.create(b"2") is None
    second = path.exchange(b"3", first)
    assert second is not None
    assert path.exchange(b"4", first) is None
    assert path.read_version() == (b"3", second)
    assert (bucket / "none").exchange(b"5", second) is None
    assert (bucket / "none").read_version() is None
    with pytest.raises(OSError, match="changed meanwhile"):
        path.read_range(0, 1, first)
    assert path.read_range(0, 1, second) == b"3"


def test_a_server_that_does_not_keep_to_conditions_is_refused(
    bucket: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore

    check_rights(bucket / "out")
    assert sizes_below(bucket) == {}
    put = obstore.put
    monkeypatch.setattr(obstore, "put", lambda client, key, data, **how: put(client, key, data))
    with pytest.raises(UsageError, match="does not keep to conditions"):
        check_rights(bucket / "out")
    assert sizes_below(bucket) == {}


@pytest.mark.parametrize(
    ("told", "error", "says"),
    [
        ("<Code>NoSuchBucket</Code>", UsageError, "there is no bucket 'bucket'"),
        ("403 Forbidden: <Code>SlowDown</Code><AWSAccessKeyId>AKIA1</AWSAccessKeyId>", PermissionError, "SlowDown"),
        ("non-2xx status code: 503 Service Unavailable: AKIA1", OSError, "the server says 503 Service Unavailable"),
        ("HTTP error: error sending request\n\nDebug source: AKIA1", OSError, "no connection: check the network"),
        ("GET http://169.254.169.254/latest/api/token: 403 Forbidden", PermissionError, "no keys.*AWS_ACCESS_KEY_ID"),
        ("Received redirect without LOCATION", OSError, "set AWS_REGION"),
    ],
)
def test_errors_say_what_the_server_said_without_keys(told: str, error: type[Exception], says: str) -> None:
    from obstore.exceptions import GenericError

    with pytest.raises(error, match=says) as raised:
        with explained("s3://bucket/a"):
            raise GenericError(told)
    assert "AKIA1" not in str(raised.value)


def test_without_the_library_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UsageError, match=r"pip install 'pathopipe\[s3\]'"):
        location("s3://bucket/a").exists()


# ---- claims


@pytest.mark.parametrize("silent_s", [30, 200])
def test_on_another_machine_signs_of_life_decide(
    bucket: RemotePath, silent_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = bucket / "slides" / ".a.claim"
    with Claims(bucket) as first:
        first.take("a").check()
        text = claim.read_text()
        claim.write_text(text.replace('"machine": "', '"machine": "node7 '))
        found = RemotePath.found

        def looked(path: RemotePath, **how: Any) -> Any:
            seen = found(path, **how)
            if path == claim and seen is not None:
                return type(seen)(seen.size, seen.modified_s - silent_s, seen.version)
            return seen

        monkeypatch.setattr(RemotePath, "found", looked)
        if silent_s > 90:
            with claimed(bucket, "a") as other:
                other.check()
        else:
            with pytest.raises(StoreBusyError, match=r"a: another run is writing it \(process .*sign of life 30 s ago"):
                with claimed(bucket, "a"):
                    pass


def test_a_sign_of_life_in_between_saves_the_claim(bucket: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = bucket / "slides" / ".a.claim"
    with Claims(bucket) as holder:
        holder.take("a")
        claim.write_text(claim.read_text().replace('"machine": "', '"machine": "node7 '))
        exchange = RemotePath.exchange

        def late(path: RemotePath, data: bytes, version: Version) -> Version | None:
            monkeypatch.undo()
            holder._places["a"].beat(holder._held["a"].token)  # after the other one has looked
            return exchange(path, data, version)

        monkeypatch.setattr(RemotePath, "exchange", late)
        with pytest.raises(StoreBusyError, match="sign of life 0 s ago"):
            with Claims(bucket, dead_after_s=-1.0) as rival:
                rival._dead_after_s = -1.0
                calls = rival._take_over(holder._places["a"].__class__(claim), "a", "other", "a: busy")
                assert calls is False
                rival._dead_after_s = 90.0
                rival.take("a")
        holder._held["a"].check()


def test_who_was_taken_over_learns_it_and_leaves_the_new_holder_alone(bucket: RemotePath) -> None:
    claim = bucket / "slides" / ".a.claim"
    with Claims(bucket) as claims:
        held = claims.take("a")
        claim.write_text(claim.read_text().replace(held.token, "other"))
        with pytest.raises(StoreBusyError, match="a: taken over by process"):
            held.check()
        before = claim.read_version()
        claims._places["a"].beat(held.token)
        assert claim.read_version() == before
    assert claim.exists()


def test_a_lost_answer_does_not_lock_out_who_asked(bucket: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    create = RemotePath.create

    def answer_lost(path: RemotePath, data: bytes) -> Version | None:
        create(path, data)
        return create(path, data)  # what a client does that got no answer

    monkeypatch.setattr(RemotePath, "create", answer_lost)
    with claimed(bucket, "a") as claim:
        claim.check()


def test_one_writer_holds_a_claim_where_there_are_no_locks(bucket: RemotePath, tmp_path: Path) -> None:
    for lock in (bucket / ".lock", tmp_path / ".lock"):
        with one_writer(lock, "this"):
            with pytest.raises(StoreBusyError, match="another process is writing this"):
                with one_writer(lock, "this"):
                    raise AssertionError("held twice")
        with one_writer(lock, "this"):
            pass
    assert sizes_below(bucket) == {}
    with one_writer(tmp_path / ".lock", "this"), pytest.raises(StoreBusyError):
        with one_at_a_time(tmp_path / ".lock", "this"):
            pass


def test_a_bucket_that_refuses_is_an_error_of_writing(bucket: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: RemotePath, data: bytes) -> Version | None:
        raise PermissionError(13, "the server says AccessDenied", str(path))

    monkeypatch.setattr(RemotePath, "create", refused)
    with pytest.raises(StoreWriteError, match="can't be written .*AccessDenied"):
        with claimed(bucket, "a"):
            pass


# ---- commands


def test_a_manifest_may_mix_files_and_urls(bucket: RemotePath, tmp_path: Path) -> None:
    (bucket / "in" / "a.svs").write_bytes(b"x")
    (tmp_path / "b.svs").write_bytes(b"x")
    table = tmp_path / "m.csv"
    table.write_text(f"slide_id,path\na,{bucket}/in/a.svs\nb,b.svs\nc,{bucket}/in/c.svs\nd,ftp://x/y.svs\n")
    with pytest.raises(
        UsageError, match=r"(?s)row 4: .*c.svs' can't be found \(no such object\).*row 5: .*no such kind"
    ):
        read_manifest(table)
    table.write_text(f"slide_id,path\na,{bucket}/in/a.svs\nb,b.svs\n")
    refs = read_manifest(table)
    assert [ref.path for ref in refs] == [bucket / "in" / "a.svs", tmp_path / "b.svs"]
    assert isinstance(refs[0].path, RemotePath)
    # Both the table and what it names may lie in a bucket.
    (bucket / "m.csv").write_text("slide_id,path\na,in/a.svs\n")
    assert [ref.path for ref in read_manifest(bucket / "m.csv")] == [bucket / "in" / "a.svs"]


def test_commands_that_want_local_paths_refuse_urls(
    tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ("mil", "evaluate", "--model", "x", "--out", "s3://bucket/o"),
        ("synth", "s3://bucket/a.tiff"),
        ("verify", "memory://bucket/x", "--phi"),
    ):
        refused = cli(*arguments)
        assert refused.code == 2, arguments
        assert len(refused.err.splitlines()) == 1, refused.err
    unknown = cli("run", "a.svs", "--out", "ftp://host/o")
    assert unknown.code == 2
    assert "no such kind of place; s3://" in unknown.err
    assert list(tmp_path.iterdir()) == []
