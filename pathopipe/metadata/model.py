"""Trained models: saved and opened, what they say of slides, and what speaks for it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

import pathopipe
from pathopipe.errors import EncoderError, StoreError, UsageError
from pathopipe.files import durable_file
from pathopipe.metadata.inputs import Inputs, Preparation, whole_batches
from pathopipe.metadata.network import MetadataNetwork, MetadataShape, SlideBatch, as_mask
from pathopipe.metadata.probabilities import without_class_weights
from pathopipe.metadata.table import TableEncoder
from pathopipe.metadata.tasks import TaskSpec
from pathopipe.metadata.text import NGRAMS, TextEncoder, TextVectorizer, TransformersText
from pathopipe.mil.bags import Bag
from pathopipe.mil.targets import TargetSpec, slice_of

__all__ = ["MetadataModel", "ModelCard"]

_WEIGHTS: Final = "model.safetensors"
_CARD: Final = "model.json"
_FORMAT: Final = 1
_TEXT_PREFIX: Final = "text."

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """Everything about a model but its weights."""

    shape: MetadataShape
    tasks: tuple[TaskSpec, ...]
    targets: tuple[TargetSpec, ...]
    """The tasks with what was fitted on the training part."""
    members: int
    """Networks whose logits are averaged."""
    text_encoder: str
    """:data:`NGRAMS`, or the name of a transformers encoder; ``""`` without a text branch."""
    table_columns: tuple[str, ...]
    encoder: str
    """Name of the encoder of the tiles; ``""`` where not stated."""
    encoder_id: str
    grid: str
    precision: float
    """What was asked for."""
    temperatures: Mapping[str, Mapping[str, float]]
    """By task, then by modalities (``image+text``): by what logits are divided."""
    thresholds: Mapping[str, Mapping[str, float | None]]
    """Likewise: the surety below which the model abstains; None: it always does."""
    training: Mapping[str, Any]
    """How it was trained."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        record = {name: getattr(self, name) for name in self.__slots__}
        record["shape"] = self.shape.to_json()
        record["tasks"] = [task.to_json() for task in self.tasks]
        record["targets"] = [spec.to_json() for spec in self.targets]
        return {"format": _FORMAT, "created_by": f"pathopipe {pathopipe.__version__}", **record}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "ModelCard":
        """The reverse of :meth:`to_json`."""
        known = {key: value for key, value in record.items() if key not in ("format", "created_by")}
        known["shape"] = MetadataShape.from_json(known["shape"])
        known["tasks"] = tuple(TaskSpec.from_json(task) for task in known["tasks"])
        known["targets"] = tuple(TargetSpec.from_json(spec) for spec in known["targets"])
        known["table_columns"] = tuple(known["table_columns"])
        return cls(**known)


