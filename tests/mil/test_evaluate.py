"""Figures against scikit-learn and cases done by hand; intervals against simulated cohorts."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics
from sklearn.linear_model import LogisticRegression

from pathopipe.errors import UsageError
from pathopipe.mil import weighted
from pathopipe.mil.cases import gather_cases
from pathopipe.mil.curves import calibration_bins, confusion_counts, precision_recall_band, roc_band
from pathopipe.mil.evaluate import FigureTable, figures, figures_of


def cohort(
    n: int, *, shift: float = 1.0, share: float = 0.4, seed: int = 0
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Labels, and probabilities of two normal populations ``shift`` apart; some are tied."""
    rng = np.random.default_rng(seed)
    truth = (rng.random(n) < share).astype(np.intp)
    score = 1 / (1 + np.exp(-(rng.normal(size=n) + shift * truth - 0.5)))
    return truth, np.round(score, 2)


def names(n: int) -> list[str]:
    return [f"p{number:04d}" for number in range(n)]


def value(table: FigureTable, name: str, label: str = "", site: str = "") -> float:
    found = table.find(name, label=label, site=site).value
    assert found is not None
    return found


# ---- values


def test_binary_figures_are_those_of_scikit_learn() -> None:
    truth, score = cohort(137)
    table = figures("binary", truth, score, names(137), classes=["no", "yes"], threshold=0.41, draws=20)
    chosen = score >= 0.41
    expected = {
        "auroc": metrics.roc_auc_score(truth, score),
        "auprc": metrics.average_precision_score(truth, score),
        "balanced_accuracy": metrics.balanced_accuracy_score(truth, chosen),
        "accuracy": metrics.accuracy_score(truth, chosen),
        "sensitivity": metrics.recall_score(truth, chosen),
        "specificity": metrics.recall_score(truth, chosen, pos_label=0),
        "f1": metrics.f1_score(truth, chosen),
        "kappa_quadratic": metrics.cohen_kappa_score(truth, chosen, weights="quadratic"),
        "brier": metrics.brier_score_loss(truth, score),
    }
    assert {name: value(table, name) for name in expected} == pytest.approx(expected)
    clipped = np.clip(score, 1e-6, 1 - 1e-6)
    fit = LogisticRegression(C=np.inf, tol=1e-10).fit(np.log(clipped / (1 - clipped))[:, None], truth)
    assert value(table, "calibration_slope") == pytest.approx(fit.coef_[0, 0], rel=1e-4)
    assert value(table, "calibration_intercept") == pytest.approx(fit.intercept_[0], rel=1e-4)
    assert table.main.n_patients == 137
    assert table.main.n_positive == truth.sum()
    assert any("0.41, from validation" in note for note in table.notes)


def test_multiclass_figures_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 3, 90)
    logits = rng.normal(size=(90, 3)) + 1.2 * np.eye(3)[truth]
    score = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    table = figures("multiclass", truth, score, names(90), classes=["a", "b", "c"], draws=20)
    chosen = score.argmax(axis=1)
    one_hot = np.eye(3)[truth]
    expected = {
        "auroc": metrics.roc_auc_score(truth, score, multi_class="ovr", average="macro"),
        "auprc": metrics.average_precision_score(one_hot, score, average="macro"),
        "balanced_accuracy": metrics.balanced_accuracy_score(truth, chosen),
        "accuracy": metrics.accuracy_score(truth, chosen),
        "f1": metrics.f1_score(truth, chosen, average="macro"),
        "kappa": metrics.cohen_kappa_score(truth, chosen),
        "brier": ((score - one_hot) ** 2).sum(axis=1).mean(),
    }
    assert {name: value(table, name) for name in expected} == pytest.approx(expected)
    for number, name in enumerate("abc"):
        one = metrics.roc_auc_score(truth == number, score[:, number])
        assert value(table, "auroc", name) == pytest.approx(one)
        assert table.find("auroc", label=name).n_positive == (truth == number).sum()


