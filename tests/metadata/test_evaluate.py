"""Figures against scikit-learn and by hand; gains that are paired; classes that are missing say so."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, balanced_accuracy_score, confusion_matrix, roc_auc_score

from pathopipe.errors import StoreError, UsageError
from pathopipe.metadata.evaluate import (
    ALL,
    BASELINE,
    MULTITASK,
    OutOfFold,
    evaluate,
    evaluation_json,
    figure_rows,
    read_oof,
    write_evaluation,
)
from pathopipe.metadata.tasks import TaskSpec

TASK = TaskSpec(name="stage", column="stage", kind="multi-class", classes=("a", "b", "c"))


def probabilities(truth: np.ndarray, k: int, skill: float, rng: np.random.Generator) -> np.ndarray:
    logits = rng.standard_normal((len(truth), k))
    known = np.isfinite(truth)
    logits[known, truth[known].astype(int)] += skill
    shares = np.exp(logits)
    return shares / shares.sum(axis=1, keepdims=True)


def out_of_fold(
    truth: Mapping[str, np.ndarray],
    tasks: tuple[TaskSpec, ...],
    model: Mapping[str, np.ndarray],
    baseline: Mapping[str, np.ndarray],
    patients: list[str] | None = None,
) -> OutOfFold:
    n = len(next(iter(truth.values())))
    views = {(MULTITASK, ALL): model, (MULTITASK, "image"): baseline, (BASELINE, "image"): baseline}
    return OutOfFold(
        slide_ids=tuple(f"s{number}" for number in range(n)),
        patients=tuple(patients or [f"p{number}" for number in range(n)]),
        sites=("",) * n,
        folds=tuple("01"[number % 2] for number in range(n)),
        tasks=tasks,
        truth=truth,
        scores=views,
        abstained={view: {task.name: np.arange(n) % 4 == 0 for task in tasks} for view in views},
        used=dict.fromkeys(views, ("image",) * n),
    )


def drawn(skill: float, base: float, *, n: int = 240, seed: int = 0) -> OutOfFold:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, n).astype(float)
    return out_of_fold(
        {"stage": truth[:, None]},
        (TASK,),
        {"stage": probabilities(truth, 3, skill, rng)},
        {"stage": probabilities(truth, 3, base, rng)},
    )


def test_figures_are_those_of_scikit_learn() -> None:
    oof = drawn(1.0, 0.5)
    found = evaluate(oof, draws=100).find("stage")
    truth, scores = oof.truth["stage"][:, 0].astype(int), oof.scores[MULTITASK, ALL]["stage"]
    assert found.value("auroc") == pytest.approx(roc_auc_score(truth, scores, multi_class="ovr"))
    precise = np.mean([average_precision_score(truth == k, scores[:, k]) for k in range(3)])
    assert found.value("auprc") == pytest.approx(precise)
    assert found.value("balanced_accuracy") == pytest.approx(balanced_accuracy_score(truth, scores.argmax(axis=1)))
    assert found.confusion.tolist() == confusion_matrix(truth, scores.argmax(axis=1)).tolist()
    assert 0 < found.value("ece") < 0.5
    main = found.table.find("auroc")
    assert main.low < main.value < main.high
    assert (found.n_slides, found.n_patients) == (240, 240)


def test_share_right_counts_slides_on_which_the_model_did_not_abstain() -> None:
    oof = drawn(1.0, 0.5)
    found = evaluate(oof, draws=100).find("stage")
    given = np.arange(240) % 4 != 0
    right = oof.scores[MULTITASK, ALL]["stage"].argmax(axis=1) == oof.truth["stage"][:, 0]
    assert found.n_given == given.sum()
    assert found.given_right == pytest.approx(right[given].mean())


def test_ordinal_tasks_have_auroc_and_kappa() -> None:
    oof = drawn(1.0, 0.5)
    plain = evaluate(oof, draws=100).find("stage")
    ordinal = evaluate(replace(oof, tasks=(replace(TASK, kind="ordinal"),)), draws=100).find("stage")
    assert ordinal.value("auroc") == plain.value("auroc")
    assert ordinal.value("kappa_quadratic") is not None
    assert plain.value("kappa_quadratic") is None


def test_slides_without_a_record_or_prediction_are_left_out() -> None:
    oof = drawn(1.0, 0.5)
    truth, scores = oof.truth["stage"].copy(), oof.scores[MULTITASK, ALL]["stage"].copy()
    truth[:30], scores[30:50] = np.nan, np.nan
    parted = replace(oof, truth={"stage": truth}, scores={**oof.scores, (MULTITASK, ALL): {"stage": scores}})
    found = evaluate(parted, draws=100)
    assert found.find("stage").n_slides == 190
    assert found.find("stage", (BASELINE, "image")).n_slides == 210
    assert found.gain("stage").n_slides == 190
    expected = roc_auc_score(truth[50:, 0].astype(int), scores[50:], multi_class="ovr")
    assert found.find("stage").value("auroc") == pytest.approx(expected)
    assert found.gain("stage").value == pytest.approx(expected)


def test_a_missing_class_gives_no_value_and_says_which() -> None:
    oof = drawn(1.0, 0.5)
    truth = np.where(oof.truth["stage"] == 2, np.nan, oof.truth["stage"])
    found = evaluate(replace(oof, truth={"stage": truth}), draws=100)
    figure = found.find("stage").table.find("auroc")
    assert figure.value is None
    assert "class c" in figure.note
    assert found.gain("stage").difference is None
    assert "class c" in found.gain("stage").note
    assert found.gain("").value is None


def test_a_task_without_any_record_says_so() -> None:
    oof = drawn(1.0, 0.5)
    found = evaluate(replace(oof, truth={"stage": np.full((240, 1), np.nan)}), draws=100)
    assert found.find("stage").table is None
    assert "no slide has both" in found.find("stage").why
    assert found.find("stage").value("auroc") is None
    assert next(row["note"] for row in figure_rows(found)) == found.find("stage").why


# --- gains -------------------------------------------------------------------------------------------------------


def test_gain_is_the_difference_and_its_interval_excludes_zero_where_the_model_is_better() -> None:
    oof = drawn(2.0, 0.5)
    gain = evaluate(oof, draws=200).gain("stage")
    truth = oof.truth["stage"][:, 0].astype(int)
    better, worse = (
        roc_auc_score(truth, oof.scores[view]["stage"], multi_class="ovr") for view in (gain.view, gain.over)
    )
    assert gain.difference == pytest.approx(better - worse)
    assert gain.baseline == pytest.approx(worse)
    assert 0 < gain.low < gain.difference < gain.high


def test_gain_of_a_model_over_itself_is_zero_for_sure() -> None:
    gain = evaluate(drawn(1.0, 0.5), draws=100).gain("stage", (MULTITASK, "image"))
    assert (gain.difference, gain.low, gain.high) == (0, 0, 0)


def test_pairing_makes_the_interval_narrow() -> None:
    oof = drawn(1.0, 0.5)
    scores = oof.scores[MULTITASK, ALL]["stage"]
    near = scores + np.random.default_rng(1).normal(0, 0.01, scores.shape)
    near = np.clip(near, 0.001, None)
    near /= near.sum(axis=1, keepdims=True)
    paired = replace(oof, scores={**oof.scores, (BASELINE, "image"): {"stage": near}})
    found = evaluate(paired, draws=200)
    gain, own = found.gain("stage"), found.find("stage").table.find("auroc")
    assert gain.high - gain.low < (own.high - own.low) / 4


def test_slides_of_a_patient_count_as_one() -> None:
    oof = drawn(1.0, 0.5, n=60)
    doubled = out_of_fold(
        {"stage": np.repeat(oof.truth["stage"], 4, axis=0)},
        (TASK,),
        {"stage": np.repeat(oof.scores[MULTITASK, ALL]["stage"], 4, axis=0)},
        {"stage": np.repeat(oof.scores[BASELINE, "image"]["stage"], 4, axis=0)},
        [f"p{number // 4:02d}" for number in range(240)],
    )
    one, four = (evaluate(which, draws=300).gain("stage") for which in (oof, doubled))
    assert four.difference == pytest.approx(one.difference)
    assert (four.n_slides, four.n_patients) == (240, 60)
    assert four.high - four.low == pytest.approx(one.high - one.low, rel=0.3)


def test_mean_over_tasks_leaves_out_what_has_no_auroc() -> None:
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 3, 200).astype(float)
    several = TaskSpec(name="labels", column="labels", kind="multi-label", classes=("x", "y"))
    size = TaskSpec(name="size", column="size", kind="continuous")
    labels = np.stack([truth == 0, truth == 1], axis=1).astype(float)
    labels[:20, 0] = np.nan
    good = {
        "stage": probabilities(truth, 3, 2.0, rng),
        "labels": np.clip(labels * 0.4 + rng.random((200, 2)) * 0.6, 0, 1),
    }
    good["labels"][:20, 0] = 0.5
    bad = {"stage": probabilities(truth, 3, 0.2, rng), "labels": rng.random((200, 2))}
    good["size"], bad["size"] = truth[:, None] + rng.normal(0, 0.1, (200, 1)), rng.random((200, 1))
    oof = out_of_fold(
        {"stage": truth[:, None], "labels": labels, "size": truth[:, None]}, (TASK, several, size), good, bad
    )
    found = evaluate(oof, draws=100)
    by_task = [found.gain("stage"), found.gain("labels")]
    assert found.gain("").difference == pytest.approx(np.mean([gain.difference for gain in by_task]))
    assert "1 have no AUROC" in found.gain("").note
    assert found.gain("size").value is None
    assert found.find("size").value("spearman") > 0.9
    expected = np.mean(
        [roc_auc_score(labels[20:, 0], good["labels"][20:, 0]), roc_auc_score(labels[:, 1], good["labels"][:, 1])]
    )
    assert found.gain("labels").value == pytest.approx(expected)
    assert found.find("labels").confusion is None


# --- files -------------------------------------------------------------------------------------------------------


def test_evaluation_is_written_as_table_and_json(tmp_path: Path) -> None:
    found = evaluate(drawn(1.0, 0.5), draws=100)
    write_evaluation(tmp_path, found)
    header, first = (tmp_path / "figures.csv").read_text().splitlines()[:2]
    assert header.startswith("task,model,shown,slides,figure,label,value,low,high,patients")
    assert first.startswith("stage,multitask,all,240,auroc,,0.")
    record = evaluation_json(found)
    assert [gain["task"] for gain in record["gains"]] == ["mean", "stage"] * 2
    assert sum(map(sum, record["confusion"][0]["slides"])) == 240


def test_a_folder_without_a_training_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no finished training"):
        read_oof(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StoreError, match="can't be read"):
        read_oof(tmp_path)