class MetadataModel:
    """The model of one fold: what prepares its inputs, and networks trained alike whose logits are averaged."""

    def __init__(
        self,
        card: ModelCard,
        preparation: Preparation,
        networks: Sequence[MetadataNetwork],
        *,
        device: str = "cpu",
        weights_id: str = "",
    ) -> None:
        self.card, self.preparation, self.weights_id = card, preparation, weights_id
        self._device = torch.device(device)
        self._networks = [network.to(self._device).eval() for network in networks]

    # --- saving

    def save(self, folder: Path) -> None:
        """Write weights, then the card, into a folder; without the card there is no model.

        Raises:
            StoreWriteError: The folder can't be written.
        """
        arrays = {
            f"{member}.{name}": value.cpu().contiguous().numpy()
            for member, network in enumerate(self._networks)
            for name, value in network.state_dict().items()
        }
        text = self.preparation.text
        if text is not None:
            of_text = cast("TextVectorizer | TransformersText", text).to_arrays()
            arrays |= {f"{_TEXT_PREFIX}{name}": np.ascontiguousarray(of) for name, of in of_text.items()}
        table = self.preparation.table
        record = {**self.card.to_json(), "table": None if table is None else table.to_json()}
        with durable_file(folder / _WEIGHTS) as file:
            file.write(safetensors.numpy.save(arrays))
        with durable_file(folder / _CARD) as file:
            file.write(json.dumps(record, indent=1).encode())

    @classmethod
    def load(cls, folder: Path, *, device: str = "cpu") -> "MetadataModel":
        """Open a saved model.

        Raises:
            UsageError: There is none in this folder.
            StoreError: It is damaged, or was written by a newer version.
        """
        try:
            record = json.loads((folder / _CARD).read_text(encoding="utf-8"))
            content = (folder / _WEIGHTS).read_bytes()
            arrays = safetensors.numpy.load(content)
        except FileNotFoundError:
            raise UsageError(f"{folder}: no model here; give a folder that 'pathopipe metadata train' wrote") from None
        except (OSError, ValueError, SafetensorError) as error:
            raise StoreError(f"{folder}: the model can't be read ({error}); train it again, or copy it again") from None
        if record.get("format") != _FORMAT:
            raise StoreError(
                f"{folder}: model format {record.get('format')}, this version reads {_FORMAT}; update pathopipe"
            )
        try:
            table = record.pop("table")
            card = ModelCard.from_json(record)
            networks = []
            for member in range(card.members):
                network = MetadataNetwork(card.shape)
                own = {k.partition(".")[2]: v for k, v in arrays.items() if k.startswith(f"{member}.")}
                network.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in own.items()})
                networks.append(network)
            of_text = {k.removeprefix(_TEXT_PREFIX): v for k, v in arrays.items() if k.startswith(_TEXT_PREFIX)}
            text: TextEncoder | None = None
            if card.text_encoder:
                kind = TextVectorizer if card.text_encoder == NGRAMS else TransformersText
                text = kind.from_arrays(of_text)
            preparation = Preparation(
                tile_features=card.shape.tile_features,
                text=text,
                table=None if table is None else TableEncoder.from_json(table),
                table_columns=card.table_columns,
            )
        except (KeyError, TypeError, RuntimeError) as error:
            raise StoreError(f"{folder}: weights and {_CARD} don't belong together ({error}); train it again") from None
        return cls(card, preparation, networks, device=device, weights_id=sha256(content).hexdigest()[:12])

    # --- scoring

    def check_features(self, bags: Sequence[Bag]) -> None:
        """Make sure that features come from the encoder, the weights and the grid that the model was trained on.

        What features don't state is not held against them; width always is.

        Raises:
            EncoderError: They don't.
        """
        card = self.card
        known_hash = card.encoder_id.partition("@")[2]
        for bag in bags:
            other_hash = bag.encoder_id.partition("@")[2]
            grids = {source.grid for source in bag.sources if source.grid} - {card.grid}
            if card.encoder and bag.encoder and bag.encoder != card.encoder:
                wanted, found = f"encoder {card.encoder_id}", bag.encoder_id
            elif known_hash and other_hash and known_hash != other_hash:
                wanted, found = f"encoder {card.encoder_id}", f"{bag.encoder_id} (other weights or recipe)"
            elif bag.features != card.shape.tile_features:
                wanted, found = f"features of width {card.shape.tile_features}", f"width {bag.features}"
            elif card.grid and grids:
                wanted, found = f"tiles of grid {card.grid}", f"grid {grids.pop()}"
            else:
                continue
            raise EncoderError(
                f"{bag.bag_id}: the model was trained on {wanted}, these features are of {found}; "
                "give features of the same encoder, or train a model on these",
                slide_id=bag.bag_id,
            )

    def logits(
        self, inputs: Inputs, rows: NDArray[np.intp], asked: Sequence[tuple[str, ...]]
    ) -> dict[tuple[str, ...], Floats]:
        """Logits of slides for several choices of modalities, from one reading of the tiles.

        Args:
            inputs: All slides.
            rows: Those wanted.
            asked: Choices of modalities; of each slide those are used that it has.

        Returns:
            For each choice (rows, K), mean of the members, NaN where a slide has none of the modalities.
        """
        width = sum(self.card.shape.outputs)
        found = {chosen: np.full((len(rows), width), np.nan) for chosen in asked}
        usable = np.flatnonzero(inputs.present[rows].any(axis=1))
        if not len(usable):
            return found
        place_of = dict(zip(rows[usable].tolist(), usable.tolist(), strict=True))
        for own, batch in whole_batches(inputs, rows[usable], device=self._device):
            places = np.asarray([place_of[row] for row in own.tolist()], np.intp)
            with torch.inference_mode():
                vectors = [network.encode(batch)[0] for network in self._networks]
                for chosen in asked:
                    present = batch.present & torch.from_numpy(as_mask(chosen)).to(self._device)
                    some = present.any(dim=1)
                    if not bool(some.any()):
                        continue
                    scores = [
                        network.decide(vector[some], present[some])
                        for network, vector in zip(self._networks, vectors, strict=True)
                    ]
                    mean = torch.stack(scores).double().mean(dim=0).cpu().numpy()
                    found[chosen][places[some.cpu().numpy()]] = mean
        for values in found.values():
            for number, spec in enumerate(self.card.targets):
                own_logits = slice_of(self.card.targets, number, "logits")
                values[:, own_logits] = without_class_weights(spec, values[:, own_logits])
        return found

    # --- evidence

    def vectors(self, inputs: Inputs, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """(rows, members * W) the shared representation: mean of what is present, members side by side.

        For slides that lie near; zeros where a slide has nothing.
        """
        out = np.zeros((len(rows), len(self._networks) * self.card.shape.width), np.float32)
        usable = np.flatnonzero(inputs.present[rows].any(axis=1))
        if not len(usable):
            return out
        place_of = dict(zip(rows[usable].tolist(), usable.tolist(), strict=True))
        for own, batch in whole_batches(inputs, rows[usable], device=self._device):
            with torch.inference_mode():
                share = batch.present.sum(dim=1, keepdim=True)
                parts = [network.encode(batch)[0].sum(dim=1) / share for network in self._networks]
            out[[place_of[row] for row in own.tolist()]] = torch.cat(parts, dim=1).float().cpu().numpy()
        return out

    def attention(self, bag: Bag) -> NDArray[np.float32] | None:
        """(tiles,) how much each tile counts, summing to one, mean of members; in the order of ``bag.read()``.

        None without an image branch, or for heads without attention.
        """
        if not self.card.shape.tile_features or not bag.n_tiles:
            return None
        tiles = torch.from_numpy(bag.read())[None].to(self._device)
        nothing = SlideBatch(
            present=torch.tensor([[True, False, False]], device=self._device),
            tiles=tiles,
            real=torch.ones(tiles.shape[:2], dtype=torch.bool, device=self._device),
            text=None,
            table=None,
        )
        with torch.inference_mode():
            found = [network.encode(nothing)[1] for network in self._networks]
        given = [weights[0].mean(dim=1) for weights in found if weights is not None]
        return torch.stack(given).mean(dim=0).float().cpu().numpy() if given else None

    def text_direction(self, inputs: Inputs, row: int, task: str, label: str) -> NDArray[np.float32] | None:
        """(T,) where to the report's vector would have to move for more of a class, by the report alone.

        The gradient of the class's logit against the mean of the others, mean of members; of the value where the task
        is continuous. None without a report or a text branch.

        Raises:
            UsageError: No such task or class.
        """
        numbers = [number for number, known in enumerate(self.card.tasks) if known.name == task]
        if not numbers or (
            self.card.targets[numbers[0]].classes and label not in self.card.targets[numbers[0]].classes
        ):
            raise UsageError(f"the model knows no class '{label}' of a task '{task}'; give one of its own")
        if self.preparation.text is None or not inputs.present[row, 1]:
            return None
        spec = self.card.targets[numbers[0]]
        pull = torch.from_numpy(_pull_of(spec, label)).to(self._device)
        place = slice_of(self.card.targets, numbers[0], "logits")
        present = torch.tensor([[False, True, False]], device=self._device)
        total = np.zeros(inputs.text.shape[1], np.float64)
        for network in self._networks:
            text = torch.from_numpy(inputs.text[[row]]).to(self._device).requires_grad_()
            logits = network(SlideBatch(present=present, tiles=None, real=None, text=text, table=None))
            (gradient,) = torch.autograd.grad((logits[0, place] * pull).sum(), text)
            total += gradient[0].double().cpu().numpy()
        return (total / len(self._networks)).astype(np.float32)


def _pull_of(spec: TargetSpec, label: str) -> NDArray[np.float32]:
    """(outputs,) which combination of a task's logits speaks for a class."""
    pull = np.zeros(spec.outputs, np.float32)
    if not spec.classes:
        return pull + 1
    number = spec.classes.index(label)
    match spec.kind:
        case "binary":
            pull[0] = 1 if number else -1
        case "ordinal":
            # Logits say "above"; the lowest class is against them, any other for being above the one below it.
            pull[max(number - 1, 0)] = 1 if number else -1
        case "multiclass":
            pull -= 1 / max(1, spec.outputs - 1)
            pull[number] = 1
        case _:
            pull[number] = 1
    return pull
