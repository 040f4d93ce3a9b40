"""Heads: what padding, order and batching may and may not change, and what the papers' formulas say."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pathopipe.errors import UsageError
from pathopipe.mil.heads import HEADS, HeadOutput, HeadShape, build_head
from pathopipe.mil.heads.abmil import AbmilHead
from pathopipe.mil.heads.additive import AdditiveHead
from pathopipe.mil.heads.base import Head
from pathopipe.mil.heads.clam import ClamMultiHead, smooth_svm_loss
from pathopipe.mil.heads.dsmil import DsmilHead
from pathopipe.mil.heads.pooling import MaxHead, MeanHead

SHAPE = HeadShape(features=6, outputs=3, covariates=2, hidden=16, attention=8, instance_tiles=2)
LENGTHS = (5, 1, 9, 2)


def drawn(name: str) -> Head:
    """A head whose every weight is drawn, those that begin at zero too."""
    torch.manual_seed(3)
    head = build_head(name, SHAPE).eval()
    with torch.no_grad():
        for weight in head.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    head.standardise(torch.linspace(-1, 1, 6), torch.linspace(0.5, 2, 6))
    return head


def batch_of(bags: list[Tensor], length: int, fill: float = 0.0) -> tuple[Tensor, Tensor]:
    tiles = torch.full((len(bags), length, 6), fill)
    real = torch.zeros(len(bags), length, dtype=torch.bool)
    for place, bag in enumerate(bags):
        tiles[place, : len(bag)] = bag
        real[place, : len(bag)] = True
    return tiles, real


@pytest.fixture
def bags() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, 6, generator=generator) for length in LENGTHS]


def covariates() -> Tensor:
    return torch.linspace(-1, 1, 2 * len(LENGTHS)).reshape(-1, 2)


def same(first: Tensor | None, second: Tensor | None, tolerance: float) -> None:
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        torch.testing.assert_close(first, second, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", sorted(HEADS))
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -1e30])
def test_padding_has_no_influence(name: str, garbage: float, bags: list[Tensor]) -> None:
    head = drawn(name)
    clean, dirty = (head(*batch_of(bags, 9, fill), covariates()) for fill in (0.0, garbage))
    for first, second in zip(clean, dirty, strict=True):
        same(first, second, 0.0)
    longer = head(*batch_of(bags, 13, garbage), covariates())
    same(clean.logits, longer.logits, 1e-6)
    if clean.attention is not None and longer.attention is not None:
        same(clean.attention, longer.attention[:, :9], 1e-6)
        assert not longer.attention[:, 9:].any()


@pytest.mark.parametrize("name", sorted(HEADS))
def test_padding_gets_no_gradient(name: str, bags: list[Tensor]) -> None:
    head = drawn(name).train()
    tiles, real = batch_of(bags, 9, 7.0)
    tiles.requires_grad_()
    labels = torch.tensor([[1.0, 0.0, 0.0]] * len(bags))
    torch.manual_seed(0)
    output = head(tiles, real, covariates(), labels)
    loss = output.logits.sum() + (0 if output.instance_loss is None else output.instance_loss)
    loss.backward()
    assert tiles.grad is not None
    assert torch.isfinite(tiles.grad).all()
    assert not tiles.grad[~real].any()
    assert tiles.grad[real].any()


@pytest.mark.parametrize("name", sorted(HEADS))
def test_a_batch_equals_its_bags_one_by_one(name: str, bags: list[Tensor]) -> None:
    head = drawn(name)
    together = head(*batch_of(bags, 9), covariates())
    for place, bag in enumerate(bags):
        alone = head(*batch_of([bag], len(bag)), covariates()[place : place + 1])
        same(together.logits[place], alone.logits[0], 1e-5)
        if alone.attention is not None and together.attention is not None:
            same(together.attention[place, : len(bag)], alone.attention[0], 1e-5)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_order_of_tiles(name: str, bags: list[Tensor]) -> None:
    head = drawn(name)
    order = torch.tensor([4, 0, 8, 2, 6, 1, 7, 3, 5])
    given = head(*batch_of([bags[2]], 9), covariates()[:1])
    turned = head(*batch_of([bags[2][order]], 9), covariates()[:1])
    if HEADS[name].order_matters:
        assert (given.logits - turned.logits).abs().max() > 1e-4
        return
    same(given.logits, turned.logits, 1e-5)
    if given.attention is not None and turned.attention is not None:
        same(given.attention[:, order], turned.attention, 1e-5)


@pytest.mark.parametrize("name", sorted(set(HEADS) - {"logistic"}))
def test_attention_sums_to_one(name: str, bags: list[Tensor]) -> None:
    output = drawn(name)(*batch_of(bags, 9), covariates())
    assert output.attention is not None
    assert output.attention.shape[2] in (1, 3)
    assert (output.attention >= 0).all()
    same(output.attention.sum(dim=1), torch.ones(4, output.attention.shape[2]), 1e-5)


@pytest.mark.parametrize("name", ["additive", "mean"])
def test_contributions_sum_to_the_logits(name: str, bags: list[Tensor]) -> None:
    head = drawn(name)
    output = head(*batch_of(bags, 9), covariates())
    assert output.contributions is not None and head.covariates is not None
    same(output.contributions.sum(dim=1) + head.covariates(covariates()), output.logits, 1e-5)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_a_bag_without_tiles_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no tile"):
        drawn(name)(torch.zeros(1, 4, 6), torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1, 2))


def test_missing_covariates_are_refused(bags: list[Tensor]) -> None:
    with pytest.raises(UsageError, match="covariates"):
        drawn("abmil")(*batch_of(bags, 9))


def test_unknown_head_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'clam_sb'"):
        build_head("clam_ab", SHAPE)


# --- the papers' formulas, written out for one bag ---------------------------------------------------------------


def hidden_of(head: AbmilHead | AdditiveHead | ClamMultiHead | DsmilHead | MaxHead | MeanHead, bag: Tensor) -> Tensor:
    return head.project((bag - head.shift) * head.scale)


def run(head: Head, bag: Tensor) -> HeadOutput:
    output: HeadOutput = head(*batch_of([bag], len(bag)), torch.zeros(1, 2))
    return output


def gated(head: AbmilHead | AdditiveHead | ClamMultiHead, h: Tensor, branch: int) -> Tensor:
    a = head.attend
    scores = [
        float(
            (
                a.score.weight[branch] @ (torch.tanh(a.value(row)) * torch.sigmoid(a.gate(row))) + a.score.bias[branch]
            ).detach()
        )
        for row in h
    ]
    powers = np.exp(scores)
    return torch.tensor(powers / powers.sum(), dtype=torch.float32)


def test_abmil_is_gated_attention(bags: list[Tensor]) -> None:
    head = drawn("abmil")
    assert isinstance(head, AbmilHead)
    h = hidden_of(head, bags[0])
    weights = gated(head, h, 0)
    output = run(head, bags[0])
    assert output.attention is not None
    same(output.attention[0, :, 0], weights, 1e-6)
    same(output.logits[0], head.classify(sum(w * row for w, row in zip(weights, h, strict=True))), 1e-5)


def test_training_begins_from_the_mean(bags: list[Tensor]) -> None:
    torch.manual_seed(0)
    output = run(build_head("abmil", SHAPE).eval(), bags[0])
    assert output.attention is not None
    same(output.attention[0, :, 0], torch.full((5,), 0.2), 1e-6)


def test_clam_mb_has_a_branch_a_class(bags: list[Tensor]) -> None:
    head = drawn("clam_mb")
    assert isinstance(head, ClamMultiHead)
    h = hidden_of(head, bags[0])
    output = run(head, bags[0])
    for k in range(3):
        same(output.logits[0, k], head.classify[k](gated(head, h, k) @ h)[0], 1e-5)


def test_clam_tile_loss_of_one_bag(bags: list[Tensor]) -> None:
    head = drawn("clam_mb")
    assert isinstance(head, ClamMultiHead)
    head.train()
    for module in head.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
    labels = torch.tensor([[1.0, 0.0, torch.nan]])
    output = head(*batch_of([bags[2]], 9), torch.zeros(1, 2), labels)
    h = hidden_of(head, bags[2])
    own, other = (torch.argsort(gated(head, h, k)) for k in (0, 1))
    ones, zeros = torch.ones(2, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    expected = torch.stack(
        [
            smooth_svm_loss(head.classify_tiles[0](h[own[-2:]]), ones),
            smooth_svm_loss(head.classify_tiles[0](h[own[:2]]), zeros),
            smooth_svm_loss(head.classify_tiles[1](h[other[-2:]]), zeros),
        ]
    ).mean()
    same(output.instance_loss, expected, 1e-5)
    head.eval()
    assert head(*batch_of([bags[2]], 9), torch.zeros(1, 2), labels).instance_loss is None


def test_smooth_svm_loss_wants_a_margin() -> None:
    one = torch.zeros(1, dtype=torch.long)
    assert float(smooth_svm_loss(torch.tensor([[0.0, 0.0]]), one)) == pytest.approx(np.log(1 + np.e))
    assert float(smooth_svm_loss(torch.tensor([[9.0, 0.0]]), one)) == pytest.approx(np.log(1 + np.exp(-8)), rel=1e-4)


def test_dsmil_averages_its_streams(bags: list[Tensor]) -> None:
    head = drawn("dsmil")
    assert isinstance(head, DsmilHead)
    h = hidden_of(head, bags[0])
    tile_scores = head.classify_tiles(h)
    pooled = []
    for k in range(3):
        critical = h[int(tile_scores[:, k].argmax())]
        likeness = head.query(h) @ head.query(critical) / 8**0.5
        pooled.append(torch.softmax(likeness, dim=0) @ head.value(h))
    expected = (tile_scores.max(dim=0).values + head.classify(torch.cat(pooled))) / 2
    same(run(head, bags[0]).logits[0], expected, 1e-5)


def test_max_and_mean_of_tile_scores(bags: list[Tensor]) -> None:
    highest, mean = drawn("max"), drawn("mean")
    assert isinstance(highest, MaxHead) and isinstance(mean, MeanHead)
    same(run(highest, bags[0]).logits[0], highest.classify(hidden_of(highest, bags[0])).max(dim=0).values, 1e-6)
    same(run(mean, bags[0]).logits[0], mean.classify(hidden_of(mean, bags[0]).mean(dim=0)), 1e-5)


def test_additive_scores_tiles_one_by_one(bags: list[Tensor]) -> None:
    head = drawn("additive")
    assert isinstance(head, AdditiveHead)
    h = hidden_of(head, bags[0])
    for k in range(3):
        weights = gated(head, h, k)
        scores = [float(head.classify[k](row * w * 5)[0].detach()) for row, w in zip(h, weights, strict=True)]
        assert float(run(head, bags[0]).logits[0, k].detach()) == pytest.approx(np.mean(scores), abs=1e-5)


def test_transmil_attention_is_that_of_scaled_dot_product() -> None:
    torch.manual_seed(0)
    from pathopipe.mil.heads.transmil import _AttentionLayer

    layer = _AttentionLayer(16, 0.0).eval()
    tokens = torch.randn(7, 16)
    q, k, v = (part.reshape(7, 8, 2).transpose(0, 1) for part in layer.to_qkv(layer.norm(tokens)).split(16, dim=1))
    weights = F.softmax(q @ k.transpose(1, 2) / 2**0.5, dim=2)
    same(layer(tokens), tokens + layer.leave((weights @ v).transpose(0, 1).reshape(7, 16)), 1e-5)
    same(layer.weights_of_first(tokens), weights[:, 0].mean(dim=0), 1e-6)


def test_tiles_seen_from_the_middle_of_their_bag_hide_what_all_share() -> None:
    torch.manual_seed(0)
    network = build_head("abmil", HeadShape(features=6, outputs=1, hidden=8, attention=4, centre=True)).eval()
    tiles, real = torch.randn(2, 40, 6), torch.ones(2, 40, dtype=torch.bool)
    real[1, 25:] = False
    padded = tiles.masked_fill(~real[..., None], torch.nan)
    plain = network(padded, real).logits
    assert torch.allclose(network(padded + torch.randn(2, 1, 6), real).logits, plain, atol=1e-5)
    assert torch.allclose(network(tiles[1:, :25], real[1:, :25]).logits, plain[1:], atol=1e-6)
    # A few far tiles move a mean, but not this middle: the others look the same beside them.
    far = tiles.clone()
    far[0, :2] += 50
    near = ~((far - tiles).abs().sum(dim=2) > 0)[0]
    assert torch.allclose(
        network.project(_seen(network, far, real))[0, near],
        network.project(_seen(network, tiles, real))[0, near],
        atol=0.3,
    )


def _seen(network: Head, tiles: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The tiles as the head's pooling gets them."""
    caught: list[torch.Tensor] = []
    pool = network.pool
    network.pool = lambda tiles, real, labels: caught.append(tiles) or pool(tiles, real, labels)  # type: ignore[method-assign]
    network(tiles, real)
    network.pool = pool  # type: ignore[method-assign]
    return caught[0]
