"""Saved models over bags: folds as one ensemble, out of fold for what they were trained on, and which tiles matter."""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import StoreError, UsageError
from pathopipe.mil.bags import Bag, array_bag
from pathopipe.mil.model import BagPrediction, MilModel
from pathopipe.mil.targets import TargetSpec, slice_of
from pathopipe.store import SlideStore

__all__ = [
    "REMOVED_SHARES",
    "Ensemble",
    "Faithfulness",
    "Prediction",
    "find_ensembles",
    "load_ensemble",
    "measure_faithfulness",
    "output_label",
    "predict_bag",
    "store_prediction",
    "training_root",
]

Seen = Literal["new", "test", "val", "train"]
"""What a patient was to the models that scored it; ``new``: in no part of their cohort."""

REMOVED_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Shares of a slide's tiles that are taken away to see what the model makes of the rest."""

_RANDOM_REPEATS = 5
_LEVELS_UP = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Ensemble:
    """The models of the folds of one training, or a single model."""

    name: str
    """As predictions of it are called in a store: lower case, digits, ``._-``."""
    models: tuple[MilModel, ...]
    folders: tuple[Path, ...]
    """Where they were loaded from; the name of each is that of its fold."""
    parts: Mapping[str, Mapping[str, str]]
    """By patient, then fold: ``train``, ``val`` or ``test``."""
    patients: Mapping[str, str]
    """Patient of each bag of the training cohort."""
    by: Literal["slide", "patient"]
    """What a bag was in training."""
    weights: str
    """Hash of all weights; tells a model from one that was trained anew under the same name."""

    @property
    def targets(self) -> tuple[TargetSpec, ...]:
        """What is predicted; names and classes are the same for every model."""
        return self.models[0].card.targets

    @property
    def folds(self) -> tuple[str, ...]:
        """Names of the folds, one a model."""
        return tuple(folder.name for folder in self.folders)

    def choose(self, bag: Bag, *, allow_training: bool = False) -> tuple[tuple[int, ...], Seen]:
        """Which models may score a bag, and what its patient was to them.

        A patient of the training cohort is scored by the models of the folds in which it was in the test part, so that
        no figure and no map is of a patient that the model has learnt from. All models score anyone else. Bags are
        known by patient, or where patients are not stated by their own id.

        Raises:
            UsageError: It was in no test part, and ``allow_training`` is off.
        """
        patient_id = bag.patient_id if bag.patient_id in self.parts else self.patients.get(bag.bag_id, bag.patient_id)
        parts = self.parts.get(patient_id, {})
        apart = tuple(number for number, fold in enumerate(self.folds) if fold not in parts)
        if len(apart) == len(self.folds):
            return apart, "new"
        held_out = tuple(number for number, fold in enumerate(self.folds) if parts.get(fold) == "test")
        if held_out:
            return held_out, "test"
        if apart:
            return apart, "new"
        if not allow_training:
            raise UsageError(
                f"patient {patient_id} was used in training by every model here, so a prediction would say nothing "
                "about them; leave it out, or pass --allow-training to see it all the same"
            )
        return tuple(range(len(self.models))), "train" if "train" in parts.values() else "val"

    def check_features(self, bags: Sequence[Bag]) -> None:
        """Make sure that the features come from the encoder of the training.

        Raises:
            UsageError: Another encoder, other weights, or another width.
        """
        for model in self.models:
            model.check_features(bags)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What an ensemble says of one bag."""

    bag: Bag
    seen: Seen
    models: tuple[int, ...]
    """Numbers of the models that were asked."""
    logits: NDArray[np.float32]
    """(K,) mean over models."""
    probabilities: Mapping[str, NDArray[np.float64]]
    """By target: mean over models of the calibrated probabilities (P,), or (1,) of values or risks."""
    attention: NDArray[np.float32] | None
    """(n_tiles, A) mean over models; None for heads without."""
    contributions: NDArray[np.float32] | None
    """(n_tiles, K) mean over models; None for heads without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faithfulness:
    """How much a prediction rests on the tiles that a map marks, against tiles at random."""

    output: str
    """What is followed: the probability of the class that is predicted, or the value."""
    ranked_by: str
    """Which map ranks the tiles: ``attention`` or ``contribution``."""
    whole: float
    """With all tiles."""
    shares: tuple[float, ...]
    """Of the tiles, taken away."""
    without_top: tuple[float, ...]
    """Without the tiles that the map marks highest."""
    without_random: tuple[float, ...]
    """Without as many at random, mean of five repeats."""
    random_spread: tuple[float, ...]
    """Standard deviation over the repeats."""

    def line(self, share: float = 0.1) -> str:
        """One sentence for a legend."""
        if share not in self.shares:
            return "faithfulness: too few tiles"
        number = self.shares.index(share)
        return (
            f"faithfulness: {self.output} {self.whole:.3f}; without the top {share:.0%} of tiles "
            f"{self.without_top[number]:.3f}, without as many at random {self.without_random[number]:.3f}"
        )


