"""Training: what it may look at, that it learns, that it resumes, and that nothing depends on chance."""

import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import LocalCluster
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pathopipe.cluster import spread_calls
from pathopipe.cohort import LabelTable, nested_folds
from pathopipe.errors import UsageError
from pathopipe.mil.bags import array_bag
from pathopipe.mil.fit import TrainingSet, choose_device, find_temperature, fit_network, join_negative, score_bags
from pathopipe.mil.ranking import NESTED, rank_models, write_results
from pathopipe.mil.settings import MilConfig, load_mil_config
from pathopipe.mil.targets import TargetSpec
from pathopipe.mil.train import (
    Cohort,
    Spread,
    TrainRequest,
    check_output,
    one_by_one,
    open_cohorts,
    train_all,
    train_fold,
)

BINARY = TargetSpec(name="label", kind="binary", columns=("label",), classes=("no", "yes"))
QUICK = MilConfig(hidden=16, attention=8, members=2, epochs=8, draws=100, learning_rate=5e-3)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other in bags of ten tiles take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def planted(n: int = 40, features: int = 5, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Bags of which the positive ones hold some tiles far along one direction."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    values = []
    for label in labels:
        tiles = rng.standard_normal((int(rng.integers(4, 12)), features)).astype(np.float32)
        tiles[: 2 * label] += 4
        values.append(tiles)
    return values, labels


def cohort_of(values: list[np.ndarray], labels: np.ndarray, folds: int = 3) -> Cohort:
    names = [f"s{i}" for i in range(len(values))]
    strata = [str(label) for label in labels]
    return Cohort(
        encoder="e",
        bags=tuple(array_bag(name, tiles, encoder="e") for name, tiles in zip(names, values, strict=True)),
        table=LabelTable.of_slides(names),
        specs=(BINARY,),
        truth=labels[:, None].astype(np.float64),
        folds=tuple(nested_folds(names, strata, folds=folds, val_share=0, seed=0)),
        strata=tuple(strata),
    )


def training_set(values: list[np.ndarray], labels: np.ndarray) -> TrainingSet:
    cohort = cohort_of(values, labels)
    return TrainingSet(bags=cohort.bags, truth=cohort.truth, covariates=np.zeros((len(values), 0), np.float32))


def test_the_baseline_is_scikit_learns_logistic_regression() -> None:
    values, labels = planted()
    data, rows = training_set(values, labels), np.arange(30)
    fitted = fit_network("logistic", (BINARY,), data, rows, np.zeros(0, np.intp), MilConfig(logistic_c=0.3), seed=0)
    pooled = np.asarray([np.r_[tiles.mean(axis=0), tiles.max(axis=0)] for tiles in values])
    scaler = StandardScaler().fit(pooled[:30])
    other = LogisticRegression(C=0.3, tol=1e-10, max_iter=10_000).fit(scaler.transform(pooled[:30]), labels[:30])
    found = score_bags(fitted.network, data, np.arange(40))[:, 0]
    np.testing.assert_allclose(found, other.decision_function(scaler.transform(pooled)), atol=1e-3)


@pytest.mark.parametrize("head", ["mean", "max", "abmil", "clam_sb", "clam_mb", "dsmil", "transmil", "additive"])
def test_every_head_learns_a_planted_signal(head: str) -> None:
    result = train_fold(cohort_of(*planted(60)), head, 0, replace_settings(epochs=25, members=1, bag_size=False))
    truth = np.arange(60)[result.test] % 2
    wins = result.test_logits[truth == 1] > result.test_logits[truth == 0].T
    assert wins.mean() > 0.85


def replace_settings(**changes: object) -> MilConfig:
    return QUICK.model_copy(update=changes)


@pytest.mark.parametrize("kind", ["regression", "ordinal", "survival_cox", "survival_discrete"])
def test_other_targets_are_learnt(kind: str) -> None:
    rng = np.random.default_rng(3)
    level = np.arange(60) % 3
    values = [rng.standard_normal((6, 4)).astype(np.float32) + of for of in level]
    spec = TargetSpec(
        name="t",
        kind=kind,
        columns=("t",),
        classes=("a", "b", "c") if kind == "ordinal" else (),  # type: ignore[arg-type]
    )
    time = np.stack([10.0 - 3 * level + rng.random(60), np.ones(60)], axis=1)
    truth = time if kind.startswith("survival") else level[:, None].astype(np.float64)
    cohort = replace(cohort_of(values, level), specs=(spec,), truth=truth)
    result = train_fold(cohort, "abmil", 0, replace_settings(members=1))
    predicted = result.model.interpret(result.test_logits)["t"]
    score = predicted @ np.arange(3) if kind == "ordinal" else predicted[:, 0]
    assert np.corrcoef(score, level[result.test])[0, 1] > 0.8


def test_test_bags_have_no_influence_on_the_model() -> None:
    values, labels = planted()
    first = cohort_of(values, labels)
    test = set(first.folds[0].test.tolist())
    changed = [tiles * 50 if i in test else tiles for i, tiles in enumerate(values)]
    other = cohort_of(changed, np.where([i in test for i in range(40)], 1 - labels, labels))
    other = replace(other, folds=first.folds, strata=first.strata)
    models = [train_fold(cohort, "abmil", 0, QUICK).model for cohort in (first, other)]
    assert models[0].card.temperatures == models[1].card.temperatures
    for a, b in zip(*(m._networks for m in models), strict=True):
        for name, weight in a.state_dict().items():
            torch.testing.assert_close(weight, b.state_dict()[name], rtol=0, atol=0)


def test_a_seed_decides_everything() -> None:
    cohort = cohort_of(*planted())
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first, again, other = (train_fold(cohort, "abmil", 0, QUICK, seed=seed) for seed in (4, 4, 5))
    np.testing.assert_array_equal(first.test_logits, again.test_logits)
    assert np.abs(first.test_logits - other.test_logits).max() > 1e-4
    assert torch.equal(torch.random.get_rng_state(), state)


def test_members_validate_on_all_of_the_training_side() -> None:
    result = train_fold(cohort_of(*planted()), "mean", 0, replace_settings(members=4, epochs=2))
    assert sorted([*result.val, *result.test]) == list(range(40))
    assert result.model.card.members == 4


def test_the_best_epoch_is_restored() -> None:
    values, labels = planted()
    data = training_set(values, labels)
    settings = replace_settings(epochs=15, learning_rate=0.2, patience=15)
    train, val = np.arange(24), np.arange(24, 40)
    fitted = fit_network("abmil", (BINARY,), data, train, val, settings, seed=0)
    losses = [epoch.val_loss for epoch in fitted.history]
    assert fitted.best_epoch == int(np.argmin(losses)) < len(losses) - 1
    logits = score_bags(fitted.network, data, val)[:, 0]
    truth = labels[val]
    loss = np.mean(np.logaddexp(0, logits) - truth * logits)
    assert loss == pytest.approx(min(losses), rel=1e-2)


def test_without_early_stopping_the_last_epoch_stays() -> None:
    data = training_set(*planted())
    settings = replace_settings(epochs=15, learning_rate=0.2, patience=1, early_stop=False)
    train, val = np.arange(24), np.arange(24, 40)
    fitted = fit_network("abmil", (BINARY,), data, train, val, settings, seed=0)
    losses = [epoch.val_loss for epoch in fitted.history]
    assert len(losses) == 15
    assert fitted.best_epoch == 14
    logits, truth = score_bags(fitted.network, data, val)[:, 0], planted()[1][val]
    loss = np.mean(np.logaddexp(0, logits) - truth * logits)
    assert loss == pytest.approx(losses[-1], rel=1e-4)
    assert loss > 1.01 * min(losses)


def test_bags_are_joined_with_negative_ones_only() -> None:
    tiles = torch.arange(5.0)[:, None, None] + torch.tensor([0.1, 0.2])[None, :, None]
    real = torch.tensor([[True, True], [True, False], [True, True], [True, True], [True, True]])
    truth = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, torch.nan], [0.0, 0.0], [1.0, 1.0]])
    torch.manual_seed(0)
    partners = set()
    for _ in range(40):
        joined, kept = join_negative(tiles, real, truth, 1.0)
        torch.testing.assert_close(joined[:, :2], tiles)
        assert torch.equal(kept[:, :2], real)
        for bag in range(5):
            added = joined[bag, 2:][kept[bag, 2:]][:, 0].tolist()
            # A negative bag may draw itself, and is left alone then. Padding stays padding.
            assert added in ([], [pytest.approx(1.1)], pytest.approx([3.1, 3.2]))
            partners.add((bag, int(added[0]) if added else None))
    alone = {(1, None), (3, None)}
    assert partners == {(bag, other) for bag in range(5) for other in (1, 3) if bag != other} | alone


