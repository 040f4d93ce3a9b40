"""Training: each branch learns, test and validation slides have no say, patients stay whole, runs go on."""

import csv
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planted_cohorts import QUICK, planted

from pathopipe.errors import UsageError
from pathopipe.metadata.evaluate import ALL, BASELINE, MULTITASK
from pathopipe.metadata.inputs import Preparation
from pathopipe.metadata.network import MODALITIES
from pathopipe.metadata.settings import MetadataConfig, load_metadata_config
from pathopipe.metadata.splits import deal_folds
from pathopipe.metadata.text import TextVectorizer
from pathopipe.metadata.train import train, train_fold
from pathopipe.mil.bags import array_bag


def accuracy(scores: np.ndarray, truth: np.ndarray) -> float:
    known = np.isfinite(truth[:, 0]) & np.isfinite(scores).all(axis=1)
    return float((scores[known].argmax(axis=1) == truth[known, 0]).mean())


# --- learning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", MODALITIES)
def test_each_branch_learns_alone(tmp_path: Path, modality: str) -> None:
    cohort = planted(80, {"task": (modality,)}, give=(modality,), strength=3.0)
    # The baseline of the image has a learning rate of its own, a slower one.
    settings = QUICK.model_copy(update={"epochs": 40}) if modality == "image" else QUICK
    oof = train(cohort, settings, tmp_path)
    assert accuracy(oof.scores[MULTITASK, ALL]["task"], oof.truth["task"]) > 0.8
    assert accuracy(oof.scores[BASELINE, modality]["task"], oof.truth["task"]) > 0.8
    assert set(oof.used[MULTITASK, ALL]) == {modality}


def test_each_task_finds_its_modality_and_image_alone_works(tmp_path: Path) -> None:
    cohort = planted(120, {"seen": ("image",), "told": ("text",)}, strength=3.0, missing=0.2, unlabelled=0.1)
    oof = train(cohort, QUICK, tmp_path)
    assert accuracy(oof.scores[MULTITASK, "image"]["seen"], oof.truth["seen"]) > 0.8
    assert accuracy(oof.scores[MULTITASK, "text"]["told"], oof.truth["told"]) > 0.8
    # What is not in the image can't be seen there.
    assert accuracy(oof.scores[BASELINE, "image"]["told"], oof.truth["told"]) < 0.7
    for view, shown in (((MULTITASK, "image"), 0), ((MULTITASK, "text"), 1)):
        scored = np.isfinite(oof.scores[view]["seen"]).all(axis=1)
        there = [MODALITIES[shown] in case.modalities for case in cohort.cases]
        assert scored.tolist() == there
    assert np.isfinite(oof.scores[MULTITASK, ALL]["told"]).all()
    assert list(oof.used[MULTITASK, ALL]) == ["+".join(case.modalities) for case in cohort.cases]


def test_the_number_of_tiles_is_seen_unless_it_is_not_to_be() -> None:
    cohort = planted(90, {"task": ("image",)}, give=("image",), strength=0.0)
    # All tiles of all slides are alike; one class has a third of them.
    sizes = np.where(cohort.truth["task"][:, 0] == 1, 3, 9)
    bags = [
        array_bag(case.slide_id, np.ones((size, 8), np.float32)) for case, size in zip(cohort.cases, sizes, strict=True)
    ]
    cases = tuple(replace(case, bag=bag) for case, bag in zip(cohort.cases, bags, strict=True))
    found = {}
    for sized, precision in ((True, 0.2), (False, 0.999)):
        settings = QUICK.model_copy(update={"bag_size": sized, "val_share": 0.4, "precision": precision})
        fold = deal_folds(cohort, settings, seed=0)[0]
        result = train_fold(replace(cohort, cases=cases), fold, settings)
        truth = cohort.truth["task"][fold.test, 0]
        for view in (MULTITASK, BASELINE):
            rows = [row for row in result.rows if (row["model"], row["shown"]) == (view, "image")]
            scores = np.asarray([row["task_p_b"] for row in rows])
            abstained = {row["task_abstained"] for row in rows}
            found[view, sized] = scores[truth == 1].min() - scores[truth == 0].max(), np.ptp(scores), abstained
    for view in (MULTITASK, BASELINE):
        assert found[view, True][0] > 0.02
        assert found[view, False][1] < 1e-6
        assert (found[view, True][2], found[view, False][2]) == ({"false"}, {"true"})


