"""CLAM: gated attention whose most and least attended tiles are also classified, one branch or one a class."""

import torch
import torch.nn.functional as F  # noqa: N812
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

__all__ = ["ClamMultiHead", "ClamSingleHead", "smooth_svm_loss"]


class _ClamHead(Head):
    """Both forms of CLAM.

    Source: Lu et al. 2021, Data-efficient and weakly supervised computational pathology on whole-slide images, Nature
    Biomedical Engineering 5, 555-570, arXiv:2004.09666; written from the paper. Ours: the mask, and that a binary
    target has one output (so one branch and one tile classifier) where the paper has two.
    """

    def __init__(self, shape: HeadShape, branches: int) -> None:
        super().__init__(shape)
        self.project = TileProjection(shape)
        self.attend = GatedAttention(shape, branches)
        self.classify_tiles = nn.ModuleList(nn.Linear(shape.hidden, 2) for _ in range(shape.outputs))

    def _tile_loss(self, hidden: Tensor, attention: Tensor, real: Tensor, labels: Tensor | None) -> Tensor | None:
        """The clustering loss: tiles with most attention are of the bag's class, those with least are not.

        For a class that the bag isn't of, the tiles with most attention in that class's branch are not of it.
        """
        if labels is None or not self.training:
            return None
        losses = []
        for bag in range(len(hidden)):
            rows = torch.nonzero(real[bag])[:, 0]
            n_chosen = max(1, min(self.shape.instance_tiles, len(rows) // 3))
            for output, classify in enumerate(self.classify_tiles):
                label = labels[bag, output]
                if bool(torch.isnan(label)):
                    continue
                order = rows[torch.argsort(attention[bag, rows, min(output, attention.shape[2] - 1)], stable=True)]
                top = classify(hidden[bag, order[-n_chosen:]])
                losses.append(smooth_svm_loss(top, label.long().expand(n_chosen)))
                if label > 0.5 and len(rows) > 1:
                    bottom = classify(hidden[bag, order[:n_chosen]])
                    losses.append(smooth_svm_loss(bottom, torch.zeros_like(label).long().expand(n_chosen)))
        return torch.stack(losses).mean() if losses else None


class ClamSingleHead(_ClamHead):
    """CLAM-SB: one attention branch for all classes."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__(shape, branches=1)
        self.classify = nn.Linear(shape.hidden, shape.outputs)

    def pool(self, tiles: Tensor, real: Tensor, labels: Tensor | None) -> HeadOutput:
        """One attention weight a tile."""
        hidden = self.project(tiles)
        attention = masked_softmax(self.attend(hidden), real)
        pooled = attention_pool(hidden, attention)[:, 0]
        loss = self._tile_loss(hidden, attention.detach(), real, labels)
        return HeadOutput(self.classify(pooled).float(), attention, loss)


class ClamMultiHead(_ClamHead):
    """CLAM-MB: every class has its own attention branch and its own linear classifier on what that branch pools."""

    def __init__(self, shape: HeadShape) -> None:
        super().__init__(shape, branches=shape.outputs)
        self.classify = nn.ModuleList(nn.Linear(shape.hidden, 1) for _ in range(shape.outputs))

    def pool(self, tiles: Tensor, real: Tensor, labels: Tensor | None) -> HeadOutput:
        """One attention weight a tile and class."""
        hidden = self.project(tiles)
        attention = masked_softmax(self.attend(hidden), real)
        pooled = attention_pool(hidden, attention)
        logits = torch.cat([classify(pooled[:, k]) for k, classify in enumerate(self.classify)], dim=1)
        loss = self._tile_loss(hidden, attention.detach(), real, labels)
        return HeadOutput(logits.float(), attention, loss)


def smooth_svm_loss(scores: Tensor, classes: Tensor) -> Tensor:
    """Smooth top-1 support vector loss with margin and temperature 1, mean over rows.

    Source: Berrada, Zisserman and Kumar 2018, Smooth loss functions for deep top-k classification, arXiv:1802.07595.

    Args:
        scores: (n, classes) float.
        classes: (n,) int.
    """
    margin = 1.0 - F.one_hot(classes, scores.shape[1]).to(scores.dtype)
    return F.cross_entropy((scores + margin).float(), classes)
