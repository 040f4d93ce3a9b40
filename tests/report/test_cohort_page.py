"""The cohort page: what it says of sound, damaged and half-written stores, what it hides, and how a browser runs it."""

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pathopipe.cohort.receipts import Receipt, write_receipt
from pathopipe.errors import UsageError
from pathopipe.metadata.predict import Prediction, write_csv
from pathopipe.metadata.review import Contradiction, Evidence, write_review
from pathopipe.mil.evaluate import figures
from pathopipe.pipeline import RunPlan, run_slide
from pathopipe.records import SlideRef
from pathopipe.report.cohort import Report, read_colour, write_report
from pathopipe.report.cohort_words import hide_places
from pathopipe.report.summary import update_summary
from pathopipe.store import SlideStore, store_path

GRID = "256px-0.5um"


class Reader(HTMLParser):
    """Tags, attributes and text of a page, and what stands in its scripts and style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self._now = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._now = tag
        if tag in self.inside:
            self.inside[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._now = ""

    def handle_data(self, data: str) -> None:
        if self._now in self.inside:
            self.inside[self._now][-1] += data
        else:
            self.text += data

    def slides(self) -> dict[str, dict[str, Any]]:
        """What the script of the page knows of each slide."""
        return {slide["id"]: slide for slide in json.loads(self.inside["script"][0])["slides"]}


def row_of(slide_id: str, status: str = "done", reason: str = "") -> dict[str, object]:
    return {
        **{"slide_id": slide_id, "status": status, "reason": reason, "tissue_mm2": 0.5, "tiles": 20, "bad_tiles": 0},
        **{"mpp": "0.5", "flags": "", "seconds": "3.2"},
    }


def page_of(folder: Path, **options: Any) -> tuple[Reader, Report]:
    found = write_report(folder, folder / "page.html", **options)
    text = (folder / "page.html").read_text(encoding="utf-8")
    assert len(text.encode()) == found.page_bytes
    return Reader(text), found


@pytest.fixture(scope="module")
def one_run(drawn_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one drawn slide."""
    out = tmp_path_factory.mktemp("run")
    outcome = run_slide(SlideRef("drawn", drawn_slide), RunPlan(out=out))
    update_summary(out / "summary.csv", [row_of("drawn") | {"tiles": outcome.tiles}])
    return out


@pytest.fixture
def out(one_run: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(one_run, tmp_path / "out"))


def another(out: Path, slide_id: str) -> SlideStore:
    """A further slide in the folder: the first one under another name."""
    shutil.copytree(store_path(out, "drawn"), store_path(out, slide_id))
    shutil.copy(out / "thumbnails" / "drawn.png", out / "thumbnails" / f"{slide_id}.png")
    return SlideStore(store_path(out, slide_id))


# ---- what it says


def test_a_run_is_told_as_it_was(out: Path) -> None:
    page, found = page_of(out)
    store = SlideStore.open(store_path(out, "drawn"))
    tissue, rows = store.read_tissue(), store.embeddings(GRID, "handcrafted")
    slide = page.slides()["drawn"]
    assert (found.slides, dict(found.statuses), found.failures, dict(found.outliers)) == (1, {"done": 1}, (), {})
    assert slide["status"] == "done" and slide["tiles"] == len(store.read_grid(GRID))
    assert slide["tissue"] == pytest.approx(sum(tissue.areas_mm2), rel=1e-3)
    assert slide["regions"] == len(tissue.polygons) and slide.get("flags", []) == list(tissue.flags)
    assert slide["encoders"] == [["handcrafted", GRID, rows.n_chunks, rows.n_chunks]]
    names = rows.attributes["feature_names"]
    assert slide["focus"] == pytest.approx(rows.read_values()[:, names.index("focus_log")].mean(), rel=1e-3)
    median = np.median(rows.read_values(), axis=0)
    # The thumbnail's pixels are means of the tile's, so their density is about, not exactly, that of the tiles.
    assert slide["haematoxylin"] == pytest.approx(median[names.index("od_haematoxylin_p50")], abs=0.06)
    assert slide["eosin"] == pytest.approx(median[names.index("od_eosin_p50")], abs=0.06)
    assert dict(slide["times"]).keys() <= {"model", "waiting", "write"}
    assert (
        "1 slide: 1 done." in page.text and "Outliers are looked for among 8 slides or more; here are 1." in page.text
    )
    width, height, webp = slide["picture"]
    shown = cv2.imdecode(np.frombuffer(base64.b64decode(webp), np.uint8), cv2.IMREAD_COLOR)
    assert shown.shape == (height, width, 3) and max(width, height) == 320
    whole = cv2.resize(cv2.imread(str(out / "thumbnails" / "drawn.png")), (width, height), interpolation=cv2.INTER_AREA)
    assert np.abs(shown.astype(int) - whole).mean() < 8