# ---- which models


def find_ensembles(folder: Path) -> dict[str, list[Path]]:
    """The models in a training folder, in one of its heads, or a model's own folder, by ``encoder/head``.

    Raises:
        UsageError: There is none.
    """
    if (folder / "model.json").is_file():
        return {f"{folder.parent.parent.name}/{folder.parent.name}": [folder]}
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("model.json"), key=_natural):
        head = path.parent.parent
        found.setdefault(f"{head.parent.name}/{head.name}", []).append(path.parent)
    if not found:
        raise UsageError(f"{folder}: no trained model in here (no model.json); give the --out folder of 'mil train'")
    return found


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key that sorts fold2 before fold10."""
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", str(path))]


def training_root(folder: Path) -> Path | None:
    """The folder of a training (it holds ``splits.csv``), at or above that of a model; None where there is none."""
    for place in (folder, *folder.absolute().parents[:_LEVELS_UP]):
        if (place / "splits.csv").is_file():
            return place
    return None


def _read_splits(root: Path) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Which part of each fold each patient was in, by patient, then fold; and the patient of each bag."""
    parts: dict[str, dict[str, str]] = {}
    patients: dict[str, str] = {}
    with (root / "splits.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            parts.setdefault(row["patient_id"], {})[_fold_name(row["fold"])] = row["part"]
            patients[row["bag_id"]] = row["patient_id"]
    return parts, patients


def _fold_name(text: str) -> str:
    return text if text.startswith("fold") else f"fold{text}"


def load_ensemble(folder: Path, *, device: str = "cpu") -> Ensemble:
    """Load what ``mil train`` saved: a training folder, one head of it, or one model.

    Where the folder holds several heads or encoders, the one that was best in ``results.json`` is taken.

    Raises:
        UsageError: No model in the folder, or several without results.
    """
    ensembles = find_ensembles(folder)
    root = training_root(folder)
    chosen = next(iter(ensembles)) if len(ensembles) == 1 else _best_ranked(folder, root, list(ensembles))
    places = ensembles[chosen]
    models = tuple(MilModel.load(place, device=device) for place in places)
    card = models[0].card
    target = "+".join(spec.name for spec in card.targets)
    parts, patients = _read_splits(root) if root is not None else ({}, {})
    config = json.loads((root / "config.json").read_text(encoding="utf-8")) if root is not None else {}
    weights = sha256()
    for place in places:
        weights.update((place / "model.safetensors").read_bytes())
    return Ensemble(
        name=_slug(f"{target}.{card.head}.{card.encoder or 'features'}"),
        models=models,
        folders=tuple(places),
        parts=parts,
        patients=patients,
        by=config.get("by", "slide"),
        weights=weights.hexdigest()[:16],
    )


def _best_ranked(folder: Path, root: Path | None, names: list[str]) -> str:
    """The model whose main figure, the first in its table, is highest for the first target."""
    if root is not None and (root / "results.json").is_file():
        models = json.loads((root / "results.json").read_text(encoding="utf-8"))[0]["models"]
        value = {name.replace(" ", "/"): table["figures"][0]["value"] for name, table in models.items()}
        known = [name for name in names if value.get(name) is not None]
        if known:
            return max(known, key=lambda name: float(value[name]))
    raise UsageError(f"{folder}: holds several models ({', '.join(names)}); give the folder of one")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.casefold()).strip("-.") or "model"


# ---- predicting


