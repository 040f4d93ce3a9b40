"""Confounds: planted sites, scanners and copies are found; cohorts without them give no alarm."""

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats.contingency import association

from pathopipe.cohort import nested_folds
from pathopipe.errors import UsageError
from pathopipe.mil.bags import Bag, array_bag
from pathopipe.mil.confounds import ConfoundReport, confound_report, cramers_v, near_duplicates

FEATURES = 24


def drawn(
    n: int, *, seed: int = 0, patients: int | None = None, tiles: tuple[int, int] = (80, 160), features: int = FEATURES
) -> list[NDArray[Any]]:
    """Slides of a few kinds of tissue in shares of their own, with a little of each patient in all tiles."""
    rng = np.random.default_rng(seed)
    kinds, basis = rng.standard_normal((5, features)), rng.standard_normal((8, features)) / 8**0.5
    slides = []
    for _ in range(n):
        kind = rng.choice(5, int(rng.integers(*tiles)), p=rng.dirichlet(np.ones(5)))
        patient = 0.3 * rng.standard_normal(features)
        slides.append(kinds[kind] + patient + rng.standard_normal((len(kind), 8)) @ basis)
    return slides


def bags_of(slides: list[NDArray[Any]], **columns: list[str]) -> list[Bag]:
    names = columns.get("patients", [f"p{n}" for n in range(len(slides))])
    sites = columns.get("sites", [""] * len(slides))
    return [
        array_bag(f"s{n}", slide, patient_id=patient, site=site)
        for n, (slide, patient, site) in enumerate(zip(slides, names, sites, strict=True))
    ]


# --- columns -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted() -> ConfoundReport:
    """60 patients at three sites; one site's scanner shifts the features, and site goes with the label."""
    slides = drawn(60)
    sites = [f"site {n % 3}" for n in range(60)]
    shift = 0.6 * np.random.default_rng(9).standard_normal((3, FEATURES))
    shifted = [slide + shift[n % 3] for n, slide in enumerate(slides)]
    rng = np.random.default_rng(1)
    label = ["ill" if n % 3 == 0 or rng.random() < 0.15 else "well" for n in range(60)]
    noise = [str(rng.integers(2)) for _ in range(60)]
    batch = ["b1"] * 58 + ["b2", "NA"]
    columns = {"site": sites, "weekday": noise, "batch": batch, "plate": [""] * 60}
    return confound_report(bags_of(shifted, sites=sites), label, columns)


def test_a_planted_site_is_found(planted: ConfoundReport) -> None:
    site, weekday, _, _ = planted.columns
    assert site.classes == {"site 0": 20, "site 1": 20, "site 2": 20}
    assert site.balanced_accuracy is not None
    assert site.low is not None
    assert site.high is not None
    assert site.chance is not None
    assert site.auroc is not None
    assert site.balanced_accuracy > 0.85
    assert site.low <= site.balanced_accuracy <= site.high
    assert site.auroc > 0.95
    assert 0.15 < site.chance < 0.5
    assert site.p_value == pytest.approx(1 / 21)
    assert site.label_v is not None
    assert site.label_v > 0.7
    line = planted.lines()[0]
    assert line.startswith("site: can be told from the features (balanced accuracy ")
    assert "strongly tied to the label" in line
    assert "a model may read the site instead of the disease: leave whole sites out" in line
    # A column of coin tosses is no alarm.
    assert weekday.p_value is not None
    assert weekday.p_value > 0.05
    assert weekday.balanced_accuracy is not None
    assert 0.3 < weekday.balanced_accuracy < 0.7
    assert planted.lines()[1].startswith("weekday: can not be told from the features")
    assert "instead of the disease" not in planted.lines()[1]


def test_columns_that_say_little(planted: ConfoundReport) -> None:
    _, _, batch, plate = planted.columns
    assert batch.classes == {"b1": 58}
    assert batch.left_out == {"b2": 1}
    assert batch.balanced_accuracy is None
    assert planted.lines()[2].startswith("batch: fewer than two values with 2 patients or more, so there is nothing")
    assert plate.balanced_accuracy is None
    assert plate.label_v is None
    assert planted.lines()[3] == "plate: empty throughout, so nothing can be said."


def test_the_record_is_plain(planted: ConfoundReport) -> None:
    text = json.dumps(planted.to_json(), allow_nan=False)
    assert json.loads(text)["columns"][0]["name"] == "site"
    assert planted.n_bags == planted.n_patients == 60
    assert planted.shared_patients == ""
    assert "No two bags of different patients look like one slide." in planted.lines()


def test_slides_of_one_patient_do_not_predict_each_other() -> None:
    """Each patient has four like slides and a random site: only a split through patients would tell the site."""
    rng = np.random.default_rng(5)
    bags, sites = [], []
    for patient in range(30):
        own = 2 * rng.standard_normal(FEATURES)
        site = str(rng.integers(2))
        for slide in range(4):
            values = own + rng.standard_normal((20, FEATURES))
            bags.append(array_bag(f"{patient}-{slide}", values, patient_id=f"p{patient}"))
            sites.append(site)
    (finding,) = confound_report(bags, [""] * 120, {"site": sites}).columns
    assert finding.n_patients == 30
    assert finding.balanced_accuracy is not None
    assert finding.balanced_accuracy < 0.75
    assert finding.low is not None
    assert finding.high is not None
    # 30 patients, not 120 slides: the interval is wide.
    assert finding.high - finding.low > 0.2


def test_without_columns() -> None:
    report = confound_report(bags_of(drawn(6)), ["a", "b"] * 3, {})
    assert (
        report.lines()[0] == "No site, scanner or batch column was given, so nothing is known of confounding by them."
    )


