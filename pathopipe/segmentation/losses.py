"""What a network's maps lack of their targets; tasks that are not labelled add nothing."""

import math
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from pathopipe.segmentation.examples import UNKNOWN

__all__ = ["TASK_WEIGHT", "losses"]

TASK_WEIGHT: Final = {
    "nuclei": 1.0,
    "distance": 2.0,
    "nuclei_class": 0.2,
    "glands": 0.5,
    "lumina": 0.8,
    "tissue_types": 0.15,
}
"""Weight of each loss in their sum."""

_DICE_EPS = 1.0
_LEAST_SHARE = 1e-4


def losses(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses by name, each a scalar; those for which the batch has no label are absent.

    Binary maps: cross entropy and soft Dice (Milletari et al. 2016, arXiv:1606.04797). Distances: cross entropy with
    soft targets. Tissue types: minus the logarithm of the probability of what is allowed.

    Args:
        outputs: Logits of :class:`~pathopipe.segmentation.network.SegmentationNetwork`.
        targets: Fields of :class:`~pathopipe.segmentation.targets.Targets`, stacked.
    """
    found: dict[str, Tensor] = {}
    if "nuclei" in outputs and targets["nuclei_weight"].any():
        logits, weight = outputs["nuclei"].float(), targets["nuclei_weight"]
        found["nuclei"] = _binary(logits[:, 0], targets["nuclei"][:, 0], weight)
        # Distances count within nuclei and near them; far outside, that there is none is said by the first map.
        near = weight * (0.3 + targets["nuclei"][:, 0])
        found["distance"] = _soft_cross_entropy(logits[:, 1], targets["nuclei"][:, 1], near)
        if logits.shape[1] > 2:
            kind = targets["nuclei_class"].long()
            known = kind != UNKNOWN
            if known.any():
                each = functional.cross_entropy(logits[:, 2:], kind.where(known, 0), reduction="none")
                found["nuclei_class"] = (each * known).sum() / known.sum()
    if "glands" in outputs and targets["glands_weight"].any():
        logits, weight = outputs["glands"].float(), targets["glands_weight"]
        found["glands"] = _binary(logits[:, 0], targets["glands"][:, 0], weight[:, 0])
        if weight[:, 1].any():
            found["glands"] = found["glands"] + _binary(logits[:, 1], targets["glands"][:, 1], weight[:, 1])
    if "lumina" in outputs and targets["lumina_weight"].any():
        found["lumina"] = _binary(outputs["lumina"].float()[:, 0], targets["lumina"], targets["lumina_weight"])
    if "tissue_types" in outputs:
        _add_tissue(found, outputs["tissue_types"].float(), targets)
    return found


def _soft_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Cross entropy less that of the target itself, so that a perfect map has none."""
    each = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    inner = target.clamp(1e-6, 1 - 1e-6)
    own = -(inner * inner.log() + (1 - inner) * (1 - inner).log())
    own = own.where((target > 0) & (target < 1), torch.zeros_like(own))
    return ((each - own) * weight).sum() / weight.sum().clamp_min(1)


def _binary(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    each = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    entropy = (each * weight).sum() / weight.sum().clamp_min(1)
    share = logits.sigmoid() * weight
    # Over each image: in one with few objects they count as much. Where there are none Dice would only press down on
    # all of the map, and what is rare would never be found.
    overlap = (share * target).sum((1, 2))
    own = (target * weight).sum((1, 2))
    has_objects = own > 0
    dice = 1 - (2 * overlap + _DICE_EPS) / (share.sum((1, 2)) + own + _DICE_EPS)
    return entropy + (dice * has_objects).sum() / has_objects.sum().clamp_min(1)


def _add_tissue(found: dict[str, Tensor], logits: Tensor, targets: dict[str, Tensor]) -> None:
    n_classes = logits.shape[1]
    share = logits.softmax(1)
    bit = torch.arange(n_classes, device=logits.device)
    parts: list[Tensor] = []
    cells = targets["tissue_cells"]  # (n, rows, columns) bits
    known = cells > 0
    if known.any():
        allowed = (cells[:, None] >> bit[:, None, None]) & 1
        mass = (share * allowed).sum(1)
        parts.append(-(_log(mass) * known).sum() / known.sum())
    whole = targets["tissue_whole"]  # (n,) bits
    if (whole > 0).any():
        weight = targets["tissue_weight"].flatten(1)
        allowed = (whole[:, None] >> bit) & 1
        mass = (share * allowed[:, :, None, None]).sum(1).flatten(1) * weight
        # A label is of what the image was taken for; around it there may be stroma or glass. The better half counts.
        rank = mass.argsort(dim=1, descending=True).argsort(dim=1)
        counts = weight * (rank < (weight.sum(1, keepdim=True) / 2).ceil())
        mean = (mass * counts).sum(1) / counts.sum(1).clamp_min(1)
        labelled = whole > 0
        parts.append(-(_log(mean) * labelled).sum() / labelled.sum())
    if parts:
        found["tissue_types"] = torch.stack(parts).sum()


def _log(share: Tensor) -> Tensor:
    """Logarithm that is finite and smooth at 0: a label that the network all but rules out draws little."""
    return (share + _LEAST_SHARE).log() - math.log1p(_LEAST_SHARE)