def test_bags_are_joined_as_often_as_asked() -> None:
    tiles, real, truth = torch.zeros(2000, 1, 1), torch.ones(2000, 1, dtype=torch.bool), torch.ones(2000, 1)
    assert join_negative(tiles, real, truth, 1.0)[1].shape == (2000, 1)  # no negative bag
    truth[:1000] = 0
    torch.manual_seed(0)
    joined = join_negative(tiles, real, truth, 0.3)[1]
    assert joined[:, 0].all()
    assert joined[:, 1].float().mean() == pytest.approx(0.3, abs=0.04)


def test_joined_bags_teach_attention_the_positive_tiles() -> None:
    values, labels = planted(60)
    data, rows = training_set(values, labels), np.arange(60)
    settings = replace_settings(epochs=25, join=1.0, early_stop=False, dropout=0.0)
    fitted = fit_network("abmil", (BINARY,), data, rows[:40], rows[40:], settings, seed=0)
    for bag in rows[40:][labels[40:] == 1]:
        shown = torch.from_numpy(values[bag])[None]
        attention = fitted.network(shown, torch.ones(shown.shape[:2], dtype=torch.bool)).attention
        assert attention is not None
        weights = attention.detach()[0, :, 0]
        assert set(torch.topk(weights, 2).indices.tolist()) == {0, 1}