def test_the_same_folder_gives_the_same_bytes(out: Path, tmp_path: Path) -> None:
    for number in range(4):
        another(out, f"s{number}")
    write_report(out, tmp_path / "a.html")
    elsewhere = shutil.copytree(out, tmp_path / "elsewhere")
    write_report(elsewhere, tmp_path / "b.html", threads=3)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_report_changes_nothing_but_its_file(out: Path) -> None:
    another(out, "half").write_attributes(f"embeddings/{GRID}/handcrafted", {"inputs": {}, "complete": False})

    def everything() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "page.html"}

    before = everything()
    page_of(out)
    assert everything() == before


def test_what_is_wrong_with_a_slide_is_told_and_the_others_go_on(out: Path) -> None:
    rows = f"embeddings/{GRID}/handcrafted"
    # Damaged: a flipped byte, no JSON, no store at all, an array gone.
    chunk = another(out, "flipped").path / rows / "values/c/0/0"
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    (another(out, "nojson").path / "zarr.json").write_text("{")
    (out / "slides" / "empty.zarr").mkdir()
    shutil.rmtree(another(out, "noarray").path / rows / "values")
    # Being written, or killed: no tissue yet, tissue without its attributes, chunks missing.
    begun = another(out, "begun")
    for name in ("tissue", "tiles", "embeddings"):
        shutil.rmtree(begun.path / name)
    tissue = another(out, "tissue")
    tissue.write_attributes("tissue", {})
    shutil.rmtree(tissue.path / "tiles")
    half = another(out, "half")
    half.write_attributes(rows, {**half.attributes(rows), "complete": False})
    (half.path / rows / "values/c/0/0").rename(half.path / rows / "values/c/0/.0.partial")
    # Failed, gone, and never run.
    update_summary(
        out / "summary.csv",
        [
            row_of("bad1", "failed", "bad1: tile (3, 4) can't be read"),
            row_of("bad2", "failed", "bad2: tile (5, 14) can't be read"),
            row_of("bad3", "failed", f"{out}/slides/bad3.zarr: can't be written; /home/jane/scans/bad3.svs is open"),
            row_of("gone"),
        ],
    )
    manifest = out / "cohort.csv"
    manifest.write_text("slide_id,path\ndrawn,a.svs\nlater,b.svs\n")
    page, found = page_of(out, labels=read_colour(manifest, None))
    slides = page.slides()
    assert {name: slide["status"] for name, slide in slides.items()} == {
        **{"drawn": "done", "flipped": "damaged", "nojson": "damaged", "empty": "damaged", "noarray": "damaged"},
        **{"begun": "unfinished", "tissue": "unfinished", "half": "unfinished", "gone": "damaged", "later": "missing"},
        **{"bad1": "failed", "bad2": "failed", "bad3": "failed"},
    }
    assert "can't be read (ValueError)" in slides["flipped"]["reason"]
    assert "not valid JSON" in slides["nojson"]["reason"]
    assert "no pathopipe store" in slides["empty"]["reason"] or "not a pathopipe store" in slides["empty"]["reason"]
    assert f"{rows}/values is missing" in slides["noarray"]["reason"]
    assert slides["begun"]["reason"] == "tissue is not found yet; no tiles yet"
    assert slides["half"]["reason"] == f"{rows} has 0 of 1 chunks"
    assert slides["half"]["encoders"] == [["handcrafted", GRID, 0, 1]] and "focus" not in slides["half"]
    assert slides["gone"]["reason"] == "its store is gone" and slides["later"]["reason"] == "not run yet"
    assert slides["bad3"]["reason"] == "slides/bad3.zarr: can't be written; bad3.svs is open"
    # A damaged part hides none of the others.
    assert slides["flipped"]["tiles"] == slides["drawn"]["tiles"] and "picture" in slides["flipped"]
    assert ("failed", "tile (3, 4) can't be read", ("bad1", "bad2")) in found.failures
    assert "3 slides failed" in page.text and "5 slides can't be read whole" in page.text
    assert "3 slides not finished: killed, or being written now" in page.text and "1 slide not run yet" in page.text