def test_ordinal_figures() -> None:
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 4, 80)
    logits = -np.abs(np.arange(4) - (truth + rng.normal(size=80))[:, None])
    score = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    table = figures("ordinal", truth, score, names(80), classes=["0", "1", "2", "3"], draws=20)
    chosen = score.argmax(axis=1)
    assert table.main.name == "kappa_quadratic"
    assert value(table, "kappa_quadratic") == pytest.approx(
        metrics.cohen_kappa_score(truth, chosen, weights="quadratic", labels=range(4))
    )
    assert value(table, "mae") == pytest.approx(np.abs(truth - chosen).mean())
    mean = score @ np.arange(4)
    pairs = [(i, j) for i in range(80) for j in range(80) if truth[i] > truth[j]]
    by_hand = np.mean([(mean[i] > mean[j]) + 0.5 * (mean[i] == mean[j]) for i, j in pairs])
    assert value(table, "c_index") == pytest.approx(by_hand)


def test_regression_figures() -> None:
    rng = np.random.default_rng(3)
    truth = rng.normal(size=60).round(1)
    score = (truth + rng.normal(size=60)).round(1)
    table = figures("regression", truth, score, names(60), draws=20)
    assert value(table, "spearman") == pytest.approx(stats.spearmanr(truth, score).statistic)
    assert value(table, "r2") == pytest.approx(metrics.r2_score(truth, score))
    assert value(table, "mae") == pytest.approx(metrics.mean_absolute_error(truth, score))


def test_multilabel_figures_skip_what_is_unknown() -> None:
    truth = np.array([[1, 0], [0, 1], [np.nan, 0], [1, 1], [0, np.nan]])
    score = np.array([[0.9, 0.3], [0.2, 0.2], [0.5, 0.4], [0.6, 0.8], [0.7, 0.9]])
    table = figures("multilabel", truth, score, names(5), classes=["er", "pr"], draws=50)
    # er: positives 0.9, 0.6 against 0.2, 0.7: three of four pairs; pr: 0.2, 0.8 against 0.3, 0.4: two of four.
    assert value(table, "auroc", "er") == 0.75
    assert value(table, "auroc", "pr") == 0.5
    assert value(table, "auroc") == 0.625
    assert table.find("auroc", label="er").n_rows == 4
    assert table.find("auroc", label="pr").n_positive == 2


def test_concordance_by_hand() -> None:
    # Comparable: (0, 1), (0, 2), (0, 3), (2, 3), and (1, 2) is not, for 1 is censored before 2.
    truth = [[1, 1], [2, 0], [3, 1], [4, 0]]
    table = figures("survival_cox", truth, [0.9, 0.95, 0.2, 0.3], names(4), draws=0)
    assert value(table, "c_index") == pytest.approx(2 / 4)
    assert table.main.n_positive == 2
    # A censored row at the very time of an event is later; equal risks count half.
    assert value(figures("survival_cox", [[2, 1], [2, 0]], [0.7, 0.7], names(2), draws=0), "c_index") == 0.5
    assert value(figures("survival_cox", [[2, 1], [2, 0]], [0.7, 0.6], names(2), draws=0), "c_index") == 1.0


def test_concordance_as_pairs_say() -> None:
    rng = np.random.default_rng(4)
    time, event, risk = rng.integers(1, 20, 50), rng.random(50) < 0.6, rng.integers(0, 9, 50) / 9
    won = pairs = 0.0
    for i in range(50):
        for j in range(50):
            if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j])):
                pairs += 1
                won += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
    table = figures("survival_discrete", np.stack([time, event], axis=1), risk, names(50), draws=0)
    assert value(table, "c_index") == pytest.approx(won / pairs)


def test_risks_of_other_folds_are_not_compared() -> None:
    rng = np.random.default_rng(12)
    times = np.stack([rng.exponential(10, 40), rng.random(40) < 0.7], axis=1)
    risk = -np.log(times[:, 0]) + rng.normal(size=40)
    folds = np.arange(40) % 2
    table = figures("survival_cox", times, risk, names(40), folds=folds.tolist(), draws=50)
    moved = figures("survival_cox", times, risk + 100 * folds, names(40), folds=folds.tolist(), draws=50)
    assert value(moved, "c_index_within_folds") == value(table, "c_index_within_folds")
    assert value(moved, "c_index") < value(table, "c_index") - 0.05
    found = table.find("c_index_within_folds")
    assert found.low is not None and found.high is not None
    assert found.low < value(table, "c_index_within_folds") < found.high


