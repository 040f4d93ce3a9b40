"""Fitting a network: masked labels have no say, and the weights of tasks scale their loss."""

import numpy as np
import torch
from planted_cohorts import QUICK

from pathopipe.metadata.fit import fit_network, weighted_loss
from pathopipe.metadata.inputs import Inputs
from pathopipe.metadata.network import MetadataNetwork, MetadataShape
from pathopipe.mil.targets import TargetSpec

SPECS = [
    TargetSpec(name="one", kind="binary", columns=("one",), classes=("a", "b")),
    TargetSpec(name="two", kind="multiclass", columns=("two",), classes=("a", "b", "c")),
]


def fit_once(truth: np.ndarray, specs: list[TargetSpec], rows: np.ndarray, text: np.ndarray) -> MetadataNetwork:
    n = len(text)
    inputs = Inputs(
        bags=(None,) * n,
        text=text,
        table=np.zeros((n, 0), np.float32),
        present=np.tile([False, True, False], (n, 1)),
        patient=np.arange(n),
    )
    torch.manual_seed(0)
    outputs = tuple(spec.outputs for spec in specs)
    network = MetadataNetwork(
        MetadataShape(tile_features=0, text_features=4, table_features=0, outputs=outputs, width=8, hidden=8)
    )
    settings = QUICK.model_copy(update={"epochs": 3})
    return fit_network(
        network, specs, [1.0] * len(specs), inputs, truth, rows, np.zeros(0, np.intp), settings, seed=0, where="here"
    )


def test_masked_labels_have_no_influence() -> None:
    rng = np.random.default_rng(0)
    text = rng.standard_normal((32, 4)).astype(np.float32)
    truth = np.stack([rng.integers(0, 2, 32), rng.integers(0, 3, 32)], axis=1).astype(float)
    truth[:8] = np.nan
    fitted = fit_once(truth, SPECS, np.arange(32), text)
    # Slides without any label: other inputs, the same network to the last bit.
    other = text.copy()
    other[:8] = 100
    again = fit_once(truth, SPECS, np.arange(32), other)
    assert all(torch.equal(a, b) for a, b in zip(fitted.parameters(), again.parameters(), strict=True))


def test_a_task_without_labels_moves_nothing_but_its_decay() -> None:
    rng = np.random.default_rng(0)
    text = rng.standard_normal((32, 4)).astype(np.float32)
    truth = np.stack([rng.integers(0, 2, 32), np.full(32, np.nan)], axis=1).astype(float)
    network = fit_once(truth, SPECS, np.arange(32), text)
    torch.manual_seed(0)
    fresh = MetadataNetwork(network.shape)
    assert torch.equal(network.heads[1].bias, fresh.heads[1].bias)
    assert not torch.equal(network.heads[0].bias, fresh.heads[0].bias)


def test_masked_labels_give_no_gradient() -> None:
    logits = torch.randn(6, 4, requires_grad=True)
    truth = torch.tensor([[0.0, 2], [1, torch.nan], [torch.nan, 1], [torch.nan, torch.nan], [1, 0], [0, 1]])
    weighted_loss(SPECS, [1.0, 2.0], logits, truth).backward()
    reached = logits.grad != 0
    assert reached[:, 0].tolist() == torch.isfinite(truth[:, 0]).tolist()
    assert reached[:, 1:].all(dim=1).tolist() == torch.isfinite(truth[:, 1]).tolist()
    assert not reached[3].any()


def test_weights_of_tasks_scale_their_loss() -> None:
    logits, truth = torch.randn(6, 4), torch.tensor([[0.0, 2], [1, 1], [0, 0], [1, 2], [1, 0], [0, 1]])
    one, two = weighted_loss(SPECS, [1.0, 0.0], logits, truth), weighted_loss(SPECS, [0.0, 1.0], logits, truth)
    torch.testing.assert_close(weighted_loss(SPECS, [3.0, 0.5], logits, truth), 3 * one + 0.5 * two)
