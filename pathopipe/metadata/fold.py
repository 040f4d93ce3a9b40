"""One fold: what its models learn from, and a calibrated model of some of its tasks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathopipe.cohort import Fold
from pathopipe.errors import UsageError
from pathopipe.metadata.calibration import calibrate
from pathopipe.metadata.cases import MetadataCohort
from pathopipe.metadata.fit import fit_network
from pathopipe.metadata.inputs import Inputs, Preparation, slide_batches
from pathopipe.metadata.model import MetadataModel, ModelCard
from pathopipe.metadata.network import MetadataNetwork, MetadataShape, modality_sets
from pathopipe.metadata.settings import MetadataConfig
from pathopipe.metadata.splits import member_parts
from pathopipe.metadata.text import NGRAMS, TextEncoder, TextVectorizer, TransformersText
from pathopipe.mil.bags import Bag, BagLoader
from pathopipe.mil.targets import TargetSpec, fit_targets, slice_of

__all__ = ["Epoch", "FoldData", "fold_data", "train_model"]

_TILES_FOR_STATISTICS: Final = 256

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Epoch:
    """One line of a training's history."""

    model: str
    """``multitask``, or ``baseline`` with its task."""
    member: int
    epoch: int
    train_loss: float
    val_loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldData:
    """What the models of one fold have in common."""

    cohort: MetadataCohort
    fold: Fold
    settings: MetadataConfig
    seed: int
    device: str
    preparation: Preparation
    inputs: Inputs
    specs: tuple[TargetSpec, ...]
    """Fitted on the training part."""
    truth: Floats
    """(n, W) of all tasks."""
    tile_statistics: tuple[Tensor, Tensor] | None
    """Mean and spread of the training tiles."""
    parts: Sequence[tuple[NDArray[np.intp], NDArray[np.intp]]]
    """Training and validation rows of each member."""

    def labelled(self, number: int, inputs: Inputs) -> bool:
        """Whether any training slide has something to see and a record of this task."""
        own = self.truth[self.fold.train][:, slice_of(self.specs, number, "truth")]
        return bool((np.isfinite(own).any(axis=1) & inputs.present[self.fold.train].any(axis=1)).any())


def fold_data(cohort: MetadataCohort, fold: Fold, settings: MetadataConfig, *, seed: int, device: str) -> FoldData:
    """Fit vocabulary, table columns, scales and class weights on the training side of a fold.

    Raises:
        UsageError: No training slide has both a modality and a record of some task.
    """
    truth = np.concatenate([cohort.truth[task.name] for task in cohort.tasks], axis=1)
    preparation = Preparation.fit(cohort, fold.train, _text_encoder(settings, seed))
    inputs = preparation.inputs(cohort)
    bags = [bag for row in fold.train if (bag := inputs.bags[int(row)]) is not None]
    data = FoldData(
        cohort=cohort,
        fold=fold,
        settings=settings,
        seed=seed,
        device=device,
        preparation=preparation,
        inputs=inputs,
        specs=fit_targets([task.target for task in cohort.tasks], truth[fold.train], balanced=settings.balanced),
        truth=truth,
        tile_statistics=_tile_statistics(bags, seed) if bags else None,
        parts=member_parts(cohort, fold, settings.members, seed=seed),
    )
    for number, task in enumerate(cohort.tasks):
        if not data.labelled(number, inputs):
            raise UsageError(
                f"fold {fold.name}: no training slide has both a record of task '{task.name}' and anything to learn it "
                "from; take fewer folds, leave the task out, or check that features and reports fit the manifest"
            )
    return data


