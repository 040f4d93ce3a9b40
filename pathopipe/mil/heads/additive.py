"""Additive MIL: logits are sums over tiles, so what each tile adds to each class can be read off exactly."""

import torch
from torch import Tensor, nn

from pathopipe.mil.heads.base import GatedAttention, Head, HeadOutput, HeadShape, TileProjection, masked_softmax

__all__ = ["AdditiveHead"]


class AdditiveHead(Head):
    """Gated attention weighs the tiles, and a network scores each weighted tile by itself.

    Source: Javed et al. 2022, Additive MIL: intrinsically interpretable multiple instance learning for pathology,
    NeurIPS, arXiv:2206.01794, equation 5. Ours: the mask; one attention branch an output; and weights relative to the
    mean weight with the mean over tiles in place of their sum, so that the size of a bag moves neither the input of
    the scoring network nor the logits.
    """

    def __init__(self, shape: HeadShape) -> None:
        super().__init__(shape)
        self.project = TileProjection(shape)
        self.attend = GatedAttention(shape, shape.outputs)
        self.classify = nn.ModuleList(
            nn.Sequential(nn.Linear(shape.hidden, shape.attention), nn.ReLU(), nn.Linear(shape.attention, 1))
            for _ in range(shape.outputs)
        )

    def pool(self, tiles: Tensor, real: Tensor, labels: Tensor | None) -> HeadOutput:
        """One attention weight a tile and output; contributions sum to the logits."""
        hidden = self.project(tiles)
        attention = masked_softmax(self.attend(hidden), real)
        n_tiles = real.sum(dim=1)[:, None, None]
        relative = (attention * n_tiles).to(hidden.dtype)
        scores = [classify(hidden * relative[..., k, None]) for k, classify in enumerate(self.classify)]
        contributions = torch.cat(scores, dim=2).float().masked_fill(~real[..., None], 0) / n_tiles
        return HeadOutput(contributions.sum(dim=1), attention, contributions=contributions)
