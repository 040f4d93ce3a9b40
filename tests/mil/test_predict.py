"""Folds as one ensemble: who scores whom, means, what goes into stores, and what the top tiles carry."""

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pathopipe.errors import UsageError
from pathopipe.mil.bags import Bag, TilePlaces, array_bag
from pathopipe.mil.heads import HeadShape, build_head
from pathopipe.mil.model import MilModel, ModelCard
from pathopipe.mil.predict import (
    Ensemble,
    find_ensembles,
    load_ensemble,
    measure_faithfulness,
    output_label,
    predict_bag,
    store_prediction,
)
from pathopipe.mil.scored import cases_of_folds, prediction_rows, read_scored, validation_threshold, write_rows
from pathopipe.mil.targets import TargetSpec
from pathopipe.records import TileGrid
from pathopipe.store import SlideStore

torch.set_num_threads(1)

BINARY = TargetSpec(name="outcome", kind="binary", columns=("outcome",), classes=("normal", "tumour"))
GRADE = TargetSpec(name="grade", kind="multiclass", columns=("grade",), classes=("a", "b", "c"))


def save_model(
    folder: Path, head: str = "abmil", *, seed: int = 0, targets: Sequence[TargetSpec] = (BINARY,), features: int = 4
) -> None:
    torch.manual_seed(seed)
    shape = HeadShape(features=features, outputs=sum(spec.outputs for spec in targets), hidden=8, attention=4)
    card = ModelCard(
        head=head,
        shape=shape,
        targets=tuple(targets),
        encoder="handcrafted",
        encoder_id="handcrafted@abc",
        temperatures=(1.5,) * len(targets),
    )
    MilModel(card, [build_head(head, shape)]).save(folder)