def test_calibration_error_by_hand() -> None:
    # Two bins: 0.1 to 0.2 holds stated 0.15, found 0.5; 0.9 to 1 holds stated 0.95, found 1.
    table = figures("binary", [0, 1, 1, 1], [0.15, 0.15, 0.9, 1.0], names(4), draws=0)
    assert value(table, "ece") == pytest.approx((2 * 0.35 + 2 * 0.05) / 4)
    found = figures("binary", *cohort(100), names(100)).find("ece")
    assert "perfect calibration shows" in found.note
    assert (found.low, found.high) == (None, None)
    assert "resampling inflates it" in found.note


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 3)), min_size=4, max_size=40))
def test_a_weight_is_a_repetition(rows: list[tuple[bool, int, int]]) -> None:
    """A bootstrap sample is computed from weights; it must be what its rows give when they are written out."""
    truth = np.array([row[0] for row in rows])
    score = np.array([row[1] for row in rows]) / 6
    weights = np.array([row[2] for row in rows])
    again = np.repeat(np.arange(len(rows)), weights)
    if len(np.unique(truth[again])) < 2:
        return
    wide = weights[None, :].astype(float)
    assert weighted.auroc(truth, score)(wide)[0] == pytest.approx(metrics.roc_auc_score(truth[again], score[again]))
    assert weighted.average_precision(truth, score)(wide)[0] == pytest.approx(
        metrics.average_precision_score(truth[again], score[again])
    )
    if len(np.unique(score[again])) > 1:
        assert weighted.spearman(truth.astype(float), score)(wide)[0] == pytest.approx(
            stats.spearmanr(truth[again], score[again]).statistic
        )
        assert weighted.r2(truth.astype(float), score)(wide)[0] == pytest.approx(
            metrics.r2_score(truth[again], score[again])
        )


def test_recalibration_of_a_weighted_sample() -> None:
    truth, score = cohort(80, seed=5)
    weights = np.random.default_rng(0).integers(0, 4, 80)
    again = np.repeat(np.arange(80), weights)
    x = weighted.logit(score)
    fit = LogisticRegression(C=np.inf, tol=1e-10).fit(x[again, None], truth[again])
    intercept, slope = weighted.recalibration(truth == 1, x, weights[None, :].astype(float))[0]
    assert slope == pytest.approx(fit.coef_[0, 0], rel=1e-4)
    assert intercept == pytest.approx(fit.intercept_[0], rel=1e-4)


# ---- what it refuses, and what it says


def test_an_absent_class_has_no_auroc() -> None:
    table = figures("binary", [1, 1, 1], [0.2, 0.8, 0.9], names(3), classes=["normal", "tumour"])
    assert table.main.value is None
    assert "no patient of class normal" in table.main.note
    assert value(table, "accuracy") == pytest.approx(2 / 3)
    assert value(table, "sensitivity") == pytest.approx(2 / 3)
    assert table.find("specificity").value is None
    assert table.main.text() == "not computed"


def test_an_absent_class_of_several_takes_the_mean_away_but_not_the_others() -> None:
    score = np.array([[0.6, 0.2, 0.2], [0.5, 0.3, 0.2], [0.3, 0.6, 0.1], [0.4, 0.5, 0.1]])
    table = figures("multiclass", [0, 0, 1, 1], score, names(4), classes=["a", "b", "c"], draws=50)
    assert table.main.value is None
    assert "class c" in table.main.note
    assert value(table, "auroc", "a") == 1.0
    assert table.find("auroc", label="c").value is None
    assert table.find("auroc", label="c").n_positive == 0


def test_separated_classes_have_no_slope() -> None:
    table = figures("binary", [0, 0, 1, 1], [0.1, 0.4, 0.6, 0.9], names(4), draws=100)
    assert table.find("calibration_slope").value is None
    assert "part the classes wholly" in table.find("calibration_slope").note
    assert value(table, "auroc") == 1.0
    assert "all samples agree" in table.main.note


def test_nothing_is_nan() -> None:
    for kind, truth, score in (
        ("binary", [0, 1], [0.5, 0.5]),
        ("binary", [0, 0], [0.0, 1.0]),
        ("multiclass", [0, 0], [[1.0, 0.0], [1.0, 0.0]]),
        ("ordinal", [1, 1], [[0.5, 0.5], [0.5, 0.5]]),
        ("regression", [1.0, 1.0], [1.0, 1.0]),
        ("survival_cox", [[1, 0], [2, 0]], [0.1, 0.2]),
        ("multilabel", [[1, np.nan], [1, np.nan]], [[0.5, 0.5], [0.5, 0.5]]),
    ):
        table = figures(kind, truth, score, names(2), draws=20)  # type: ignore[arg-type]
        for figure in table.figures:
            for number in (figure.value, figure.low, figure.high):
                assert number is None or math.isfinite(number), figure
            assert figure.value is not None or figure.note, figure


