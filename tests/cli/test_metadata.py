"""``pathopipe metadata``: the three commands on a small catalogue, and one line for each kind of bad input."""

import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathopipe.cli import metadata
from pathopipe.metadata.cases import read_cohort
from pathopipe.metadata.review import TopTile
from pathopipe.metadata.tasks import TaskSpec
from pathopipe.synth import SynthSpec, write_slide

Cli = Callable[..., Any]

SETTINGS = (
    "folds=2 members=1 epochs=12 batch_slides=8 width=16 hidden=16 attention=8 dropout=0 learning_rate=0.02 draws=100"
)
QUICK = tuple(part for setting in SETTINGS.split() for part in ("--set", f"metadata.{setting}"))
TASKS = """
tasks:
  - name: fixation
    kind: multi-class
    classes: [FFPE, frozen]
    codes: {FFPE: "SNOMED CT 441652008"}
  - name: procedure
    kind: multi-class
    classes: [biopsy, resection]
"""
HEADER = ("slide_id", "patient_id", "fixation", "procedure")
FILLER = ("pale", "firm", "soft", "tan", "mucosa", "segment", "labelled", "entirely", "submitted", "levels")
WRONG = "s04"
"""The slide whose fixation is recorded wrong."""


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 slides of 48 patients: tiles tell the fixation, reports the procedure; one record is wrong."""
    folder = tmp_path_factory.mktemp("catalogue")
    rng = np.random.default_rng(0)
    (folder / "features").mkdir()
    (folder / "reports").mkdir()
    rows = []
    for number in range(48):
        frozen, resected = number % 2, number // 2 % 2
        name = f"s{number:02d}"
        tiles = rng.standard_normal((8, 6)).astype(np.float32)
        tiles[:, frozen] += 2
        np.savez(folder / "features" / f"{name}.npz", features=tiles)
        words = ["tissue", "received", ("fragments", "margins")[resected], *rng.choice(FILLER, 6)]
        (folder / "reports" / f"{name}.txt").write_text(" ".join(map(str, words)))
        recorded = ("FFPE", "frozen")[frozen if name != WRONG else 1 - frozen]
        rows.append([name, f"patient{number:02d}", recorded, ("biopsy", "resection")[resected]])
    write(folder / "catalogue.csv", rows)
    (folder / "tasks.yaml").write_text(TASKS)
    return folder


@pytest.fixture(scope="module")
def trained(catalogue: Path) -> Path:
    """Where ``metadata train`` has written."""
    return catalogue / "model"


def write(path: Path, rows: list[list[str]], header: tuple[str, ...] = HEADER) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def sources(folder: Path) -> tuple[object, ...]:
    return ("--features", folder / "features", "--reports", folder / "reports")


def train(cli: Cli, folder: Path, *more: object) -> Any:
    given = ("--manifest", folder / "catalogue.csv", "--tasks", folder / "tasks.yaml", *sources(folder))
    return cli("metadata", "train", *given, "--out", folder / "model", *QUICK, *more)


def test_train_predict_review(cli: Cli, catalogue: Path, trained: Path, tmp_path: Path) -> None:
    done = train(cli, catalogue)
    assert done.code == 0, done.err
    assert done.out.index("probe") < done.out.index("out of fold")
    assert "48 slides of 48 patients (48 with image, 48 with text)" in done.err
    assert "gain of multitask, all over baseline, image, mean of the tasks: AUROC" in done.out
    for name in ("config.json", "folds.csv", "oof.csv", "figures.csv", "evaluation.json"):
        assert (trained / name).stat().st_size, name

    again = train(cli, catalogue, "--json")
    assert again.code == 0 and again.err.count("was there already") == 2
    record = json.loads(again.out)
    assert {row["task"] for row in record["gains"]} == {"mean", "fixation", "procedure"}
    # The words are the procedure itself; the probe must have seen them.
    assert {"margins", "fragments"} & {leak["what"] for leak in record["probe"]}

    out = tmp_path / "predicted"
    done = cli(
        "metadata",
        "predict",
        "--model",
        trained,
        "--manifest",
        catalogue / "catalogue.csv",
        *sources(catalogue),
        "--out",
        out,
    )
    assert done.code == 0, done.err
    rows = read(out / "predictions.csv")
    lines = [json.loads(line)["slide_id"] for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 96 and lines[::2] == [f"s{number:02d}" for number in range(48)]
    fixation = {row["slide_id"]: row for row in rows if row["task"] == "fixation"}
    right = [fixation[f"s{n:02d}"]["value"] == ("FFPE", "frozen")[n % 2] for n in range(48)]
    assert np.mean(right) > 0.9
    assert {row["code"] for row in rows if row["value"] == "FFPE"} == {"SNOMED CT 441652008"}
    assert {row["modalities"] for row in rows} == {"image+text"}

    out = tmp_path / "review"
    done = cli(
        "metadata",
        "review",
        "--model",
        trained,
        "--manifest",
        catalogue / "catalogue.csv",
        *sources(catalogue),
        "--out",
        out,
    )
    assert done.code == 0, done.err
    rows = read(out / "review.csv")
    assert (rows[0]["slide_id"], rows[0]["recorded"], rows[0]["predicted"]) == (WRONG, "frozen", "FFPE")
    assert float(rows[0]["surety"]) > 0.5 and rows[0]["near_slides"]
    assert all(float(first["surety"]) >= float(second["surety"]) for first, second in itertools.pairwise(rows))
    assert WRONG in (out / "review.html").read_text()
    assert f"1     {WRONG}" in done.out and f"{len(rows)} of 96 records contradict their prediction" in done.out


def test_review_goes_by_what_the_manifest_says_now(cli: Cli, catalogue: Path, trained: Path, tmp_path: Path) -> None:
    """A record spoilt after training is found, one put right is not; models never judge patients that they saw."""
    if not trained.exists():
        train(cli, catalogue)
    rows = [list(row.values()) for row in read(catalogue / "catalogue.csv")]
    rows[4][2] = "FFPE"
    rows[11][2] = "FFPE"
    write(tmp_path / "now.csv", rows)
    given = ("--model", trained, "--manifest", tmp_path / "now.csv", *sources(catalogue), "--out", tmp_path / "out")
    done = cli("metadata", "review", *given, "--json")
    assert done.code == 0, done.err
    listed = json.loads(done.out)
    first = [one for one in listed if one["task"] == "fixation"]
    assert first[0]["slide_id"] == "s11" and WRONG not in {one["slide_id"] for one in first}

    rows[7][1] = "someone-else"
    write(tmp_path / "now.csv", rows)
    for command in ("review", "predict"):
        done = cli("metadata", command, *given)
        assert done.code == 2 and "slide s07: patient someone-else here, patient07 in training" in done.err

    write(tmp_path / "now.csv", [row[:2] for row in rows], HEADER[:2])
    done = cli("metadata", "review", *given)
    assert done.code == 2 and "none of the columns that the model predicts (fixation, procedure)" in done.err


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda rows: [[*row[:2], "frosen", row[3]] for row in rows], "'frosen' is no class of task 'fixation'"),
        (lambda rows: [[*row[:2], "FFPE", row[3]] for row in rows], "holds 'FFPE' only"),
        (lambda rows: rows[:6], "6 patients with a label"),
        (lambda rows: [[f"x{row[0]}", *row[1:]] for row in rows], "features"),
    ],
)
def test_bad_catalogues_are_one_line(
    cli: Cli, catalogue: Path, tmp_path: Path, spoil: Callable[[list[list[str]]], list[list[str]]], said: str
) -> None:
    write(tmp_path / "bad.csv", spoil([list(row.values()) for row in read(catalogue / "catalogue.csv")]))
    given = ("--manifest", tmp_path / "bad.csv", "--tasks", catalogue / "tasks.yaml", *sources(catalogue))
    done = cli("metadata", "train", *given, "--out", tmp_path / "out", *QUICK)
    assert done.code == 2 and said in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out" / "oof.csv").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--set", "metadata.epoch=3"), "epoch"),
        (("--set", "mil.epochs=3"), "metadata.key=value"),
        (("--columns", "fixation"), "column 'fixation' can't be an input"),
        (("--columns", "agee"), "no column 'agee'"),
    ],
)
def test_bad_options_are_one_line(cli: Cli, catalogue: Path, tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    given = ("--manifest", catalogue / "catalogue.csv", "--tasks", catalogue / "tasks.yaml", *sources(catalogue))
    done = cli("metadata", "train", *given, "--out", tmp_path, *QUICK, *more)
    assert done.code == 2 and said in done.err and "Traceback" not in done.err


def test_no_model(cli: Cli, catalogue: Path, tmp_path: Path) -> None:
    for command in ("predict", "review"):
        done = cli(
            "metadata", command, "--model", tmp_path, "--manifest", catalogue / "catalogue.csv", "--out", tmp_path
        )
        assert done.code == 2 and "metadata train" in done.err


@pytest.mark.slow
def test_pictures_come_from_the_slide_that_the_store_was_made_from(
    cli: Cli, drawn_slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("run", drawn_slide, "--out", tmp_path / "results").code == 0
    other = tmp_path / "other.tiff"
    write_slide(other, SynthSpec(width_px=600, height_px=500, mpp=0.5, seed=3))
    for file, n_pictures in ((drawn_slide, 2), (other, 0)):
        manifest = tmp_path / "slides.csv"
        write(manifest, [["drawn", "p1", str(file), "x"]], ("slide_id", "patient_id", "path", "organ"))
        tasks = (TaskSpec(name="organ", column="organ", kind="multi-class", classes=("x", "y")),)
        cohort = read_cohort(manifest, tasks, features=tmp_path / "results", table_columns=(), labels=False)
        bag = cohort.cases[0].bag
        assert bag is not None
        place = bag.places()[0]
        assert place.xy_l0 is not None and place.side_l0 is not None
        tiles = [
            TopTile(times_mean=1, x_l0=int(x), y_l0=int(y), width_l0=place.side_l0[0], height_l0=place.side_l0[1])
            for x, y in place.xy_l0[:2]
        ]
        pictures = metadata._pictures(manifest, cohort, {0: tiles})
        assert len([one for one in pictures.get(0, ()) if one]) == n_pictures
    assert "other.tiff is not the slide its store was made from" in capsys.readouterr().err
