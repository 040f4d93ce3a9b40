"""Who gets which task when, what is out at once, and what becomes of the work of workers that die or are unfit."""

import itertools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from distributed import KilledWorker, LocalCluster

from pathopipe.cluster import Place, run_cohort, sharing
from pathopipe.cluster.cohort import Queue
from pathopipe.cluster.fitness import Terms, Unfit, attempt, describe, own_versions, shared_terms
from pathopipe.cluster.sharing import _Shared
from pathopipe.config import load_config
from pathopipe.errors import PathopipeError, TileReadError, UsageError
from pathopipe.pipeline import Pass, Prepared, RunPlan, SlideOutcome
from pathopipe.records import SlideRef
from pathopipe.store.claims import Claims

TERMS = Terms(token="t", versions=own_versions())


@dataclass
class Future:
    key: int
    result_: Any = None
    status: str = "finished"
    error: Exception | None = None

    def add_done_callback(self, tell: Callable[[Any], None]) -> None:
        self.tell = tell

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.result_

    def release(self) -> None: ...


@dataclass
class Client:
    """Stands in for Dask: workers that take tasks in the order in which they came, one step at a time."""

    n_workers: int = 2
    slides: dict[str, int] = field(default_factory=dict)
    """Chunks of each slide."""
    fate: Callable[[str, str, str], Any] = lambda slide_id, what, worker: None
    """What comes instead of a result, by slide, kind of task and worker."""
    status: str = "running"
    line: list[tuple[Future, str, str, Any, Any]] = field(default_factory=list)
    log: list[tuple[str, str]] = field(default_factory=list)
    most_out: int = 0

    def nthreads(self) -> dict[str, int]:
        return {f"w{number}": 1 for number in range(self.n_workers)}

    def submit(self, attempt: Any, terms: Any, work: Any, *arguments: Any, pure: bool, **options: Any) -> Future:
        future = Future(len(self.log) + len(self.line))
        what = work.__name__.strip("_")
        about = arguments[1].ref if what == "finish" else arguments[1]
        self.line.append((future, about.slide_id, what, arguments, options.get("workers")))
        self.most_out = max(self.most_out, len(self.line))
        return future

    def step(self) -> None:
        """A worker ends the task that came first."""
        future, slide_id, what, arguments, chosen = self.line.pop(0)
        worker = (chosen or ("w0",))[0]
        self.log.append((slide_id, what))
        fate = self.fate(slide_id, what, worker)
        if isinstance(fate, KilledWorker | TypeError):
            future.error = fate
        elif isinstance(fate, str):
            future.status = fate
        elif fate is not None:
            future.result_ = fate
        elif what == "begin" and self.slides[slide_id] > arguments[3]:
            chunks = {"e": tuple(range(self.slides[slide_id]))}
            future.result_ = Prepared(about_of(arguments), 1, (Pass("g", 1, 1, chunks),), (), 0.0)
        elif what == "embed":
            future.result_ = {}
        else:
            future.result_ = SlideOutcome(slide_id, "done")
        future.tell(future)


def about_of(arguments: Any) -> SlideRef:
    ref = arguments[1]
    assert isinstance(ref, SlideRef)
    return ref


class Steps:
    """A queue of ended tasks that makes a worker end one when it is asked."""

    def __init__(self, client: Client) -> None:
        self.client, self.ended = client, []  # type: ignore[var-annotated]

    def put(self, future: Future) -> None:
        self.ended.append(future)

    def get(self, timeout: float) -> Future:
        while not self.ended:
            self.client.step()
        return self.ended.pop(0)


def run(client: Client, out: Path, notes: list[str] | None = None) -> list[SlideOutcome]:
    refs = [SlideRef(slide_id, Path(slide_id)) for slide_id in client.slides]
    told = notes.append if notes is not None else (lambda note: None)
    with Claims(out) as claims:
        shared = _Shared(
            client,
            Place(workers=client.n_workers),
            RunPlan(out=out),
            TERMS,
            claims,
            Queue(refs, claims, told),
            lambda slide_id, done, total: None,
            told,
        )
        shared._ended = Steps(client)  # type: ignore[assignment]
        outcomes = list(shared.run())
    assert not list((out / "slides").iterdir())
    return outcomes


