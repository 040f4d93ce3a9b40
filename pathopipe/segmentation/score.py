"""Scores files of found objects against files of true ones: reads, pairs, counts, and sums up over images."""

import csv
import io
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pathopipe.config import DEFAULT_SEGMENT_MODEL, read_yaml
from pathopipe.errors import UsageError
from pathopipe.registry import nearest
from pathopipe.segmentation.label_files import (
    GEOJSON_KINDS,
    LABEL_KINDS,
    PICTURE_KINDS,
    LabelImage,
    Note,
    counted,
    draw_features,
    find_files,
    first_names,
    read_label_image,
    read_rgb,
    split_name,
)
from pathopipe.segmentation.metrics import (
    CUSTOMARY_RADIUS_UM,
    Objects,
    Panoptic,
    Tally,
    TypeCounts,
    count_r2,
    overlap,
    panoptic_by_class,
    tally,
    type_counts,
)

__all__ = [
    "ClassTally",
    "EvaluateConfig",
    "FilePair",
    "Finder",
    "ImageScore",
    "LabelImage",
    "Note",
    "Pairing",
    "class_figures",
    "draw_features",
    "evaluate_config",
    "figures",
    "mean_figures",
    "multi_class_figures",
    "open_finder",
    "pair_files",
    "read_groups",
    "read_label_image",
    "score_pair",
]

_SHOWN: Final = 5


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


class EvaluateConfig(BaseModel):
    """What ``pathopipe segmenter evaluate`` is asked to do."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    truth: Path
    """Label image or GeoJSON of the true objects, or a folder of them."""
    predicted: Path | None = None
    """Label image or GeoJSON of the found objects, or a folder of them."""
    images: Path | None = None
    """Instead of ``predicted``: a picture or a folder of them, on which ``model`` finds the objects."""
    model: Literal["network", "classical"] = DEFAULT_SEGMENT_MODEL
    """What finds the objects on ``images``."""
    weights: Path | None = None
    """Weights of the model ``network``; those that are shipped when left out. To name some means ``model: network``."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs."""
    task: Literal["nuclei", "glands", "lumina"] = "nuclei"
    """Which objects the model is to find on ``images``."""
    protocol: Literal["both", "per-image", "pooled"] = "both"
    """Means over images, or all objects of all images together."""
    mpp: float | None = Field(default=None, ge=0.05, le=50)
    """Micrometres per pixel of the label images; needed for everything in micrometres."""
    radius_um: float = Field(default=CUSTOMARY_RADIUS_UM, gt=0)
    """How far the centroid of a found object may lie from the true one to count as detected."""
    glands: bool = False
    """Add the figures of the GlaS contest; their distances take longer than all else."""
    size: str | None = None
    """WIDTHxHEIGHT in pixels of the drawing where both sides are GeoJSON."""
    classes: tuple[str, ...] = ()
    """Score these classes of GeoJSON objects one by one; ``all`` for all that occur."""
    components: Literal["truth", "predicted", "both"] | None = None
    """This side is a mask: its connected regions (pixels that touch at a corner count as connected) are the objects."""
    truth_suffix: str = ""
    """Ending of the truth's file stems that the names of images lack, ``_mask`` for example."""
    predicted_suffix: str = ""
    """The same of the predicted files."""
    group: Path | None = None
    """CSV table whose first column names the images."""
    group_by: str | None = None
    """Column of ``group``; figures are given for each of its values too."""
    allow_missing: bool = False
    """Pass over files without a partner instead of stopping."""
    out: Path | None = None
    """CSV file for one row an image."""

    @field_validator("classes", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("size")
    @classmethod
    def _is_a_size(cls, value: str | None) -> str | None:
        if value is not None:
            _parse_size(value)
        return value

    @model_validator(mode="before")
    @classmethod
    def _weights_mean_network(cls, given: Any) -> Any:
        has_weights = isinstance(given, dict) and given.get("weights") is not None
        return {"model": "network", **given} if has_weights else given

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if self.weights is not None and self.model != "network":
            raise ValueError("weights are those of the model 'network'; leave weights out, or give model network")
        if self.images is not None and self.model == "classical" and self.task != "nuclei":
            raise ValueError(f"the model 'classical' does not find {self.task}, but nuclei alone")
        if (self.predicted is None) == (self.images is None):
            raise ValueError("give either predicted (files of found objects) or images (to find them on)")
        if self.images is not None and self.mpp is None:
            raise ValueError("to find objects on images, give mpp (micrometres per pixel)")
        if (self.group is None) != (self.group_by is None):
            raise ValueError("group (a CSV table) and group_by (one of its columns) go together")
        return self

    @property
    def size_px(self) -> tuple[int, int] | None:
        """Width and height."""
        return None if self.size is None else _parse_size(self.size)


def _parse_size(text: str) -> tuple[int, int]:
    matched = re.fullmatch(r"\s*(\d+)\s*[xX×]\s*(\d+)\s*", text)
    if matched is None or not (int(matched[1]) and int(matched[2])):
        raise ValueError(f"write {text!r} as WIDTHxHEIGHT in pixels, for example 1024x768")
    return int(matched[1]), int(matched[2])


def evaluate_config(path: Path | None, options: Mapping[str, Any]) -> EvaluateConfig:
    """Settings from a YAML file and from options, which win; options that are None were not given.

    Raises:
        UsageError: The file can't be read, a key is unknown (the nearest is named), a value is out of range, or
            settings do not go together.
    """
    settings = {} if path is None else _read_keys(path)
    given = {name: value for name, value in options.items() if value is not None}
    # A choice on the command line replaces the other one in the file.
    for one, other in (("predicted", "images"), ("images", "predicted")):
        if one in given and other not in given:
            settings.pop(other, None)
    try:
        return EvaluateConfig.model_validate({**settings, **given})
    except ValidationError as error:
        where = f"{path}: " if path is not None else ""
        raise UsageError(where + "; ".join(_explain(each) for each in error.errors())) from None


def _read_keys(path: Path) -> dict[str, Any]:
    loaded = read_yaml(path)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"{path}: a config is a mapping of keys ({', '.join(EvaluateConfig.model_fields)})")
    return {str(key): value for key, value in loaded.items()}


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key '{key}'; {nearest(key, EvaluateConfig.model_fields)}"
    if error["type"] == "missing":
        return f"{key} is missing; give --{key} or the key in the config"
    if error["type"] == "value_error":
        return f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
    return f"{key}: {error['msg'].lower()}, got {error['input']!r}"