def save_training(root: Path, head: str = "abmil", *, by: str = "slide") -> Path:
    """Three folds over the patients p0 to p5; fold k tests on the patients 2k and 2k + 1. p6 is never tested."""
    rows = []
    for fold in range(3):
        save_model(root / "handcrafted" / head / f"fold{fold}", head, seed=fold)
        for patient in range(7):
            part = "test" if patient // 2 == fold else "val" if patient // 2 == (fold + 1) % 3 else "train"
            rows.append({"bag_id": f"s{patient}", "patient_id": f"p{patient}", "fold": fold, "part": part})
    with (root / "splits.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (root / "config.json").write_text(json.dumps({"by": by}))
    return root


def bag(name: str, patient: str, n: int = 30, *, encoder: str = "handcrafted@abc", features: int = 4) -> Bag:
    values = np.random.default_rng(0).normal(size=(n, features)).astype(np.float32)
    made = array_bag(name, values, patient_id=patient)
    sources = (replace(made.sources[0], encoder=encoder.partition("@")[0], encoder_id=encoder),)
    return replace(made, sources=sources)


@pytest.fixture
def ensemble(tmp_path: Path) -> Ensemble:
    return load_ensemble(save_training(tmp_path))


# ---- who scores whom


def test_patients_of_the_cohort_are_scored_out_of_fold(ensemble: Ensemble) -> None:
    for patient in range(6):
        assert ensemble.choose(bag("x", f"p{patient}")) == ((patient // 2,), "test")
    assert ensemble.choose(bag("x", "someone")) == ((0, 1, 2), "new")


def test_a_slide_is_known_by_its_id_where_no_patient_is_stated(ensemble: Ensemble) -> None:
    assert ensemble.choose(bag("s4", "s4")) == ((2,), "test")


def test_a_patient_that_no_model_has_not_seen_is_refused(ensemble: Ensemble) -> None:
    with pytest.raises(UsageError, match="patient p6 was used in training by every model"):
        ensemble.choose(bag("x", "p6"))
    assert ensemble.choose(bag("x", "p6"), allow_training=True) == ((0, 1, 2), "train")


def test_a_single_model_still_knows_whom_it_has_seen(tmp_path: Path) -> None:
    save_training(tmp_path)
    one = load_ensemble(tmp_path / "handcrafted" / "abmil" / "fold1")
    assert one.choose(bag("x", "p2")) == ((0,), "test")
    with pytest.raises(UsageError, match="used in training"):
        one.choose(bag("x", "p0"))


# ---- which models


def test_folds_are_found_in_their_order(tmp_path: Path) -> None:
    for fold in (10, 2, 0):
        save_model(tmp_path / "enc" / "abmil" / f"fold{fold}")
    found = find_ensembles(tmp_path)
    assert [place.name for place in found["enc/abmil"]] == ["fold0", "fold2", "fold10"]
    assert find_ensembles(tmp_path / "enc" / "abmil" / "fold2") == {"enc/abmil": [tmp_path / "enc/abmil/fold2"]}


def test_of_several_heads_the_best_is_taken(tmp_path: Path) -> None:
    save_training(tmp_path)
    save_training(tmp_path, "mean")
    with pytest.raises(UsageError, match="holds several models"):
        load_ensemble(tmp_path)
    values = {"handcrafted abmil": 0.7, "handcrafted mean": 0.8, "handcrafted clam_sb": 0.9, "chosen inside": 0.95}
    models = {name: {"figures": [{"figure": "auroc", "value": value}]} for name, value in values.items()}
    (tmp_path / "results.json").write_text(json.dumps([{"target": "outcome", "models": models}]))
    assert load_ensemble(tmp_path).name == "outcome.mean.handcrafted"
    assert load_ensemble(tmp_path / "handcrafted" / "abmil").name == "outcome.abmil.handcrafted"


def test_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no model\.json"):
        load_ensemble(tmp_path)


def test_weights_tell_trainings_apart(tmp_path: Path) -> None:
    first = load_ensemble(save_training(tmp_path / "a"))
    assert load_ensemble(save_training(tmp_path / "b")).weights == first.weights
    save_model(tmp_path / "b" / "handcrafted" / "abmil" / "fold1", seed=9)
    assert load_ensemble(tmp_path / "b").weights != first.weights


# ---- predictions


def test_an_ensemble_is_the_mean_of_calibrated_probabilities(ensemble: Ensemble) -> None:
    one = bag("x", "someone")
    found = predict_bag(ensemble, one)
    each = [model.predict(one) for model in ensemble.models]
    assert found.probabilities["outcome"] == pytest.approx(np.mean([e.probabilities["outcome"] for e in each], axis=0))
    assert found.logits == pytest.approx(np.mean([e.logits for e in each], axis=0), rel=1e-6)
    assert found.attention is not None
    assert found.attention == pytest.approx(np.mean([e.attention for e in each], axis=0), rel=1e-5)
    assert found.attention.sum() == pytest.approx(1, abs=1e-5)
    alone = predict_bag(ensemble, bag("x", "p3"))
    assert alone.probabilities["outcome"] == pytest.approx(each[1].probabilities["outcome"])
    assert alone.seen == "test"


def test_other_features_are_refused(ensemble: Ensemble) -> None:
    ensemble.check_features([bag("x", "x")])
    with pytest.raises(UsageError, match=r"x: the model was trained on encoder handcrafted@abc.*other@abc"):
        ensemble.check_features([bag("x", "x", encoder="other@abc")])
    with pytest.raises(UsageError, match="other weights"):
        ensemble.check_features([bag("x", "x", encoder="handcrafted@def")])
    with pytest.raises(UsageError, match="width 5"):
        ensemble.check_features([bag("x", "x", features=5)])


def test_an_empty_bag_is_refused(ensemble: Ensemble) -> None:
    with pytest.raises(UsageError, match="no tile"):
        predict_bag(ensemble, bag("x", "x", n=0))


def test_labels_of_outputs() -> None:
    ordinal = TargetSpec(name="stage", kind="ordinal", columns=("stage",), classes=("1", "2", "3"))
    assert output_label([BINARY], 0) == "tumour"
    assert [output_label([GRADE], k) for k in range(3)] == ["a", "b", "c"]
    assert [output_label([BINARY, GRADE, ordinal], k) for k in (0, 2, 5)] == [
        "outcome tumour",
        "grade b",
        "stage above 2",
    ]


# ---- into stores


class _Placed:
    """A source that says where its tiles are."""

    def __init__(self, inner: object, places: TilePlaces) -> None:
        self._inner, self._places = inner, places

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def places(self) -> TilePlaces:
        return self._places


@pytest.mark.parametrize("head", ["abmil", "clam_mb", "additive", "logistic"])
def test_maps_go_to_the_tiles_they_are_of(tmp_path: Path, head: str) -> None:
    """Two slides of one patient, each with a bad row: values land on the good rows, the bad ones are NaN."""
    ensemble = load_ensemble(save_training(tmp_path / "t", head))
    values = np.random.default_rng(1).normal(size=(6, 4)).astype(np.float32)
    good = [np.array([0, 2, 3]), np.array([0, 1, 3])]
    sources, stores = [], []
    for number, rows in enumerate(good):
        store = _store(tmp_path / f"slide{number}.zarr", f"slide{number}")
        places = TilePlaces(
            slide_id=f"slide{number}",
            path=store.path,
            grid="256px-0.5um",
            xy_l0=None,
            side_l0=None,
            rows=rows.astype(np.intp),
            n_rows=4,
        )
        part = array_bag(f"slide{number}", values[3 * number : 3 * number + 3], encoder="handcrafted@abc")
        sources.append(_Placed(part.sources[0], places))
        stores.append(store)
    one = Bag(bag_id="patient", patient_id="someone", site="", sources=tuple(sources))  # type: ignore[arg-type]
    found = predict_bag(ensemble, one)
    written = store_prediction(ensemble, found)
    assert [store.path for store in written] == [store.path for store in stores]
    for number, store in enumerate(stores):
        back = store.predictions(ensemble.name)
        assert back.logits == pytest.approx(found.logits)
        assert back.about["probabilities"]["outcome"] == pytest.approx(found.probabilities["outcome"].tolist())
        assert back.about["seen"] == "new"
        assert back.about["folds"] == ["fold0", "fold1", "fold2"]
        if head == "logistic":
            assert back.attention is None
            continue
        assert back.attention is not None and found.attention is not None
        assert np.isnan(back.attention[[row for row in range(4) if row not in good[number]]]).all()
        own = slice(3 * number, 3 * number + 3)
        assert back.attention[good[number], 0] == pytest.approx(found.attention[own, 0])
        if head == "additive":
            assert [one["kind"] for one in back.about["maps"]] == ["attention", "contribution"]
            assert found.contributions is not None
            assert back.attention[good[number], 1] == pytest.approx(found.contributions[own, 0])


def _store(path: Path, slide_id: str) -> SlideStore:
    grid = TileGrid(
        name="256px-0.5um",
        side_px=256,
        mpp=0.5,
        achieved_mpp=(0.5, 0.5),
        overlap_px=0,
        side_l0=(256, 256),
        stride_l0=(256.0, 256.0),
        level=0,
        read_px=(256, 256),
        resample="none",
        xy_l0=np.array([[0, 0], [256, 0], [0, 256], [256, 256]], np.int64),
        tissue_fraction=np.ones(4, np.float32),
    )
    store = SlideStore(path)
    store.write_attributes("", {"pathopipe": {"schema_version": 1, "slide": {"id": slide_id}}})
    store.write_grid(grid, {"made": "here"})
    return store


def test_features_of_other_programs_have_no_store(ensemble: Ensemble) -> None:
    assert store_prediction(ensemble, predict_bag(ensemble, bag("x", "someone"))) == []


# ---- which tiles matter


def signal_model(head: str = "mean") -> Ensemble:
    """A model whose logit is the (weighted) mean over tiles of a known function: large where feature 0 is."""
    shape = HeadShape(features=2, outputs=1, hidden=4, attention=2)
    torch.manual_seed(0)
    network = build_head(head, shape)
    state = network.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            if name == "project.1.weight":
                value.zero_()
                value[0, 0], value[1, 0] = 1.0, -1.0
            elif name.endswith("bias"):
                value.zero_()
            elif name == "classify.weight":
                value.copy_(torch.tensor([[4.0, -4.0, 0.0, 0.0]]))
    card = ModelCard(head=head, shape=shape, targets=(BINARY,), encoder="e", encoder_id="e", temperatures=(1.0,))
    model = MilModel(card, [network])
    return Ensemble(name="m", models=(model,), folders=(Path("fold0"),), parts={}, patients={}, by="slide", weights="w")


def test_the_top_tiles_carry_the_prediction() -> None:
    ensemble = signal_model()
    values = np.full((100, 2), -1.0, np.float32)
    values[:30, 0] = 3.0
    found = predict_bag(ensemble, array_bag("x", values, encoder="e"))
    # Follow the positive class: its top contributions are the 30 planted tiles.
    measured = measure_faithfulness(ensemble, found, followed=1)
    assert measured is not None
    assert measured.ranked_by == "contribution"
    assert measured.output == "tumour"
    assert measured.shares == (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    assert measured.whole == pytest.approx(found.probabilities["outcome"][1])
    for top, random in zip(measured.without_top[2:], measured.without_random[2:], strict=True):
        assert top < random
    # Without the upper half only tiles of one kind are left; at random the mixture stays.
    alone = predict_bag(ensemble, array_bag("x", values[50:], encoder="e")).probabilities["outcome"][1]
    assert measured.without_top[-1] == pytest.approx(alone, abs=1e-6)
    assert measured.without_random[-1] == pytest.approx(measured.whole, abs=0.15)
    # What speaks for the negative class is the other end of the same map.
    other = measure_faithfulness(ensemble, found, followed=0)
    assert other is not None
    assert other.whole == pytest.approx(1 - measured.whole)
    assert other.without_top[-1] < other.without_random[-1]
    assert "without the top 10% of tiles" in measured.line()


def test_tiles_at_random_are_the_same_every_time_and_few_tiles_are_no_trouble(ensemble: Ensemble) -> None:
    found = predict_bag(ensemble, bag("x", "someone"))
    assert measure_faithfulness(ensemble, found) == measure_faithfulness(ensemble, found)
    small = measure_faithfulness(ensemble, predict_bag(ensemble, bag("x", "someone", n=1)))
    assert small is not None
    assert small.shares == ()
    assert small.line() == "faithfulness: too few tiles"


def test_heads_that_mark_no_tile_have_no_faithfulness(tmp_path: Path) -> None:
    ensemble = load_ensemble(save_training(tmp_path, "logistic"))
    assert measure_faithfulness(ensemble, predict_bag(ensemble, bag("x", "someone"))) is None


# ---- tables


def test_thresholds_from_validation() -> None:
    truth = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1], float)
    score = np.array([0.05, 0.1, 0.12, 0.15, 0.2, 0.35, 0.3, 0.4, 0.6, 0.9])
    # At 0.25 all positives and 5 of 6 negatives are right, at 0.375 3 of 4 and all: 0.917 against 0.875.
    assert validation_threshold(truth, score) == pytest.approx(0.25)
    assert validation_threshold(truth[:9], score[:9]) is None
    assert validation_threshold(np.zeros(20), np.linspace(0, 1, 20)) is None
    assert validation_threshold(truth, np.full(10, 0.5)) is None


def write_fold(folder: Path, rows: list[tuple[str, str, str, str, float]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "bag_id",
                "patient_id",
                "site",
                "part",
                "outcome",
                "outcome_logit_0",
                "outcome_p_normal",
                "outcome_p_tumour",
            ]
        )
        for name, patient, part, label, p in rows:
            writer.writerow([name, patient, "", part, label, 0.0, 1 - p, p])


def test_test_rows_of_all_folds_at_their_own_thresholds(tmp_path: Path) -> None:
    val = [(f"v{n}", f"v{n}", "val", "tumour" if n >= 5 else "normal", n / 20) for n in range(10)]
    write_fold(tmp_path / "fold0", [*val, ("a", "pa", "test", "tumour", 0.3), ("b", "pb", "test", "normal", 0.1)])
    write_fold(tmp_path / "fold1", [("c", "pc", "test", "tumour", 0.3), ("d", "pd", "test", "", 0.1)])
    folds = [read_scored(tmp_path / name, [BINARY]) for name in ("fold0", "fold1")]
    cases = cases_of_folds(folds, [BINARY], 0)
    assert cases.patient_ids == ("pa", "pb", "pc")
    assert cases.truth.tolist() == [1, 0, 1]
    assert cases.fold is not None
    assert cases.fold.tolist() == [0, 0, 1]
    # The validation bags of fold 0 part between 0.2 and 0.25; fold 1 has none.
    assert cases.threshold == pytest.approx([0.225, 0.225, 0.5])
    assert cases.threshold_from == "from validation"
    given = cases_of_folds(folds, [BINARY], 0, threshold=0.7)
    assert given.threshold.tolist() == [0.7, 0.7, 0.7]
    assert given.threshold_from == "as given"


def test_a_table_of_predictions_reads_back(tmp_path: Path, ensemble: Ensemble) -> None:
    found = [predict_bag(ensemble, bag(name, name)) for name in ("=cmd", "x")]
    rows = prediction_rows(found, ensemble, np.array([[1.0], [np.nan]]))
    write_rows(tmp_path / "predictions.csv", rows)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        back = list(csv.DictReader(file))
    assert back[0]["bag_id"] == "'=cmd"
    assert back[0]["outcome"] == "tumour"
    assert back[1]["outcome"] == ""
    assert back[1]["folds"] == "fold0 fold1 fold2"
    assert float(back[1]["outcome_p_tumour"]) == pytest.approx(found[1].probabilities["outcome"][1], rel=1e-5)
    # A negative logit is a number, not a formula.
    assert float(back[1]["outcome_logit_0"]) == pytest.approx(found[1].logits[0], rel=1e-5)