@pytest.mark.parametrize(
    ("n_chunks", "n_tasks"),
    [
        (3, 1),  # small: all at once
        (20, 5),  # prepared, embedded in three runs of at most eight chunks, and finished
    ],
)
def test_few_tasks_are_out_and_few_slides_begun_however_long_the_cohort_is(
    n_chunks: int, n_tasks: int, tmp_path: Path
) -> None:
    client = Client(n_workers=4, slides={f"s{number:04}": n_chunks for number in range(500)})
    outcomes = run(client, tmp_path)
    assert {outcome.slide_id for outcome in outcomes} == set(client.slides)
    assert client.most_out <= 6
    # Only the last ones are cut for all workers.
    assert 500 * n_tasks < len(client.log) < 500 * n_tasks + 90
    last = {slide_id: place for place, (slide_id, _) in enumerate(client.log)}
    begun: set[str] = set()
    most_begun = 0
    for place, (slide_id, _) in enumerate(client.log):
        begun.add(slide_id)
        most_begun = max(most_begun, len(begun))
        if place == last[slide_id]:
            begun.remove(slide_id)
    assert most_begun <= 6


def test_small_slides_at_the_end_are_shared_out_too(tmp_path: Path) -> None:
    client = Client(n_workers=4, slides={"last": 3})
    run(client, tmp_path)
    assert client.log == [("last", "begin"), *[("last", "embed")] * 3, ("last", "finish")]
    alone = Client(n_workers=1, slides={"last": 3})
    run(alone, tmp_path)
    assert alone.log == [("last", "begin")]


def test_small_slides_pass_a_giant_one_that_fills_the_cluster_when_they_are_gone(tmp_path: Path) -> None:
    client = Client(n_workers=2, slides={"giant": 800, **{f"small{number}": 2 for number in range(10)}})
    outcomes = run(client, tmp_path)
    assert outcomes[-1].slide_id == "giant"
    ends = [place for place, (slide_id, _) in enumerate(client.log) if slide_id != "giant"]
    runs = [place for place, (slide_id, what) in enumerate(client.log) if (slide_id, what) == ("giant", "embed")]
    assert len(runs) == 100  # eight chunks at most
    # Turn by turn: the small ones are through when a small part of the giant is, and it was never left out.
    assert sum(place < ends[-1] for place in runs) in range(10, 50)
    assert max(after - before for before, after in itertools.pairwise(runs)) <= 4


def test_a_giant_slide_alone_is_cut_for_all_workers(tmp_path: Path) -> None:
    client = Client(n_workers=8, slides={"giant": 64})
    run(client, tmp_path)
    assert Counter(client.log)["giant", "embed"] == 32
    assert client.most_out == 11


def killed(slide_id: str) -> KilledWorker:
    return KilledWorker(slide_id, None, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(("n_chunks", "task"), [(1, "begin"), (2, "embed")])
def test_what_takes_its_workers_with_it_fails_alone(n_chunks: int, task: str, tmp_path: Path) -> None:
    blamed = iter(["innocent"])

    def fate(slide_id: str, what: str, worker: str) -> Any:
        if what != task:
            return None
        # Dask blames whatever stood in line behind.
        return killed(slide_id) if slide_id == "poison" or slide_id == next(blamed, None) else None

    client = Client(slides={"poison": n_chunks, "innocent": n_chunks, "other": n_chunks}, fate=fate)
    outcomes = {outcome.slide_id: outcome for outcome in run(client, tmp_path)}
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "poison": "failed",
        "innocent": "done",
        "other": "done",
    }
    assert "workers died each time they came to it, most often for want of memory" in outcomes["poison"].reason
    assert Counter(client.log)["poison", task] == 2 * n_chunks


