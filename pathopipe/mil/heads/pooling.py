"""Mean and maximum of tiles with a linear head: the simplest networks a bag can have."""

import torch
from torch import Tensor, nn

from pathopipe.mil.heads.base import Head, HeadOutput, HeadShape, TileProjection

__all__ = ["MaxHead", "MeanHead"]


class MeanHead(Head):
    """Each tile is scored, and the bag's logits are their mean: a linear head on the mean tile.

    Source: Wang et al. 2018, Revisiting multiple instance neural networks, Pattern Recognition 74 (MI-Net, mean).
    """

    def __init__(self, shape: HeadShape) -> None:
        super().__init__(shape)
        self.project = TileProjection(shape)
        self.classify = nn.Linear(shape.hidden, shape.outputs)

    def pool(self, tiles: Tensor, real: Tensor, labels: Tensor | None) -> HeadOutput:
        """All tiles weigh the same."""
        weights = real.float()[..., None] / real.sum(dim=1)[:, None, None]
        contributions = self.classify(self.project(tiles)).float() * weights
        return HeadOutput(contributions.sum(dim=1), weights, contributions=contributions)


class MaxHead(Head):
    """Each tile is scored, and the bag's logit is the highest one, for each output by itself.

    Source: Campanella et al. 2019, Nature Medicine 25, 1301-1309 (the tile with the highest score stands for the
    slide). Attention is one for that tile and zero elsewhere.
    """

    def __init__(self, shape: HeadShape) -> None:
        super().__init__(shape)
        self.project = TileProjection(shape)
        self.classify = nn.Linear(shape.hidden, shape.outputs)

    def pool(self, tiles: Tensor, real: Tensor, labels: Tensor | None) -> HeadOutput:
        """The highest tile of each output."""
        scores = self.classify(self.project(tiles)).float().masked_fill(~real[..., None], -torch.inf)
        logits, rows = scores.max(dim=1)
        attention = torch.zeros_like(scores).scatter(1, rows[:, None], 1.0)
        return HeadOutput(logits, attention)