def test_receipts_of_a_workflow_tell_failures(out: Path) -> None:
    done = out / "done"
    write_receipt(
        done / "tissue" / "lost.json",
        Receipt(slide_id="lost", stage="tissue", status="failed", reason="/x/lost.svs: no reader opens this file"),
    )
    write_receipt(done / "tiles" / "lost.json", Receipt(slide_id="lost", stage="tiles", status="passed-over"))
    write_receipt(done / "tissue" / "drawn.json", Receipt(slide_id="drawn", stage="tissue", status="ok"))
    (done / "embed").mkdir()
    (done / "embed" / "torn.json").write_text("{")
    slides = page_of(out)[0].slides()
    assert {name: slide["status"] for name, slide in slides.items()} == {
        **{"drawn": "done", "lost": "failed", "torn": "failed"}
    }
    assert slides["lost"]["reason"] == "tissue: lost.svs: no reader opens this file"


def test_a_slide_without_tissue_is_done(out: Path) -> None:
    bare = another(out, "bare")
    grid, attributes = bare.read_grid(GRID), bare.attributes("tissue")
    bare.write_attributes("tissue", {**attributes, "areas_mm2": [], "flags": ["no-tissue"]})
    inputs = bare.inputs(f"tiles/{GRID}")
    assert inputs is not None
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(bare.path / "embeddings")
    empty = type(grid)(
        **{name: getattr(grid, name) for name in type(grid).__slots__}
        | {"xy_l0": grid.xy_l0[:0], "tissue_fraction": grid.tissue_fraction[:0]}
    )
    bare.write_grid(empty, inputs)
    rows = bare.create_embeddings(
        GRID, "handcrafted", rows=0, features=3, dtype="float32", chunk_rows=256, about={"inputs": {}}
    )
    rows.finish(bad_tiles=0)
    slide = page_of(out)[0].slides()["bare"]
    assert slide["status"] == "done" and slide["tiles"] == 0 and slide["tissue"] == 0 and "focus" not in slide


# ---- labels, models


def test_labels_colour_and_private_columns_are_refused(out: Path) -> None:
    another(out, "second")
    manifest = out / "cohort.csv"
    manifest.write_text("slide_id;patient_id;site;grade\ndrawn;p1;north;G1\nsecond;p2;;G2\n", encoding="utf-16")
    page, _ = page_of(out, labels=read_colour(manifest, None))
    assert page.slides()["drawn"]["group"] == "north" and "group" not in page.slides()["second"]
    assert "north (1)" in page.text and "not stated (1)" in page.text and "p1" not in page.text
    page, _ = page_of(out, labels=read_colour(manifest, "grade"))
    assert page.slides()["second"]["group"] == "G2"
    for column, message in (("patient_id", "not shown"), ("path", "not shown"), ("grad", "did you mean 'grade'")):
        with pytest.raises(UsageError, match=message):
            read_colour(manifest, column)
    manifest.write_text("slide_id\na\na\n../b\n")
    with pytest.raises(UsageError, match="2 problems"):
        read_colour(manifest, None)


