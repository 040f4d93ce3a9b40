"""Claims to slides: one holder at a time, dead holders are followed, living ones are named."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pathopipe.errors import StoreBusyError, StoreWriteError
from pathopipe.store import claims as claims_module
from pathopipe.store.claims import Claims, claimed

HOLDER = """
import sys, time
from pathlib import Path
from pathopipe.store.claims import Claims
claims = Claims(Path(sys.argv[1]))
claims.take("a")
print("holds", flush=True)
time.sleep(60)
"""


def claim_file(out: Path) -> Path:
    return out / "slides" / ".a.claim"


def rewrite(out: Path, **changes: Any) -> None:
    """Turn the claim into that of another process."""
    holder = json.loads(claim_file(out).read_text())
    claim_file(out).write_text(json.dumps({**holder, **changes}))


@pytest.fixture
def held_elsewhere(tmp_path: Path) -> Any:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        yield process
        process.kill()


def test_a_slide_is_claimed_and_given_back(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        claims.take("a").check()
        assert claim_file(tmp_path).exists()
        claims.take("b")
        claims.release("a")
        assert not claim_file(tmp_path).exists()
    assert list((tmp_path / "slides").iterdir()) == []


def test_a_living_holder_is_named_and_a_killed_one_is_followed_at_once(
    tmp_path: Path, held_elsewhere: subprocess.Popen[str]
) -> None:
    with pytest.raises(
        StoreBusyError, match=rf"a: another run is writing it \(process {held_elsewhere.pid} on .*since 2"
    ):
        with claimed(tmp_path, "a"):
            pass
    held_elsewhere.kill()
    held_elsewhere.wait()
    with claimed(tmp_path, "a") as claim:
        claim.check()
        assert json.loads(claim_file(tmp_path).read_text())["pid"] == os.getpid()


def test_the_number_of_a_dead_process_may_be_in_use_again(tmp_path: Path) -> None:
    with Claims(tmp_path) as first:
        first.take("a")
        rewrite(tmp_path, started=1.0, token="older")
        with claimed(tmp_path, "a"):
            pass


@pytest.mark.parametrize(("silent_s", "is_dead"), [(30, False), (200, True)])
def test_on_another_machine_signs_of_life_decide(tmp_path: Path, silent_s: float, is_dead: bool) -> None:
    with Claims(tmp_path) as first:
        first.take("a")
        rewrite(tmp_path, host="node7", machine="node7 4711", pid=1, token="other")
        then = time.time() - silent_s
        os.utime(claim_file(tmp_path), (then, then))
        if is_dead:
            with claimed(tmp_path, "a") as claim:
                claim.check()
        else:
            with pytest.raises(StoreBusyError, match=r"process 1 on node7, .*last sign of life (29|30|31) s ago"):
                with claimed(tmp_path, "a"):
                    pass


def test_a_holder_shows_that_it_is_alive(tmp_path: Path) -> None:
    with Claims(tmp_path, beats_every_s=0.02) as claims:
        claims.take("a")
        os.utime(claim_file(tmp_path), (1.0, 1.0))
        deadline = time.monotonic() + 20
        while claim_file(tmp_path).stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert claim_file(tmp_path).stat().st_mtime > time.time() - 60


def test_who_was_taken_over_learns_it_and_leaves_the_new_holder_alone(tmp_path: Path) -> None:
    with Claims(tmp_path, beats_every_s=0.02) as claims:
        claim = claims.take("a")
        rewrite(tmp_path, host="node7", token="other")
        os.utime(claim_file(tmp_path), (1.0, 1.0))
        with pytest.raises(StoreBusyError, match="a: taken over by process .* on node7"):
            claim.check()
        time.sleep(0.1)
        assert claim_file(tmp_path).stat().st_mtime == 1.0
    assert claim_file(tmp_path).exists()


def test_a_claim_that_says_nothing_is_given_time(tmp_path: Path) -> None:
    claim_file(tmp_path).parent.mkdir()
    claim_file(tmp_path).write_bytes(b"")
    with pytest.raises(StoreBusyError, match="a process that has not said its name yet"):
        with claimed(tmp_path, "a"):
            pass
    os.utime(claim_file(tmp_path), (1.0, 1.0))
    with claimed(tmp_path, "a"):
        pass


def test_of_many_that_follow_a_dead_holder_one_gets_the_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The worst moment: all have seen the dead claim before any of them moves it away.
    n_takers = 8
    seen = threading.Barrier(n_takers)
    first_look = threading.local()
    started = claims_module._started

    def look(pid: int) -> float:
        if pid == 999_999 and not getattr(first_look, "done", False):
            first_look.done = True
            seen.wait(timeout=30)
        return started(pid)

    for _ in range(5):
        with Claims(tmp_path) as dead:
            dead.take("a")
            rewrite(tmp_path, pid=999_999, token="dead")
        monkeypatch.setattr(claims_module, "_started", look)
        won: list[Claims] = []

        def take(winners: list[Claims] = won) -> None:
            first_look.done = False
            claims = Claims(tmp_path)
            try:
                claims.take("a")
            except StoreBusyError:
                return
            winners.append(claims)

        threads = [threading.Thread(target=take) for _ in range(n_takers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monkeypatch.undo()
        assert len(won) == 1
        won[0].__exit__()
        assert list((tmp_path / "slides").iterdir()) == []


def test_a_folder_that_takes_no_files_is_an_error_of_writing(tmp_path: Path) -> None:
    (tmp_path / "slides").write_text("a file")
    with pytest.raises(StoreWriteError, match="can't be written"):
        with claimed(tmp_path, "a"):
            pass
