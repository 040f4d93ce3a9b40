"""DSMIL: the tile with the highest score, and a mean of all tiles weighted by their likeness to it."""

import torch
from torch import Tensor, nn

from pathopipe.mil.heads.base import Head, HeadOutput, HeadShape, TileProjection, attention_pool, masked_softmax

__all__ = ["DsmilHead"]


class DsmilHead(Head):
    """Two streams whose logits are averaged: the critical tile of each class, and attention by distance to it.

    Source: Li, Li and Eliceiri 2021, Dual-stream multiple instance learning network for whole slide image
    classification, CVPR, arXiv:2011.08939, equations 3 to 7. Ours: the mask, the tile projection before both streams;
    features of one magnification; the loss is taken on the averaged logits.
    """

    def __init__(self, shape: HeadShape) -> None:
        super().__init__(shape)
        self.project = TileProjection(shape)
        self.classify_tiles = nn.Linear(shape.hidden, shape.outputs)
        self.query = nn.Linear(shape.hidden, shape.attention)
        self.value = nn.Linear(shape.hidden, shape.hidden)
        self.classify = nn.Linear(shape.outputs * shape.hidden, shape.outputs)

    def pool(self, tiles: Tensor, real: Tensor, labels: Tensor | None) -> HeadOutput:
        """One attention weight a tile and output."""
        hidden = self.project(tiles)
        scores = self.classify_tiles(hidden).float().masked_fill(~real[..., None], -torch.inf)
        highest, rows = scores.max(dim=1)  # (B, K)
        query = self.query(hidden)  # (B, N, Q)
        critical = query.gather(1, rows[..., None].expand(-1, -1, query.shape[2]))  # (B, K, Q)
        likeness = query @ critical.transpose(1, 2) / query.shape[2] ** 0.5  # (B, N, K)
        attention = masked_softmax(likeness, real)
        pooled = attention_pool(self.value(hidden), attention)  # (B, K, H)
        logits = (highest + self.classify(pooled.flatten(1)).float()) / 2
        return HeadOutput(logits, attention)
