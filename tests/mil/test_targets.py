"""Targets: how columns are read, losses against written-out formulas, missing labels, predictions."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from pathopipe.cohort import LabelTable
from pathopipe.errors import UsageError
from pathopipe.mil.targets import (
    TargetSpec,
    class_labels,
    cox_loss,
    encode_targets,
    fit_targets,
    hazard_loss,
    label_texts,
    parse_targets,
    predict_target,
    scores_of,
    slice_of,
    target_loss,
)


def table(**columns: list[str]) -> LabelTable:
    n = len(next(iter(columns.values())))
    names = tuple(f"s{i}" for i in range(n))
    return LabelTable(
        source="labels.csv",
        slide_ids=names,
        patient_ids=names,
        sites=("",) * n,
        split=None,
        columns={name: tuple(cells) for name, cells in columns.items()},
    )


def spec(kind: str, **more: object) -> TargetSpec:
    return TargetSpec(name="t", kind=kind, columns=("t",), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cells", "kind", "classes"),
    [
        (["1", "0", "", "1"], "binary", ("0", "1")),
        (["tumour", "normal", "NA"], "binary", ("normal", "tumour")),
        (["positive", "Negative"], "binary", ("Negative", "positive")),
        (["b", "a", "c"], "multiclass", ("a", "b", "c")),
        (["10", "9", "2"], "multiclass", ("2", "9", "10")),
        (["ER;PR", "PR", "HER2"], "multilabel", ("ER", "HER2", "PR")),
        ([str(i / 7) for i in range(12)], "regression", ()),
    ],
)
def test_kinds_are_found(cells: list[str], kind: str, classes: tuple[str, ...]) -> None:
    (found,) = parse_targets("t", table(t=cells))
    assert (found.kind, found.classes) == (kind, classes)


def test_several_targets_lie_side_by_side() -> None:
    rows = table(grade=["low", "high", "mid", ""], days=["10", "5", "", "7"], died=["1", "0", "1", "yes"])
    specs = parse_targets(
        "grade,days:died", rows, kind="ordinal,survival_cox", classes={"grade": ["low", "mid", "high"]}
    )
    truth = encode_targets(specs, rows)
    np.testing.assert_array_equal(truth, [[0, 10, 1], [2, 5, 0], [1, math.nan, math.nan], [math.nan, 7, 1]])
    assert slice_of(specs, 1, "truth") == slice(1, 3)
    assert slice_of(specs, 1, "logits") == slice(2, 3)
    assert label_texts(specs[0], truth[:, :1]) == {"grade": ["low", "high", "mid", ""]}
    assert label_texts(specs[1], truth[:, 1:])["days_event"] == ["1", "0", "", "1"]


@pytest.mark.parametrize(
    ("text", "kind", "columns", "message"),
    [
        ("t", "auto", {"t": ["a", "a", ""]}, "one class only"),
        ("t", "binary", {"t": ["a", "b", "c"]}, "3 classes"),
        ("t", "regression", {"t": ["1", "two"]}, "'two'"),
        ("t", "regression", {"t": ["1", "1"]}, "one value"),
        ("t", "survival_cox", {"t": ["1", "2"]}, "time:event"),
        ("t:e", "auto", {"t": ["1", "-2"], "e": ["1", "1"]}, "'-2'"),
        ("t:e", "auto", {"t": ["1", "2"], "e": ["1", "maybe"]}, "'maybe'"),
        ("t:e", "auto", {"t": ["1", "2"], "e": ["0", "0"]}, "no event"),
        ("tt", "auto", {"t": ["a", "b"]}, "no column 'tt'"),
        ("t", "bianry", {"t": ["a", "b"]}, "did you mean 'binary'"),
        ("t,t", "auto", {"t": ["a", "b"]}, "twice"),
        ("", "auto", {"t": ["a", "b"]}, "names no column"),
    ],
)
def test_bad_labels_are_one_line(text: str, kind: str, columns: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_targets(text, table(**columns), kind=kind)
    assert "\n" not in str(caught.value)


def test_specs_survive_json() -> None:
    import json

    one = spec("survival_discrete", edges=(1.5, 3.0))
    assert TargetSpec.from_json(json.loads(json.dumps(one.to_json()))) == one


# --- losses ------------------------------------------------------------------------------------------------------


def draw(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n + k))


def test_class_losses_are_those_of_scikit_learn() -> None:
    logits = draw(6, 3)
    truth = torch.tensor([[0.0], [1], [2], [1], [0], [2]])
    expected = log_loss(truth[:, 0], torch.softmax(logits.double(), dim=1).numpy(), labels=[0, 1, 2])
    assert float(target_loss([spec("multiclass", classes=("a", "b", "c"))], logits, truth)) == pytest.approx(expected)
    binary = torch.tensor([[0.0], [1], [1], [1], [0], [0]])
    expected = log_loss(binary[:, 0], torch.sigmoid(logits[:, 0].double()).numpy())
    assert float(target_loss([spec("binary", classes=("a", "b"))], logits[:, :1], binary)) == pytest.approx(expected)


def test_balanced_weights_even_out_classes() -> None:
    truth = np.asarray([[0.0], [0], [0], [1]])
    (fitted,) = fit_targets([spec("binary", classes=("a", "b"))], truth, balanced=True)
    assert fitted.class_weights == pytest.approx((2 / 3, 2.0))
    at_zero = float(target_loss([fitted], torch.zeros(4, 1), torch.from_numpy(truth)))
    assert at_zero == pytest.approx(math.log(2))


def test_missing_labels_have_no_part() -> None:
    specs = [spec("binary", classes=("a", "b")), spec("regression", mean=2.0, std=4.0)]
    logits = draw(4, 2).requires_grad_()
    truth = torch.tensor([[1.0, 6.0], [math.nan, 2.0], [0.0, math.nan], [math.nan, math.nan]])
    loss = target_loss(specs, logits, truth)
    expected = target_loss(specs[:1], logits[[0, 2], :1], truth[[0, 2], :1])
    expected = expected + target_loss(specs[1:], logits[:2, 1:], truth[:2, 1:])
    assert float(loss.detach()) == pytest.approx(float(expected.detach()))
    loss.backward()
    assert logits.grad is not None and not logits.grad[3].any()
    assert logits.grad[1, 0] == 0 and logits.grad[2, 1] == 0


def test_huber_of_standardised_values() -> None:
    one = spec("regression", mean=10.0, std=2.0)
    loss = target_loss([one], torch.tensor([[0.0], [0.0]]), torch.tensor([[11.0], [20.0]]))
    assert float(loss) == pytest.approx((0.5 * 0.5**2 + (5 - 0.5)) / 2)


def test_cox_loss_by_hand_with_ties() -> None:
    time = [3.0, 1.0, 3.0, 5.0, 2.0, 3.0]
    event = [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    risk = draw(6, 1)[:, 0]
    total = 0.0
    for i in range(6):
        if event[i]:
            at_risk = sum(math.exp(float(risk[j])) for j in range(6) if time[j] >= time[i])
            total += math.log(at_risk) - float(risk[i])
    assert float(cox_loss(risk, torch.tensor(time), torch.tensor(event))) == pytest.approx(total / 4, rel=1e-5)


def test_cox_risk_sets_reach_beyond_the_batch() -> None:
    one = spec("survival_cox")
    logits, truth = draw(8, 1), torch.tensor([[float(i % 5), float(i % 3 == 0)] for i in range(8)])
    batch = logits[:3].clone().requires_grad_()
    loss = target_loss([one], batch, truth[:3], (logits[3:], truth[3:]))
    assert float(loss.detach()) == pytest.approx(float(target_loss([one], logits, truth)), rel=1e-5)
    whole = logits.clone().requires_grad_()
    target_loss([one], whole, truth).backward()
    loss.backward()
    assert batch.grad is not None and whole.grad is not None
    torch.testing.assert_close(batch.grad, whole.grad[:3] * 8 / 3)


def test_hazard_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0], [0.5, 0.5, 0.5]])
    h = torch.sigmoid(logits).numpy()
    event = -math.log((1 - h[0, 0]) * h[0, 1])
    censored = -math.log((1 - h[1, 0]) * (1 - h[1, 1]))
    loss = hazard_loss(logits, torch.tensor([1, 1]), torch.tensor([1.0, 0.0]))
    assert float(loss) == pytest.approx((event + censored) / 2, rel=1e-5)


def test_discrete_intervals_hold_as_many_events_each() -> None:
    times = np.arange(1.0, 101.0)
    truth = np.stack([times, (times % 2 == 0).astype(float)], axis=1)
    (fitted,) = fit_targets([spec("survival_discrete")], truth, intervals=4)
    interval = np.searchsorted(fitted.edges, times[truth[:, 1] == 1])
    assert fitted.outputs == 4
    assert np.ptp(np.bincount(interval)) <= 1


def test_ordinal_probabilities_fall_in_order_whatever_the_logits() -> None:
    one = spec("ordinal", classes=("a", "b", "c", "d"))
    probability = predict_target(one, draw(50, 3).double().numpy() * 5, temperature=0.7)
    assert (probability >= 0).all()
    np.testing.assert_allclose(probability.sum(axis=1), 1)
    # Higher classes lower the loss of a bag with high logits, step by step.
    high = torch.tensor([[9.0, -9.0, -9.0]])
    losses = [float(target_loss([one], high, torch.tensor([[float(k)]]))) for k in range(4)]
    assert losses == sorted(losses, reverse=True)


def test_predictions_and_scores() -> None:
    binary = predict_target(spec("binary", classes=("a", "b")), np.asarray([[0.0], [2.0]]), temperature=2.0)
    np.testing.assert_allclose(binary[:, 1], [0.5, 1 / (1 + math.exp(-1))])
    assert scores_of(spec("binary", classes=("a", "b")), binary).tolist() == binary[:, 1].tolist()
    value = predict_target(spec("regression", mean=10.0, std=2.0), np.asarray([[1.5]]))
    assert value.tolist() == [[13.0]]
    hazards = np.asarray([[3.0, 0, 0], [-3.0, 0, 0]])
    risk = predict_target(spec("survival_discrete", edges=(1.0, 2.0)), hazards)
    assert risk[0, 0] > risk[1, 0]


def test_class_labels_for_instance_losses() -> None:
    specs = [spec("multiclass", classes=("a", "b", "c")), spec("binary", classes=("n", "p")), spec("regression")]
    labels = class_labels(specs, torch.tensor([[1.0, 1.0, 5.0], [math.nan, 0.0, 5.0]]))
    np.testing.assert_array_equal(labels, [[0, 1, 0, 1, math.nan], [math.nan, math.nan, math.nan, 0, math.nan]])
