"""Folds and parts of a fold: patients stay whole, sites can be left out, members share the training side."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
from planted_cohorts import QUICK, planted

from pathopipe.metadata.splits import deal_folds, member_parts
from pathopipe.metadata.train import train


def test_members_learn_from_all_of_the_training_side_together(tmp_path: Path) -> None:
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


def test_one_member_has_the_validation_part_and_two_patients_make_two_members() -> None:
    cohort = planted(60, {"task": ("table",)}, give=("table",))
    fold = deal_folds(cohort, QUICK, seed=0)[0]
    ((train_rows, val_rows),) = member_parts(cohort, fold, 1, seed=0)
    assert len(val_rows) > 0
    np.testing.assert_array_equal(train_rows, fold.train)
    np.testing.assert_array_equal(val_rows, fold.val)
    few = replace(fold, train=fold.train[:2], val=fold.train[:0])
    assert len(member_parts(cohort, few, 5, seed=0)) == 2


def test_sites_can_be_left_out_whole() -> None:
    cohort = planted(60, {"task": ("text",)}, give=("text",))
    cohort = replace(cohort, sites=tuple("xyz"[number % 3] for number in range(60)))
    folds = deal_folds(cohort, QUICK.model_copy(update={"leave_sites_out": True, "folds": 3}), seed=0)
    for fold in folds:
        tested = {cohort.sites[row] for row in fold.test}
        assert len(tested) == 1
        assert not tested & {cohort.sites[row] for row in (*fold.train, *fold.val)}
