"""The network: three branches, each optional for each slide, one shared vector, one linear head a task."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn

from pathopipe.errors import UsageError
from pathopipe.mil.heads import HeadShape, build_head
from pathopipe.mil.heads.base import HeadOutput

__all__ = [
    "MODALITIES",
    "MetadataNetwork",
    "MetadataShape",
    "SlideBatch",
    "alignment_loss",
    "as_mask",
    "drop_modalities",
    "modality_sets",
    "set_name",
]

MODALITIES: Final = ("image", "text", "table")
"""The branches in the order of every presence mask."""

_ALIGNMENT_TEMPERATURE: Final = 0.1
_ROAD_HIDDEN: Final = 0.5


def set_name(present: Sequence[bool] | NDArray[np.bool_]) -> str:
    """``image+text`` for (True, True, False); ``""`` for none."""
    return "+".join(name for name, there in zip(MODALITIES, present, strict=True) if there)


def modality_sets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Every subset that is not empty, single modalities first."""
    return [chosen for size in range(1, len(modalities) + 1) for chosen in combinations(modalities, size)]


def as_mask(modalities: Sequence[str]) -> NDArray[np.bool_]:
    """(3,) which of image, text and table are among them."""
    return np.asarray([name in modalities for name in MODALITIES])


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataShape:
    """The sizes of a network; all that is needed to build it again."""

    tile_features: int
    """Width of a tile's feature vector; 0 for no image branch."""
    text_features: int
    """Width of the report's vector; 0 for no text branch."""
    table_features: int
    """Width of the encoded table row; 0 for no table branch."""
    outputs: tuple[int, ...]
    """Logits of each task."""
    head: str = "abmil"
    width: int = 128
    hidden: int = 128
    attention: int = 64
    dropout: float = 0.25
    bag_size: bool = True
    """The image branch sees how many tiles a slide has."""

    @property
    def branches(self) -> tuple[bool, bool, bool]:
        """Which of the modalities have a branch."""
        return self.tile_features > 0, self.text_features > 0, self.table_features > 0

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the branches that there are."""
        return tuple(name for name, there in zip(MODALITIES, self.branches, strict=True) if there)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "MetadataShape":
        """The reverse of :meth:`to_json`."""
        return cls(**{**record, "outputs": tuple(record["outputs"])})


class SlideBatch(NamedTuple):
    """What is known of B slides. Slides without an image have no row in ``tiles``."""

    present: Tensor
    """(B, 3) bool: image, text, table."""
    tiles: Tensor | None
    """(I, N, D) tiles of the slides that have an image, in their order; None where none has."""
    real: Tensor | None
    """(I, N) bool, False where padded."""
    text: Tensor | None
    """(B, T); rows without a report hold anything."""
    table: Tensor | None
    """(B, C); rows without a table hold anything."""
    sizes: Tensor | None = None
    """(I,) tiles of each slide in all, where ``tiles`` may be a sample; None: what ``real`` says."""


class _ImageBranch(nn.Module):
    """A bag of tiles to the shared width: attention, and beside it a linear road for what the tiles are on the whole.

    That is their mean, their spread and how many there are. On small cohorts a linear model of these is hard to beat;
    attention adds what single tiles tell. Spread in place of maximum, for a sample of the tiles has the same.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, shape: MetadataShape) -> None:
        super().__init__()
        self.bag_size = shape.bag_size
        # A head of `mil` whose outputs are the shared vector: standardisation, masks and attention are its own.
        self.attend = build_head(
            shape.head,
            HeadShape(
                features=shape.tile_features,
                outputs=shape.width,
                hidden=shape.hidden,
                attention=shape.attention,
                dropout=shape.dropout,
            ),
        )
        width = 2 * shape.tile_features + shape.bag_size
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.linear = nn.Linear(width, shape.width)

    def describe(self, tiles: Tensor, real: Tensor, sizes: Tensor) -> Tensor:
        """(B, N, D) -> (B, 2 D + 1): mean and standard deviation of each feature, logarithm of the number of tiles.

        (B, 2 D) where their number is not to be seen.
        """
        count = real.sum(dim=1)[:, None]
        tiles = tiles.float().masked_fill(~real[..., None], 0)
        mean = tiles.sum(dim=1) / count
        spread = ((tiles - mean[:, None]).masked_fill(~real[..., None], 0).square().sum(dim=1) / count).sqrt()
        parts = [mean, spread, sizes.float().log()[:, None]]
        return torch.cat(parts if self.bag_size else parts[:2], dim=1)

    def standardise(self, tiles: tuple[Tensor, Tensor], described: Tensor) -> None:
        """Set the scales by training slides.

        Args:
            tiles: (D,) mean and standard deviation of their tiles.
            described: (slides, ...) what :meth:`describe` gives of them.
        """
        self.attend.standardise(*tiles)
        std, mean = torch.std_mean(described.double(), dim=0, correction=0)
        # Below what float32 features can tell, a value is constant and the difference rounding.
        constant = std <= 1e-6 * mean.abs().clamp(min=1e-30)
        self.shift.copy_(mean)
        self.scale.copy_(torch.where(constant, torch.zeros_like(std), 1 / std))

    def forward(self, tiles: Tensor, real: Tensor, sizes: Tensor) -> HeadOutput:
        """(B, N, D) -> (B, W) and the attention."""
        output: HeadOutput = self.attend(tiles, real)
        described = (self.describe(tiles, real, sizes) - self.shift) * self.scale
        # Hidden for half of the slides of a step: attention would else leave what averages tell to this road, and mark
        # nothing.
        open_road = F.dropout(torch.ones_like(described[:, :1]), _ROAD_HIDDEN, training=self.training)
        return output._replace(logits=output.logits + self.linear(described) * open_road)