def test_patients_on_both_sides_are_told() -> None:
    slides = bags_of(drawn(6), patients=["p", "q", "r", "s", "t", "p"])
    folds = nested_folds(["a", "b", "c", "d", "e", "f"], ["x", "y"] * 3, folds=3, val_share=0)
    report = confound_report(slides, ["x", "y"] * 3, {}, folds=folds)
    assert "patient 'p' is in" in report.shared_patients
    assert report.shared_patients in report.lines()


def test_empty_bags_are_refused() -> None:
    with pytest.raises(UsageError, match="1 bags hold no tile"):
        confound_report([*bags_of(drawn(3)), array_bag("none", np.zeros((0, FEATURES)))], [""] * 4, {})


def test_cramers_v_against_scipy() -> None:
    rng = np.random.default_rng(0)
    first = [str(n) for n in rng.integers(0, 3, 400)]
    second = [str((int(a) + int(rng.random() < 0.3)) % 4) for a in first]
    rows, columns = np.unique(first, return_inverse=True)[1], np.unique(second, return_inverse=True)[1]
    table = np.zeros((3, columns.max() + 1), int)
    np.add.at(table, (rows, columns), 1)
    plain = association(table, method="cramer")
    # By hand from the plain value (Bergsma's correction).
    r, k, n = 3, table.shape[1], 400
    phi2 = max(0.0, plain**2 * (min(r, k) - 1) - (r - 1) * (k - 1) / (n - 1))
    expected = (phi2 / (min(r - (r - 1) ** 2 / (n - 1), k - (k - 1) ** 2 / (n - 1)) - 1)) ** 0.5
    assert cramers_v(first, second) == pytest.approx(expected)
    assert cramers_v(first, first) == pytest.approx(1.0, abs=0.01)
    independent = [
        cramers_v(list(rng.integers(0, 9, 60).astype(str)), list(rng.integers(0, 2, 60).astype(str))) for _ in range(50)
    ]
    assert np.mean([v for v in independent if v is not None]) < 0.15
    assert cramers_v(["a", "a", "a"], ["x", "y", "x"]) is None
    assert cramers_v(["a", "", "b"], ["x", "y", "z"]) is None


# --- copies ------------------------------------------------------------------------------------------------------


def rescanned(slide: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """The slide from another scanner: other colours, another grid, a tenth of the tiles lost."""
    kept = slide[rng.permutation(len(slide))[: int(0.9 * len(slide))]]
    moved = kept + 0.2 * slide.std(axis=0) * rng.standard_normal(kept.shape)
    return np.asarray(moved * (1 + 0.1 * np.linspace(-1, 1, FEATURES)) + 0.4 * np.cos(np.arange(FEATURES)))


@pytest.mark.parametrize("seed", [0, 1])
def test_copies_and_second_scans_are_found_and_nothing_else(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slides = drawn(40, seed=seed)
    extra = [slides[3].copy(), slides[8][::2], *(rescanned(slides[n], rng) for n in (12, 20, 33))]
    sites = ["A"] * 42 + ["B"] * 3
    bags = bags_of([*slides, *extra], sites=sites)
    found = {(pair.first, pair.second): pair for pair in near_duplicates(bags)}
    assert set(found) == {("s3", "s40"), ("s8", "s41"), ("s12", "s42"), ("s20", "s43"), ("s33", "s44")}
    assert {pair.second for pair in found.values() if pair.exact} == {"s40", "s41"}
    assert found["s3", "s40"].agreement == 1
    assert found["s3", "s40"].cosine == pytest.approx(1)


def test_slides_of_one_kind_are_no_copies() -> None:
    """All tiles of all slides drawn alike: nothing tells slides apart, and still none is another's copy."""
    rng = np.random.default_rng(2)
    basis = rng.standard_normal((6, FEATURES))
    slides = [rng.standard_normal((int(rng.integers(50, 600)), 6)) @ basis for _ in range(30)]
    assert near_duplicates(bags_of(slides)) == []


def test_copies_of_large_slides_that_hardly_differ() -> None:
    """Means of other samples of such slides would say nothing."""
    rng = np.random.default_rng(3)
    slides = [rng.standard_normal((3_000, FEATURES)).astype(np.float16) for _ in range(12)]
    (pair,) = near_duplicates(bags_of([*slides, slides[5].copy()]))
    assert (pair.first, pair.second, pair.exact) == ("s5", "s12", True)


def test_copies_within_a_patient_are_no_leak() -> None:
    slides = drawn(10)
    patients = [*(f"p{n}" for n in range(10)), "p4"]
    assert near_duplicates(bags_of([*slides, slides[4]], patients=patients)) == []


def test_copies_on_two_sides_are_told() -> None:
    slides = drawn(10)
    bags = bags_of([*slides, slides[0]])
    label = ["a", "b"] * 5 + ["a"]
    folds = nested_folds([bag.patient_id for bag in bags], label, folds=2, val_share=0, seed=0)
    report = confound_report(bags, label, {}, folds=folds)
    (pair,) = report.duplicates
    apart = [fold.name for fold in folds if (0 in fold.test) != (10 in fold.test)]
    assert list(pair.crosses) == apart
    line = report.lines()[1]
    assert line.startswith(
        "1 pair of bags of different patients look like one slide: s0 and s10 (100% of tiles, number"
    )
    assert ("stand on two sides of a fold" in line) == bool(apart)
    assert "ive them one patient id, or leave one out" in line
    json.dumps(report.to_json(), allow_nan=False)