# ---------------------------------------------------------------------------------------------------------------------
# Which files belong together
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePair:
    """One image: its truth, and what was found or where to find it."""

    name: str
    truth: Path
    other: Path
    """Found objects, or the picture to find them on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """Which files belong together, and which have no partner."""

    pairs: tuple[FilePair, ...]
    truth_only: tuple[Path, ...] = ()
    other_only: tuple[Path, ...] = ()


def pair_files(config: EvaluateConfig) -> Pairing:
    """Pair truth and prediction (or pictures) by file stem.

    Two files are a pair whatever their names. In folders, not in folders within them, the stems must be equal once
    ``truth_suffix`` and ``predicted_suffix`` are taken off; files whose stem lacks the suffix, hidden files and other
    kinds of file are passed over. A file and a folder: the file of the folder with that name.

    Raises:
        UsageError: A path is missing, a folder holds no usable file or two for one image, nothing pairs up, or some
            file has no partner and ``allow_missing`` is not set.
    """
    other_path = config.predicted if config.predicted is not None else config.images
    assert other_path is not None  # the settings hold one of them
    kinds = LABEL_KINDS if config.predicted is not None else PICTURE_KINDS
    truth = find_files(config.truth, LABEL_KINDS, config.truth_suffix)
    other = find_files(other_path, kinds, config.predicted_suffix if config.predicted is not None else "")
    if config.truth.is_file() and other_path.is_file():
        ((name, truth_file),) = truth.items()
        return Pairing(pairs=(FilePair(name=name, truth=truth_file, other=other_path),))
    pairs = tuple(FilePair(name=name, truth=truth[name], other=other[name]) for name in sorted(truth.keys() & other))
    # A single file picks from a folder; the rest of the folder is nobody's loss.
    truth_only = [truth[name] for name in sorted(truth.keys() - other)] if other_path.is_dir() else []
    other_only = [other[name] for name in sorted(other.keys() - truth)] if config.truth.is_dir() else []
    if not pairs:
        raise UsageError(
            f"no file of {config.truth} has the name of one of {other_path} "
            f"({first_names(truth.values())} against {first_names(other.values())}); "
            "name them alike, or say what their stems end in with --truth-suffix and --predicted-suffix"
        )
    if (truth_only or other_only) and not config.allow_missing:
        sides = [(truth_only, config.truth), (other_only, other_path)]
        found = "; ".join(f"{len(files)} in {path} ({first_names(files)})" for files, path in sides if files)
        raise UsageError(f"files without a partner: {found}; add the others, or use --allow-missing to pass them over")
    return Pairing(pairs=pairs, truth_only=tuple(truth_only), other_only=tuple(other_only))


def read_groups(config: EvaluateConfig, names: Sequence[str]) -> dict[str, str]:
    """The group of each image by the table ``group``; all are in the group "" without one.

    The first column names the images, with or without the ending of a file.

    Raises:
        UsageError: The table can't be read, lacks the column (the nearest is named), or says nothing of some images.
    """
    if config.group is None or config.group_by is None:
        return dict.fromkeys(names, "")
    try:
        text = config.group.read_text(encoding="utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        header = list(reader.fieldnames or ())
        rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{config.group}: the table of groups can't be read ({error}); give CSV in UTF-8") from None
    if config.group_by not in header:
        raise UsageError(f"{config.group}: no column '{config.group_by}'; {nearest(config.group_by, header)}")
    group_of: dict[str, str] = {}
    for row in rows:
        name, group = unicodedata.normalize("NFC", (row[header[0]] or "").strip()), (row[config.group_by] or "").strip()
        stem, kind = split_name(Path(name), (*LABEL_KINDS, *PICTURE_KINDS))
        key = name if kind is None else stem
        if group_of.setdefault(key, group) != group:
            raise UsageError(f"{config.group}: '{key}' is in two groups, '{group_of[key]}' and '{group}'; keep one row")
    absent = [name for name in names if name not in group_of]
    if absent:
        raise UsageError(
            f"{config.group}: column '{header[0]}' lacks {len(absent)} images "
            f"({', '.join(absent[:_SHOWN])}); add their rows"
        )
    return {name: group_of[name] for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# Scoring one image
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassTally:
    """What is counted about one class."""

    panoptic: Panoptic = field(default_factory=Panoptic)
    types: TypeCounts = field(default_factory=TypeCounts)
    n_truth: int = 0
    n_predicted: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageScore:
    """What was counted on one image."""

    name: str
    group: str = ""
    mpp: float | None = None
    tally: Tally = field(default_factory=Tally)
    classes: Mapping[str, ClassTally] = field(default_factory=dict)
    """By name; classes that are absent from both sides may be missing."""
    classes_seen: frozenset[str] = frozenset()
    """All classes of either side, asked for or not."""
    notes: tuple[Note, ...] = ()


Finder = Callable[[NDArray[np.uint8], float], LabelImage]
"""Finds the objects of a picture (height, width, 3) of a number of micrometres per pixel."""


def open_finder(config: EvaluateConfig) -> Finder:
    """What finds the objects on ``config.images``.

    Raises:
        UsageError: The network's weights can't be used, or it does not find what is asked for.
    """
    if config.model == "classical":
        from pathopipe.segmentation.classical import find_nuclei

        return lambda rgb, mpp: LabelImage(labels=find_nuclei(rgb, mpp))
    from pathopipe.segmentation.learned import find_objects, open_model  # torch takes seconds

    model = open_model(config.weights, device=config.device, setting="device")
    layer = next((layer for layer in model.layers if layer.name == config.task), None)
    if layer is None:
        found = ", ".join(each.name for each in model.layers)
        raise UsageError(f"these weights do not find {config.task}, but {found}; use other weights or another task")
    names = [each.name for each in layer.classes]
    only = model.only({config.task})

    def find(rgb: NDArray[np.uint8], mpp: float) -> LabelImage:
        found = find_objects(rgb, mpp, only)[config.task]
        class_of = {number: names[class_id] for number, class_id in enumerate(found.class_id.tolist(), 1)}
        return LabelImage(labels=found.labels, class_of=class_of)

    return find


def score_pair(pair: FilePair, config: EvaluateConfig, *, group: str = "", find: Finder | None = None) -> ImageScore:
    """Read one pair, or find objects on its picture, and count.

    Args:
        pair: The files.
        config: The settings.
        group: What the image belongs to.
        find: From :func:`open_finder`, where several pictures share it.

    Raises:
        UsageError: A file is no label image, the sizes differ, or a size or classes are missing.
        GeoJSONError: A GeoJSON file is damaged.
    """
    truth, predicted = _read_pair(pair, config, find)
    if truth.labels.shape != predicted.labels.shape:
        sizes = [f"{side.labels.shape[1]} x {side.labels.shape[0]} px" for side in (truth, predicted)]
        raise UsageError(
            f"{pair.name}: the truth {pair.truth.name} has {sizes[0]}, {pair.other.name} has {sizes[1]}; "
            "give both at one size and of the same field"
        )
    found = overlap(truth.labels, predicted.labels)
    radius_px = None if config.mpp is None else config.radius_um / config.mpp
    notes = [*truth.notes, *predicted.notes]
    classes: dict[str, ClassTally] = {}
    seen: frozenset[str] = frozenset()
    if config.classes:
        for side, path in ((truth, pair.truth), (predicted, pair.other)):
            if side.class_of is None:
                raise UsageError(f"{path}: a label image holds no classes; give GeoJSON, or leave --classes out")
        sides = (
            _classes(found.truth, truth, pair.truth, notes),
            _classes(found.predicted, predicted, pair.other, notes),
        )
        seen = frozenset({*sides[0], *sides[1]} - {""})
        wanted = sorted(seen) if "all" in config.classes else list(dict.fromkeys(config.classes))
        index = {name: number for number, name in enumerate(wanted)}
        truth_class, predicted_class = (np.asarray([index.get(name, -1) for name in side], int) for side in sides)
        by_class = panoptic_by_class(found, truth_class, predicted_class, len(wanted))
        by_type = [TypeCounts() for _ in wanted]
        if radius_px is not None:
            by_type = type_counts(found, truth_class, predicted_class, len(wanted), radius_px)
        for number, name in enumerate(wanted):
            classes[name] = ClassTally(
                panoptic=by_class[number],
                types=by_type[number],
                n_truth=int((truth_class == number).sum()),
                n_predicted=int((predicted_class == number).sum()),
            )
    return ImageScore(
        name=pair.name,
        group=group,
        mpp=config.mpp,
        tally=tally(found, radius_px=radius_px, glands=config.glands),
        classes=classes,
        classes_seen=seen,
        notes=tuple(notes),
    )


def _classes(objects: Objects, image: LabelImage, path: Path, notes: list[Note]) -> list[str]:
    """The class of each object, "" for none."""
    names = [(image.class_of or {}).get(number, "") for number in objects.numbers.tolist()]
    n_none = names.count("")
    if n_none:
        notes.append((path.name, f"{counted(n_none, 'object')} without a class, in no class's figures"))
    return names


def _read_pair(pair: FilePair, config: EvaluateConfig, find: Finder | None) -> tuple[LabelImage, LabelImage]:
    truth_is_drawn = split_name(pair.truth, GEOJSON_KINDS)[1] is not None
    other_is_drawn = split_name(pair.other, GEOJSON_KINDS)[1] is not None
    size = config.size_px
    predicted: LabelImage | None = None
    truth: LabelImage | None = None
    if config.images is not None:
        assert config.mpp is not None  # the settings ask for it
        predicted = (find or open_finder(config))(read_rgb(pair.other), config.mpp)
    elif not other_is_drawn:
        predicted = read_label_image(pair.other, components=config.components in ("predicted", "both"))
    if not truth_is_drawn:
        truth = read_label_image(pair.truth, components=config.components in ("truth", "both"))
    drawn_like = truth or predicted
    if drawn_like is not None:
        size = drawn_like.labels.shape[1], drawn_like.labels.shape[0]
    if size is None:
        raise UsageError(f"{pair.name}: both sides are GeoJSON, so their size is not known; give --size WIDTHxHEIGHT")
    return truth or draw_features(pair.truth, *size), predicted or draw_features(pair.other, *size)


# ---------------------------------------------------------------------------------------------------------------------
# Figures of images, groups and classes
# ---------------------------------------------------------------------------------------------------------------------


def figures(sums: Tally, mpp: float | None) -> dict[str, float]:
    """All figures of one image, or pooled over several; NaN where not defined or not counted.

    ``object_hausdorff`` is in micrometres where ``mpp`` is given, else in pixels.
    """
    return {
        "dice": sums.pixels.dice,
        "aji": sums.aji.jaccard,
        "aji_plus": sums.aji_plus.jaccard,
        "precision": sums.panoptic.precision,
        "recall": sums.panoptic.recall,
        "dq": sums.panoptic.dq,
        "sq": sums.panoptic.sq,
        "pq": sums.panoptic.pq,
        "f1_distance": sums.detection.f1,
        "glas_f1": sums.glands.f1,
        "object_dice": sums.glands.dice,
        "object_hausdorff": sums.glands.hausdorff_px * (mpp or 1.0),
    }


def mean_figures(scores: Sequence[ImageScore]) -> dict[str, tuple[float, int]]:
    """Each figure's mean over the images where it is defined, and their number; NaN and 0 where it is nowhere."""
    rows = [figures(score.tally, score.mpp) for score in scores]
    return {name: _mean(row[name] for row in rows) for name in figures(Tally(), None)}