def test_joining_is_refused_where_labels_would_not_stay() -> None:
    data, rows = training_set(*planted()), np.arange(30)
    ordinal = replace(BINARY, kind="ordinal", classes=("a", "b", "c"))
    with pytest.raises(UsageError, match="label is ordinal; set mil.join=0"):
        fit_network("abmil", (ordinal,), data, rows, rows[:0], replace_settings(join=0.5), seed=0)
    with pytest.raises(UsageError, match=r"mil\.centre"):
        fit_network("abmil", (BINARY,), data, rows, rows[:0], replace_settings(join=0.5, centre=True), seed=0)


def test_gradients_add_up_over_parts_of_a_step() -> None:
    values, labels = planted()
    data, train = training_set(values, labels), np.arange(32)
    whole = replace_settings(epochs=1, dropout=0.0, batch_bags=8)
    parted = whole.model_copy(update={"batch_tiles": 24})
    weights = []
    for settings in (whole, parted):
        fitted = fit_network("mean", (BINARY,), data, train, np.arange(32, 40), settings, seed=0)
        weights.append(fitted.network.state_dict()["classify.weight"])
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


def test_temperature_finds_overconfidence() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4000, 1)) * 2
    truth = (rng.random((4000, 1)) < 1 / (1 + np.exp(-logits))).astype(float)
    assert find_temperature((BINARY,), 0, logits * 3, truth) == pytest.approx(3, rel=0.1)
    assert find_temperature((replace(BINARY, kind="regression", classes=()),), 0, logits, truth) == 1


