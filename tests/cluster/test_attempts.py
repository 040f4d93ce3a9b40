"""Work for slide after slide: who fails is told, who is busy comes last, a full disk ends it."""

from pathlib import Path

import pytest

from pathopipe.cluster import attempt_each, attempts
from pathopipe.errors import SlideOpenError, StoreBusyError, StoreWriteError
from pathopipe.records import SlideRef

REFS = [SlideRef(name, Path(f"{name}.tiff")) for name in "abcd"]


def test_a_slide_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    def work(ref: SlideRef) -> str:
        if ref.slide_id == "b":
            raise SlideOpenError("b: no slide")
        if ref.slide_id == "c":
            raise ZeroDivisionError("a bug")
        return ref.slide_id.upper()

    ended = list(attempt_each(REFS, tmp_path, work))
    assert [each.ref for each in ended] == REFS
    assert [each.result for each in ended] == ["A", None, None, "D"]
    assert [each.reason for each in ended[:2]] == ["", "b: no slide"]
    log = tmp_path / "logs" / "c.txt"
    assert ended[2].reason == f"c: unexpected ZeroDivisionError (a bug); the traceback is in {log}"
    assert 'raise ZeroDivisionError("a bug")' in log.read_text()


def test_a_slide_that_another_process_writes_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_ASKS_AGAIN_S", 0.0)
    tried: list[str] = []
    notes: list[str] = []

    def work(ref: SlideRef) -> None:
        tried.append(ref.slide_id)
        if ref.slide_id in "ab" and tried.count(ref.slide_id) < 3:
            raise StoreBusyError(f"another process is writing {ref.slide_id}; wait for it, then run again")

    ended = list(attempt_each(REFS, tmp_path, work, notes.append))
    assert tried == [*"abcd", *"ab", *"ab"]
    assert [(each.ref.slide_id, each.reason) for each in ended] == [(name, "") for name in "cdab"]
    assert notes == ["put off: another process is writing a", "put off: another process is writing b"]


def test_a_disk_that_takes_nothing_more_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(ref: SlideRef) -> None:
        raise StoreWriteError(f"{ref.slide_id}: no space left")

    started = iter(attempt_each(REFS, tmp_path, work))
    assert next(started).reason == "a: no space left"  # the folder takes files: it was this slide alone
    with pytest.raises(StoreWriteError, match="can't be written"):
        list(attempt_each(REFS, Path("/proc/nowhere"), work))