def _mean(values: Iterable[float]) -> tuple[float, int]:
    defined = [value for value in values if not math.isnan(value)]
    return (math.fsum(defined) / len(defined), len(defined)) if defined else (math.nan, 0)


def class_figures(scores: Sequence[ImageScore]) -> dict[str, dict[str, float]]:
    """Figures of each class, by its name.

    ``dq``, ``sq``, ``pq`` and ``f1_type`` are of all images together; ``pq_mean`` is the mean over the ``n_images``
    whose truth holds the class (PanNuke); ``count_r2`` compares its counts over images (CoNIC).
    """
    result = {}
    for name in sorted({name for score in scores for name in score.classes}):
        tallies = [score.classes.get(name, ClassTally()) for score in scores]
        panoptic = sum((each.panoptic for each in tallies), Panoptic())
        counts = np.asarray([(each.n_truth, each.n_predicted) for each in tallies])
        pq_mean, n_images = _mean(each.panoptic.pq for each in tallies if each.n_truth)
        result[name] = {
            "n_truth": int(counts[:, 0].sum()),
            "n_predicted": int(counts[:, 1].sum()),
            "n_images": n_images,
            "dq": panoptic.dq,
            "sq": panoptic.sq,
            "pq": panoptic.pq,
            "pq_mean": pq_mean,
            "f1_type": sum((each.types for each in tallies), TypeCounts()).f1,
            "count_r2": float(count_r2(counts[:, :1], counts[:, 1:])[0]),
        }
    return result


def multi_class_figures(scores: Sequence[ImageScore]) -> dict[str, tuple[float, int]]:
    """Figures over classes, each with the number of images or classes that it is the mean of.

    ``mpq`` and ``bpq`` by the PanNuke protocol: for each image the mean PQ of the classes that its truth holds, or the
    PQ of all objects; then the mean over images. Images without true objects are left out, whatever was found there.
    ``mpq_plus`` and ``r2`` by the CoNIC protocol: mean over classes of the pooled PQ and of the R2 of counts; a class
    that is on neither side of any image is left out.
    """
    by_class = class_figures(scores).values()
    per_image = (_mean(each.panoptic.pq for each in score.classes.values() if each.n_truth)[0] for score in scores)
    return {
        "mpq": _mean(per_image),
        "bpq": _mean(score.tally.panoptic.pq for score in scores if score.tally.n_truth),
        "mpq_plus": _mean(each["pq"] for each in by_class),
        "r2": _mean(each["count_r2"] for each in by_class),
    }