def test_devices() -> None:
    assert choose_device("cpu") == "cpu"
    with pytest.raises(UsageError, match="choose auto, cpu or cuda"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        assert choose_device("auto") == "cpu"
        with pytest.raises(UsageError, match="no CUDA"):
            choose_device("cuda")


@pytest.mark.gpu
def test_a_gpu_trains_in_mixed_precision() -> None:
    result = train_fold(cohort_of(*planted(60)), "abmil", 0, replace_settings(members=1), device="cuda")
    truth = np.arange(60)[result.test] % 2
    assert (result.test_logits[truth == 1] > result.test_logits[truth == 0].T).mean() > 0.85


def test_settings_are_strict() -> None:
    assert load_mil_config(None, ["mil.epochs=3", "mil.classes.grade=[1, 2]"]).classes == {"grade": ("1", "2")}
    with pytest.raises(UsageError, match="did you mean 'epochs'"):
        load_mil_config(None, ["mil.epoch=3"])
    with pytest.raises(UsageError, match=r"mil\.dropout"):
        load_mil_config(None, ["mil.dropout=2"])
    with pytest.raises(UsageError, match=r"mil\.key=value"):
        load_mil_config(None, ["tiles.mpp=1"])


# --- folders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def request_of(tmp_path: Path) -> TrainRequest:
    values, _ = planted(24)
    (tmp_path / "features").mkdir()
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "patient_id", "site", "label", "age"])
        for i, tiles in enumerate(values):
            np.savez(tmp_path / "features" / f"s{i:02d}.npz", features=tiles)
            writer.writerow(
                [f"s{i:02d}", f"p{i // 2:02d}", "AB"[i % 3 > 0], ["no", "yes"][(i // 2) % 2], "" if i == 3 else 30 + i]
            )
    return TrainRequest(
        manifest=tmp_path / "labels.csv",
        features=tmp_path / "features",
        target="label",
        out=tmp_path / "out",
        folds=2,
        heads=("mean",),
        covariates=("age",),
        settings=replace_settings(epochs=2),
    )


def run(request: TrainRequest, spread: Spread = one_by_one) -> list[str]:
    lines: list[str] = []
    cohorts, _ = open_cohorts(request)
    check_output(request, cohorts)
    jobs = train_all(request, cohorts, lines.append, spread)
    write_results(request.out, rank_models(request, cohorts, jobs))
    return lines


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_fold_is_kept_and_a_lost_one_comes_back_the_same(request_of: TrainRequest) -> None:
    assert len(run(request_of)) == 4
    first = contents(request_of.out)
    assert run(request_of) == ["4 of 4 models were there already"]
    folder = request_of.out / "features" / "mean" / "fold1"
    shutil.rmtree(folder)
    lines = run(request_of)
    assert lines[0] == "3 of 4 models were there already" and len(lines) == 2
    again = contents(request_of.out)
    assert set(first) == set(again)
    # Only the clock may differ.
    assert {name for name in first if first[name] != again[name]} <= {"features/mean/fold1/history.csv"}


def test_patients_stay_whole_and_each_bag_is_tested_once(request_of: TrainRequest) -> None:
    run(request_of)
    with (request_of.out / "splits.csv").open() as file:
        rows = list(csv.DictReader(file))
    tested = [row["bag_id"] for row in rows if row["part"] == "test"]
    assert sorted(tested) == [f"s{i:02d}" for i in range(24)]
    parts: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        parts.setdefault((row["fold"], row["patient_id"]), set()).add(row["part"])
    assert all(len(of) == 1 for of in parts.values())
    with (request_of.out / "features" / "mean" / "fold0" / "predictions.csv").open() as file:
        predicted = list(csv.DictReader(file))
    assert {row["bag_id"] for row in predicted if row["part"] == "test"} == {
        row["bag_id"] for row in rows if row["part"] == "test" and row["fold"] == "0"
    }
    assert all(float(row["label_p_no"]) + float(row["label_p_yes"]) == pytest.approx(1) for row in predicted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"folds": 3}, "folds was 2, now 3"),
        ({"settings": replace_settings(epochs=3)}, r"settings\.epochs was 2, now 3"),
    ],
)
def test_other_settings_are_refused(request_of: TrainRequest, change: dict[str, object], message: str) -> None:
    cohorts, _ = open_cohorts(request_of)
    check_output(request_of, cohorts)
    other = replace(request_of, **change)  # type: ignore[arg-type]
    cohorts, _ = open_cohorts(other)
    with pytest.raises(UsageError, match=message):
        check_output(other, cohorts)


