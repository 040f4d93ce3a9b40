"""Trained models: their weights in safetensors, all else in JSON beside them, and the check of what they are fed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

import pathopipe
from pathopipe.cohort import LabelTable
from pathopipe.errors import EncoderError, StoreError, UsageError
from pathopipe.files import durable_file
from pathopipe.mil.bags import Bag
from pathopipe.mil.covariates import CovariateSpec, encode_covariates, standard_size
from pathopipe.mil.heads import Head, HeadShape, build_head
from pathopipe.mil.targets import TargetSpec, predict_target, slice_of

__all__ = ["BagPrediction", "MilModel", "ModelCard"]

_WEIGHTS: Final = "model.safetensors"
_CARD: Final = "model.json"
_FORMAT: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """Everything about a model but its weights."""

    head: str
    shape: HeadShape
    targets: tuple[TargetSpec, ...]
    encoder: str
    """Name of the encoder whose features it takes; ``""`` where it was not stated."""
    encoder_id: str
    """The same with the hash of its weights, ``name@hash``."""
    grid: str = ""
    """Tile grid of the features; ``""`` where not stated."""
    covariates: tuple[CovariateSpec, ...] = ()
    temperatures: tuple[float, ...] = ()
    """By which the logits of each target are divided, found on validation bags; 1 where there is none."""
    bag_size: tuple[float, float] | None = None
    """Mean and spread of the logarithm of the number of tiles, where it is the last covariate."""
    members: int = 1
    """Networks whose logits are averaged."""
    training: Mapping[str, Any] | None = None
    """How it was trained: settings, seed, bags, epochs."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        record = asdict(self)
        record["targets"] = [spec.to_json() for spec in self.targets]
        record["covariates"] = [spec.to_json() for spec in self.covariates]
        return {"format": _FORMAT, "created_by": f"pathopipe {pathopipe.__version__}", **record}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "ModelCard":
        """The reverse of :meth:`to_json`."""
        known = {key: value for key, value in record.items() if key not in ("format", "created_by")}
        known["shape"] = HeadShape(**known["shape"])
        known["targets"] = tuple(TargetSpec.from_json(spec) for spec in known["targets"])
        known["covariates"] = tuple(CovariateSpec.from_json(spec) for spec in known["covariates"])
        known["temperatures"] = tuple(known["temperatures"])
        known["bag_size"] = None if known["bag_size"] is None else tuple(known["bag_size"])
        return cls(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class BagPrediction:
    """What a model says of one bag."""

    bag_id: str
    logits: NDArray[np.float64]
    """(K,) of all targets, mean of the members, before calibration."""
    probabilities: dict[str, NDArray[np.float64]]
    """For each target its calibrated probabilities, its value or its risk, as
    :func:`pathopipe.mil.targets.predict_target` orders them."""
    attention: NDArray[np.float32] | None
    """(tiles, A) weights that sum to one, mean of the members, in the order of ``bag.read()``; A is 1, or K."""
    contributions: NDArray[np.float32] | None
    """(tiles, K) what each tile adds to each logit, for heads whose logits are sums over tiles."""


class MilModel:
    """One model: a head, or several trained alike whose outputs are averaged."""

    def __init__(self, card: ModelCard, networks: Sequence[Head], *, device: str = "cpu") -> None:
        self.card = card
        self._device = torch.device(device)
        self._networks = [network.to(self._device).eval() for network in networks]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the K logits."""
        return tuple(name for spec in self.card.targets for name in spec.output_names)

    @classmethod
    def load(cls, folder: Path, *, device: str = "cpu") -> "MilModel":
        """Open a saved model.

        Raises:
            UsageError: There is none in this folder.
            StoreError: It is damaged, or was written by a newer version.
        """
        try:
            record = json.loads((folder / _CARD).read_text(encoding="utf-8"))
            weights = safetensors.torch.load_file(folder / _WEIGHTS)
        except FileNotFoundError:
            raise UsageError(
                f"{folder}: no model here; give a folder with {_CARD} that 'pathopipe mil train' wrote"
            ) from None
        except (OSError, ValueError, SafetensorError) as error:
            raise StoreError(f"{folder}: the model can't be read ({error}); train it again, or copy it again") from None
        if record.get("format") != _FORMAT:
            raise StoreError(
                f"{folder}: model format {record.get('format')}, this version reads {_FORMAT}; update pathopipe"
            )
        try:
            card = ModelCard.from_json(record)
            networks = []
            for member in range(card.members):
                network = build_head(card.head, card.shape)
                prefix = f"{member}."
                network.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
                networks.append(network)
        except (KeyError, TypeError, RuntimeError) as error:
            raise StoreError(f"{folder}: weights and {_CARD} don't belong together ({error}); train it again") from None
        return cls(card, networks, device=device)

    def save(self, folder: Path) -> None:
        """Write weights, then the card, into a folder; without the card there is no model.

        Raises:
            StoreWriteError: The folder can't be written.
        """
        weights = {
            f"{member}.{name}": value.cpu().contiguous()
            for member, network in enumerate(self._networks)
            for name, value in network.state_dict().items()
        }
        with durable_file(folder / _WEIGHTS) as file:
            file.write(safetensors.torch.save(weights))
        with durable_file(folder / _CARD) as file:
            file.write(json.dumps(self.card.to_json(), indent=1).encode())

    def check_features(self, bags: Sequence[Bag]) -> None:
        """Make sure that features come from the encoder, the weights and the grid that the model was trained on.

        What features don't state (files of other programs name no weights) is not held against them; width always is.

        Raises:
            EncoderError: They don't.
        """
        card = self.card
        for bag in bags:
            if bag.n_tiles == 0:
                continue
            if card.encoder and bag.encoder and bag.encoder != card.encoder:
                self._refuse(bag, f"encoder {card.encoder_id}", f"{bag.encoder_id}")
            hashes = [part.partition("@")[2] for part in (card.encoder_id, bag.encoder_id)]
            if all(hashes) and hashes[0] != hashes[1]:
                self._refuse(bag, f"encoder {card.encoder_id}", f"{bag.encoder_id} (other weights or recipe)")
            if bag.features != card.shape.features:
                self._refuse(bag, f"features of width {card.shape.features}", f"width {bag.features}")
            for source in bag.sources:
                if card.grid and source.grid and source.grid != card.grid:
                    self._refuse(bag, f"tiles of grid {card.grid}", f"grid {source.grid}")

    def _refuse(self, bag: Bag, wanted: str, found: str) -> None:
        raise EncoderError(
            f"{bag.bag_id}: the model was trained on {wanted}, these features are of {found}; "
            "give features of the same encoder, or train a model on these",
            slide_id=bag.bag_id,
        )

    def encode_covariates(self, table: LabelTable) -> NDArray[np.float32] | None:
        """(rows, C) the covariates that the model wants, from a table; None where it wants none.

        Raises:
            UsageError: The table lacks one of the columns.
        """
        return encode_covariates(self.card.covariates, table) if self.card.covariates else None

    def predict(self, bag: Bag, covariates: NDArray[np.float32] | None = None) -> BagPrediction:
        """Score one bag from all its tiles.

        Args:
            bag: With at least one tile; see :meth:`check_features`.
            covariates: (C,) this bag's row of :meth:`encode_covariates`.

        Raises:
            UsageError: The bag is empty, or covariates are missing.
        """
        if not bag.n_tiles:
            raise UsageError(f"{bag.bag_id}: no tile to predict from; leave this slide out")
        tiles = torch.from_numpy(bag.read())[None].to(self._device)
        given = self._covariates_of(bag, covariates)
        real = torch.ones(tiles.shape[:2], dtype=torch.bool, device=self._device)
        with torch.inference_mode():
            outputs = [network(tiles, real, given) for network in self._networks]
        logits = torch.stack([output.logits[0] for output in outputs]).double().mean(dim=0).cpu().numpy()
        return BagPrediction(
            bag_id=bag.bag_id,
            logits=logits,
            probabilities={name: rows[0] for name, rows in self.interpret(logits[None]).items()},
            attention=_mean([output.attention for output in outputs]),
            contributions=_mean([output.contributions for output in outputs]),
        )

    def _covariates_of(self, bag: Bag, given: NDArray[np.float32] | None) -> Tensor | None:
        """(1, C) what stands beside the tiles: the columns given, and the size of the bag."""
        parts = [] if given is None else [np.asarray(given, np.float32)]
        if self.card.bag_size is not None:
            parts.append(standard_size([bag], self.card.bag_size)[0])
        return torch.from_numpy(np.concatenate(parts))[None].to(self._device) if parts else None

    def interpret(self, logits: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Calibrated predictions of each target: (n, K) logits -> (n, P)."""
        found = {}
        for number, spec in enumerate(self.card.targets):
            own = logits[:, slice_of(self.card.targets, number, "logits")]
            found[spec.name] = predict_target(spec, own, temperature=self.card.temperatures[number])
        return found


def _mean(values: Sequence[Tensor | None]) -> NDArray[np.float32] | None:
    given = [value[0] for value in values if value is not None]
    return torch.stack(given).mean(dim=0).float().cpu().numpy() if given else None
