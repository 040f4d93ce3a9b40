"""The commands as a user types them: what they print, where it goes, how they end."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr

import pathopipe

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def results(drawn_slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "pathopipe", "run", str(drawn_slide), "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return out


def test_run_says_what_it_did_and_does_it_once(cli: Cli, drawn_slide: Path, tmp_path: Path) -> None:
    first = cli("run", drawn_slide, "--out", tmp_path)
    assert first.code == 0
    assert "1 of 1 slides done" in first.out
    assert "[1/1] drawn: done in" in first.err
    assert "tiles" in first.err
    again = cli("run", drawn_slide, "--out", tmp_path)
    assert again.code == 0
    assert "drawn: was done already" in again.err
    with (tmp_path / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["slide_id"], row["status"]) for row in rows] == [("drawn", "done")]
    assert (tmp_path / "thumbnails" / "drawn.png").exists()
    assert (tmp_path / "geojson" / "drawn.tissue.geojson").exists()


def test_run_on_a_folder_and_a_manifest(cli: Cli, drawn_slide: Path, tmp_path: Path) -> None:
    folder = cli("run", drawn_slide.parent, "--out", tmp_path / "a")
    assert (folder.code, "1 of 1 slides done" in folder.out) == (0, True)
    manifest = tmp_path / "cohort.csv"
    manifest.write_text(f"slide_id,path,mpp,patient_id\npatient 7 µ,{drawn_slide},0.4,p7\n", encoding="utf-8")
    named = cli("run", manifest, "--out", tmp_path / "b")
    assert named.code == 0, named.err
    about = zarr.open_group(tmp_path / "b" / "slides" / "patient 7 µ.zarr", mode="r").attrs["pathopipe"]
    assert about["slide"]["mpp"] == [0.4, 0.4]
    assert about["slide"]["mpp_evidence"][0]["source"] == "manifest"


def test_a_failed_slide_is_named_and_the_exit_code_tells(cli: Cli, drawn_slide: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.svs").touch()
    ended = cli("run", tmp_path / "empty.svs", drawn_slide, "--out", tmp_path / "out")
    assert ended.code == 1
    assert "1 of 2 slides done" in ended.out
    assert "failed: empty.svs" in ended.out
    assert "drawn: done" in ended.err
    with (tmp_path / "out" / "summary.csv").open() as file:
        assert {row["slide_id"]: row["status"] for row in csv.DictReader(file)} == {"empty": "failed", "drawn": "done"}


def test_the_summary_keeps_slides_of_earlier_runs(cli: Cli, drawn_slide: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.svs").touch()
    cli("run", tmp_path / "empty.svs", "--out", tmp_path / "out")
    cli("run", drawn_slide, "--out", tmp_path / "out")
    with (tmp_path / "out" / "summary.csv").open() as file:
        assert [row["slide_id"] for row in csv.DictReader(file)] == ["empty", "drawn"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "absent.svs", "--out", "OUT"], "absent.svs: no such file"),
        (["run", "EMPTY_FOLDER", "--out", "OUT"], "no slide in this folder"),
        (["run", "SLIDE"], "Missing option"),
        (["run", "SLIDE", "--out", "OUT", "--encodr", "x"], "--encoder"),
        (["run", "SLIDE", "--out", "OUT", "--encoder", "handcraftd"], "did you mean 'handcrafted'"),
        (
            ["run", "SLIDE", "--out", "OUT", "--encoder", "timm.vit_smal_patch16_224"],
            "did you mean 'vit_small_patch16_224'",
        ),
        (["run", "SLIDE", "--out", "OUT", "--set", "tiles.mp=1"], "unknown config key 'tiles.mp'; did you mean 'mpp'"),
        (["run", "SLIDE", "--out", "OUT", "--set", "tiles.overlap_px=999"], "must be less than side_px"),
        (["run", "SLIDE", "--out", "OUT", "--config", "absent.yaml"], "absent.yaml"),
        (["run", "SLIDE", "--out", "OUT", "--workers", "0"], "--workers"),
        (["run", "SLIDE", "SLIDE", "--out", "OUT"], "drawn"),
        (["run", "BAD_MANIFEST", "--out", "OUT"], "slide_id"),
        (["rum"], "Did you mean 'run'"),
        (["synth", "x.tiff", "--size", "big"], "write it as WIDTHxHEIGHT"),
        (["synth", "x.png"], "ends in .tiff"),
        (["verify", "EMPTY_FOLDER"], "no store here"),
        (["tissue", "absent.svs", "--out", "OUT"], "no such file"),
        (["tissue", "SLIDE", "--out", "OUT", "--slide-id", "../x"], "../x"),
        (["run", "SLIDE", "--out", "OUT", "--set", "tissue.mask=absent.geojson"], "absent.geojson"),
        (["run", "SLIDE", "--out", "OUT", "--fresh", "everything"], "everything"),
        (["run", "SLIDE", "--out", "OUT", "--encoder", ""], "embed.encoder"),
        (
            ["run", "SLIDE", "--out", "OUT", "--encoder", "timm.test_vit", "--set", "embed.weights=absent.pt"],
            "absent.pt: no such weights file",
        ),
        (["info", "absent.svs"], "no such file"),
    ],
    ids=lambda value: " ".join(value[:5]) if isinstance(value, list) else "",
)
def test_wrong_use_is_one_clear_line_before_any_work(
    cli: Cli, drawn_slide: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("slide,path\na,a.svs\n")
    places = {
        "SLIDE": drawn_slide,
        "OUT": tmp_path / "out",
        "EMPTY_FOLDER": tmp_path / "empty",
        "BAD_MANIFEST": tmp_path / "bad.csv",
    }
    ended = cli(*(places.get(argument, argument) for argument in arguments))
    assert ended.code == 2, ended
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out" / "slides").exists()


def test_an_output_that_is_a_file(cli: Cli, drawn_slide: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    ended = cli("run", drawn_slide, "--out", tmp_path / "out")
    assert ended.code == 2
    assert "this is a file; name a folder" in ended.err
    assert len(ended.err.splitlines()) == 1


def test_unreadable_slides_get_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "text.svs").write_text("not a slide")
    for command in (["info"], ["tissue", "--out", tmp_path / "out"]):
        ended = cli(command[0], tmp_path / "text.svs", *command[1:])
        assert (ended.code, len(ended.err.splitlines())) == (1, 1)
        assert "text.svs" in ended.err


def test_allow_missing_records_a_failure(cli: Cli, tmp_path: Path) -> None:
    ended = cli("run", tmp_path / "absent.svs", "--out", tmp_path / "out", "--allow-missing")
    assert ended.code == 1
    assert "absent.svs: there is no such file" in ended.out


def test_stages_one_by_one(cli: Cli, drawn_slide: Path, tmp_path: Path) -> None:
    early = cli("tiles", drawn_slide, "--out", tmp_path)
    assert early.code == 1
    assert "run 'pathopipe tissue SLIDE --out DIR' first" in early.err
    assert "mm2; flags:" in cli("tissue", drawn_slide, "--out", tmp_path).out
    assert "was done already" in cli("tissue", drawn_slide, "--out", tmp_path).out
    early = cli("embed", drawn_slide, "--out", tmp_path)
    assert "run 'pathopipe tiles SLIDE --out DIR' first" in early.err
    assert "tiles" in cli("tiles", drawn_slide, "--out", tmp_path).out
    assert cli("embed", drawn_slide, "--out", tmp_path).code == 0
    assert cli("verify", tmp_path).code == 0


def test_verify_finds_damage(cli: Cli, results: Path, tmp_path: Path) -> None:
    import shutil

    sound = cli("verify", results)
    assert (sound.code, sound.out) == (0, "drawn: sound\n")
    copy = tmp_path / "copy"
    shutil.copytree(results, copy)
    chunk = next((copy / "slides" / "drawn.zarr" / "embeddings").rglob("values/c/0/0"))
    data = bytearray(chunk.read_bytes())
    data[100] ^= 4
    chunk.write_bytes(bytes(data))
    damaged = cli("verify", copy / "slides" / "drawn.zarr", "--json")
    assert damaged.code == 1
    assert "fails its checksum" in json.loads(damaged.out)["drawn"][0]["what"]


def test_verify_tells_of_slides_that_failed(cli: Cli, drawn_slide: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.svs").touch()
    cli("run", tmp_path / "empty.svs", drawn_slide, "--out", tmp_path / "out")
    told = cli("verify", tmp_path / "out")
    assert told.code == 1
    assert "empty: 1 problem\n  run: failed: empty.svs" in told.out
    assert "drawn: sound" in told.out


def test_a_damaged_summary_is_begun_anew(cli: Cli, drawn_slide: Path, tmp_path: Path) -> None:
    (tmp_path / "summary.csv").write_bytes(bytes(range(128, 256)))
    assert cli("run", drawn_slide, "--out", tmp_path).code == 0
    with (tmp_path / "summary.csv").open() as file:
        assert [row["slide_id"] for row in csv.DictReader(file)] == ["drawn"]


def test_random_weights_are_said(cli: Cli, drawn_slide: Path, tmp_path: Path) -> None:
    told = cli("run", drawn_slide, "--out", tmp_path, "--encoder", "timm.test_vit", "--set", "tiles.mpp=2")
    assert told.code == 0
    assert "note: timm.test_vit: random weights" in told.err


def test_info_as_text_and_json(cli: Cli, drawn_slide: Path) -> None:
    text = cli("info", drawn_slide).out
    assert "2400 x 1800 px" in text
    assert "0.5 um/px" in text
    document = json.loads(cli("info", drawn_slide, "--json").out)
    assert document["dims_l0"] == [2400, 1800]
    assert document["mpp"][0] == pytest.approx(0.5, rel=1e-3)


def test_synth_draws_what_is_asked(cli: Cli, tmp_path: Path) -> None:
    ended = cli("synth", tmp_path / "a b.tiff", "--size", "600x500", "--mpp", "0.5", "--truth", tmp_path / "t.geojson")
    assert ended.code == 0, ended.err
    assert "600 x 500 px" in cli("info", tmp_path / "a b.tiff").out
    assert json.loads((tmp_path / "t.geojson").read_text())["type"] == "FeatureCollection"


def test_doctor_encoders_and_version(cli: Cli) -> None:
    doctor = cli("doctor")
    assert doctor.code == 0
    assert "OpenSlide" in doctor.out
    assert "all is well" in doctor.out
    assert "handcrafted" in cli("encoders", "list").out
    assert json.loads(cli("encoders", "list", "--json").out)[0]["name"] == "handcrafted"
    assert cli("--version").out == f"pathopipe {pathopipe.__version__}\n"


COMMANDS = [
    *("demo", "run", "info", "tissue", "tiles", "embed", "segment", "verify", "synth", "doctor", "encoders list"),
    *("segmenter evaluate", "export geojson", "export parquet", "export anndata", "import geojson"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(cli: Cli, command: str) -> None:
    told = cli(*command.split(), "--help")
    assert told.code == 0
    assert "Example" in told.out
    assert f"pathopipe {command}" in told.out
