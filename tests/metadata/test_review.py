"""The review: probabilities by hand, what is no contradiction, planted records, evidence, patients kept apart."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planted_cohorts import QUICK, planted
from sklearn.metrics import roc_auc_score

from pathopipe.errors import UsageError
from pathopipe.metadata.cases import MetadataCohort
from pathopipe.metadata.evaluate import read_oof
from pathopipe.metadata.predict import load_ensemble
from pathopipe.metadata.review import (
    Contradiction,
    Evidence,
    NearSlide,
    TopTile,
    check_patients,
    explain,
    gaussian_precision,
    plant,
    quality,
    rank,
    rank_cohort,
    rank_out_of_fold,
    with_records,
    write_review,
)
from pathopipe.metadata.tasks import TaskSpec
from pathopipe.metadata.train import train
from pathopipe.mil.targets import TargetSpec

ORGAN = TargetSpec(name="organ", kind="multiclass", columns=("organ",), classes=("breast", "colon", "lung"))
STAINS = TargetSpec(name="stain", kind="multilabel", columns=("stain",), classes=("H&E", "PAS"))
AGE = TargetSpec(name="age", kind="regression", columns=("age",))
ORGAN_TASK = TaskSpec(name="organ", column="organ", kind="multi-class", classes=("breast", "colon", "lung"))


def ranked(spec: TargetSpec, truth: object, scores: object, **more: float) -> list[Contradiction]:
    records, values = np.asarray(truth, float), np.asarray(scores, float)
    n = len(records)
    slides = [(f"s{number}", f"p{number}") for number in range(n)]
    unsure = {spec.name: np.zeros(n, bool)}
    return rank(slides, [spec], {spec.name: records}, {spec.name: values}, unsure, ["image"] * n, **more)


# --- ranking -----------------------------------------------------------------------------------------------------


def test_surety_is_bayes_by_hand() -> None:
    (one,) = ranked(ORGAN, [[0]], [[0.02, 0.9, 0.08]], wrong_share=0.1)
    # Wrong: a tenth of the records, which then are either other class; right: nine tenths, as often as predicted.
    wrong, right = 0.1 * (1 - 0.02) / 2, 0.9 * 0.02
    assert one.surety == pytest.approx(wrong / (wrong + right))
    assert one.log_odds == pytest.approx(math.log(wrong / right))
    assert (one.recorded, one.predicted, one.p_recorded, one.p_predicted) == ("breast", "colon", 0.02, 0.9)


def test_order_follows_the_probability_of_the_record() -> None:
    scores = [[0.4, 0.6, 0], [1e-6, 0.6, 0.4], [0.05, 0.95, 0], [0.9, 0.1, 0], [0.1, 0.9, 0]]
    found = ranked(ORGAN, [[0]] * 5, scores)
    # The fourth is predicted as recorded.
    assert [one.slide_id for one in found] == ["s1", "s2", "s4", "s0"]
    # Without rounding to certainty even where a probability is zero.
    (sure,) = ranked(ORGAN, [[2]], [[1, 0, 0]])
    assert math.isfinite(sure.log_odds) and sure.surety > 0.999


def test_what_is_not_known_contradicts_nothing() -> None:
    assert ranked(ORGAN, [[np.nan], [0]], [[0, 1, 0], [np.nan] * 3]) == []
    assert ranked(STAINS, [[np.nan, 0]], [[0.99, 0.1]]) == []
    assert ranked(AGE, [[np.nan]], [[50]]) == []


def test_of_several_labels_the_worst_counts() -> None:
    (one,) = ranked(STAINS, [[1, 0]], [[0.3, 0.96]], wrong_share=0.05)
    assert (one.label, one.recorded, one.predicted) == ("PAS", "H&E", "PAS")
    assert one.p_recorded == pytest.approx(0.04) and one.p_predicted == pytest.approx(0.96)
    assert one.surety == pytest.approx(0.05 * 0.96 / (0.05 * 0.96 + 0.95 * 0.04))


def test_numbers_far_off_are_listed() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(20, 80, (200, 1))
    scores = truth + rng.laplace(0, 3, (200, 1))
    truth[7, 0] = 900
    truth[9, 0] = scores[9, 0] + 40
    found = ranked(AGE, truth, scores)
    assert [one.slide_id for one in found[:2]] == ["s7", "s9"]
    assert len(found) <= 4 and all(one.surety > 0.5 for one in found)
    assert found[0].p_recorded is None and float(found[0].recorded) == 900
    assert ranked(AGE, [[5.0]] * 4, [[1.0], [5.0], [9.0], [5.0]]) == []


def test_shares_beyond_one_are_refused() -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        ranked(ORGAN, [[0]], [[0, 1, 0]], wrong_share=5)


# --- planting ----------------------------------------------------------------------------------------------------


def test_planting_changes_what_it_says_and_nothing_else() -> None:
    truth = np.random.default_rng(0).integers(0, 3, (300, 1)).astype(float)
    truth[:100] = np.nan
    wrong, planted = plant(ORGAN_TASK, truth, share=0.05, seed=1)
    assert planted.sum() == 10 and not planted[:100].any()
    assert (wrong[planted] != truth[planted]).all() and set(wrong[planted, 0]) <= {0, 1, 2}
    assert np.array_equal(wrong[~planted], truth[~planted], equal_nan=True)
    assert np.array_equal(plant(ORGAN_TASK, truth, share=0.05, seed=1)[0], wrong, equal_nan=True)
    assert not np.array_equal(plant(ORGAN_TASK, truth, share=0.05, seed=2)[1], planted)


def test_planting_other_kinds() -> None:
    stain = TaskSpec(name="stain", column="stain", kind="multi-label", classes=("H&E", "PAS"))
    wrong, planted = plant(stain, np.ones((40, 2)), share=0.5, seed=0)
    assert (wrong == 0).sum() == planted.sum() == 20
    age = TaskSpec(name="age", column="age", kind="continuous")
    wrong, planted = plant(age, np.arange(40.0)[:, None], share=0.25, seed=0)
    assert (wrong[planted, 0] != np.arange(40)[planted]).all() and set(wrong[:, 0]) <= set(range(40))
    with pytest.raises(UsageError, match="alike"):
        plant(age, np.ones((40, 1)), share=0.25, seed=0)
    with pytest.raises(UsageError, match="0.01 of 40 records is 0"):
        plant(age, np.arange(40.0)[:, None], share=0.01, seed=0)


def test_quality_by_hand() -> None:
    listed = ranked(ORGAN, [[0]] * 4, [[p, 1 - p, 0] for p in (0.1, 0.2, 0.3, 0.4)])
    found = quality(listed, {"organ": np.array([True, False, True, False])})
    assert (found.planted, found.listed, found.found, found.recall) == (2, 4, 2, 1.0)
    assert [found.precision_at(k) for k in (1, 2, 4, 9)] == [1.0, 0.5, 0.5, 0.5]
    assert found.recall_at(2) == 0.5
    none = quality([], {"organ": np.zeros(4, bool)})
    assert none.precision_at(5) is None and none.recall is None


def test_precision_of_gaussian_evidence() -> None:
    # What tells nothing finds as many as chance, and near certainty nearly all.
    assert gaussian_precision(0.5, 0.05) == pytest.approx(0.05)
    assert gaussian_precision(0.9999, 0.05) > 0.98
    # The same by drawing records: 5 % wrong, their evidence higher by as much as an AUROC of 0.964 means.
    rng = np.random.default_rng(0)
    wrong = np.arange(400_000) < 20_000
    evidence = rng.standard_normal(400_000) + wrong * 2.5443
    assert roc_auc_score(wrong, evidence) == pytest.approx(0.964, abs=0.002)
    first = np.argsort(-evidence)[:20_000]
    assert gaussian_precision(0.964, 0.05) == pytest.approx(wrong[first].mean(), abs=0.01)


# --- with models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("review")


@pytest.fixture
def spoilt(work: Path) -> tuple[MetadataCohort, np.ndarray, Path]:
    """100 slides with images that tell one task and reports that tell the other; 5 % of the first are wrong."""
    cohort = planted(100, {"seen": ("image",), "told": ("text",)}, strength=4.0, give=("image", "text"))
    wrong, mask = plant(cohort.tasks[0], cohort.truth["seen"], share=0.05, seed=3)
    cohort = replace(cohort, truth={**cohort.truth, "seen": wrong})
    if not (work / "oof.csv").exists():
        train(cohort, QUICK, work)
    return cohort, mask, work


def test_planted_records_are_found(spoilt: tuple[MetadataCohort, np.ndarray, Path]) -> None:
    cohort, mask, folder = spoilt
    ensemble = load_ensemble(folder)
    found = rank_cohort(ensemble, cohort)
    seen = [one for one in found if one.task == "seen"]
    measured = quality(seen, {"seen": mask})
    assert measured.recall == 1 and (measured.precision_at(5) or 0) >= 0.8
    # From the files of the training the list is the same.
    again = rank_out_of_fold(read_oof(folder))
    assert [(one.task, one.slide_id) for one in again] == [(one.task, one.slide_id) for one in found]
    assert np.allclose([one.surety for one in again], [one.surety for one in found], atol=1e-4)


def test_evidence_points_at_what_tells(spoilt: tuple[MetadataCohort, np.ndarray, Path]) -> None:
    cohort, mask, folder = spoilt
    ensemble = load_ensemble(folder)
    # Reports that tell one procedure, recorded as the other: words are to be the telling ones.
    told = cohort.truth["told"].copy()
    told[11] = 1 - told[11]
    cohort = replace(cohort, truth={**cohort.truth, "told": told})
    found = rank_cohort(ensemble, cohort)
    evidence = explain(found, ensemble, cohort)
    assert len(evidence) == len(found)
    for one, shown in zip(found, evidence, strict=True):
        if one.task == "seen" and mask[one.row]:
            # Where tiles differ, those that tell are the first four; coordinates are not known here.
            assert len(shown.tiles) == 6 and shown.tiles[0].times_mean >= shown.tiles[-1].times_mean
            assert shown.tiles[0].x_l0 is None
            assert shown.as_predicted > shown.as_recorded
        for slide in shown.near:
            row = int(slide.slide_id[1:])
            assert slide.recorded == one.predicted
            assert cohort.patients[row] != one.patient_id
            assert cohort.tasks[0].classes[int(cohort.truth[one.task][row, 0])] == one.predicted
            # Neither has been learnt from by the model that compares them.
            assert ensemble.choose(cohort.patients[row]) == ensemble.choose(one.patient_id)
    words = next(s.words for o, s in zip(found, evidence, strict=True) if (o.task, o.row) == ("told", 11))
    right = cohort.tasks[1].classes[int(1 - told[11, 0])]
    assert f"toldword{right}" in words[0][0]


def test_slides_of_the_training_keep_their_patient(spoilt: tuple[MetadataCohort, np.ndarray, Path]) -> None:
    cohort, _, folder = spoilt
    check_patients(folder, cohort)
    other = replace(cohort.cases[3], patient_id="other")
    with pytest.raises(UsageError, match=r"slide s3: patient other here, p3 in training \(1 such"):
        check_patients(folder, replace(cohort, cases=(*cohort.cases[:3], other, *cohort.cases[4:])))
    with pytest.raises(UsageError, match="no models here"):
        load_ensemble(folder / "nowhere")


def test_records_are_those_of_the_manifest(tmp_path: Path) -> None:
    cohort = planted(3, {"seen": ("image",), "told": ("text",)})
    (tmp_path / "now.csv").write_text("slide_id,patient_id,seen\ns2,p2,b\ns0,p0,A\ns1,p1,\n")
    now = with_records(cohort, tmp_path / "now.csv", cohort.tasks)
    assert np.array_equal(now.truth["seen"], [[0], [np.nan], [1]], equal_nan=True)
    assert np.isnan(now.truth["told"]).all()
    (tmp_path / "now.csv").write_text("slide_id,patient_id\ns2,p2\ns0,p0\ns1,p1\n")
    with pytest.raises(UsageError, match="seen, told"):
        with_records(cohort, tmp_path / "now.csv", cohort.tasks)


# --- the table ---------------------------------------------------------------------------------------------------


def test_table_is_safe_in_a_spreadsheet(tmp_path: Path) -> None:
    listed = ranked(replace(ORGAN, classes=("=cmd()", "-colon", "lung")), [[0], [0]], [[0.1, 0.9, 0], [0.2, 0, 0.8]])
    shown = Evidence(
        tiles=(TopTile(times_mean=2.0, x_l0=10, y_l0=20, width_l0=5, height_l0=5),),
        words=(("+word", 0.3),),
        near=(NearSlide(slide_id="@s9", recorded="-colon", similarity=0.9),),
        n_neighbours=10,
        as_predicted=7,
        as_recorded=2,
    )
    write_review(tmp_path / "review.csv", listed, [shown])
    with (tmp_path / "review.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["recorded"] == "'=cmd()" and rows[0]["predicted"] == "'-colon"
    assert rows[0]["words"] == "'+word" and rows[0]["near_slides"] == "'@s9" and rows[0]["tiles_l0"] == "10,20"
    assert (rows[0]["neighbours"], rows[0]["neighbours_as_predicted"]) == ("10", "7")
    assert rows[1]["rank"] == "2" and rows[1]["neighbours"] == rows[1]["words"] == ""
    write_review(tmp_path / "none.csv", [], [])
    header = (tmp_path / "none.csv").read_text()
    assert header.strip().split(",") == list(rows[0])