def predict_bag(
    ensemble: Ensemble,
    bag: Bag,
    covariates: Sequence[NDArray[np.float32] | None] | None = None,
    *,
    allow_training: bool = False,
) -> Prediction:
    """Score one bag by the models that may: see :meth:`Ensemble.choose`. Only this bag's tiles are in memory.

    Args:
        ensemble: The models.
        bag: With tiles.
        covariates: For each model the bag's (C,) as that model encodes them; None where it takes none.
        allow_training: Score bags that every model has learnt from, too.

    Raises:
        UsageError: The bag is empty, or every model has learnt from it.
    """
    if not bag.n_tiles:
        raise UsageError(f"{bag.bag_id}: no tile with features, so nothing can be predicted")
    chosen, seen = ensemble.choose(bag, allow_training=allow_training)
    # The tiles are read once for all models.
    held = _held(bag, bag.read())
    found = _ask(ensemble, chosen, held, covariates)
    return Prediction(
        bag=bag,
        seen=seen,
        models=chosen,
        logits=np.mean([one.logits for one in found], axis=0).astype(np.float32),
        probabilities=_mean_probabilities(found),
        attention=_mean_of_tiles([one.attention for one in found]),
        contributions=_mean_of_tiles([one.contributions for one in found]),
    )


def _ask(
    ensemble: Ensemble,
    chosen: Sequence[int],
    bag: Bag,
    covariates: Sequence[NDArray[np.float32] | None] | None,
) -> list[BagPrediction]:
    return [
        ensemble.models[number].predict(bag, None if covariates is None else covariates[number]) for number in chosen
    ]


def _held(bag: Bag, values: NDArray[np.float32]) -> Bag:
    return array_bag(bag.bag_id, values, patient_id=bag.patient_id, site=bag.site, encoder=bag.encoder_id)


def _mean_probabilities(found: Sequence[BagPrediction]) -> dict[str, NDArray[np.float64]]:
    return {name: np.mean([one.probabilities[name] for one in found], axis=0) for name in found[0].probabilities}


