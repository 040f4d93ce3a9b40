"""Paired tests: against pairs counted one by one, permutation, and known corrections."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from pathopipe.errors import UsageError
from pathopipe.mil.cases import Cases, gather_cases
from pathopipe.mil.compare import compare_models, delong, describe_ranking, holm, main_value


def structural(positive: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each case, the share of the other class on the right side, pair by pair."""
    wins = (score[positive][:, None] > score[~positive]) + 0.5 * (score[positive][:, None] == score[~positive])
    return wins.mean(axis=1), wins.mean(axis=0)


@given(seed=st.integers(0, 10_000), ties=st.booleans())
def test_delong_equals_pairs_counted_one_by_one(seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    positive = np.arange(23) % 3 == 0
    scores = rng.standard_normal((3, 23)) + positive
    scores = np.round(scores) if ties else scores
    values, covariance = delong(positive, scores)
    np.testing.assert_allclose(values, [roc_auc_score(positive, one) for one in scores])
    parts = [structural(positive, one) for one in scores]
    expected = (
        np.cov([up for up, _ in parts]) / positive.sum() + np.cov([down for _, down in parts]) / (~positive).sum()
    )
    np.testing.assert_allclose(covariance, expected, atol=1e-12)


def test_delong_wants_two_of_each_class() -> None:
    with pytest.raises(UsageError, match="two cases"):
        delong(np.asarray([True, False, False]), np.zeros((1, 3)))


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def binary(scores: np.ndarray, truth: np.ndarray, patients: list[str] | None = None) -> Cases:
    return gather_cases("binary", truth, 1 / (1 + np.exp(-scores)), patients or [str(i) for i in range(len(truth))])


def drawn(n: int, strengths: dict[str, float]) -> dict[str, Cases]:
    rng = np.random.default_rng(5)
    truth = np.arange(n) % 2
    shared = rng.standard_normal(n)
    return {
        name: binary(strength * truth + 0.8 * shared + 0.6 * rng.standard_normal(n), truth)
        for name, strength in strengths.items()
    }


def test_a_better_model_wins_and_equal_ones_do_not() -> None:
    cases = drawn(200, {"good": 2.0, "bad": 0.3})
    (one,) = compare_models(cases)
    assert (one.best, one.other, one.test) == ("good", "bad", "DeLong")
    assert one.p_value < 1e-6 and one.low > 0
    assert "significantly better than every other" in describe_ranking([one])[0]
    level = compare_models(drawn(60, {"a": 1.0, "b": 1.05, "c": 1.0}))
    assert all(other.p_holm > 0.05 for other in level)
    assert describe_ranking(level)[0].startswith("No significant winner")


def test_bootstrap_and_delong_agree() -> None:
    rng = np.random.default_rng(2)
    truth = np.arange(300) % 2
    a, b = (strength * truth + rng.standard_normal(300) for strength in (1.3, 0.8))
    (by_delong,) = compare_models({"a": binary(a, truth), "b": binary(b, truth)})
    # Patients with bags of both labels keep their bags as rows, so rows are not independent.
    pairs = [str(i // 2) for i in range(300)]
    (by_bootstrap,) = compare_models({"a": binary(a, truth, pairs), "b": binary(b, truth, pairs)}, draws=4000)
    assert by_bootstrap.test == "paired bootstrap"
    assert by_bootstrap.difference == pytest.approx(by_delong.difference)
    assert by_bootstrap.low == pytest.approx(by_delong.low, abs=0.02)
    assert by_bootstrap.p_value < 0.05 and by_delong.p_value < 0.05


def test_the_null_is_not_rejected_too_often() -> None:
    rng = np.random.default_rng(9)
    truth = np.arange(80) % 2
    rejected = 0
    for _ in range(200):
        cases = {name: binary(truth + rng.standard_normal(80), truth) for name in "ab"}
        rejected += compare_models(cases)[0].p_value < 0.05
    assert rejected <= 20  # 200 tests at 5 %: 10 expected, 20 is beyond three spreads


@pytest.mark.parametrize("kind", ["multiclass", "ordinal", "regression", "survival_cox", "multilabel"])
def test_other_kinds_are_ranked_by_their_own_figure(kind: str) -> None:
    rng = np.random.default_rng(1)
    n, patients = 60, [str(i) for i in range(60)]
    level = np.arange(n) % 3
    cases = {}
    for name, noise in (("good", 0.3), ("bad", 3.0)):
        score = level + noise * rng.standard_normal(n)
        match kind:
            case "multiclass" | "ordinal":
                raw = np.exp(-((score[:, None] - np.arange(3)) ** 2))
                cases[name] = gather_cases(kind, level, raw / raw.sum(axis=1, keepdims=True), patients)  # type: ignore[arg-type]
            case "regression":
                cases[name] = gather_cases("regression", level + 0.01 * np.arange(n), score, patients)
            case "multilabel":
                truth = np.stack([level > 0, level > 1], axis=1).astype(float)
                both = np.stack([score, score], axis=1)
                cases[name] = gather_cases("multilabel", truth, 1 / (1 + np.exp(-both)), patients)
            case _:
                time = np.stack([5.0 - level, np.ones(n)], axis=1)
                cases[name] = gather_cases("survival_cox", time, score, patients)
    (one,) = compare_models(cases, draws=300)
    assert one.best == "good" and one.p_value < 0.05
    assert one.difference == pytest.approx(main_value(cases["good"]) - main_value(cases["bad"]))


def test_other_rows_are_refused() -> None:
    truth = np.arange(10) % 2
    with pytest.raises(UsageError, match="other bags"):
        compare_models({"a": binary(truth * 1.0, truth), "b": binary(truth * 1.0, 1 - truth)})
