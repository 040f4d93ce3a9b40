"""``pathopipe mil train``: the whole command on small features, and one line for each kind of bad input."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Cli = Callable[..., Any]
QUICK = ("--set", "mil.epochs=2", "--set", "mil.members=1", "--set", "mil.draws=100", "--set", "mil.hidden=8")


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """24 slides of 12 patients, half of them positive, and their labels."""
    rng = np.random.default_rng(0)
    (tmp_path / "features").mkdir()
    rows = []
    for i in range(24):
        label = (i // 2) % 2
        tiles = rng.standard_normal((6, 4)).astype(np.float32) + 2 * label
        np.savez(tmp_path / "features" / f"s{i:02d}.npz", features=tiles)
        rows.append([f"s{i:02d}", f"p{i // 2:02d}", "AB"[i // 2 % 3 > 0], ["no", "yes"][label], str(i / 7)])
    write_labels(tmp_path, rows)
    return tmp_path


def write_labels(folder: Path, rows: list[list[str]]) -> None:
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["slide_id", "patient_id", "site", "label", "number"], *rows])


def read_labels(folder: Path) -> list[list[str]]:
    with (folder / "labels.csv").open() as file:
        return list(csv.reader(file))[1:]


def arguments(folder: Path, *more: object) -> tuple[object, ...]:
    given = ("--manifest", folder / "labels.csv", "--features", folder / "features", "--out", folder / "out")
    target = () if "--target" in more else ("--target", "label")
    return ("mil", "train", *given, *target, "--folds", 3, *QUICK, *more)


def test_train_reports_confounds_before_results_and_keeps_all(cli: Cli, cohort: Path) -> None:
    done = cli(*arguments(cohort, "--head", "mean"))
    assert done.code == 0, done.err
    assert done.out.index("confounds") < done.out.index("AUROC  ")
    assert "site:" in done.out and "number of tiles alone" in done.out
    assert "features logistic" in done.out and "nested choice" in done.out
    assert "[6/6]" in done.err and "positive is yes" in done.err
    out = cohort / "out"
    for name in ("config.json", "splits.csv", "confounds.json", "results.csv", "results.json"):
        assert (out / name).stat().st_size, name
    fold = out / "features" / "mean" / "fold0"
    assert {path.name for path in fold.iterdir()} == {
        "model.safetensors",
        "model.json",
        "history.csv",
        "predictions.csv",
    }
    assert json.loads((fold / "model.json").read_text())["head"] == "mean"
    again = cli(*arguments(cohort, "--head", "mean"))
    assert again.code == 0 and "6 of 6 models were there already" in again.err
    assert again.out.split("test folds together")[1] == done.out.split("test folds together")[1]
    other = cli(*arguments(cohort, "--head", "mean", "--seed", 1))
    assert other.code == 2 and "seed was 0, now 1" in other.err


def change_nothing(rows: list[list[str]], folder: Path) -> list[list[str]]:
    return rows


def strange_ids(rows: list[list[str]], folder: Path) -> list[list[str]]:
    return [[f"x{row[0]}", *row[1:]] for row in rows]


def no_labels(rows: list[list[str]], folder: Path) -> list[list[str]]:
    return [[*row[:3], "", row[4]] for row in rows]


def one_class(rows: list[list[str]], folder: Path) -> list[list[str]]:
    return [[*row[:3], "yes", row[4]] for row in rows]


def empty_bags(rows: list[list[str]], folder: Path) -> list[list[str]]:
    for row in rows:
        np.savez(folder / "features" / f"{row[0]}.npz", features=np.full((3, 4), np.nan, np.float32))
    return rows


def mixed_widths(rows: list[list[str]], folder: Path) -> list[list[str]]:
    np.savez(folder / "features" / "s03.npz", features=np.zeros((3, 5), np.float32))
    return rows


def few_patients(rows: list[list[str]], folder: Path) -> list[list[str]]:
    return [[row[0], f"p{i // 2 % 2}", *row[2:]] for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (strange_ids, (), "no slide of labels.csv has features"),
        (no_labels, (), "empty in all 24 rows"),
        (one_class, (), "one class"),
        (empty_bags, (), "none of the 24 bags holds a tile"),
        (mixed_widths, (), "widths"),
        (few_patients, (), "2 patients for 3 folds"),
        (change_nothing, ("--target", "lable"), "did you mean 'label'"),
        (change_nothing, ("--head", "abmli"), "did you mean 'abmil'"),
        (change_nothing, ("--kind", "cox"), "no such kind"),
        (change_nothing, ("--covariates", "age"), "no column 'age'"),
        (change_nothing, ("--confounds", "scanner"), "no column 'scanner'"),
        (change_nothing, ("--set", "mil.epoch=3"), "did you mean 'epochs'"),
    ],
)
def test_bad_input_is_one_line_before_training(
    cli: Cli, cohort: Path, change: object, more: tuple[str, ...], message: str
) -> None:
    write_labels(cohort, change(read_labels(cohort), cohort))  # type: ignore[operator]
    done = cli(*arguments(cohort, *more))
    assert done.code == 2
    problems = [line for line in done.err.splitlines() if line.startswith("pathopipe:")]
    assert len(problems) == 1 and message in problems[0]
    assert not list(cohort.glob("out/features"))


def test_some_empty_bags_and_unlabelled_slides_are_left_out(cli: Cli, cohort: Path) -> None:
    np.savez(cohort / "features" / "s04.npz", features=np.full((3, 4), np.nan, np.float32))
    rows = read_labels(cohort)
    rows[7][3] = ""
    write_labels(cohort, [row for row in rows if row[0] != "s10"])
    done = cli(*arguments(cohort, "--head", "mean"))
    assert done.code == 0, done.err
    assert "1 bags hold no tile, left out: s04" in done.err
    assert "21 bags of 12 patients" in done.err
    assert "s07" in done.err and "s10" in done.err


def test_patients_as_bags(cli: Cli, cohort: Path) -> None:
    done = cli(*arguments(cohort, "--head", "mean", "--by", "patient"))
    assert done.code == 0, done.err
    assert "12 bags of 12 patients, 144 tiles" in done.err


def test_help_has_examples(cli: Cli) -> None:
    done = cli("mil", "train", "--help")
    assert done.code == 0
    assert "pathopipe mil train --manifest labels.csv" in done.out