def _mean_of_tiles(found: Sequence[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    there = [one for one in found if one is not None]
    return np.mean(there, axis=0).astype(np.float32) if len(there) == len(found) else None


def output_label(targets: Sequence[TargetSpec], output: int) -> str:
    """The class or value that a logit stands for; with its target in front where there are several."""
    for number, spec in enumerate(targets):
        own = slice_of(targets, number, "logits")
        if own.start <= output < own.stop:
            at = output - own.start
            match spec.kind:
                case "binary":
                    label = spec.classes[1]
                case "multiclass" | "multilabel":
                    label = spec.classes[at]
                case "ordinal":
                    label = f"above {spec.classes[at]}"
                case "survival_discrete":
                    label = f"interval {at + 1}"
                case _:
                    label = spec.name
            return f"{spec.name} {label}" if len(targets) > 1 and label != spec.name else label
    raise IndexError(f"no output {output} among {len(targets)} targets")


def store_prediction(ensemble: Ensemble, prediction: Prediction) -> list[SlideStore]:
    """Write logits and maps into the stores of the bag's slides; nothing for features of other programs.

    Columns of the stored attention: attention (one, or one an output), then contributions to each output. Tiles that
    the model did not see are NaN. In a bag of several slides attention sums to one over all of them.

    Returns:
        The stores.

    Raises:
        StoreError: A store can't be written.
    """
    targets = ensemble.targets
    card = ensemble.models[0].card
    columns, maps = [], []
    if prediction.attention is not None:
        columns.append(prediction.attention)
        width = prediction.attention.shape[1]
        maps += [
            {"kind": "attention", "label": output_label(targets, column) if width > 1 else ""}
            for column in range(width)
        ]
    if prediction.contributions is not None:
        columns.append(prediction.contributions)
        outputs = range(prediction.contributions.shape[1])
        maps += [{"kind": "contribution", "label": output_label(targets, output)} for output in outputs]
    values = np.concatenate(columns, axis=1) if columns else None
    about: dict[str, Any] = {
        "bag_id": prediction.bag.bag_id,
        "bag_tiles": prediction.bag.n_tiles,
        "head": card.head,
        "encoder": card.encoder_id,
        "weights": ensemble.weights,
        "seen": prediction.seen,
        "folds": [ensemble.folds[number] for number in prediction.models],
        "targets": [{"name": spec.name, "kind": spec.kind, "classes": list(spec.classes)} for spec in targets],
        "probabilities": {name: found.tolist() for name, found in prediction.probabilities.items()},
        "maps": maps,
    }
    written, start = [], 0
    for place in prediction.bag.places():
        end = start + len(place.rows)
        if place.path is not None and place.grid is not None:
            of_slide = None
            if values is not None:
                of_slide = np.full((place.n_rows, values.shape[1]), np.nan, np.float32)
                of_slide[place.rows] = values[start:end]
            store = SlideStore.open(place.path)
            if place.grid not in store.grids():
                raise StoreError(f"{place.slide_id}: its store lacks the grid {place.grid}; run it again")
            store.write_predictions(ensemble.name, prediction.logits, of_slide, grid=place.grid, about=about)
            written.append(store)
        start = end
    return written


# ---- which tiles matter


def measure_faithfulness(
    ensemble: Ensemble,
    prediction: Prediction,
    covariates: Sequence[NDArray[np.float32] | None] | None = None,
    *,
    target: int = 0,
    followed: int | None = None,
    shares: Sequence[float] = REMOVED_SHARES,
    seed: int = 0,
) -> Faithfulness | None:
    """Take away the tiles that a map marks highest, and as many at random, and predict again from the rest.

    A map that shows what the model uses loses more with its top tiles than with others. Contributions rank the tiles
    where the head gives them, else attention.

    Source: Samek et al. 2017, Evaluating the visualization of what a deep neural network has learned, IEEE TNNLS 28,
    2660; regions removed from the input, here tiles of the bag.

    Args:
        ensemble: The models; those that made the prediction are asked again.
        prediction: Of one bag.
        covariates: As they were for the prediction.
        target: Which target.
        followed: Which of the target's probabilities; the predicted class when left out.
        shares: Of the tiles, taken away; those that would leave no tile are passed over.
        seed: For the random tiles.

    Returns:
        None where the head marks no tile.
    """
    spec = ensemble.targets[target]
    whole = prediction.probabilities[spec.name]
    number = int(np.argmax(whole)) if followed is None else followed
    ranked = _ranking(ensemble, prediction, target, number)
    if ranked is None:
        return None
    ranked_by, marks = ranked
    n = len(marks)
    order = np.argsort(-marks, kind="stable")
    values = prediction.bag.read()
    rng = np.random.default_rng(seed)

    def again(kept: NDArray[np.intp]) -> float:
        part = _held(prediction.bag, values[np.sort(kept)])
        found = _ask(ensemble, prediction.models, part, covariates)
        return float(_mean_probabilities(found)[spec.name][number])

    steps = [(share, max(1, round(share * n))) for share in shares if max(1, round(share * n)) < n]
    top = [again(order[removed:]) for _, removed in steps]
    random = [[again(rng.permutation(n)[removed:]) for _ in range(_RANDOM_REPEATS)] for _, removed in steps]
    return Faithfulness(
        output=spec.classes[number] if spec.classes else spec.name,
        ranked_by=ranked_by,
        whole=float(whole[number]),
        shares=tuple(share for share, _ in steps),
        without_top=tuple(top),
        without_random=tuple(float(np.mean(one)) for one in random),
        random_spread=tuple(float(np.std(one)) for one in random),
    )


def _ranking(
    ensemble: Ensemble, prediction: Prediction, target: int, number: int
) -> tuple[str, NDArray[np.float32]] | None:
    """The map that ranks tiles for one probability, and its name."""
    spec, own = ensemble.targets[target], slice_of(ensemble.targets, target, "logits")
    at = own.start + (number if spec.kind in ("multiclass", "multilabel") else 0)
    if prediction.contributions is not None and spec.kind not in ("ordinal", "survival_discrete"):
        # The negative class of a binary target has no logit of its own: what speaks against the positive speaks for it.
        sign = -1 if spec.kind == "binary" and number == 0 else 1
        return "contribution", sign * prediction.contributions[:, at]
    if prediction.attention is None:
        return None
    return "attention", prediction.attention[:, at if prediction.attention.shape[1] > 1 else 0]
