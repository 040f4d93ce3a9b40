"""A linear model on the mean and the maximum of a bag's tiles: the baseline that is reported beside every head."""

import torch
from torch import Tensor, nn

from pathopipe.mil.heads.base import Head, HeadOutput, HeadShape

__all__ = ["LogisticHead", "pool_mean_max"]


class LogisticHead(Head):
    """Mean and maximum of every feature, standardised over the training bags, and one linear layer.

    Trained to the optimum of its penalised loss, not by epochs: for a class target this is logistic regression, for a
    survival target penalised Cox regression. ``shift`` and ``scale`` stay neutral: the pooled values are standardised.
    """

    pooled_shift: Tensor
    pooled_scale: Tensor

    def __init__(self, shape: HeadShape) -> None:
        super().__init__(shape)
        self.register_buffer("pooled_shift", torch.zeros(2 * shape.features))
        self.register_buffer("pooled_scale", torch.ones(2 * shape.features))
        self.classify = nn.Linear(2 * shape.features, shape.outputs)
        nn.init.zeros_(self.classify.weight)
        nn.init.zeros_(self.classify.bias)

    def pool(self, tiles: Tensor, real: Tensor, labels: Tensor | None) -> HeadOutput:
        """No attention: every tile counts in the mean, and some in the maximum."""
        return HeadOutput(self.score(pool_mean_max(tiles, real)), None)

    def score(self, pooled: Tensor) -> Tensor:
        """(B, 2 D) mean and maximum -> (B, K)."""
        logits: Tensor = self.classify((pooled - self.pooled_shift) * self.pooled_scale)
        return logits.float()


def pool_mean_max(tiles: Tensor, real: Tensor) -> Tensor:
    """Mean, then maximum over the real tiles: (B, N, D) zero where padded -> (B, 2 D)."""
    mean = tiles.sum(dim=1) / real.sum(dim=1)[:, None]
    highest = tiles.masked_fill(~real[..., None], -torch.inf).amax(dim=1)
    return torch.cat([mean, highest], dim=1)