def test_no_folder_above_is_told(request_of: TrainRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies beside the output folder is found from there; of other files the name alone is kept."""
    run(request_of)
    config = json.loads((request_of.out / "config.json").read_text())
    assert (config["manifest"], config["features"]) == ("../labels.csv", "../features")
    # Both are the same from another folder, and when all of it has been moved.
    home = request_of.out.parent
    monkeypatch.chdir(home)
    here = replace(request_of, manifest=Path("labels.csv"), features=Path("features"), out=Path("out"))
    assert run(here) == ["4 of 4 models were there already"]
    moved = home.with_name(f"{home.name}-moved")
    home.rename(moved)
    there = replace(here, manifest=moved / "labels.csv", features=moved / "features", out=moved / "out")
    assert run(there) == ["4 of 4 models were there already"]

    (moved / "models").mkdir()
    far = replace(there, out=moved / "models" / "nurse" / "out")
    cohorts, _ = open_cohorts(far)
    check_output(far, cohorts)
    config = json.loads((far.out / "config.json").read_text())
    assert (config["manifest"], config["features"]) == ("labels.csv", "features")
    check_output(far, cohorts)
    with pytest.raises(UsageError, match=r"manifest was labels\.csv, now others\.csv"):
        check_output(replace(far, manifest=moved / "others.csv"), cohorts)


def test_changed_labels_are_refused_and_more_heads_are_not(request_of: TrainRequest) -> None:
    run(request_of)
    assert "4 of 6" in run(replace(request_of, heads=("mean", "max")))[0]
    text = request_of.manifest.read_text()
    request_of.manifest.write_text(text.replace("p00,", "p99,"))
    cohorts, _ = open_cohorts(request_of)
    with pytest.raises(UsageError, match="other labels"):
        check_output(request_of, cohorts)


def test_dask_workers_give_the_same_models(request_of: TrainRequest) -> None:
    run(request_of)
    parallel = replace(request_of, out=request_of.out.with_name("parallel"))
    lines = run(parallel, partial(spread_calls, workers=2))
    assert sum("networks" in line or "fitted" in line for line in lines) == 4
    one, two = contents(request_of.out), contents(parallel.out)
    assert set(one) == set(two)
    assert all(one[name] == two[name] for name in one if name.endswith((".safetensors", "predictions.csv")))


def _fails(number: int) -> str:
    if number == 1:
        raise UsageError("planted")
    return f"did {number}"


def test_what_a_worker_raises_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="planted"):
        list(spread_calls(_fails, [(1,)], workers=1))
    with pytest.raises(UsageError, match=r"--scheduler tcp://127.0.0.1:9: no Dask scheduler answers there"):
        list(spread_calls(_fails, [(0,)], workers=1, scheduler="tcp://127.0.0.1:9"))


def test_an_existing_dask_scheduler_can_be_used() -> None:
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0", protocol="tcp"
    ) as cluster:
        done = dict(spread_calls(_fails, [(0,), (2,)], workers=1, scheduler=cluster.scheduler_address))
    assert done == {0: "did 0", 1: "did 2"}


def test_results_name_the_nested_choice(request_of: TrainRequest) -> None:
    run(request_of)
    (record,) = json.loads((request_of.out / "results.json").read_text())
    assert set(record["models"]) == {"features mean", "features logistic", NESTED}
    assert len(record["nested_choice"]) == 2
    assert any("optimistic" in line for line in record["says"])
    with (request_of.out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    auroc = [row for row in rows if row["figure"] == "auroc" and row["head"] == "mean" and not row["site"]]
    assert len(auroc) == 1 and auroc[0]["patients"] == "12"
