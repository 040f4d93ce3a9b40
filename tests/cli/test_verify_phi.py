"""``pathopipe verify --phi``: nothing in what pathopipe writes, exit code 1 and masked findings where something is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr

from pathopipe.synth import SynthSpec, write_slide

Cli = Callable[..., Any]


def test_all_that_a_run_and_its_exports_write_is_clean(cli: Cli, tmp_path: Path) -> None:
    slide, out = tmp_path / "S12-12345.tiff", tmp_path / "out"
    write_slide(slide, SynthSpec(width_px=700, height_px=500, mpp=0.5, seed=11))
    store = out / "slides" / "S12-12345.zarr"
    for command in (
        ("run", slide, "--out", out, "--workers", 1),
        ("segment", slide, "--out", out, "--geojson"),
        ("export", "parquet", store, "--out", out / "parquet"),
        ("export", "anndata", store, "--out", out / "anndata"),
        ("export", "h5", out, "--out", out / "h5", "--layout", "clam"),
        ("export", "pt", out, "--out", out / "pt", "--layout", "clam"),
        ("report", out),
    ):
        done = cli(*command)
        assert done.code == 0, done.err
    done = cli("verify", out, "--phi")
    assert done.code == 0, done.out
    assert "nothing private found" in done.out
    # The user called the slide so; it is told, and no more.
    assert "note: " in done.out and "private: " not in done.out
    assert {path.suffix for path in out.rglob("*.*")} >= {
        ".geojson",
        ".parquet",
        ".h5ad",
        ".h5",
        ".pt",
        ".png",
        ".csv",
        ".html",
    }


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    zarr.create_group(tmp_path / "slides" / "a.zarr", attributes={"Date": "2019-03-04", "b": "SMITHSON^JOHN"})
    (tmp_path / "summary.csv").write_text("slide_id,status,reason\na,failed,/home/jdoe/a.svs is missing\n")
    return tmp_path


def test_findings_are_masked_and_end_with_1(cli: Cli, planted: Path) -> None:
    done = cli("verify", planted, "--phi")
    assert done.code == 1
    lines = done.out.splitlines()
    assert lines[:3] == [
        "private: slides/a.zarr/zarr.json: date ####-##-## at line 3",
        "private: slides/a.zarr/zarr.json: person xxxxxxxx^xxxx at line 4",
        "private: summary.csv: home /home/xxxx at line 2",
    ]
    assert lines[-1].endswith(": 3 private findings")
    assert "SMITHSON" not in done.out and "2019" not in done.out and "jdoe" not in done.out


def test_json_is_one_document(cli: Cli, planted: Path) -> None:
    done = cli("verify", planted, "--phi", "--json")
    assert done.code == 1
    document = json.loads(done.out)
    assert document["clean"] is False and document["files"] == 2
    assert document["findings"][0] == {
        "file": "slides/a.zarr/zarr.json",
        "kind": "date",
        "severity": "private",
        "excerpts": ["####-##-##"],
        "places": ["line 3"],
        "count": 1,
    }


def test_one_store_or_one_file_can_be_searched(cli: Cli, planted: Path) -> None:
    assert cli("verify", planted / "slides" / "a.zarr", "--phi").code == 1
    assert cli("verify", planted / "summary.csv", "--phi").code == 1


def test_nothing_there_is_wrong_use(cli: Cli, tmp_path: Path) -> None:
    done = cli("verify", tmp_path / "missing", "--phi")
    assert done.code == 2 and "no such file or folder" in done.err