def test_models_are_shown_where_their_results_are(out: Path) -> None:
    store = another(out, "second")
    about = {
        "seen": "test",
        "targets": [
            {"name": "outcome", "kind": "binary", "classes": ["normal", "tumour"]},
            {"name": "marks", "kind": "multilabel", "classes": ["a", "b", "c"]},
            {"name": "risk", "kind": "survival_cox", "classes": []},
        ],
        "probabilities": {"outcome": [0.1, 0.9], "marks": [0.7, 0.2, 0.6], "risk": [1.25]},
    }
    store.write_predictions("outcome.abmil", np.zeros(2, np.float32), None, grid=GRID, about=about)
    truth, scores = np.array([0, 0, 1, 1, 0, 1]), np.array([0.1, 0.4, 0.35, 0.8, 0.2, 0.9])
    table = figures("binary", truth, scores, [f"p{n}" for n in range(6)], classes=("normal", "tumour"), draws=20)
    auroc = 8 / 9  # of nine pairs of a positive and a negative one is the wrong way round
    record = {"patients": 6, "bags": 6, "notes": [], "figures": table.rows()}
    training = {"target": "outcome", "models": {"net abmil": record}, "says": ["trained in /home/jane/models"]}
    (out / "training" / "deep").mkdir(parents=True)
    (out / "training" / "results.json").write_text(json.dumps([training]))
    evaluation = [{"model": "abmil", "target": "outcome", **row} for row in table.rows()]
    (out / "training" / "deep" / "figures.json").write_text(json.dumps({"figures": evaluation, "notes": {}}))
    (out / "training" / "evaluation.json").write_text("[1, 2")
    predicted = Prediction(
        **{"slide_id": "drawn", "task": "organ", "value": "lung", "code": "", "probability": 0.81},
        **{"abstained": True, "model_id": "m", "modalities": "image"},
    )
    write_csv(out / "predicted" / "predictions.csv", [predicted])
    doubt = Contradiction(
        **{"row": 0, "slide_id": "drawn", "patient_id": "JANE", "task": "organ", "recorded": "", "predicted": "=lung"},
        **{"p_recorded": 0.1, "p_predicted": 0.8, "surety": 0.91, "log_odds": 2.0, "abstained": False},
        modalities="image",
    )
    shown = Evidence(tiles=(), words=(), near=(), n_neighbours=0, as_predicted=0, as_recorded=0)
    write_review(out / "review" / "review.csv", [doubt], [shown])
    page, _ = page_of(out)
    slides = page.slides()
    assert slides["second"]["said"] == [
        ["outcome.abmil", "outcome", "tumour", 0.9, ""],
        ["outcome.abmil", "marks", "a, c", None, ""],
        ["outcome.abmil", "risk", "1.25", None, ""],
    ]
    assert slides["drawn"]["said"] == [["metadata", "organ", "lung", 0.81, "the model abstains"]]
    text = re.sub(r"\s+", " ", page.text)
    assert text.count(f"{auroc:.3f}") == 2 and "net abmil" in text and "(training/deep/figures.json)" in text
    assert "trained in [path]" in text and "JANE" not in text
    assert re.search(r"drawn ?organ ?none ?=lung ?0.910", text)
    assert "Could not be read: training/evaluation.json." in text


# ---- what it hides, what it lets run


BAD = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\u2028'\""


def hostile(out: Path) -> Path:
    """A folder with markup in every text that others write."""
    bad_id = "<img src=x onerror=alert(3)>&'\""
    store = another(out, bad_id)
    tissue = store.attributes("tissue")
    store.write_attributes("tissue", {**tissue, "flags": [BAD]})
    root = store.attributes("")
    root["pathopipe"]["slide"]["problems"] = [BAD]
    store.write_attributes("", root)
    about = {"targets": [{"name": BAD, "kind": "binary", "classes": ["a", BAD]}], "probabilities": {BAD: [0.1, 0.9]}}
    store.write_predictions("m", np.zeros(2, np.float32), None, grid=GRID, about=about)
    update_summary(
        out / "summary.csv", [row_of(f"bad{number}", "failed", BAD.replace("\u2028", " ")) for number in (1, 2)]
    )
    (out / "t").mkdir()
    row = {"figure": "auroc", "label": "", "site": "", "value": 0.5, "low": None, "high": None, "patients": BAD}
    (out / "t" / "results.json").write_text(
        json.dumps([{"target": BAD, "models": {BAD: {"figures": [row]}}, "says": [BAD]}])
    )
    manifest = out / "cohort.csv"
    quoted = BAD.replace('"', '""').replace("\u2028", " ")
    manifest.write_text(f'slide_id,"{quoted}"\ndrawn,"{quoted}"\n')
    return manifest


