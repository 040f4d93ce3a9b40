"""Networks that no library has as they are, written from what their authors published.

Attributes bear the names that checkpoints have, so that a strict load tells whether a network is the right one.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from pathopipe.embeddings.torchvision_import import import_torchvision

__all__ = ["OWN_NETWORKS", "ConchV1", "ConvStem", "Keep", "KimiaNet", "build_ctranspath"]


class ConvStem(nn.Module):
    """CTransPath's patch embedding: two strided convolutions and a 1 x 1 one instead of a single 4 x 4.

    Source: Wang et al. 2022, Medical Image Analysis; Xiao et al. 2021, arXiv:2106.14881.
    """

    def __init__(self, embed_dim: int = 96) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for wider in (embed_dim // 8, embed_dim // 4):
            layers += [nn.Conv2d(width, wider, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
            width = wider
        self.proj = nn.Sequential(*layers, nn.Conv2d(width, embed_dim, 1))
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, batch: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, H / 4, W / 4, embed_dim), the layout of timm's Swin."""
        embedded: Tensor = self.norm(self.proj(batch).permute(0, 2, 3, 1))
        return embedded


def build_ctranspath() -> nn.Module:
    """Swin-T with a stem of convolutions; its forward is norm, then the mean of the last 7 x 7 map."""
    import_torchvision()
    import timm

    network: nn.Module = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, num_classes=0)
    network.patch_embed = ConvStem()
    return network


class KimiaNet(nn.Module):
    """DenseNet-121 whose last map is averaged as it comes out of the last norm.

    The forward of torchvision, and timm's network, put a ReLU between the two.

    Source: Riasatian et al. 2021, Medical Image Analysis.
    """

    def __init__(self) -> None:
        super().__init__()
        import_torchvision()
        from torchvision.models import densenet121

        self.features = densenet121(weights=None).features

    def forward(self, batch: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, 1024); any size from 32 px."""
        maps: Tensor = self.features(batch)
        return maps.float().mean(dim=(2, 3))


class Keep(nn.Module):
    """KEEP's picture side: ViT-L/16, a head of two layers, length 1.

    Source: Zhou et al. 2024, arXiv:2412.13126.
    """

    num_prefix_tokens = 1

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        import_torchvision()
        import timm

        self.visual: nn.Module = timm.create_model("vit_large_patch16_224", pretrained=False, **arguments)
        self.visual_head = nn.Sequential(nn.Linear(1024, 768), nn.GELU(), nn.Linear(768, 768))

    def forward(self, batch: Tensor) -> Tensor:
        """(n, 3, 224, 224) -> (n, 768) of length 1."""
        return functional.normalize(self.visual_head(self.visual(batch)).float(), dim=-1)

    def forward_features(self, batch: Tensor) -> Tensor:
        """(n, 3, 224, 224) -> (n, 197, 1024) tokens of the trunk."""
        tokens: Tensor = self.visual.forward_features(batch)  # type: ignore[operator]
        return tokens


class _AttentionPool(nn.Module):
    """Learned queries that attend to tokens of another width.

    Source: Yu et al. 2022 (CoCa), arXiv:2205.01917, in the form and with the names that open_clip gave it.
    """

    def __init__(self, features: int, token_features: int, *, queries: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, features))
        self.attn = nn.MultiheadAttention(features, heads, kdim=token_features, vdim=token_features, batch_first=True)
        self.ln_q = nn.LayerNorm(features)
        self.ln_k = nn.LayerNorm(token_features)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, T, token_features) -> (n, queries, features)."""
        keys = self.ln_k(tokens)
        queries = self.ln_q(self.query).expand(len(tokens), -1, -1)
        pooled: Tensor = self.attn(queries, keys, keys, need_weights=False)[0]
        return pooled


class ConchV1(nn.Module):
    """CONCH's picture side up to the vector for slides: before the projection, and not of length 1.

    The pooler for captions and the projection of the checkpoint are not used and not built.

    Source: Lu et al. 2024, Nature Medicine.
    """

    num_prefix_tokens = 1

    def __init__(self) -> None:
        super().__init__()
        import_torchvision()
        import timm

        self.trunk: nn.Module = timm.create_model("vit_base_patch16_224", pretrained=False, img_size=448, num_classes=0)
        self.attn_pool_contrast = _AttentionPool(512, 768, queries=1, heads=8)
        self.ln_contrast = nn.LayerNorm(512)

    def forward(self, batch: Tensor) -> Tensor:
        """(n, 3, 448, 448) -> (n, 512)."""
        vectors: Tensor = self.ln_contrast(self.attn_pool_contrast(self.forward_features(batch))[:, 0])
        return vectors

    def forward_features(self, batch: Tensor) -> Tensor:
        """(n, 3, 448, 448) -> (n, 785, 768) tokens of the trunk."""
        tokens: Tensor = self.trunk.forward_features(batch)  # type: ignore[operator]
        return tokens


OWN_NETWORKS: Final[dict[str, Callable[..., nn.Module]]] = {
    "conch_ViT-B-16": ConchV1,
    "ctranspath": build_ctranspath,
    "keep": Keep,
    "kimianet": KimiaNet,
}
"""By the ``architecture`` of a row; arguments of the row are handed on."""
