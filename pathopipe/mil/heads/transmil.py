"""TransMIL: tiles of a bag attend to each other in two transformer layers, with a convolution over their order."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pathopipe.mil.heads.base import Head, HeadOutput, HeadShape, TileProjection

__all__ = ["TransmilHead"]

_ATTENTION_HEADS = 8


class TransmilHead(Head):
    """A class token reads the bag after two attention layers; between them the tiles are laid out as a square.

    Source: Shao et al. 2021, TransMIL: transformer based correlated multiple instance learning for whole slide image
    classification, NeurIPS, arXiv:2106.00908. What differs: attention is exact (scaled dot product, memory linear in
    the tiles where torch has such a kernel) where the paper approximates it by Nystrom's method; and bags are computed
    one by one, since the square depends on how many tiles a bag has. The order of tiles matters: the square is filled
    row by row in their order, so keep it the storage order.
    """

    def __init__(self, shape: HeadShape) -> None:
        super().__init__(shape)
        width = -(-shape.hidden // _ATTENTION_HEADS) * _ATTENTION_HEADS
        self.project = TileProjection(shape)
        self.widen = nn.Linear(shape.hidden, width) if width != shape.hidden else nn.Identity()
        self.class_token = nn.Parameter(torch.randn(width) * 0.02)
        self.first = _AttentionLayer(width, shape.dropout)
        self.position = _SquareConvolution(width)
        self.second = _AttentionLayer(width, shape.dropout)
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, shape.outputs)

    def pool(self, tiles: Tensor, real: Tensor, labels: Tensor | None) -> HeadOutput:
        """Attention is that of the class token in the second layer, mean over its heads."""
        logits, weights = [], []
        for bag in range(len(tiles)):
            chosen = real[bag]
            scores, attention = self._score_bag(tiles[bag, chosen])
            logits.append(scores)
            weights.append(torch.zeros(len(chosen), device=tiles.device).masked_scatter(chosen, attention))
        return HeadOutput(torch.stack(logits).float(), torch.stack(weights)[..., None])

    def _score_bag(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """(n, D) -> (K,) logits and (n,) weights that sum to one."""
        n_tiles = len(tiles)
        hidden = self.widen(self.project(tiles))
        side = 1
        while side * side < n_tiles:
            side += 1
        # The paper fills the square up with the first tiles again.
        square = torch.cat([hidden, hidden[: side * side - n_tiles]])
        tokens = self.first(torch.cat([self.class_token[None].to(square.dtype), square]))
        tokens = torch.cat([tokens[:1], self.position(tokens[1:], side)])
        weights = self.second.weights_of_first(tokens)[1:]
        # A tile that fills the square twice holds both its shares.
        attention = weights[:n_tiles].clone()
        attention[: side * side - n_tiles] += weights[n_tiles:]
        tokens = self.second(tokens)
        return self.classify(self.norm(tokens[0])), attention / attention.sum()


class _AttentionLayer(nn.Module):
    """Layer norm, multi-head self-attention, and the input added."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.leave = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, W) -> (n, W)."""
        query, key, value = self._qkv(tokens)
        mixed = F.scaled_dot_product_attention(query[None], key[None], value[None])[0]
        left: Tensor = self.leave(mixed.transpose(0, 1).flatten(1))
        return tokens + left

    def weights_of_first(self, tokens: Tensor) -> Tensor:
        """How much the first token attends to each, (n,), mean over heads; without gradient, for maps only."""
        with torch.no_grad():
            query, key, _ = self._qkv(tokens)
            scores = (query[:, :1] @ key.transpose(1, 2))[:, 0].float() / query.shape[2] ** 0.5
            return torch.softmax(scores, dim=1).mean(dim=0)

    def _qkv(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.to_qkv(self.norm(tokens)).unflatten(1, (3, _ATTENTION_HEADS, -1)).permute(1, 2, 0, 3)
        return parts[0], parts[1], parts[2]  # each (heads, n, W / heads)


class _SquareConvolution(nn.Module):
    """The paper's PPEG: depth-wise 7 x 7, 5 x 5 and 3 x 3 convolutions over the square, added to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(width, width, k, padding=k // 2, groups=width) for k in (7, 5, 3))

    def forward(self, tokens: Tensor, side: int) -> Tensor:
        """(side * side, W) -> the same."""
        square = tokens.T.reshape(1, -1, side, side)
        for layer in self.layers:
            square = square + layer(tokens.T.reshape(1, -1, side, side))
        return square.reshape(tokens.shape[1], -1).T
