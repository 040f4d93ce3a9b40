"""Splits: laws that hold for any cohort, given columns, and what is refused before training."""

import logging
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathopipe.cohort import Fold, SplitError, check_folds, folds_from_column, nested_folds, patient_strata
from pathopipe.errors import UsageError


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[list[str], list[str], list[str], int]:
    """Patients with 1 to 4 bags, 2 or 3 classes with at least as many patients as folds, up to 4 sites."""
    folds = draw(st.integers(2, 5))
    patients, labels, sites = [], [], []
    for label in "abc"[: draw(st.integers(2, 3))]:
        for number in range(draw(st.integers(max(folds, 4), 14))):
            site = draw(st.sampled_from("WXYZ"))
            for _ in range(draw(st.integers(1, 4))):
                patients.append(f"{label}{number}")
                labels.append(label)
                sites.append(site)
    order = draw(st.permutations(range(len(patients))))
    return [patients[i] for i in order], [labels[i] for i in order], [sites[i] for i in order], folds


def of_patients(fold: Fold, part: str, patients: list[str]) -> set[str]:
    return {patients[row] for row in getattr(fold, part)}


@settings(max_examples=80, deadline=None)
@given(cohort=cohorts(), seed=st.integers(0, 5), with_sites=st.booleans())
def test_laws_of_nested_folds(cohort: tuple[list[str], list[str], list[str], int], seed: int, with_sites: bool) -> None:
    patients, labels, sites, n_folds = cohort
    folds = nested_folds(patients, labels, folds=n_folds, seed=seed, sites=sites if with_sites else None)
    assert len(folds) == n_folds
    # Every bag is tested once.
    assert sorted(row for fold in folds for row in fold.test) == list(range(len(patients)))
    tested = Counter()
    label_of = dict(zip(patients, labels, strict=True))
    total = Counter(label_of.values())
    for fold in folds:
        parts = [of_patients(fold, part, patients) for part in ("train", "val", "test")]
        assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
        assert parts[0] | parts[1] | parts[2] == set(patients)
        for part in parts:
            counts = Counter(label_of[patient] for patient in part)
            assert set(counts) == set(labels)
        # Test parts differ by at most one patient in every class; validation takes about a fifth of the rest.
        for label, count in Counter(label_of[patient] for patient in parts[2]).items():
            assert total[label] // n_folds <= count <= -(-total[label] // n_folds)
            tested[label] += count
        for label, count in Counter(label_of[patient] for patient in parts[1]).items():
            rest = total[label] - sum(label_of[patient] == label for patient in parts[2])
            assert count == min(max(round(0.2 * rest), 1), rest - 1)
    assert tested == total


@settings(max_examples=40, deadline=None)
@given(cohort=cohorts(), shuffle=st.randoms(use_true_random=False), by_site=st.booleans())
def test_order_of_rows_has_no_say(
    cohort: tuple[list[str], list[str], list[str], int], shuffle: object, by_site: bool
) -> None:
    patients, labels, sites, n_folds = cohort
    by_site = by_site and len(set(sites)) >= n_folds
    order = list(range(len(patients)))
    shuffle.shuffle(order)  # type: ignore[attr-defined]

    def split(rows: list[int]) -> list[tuple[set[str], ...]] | str:
        of = [patients[row] for row in rows]
        try:
            folds = nested_folds(
                of,
                [labels[row] for row in rows],
                sites=[sites[row] for row in rows],
                folds=n_folds,
                seed=3,
                by_site=by_site,
            )
        except SplitError as error:
            return str(error)
        return [tuple(of_patients(fold, part, of) for part in ("train", "val", "test")) for fold in folds]

    assert split(order) == split(sorted(order))


def test_seeds_differ_and_repeat() -> None:
    patients = [f"p{n}" for n in range(40)]
    labels = ["x" if n % 3 else "y" for n in range(40)]
    tests = [[fold.test.tolist() for fold in nested_folds(patients, labels, seed=seed)] for seed in (0, 0, 1)]
    assert tests[0] == tests[1] != tests[2]


def test_bags_are_spread_though_patients_have_many() -> None:
    sizes = [30, 20, 10, 10, 5, 5, 5, 5, 3, 3, 2, 2] * 2
    patients = [f"p{n}" for n, size in enumerate(sizes) for _ in range(size)]
    labels = ["a" if int(patient[1:]) < 12 else "b" for patient in patients]
    counts = [len(fold.test) for fold in nested_folds(patients, labels, folds=3, seed=1)]
    assert max(counts) < 1.5 * min(counts)