def test_an_error_in_one_run_of_chunks_drops_the_rest_of_that_slide(tmp_path: Path) -> None:
    def fate(slide_id: str, what: str, worker: str) -> Any:
        return TileReadError("bad: corrupt") if (slide_id, what) == ("bad", "embed") else None

    client = Client(slides={"bad": 400, "good": 4}, fate=fate)
    outcomes = {outcome.slide_id: outcome for outcome in run(client, tmp_path)}
    assert (outcomes["bad"].status, outcomes["bad"].reason) == ("failed", "bad: corrupt")
    assert outcomes["good"].status == "done"
    assert Counter(client.log)["bad", "embed"] <= 4  # those that were out
    assert ("bad", "finish") not in client.log


def test_a_result_that_can_not_be_sent_fails_its_slide_alone(tmp_path: Path) -> None:
    def fate(slide_id: str, what: str, worker: str) -> Any:
        return TypeError("could not serialize") if (slide_id, what) == ("bad", "begin") else None

    outcomes = {outcome.slide_id: outcome for outcome in run(Client(slides={"bad": 4, "good": 4}, fate=fate), tmp_path)}
    assert {name: outcome.status for name, outcome in outcomes.items()} == {"bad": "failed", "good": "done"}
    assert "unexpected TypeError (could not serialize)" in outcomes["bad"].reason


def test_a_worker_that_is_unfit_gets_no_more_work(tmp_path: Path) -> None:
    seen: list[str] = []

    def fate(slide_id: str, what: str, worker: str) -> Any:
        seen.append(worker)
        return Unfit("w0", "does not see the output folder") if worker == "w0" else None

    notes: list[str] = []
    client = Client(n_workers=2, slides={"a": 2, "b": 2}, fate=fate)
    outcomes = run(client, tmp_path, notes)
    assert {outcome.status for outcome in outcomes} == {"done"}
    assert notes == ["worker w0 does not see the output folder; it gets no work"]
    # What was out when it was found out comes back, too; then it is left out.
    assert set(seen[3:]) == {"w1"}


@pytest.mark.parametrize("status", ["cancelled", "lost"])
def test_a_lost_connection_ends_the_run_in_one_line(tmp_path: Path, status: str) -> None:
    client = Client(slides={"a": 2}, fate=lambda slide_id, what, worker: status if what == "embed" else None)
    with pytest.raises(
        PathopipeError, match="the Dask scheduler .* does not answer any more.*what was finished is kept"
    ):
        run(client, tmp_path)
    client = Client(slides={"a": 2}, status="connecting")
    with pytest.raises(PathopipeError, match="does not answer any more"):
        run(client, tmp_path)


def test_without_workers_it_waits_says_so_and_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]

    def passes(seconds: float = 0.0) -> float:
        now[0] += 30
        return now[0]

    client = Client(slides={"a": 1}, n_workers=0)
    notes: list[str] = []
    monkeypatch.setattr(sharing.time, "monotonic", passes)
    monkeypatch.setattr(Steps, "get", lambda self, timeout: (_ for _ in ()).throw(sharing.queue.Empty()))
    with pytest.raises(PathopipeError, match="there has been no worker for 6.. s; what was finished is kept"):
        run(client, tmp_path, notes)
    assert len(notes) >= 3
    assert all("no worker for" in note for note in notes)


def test_slides_that_another_run_writes_come_last_and_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Claims(tmp_path)
    other.take("a")
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        other.__exit__()

    monkeypatch.setattr(sharing.time, "sleep", sleep)
    monkeypatch.setattr("pathopipe.cluster.cohort._ASKS_AGAIN_S", 0.0)
    notes: list[str] = []
    outcomes = run(Client(slides={"a": 1, "b": 1, "c": 1}), tmp_path, notes)
    assert [outcome.slide_id for outcome in outcomes][-1] == "a"
    assert len(notes) == 1
    assert notes[0].startswith("waiting: a: another run is writing it (process ")
    assert slept


