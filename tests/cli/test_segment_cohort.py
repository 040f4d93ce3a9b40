"""``pathopipe segment`` on several slides: one model, one line a slide, and a slide that fails stops no other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pathopipe.pipeline import segment as stage
from pathopipe.store import SlideStore, store_path
from pathopipe.synth import SynthSpec, write_slide

Cli = Callable[..., Any]
CLASSICAL = ("--model", "classical", "--tasks", "nuclei", "--threads", 2)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for name, seed in (("one", 3), ("two", 4)):
        spec = SynthSpec(width_px=900, height_px=800, mpp=0.25, seed=seed, pen=False, dust=False)
        write_slide(folder / f"{name}.tiff", spec)
    (folder / "torn.tiff").write_bytes((folder / "one.tiff").read_bytes()[:3000])
    return folder


def n_nuclei(out: Path, slide_id: str) -> int:
    return len(SlideStore.open(store_path(out, slide_id)).objects("nuclei"))


def test_a_folder_with_a_torn_slide(slides: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    open_finder = stage.open_finder
    monkeypatch.setattr(stage, "open_finder", lambda plan: opened.append(plan) or open_finder(plan))
    ended = cli("segment", slides, "--out", tmp_path, *CLASSICAL)
    assert (ended.code, len(opened)) == (1, 1)
    lines = ended.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["[1/3] one", "[2/3] torn", "[3/3] two"]
    assert "FAILED" in lines[1]
    header, *rows = [line.split() for line in ended.out.splitlines()[:4]]
    assert header == ["slide", "status", "tissue", "mm2", "nuclei", "seconds", "flags"]
    assert [row[:2] for row in rows] == [["one", "done"], ["torn", "failed"], ["two", "done"]]
    assert [int(rows[0][3]), int(rows[2][3])] == [n_nuclei(tmp_path, "one"), n_nuclei(tmp_path, "two")]
    assert f"2 of 3 slides done; results in {tmp_path}" in ended.out
    assert ended.out.splitlines()[-1].startswith("failed: torn.tiff: the file was cut short")
    for name in ("one", "two"):
        features = json.loads((tmp_path / "geojson" / f"{name}.nuclei.geojson").read_text())["features"]
        assert len(features) == n_nuclei(tmp_path, name) > 20
    again = cli("segment", slides, "--out", tmp_path, *CLASSICAL)
    assert (again.code, again.err.count("was done already")) == (1, 2)


def test_a_manifest_names_slides_and_their_resolution(slides: Path, tmp_path: Path, cli: Cli) -> None:
    manifest = slides / "cohort.csv"
    manifest.write_text("slide_id,path,mpp\nfirst,one.tiff,0.25\nsecond,two.tiff,0.2501\n")
    ended = cli("segment", manifest, "--out", tmp_path, *CLASSICAL, "--no-geojson")
    assert (ended.code, "2 of 2 slides done" in ended.out) == (0, True)
    assert not (tmp_path / "geojson" / "first.nuclei.geojson").exists()
    assert SlideStore.open(store_path(tmp_path, "second")).slide["mpp"] == [0.2501, 0.2501]


def test_wrong_use_stops_before_the_first_slide(slides: Path, tmp_path: Path, cli: Cli) -> None:
    both = (slides / "one.tiff", slides / "two.tiff")
    named = cli("segment", *both, "--out", tmp_path / "a", "--slide-id", "x", *CLASSICAL)
    assert (named.code, "--slide-id names one slide" in named.err) == (2, True)
    told = cli("segment", *both, "--out", tmp_path / "a", "--receipt", tmp_path / "a/done/segment/x.json", *CLASSICAL)
    assert (told.code, "--receipt tells of one slide" in told.err) == (2, True)
    unknown = cli("segment", *both, "--out", tmp_path / "a", "--model", "classical", "--tasks", "glands")
    assert (unknown.code, "does not find 'glands'" in unknown.err) == (2, True)
    missing = cli("segment", *both, slides / "three.tiff", "--out", tmp_path / "a", *CLASSICAL)
    assert (missing.code, "three.tiff: no such file" in missing.err) == (2, True)
    assert not (tmp_path / "a" / "slides").exists()