def test_sites_are_spread_evenly() -> None:
    patients = [f"p{n:03}" for n in range(120)]
    labels = ["a" if n % 2 else "b" for n in range(120)]
    sites = [f"s{n // 2 % 4}" for n in range(120)]
    for fold in nested_folds(patients, labels, sites=sites, folds=5, seed=2):
        for part, low, high in ((fold.test, 4, 8), (fold.val, 3, 7)):
            counts = Counter(sites[row] for row in part)
            assert len(counts) == 4
            assert low <= min(counts.values()) <= max(counts.values()) <= high


def test_whole_sites_are_left_out() -> None:
    patients = [f"p{n:03}" for n in range(90)]
    labels = ["a" if n % 3 else "b" for n in range(90)]
    sites = [f"s{n % 7}" for n in range(90)]
    folds = nested_folds(patients, labels, folds=3, sites=sites, by_site=True)
    assert sorted(row for fold in folds for row in fold.test) == list(range(90))
    for fold in folds:
        tested = {sites[row] for row in fold.test}
        assert not tested & {sites[row] for row in [*fold.train, *fold.val]}
        assert 20 <= len(fold.test) <= 42
    # As many folds as sites: one site each.
    assert all(
        len({sites[row] for row in fold.test}) == 1
        for fold in nested_folds(patients, labels, folds=7, sites=sites, by_site=True)
    )


def test_no_validation_and_no_classes() -> None:
    patients = [f"p{n}" for n in range(10)]
    folds = nested_folds(patients, [""] * 10, folds=5, val_share=0)
    assert all(len(fold.val) == 0 and len(fold.test) == 2 and len(fold.train) == 8 for fold in folds)


def test_rare_classes_are_named(caplog: pytest.LogCaptureFixture) -> None:
    labels = ["a"] * 10 + ["b"] * 10 + ["c"] * 3
    nested_folds([f"p{n}" for n in range(23)], labels, folds=5)
    assert "class 'c' has 3 patients for 5 folds: 2 test folds lack it" in caplog.text
    caplog.clear()
    nested_folds([f"p{n}" for n in range(20)], labels[:20], folds=5)
    assert not caplog.records


@pytest.mark.parametrize(
    ("patients", "labels", "options", "says"),
    [
        (["p1", "p2", "p2"], ["a", "b", "b"], {"folds": 3}, "2 patients for 3 folds; take fewer folds"),
        ([f"p{n}" for n in range(9)], ["a"] * 9, {}, "one class only: all 9 patients are 'a'"),
        (
            [f"p{n}" for n in range(9)],
            ["a"] * 8 + ["b"],
            {"folds": 3},
            "nothing but 'a' is left to train on (all of 'b'",
        ),
        (["p1", "p2"], ["a", "b"], {"folds": 1}, "1 folds: at least 2"),
        (["p1", "p2"], ["a", "b"], {"folds": 2, "val_share": 1.0}, "val_share 1 is not"),
        (["p1", ""], ["a", "b"], {"folds": 2}, "bag 1 has no patient id"),
        ([], [], {}, "no bag to split"),
        (["p1", "p2"], ["a"], {}, "differ in length"),
        (["p1", "p2"], ["a", "b"], {"folds": 2, "by_site": True}, "2 bags have no site"),
        (
            ["p1", "p2", "p3"],
            ["a", "b", "a"],
            {"folds": 3, "by_site": True, "sites": ["s", "t", "t"]},
            "2 sites for 3 folds",
        ),
        (
            ["p1", "p1", "p3"],
            ["a", "a", "b"],
            {"folds": 2, "by_site": True, "sites": ["s", "t", "t"]},
            "1 patients are at several sites ('p1')",
        ),
        (
            ["p1", "p2", "p3", "p4"],
            ["a", "b", "a", "a"],
            {"folds": 2, "by_site": True, "sites": ["s", "s", "t", "t"]},
            "nothing but 'a' is left to train on",
        ),
    ],
)
def test_what_is_refused(patients: list[str], labels: list[str], options: dict[str, object], says: str) -> None:
    with pytest.raises(SplitError) as caught:
        nested_folds(patients, labels, **options)  # type: ignore[arg-type]
    assert says in str(caught.value)
    assert isinstance(caught.value, UsageError)


# --- the split column --------------------------------------------------------------------------------------------

PATIENTS = [f"p{n}" for n in range(12)]
LABELS = ["a", "b"] * 6