def test_all_kinds_of_task_at_once() -> None:
    cohort = planted(90, {"stage": ("image",)}, classes=3, give=("image",), strength=3.0)
    stage = cohort.truth["stage"]
    tasks = (
        replace(cohort.tasks[0], kind="ordinal"),
        replace(cohort.tasks[0], name="labels", kind="multi-label", classes=("low", "high")),
        replace(cohort.tasks[0], name="size", kind="continuous", classes=()),
    )
    truth = {"stage": stage, "labels": np.hstack([stage == 0, stage > 0]).astype(float), "size": 10 + 5 * stage}
    settings = QUICK.model_copy(update={"val_share": 0.1})
    fold = deal_folds(replace(cohort, tasks=tasks, truth=truth), settings, seed=0)[0]
    result = train_fold(replace(cohort, tasks=tasks, truth=truth), fold, settings)
    rows = [row for row in result.rows if (row["model"], row["shown"]) == (MULTITASK, ALL)]
    stage, labels, size = (truth[name][fold.test] for name in ("stage", "labels", "size"))
    scores = np.asarray([[row[f"stage_p_{name}"] for name in "abc"] for row in rows])
    assert accuracy(scores, stage) > 0.6
    scores = np.asarray([[row["labels_p_low"], row["labels_p_high"]] for row in rows])
    assert ((scores > 0.5) == labels).mean() > 0.8
    values = np.asarray([float(row["size_value"]) for row in rows])
    assert np.corrcoef(values, size[:, 0])[0, 1] > 0.7
    assert abs(values.mean() - size.mean()) < 1.5
    assert {row["size_abstained"] for row in rows} == {"false"}
    assert {row["model"] for row in result.rows} == {MULTITASK, BASELINE}


# --- what must have no influence ---------------------------------------------------------------------------------


def test_test_slides_reach_neither_weights_nor_vocabulary_nor_scales() -> None:
    cohort = planted(60, {"task": ("image", "text", "table")}, strength=3.0)
    fold = deal_folds(cohort, QUICK, seed=0)[0]
    model = train_fold(cohort, fold, QUICK).model
    other = list(cohort.cases)
    elsewhere = planted(60, {"task": ("text",)}, seed=9, strength=3.0)
    for row in fold.test:
        odd = elsewhere.cases[row]
        other[row] = replace(other[row], text=f"{odd.text} otherword", row={"age": "900"}, bag=odd.bag)
    truth = cohort.truth["task"].copy()
    truth[fold.test] = 1 - truth[fold.test]
    again = train_fold(replace(cohort, cases=tuple(other), truth={"task": truth}), fold, QUICK).model
    assert again.card == model.card
    rows = fold.train
    one, two = (m.preparation.inputs(cohort) for m in (model, again))
    np.testing.assert_array_equal(one.text, two.text)
    np.testing.assert_array_equal(one.table, two.table)
    np.testing.assert_array_equal(
        model.logits(one, rows, [MODALITIES])[MODALITIES], again.logits(two, rows, [MODALITIES])[MODALITIES]
    )


def test_validation_slides_reach_neither_vocabulary_nor_scales() -> None:
    cohort = planted(60, {"task": ("text",)}, strength=3.0)
    fold = deal_folds(cohort, QUICK, seed=0)[0]
    other = list(cohort.cases)
    for row in fold.val:
        other[row] = replace(other[row], text="wholly other words in here", row={"age": "900"})
    fitted = Preparation.fit(cohort, fold.train, TextVectorizer(width=16))
    again = Preparation.fit(replace(cohort, cases=tuple(other)), fold.train, TextVectorizer(width=16))
    np.testing.assert_array_equal(fitted.inputs(cohort).text, again.inputs(cohort).text)
    np.testing.assert_array_equal(fitted.inputs(cohort).table, again.inputs(cohort).table)


def test_a_patient_never_crosses_and_every_slide_is_tested_once(tmp_path: Path) -> None:
    cohort = planted(60, {"task": ("text",)}, give=("text",), slides_a_patient=3, strength=3.0)
    train(cohort, QUICK, tmp_path)
    with (tmp_path / "folds.csv").open() as file:
        rows = list(csv.DictReader(file))
    parts: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        parts.setdefault((row["fold"], row["patient_id"]), set()).add(row["part"])
    assert len(parts) == 2 * 20
    assert all(len(found) == 1 for found in parts.values())
    assert sorted(row["slide_id"] for row in rows if row["part"] == "test") == sorted(
        case.slide_id for case in cohort.cases
    )
    with (tmp_path / "oof.csv").open() as file:
        tested = [(row["slide_id"], row["fold"]) for row in csv.DictReader(file) if row["shown"] == ALL]
    assert sorted(tested) == sorted((row["slide_id"], row["fold"]) for row in rows if row["part"] == "test")


# --- runs --------------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_stopped_run_goes_on_and_gives_equal_bytes(tmp_path: Path) -> None:
    cohort = planted(60, {"task": ("image", "text")}, missing=0.2, strength=3.0)
    settings = QUICK.model_copy(update={"epochs": 3})
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(cohort, settings, whole)
    shutil.copytree(whole, parted)
    shutil.rmtree(parted / "folds" / "fold1")
    (parted / "oof.csv").unlink()
    # A killed run leaves a folder that has not got its name yet.
    shutil.copytree(parted / "folds" / "fold0", parted / "folds" / ".fold1.unfinished")
    lines: list[str] = []
    train(cohort, settings, parted, on_line=lines.append)
    assert "was there already" in lines[0]
    assert content(whole) == content(parted)