def test_nothing_that_others_wrote_becomes_markup(out: Path) -> None:
    manifest = hostile(out)
    labels = read_colour(manifest, BAD.replace("\u2028", " "))
    page, _ = page_of(out, labels=labels)
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    slide = page.slides()["<img src=x onerror=alert(3)>&'\""]
    assert slide["flags"] == [BAD] and slide["said"][0][1:3] == [BAD, BAD]
    assert slide["notes"] == [hide_places(BAD, folder=out)]
    assert "<" not in page.inside["script"][0]
    assert page.text.count("<img src=x onerror=alert(2)>") >= 6  # shown, as text


def test_only_its_own_script_and_style_may_run(out: Path) -> None:
    page, _ = page_of(out)
    policy = next(value or "" for name, value in page.attributes if value and "default-src" in value)
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))

    def hashed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert allowed == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": hashed(page.inside["style"][0]),
        "script-src": hashed(page.inside["script"][1]),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert not [value for name, value in page.attributes if name in ("src", "href") and not str(value).startswith("#")]
    assert "style" not in {name for name, _ in page.attributes}


def test_nothing_private_is_in_the_page(out: Path, drawn_slide: Path) -> None:
    text = (page_of(out), (out / "page.html").read_text())[1]
    root = SlideStore.open(store_path(out, "drawn")).slide
    for private in (str(out), str(Path.home()), str(drawn_slide.parent), drawn_slide.name, root["fingerprint"]):
        assert private not in text
    assert not re.search(r"\b20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d", text)


# ---- the command


def test_command_writes_the_page_and_says_so(out: Path, cli: Any) -> None:
    update_summary(out / "summary.csv", [row_of("bad", "failed", "bad: no")])
    done = cli("report", out)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == "2 slides: 1 done, 1 failed; 0 outliers"
    assert "failed: no (bad)" in done.out and f"report: {out / 'report.html'} (" in done.out
    found = json.loads(cli("report", out, "--out", out / "deep" / "x.html", "--json").out)
    assert found["statuses"] == {"done": 1, "failed": 1}
    assert found["failures"] == [{"status": "failed", "reason": "no", "slides": ["bad"]}]
    assert found["bytes"] == (out / "deep" / "x.html").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such folder"),
        (["."], "nothing to report"),
        ([".", "--colour", "site"], "--colour names a column of --labels"),
        ([".", "--out", "."], "a folder; name a file"),
        (["out", "--encoder", "handcraftd"], "did you mean 'handcrafted'"),
        (["out", "--labels", "none.csv"], "none.csv"),
    ],
)
def test_wrong_use_is_told(
    out: Path, cli: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(out.parent)
    ended = cli("report", *arguments)
    assert ended.code == 2 and message in ended.err and not (out / "report.html").exists()


# ---- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """A headless Chromium, driven over its debugging pipe; notes every request, error and dialog."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._number, self._session, self._rest = 0, "", b""
        self.heard: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.heard.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._back, 1 << 20)
            assert piece, "the browser has gone"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, path: Path) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=path.as_uri())
        while not any(one.get("method") == "Page.loadEventFired" for one in self.heard):
            self.heard.append(self._read())

    def do(self, script: str) -> Any:
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def methods(self) -> set[str]:
        return {str(one.get("method")) for one in self.heard}