def test_a_given_split_is_kept() -> None:
    split = ["Train"] * 6 + ["validation"] * 2 + ["TEST "] * 4
    (fold,) = folds_from_column(split, PATIENTS, LABELS)
    assert (fold.name, fold.train.tolist(), fold.val.tolist(), fold.test.tolist()) == (
        "given",
        list(range(6)),
        [6, 7],
        [8, 9, 10, 11],
    )


def test_validation_is_taken_out_of_train() -> None:
    (fold,) = folds_from_column(["train"] * 10 + ["test"] * 2, PATIENTS, LABELS, val_share=0.2)
    assert fold.test.tolist() == [10, 11]
    assert len(fold.val) == 2
    assert {LABELS[row] for row in fold.val} == {"a", "b"}
    assert sorted([*fold.train, *fold.val]) == list(range(10))


def test_folds_inside_what_is_not_test() -> None:
    folds = folds_from_column([""] * 9 + ["test"] * 3, PATIENTS, LABELS, folds=3)
    assert len(folds) == 3
    assert all(fold.test.tolist() == [9, 10, 11] for fold in folds)
    assert sorted(row for fold in folds for row in fold.val) == list(range(9))
    assert all(len(fold.train) + len(fold.val) == 9 for fold in folds)


def test_numbered_folds(caplog: pytest.LogCaptureFixture) -> None:
    folds = folds_from_column(["1", "2", "3"] * 4, PATIENTS, LABELS)
    assert [fold.name for fold in folds] == ["1", "2", "3"]
    assert folds[0].test.tolist() == [0, 3, 6, 9]
    assert all(len(fold.val) == 2 for fold in folds)
    as_floats = folds_from_column(["1.0", "2.0", "3.0"] * 4, PATIENTS, LABELS)
    assert as_floats[1].test.tolist() == folds[1].test.tolist()


@pytest.mark.parametrize(
    ("split", "says"),
    [
        (["train"] * 11 + ["tset"], "split holds 'tset'; write train, val and test"),
        (["train"] * 12, "names no test row"),
        (["test"] * 12, "marks every row as test"),
        (["train"] * 6 + [""] * 2 + ["test"] * 4, "split is empty in 2 rows and filled in others"),
        (["val"] * 6 + ["test"] * 6, "names no train row"),
        (["1"] * 12, "the one fold 1"),
        (["", "test"] + ["test"] * 10, "1 patients beside the test part for 5 folds"),
        (["train", "test"] * 6, "nothing but 'a' is left to train on"),
        (["train"], "1 cells of split for 12 bags"),
    ],
)
def test_wrong_columns(split: list[str], says: str) -> None:
    with pytest.raises(SplitError) as caught:
        folds_from_column(split, PATIENTS, LABELS)
    assert says in str(caught.value)


def test_a_patient_on_both_sides_of_a_column() -> None:
    patients = ["p0", *PATIENTS[:-1]]
    with pytest.raises(SplitError, match="patient 'p0' is in train and test"):
        folds_from_column(["test"] + ["train"] * 9 + ["test"] * 2, patients, LABELS)
    with pytest.raises(SplitError, match="patient 'p0' is in fold 1 and fold 2"):
        folds_from_column(["1", "2", "3"] * 4, patients, LABELS)


def test_check_folds() -> None:
    rows = [np.asarray(part, np.intp) for part in ([0, 1], [2], [3])]
    check_folds([Fold("x", *rows)], ["p", "q", "r", "s"])
    with pytest.raises(SplitError, match="fold x: patient 'p' is in train and test, 1 more patients like it"):
        check_folds([Fold("x", rows[0], rows[1][:0], np.asarray([2, 3]))], ["p", "q", "p", "q"])
    with pytest.raises(SplitError, match="its test part is empty"):
        check_folds([Fold("x", rows[0], rows[1], rows[1][:0])], ["p", "q", "r", "s"])
    with pytest.raises(SplitError, match="a bag is in one part twice"):
        check_folds([Fold("x", np.asarray([0, 0]), rows[1], rows[2])], ["p", "q", "r", "s"])


def test_patients_with_several_classes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pathopipe")
    strata, mixed = patient_strata(["p", "p", "q", "r", "s", "s"], ["common", "rare", "common", "common", "", "common"])
    assert strata == ["rare", "rare", "common", "common", "common", "common"]
    assert mixed == ("p",)
    assert "patients with several classes, dealt out by the rarest: 'p'" in caplog.text