def test_another_seed_gives_another_model(tmp_path: Path) -> None:
    cohort = planted(40, {"task": ("text",)}, give=("text",))
    settings = QUICK.model_copy(update={"epochs": 2})
    first = train(cohort, settings, tmp_path / "0", seed=0)
    second = train(cohort, settings, tmp_path / "1", seed=1)
    assert first.folds != second.folds


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 4}, "seed was 0, now 4"),
        ({"settings": QUICK.model_copy(update={"epochs": 1, "width": 8})}, "width was 16, now 8"),
        ({"cohort": 1}, "other slides"),
    ],
)
def test_a_folder_of_another_training_is_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    settings = QUICK.model_copy(update={"epochs": 1})
    cohort = planted(40, {"task": ("text",)}, give=("text",))
    train(cohort, settings, tmp_path, seed=0)
    if "cohort" in change:
        cases = (replace(cohort.cases[0], text="another report"), *cohort.cases[1:])
        change = {"cohort": replace(cohort, cases=cases)}
    with pytest.raises(UsageError, match=said):
        train(**{"cohort": cohort, "settings": settings, "out": tmp_path, "seed": 0, **change})  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_stops_with_what_to_do(tmp_path: Path) -> None:
    cohort = planted(40, {"task": ("text",)}, give=("text",))
    settings = QUICK.model_copy(update={"learning_rate": 1e25})
    with pytest.raises(UsageError, match=r"fold fold0, multitask: the loss is .* lower metadata.learning_rate"):
        train(cohort, settings, tmp_path)
    assert not (tmp_path / "oof.csv").exists()


def test_a_task_that_a_fold_can_not_learn_is_named() -> None:
    cohort = planted(40, {"task": ("text",), "rare": ("text",)}, give=("text",))
    fold = deal_folds(cohort, QUICK, seed=0)[0]
    truth = cohort.truth["rare"].copy()
    truth[fold.train] = np.nan
    with pytest.raises(UsageError, match="no training slide has both a record of task 'rare'"):
        train_fold(replace(cohort, truth={**cohort.truth, "rare": truth}), fold, QUICK)


def test_a_baseline_that_can_not_be_learnt_says_nothing(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    cohort = planted(60, {"seen": ("image",), "told": ("text",)}, missing=0.3, strength=3.0)
    truth = cohort.truth["told"].copy()
    truth[[case.bag is not None for case in cohort.cases]] = np.nan
    settings = QUICK.model_copy(update={"epochs": 2})
    with caplog.at_level(logging.WARNING, "pathopipe"):
        oof = train(replace(cohort, truth={**cohort.truth, "told": truth}), settings, tmp_path)
    assert "its baseline has no prediction" in caplog.text
    assert np.isnan(oof.scores[BASELINE, "image"]["told"]).all()
    assert oof.abstained[BASELINE, "image"]["told"].all()


# --- abstention and class weights --------------------------------------------------------------------------------


def test_trained_model_abstains_where_it_would_be_wrong(tmp_path: Path) -> None:
    # A third of the slides show nothing of their class.
    cohort = planted(300, {"task": ("table",)}, give=("table",), strength=3.0)
    cases = [
        replace(case, row={"age": case.row["age"]}) if number % 3 == 0 else case
        for number, case in enumerate(cohort.cases)
    ]
    settings = QUICK.model_copy(update={"val_share": 0.4, "epochs": 8})
    oof = train(replace(cohort, cases=tuple(cases)), settings, tmp_path)
    given = ~oof.abstained[MULTITASK, ALL]["task"]
    empty = np.arange(300) % 3 == 0
    assert accuracy(oof.scores[MULTITASK, ALL]["task"][given], oof.truth["task"][given]) >= 0.9
    assert given[~empty].mean() > 0.8
    assert given[empty].mean() < 0.5


def test_class_weights_are_taken_out_of_the_probabilities(tmp_path: Path) -> None:
    cohort = planted(200, {"task": ("image",)}, give=("image",), strength=0.0)
    truth = (np.random.default_rng(0).random((200, 1)) < 0.1).astype(float)
    oof = train(
        replace(cohort, truth={"task": truth}), QUICK.model_copy(update={"balanced": True, "epochs": 4}), tmp_path
    )
    # Nothing can be learnt, so what is left is the frequency; the weighted loss alone would say one half.
    for view in ((MULTITASK, ALL), (BASELINE, "image")):
        assert oof.scores[view]["task"][:, 1].mean() == pytest.approx(truth.mean(), abs=0.08)


# --- settings ----------------------------------------------------------------------------------------------------


def test_settings_are_strict(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("mil:\n  hidden: 8\nmetadata:\n  epochs: 7\n")
    assert load_metadata_config(path, ["metadata.members=2"]) == MetadataConfig(epochs=7, members=2)
    with pytest.raises(UsageError, match="unknown config key 'metadata.epoch'.*'epochs'"):
        load_metadata_config(None, ["metadata.epoch=3"])
    with pytest.raises(UsageError, match="precision"):
        load_metadata_config(None, ["metadata.precision=2"])
    with pytest.raises(UsageError, match="write it as metadata.key=value"):
        load_metadata_config(None, ["mil.epochs=3"])