def test_one_patient_of_a_class_gives_a_value_without_interval() -> None:
    table = figures("binary", [0, 0, 0, 1], [0.1, 0.2, 0.7, 0.5], names(4), classes=["no", "yes"])
    assert value(table, "auroc") == pytest.approx(2 / 3)
    assert (table.main.low, table.main.high) == (None, None)
    assert "only 1 patient of class yes" in table.main.note


@pytest.mark.parametrize(
    ("kind", "truth", "score", "message"),
    [
        ("binary", [0, 1], [0.2, np.nan], "patient p0001 is not finite"),
        ("binary", [0, 1], [-1.0, 2.0], "no probabilities"),
        ("binary", [0, 2], [0.2, 0.4], "label 2"),
        ("binary", [np.nan, np.nan], [0.2, 0.4], "no row has a label"),
        ("binary", [0, 1], [0.2], "2 labels but 1 scores"),
        ("multiclass", [0, 1], [[0.2, 0.2], [0.5, 0.5]], "sum to 1"),
        ("multiclass", [0, 3], [[0.8, 0.2], [0.5, 0.5]], "label 3"),
        ("survival_cox", [1, 0], [0.2, 0.4], "don't fit"),
        ("survival_cox", [[-1, 0], [1, 1]], [0.2, 0.4], "time is -1"),
        ("nonsense", [1, 0], [0.2, 0.4], "known: binary"),
    ],
)
def test_what_is_wrong_is_said(kind: str, truth: object, score: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        figures(kind, truth, score, names(2))  # type: ignore[arg-type]


# ---- patients, sites, folds


def test_bags_of_a_patient_are_one_row() -> None:
    table = figures("binary", [0, 1, 1, 0], [0.3, 0.2, 0.8, 0.6], ["a", "b", "b", "c"], draws=0)
    # b has the mean 0.5: above a, below c.
    assert value(table, "auroc") == 0.5
    assert (table.n_patients, table.n_bags, table.unit) == (3, 4, "patients")
    assert any("mean over the bags" in note for note in table.notes)


def test_bags_with_other_labels_stay_rows_and_intervals_stay_with_patients() -> None:
    truth, score = cohort(60, seed=6)
    patients = [f"p{number // 2}" for number in range(60)]
    cases = gather_cases("binary", truth, score, patients)
    assert cases.unit == "bags"
    assert len(cases) == 60
    strata = np.zeros(60, np.intp)
    for weights in weighted.bootstrap(cases.patient, strata, 30, np.random.default_rng(0)):
        assert (weights[:, 0::2] == weights[:, 1::2]).all()
        assert (weights.sum(axis=1) == 60).all()
    table = figures_of(cases)
    assert value(table, "auroc") == pytest.approx(metrics.roc_auc_score(truth, score))
    assert table.main.n_patients == 30


def test_samples_are_drawn_within_classes() -> None:
    truth = np.array([1] * 3 + [0] * 50)
    for weights in weighted.bootstrap(np.arange(53), truth, 200, np.random.default_rng(0)):
        assert (weights[:, :3].sum(axis=1) == 3).all()
        assert weights[:, :3].max() == 3


def test_site_table_and_pairs_within_sites() -> None:
    # Within each site the score is useless (0.5); the sites differ in both, so pooled it looks good.
    truth = [1, 1, 1, 0] * 5 + [1, 0, 0, 0] * 5
    score = [0.9] * 20 + [0.1] * 20
    sites = ["north"] * 20 + ["south"] * 19 + [""]
    table = figures("binary", truth, score, names(40), sites, draws=50)
    assert value(table, "auroc") == 0.75
    assert value(table, "auroc_within_sites") == 0.5
    assert value(table, "auroc", site="north") == 0.5
    assert table.find("auroc", site="north").n_patients == 20
    assert table.find("auroc", site="unknown").value is None


def test_pairs_within_folds_do_not_mind_how_folds_are_scaled() -> None:
    truth, score = cohort(100, shift=1.5, seed=7)
    folds = np.arange(100) % 2
    moved = np.where(folds == 1, score * 0.2, score)
    table = figures("binary", truth, moved, names(100), folds=folds.tolist(), draws=20)
    each = [metrics.roc_auc_score(truth[folds == fold], score[folds == fold]) for fold in (0, 1)]
    assert min(each) < value(table, "auroc_within_folds") < max(each)
    assert value(table, "auroc") < min(each)


def test_rows_without_label_are_left_out_and_counted() -> None:
    table = figures("binary", [0, np.nan, 1, 1], [0.1, 0.9, 0.8, 0.7], names(4), draws=0)
    assert table.n_patients == 3
    assert any("1 of 4 bags have no label" in note for note in table.notes)


def test_thresholds_a_row() -> None:
    table = figures("binary", [0, 1, 0, 1], [0.3, 0.4, 0.6, 0.7], names(4), threshold=[0.35, 0.35, 0.65, 0.65], draws=0)
    assert value(table, "accuracy") == 1.0


# ---- intervals


def test_intervals_are_the_same_for_a_seed_and_hold_the_value() -> None:
    truth, score = cohort(120, seed=8)
    first, again, other = (figures("binary", truth, score, names(120), seed=seed) for seed in (3, 3, 4))
    assert first.rows() == again.rows()
    assert first.main.low != other.main.low
    for figure in first.figures:
        if figure.value is not None and figure.name != "ece":
            assert figure.low is not None and figure.high is not None
            assert figure.low <= figure.value <= figure.high, figure


def test_bootstrap_width_is_that_of_the_formula() -> None:
    """Hanley and McNeil's standard error of the AUROC, 1982, within a tenth."""
    truth, score = cohort(600, seed=9)
    table = figures("binary", truth, score, names(600))
    a, n1 = value(table, "auroc"), int(truth.sum())
    n0 = 600 - n1
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = math.sqrt((a * (1 - a) + (n1 - 1) * (q1 - a * a) + (n0 - 1) * (q2 - a * a)) / (n1 * n0))
    assert table.main.high is not None and table.main.low is not None
    assert (table.main.high - table.main.low) / (2 * 1.96) == pytest.approx(error, rel=0.1)


@pytest.mark.slow
def test_intervals_cover_the_truth() -> None:
    """Of 400 simulated cohorts of 100 patients, about 95 % have the true AUROC within their interval."""
    rng = np.random.default_rng(10)
    true = stats.norm.cdf(1 / math.sqrt(2))
    held = 0
    for _ in range(400):
        truth = rng.permutation(100) < 40
        score = stats.norm.cdf(rng.normal(size=100) + truth)
        found = figures("binary", truth.astype(float), score, names(100), draws=400).main
        assert found.low is not None and found.high is not None
        held += found.low <= true <= found.high
    assert 0.91 <= held / 400 <= 0.98


# ---- what plots show


def test_curves_are_those_of_scikit_learn() -> None:
    truth, score = cohort(90, seed=11)
    cases = gather_cases("binary", truth, score, names(90))
    band = roc_band(cases, draws=50)
    fpr, tpr, _ = metrics.roc_curve(truth, score, drop_intermediate=False)
    assert band.x == pytest.approx(fpr)
    assert band.y == pytest.approx(tpr)
    assert band.low is not None and band.high is not None
    assert (band.low <= band.high).all()
    band = precision_recall_band(cases, draws=50)
    precision, recall, _ = metrics.precision_recall_curve(truth, score)
    assert band.x[1:] == pytest.approx(recall[-2::-1])
    assert band.y[1:] == pytest.approx(precision[-2::-1])


def test_calibration_bins_and_confusion() -> None:
    cases = gather_cases("binary", [0, 1, 1, 1, 0], [0.15, 0.15, 0.9, 1.0, 0.6], names(5))
    bins = calibration_bins(cases)
    assert bins.stated == pytest.approx([0.15, 0.6, 0.95])
    assert bins.found == pytest.approx([0.5, 0, 1])
    assert bins.n_rows.tolist() == [2, 1, 2]
    # Wilson's interval of 1 in 2.
    assert bins.low[0] == pytest.approx(0.0945, abs=1e-3)
    assert confusion_counts(cases).tolist() == [[1, 1], [1, 2]]
