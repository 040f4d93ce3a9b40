"""The heads that turn a bag of tiles into logits, by name, each with its paper."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pathopipe.errors import UsageError
from pathopipe.mil.heads.abmil import AbmilHead
from pathopipe.mil.heads.additive import AdditiveHead
from pathopipe.mil.heads.base import Head, HeadOutput, HeadShape
from pathopipe.mil.heads.clam import ClamMultiHead, ClamSingleHead
from pathopipe.mil.heads.dsmil import DsmilHead
from pathopipe.mil.heads.logistic import LogisticHead
from pathopipe.mil.heads.pooling import MaxHead, MeanHead
from pathopipe.mil.heads.transmil import TransmilHead
from pathopipe.registry import nearest

__all__ = ["BASELINE", "HEADS", "Head", "HeadOutput", "HeadShape", "HeadSpec", "build_head", "check_head"]

BASELINE: Final = "logistic"
"""The head that is always trained beside the others."""


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """One head: how it is built, where it comes from, and what it does with the order of tiles."""

    build: Callable[[HeadShape], Head]
    paper: str
    order_matters: bool = False
    """Whether the order of a bag's tiles changes its logits."""


HEADS: Final[dict[str, HeadSpec]] = {
    "abmil": HeadSpec(AbmilHead, "Ilse et al. 2018, arXiv:1802.04712"),
    "additive": HeadSpec(AdditiveHead, "Javed et al. 2022, arXiv:2206.01794"),
    "clam_mb": HeadSpec(ClamMultiHead, "Lu et al. 2021, arXiv:2004.09666"),
    "clam_sb": HeadSpec(ClamSingleHead, "Lu et al. 2021, arXiv:2004.09666"),
    "dsmil": HeadSpec(DsmilHead, "Li et al. 2021, arXiv:2011.08939"),
    "logistic": HeadSpec(LogisticHead, "mean and maximum pooling with a linear model; the baseline"),
    "max": HeadSpec(MaxHead, "Campanella et al. 2019, doi:10.1038/s41591-019-0508-1"),
    "mean": HeadSpec(MeanHead, "Wang et al. 2018, doi:10.1016/j.patcog.2017.08.026"),
    "transmil": HeadSpec(TransmilHead, "Shao et al. 2021, arXiv:2106.00908", order_matters=True),
}


def check_head(name: str) -> None:
    """Make sure that a head of this name exists.

    Raises:
        UsageError: There is none; the nearest is named.
    """
    if name not in HEADS:
        raise UsageError(f"no head '{name}'; {nearest(name, HEADS)}")


def build_head(name: str, shape: HeadShape) -> Head:
    """A head with fresh weights, drawn from torch's generator.

    Raises:
        UsageError: No such head.
    """
    check_head(name)
    return HEADS[name].build(shape)
