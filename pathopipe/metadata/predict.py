"""Trained models: saved and opened, fed with slides, reports and tables, and what they say in a catalogue's form."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

import pathopipe
from pathopipe.cohort import is_missing
from pathopipe.errors import EncoderError, StoreError, UsageError
from pathopipe.files import durable_file
from pathopipe.metadata.cases import Case, MetadataCohort
from pathopipe.metadata.model import MODALITIES, MetadataNetwork, MetadataShape, SlideBatch
from pathopipe.metadata.table import TableEncoder
from pathopipe.metadata.tasks import TaskSpec
from pathopipe.metadata.text import TextEncoder, TextVectorizer, TransformersText
from pathopipe.mil.bags import Bag, BagLoader
from pathopipe.mil.scored import write_rows
from pathopipe.mil.targets import TargetSpec, predict_target, slice_of

__all__ = [
    "FOLDS_FILE",
    "FOLDS_FOLDER",
    "NGRAMS",
    "Inputs",
    "MetadataEnsemble",
    "MetadataModel",
    "ModelCard",
    "Prediction",
    "Preparation",
    "abstentions",
    "as_mask",
    "interpret",
    "load_ensemble",
    "modality_sets",
    "predict",
    "right_of",
    "set_name",
    "slide_batches",
    "surety_of",
    "thresholds_of",
    "value_of",
    "whole_batches",
    "without_class_weights",
    "write_csv",
    "write_json_lines",
]

NGRAMS: Final = "ngrams"
"""Name of the text encoder that needs no download."""

FOLDS_FILE: Final = "folds.csv"
"""Which patient was in which part of which fold."""
FOLDS_FOLDER: Final = "folds"
"""Holds a folder a fold."""

_WEIGHTS: Final = "model.safetensors"
_CARD: Final = "model.json"
_FORMAT: Final = 1
_TEXT_PREFIX: Final = "text."
_TILES_AT_ONCE: Final = 65536
_SLIDES_AT_ONCE: Final = 64
_NUMBERS_READ_AHEAD: Final = 1_000_000

Floats = NDArray[np.float64]


# --- inputs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a network is fed with: n slides, side by side."""

    bags: tuple[Bag | None, ...]
    text: NDArray[np.float32]
    """(n, T); zeros without a report; T is 0 without a text branch."""
    table: NDArray[np.float32]
    """(n, C)."""
    present: NDArray[np.bool_]
    """(n, 3): image, text, table."""
    patient: NDArray[np.intp]
    """(n,) number of the patient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """What turns a cohort into inputs, fitted on training slides alone."""

    tile_features: int
    """Width of a tile; 0 for no image branch."""
    text: TextEncoder | None
    table: TableEncoder | None
    table_columns: tuple[str, ...]

    @classmethod
    def fit(cls, cohort: MetadataCohort, rows: NDArray[np.intp], text: TextEncoder) -> "Preparation":
        """Learn vocabulary, columns and scales from the slides ``rows``, and from no other.

        Args:
            cohort: All slides.
            rows: Those of the training part.
            text: What turns reports into vectors, not fitted yet.
        """
        cases = [cohort.cases[int(row)] for row in rows]
        bags = [case.bag for case in cases if case.bag is not None]
        # Slides of a patient share a report; it counts once.
        texts = list(dict.fromkeys(case.text for case in cases if case.text))
        tabled = [case.row for case in cases if _has_table(case, cohort.table_columns)]
        return cls(
            tile_features=bags[0].features if bags else 0,
            text=text.fit(texts) if len(texts) > 1 else None,
            table=TableEncoder().fit(tabled, cohort.table_columns) if tabled else None,
            table_columns=cohort.table_columns,
        )

    def inputs(self, cohort: MetadataCohort) -> Inputs:
        """The slides of a cohort as a network takes them; what the model has no branch for counts as absent.

        Raises:
            UsageError: A report or a table row gives numbers that are not finite.
        """
        n = len(cohort.cases)
        present = np.zeros((n, len(MODALITIES)), bool)
        text = np.zeros((n, self.text.width if self.text else 0), np.float32)
        table = np.zeros((n, self.table.width if self.table else 0), np.float32)
        bags = tuple(case.bag if self.tile_features else None for case in cohort.cases)
        present[:, 0] = [bag is not None and bag.n_tiles > 0 for bag in bags]
        if self.text is not None:
            rows = [row for row, case in enumerate(cohort.cases) if case.text]
            distinct = {words: number for number, words in enumerate(dict.fromkeys(cohort.cases[r].text for r in rows))}
            if distinct:
                vectors = self.text.transform(cast("list[str]", list(distinct)))
                text[rows] = vectors[[distinct[cohort.cases[row].text] for row in rows]]
            present[rows, 1] = True
        if self.table is not None:
            rows = [row for row, case in enumerate(cohort.cases) if _has_table(case, self.table_columns)]
            if rows:
                table[rows] = self.table.transform([cohort.cases[row].row for row in rows])
            present[rows, 2] = True
        for values, what in ((text, "report"), (table, "table row")):
            odd = np.flatnonzero(~np.isfinite(values).all(axis=1))
            if len(odd):
                raise UsageError(
                    f"{cohort.cases[int(odd[0])].slide_id}: its {what} gives numbers that are not finite "
                    f"({len(odd)} such slides); correct it, or leave it out"
                )
        patient = np.unique(np.asarray([case.patient_id for case in cohort.cases]), return_inverse=True)[1]
        return Inputs(bags=bags, text=text, table=table, present=present, patient=patient.astype(np.intp))


def _has_table(case: Case, columns: Sequence[str]) -> bool:
    return any(not is_missing(case.row.get(name, "")) for name in columns)


def slide_batches(
    inputs: Inputs,
    rows: NDArray[np.intp],
    *,
    size: int,
    cap: int | None = None,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = False,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[NDArray[np.intp], SlideBatch]]:
    """Batches of about ``size`` slides, those with an image spread evenly over them; tiles are read ahead.

    Args:
        inputs: All slides.
        rows: Those wanted; each has a modality.
        size: Slides a batch, at most.
        cap: Most tiles of a slide, drawn afresh each epoch; None: all.
        seed: With the epoch it decides order and samples.
        epoch: Its number.
        shuffle: Another order in each epoch.
        device: Where the tensors go.

    Yields:
        The rows of the batch, those with an image first, and what the network takes.
    """
    if shuffle:
        rows = np.random.default_rng([seed, epoch]).permutation(rows)
    there = inputs.present[rows, 0]
    with_image, rest = rows[there], rows[~there]
    n_batches = -(-len(rows) // size)
    if not n_batches:
        return
    images: Iterator[Any] = iter(())
    bags: list[Bag] = []
    if len(with_image):
        bags = [cast(Bag, inputs.bags[int(row)]) for row in with_image]
        at_once = -(-len(with_image) // n_batches)
        largest = max(bag.n_tiles for bag in bags)
        # Small batches are read sooner than handed from thread to thread.
        ahead = 2 if at_once * min(largest, cap or largest) * bags[0].features > _NUMBERS_READ_AHEAD else 0
        images = BagLoader(bags, batch_size=at_once, cap=cap, seed=seed, prefetch=ahead).epoch(epoch)
    for batch, others in zip_longest(images, np.array_split(rest, n_batches)):
        own = others if batch is None else np.concatenate([with_image[batch.bags], others])
        if not len(own):
            continue
        yield (
            own,
            SlideBatch(
                present=torch.from_numpy(inputs.present[own]).to(device),
                tiles=None if batch is None else torch.from_numpy(batch.tiles).to(device),
                real=None if batch is None else torch.from_numpy(batch.real).to(device),
                text=torch.from_numpy(inputs.text[own]).to(device) if inputs.text.shape[1] else None,
                table=torch.from_numpy(inputs.table[own]).to(device) if inputs.table.shape[1] else None,
                sizes=None if batch is None else torch.tensor([bags[n].n_tiles for n in batch.bags], device=device),
            ),
        )


def whole_batches(
    inputs: Inputs, rows: NDArray[np.intp], *, device: torch.device | str = "cpu"
) -> Iterator[tuple[NDArray[np.intp], SlideBatch]]:
    """Batches with all tiles of each slide, as many slides as fit; as :func:`slide_batches`, in an order of its own."""
    sizes = np.asarray([bag.n_tiles if (bag := inputs.bags[int(row)]) is not None else 0 for row in rows])
    # Slides of like size side by side need little padding.
    rows, largest = rows[np.argsort(sizes, kind="stable")], max(1, int(sizes.max()))
    size = int(max(1, min(_SLIDES_AT_ONCE, _TILES_AT_ONCE // largest)))
    yield from slide_batches(inputs, rows, size=size, device=device)


# --- what probabilities mean -------------------------------------------------------------------------------------


def surety_of(spec: TargetSpec, probabilities: Floats) -> Floats:
    """(n,) how sure a prediction is: the probability of what is predicted; of the least sure label of several.

    NaN for continuous tasks, and where there is no prediction.
    """
    if not spec.classes:
        return np.full(len(probabilities), np.nan)
    if spec.kind == "multilabel":
        return np.asarray(np.maximum(probabilities, 1 - probabilities).min(axis=1))
    return np.asarray(probabilities.max(axis=1))


def right_of(spec: TargetSpec, probabilities: Floats, truth: Floats) -> Floats:
    """(n,) 1 where the prediction is what is recorded, 0 where not, NaN where nothing is or the task is continuous.

    Of several labels all that are known must be right.
    """
    right = np.full(len(probabilities), np.nan)
    known = np.isfinite(truth).any(axis=1) & np.isfinite(probabilities).all(axis=1)
    if not spec.classes or not known.any():
        return right
    if spec.kind == "multilabel":
        wrong = np.isfinite(truth[known]) & ((probabilities[known] >= 0.5) != (truth[known] == 1))
        right[known] = ~wrong.any(axis=1)
    else:
        right[known] = probabilities[known].argmax(axis=1) == truth[known, 0]
    return right


def value_of(spec: TargetSpec, probabilities: Floats) -> str:
    """What a row of probabilities (P,) predicts, as a catalogue's cell; ``""`` where there is no prediction."""
    if not np.isfinite(probabilities).all():
        return ""
    if not spec.classes:
        return f"{probabilities[0]:.6g}"
    if spec.kind == "multilabel":
        return ";".join(name for name, share in zip(spec.classes, probabilities, strict=True) if share >= 0.5)
    return spec.classes[int(probabilities.argmax())]


