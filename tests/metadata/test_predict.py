"""Saved models predict what they predicted, in a catalogue's form, and never for patients they have learnt from."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planted_cohorts import QUICK, planted

from pathopipe.errors import EncoderError, StoreError, UsageError
from pathopipe.metadata.cases import Case, MetadataCohort
from pathopipe.metadata.evaluate import ALL, MULTITASK, OutOfFold, read_oof
from pathopipe.metadata.model import MetadataModel
from pathopipe.metadata.network import MODALITIES, modality_sets
from pathopipe.metadata.predict import Prediction, load_ensemble, predict, write_csv, write_json_lines
from pathopipe.metadata.probabilities import surety_of, value_of
from pathopipe.metadata.splits import deal_folds
from pathopipe.metadata.train import train, train_fold
from pathopipe.mil.bags import array_bag

SETTINGS = QUICK.model_copy(update={"members": 2})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MetadataCohort, OutOfFold]:
    out = tmp_path_factory.mktemp("trained")
    cohort = planted(120, {"seen": ("image",), "told": ("text", "table")}, strength=3.0, missing=0.2)
    codes = {"a": "SNOMED CT 1", "b": "SNOMED CT 2"}
    cohort = replace(cohort, tasks=(replace(cohort.tasks[0], codes=codes), cohort.tasks[1]))
    return out, cohort, train(cohort, SETTINGS, out)


Trained = tuple[Path, MetadataCohort, OutOfFold]


def test_a_loaded_model_says_what_the_trained_one_said(tmp_path: Path) -> None:
    cohort = planted(50, {"task": MODALITIES}, missing=0.2, strength=3.0)
    fold = deal_folds(cohort, SETTINGS, seed=0)[0]
    model = train_fold(cohort, fold, SETTINGS.model_copy(update={"epochs": 2})).model
    model.save(tmp_path)
    loaded = MetadataModel.load(tmp_path)
    assert loaded.card == model.card
    asked, rows = modality_sets(MODALITIES), np.arange(50)
    one = model.logits(model.preparation.inputs(cohort), rows, asked)
    two = loaded.logits(loaded.preparation.inputs(cohort), rows, asked)
    for chosen in asked:
        np.testing.assert_array_equal(one[chosen], two[chosen])


def test_patients_of_the_training_are_predicted_out_of_fold(trained: Trained) -> None:
    out, cohort, oof = trained
    found = predict(out, cohort)
    by_task = [one for one in found if one.task == "seen"]
    assert [one.slide_id for one in by_task] == list(oof.slide_ids)
    spec = cohort.tasks[0].target
    scores = oof.scores[MULTITASK, ALL]["seen"]
    assert [one.value for one in by_task] == [value_of(spec, row) for row in scores]
    assert [one.probability for one in by_task] == pytest.approx(surety_of(spec, scores).tolist(), abs=1e-5)
    assert [one.abstained for one in by_task] == oof.abstained[MULTITASK, ALL]["seen"].tolist()


def test_new_patients_are_predicted_by_all_models(trained: Trained) -> None:
    out, _, _ = trained
    fresh = renamed(planted(60, {"seen": ("image",), "told": ("text", "table")}, strength=3.0, seed=5))
    truth = [fresh.tasks[0].classes[int(label)] for label in fresh.truth["seen"][:, 0]]
    found = predict(out, fresh)
    assert np.mean([one.value == label for one, label in zip(found[::2], truth, strict=True)]) > 0.9
    assert {one.modalities for one in found} == {"image+text+table"}
    assert {one.code for one in found[::2]} == {"SNOMED CT 1", "SNOMED CT 2"}
    assert {one.code for one in found[1::2]} == {""}
    assert len({one.model_id for one in found}) == 1
    # Image alone: other rows, the same models.
    image = [replace(case, text=None, row={}) for case in fresh.cases]
    alone = predict(out, replace(fresh, cases=tuple(image)))
    assert {one.modalities for one in alone} == {"image"}
    assert np.mean([one.value == label for one, label in zip(alone[::2], truth, strict=True)]) > 0.9


def renamed(cohort: MetadataCohort) -> MetadataCohort:
    cases = [replace(case, slide_id=f"n{case.slide_id}", patient_id=f"n{case.patient_id}") for case in cohort.cases]
    return replace(cohort, cases=tuple(cases), patients=tuple(case.patient_id for case in cases))


def test_two_models_are_averaged_and_agree_on_the_threshold(trained: Trained) -> None:
    out, cohort, _ = trained
    ensemble = load_ensemble(out)
    fresh = renamed(cohort).take(range(5))
    predicted, _, _ = ensemble.predict(fresh)
    single = []
    for number in range(2):
        one = replace(ensemble, models=(ensemble.models[number],), folds=(ensemble.folds[number],))
        single.append(one.predict(fresh)[0]["told"])
    np.testing.assert_allclose(predicted["told"], np.mean(single, axis=0))


def test_slides_with_nothing_to_predict_from_are_abstained_on(trained: Trained) -> None:
    out, cohort, _ = trained
    nothing = Case(slide_id="empty", patient_id="empty", site="", row={})
    lone = replace(
        cohort,
        cases=(nothing,),
        patients=("empty",),
        sites=("",),
        truth={name: v[:1] for name, v in cohort.truth.items()},
    )
    for one in predict(out, lone):
        assert (one.value, one.code, one.probability, one.abstained, one.modalities) == ("", "", None, True, "")


def test_features_of_another_encoder_are_refused(trained: Trained) -> None:
    out, cohort, _ = trained
    case = next(case for case in cohort.cases if case.bag is not None)
    other = array_bag(case.slide_id, np.zeros((3, 8), np.float32), encoder="other")
    with pytest.raises(EncoderError, match="trained on encoder drawn, these features are of other"):
        predict(out, one_case(cohort, replace(case, bag=other)))
    wide = array_bag(case.slide_id, np.zeros((3, 9), np.float32), encoder="drawn")
    with pytest.raises(EncoderError, match="features of width 8, these features are of width 9"):
        predict(out, one_case(cohort, replace(case, bag=wide)))


def one_case(cohort: MetadataCohort, case: Case) -> MetadataCohort:
    return replace(cohort.take([0]), cases=(case,), patients=(case.patient_id,))


def test_folders_without_or_with_damaged_models_are_named(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no models here"):
        load_ensemble(tmp_path)
    with pytest.raises(UsageError, match="no model here"):
        MetadataModel.load(tmp_path)
    source = trained[0] / "folds" / "fold0"
    (tmp_path / "model.json").write_bytes((source / "model.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(StoreError, match="can't be read"):
        MetadataModel.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    record = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(StoreError, match="format 99"):
        MetadataModel.load(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({**record, "members": 3}))
    with pytest.raises(StoreError, match="don't belong together"):
        MetadataModel.load(tmp_path)


# --- evidence ----------------------------------------------------------------------------------------------------


def test_attention_marks_the_tiles_that_tell() -> None:
    cohort = planted(90, {"seen": ("image",)}, give=("image",), strength=3.0)
    settings = SETTINGS.model_copy(update={"members": 1, "epochs": 30})
    fold = deal_folds(cohort, settings, seed=0)[0]
    model = train_fold(cohort, fold, settings).model
    shares = []
    for row in fold.test:
        weights = model.attention(cohort.cases[row].bag)
        assert weights.sum() == pytest.approx(1, abs=1e-5)
        shares.append(weights[:4].sum())
    # A third of the tiles are planted.
    assert np.mean(shares) > 0.45


def test_text_direction_raises_the_class_it_is_for(trained: Trained) -> None:
    out, cohort, _ = trained
    model = load_ensemble(out).models[0]
    inputs = model.preparation.inputs(cohort)
    row = int(np.flatnonzero(inputs.present[:, 1])[0])
    direction = model.text_direction(inputs, row, "told", "b")
    before = model.logits(inputs, np.asarray([row]), [("text",)])["text",][0, 1]
    moved = inputs.text.copy()
    moved[row] += 0.01 * direction / np.linalg.norm(direction)
    after = model.logits(replace(inputs, text=moved), np.asarray([row]), [("text",)])["text",][0, 1]
    assert after > before
    np.testing.assert_allclose(model.text_direction(inputs, row, "told", "a"), -direction, atol=1e-6)
    words = [
        word
        for word, _ in model.preparation.text.words_behind(
            f"{cohort.cases[row].text} toldwordb toldwordb", direction, count=3
        )
    ]
    assert any("toldwordb" in word for word in words)
    with pytest.raises(UsageError, match="no class 'z'"):
        model.text_direction(inputs, row, "told", "z")
    without = int(np.flatnonzero(~inputs.present[:, 1])[0])
    assert model.text_direction(inputs, without, "told", "b") is None


def test_shared_vectors_of_like_slides_lie_near(trained: Trained) -> None:
    out, cohort, _ = trained
    model = load_ensemble(out).models[0]
    inputs = model.preparation.inputs(cohort)
    rows = np.flatnonzero(inputs.present[:, 0])
    vectors = model.vectors(inputs, rows)
    assert vectors.shape == (len(rows), 2 * 16)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    alike = vectors @ vectors.T
    label = cohort.truth["seen"][rows, 0]
    same = label[:, None] == label
    np.fill_diagonal(alike, np.nan)
    assert np.nanmean(alike[same]) > np.nanmean(alike[~same]) + 0.1


# --- what probabilities mean -------------------------------------------------------------------------------------


# --- files -------------------------------------------------------------------------------------------------------


def test_predictions_are_written_for_catalogues(tmp_path: Path) -> None:
    rows = [
        Prediction(
            slide_id="s1", task="site", value="=colon", code="UBERON:0001155", probability=0.91, abstained=False,
            model_id="m", modalities="image+text",
        ),
        Prediction(
            slide_id="s2", task="size", value="3.5", code="", probability=None, abstained=True, model_id="m",
            modalities="",
        ),
    ]  # fmt: skip
    write_csv(tmp_path / "rows.csv", rows)
    with (tmp_path / "rows.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == list(Prediction.__slots__)
    assert (found[0]["value"], found[0]["abstained"], found[1]["probability"]) == ("'=colon", "false", "")
    write_json_lines(tmp_path / "rows.jsonl", rows)
    records = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert records[0]["value"] == "=colon"
    assert records[1] == {
        "slide_id": "s2", "task": "size", "value": "3.5", "code": "", "probability": None, "abstained": True,
        "model_id": "m", "modalities": "",
    }  # fmt: skip


def test_out_of_fold_predictions_are_read_back_whole(trained: Trained) -> None:
    out, cohort, oof = trained
    again = read_oof(out)
    assert again.tasks == cohort.tasks
    np.testing.assert_array_equal(again.truth["seen"], cohort.truth["seen"])
    np.testing.assert_array_equal(again.scores[MULTITASK, "image"]["told"], oof.scores[MULTITASK, "image"]["told"])