class _VectorBranch(nn.Module):
    """A vector to the shared width: a linear road and a small network beside it.

    The linear road alone is what a linear model of n-grams is, which is hard to beat on a few hundred reports.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, features: int, shape: MetadataShape) -> None:
        super().__init__()
        # Buffers, so that the scaling by the training part travels with the weights.
        self.register_buffer("shift", torch.zeros(features))
        self.register_buffer("scale", torch.ones(()))
        self.linear = nn.Linear(features, shape.width)
        self.bent = nn.Sequential(
            nn.Linear(features, shape.hidden),
            nn.ReLU(),
            nn.Dropout(shape.dropout),
            nn.Linear(shape.hidden, shape.width),
        )
        self.dropout = nn.Dropout(shape.dropout)

    def standardise(self, vectors: Tensor) -> None:
        """Centre on training vectors (n, features), and scale them by one number to a spread of one a feature.

        One number for all: the axes of a singular value decomposition fall in spread, and what is noise must stay
        small.
        """
        self.shift.copy_(vectors.mean(dim=0))
        spread = (vectors - vectors.mean(dim=0)).square().mean().sqrt()
        self.scale.copy_(torch.where(spread > 0, 1 / spread, torch.ones_like(spread)))

    def forward(self, vector: Tensor) -> Tensor:
        """(B, features) -> (B, W)."""
        dropped = self.dropout((vector - self.shift) * self.scale)
        summed: Tensor = self.linear(dropped) + self.bent(dropped)
        return summed


class MetadataNetwork(nn.Module):
    """Image, report and table to one shared vector, and from there to each task.

    The vectors of the modalities that are present are normalised and averaged, so that any subset gives a vector of the
    same scale and the same heads serve all. For each task every modality has a learnt weight in that average: the
    report may tell the stage and the image the fixation.

    Source: after Weng et al. 2019, Multimodal multitask representation learning for pathology biobank metadata
    prediction, arXiv:1909.07846. Ours: attention over tiles of a foundation model's features in place of patches, the
    weighted mean over what is present in place of a concatenation, modality dropout.
    """

    def __init__(self, shape: MetadataShape) -> None:
        super().__init__()
        if not any(shape.branches):
            raise UsageError("a model needs one of image, text and table; give --features, --reports or table columns")
        self.shape = shape
        self.image = _ImageBranch(shape) if shape.tile_features else None
        self.text = _VectorBranch(shape.text_features, shape) if shape.text_features else None
        self.table = _VectorBranch(shape.table_features, shape) if shape.table_features else None
        self.norms = nn.ModuleList(nn.LayerNorm(shape.width) for _ in MODALITIES)
        self.dropout = nn.Dropout(shape.dropout)
        self.weights = nn.Parameter(torch.zeros(len(shape.outputs), len(MODALITIES)))
        self.heads = nn.ModuleList(nn.Linear(shape.width, n) for n in shape.outputs)

    def encode(self, batch: SlideBatch) -> tuple[Tensor, Tensor | None]:
        """The vectors of each slide, before the modalities meet.

        Returns:
            (B, 3, W) normalised vectors of image, text and table, zeros where absent; and (I, N, A) the attention of
            the slides that have an image, None where none has or the head has none.

        Raises:
            UsageError: A slide has no modality, or one that the network has no branch for.
        """
        present = batch.present
        have = torch.tensor(self.shape.branches, device=present.device)
        if bool((present & ~have).any()) or not bool(present.any(dim=1).all()):
            raise UsageError("a slide has no modality that the model takes; leave it out")
        absent = self.weights.new_zeros(len(present), self.shape.width)
        vectors, attention = [absent, absent, absent], None
        if self.image is not None and batch.tiles is not None and batch.real is not None:
            sizes = batch.real.sum(dim=1) if batch.sizes is None else batch.sizes
            output = self.image(batch.tiles, batch.real, sizes)
            vectors[0] = absent.index_copy(0, torch.nonzero(present[:, 0])[:, 0], output.logits)
            attention = output.attention
        for branch, given, place in ((self.text, batch.text, 1), (self.table, batch.table, 2)):
            if branch is not None and given is not None:
                # What absent rows hold, NaN included, must reach neither values nor gradients.
                vectors[place] = branch(given.masked_fill(~present[:, place, None], 0))
        stacked = torch.stack([norm(vector) for norm, vector in zip(self.norms, vectors, strict=True)], dim=1)
        return stacked.masked_fill(~present[..., None], 0), attention

    def decide(self, vectors: Tensor, present: Tensor) -> Tensor:
        """(B, K) logits from the vectors of those modalities that ``present`` (B, 3) lets through."""
        logits = []
        for own_weights, head in zip(self.weights, self.heads, strict=True):
            weights = torch.softmax(own_weights.expand(len(present), -1).masked_fill(~present, -torch.inf), dim=1)
            logits.append(head(self.dropout((vectors * weights[..., None]).sum(dim=1))))
        return torch.cat(logits, dim=1)

    def forward(self, batch: SlideBatch) -> Tensor:
        """(B, K) logits of all tasks, side by side, from everything that is present."""
        return self.decide(self.encode(batch)[0], batch.present)


def drop_modalities(present: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Hide modalities at random; of a slide that would lose all, one stays, each with the same chance.

    Args:
        present: (B, 3) bool, at least one a row.
        share: Chance of each to be hidden.
        generator: Where chance comes from.

    Returns:
        (B, 3) bool, a subset of ``present``.
    """
    chance = torch.rand(present.shape, generator=generator).to(present.device)
    kept = present & (chance >= share)
    last = torch.rand(present.shape, generator=generator).to(present.device).masked_fill(~present, -1).argmax(dim=1)
    none = ~kept.any(dim=1)
    kept[none, last[none]] = True
    return kept


def alignment_loss(image: Tensor, text: Tensor, patients: Sequence[int] | Tensor) -> Tensor:
    """Draw the image vectors of a patient to the vectors of the patient's reports, away from those of other patients.

    Symmetric contrastive loss; all slides of a patient count as matches of each of the patient's reports.

    Source: van den Oord et al. 2018 (InfoNCE), arXiv:1807.03748; several matches as in Khosla et al. 2020 (SupCon),
    arXiv:2004.11362, equation 2.

    Args:
        image: (n, W) vectors of slides that have image and report.
        text: (n, W).
        patients: n numbers.

    Returns:
        A scalar; zero where there are fewer than two patients.
    """
    numbers = torch.as_tensor(patients, device=image.device)
    same = (numbers[:, None] == numbers).float()
    if not len(numbers) or bool((same == 1).all()):
        return (image.sum() + text.sum()) * 0
    alike = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T / _ALIGNMENT_TEMPERATURE
    matches = same / same.sum(dim=1, keepdim=True)
    to_text = -(matches * torch.log_softmax(alike, dim=1)).sum(dim=1)
    to_image = -(matches * torch.log_softmax(alike, dim=0).T).sum(dim=1)
    return (to_text.mean() + to_image.mean()) / 2