# ---- what a worker must find


def test_another_release_is_refused(tmp_path: Path) -> None:
    versions = (("pathopipe", "9.9"), *own_versions()[1:])
    assert describe(Terms(token="x", versions=versions)).problem == "has pathopipe 0.1.0, this run 9.9"


def test_an_output_folder_or_a_slide_that_a_worker_does_not_see(tmp_path: Path) -> None:
    slide = tmp_path / "s.tiff"
    slide.touch()
    with shared_terms(tmp_path, [SlideRef("s", slide), SlideRef("gone", tmp_path / "gone")]) as terms:
        assert describe(terms).problem is None
        slide.unlink()
        assert "does not see the slide" in (describe(terms).problem or "")
        [sign] = tmp_path.iterdir()
        sign.unlink()
        problem = describe(terms).problem or ""
        assert f"does not see the output folder: {tmp_path} is another folder there" in problem
    assert list(tmp_path.iterdir()) == []
    elsewhere = Terms(token="x", versions=own_versions(), out=tmp_path / "none")
    assert "none is not there; it must be on a disk that all machines share" in (describe(elsewhere).problem or "")


def test_an_error_brings_its_traceback_along() -> None:
    error = attempt(Terms(token="here", versions=own_versions()), lambda: 1 // 0)
    assert isinstance(error, ZeroDivisionError)
    assert "test_sharing.py" in error.__notes__[0]


# ---- a real cluster in this process


@pytest.fixture
def scheduler() -> Any:
    with LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0", protocol="tcp"
    ) as cluster:
        yield cluster.scheduler_address


def test_an_existing_cluster_gives_the_same_bytes(drawn_slide: Path, tmp_path: Path, scheduler: str) -> None:
    refs = [SlideRef(name, drawn_slide) for name in ("a", "b")]
    config = load_config(None, ["embed.chunk_rows=16"])
    run_cohort(refs, RunPlan(out=tmp_path / "here", config=config))
    notes: list[str] = []
    outcomes = run_cohort(
        refs, RunPlan(out=tmp_path / "there", config=config), place=Place(scheduler=scheduler), on_note=notes.append
    )
    assert [outcome.status for outcome in outcomes] == ["done", "done"]
    assert len(notes) == 1 and "has 2 threads, but does one task at a time" in notes[0]
    files = [path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("c/*/0")]
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "there" / file).read_bytes() == (tmp_path / "here" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["geojson", "slides", "thumbnails"]


def test_what_is_wrong_with_the_plan_is_found_before_any_work(
    drawn_slide: Path, tmp_path: Path, scheduler: str
) -> None:
    plan = RunPlan(out=tmp_path / "out", config=load_config(None, ["embed.encoder=timm.test_vti"]))
    with pytest.raises(UsageError, match="test_vti"):
        run_cohort([SlideRef("a", drawn_slide)], plan, place=Place(scheduler=scheduler))
    assert not (tmp_path / "out" / "slides").exists()


def test_a_scheduler_that_is_not_there(tmp_path: Path) -> None:
    for name, message in (
        (str(tmp_path / "scheduler.json"), "no such file; 'dask scheduler --scheduler-file"),
        ("tcp://127.0.0.1:9", "no Dask scheduler answers there"),
    ):
        with pytest.raises(UsageError, match=message):
            run_cohort([], RunPlan(out=tmp_path), place=Place(scheduler=name))


def test_a_scheduler_without_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_FIRST_WORKER_S", 0.3)
    with LocalCluster(n_workers=0, processes=False, dashboard_address=":0", protocol="tcp") as cluster:
        began = time.monotonic()
        with pytest.raises(UsageError, match=r"no worker has come in 0 s; start some with 'dask worker tcp://"):
            run_cohort([], RunPlan(out=tmp_path), place=Place(scheduler=cluster.scheduler_address))
        assert time.monotonic() - began < 30