def train_model(
    data: FoldData, name: str, numbers: Sequence[int], inputs: Inputs, on_epoch: Callable[[Epoch], None]
) -> MetadataModel:
    """A calibrated model of some of the tasks.

    Args:
        data: Of the fold.
        name: Of the model, for history and messages.
        numbers: Of the tasks.
        inputs: All slides, with those modalities that the model is to see.
        on_epoch: Told of each epoch.

    Raises:
        UsageError: No training slide has a modality, or a loss is not finite.
    """
    settings, fold = data.settings, data.fold
    specs = [data.specs[number] for number in numbers]
    tasks = tuple(data.cohort.tasks[number] for number in numbers)
    truth = np.concatenate([data.truth[:, slice_of(data.specs, number, "truth")] for number in numbers], axis=1)
    there = np.asarray(inputs.present[fold.train].any(axis=0))
    shape = MetadataShape(
        tile_features=data.preparation.tile_features if there[0] else 0,
        text_features=inputs.text.shape[1] if there[1] else 0,
        table_features=inputs.table.shape[1] if there[2] else 0,
        outputs=tuple(spec.outputs for spec in specs),
        head=settings.head,
        width=settings.width,
        hidden=settings.hidden,
        attention=settings.attention,
        dropout=settings.dropout,
        bag_size=settings.bag_size,
    )
    networks = []
    for member, (train, val) in enumerate(data.parts):
        seed = int(np.random.SeedSequence([data.seed, *fold.name.encode(), member]).generate_state(1)[0])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = MetadataNetwork(shape)
        if network.image is not None and data.tile_statistics is not None:
            shown = fold.train[inputs.present[fold.train, 0]]
            described = [
                network.image.describe(batch.tiles, batch.real, batch.sizes)
                for _, batch in slide_batches(inputs, shown, size=settings.batch_slides, cap=settings.cap, seed=seed)
                if batch.tiles is not None and batch.real is not None and batch.sizes is not None
            ]
            network.image.standardise(data.tile_statistics, torch.cat(described))
        if network.text is not None:
            told = fold.train[inputs.present[fold.train, 1]]
            network.text.standardise(torch.from_numpy(inputs.text[told]))
        fitted = fit_network(
            network,
            specs,
            [task.weight for task in tasks],
            inputs,
            truth,
            train,
            val,
            settings,
            seed=seed,
            device=data.device,
            where=f"fold {fold.name}, {name}",
            on_epoch=lambda epoch, train_loss, val_loss, member=member: on_epoch(  # type: ignore[misc]
                Epoch(name, member, epoch, train_loss, val_loss)
            ),
        )
        networks.append(fitted)
    bag = next((bag for bag in inputs.bags if bag is not None), None) if shape.tile_features else None
    card = ModelCard(
        shape=shape,
        tasks=tasks,
        targets=tuple(specs),
        members=len(networks),
        text_encoder=settings.text_encoder if shape.text_features else "",
        table_columns=data.preparation.table_columns if shape.table_features else (),
        encoder=bag.encoder if bag is not None else "",
        encoder_id=bag.encoder_id if bag is not None else "",
        grid=bag.sources[0].grid if bag is not None else "",
        precision=settings.precision,
        temperatures={spec.name: {} for spec in specs},
        thresholds={spec.name: {} for spec in specs},
        training={
            "fold": fold.name,
            "seed": data.seed,
            "slides": len(fold.train) + len(fold.val),
            "patients": len({data.cohort.patients[int(row)] for row in (*fold.train, *fold.val)}),
            "settings": settings.model_dump(mode="json"),
        },
    )
    # Each slide by the member that did not learn from it.
    sets = modality_sets(shape.modalities)
    found = [
        MetadataModel(card, data.preparation, [network], device=data.device).logits(inputs, val, sets)
        for network, (_, val) in zip(networks, data.parts, strict=True)
    ]
    rows = np.concatenate([val for _, val in data.parts])
    logits = {chosen: np.concatenate([one[chosen] for one in found]) for chosen in sets}
    calibrated = calibrate(card, logits, inputs.present[rows], truth[rows])
    return MetadataModel(calibrated, data.preparation, networks, device=data.device)


def _text_encoder(settings: MetadataConfig, seed: int) -> TextEncoder:
    if settings.text_encoder == NGRAMS:
        return TextVectorizer(width=settings.text_features, seed=seed)
    return TransformersText(settings.text_encoder)


def _tile_statistics(bags: Sequence[Bag], seed: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of features over a sample of the tiles of each slide."""
    count, total, squares = 0, np.zeros(bags[0].features), np.zeros(bags[0].features)
    for batch in BagLoader(bags, cap=_TILES_FOR_STATISTICS, seed=seed).epoch():
        tiles = batch.tiles[0].astype(np.float64)
        count, total, squares = count + len(tiles), total + tiles.sum(axis=0), squares + (tiles**2).sum(axis=0)
    mean = total / count
    variance = squares / count - mean**2
    # Below what float32 features can tell, a feature is constant and the difference rounding.
    std = np.sqrt(np.where(variance > 1e-12 * (mean**2 + 1e-30), variance, 0))
    return torch.from_numpy(mean).float(), torch.from_numpy(std).float()
