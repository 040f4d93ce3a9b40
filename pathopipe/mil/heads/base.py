"""What all heads share: sizes, the masked input, standardisation, covariates, and the masked softmax."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pathopipe.errors import UsageError

__all__ = ["GatedAttention", "Head", "HeadOutput", "HeadShape", "TileProjection", "attention_pool", "masked_softmax"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """The sizes of a head; with its name, all that is needed to build it again."""

    features: int
    """Width of a tile's feature vector."""
    outputs: int
    """Logits a bag, over all targets."""
    covariates: int = 0
    """Width of the encoded covariates; 0 without."""
    hidden: int = 128
    """Width of a tile after the projection."""
    attention: int = 64
    """Width of the attention network."""
    dropout: float = 0.25
    """Share of hidden values dropped while training."""
    input_dropout: float = 0.0
    """Share of tile features dropped while training."""
    centre: bool = False
    """Tiles are seen relative to the middle of their bag: the mean of the nine tenths that lie nearest to its mean."""
    instance_tiles: int = 8
    """CLAM: tiles with most and with least attention that get pseudo-labels; a third of the bag at most."""


class HeadOutput(NamedTuple):
    """What a head makes of a batch of B bags of up to N tiles."""

    logits: Tensor
    """(B, K) float."""
    attention: Tensor | None
    """(B, N, A) weights that sum to one over the real tiles of a bag, zero on padding; A is 1, or K where every output
    has its own. None for heads without."""
    instance_loss: Tensor | None = None
    """Scalar to add to the loss; only while training with labels, and only for heads that have one."""
    contributions: Tensor | None = None
    """(B, N, K) what each tile adds to each logit, for heads whose logits are sums over tiles; without covariates."""


class Head(nn.Module):
    """Base of all heads: takes standardised, masked tiles to ``pool``, and adds the covariates' share to the logits.

    Padding has no influence whatever it holds, NaN included: it is replaced by zeros before anything is computed.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        # Buffers, so that the standardisation of the training tiles travels with the weights.
        self.register_buffer("shift", torch.zeros(shape.features))
        self.register_buffer("scale", torch.ones(shape.features))
        self.covariates = nn.Linear(shape.covariates, shape.outputs, bias=False) if shape.covariates else None
        if self.covariates is not None:
            nn.init.zeros_(self.covariates.weight)

    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Set the feature standardisation: (D,) mean and standard deviation of the training tiles."""
        self.shift.copy_(mean)
        self.scale.copy_(torch.where(std > 0, 1 / std, torch.ones_like(std)))

    def forward(
        self, tiles: Tensor, real: Tensor, covariates: Tensor | None = None, labels: Tensor | None = None
    ) -> HeadOutput:
        """Score a batch of bags.

        Args:
            tiles: (B, N, D) float; what padding holds does not matter.
            real: (B, N) bool, False where padded.
            covariates: (B, C) encoded covariates, for heads built with some.
            labels: (B, K) 1 or 0 for each output that stands for a class, NaN elsewhere; for an instance loss.

        Raises:
            UsageError: A bag has no real tile.
        """
        if not bool(real.any(dim=1).all()):
            raise UsageError("a bag has no tile; leave empty bags out")
        tiles = ((tiles.float() - self.shift) * self.scale).masked_fill(~real[..., None], 0)
        if self.shape.centre:
            middle = _middle(tiles, real)
            tiles = (tiles - middle).masked_fill(~real[..., None], 0)
        output = self.pool(tiles, real, labels)
        if self.covariates is None:
            return output
        if covariates is None:
            raise UsageError("this model was trained with covariates; give them")
        return output._replace(logits=output.logits + self.covariates(covariates))

    def pool(self, tiles: Tensor, real: Tensor, labels: Tensor | None) -> HeadOutput:
        """Score standardised tiles (B, N, D) that are zero where padded."""
        raise NotImplementedError


def _middle(tiles: Tensor, real: Tensor) -> Tensor:
    """(B, 1, D) the mean of the nine tenths of each bag's tiles that lie nearest to the mean of all.

    Few strong tiles shift a bag's mean and with it, seen from there, all its other tiles; a network then learns that
    shift instead of the tiles. So what lies far out does not count.
    """
    mean = tiles.sum(dim=1, keepdim=True) / real.sum(dim=1)[:, None, None]
    distance = ((tiles - mean) ** 2).sum(dim=2).masked_fill(~real, torch.nan)
    near = distance <= distance.nanquantile(0.9, dim=1, keepdim=True)  # False for NaN
    return (tiles * near[..., None]).sum(dim=1, keepdim=True) / near.sum(dim=1)[:, None, None]


class TileProjection(nn.Sequential):
    """Tile features to hidden ones: linear, layer norm, ReLU, with dropout on both sides."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__(
            nn.Dropout(shape.input_dropout),
            nn.Linear(shape.features, shape.hidden),
            nn.LayerNorm(shape.hidden),
            nn.ReLU(),
            nn.Dropout(shape.dropout),
        )


class GatedAttention(nn.Module):
    """Attention scores of tiles, before softmax: ``w (tanh(V h) * sigmoid(U h))``.

    Source: Ilse, Tomczak and Welling 2018, arXiv:1802.04712, equation 9.
    """

    def __init__(self, shape: HeadShape, branches: int = 1) -> None:
        super().__init__()
        self.value = nn.Linear(shape.hidden, shape.attention)
        self.gate = nn.Linear(shape.hidden, shape.attention)
        self.dropout = nn.Dropout(shape.dropout)
        self.score = nn.Linear(shape.attention, branches)
        # Training begins from the mean of all tiles, not from attention drawn at random.
        nn.init.zeros_(self.score.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, N, H) -> (B, N, branches)."""
        scores: Tensor = self.score(self.dropout(torch.tanh(self.value(hidden)) * torch.sigmoid(self.gate(hidden))))
        return scores


def masked_softmax(scores: Tensor, real: Tensor) -> Tensor:
    """Softmax over the real tiles of each bag; exactly zero on padding.

    Args:
        scores: (B, N, A) float.
        real: (B, N) bool; at least one True a bag.
    """
    return torch.softmax(scores.float().masked_fill(~real[..., None], -torch.inf), dim=1)


def attention_pool(hidden: Tensor, weights: Tensor) -> Tensor:
    """(B, N, H) tiles and (B, N, A) weights -> (B, A, H): one weighted mean a branch."""
    return weights.transpose(1, 2).to(hidden.dtype) @ hidden
