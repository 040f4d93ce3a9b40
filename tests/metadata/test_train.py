"""Training: each branch learns, masked labels and other parts have no say, patients stay whole, runs go on."""

import csv
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pathopipe.errors import UsageError
from pathopipe.metadata.cases import MetadataCohort
from pathopipe.metadata.evaluate import ALL, BASELINE, MULTITASK
from pathopipe.metadata.model import MODALITIES, MetadataNetwork, MetadataShape
from pathopipe.metadata.predict import Inputs, Preparation
from pathopipe.metadata.settings import MetadataConfig, load_metadata_config
from pathopipe.metadata.text import TextVectorizer
from pathopipe.metadata.train import (
    deal_folds,
    find_threshold,
    fit_network,
    member_parts,
    train,
    train_fold,
    weighted_loss,
)
from pathopipe.mil.bags import array_bag
from pathopipe.mil.targets import TargetSpec

Planted = Callable[..., MetadataCohort]

QUICK = MetadataConfig(
    folds=2,
    members=1,
    epochs=15,
    batch_slides=8,
    width=16,
    hidden=16,
    attention=8,
    dropout=0.1,
    learning_rate=1e-2,
    text_features=16,
    draws=100,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def accuracy(scores: np.ndarray, truth: np.ndarray) -> float:
    known = np.isfinite(truth[:, 0]) & np.isfinite(scores).all(axis=1)
    return float((scores[known].argmax(axis=1) == truth[known, 0]).mean())


# --- learning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", MODALITIES)
def test_each_branch_learns_alone(planted: Planted, tmp_path: Path, modality: str) -> None:
    cohort = planted(80, {"task": (modality,)}, give=(modality,), strength=3.0)
    # The baseline of the image has a learning rate of its own, a slower one.
    settings = QUICK.model_copy(update={"epochs": 40}) if modality == "image" else QUICK
    oof = train(cohort, settings, tmp_path)
    assert accuracy(oof.scores[MULTITASK, ALL]["task"], oof.truth["task"]) > 0.8
    assert accuracy(oof.scores[BASELINE, modality]["task"], oof.truth["task"]) > 0.8
    assert set(oof.used[MULTITASK, ALL]) == {modality}


def test_each_task_finds_its_modality_and_image_alone_works(planted: Planted, tmp_path: Path) -> None:
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


def test_the_number_of_tiles_is_seen_unless_it_is_not_to_be(planted: Planted) -> None:
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


def test_members_learn_from_all_of_the_training_side_together(planted: Planted, tmp_path: Path) -> None:
    cohort = planted(60, {"task": ("table",)}, give=("table",), slides_a_patient=2, strength=3.0)
    settings = QUICK.model_copy(update={"members": 3, "epochs": 2})
    fold = deal_folds(cohort, settings, seed=0)[0]
    parts = member_parts(cohort, fold, 3, seed=0)
    assert len(parts) == 3
    assert sorted(np.concatenate([val for _, val in parts])) == fold.train.tolist()
    for train_rows, val_rows in parts:
        assert sorted([*train_rows, *val_rows]) == fold.train.tolist()
        of_train, of_val = ({cohort.patients[row] for row in rows} for rows in (train_rows, val_rows))
        assert not of_train & of_val
        # 15 patients of two classes: each is in every part.
        assert set(cohort.truth["task"][val_rows, 0]) == {0, 1}
    train(cohort, settings, tmp_path)
    with (tmp_path / "folds.csv").open() as file:
        assert {row["part"] for row in csv.DictReader(file)} == {"train", "test"}


def test_one_member_has_the_validation_part_and_two_patients_make_two_members(planted: Planted) -> None:
    cohort = planted(60, {"task": ("table",)}, give=("table",))
    fold = deal_folds(cohort, QUICK, seed=0)[0]
    ((train_rows, val_rows),) = member_parts(cohort, fold, 1, seed=0)
    assert len(val_rows) > 0
    np.testing.assert_array_equal(train_rows, fold.train)
    np.testing.assert_array_equal(val_rows, fold.val)
    few = replace(fold, train=fold.train[:2], val=fold.train[:0])
    assert len(member_parts(cohort, few, 5, seed=0)) == 2


def test_all_kinds_of_task_at_once(planted: Planted) -> None:
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


def fit_once(truth: np.ndarray, specs: list[TargetSpec], rows: np.ndarray, text: np.ndarray) -> MetadataNetwork:
    n = len(text)
    inputs = Inputs(
        bags=(None,) * n,
        text=text,
        table=np.zeros((n, 0), np.float32),
        present=np.tile([False, True, False], (n, 1)),
        patient=np.arange(n),
    )
    torch.manual_seed(0)
    outputs = tuple(spec.outputs for spec in specs)
    network = MetadataNetwork(
        MetadataShape(tile_features=0, text_features=4, table_features=0, outputs=outputs, width=8, hidden=8)
    )
    settings = QUICK.model_copy(update={"epochs": 3})
    return fit_network(
        network, specs, [1.0] * len(specs), inputs, truth, rows, np.zeros(0, np.intp), settings, seed=0, where="here"
    )


SPECS = [
    TargetSpec(name="one", kind="binary", columns=("one",), classes=("a", "b")),
    TargetSpec(name="two", kind="multiclass", columns=("two",), classes=("a", "b", "c")),
]


def test_masked_labels_have_no_influence() -> None:
    rng = np.random.default_rng(0)
    text = rng.standard_normal((32, 4)).astype(np.float32)
    truth = np.stack([rng.integers(0, 2, 32), rng.integers(0, 3, 32)], axis=1).astype(float)
    truth[:8] = np.nan
    fitted = fit_once(truth, SPECS, np.arange(32), text)
    # Slides without any label: other inputs, the same network to the last bit.
    other = text.copy()
    other[:8] = 100
    again = fit_once(truth, SPECS, np.arange(32), other)
    assert all(torch.equal(a, b) for a, b in zip(fitted.parameters(), again.parameters(), strict=True))


def test_a_task_without_labels_moves_nothing_but_its_decay() -> None:
    rng = np.random.default_rng(0)
    text = rng.standard_normal((32, 4)).astype(np.float32)
    truth = np.stack([rng.integers(0, 2, 32), np.full(32, np.nan)], axis=1).astype(float)
    network = fit_once(truth, SPECS, np.arange(32), text)
    torch.manual_seed(0)
    fresh = MetadataNetwork(network.shape)
    assert torch.equal(network.heads[1].bias, fresh.heads[1].bias)
    assert not torch.equal(network.heads[0].bias, fresh.heads[0].bias)


def test_masked_labels_give_no_gradient() -> None:
    logits = torch.randn(6, 4, requires_grad=True)
    truth = torch.tensor([[0.0, 2], [1, torch.nan], [torch.nan, 1], [torch.nan, torch.nan], [1, 0], [0, 1]])
    weighted_loss(SPECS, [1.0, 2.0], logits, truth).backward()
    reached = logits.grad != 0
    assert reached[:, 0].tolist() == torch.isfinite(truth[:, 0]).tolist()
    assert reached[:, 1:].all(dim=1).tolist() == torch.isfinite(truth[:, 1]).tolist()
    assert not reached[3].any()


def test_weights_of_tasks_scale_their_loss() -> None:
    logits, truth = torch.randn(6, 4), torch.tensor([[0.0, 2], [1, 1], [0, 0], [1, 2], [1, 0], [0, 1]])
    one, two = weighted_loss(SPECS, [1.0, 0.0], logits, truth), weighted_loss(SPECS, [0.0, 1.0], logits, truth)
    torch.testing.assert_close(weighted_loss(SPECS, [3.0, 0.5], logits, truth), 3 * one + 0.5 * two)


def test_test_slides_reach_neither_weights_nor_vocabulary_nor_scales(planted: Planted) -> None:
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


def test_validation_slides_reach_neither_vocabulary_nor_scales(planted: Planted) -> None:
    cohort = planted(60, {"task": ("text",)}, strength=3.0)
    fold = deal_folds(cohort, QUICK, seed=0)[0]
    other = list(cohort.cases)
    for row in fold.val:
        other[row] = replace(other[row], text="wholly other words in here", row={"age": "900"})
    fitted = Preparation.fit(cohort, fold.train, TextVectorizer(width=16))
    again = Preparation.fit(replace(cohort, cases=tuple(other)), fold.train, TextVectorizer(width=16))
    np.testing.assert_array_equal(fitted.inputs(cohort).text, again.inputs(cohort).text)
    np.testing.assert_array_equal(fitted.inputs(cohort).table, again.inputs(cohort).table)


def test_a_patient_never_crosses_and_every_slide_is_tested_once(planted: Planted, tmp_path: Path) -> None:
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


def test_sites_can_be_left_out_whole(planted: Planted) -> None:
    cohort = planted(60, {"task": ("text",)}, give=("text",))
    cohort = replace(cohort, sites=tuple("xyz"[number % 3] for number in range(60)))
    folds = deal_folds(cohort, QUICK.model_copy(update={"leave_sites_out": True, "folds": 3}), seed=0)
    for fold in folds:
        tested = {cohort.sites[row] for row in fold.test}
        assert len(tested) == 1
        assert not tested & {cohort.sites[row] for row in (*fold.train, *fold.val)}


# --- runs --------------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_stopped_run_goes_on_and_gives_equal_bytes(planted: Planted, tmp_path: Path) -> None:
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


def test_another_seed_gives_another_model(planted: Planted, tmp_path: Path) -> None:
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
def test_a_folder_of_another_training_is_refused(
    planted: Planted, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    settings = QUICK.model_copy(update={"epochs": 1})
    cohort = planted(40, {"task": ("text",)}, give=("text",))
    train(cohort, settings, tmp_path, seed=0)
    if "cohort" in change:
        cases = (replace(cohort.cases[0], text="another report"), *cohort.cases[1:])
        change = {"cohort": replace(cohort, cases=cases)}
    with pytest.raises(UsageError, match=said):
        train(**{"cohort": cohort, "settings": settings, "out": tmp_path, "seed": 0, **change})  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_stops_with_what_to_do(planted: Planted, tmp_path: Path) -> None:
    cohort = planted(40, {"task": ("text",)}, give=("text",))
    settings = QUICK.model_copy(update={"learning_rate": 1e25})
    with pytest.raises(UsageError, match=r"fold fold0, multitask: the loss is .* lower metadata.learning_rate"):
        train(cohort, settings, tmp_path)
    assert not (tmp_path / "oof.csv").exists()


def test_a_task_that_a_fold_can_not_learn_is_named(planted: Planted) -> None:
    cohort = planted(40, {"task": ("text",), "rare": ("text",)}, give=("text",))
    fold = deal_folds(cohort, QUICK, seed=0)[0]
    truth = cohort.truth["rare"].copy()
    truth[fold.train] = np.nan
    with pytest.raises(UsageError, match="no training slide has both a record of task 'rare'"):
        train_fold(replace(cohort, truth={**cohort.truth, "rare": truth}), fold, QUICK)


def test_a_baseline_that_can_not_be_learnt_says_nothing(
    planted: Planted, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
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


def test_threshold_reaches_the_precision_asked_for_on_fresh_slides() -> None:
    reached, given = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        surety = rng.uniform(0.5, 1, 5000)
        right = (rng.random(5000) < surety).astype(float)
        cut = find_threshold(surety[:400], right[:400], 0.9)
        assert cut is not None
        above = surety[400:] >= cut
        reached.append(right[400:][above].mean())
        given.append(above.mean())
    # By theory 0.8 is the cut above which nine in ten are right.
    assert np.mean(np.asarray(reached) >= 0.9) > 0.85
    assert 0.15 < np.mean(given) < 0.4


def test_few_or_wrong_predictions_prove_no_precision() -> None:
    assert find_threshold(np.full(10, 0.99), np.ones(10), 0.9) is None
    # 0.9 ** 22 is the first power below a tenth.
    assert find_threshold(np.full(21, 0.99), np.ones(21), 0.9) is None
    assert find_threshold(np.full(22, 0.99), np.ones(22), 0.9) == 0.99
    assert find_threshold(np.linspace(0.5, 1, 50), np.zeros(50), 0.9) is None
    unknown = np.r_[np.ones(22), np.full(50, np.nan)]
    assert find_threshold(np.r_[np.full(22, 0.7), np.full(50, 0.2)], unknown, 0.9) == 0.7


def test_trained_model_abstains_where_it_would_be_wrong(planted: Planted, tmp_path: Path) -> None:
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


def test_class_weights_are_taken_out_of_the_probabilities(planted: Planted, tmp_path: Path) -> None:
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