# The browser listens on descriptor 3 and answers on 4.
LAUNCH = """import fcntl, os, sys
ends = [fcntl.fcntl(int(one), fcntl.F_DUPFD, 10) for one in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])"""


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own, which ends with the context."""
    assert CHROMIUM is not None
    to_read, to = os.pipe()
    back, back_write = os.pipe()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
    options += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1200"]
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(to_read), str(back_write), CHROMIUM, *options, "about:blank"],
            pass_fds=(to_read, back_write),
            stdout=log,
            stderr=log,
        )
    os.close(to_read)
    os.close(back_write)
    try:
        yield Browser(to, back)
    finally:
        os.close(to)  # it ends when its pipe does
        process.terminate()
        process.wait(60)
        os.close(back)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here; 'apt-get install chromium' brings one")
    with chromium(tmp_path) as found:
        yield found


@pytest.fixture
def varied(out: Path) -> Path:
    """Forty slides that differ: by area, flags, status, label."""
    for number in range(40):
        store = another(out, f"s{number}")
        attributes = store.attributes("tissue")
        area = 3.0 + (number * 7 % 40) / 40 if number != 11 else 0.001
        flags = ["blur"] if number % 4 == 0 else []
        store.write_attributes("tissue", {**attributes, "areas_mm2": [area], "flags": flags})
    first = SlideStore(store_path(out, "drawn"))
    first.write_attributes("tissue", {**first.attributes("tissue"), "areas_mm2": [3.5], "flags": []})
    update_summary(out / "summary.csv", [row_of(f"bad{n}", "failed", f"bad{n}: tile {n} is broken") for n in (2, 10)])
    manifest = out / "cohort.csv"
    sites = ("north", "south")
    manifest.write_text("slide_id,site\n" + "".join(f"s{n},{sites[n % 2]}\n" for n in range(40)))
    write_report(out, out / "page.html", labels=read_colour(manifest, None))
    return out / "page.html"


SET = """(id, value) => { const one = document.getElementById(id); one.value = value;
one.dispatchEvent(new Event("input", { bubbles: true })); }"""
CARDS = "[...document.querySelectorAll('#cards .card h3')].map((one) => one.textContent)"
ROWS = "[...document.querySelectorAll('#list tbody tr')].map((one) => one.cells[0].textContent)"
COUNT = "document.getElementById('count').textContent"


@pytest.mark.slow
def test_sorting_filtering_and_searching_work_in_a_browser(varied: Path, browser: Browser) -> None:
    browser.open(varied)

    def put(name: str, value: str) -> list[str]:
        browser.do(f"({SET})({name!r}, {value!r})")
        cards: list[str] = browser.do(CARDS)
        return cards

    def reset() -> None:
        browser.do("document.getElementById('reset').click()")

    # The oddest slide comes first, and says why.
    assert browser.do(CARDS)[0] == "s11" and browser.do(COUNT) == "1 to 24 of 43 slides"
    assert "far below the middle" in browser.do("document.querySelector('.card .odd').textContent")
    assert browser.do("document.querySelector('.card img').naturalWidth") > 100
    by_area = sorted((n for n in range(40) if n != 11), key=lambda n: -(n * 7 % 40))
    assert put("sort", "tissue")[:5] == [f"s{n}" for n in by_area[:5]]
    assert put("order", "up")[0] == "s11"
    put("size", "60")
    assert put("sort", "id")[:6] == ["bad2", "bad10", "drawn", "s0", "s1", "s2"]  # s2 before s10
    assert put("order", "down")[0] == "s39"
    reset()
    put("size", "24")
    # Pages.
    browser.do("document.getElementById('next').click()")
    assert browser.do(COUNT) == "25 to 43 of 43 slides" and browser.do("document.getElementById('next').disabled")
    assert len(browser.do(CARDS)) == 19
    # Filters, alone and together.
    assert set(put("flag", "blur")) == {f"s{n}" for n in range(0, 40, 4)}
    assert set(put("search", "s3")) == {"s32", "s36"}
    reset()
    assert set(put("group", "south")) == {f"s{n}" for n in range(1, 40, 2)} and browser.do(COUNT).endswith(
        "(43 in all)"
    )
    reset()
    assert put("flag", "*outlier") == ["s11"]
    reset()
    assert set(put("status", "failed")) == {"bad2", "bad10"}
    assert "tile 2 is broken" in browser.do("document.getElementById('cards').textContent")
    reset()
    assert set(put("search", "TILE broken")) == {"bad2", "bad10"}
    assert put("search", "no such thing") == [] and browser.do(COUNT) == "No slide is like that."
    reset()
    # As a table, sorted by its headers, which say so to screen readers.
    put("view", "list")
    assert browser.do(CARDS) == [] and len(browser.do(ROWS)) == 24
    browser.do("document.querySelector('#list [data-sort=tissue]').click()")
    assert browser.do(ROWS)[0] == f"s{by_area[0]}"
    assert browser.do("document.querySelector('#list [aria-sort]').getAttribute('aria-sort')") == "descending"
    browser.do("document.querySelector('#list [data-sort=tissue]').click()")
    assert browser.do("document.querySelector('#list [aria-sort]').getAttribute('aria-sort')") == "ascending"
    assert browser.do("document.activeElement.dataset.sort") == "tissue"
    put("view", "cards")
    # A dot of a plot, an id in the list of outliers, a colour of the legend, a group of failures.
    dot = browser.do(
        "(() => { const dot = document.querySelector('.plots circle.odd'); "
        "dot.dispatchEvent(new MouseEvent('click', { bubbles: true })); return dot.dataset.i; })()"
    )
    names = list(Reader(varied.read_text()).slides())
    assert browser.do(CARDS) == [names[int(dot)]] == ["s11"]
    assert (
        browser.do("document.querySelectorAll('.plots circle:not(.dim)').length") == 4
    )  # one in each plot; copies make no map
    browser.do("document.querySelector('#failures [data-id=bad10]').click()")
    assert browser.do(CARDS) == ["bad10"]
    browser.do("document.querySelector('#failures [data-status=failed]').click()")
    assert set(browser.do(CARDS)) == {"bad2", "bad10"}
    browser.do("document.querySelector('.legend [data-group=north]').click()")
    assert browser.do(COUNT).startswith("1 to 20 of 20")
    # A key pressed in the search field, as a person would.
    reset()
    browser.do("document.getElementById('search').focus()")
    for letter in "s39":
        browser.call("Input.dispatchKeyEvent", type="char", text=letter)
    assert browser.do(CARDS) == ["s39"]
    # Nothing was fetched but the page itself, nothing complained.
    asked = [
        one["params"]["request"]["url"] for one in browser.heard if one.get("method") == "Network.requestWillBeSent"
    ]
    assert {url[:5] for url in asked} <= {"file:", "data:"} and sum(url.startswith("file:") for url in asked) == 1
    assert not browser.methods() & {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"}


@pytest.mark.slow
def test_hostile_texts_run_nothing_in_a_browser(out: Path, browser: Browser) -> None:
    labels = read_colour(hostile(out), BAD.replace("\u2028", " "))
    write_report(out, out / "page.html", labels=labels)
    browser.open(out / "page.html")
    assert "<img src=x onerror=alert(3)>&'\"" in browser.do(CARDS)
    assert browser.do("document.querySelectorAll('img:not([src^=\"data:image/webp\"])').length") == 0
    browser.do(f"({SET})('view', 'list')")
    assert "<img src=x onerror=alert(3)>&'\"" in browser.do(ROWS)
    assert not browser.methods() & {"Page.javascriptDialogOpening", "Runtime.exceptionThrown"}
    # What slips in after all is stopped by the policy.
    browser.do(
        "(() => { const one = document.createElement('script'); one.textContent = 'window.ran = 1'; "
        "document.body.append(one); "
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran=2\">'); "
        "return new Promise((done) => setTimeout(done, 300)); })()"
    )
    assert browser.do("window.ran") is None
    assert "Log.entryAdded" in browser.methods()


@pytest.mark.slow
def test_it_can_be_used_with_a_keyboard_and_printed(varied: Path, browser: Browser) -> None:
    browser.open(varied)
    # Every control has a name, every picture a text, every plot says what it shows.
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "searchbox", "combobox", "image", "link", "textbox", "img"}
    unnamed = [
        node
        for node in tree
        if not node.get("ignored")
        and node.get("role", {}).get("value") in roles
        and not node.get("name", {}).get("value", "").strip()
    ]
    assert not unnamed
    # Tab reaches the skip link first; Enter on it goes to the slides.
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert browser.do("document.activeElement.getAttribute('href')") == "#slides"
    pdf = base64.b64decode(browser.call("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF") and len(pdf) > 50_000
