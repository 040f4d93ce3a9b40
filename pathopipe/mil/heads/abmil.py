"""Gated attention: the weighted mean of a bag's tiles, with weights that a small network gives."""

from torch import Tensor, nn

from pathopipe.mil.heads.base import (
    GatedAttention,
    Head,
    HeadOutput,
    HeadShape,
    TileProjection,
    attention_pool,
    masked_softmax,
)

__all__ = ["AbmilHead"]


class AbmilHead(Head):
    """Attention-based pooling with a gate, then one linear layer.

    Source: Ilse, Tomczak and Welling 2018, Attention-based deep multiple instance learning, arXiv:1802.04712. Ours: the
    mask, layer norm in the projection, dropout.
    """

    def __init__(self, shape: HeadShape) -> None:
        super().__init__(shape)
        self.project = TileProjection(shape)
        self.attend = GatedAttention(shape)
        self.classify = nn.Linear(shape.hidden, shape.outputs)

    def pool(self, tiles: Tensor, real: Tensor, labels: Tensor | None) -> HeadOutput:
        """One attention weight a tile, for all outputs."""
        hidden = self.project(tiles)
        attention = masked_softmax(self.attend(hidden), real)
        pooled = attention_pool(hidden, attention)[:, 0]
        return HeadOutput(self.classify(pooled).float(), attention)
