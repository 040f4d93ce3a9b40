"""What probabilities say of each kind of task, and class weights that are taken out of them again."""

from dataclasses import replace

import numpy as np

from pathopipe.metadata.probabilities import right_of, surety_of, value_of, without_class_weights
from pathopipe.mil.targets import TargetSpec


def test_surety_value_and_right_of_each_kind() -> None:
    classes = TargetSpec(name="x", kind="multiclass", columns=("x",), classes=("a", "b", "c"))
    shares = np.asarray([[0.2, 0.7, 0.1], [0.5, 0.3, 0.2], [np.nan] * 3])
    assert surety_of(classes, shares)[:2].tolist() == [0.7, 0.5]
    assert [value_of(classes, row) for row in shares] == ["b", "a", ""]
    np.testing.assert_array_equal(right_of(classes, shares, np.asarray([[1.0], [2], [0]])), [1, 0, np.nan])
    labels = TargetSpec(name="x", kind="multilabel", columns=("x",), classes=("a", "b"))
    shares = np.asarray([[0.9, 0.8], [0.1, 0.6]])
    assert surety_of(labels, shares).tolist() == [0.8, 0.6]
    assert [value_of(labels, row) for row in shares] == ["a;b", "b"]
    np.testing.assert_array_equal(right_of(labels, shares, np.asarray([[1.0, np.nan], [0, 0]])), [1, 0])
    number = TargetSpec(name="x", kind="regression", columns=("x",))
    assert value_of(number, np.asarray([3.25])) == "3.25"
    assert np.isnan(surety_of(number, np.asarray([[3.25]]))).all()


def test_class_weights_leave_the_odds_of_the_frequencies() -> None:
    spec = TargetSpec(name="x", kind="multiclass", columns=("x",), classes=("a", "b"), class_weights=(0.5, 4.0))
    true_odds = np.asarray([0.8, 0.2])
    learnt = np.log(true_odds * (0.5, 4.0))[None]
    shares = np.exp(without_class_weights(spec, learnt))
    np.testing.assert_allclose(shares / shares.sum(), true_odds[None])
    binary = replace(spec, kind="binary")
    learnt = np.log([[0.2 * 4 / (0.8 * 0.5)]])
    np.testing.assert_allclose(1 / (1 + np.exp(-without_class_weights(binary, learnt))), [[0.2]])