def set_name(present: Sequence[bool] | NDArray[np.bool_]) -> str:
    """``image+text`` for (True, True, False); ``""`` for none."""
    return "+".join(name for name, there in zip(MODALITIES, present, strict=True) if there)


def modality_sets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Every subset that is not empty, single modalities first."""
    return [chosen for size in range(1, len(modalities) + 1) for chosen in combinations(modalities, size)]


def as_mask(modalities: Sequence[str]) -> NDArray[np.bool_]:
    """(3,) which of image, text and table are among them."""
    return np.asarray([name in modalities for name in MODALITIES])


def without_class_weights(spec: TargetSpec, logits: Floats) -> Floats:
    """Logits as they would be without the class weights of the loss, so that probabilities follow the frequencies.

    A weighted loss multiplies each class's odds by its weight (Elkan 2001, The foundations of cost-sensitive learning).
    """
    if not spec.class_weights:
        return logits
    logs = np.log(np.asarray(spec.class_weights, np.float64))
    return np.asarray(logits - (logs[1] - logs[0] if spec.kind == "binary" else logs))


# --- one model ---------------------------------------------------------------------------------------------------


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


def interpret(card: ModelCard, logits: Floats, used: NDArray[np.bool_]) -> dict[str, Floats]:
    """Calibrated predictions of each task.

    Args:
        card: Of the model; it holds the temperatures.
        logits: (n, K) of all tasks, as :meth:`MetadataModel.logits` gives them.
        used: (n, 3) what each slide was predicted from; it decides the temperature.

    Returns:
        By task (n, P): probabilities of its classes, or (n, 1) the value; NaN where logits are.
    """
    names = np.asarray([set_name(row) for row in used], dtype=object)
    found = {}
    for number, spec in enumerate(card.targets):
        own = logits[:, slice_of(card.targets, number, "logits")]
        values = np.full((len(logits), len(spec.prediction_names)), np.nan)
        for name in sorted(set(names)):
            rows = np.flatnonzero((names == name) & np.isfinite(own).all(axis=1))
            if len(rows):
                temperature = card.temperatures[spec.name].get(name, 1.0)
                values[rows] = predict_target(spec, own[rows], temperature=temperature)
        found[spec.name] = values
    return found


def thresholds_of(card: ModelCard, task: str, used: NDArray[np.bool_]) -> Floats:
    """(n,) the surety below which a task's prediction is not given, by what each slide is predicted from (n, 3).

    Infinite: never given; minus infinite for numbers, which have no surety.
    """
    if not next(spec for spec in card.targets if spec.name == task).classes:
        return np.full(len(used), -np.inf)
    cuts = [card.thresholds[task].get(set_name(row)) for row in used]
    return np.asarray([np.inf if cut is None else cut for cut in cuts], np.float64)


def abstentions(card: ModelCard, scores: Mapping[str, Floats], used: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    """By task (n,) whether the model abstains; also where there is no prediction."""
    found = {}
    for spec in card.targets:
        values = scores[spec.name]
        unsure = surety_of(spec, values) < thresholds_of(card, spec.name, used) if spec.classes else False
        found[spec.name] = np.asarray(unsure | ~np.isfinite(values).all(axis=1))
    return found


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


# --- the folds together ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One field of one slide, as a catalogue takes it."""

    slide_id: str
    task: str
    value: str
    """The class, ``;`` between several labels, or the number; ``""`` where the slide has nothing to predict from."""
    code: str
    """The value in the terms that the task file names, ``;`` between several; ``""`` where it names none."""
    probability: float | None
    """How sure it is, calibrated; None for continuous tasks."""
    abstained: bool
    """The model is less sure than the precision asked for needs; the value is then not to be entered unseen."""
    model_id: str
    modalities: str
    """What it was predicted from: ``image+text``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataEnsemble:
    """The models of the folds of one training."""

    models: tuple[MetadataModel, ...]
    folds: tuple[str, ...]
    parts: Mapping[str, Mapping[str, str]]
    """By patient, then fold: ``train``, ``val`` or ``test``."""

    @property
    def tasks(self) -> tuple[TaskSpec, ...]:
        """What is predicted."""
        return self.models[0].card.tasks

    @property
    def targets(self) -> tuple[TargetSpec, ...]:
        """The same as ``mil`` knows it; what was fitted in the first fold."""
        return self.models[0].card.targets

    @property
    def model_id(self) -> str:
        """Tells this training from any other: a hash of all weights."""
        text = " ".join(model.weights_id for model in self.models)
        return f"pathopipe-metadata@{sha256(text.encode()).hexdigest()[:12]}"

    def choose(self, patient_id: str) -> tuple[int, ...]:
        """Which models may say something of a patient: those that have learnt nothing from it; all for a new one."""
        parts = self.parts.get(patient_id, {})
        held_out = [number for number, fold in enumerate(self.folds) if parts.get(fold) == "test"]
        return tuple(held_out or range(len(self.models)))

    def predict(self, cohort: MetadataCohort) -> tuple[dict[str, Floats], dict[str, NDArray[np.bool_]], list[str]]:
        """Predictions of every slide, from all modalities that it has.

        The calibrated probabilities of models are averaged. The threshold is the median of the models', each found on
        its own validation part.

        Returns:
            By task (n, P) predictions, NaN where a slide has nothing to predict from; by task (n,) whether the models
            abstain; and what each slide was predicted from.

        Raises:
            EncoderError: Embeddings are of another encoder.
        """
        n = len(cohort.cases)
        asked = MODALITIES
        choice = [self.choose(case.patient_id) for case in cohort.cases]
        totals = {spec.name: np.zeros((n, len(spec.prediction_names))) for spec in self.targets}
        cuts = {spec.name: np.full((n, len(self.models)), np.nan) for spec in self.targets}
        used = np.zeros((n, len(MODALITIES)), bool)
        for number, model in enumerate(self.models):
            rows = np.flatnonzero([number in chosen for chosen in choice])
            if not len(rows):
                continue
            part = cohort.take(rows)
            if model.card.shape.tile_features:
                model.check_features([case.bag for case in part.cases if case.bag is not None])
            inputs = model.preparation.inputs(part)
            used[rows] = inputs.present
            logits = model.logits(inputs, np.arange(len(rows)), [asked])[asked]
            for task, values in interpret(model.card, logits, inputs.present).items():
                totals[task][rows] += values
                cuts[task][rows, number] = thresholds_of(model.card, task, inputs.present)
        count = np.asarray([len(chosen) for chosen in choice])[:, None]
        predicted = {task: total / count for task, total in totals.items()}
        abstained = {}
        for spec in self.targets:
            surety = surety_of(spec, predicted[spec.name])
            nothing = ~np.isfinite(predicted[spec.name]).all(axis=1)
            unsure = ~(surety >= np.nanmedian(cuts[spec.name], axis=1)) if spec.classes else np.zeros(n, bool)
            abstained[spec.name] = nothing | unsure
        return predicted, abstained, [set_name(row) for row in used]


def load_ensemble(folder: Path, *, device: str = "cpu") -> MetadataEnsemble:
    """Open what :func:`pathopipe.metadata.train.train` wrote.

    Raises:
        UsageError: There are no models in this folder.
        StoreError: They are damaged, or of a newer version.
    """
    folders = sorted((folder / FOLDS_FOLDER).glob("*/")) if (folder / FOLDS_FOLDER).is_dir() else []
    folders = [path for path in folders if not path.name.startswith(".")]
    if not folders:
        raise UsageError(f"{folder}: no models here; give the folder that 'pathopipe metadata train --out' wrote")
    parts: dict[str, dict[str, str]] = {}
    try:
        with (folder / FOLDS_FILE).open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                parts.setdefault(row["patient_id"], {})[row["fold"]] = row["part"]
    except (OSError, KeyError, UnicodeDecodeError) as error:
        raise StoreError(
            f"{folder / FOLDS_FILE}: can't be read ({error}); without it nobody knows which patients the models have "
            "seen: copy the folder again, or train again"
        ) from None
    return MetadataEnsemble(
        models=tuple(MetadataModel.load(path, device=device) for path in folders),
        folds=tuple(path.name for path in folders),
        parts=parts,
    )


def predict(model_folder: Path, cohort: MetadataCohort, *, device: str = "cpu") -> list[Prediction]:
    """Fields of a catalogue for every slide of a cohort, recorded or not.

    A patient of the training cohort is predicted by the models that did not learn from it.

    Args:
        model_folder: What ``metadata train`` wrote.
        cohort: Slides with whatever there is of them.
        device: ``cpu`` or ``cuda``.

    Returns:
        One for each slide and task, in the order of the cohort.

    Raises:
        UsageError: No model there, or embeddings of another encoder.
        StoreError: The model is damaged.
    """
    ensemble = load_ensemble(model_folder, device=device)
    predicted, abstained, used = ensemble.predict(cohort)
    model_id = ensemble.model_id
    rows = []
    for row, case in enumerate(cohort.cases):
        for task, spec in zip(ensemble.tasks, ensemble.targets, strict=True):
            probabilities = predicted[task.name][row]
            value = value_of(spec, probabilities)
            surety = float(surety_of(spec, probabilities[None])[0])
            named = value.split(";") if spec.kind == "multilabel" else [value]
            rows.append(
                Prediction(
                    slide_id=case.slide_id,
                    task=task.name,
                    value=value,
                    code=";".join(task.codes[name] for name in named if name in task.codes),
                    probability=round(surety, 6) if np.isfinite(surety) else None,
                    abstained=bool(abstained[task.name][row]),
                    model_id=model_id,
                    modalities=used[row],
                )
            )
    return rows


def write_csv(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions as CSV, whole or not at all; cells that a spreadsheet would run are escaped."""
    write_rows(path, [{**asdict(one), "abstained": str(one.abstained).lower()} for one in predictions])


def write_json_lines(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions as one JSON object a line, whole or not at all."""
    with durable_file(path) as file:
        file.writelines((json.dumps(asdict(one), ensure_ascii=False) + "\n").encode() for one in predictions)
