"""Settings of the data sets that a segmentation network learns from: one record a kind, strict, each key documented."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from pathopipe.registry import nearest

__all__ = [
    "OBJECT_TASKS",
    "TASKS",
    "DatasetSettings",
    "DrawnDataset",
    "GeoJsonDataset",
    "HoverNetDataset",
    "LabelImageDataset",
    "LabelledDataset",
    "MonusegDataset",
    "PannukeDataset",
    "TileDataset",
]

OBJECT_TASKS: Final = ("nuclei", "glands", "lumina")
"""Tasks whose labels are objects."""
TASKS: Final = (*OBJECT_TASKS, "tissue_types")

ObjectTask = Literal["nuclei", "glands", "lumina"]
Mpp = Annotated[float, Field(ge=0.05, le=50)]
Zoom = Annotated[float, Field(ge=0.1, le=10)]
ClassOf = Mapping[str, str | None]
"""A class of the network by the name or number that a data set uses; null where its objects count but not their
class."""


class _Dataset(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True, allow_inf_nan=False
    )

    name: str = Field(min_length=1)
    """Name in logs and in the model card; each data set has another."""
    share: float = Field(default=1.0, gt=0)
    """Weight of the data set when samples are drawn; only the ratio to the others counts."""
    zoom: tuple[Zoom, Zoom] = (0.7, 1.4)
    """Least and most enlargement of its crops: wide where the resolution is a guess."""
    holdout: float | None = Field(default=None, ge=0, le=1)
    """Share of the sources that are kept back for validation, 1 keeps all of them back; that of the training when left
    out."""
    classes: Mapping[ObjectTask, ClassOf] = Field(default={})
    """By task: the network's class of each class of the data set. Classes that bear the name of one of the network's
    need no entry."""
    types: Mapping[str, tuple[str, ...]] = Field(default={})
    """The network's tissue types by the data set's labels of whole images: several where an image may hold any of
    them, none where nothing is known. ``*`` stands for all other labels."""

    @field_validator("zoom")
    @classmethod
    def _least_comes_first(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"the least enlargement comes first, got {list(value)}")
        return value

    @field_validator("types", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            key: () if one is None else (one,) if isinstance(one, str | int | float) else one
            for key, one in value.items()
        }


class LabelledDataset(_Dataset):
    """What all data sets share that were labelled by people."""

    mpp: Mpp | Mapping[str, Mapping[str, Mpp]]
    """Micrometres per pixel of the images; or one column of the table with the resolution of each of its values:
    ``{group: {small: 0.5, large: 0.25}}``."""
    table: Path | None = None
    """CSV table with one row an image. Without it, images have the columns ``name`` and ``folder``."""
    name_column: str | None = None
    """Column that names the images, with or without a file's ending; the first when left out."""
    source_column: str | None = None
    """Column with the slide, patient or mosaic that an image is from: the unit of splitting."""
    source_pattern: str | None = None
    """Instead: a regular expression whose first group, searched in the name, is the source. Without either, each image
    is a source of its own."""
    label_column: str | None = None
    """Column with the label of the whole image, for ``types``."""
    only: Mapping[str, tuple[str, ...]] = Field(default={})
    """Take images only with these values of a column."""
    skip: Mapping[str, tuple[str, ...]] = Field(default={})
    """Leave images out with these values of a column."""
    empty: tuple[ObjectTask, ...] = ()
    """Objects of which the images are known to hold none: all of it is background. Tasks that are neither here nor
    labelled count as unknown."""

    @field_validator("only", "skip", mode="before")
    @classmethod
    def _single_values(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: (one,) if isinstance(one, str | int | float) else one for key, one in value.items()}

    @field_validator("source_pattern")
    @classmethod
    def _has_a_group(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                groups = re.compile(value).groups
            except re.error as error:
                raise ValueError(f"{value!r} is no regular expression ({error})") from None
            if not groups:
                raise ValueError(f"{value!r} has no group; put round brackets round what names the source")
        return value

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if isinstance(self.mpp, Mapping) and len(self.mpp) != 1:
            raise ValueError("mpp is a number, or one column with the resolution of each of its values")
        if self.source_column is not None and self.source_pattern is not None:
            raise ValueError("give either source_column or source_pattern")
        if self.label_column is not None and not self.types:
            raise ValueError("label_column needs types: which tissue types each label stands for")
        if self.name_column is not None and self.table is None:
            raise ValueError("name_column needs table")
        return self


class LabelImageDataset(LabelledDataset):
    """Pictures and label images: PNG, TIFF or BMP of 8 or 16 bits, or ``.npy``; files belong together by name."""

    kind: Literal["label-images"]
    images: Path
    """Folder of pictures."""
    labels: Mapping[ObjectTask, Path] = Field(min_length=1)
    """Folder of label images for each task."""
    suffixes: Mapping[ObjectTask, str] = Field(default={})
    """What the stems of a task's label images end in beyond the picture's, ``_anno`` for example."""
    components: bool = False
    """The label images are masks: their connected regions are the objects."""
    merged: tuple[ObjectTask, ...] = ()
    """Tasks whose labels are masks in which touching objects run into one: borders between objects are not learnt."""

    @model_validator(mode="after")
    def _tasks_are_labelled(self) -> Self:
        for key in ("suffixes", "merged"):
            for task in getattr(self, key):
                if task not in self.labels:
                    raise ValueError(f"{key} names {task}, but labels has no folder for it")
        for task in self.empty:
            if task in self.labels:
                raise ValueError(f"{task} has labels, so it can't be in empty")
        return self


class GeoJsonDataset(LabelledDataset):
    """Pictures and the objects that were drawn on them in QuPath, exported as GeoJSON; files belong together by name.

    ``classes`` says of which task the objects of a class are, and an entry ``""`` takes those without a class. All of a
    picture counts as labelled for the tasks in ``classes``, or the areas of ``region_class`` where that is set.
    """

    kind: Literal["geojson"]
    images: Path
    """Folder of pictures."""
    labels: Path
    """Folder of ``.geojson`` files, gzipped or not."""
    region_class: str | None = None
    """Class of the areas that were labelled; the rest of a picture is not known."""
    pass_over: tuple[str, ...] = ()
    """Classes whose objects are left out."""

    @model_validator(mode="after")
    def _tasks_are_named(self) -> Self:
        if not self.classes:
            raise ValueError("say in classes which objects are nuclei, glands or lumina: {nuclei: {Tumor: null}}")
        seen: dict[str, str] = {}
        for task, class_of in self.classes.items():
            for name in class_of:
                if seen.setdefault(name, task) != task:
                    raise ValueError(f"class '{name}' is of {seen[name]} and of {task}; keep one of them")
        return self


class HoverNetDataset(LabelledDataset):
    """Pictures and ``.mat`` files of nuclei: ``inst_map``, with ``inst_type``, ``type_map`` or ``class`` and ``id``.

    CoNSeP, Kumar and Lizard come so. Source: Graham et al. 2019, doi:10.1016/j.media.2019.101563.
    """

    kind: Literal["hovernet-mat"]
    images: Path
    """Folder of pictures."""
    labels: Path
    """Folder of ``.mat`` files."""


class PannukeDataset(LabelledDataset):
    """Three ``.npy`` files as PanNuke comes. Source: Gamper et al. 2020, arXiv:2003.10778.

    The column ``tissue`` holds the organ, which is the source where no other is named: patients are not known.
    """

    kind: Literal["pannuke"]
    images: Path
    """(N, H, W, 3) colours from 0 to 255."""
    masks: Path
    """(N, H, W, 6): numbered nuclei, one channel a class, the last one background."""
    tissues: Path | None = None
    """(N,) names of organs."""


class MonusegDataset(LabelledDataset):
    """Pictures and XML files of Aperio ImageScope with one region a nucleus, as MoNuSeg and MoNuSAC come.

    Source: Kumar et al. 2017, doi:10.1109/TMI.2017.2677499.
    """

    kind: Literal["monuseg-xml"]
    images: Path
    """Folder of pictures."""
    labels: Path
    """Folder of ``.xml`` files."""


class TileDataset(LabelledDataset):
    """Pictures with a label each: tissue types. Without a table, the folder that holds a picture is its label."""

    kind: Literal["tiles"]
    images: Path
    """Folder of pictures, in folders or not, or a ``.zip`` of them."""
    unlabelled: bool = False
    """Keep images of which nothing is known, too: a network that is taught by its own mean can learn on them."""

    @model_validator(mode="after")
    def _labels_are_somewhere(self) -> Self:
        if not self.types and not self.unlabelled:
            raise ValueError("say in types which tissue types the labels stand for, or set unlabelled")
        if self.types and self.table is not None and self.label_column is None and set(self.types) != {"*"}:
            raise ValueError("say in label_column which column of the table holds the labels")
        return self


class DrawnDataset(_Dataset):
    """Fields that are drawn, with known nuclei, glands, lumina and tissue types."""

    kind: Literal["drawn"]
    fields: int = Field(default=500, ge=2)
    """How many are drawn."""
    side_px: int = Field(default=256, ge=64, le=4096)
    """Side of a field in pixels."""
    mpp: tuple[Mpp, ...] = Field(default=(0.5,), min_length=1)
    """Micrometres per pixel, one or several that take turns."""
    seed: int = Field(default=0, ge=0)
    """Another seed draws other fields."""

    @field_validator("types")
    @classmethod
    def _one_class_each(cls, value: Mapping[str, tuple[str, ...]]) -> Mapping[str, tuple[str, ...]]:
        for name, several in value.items():
            if len(several) > 1:
                raise ValueError(f"a drawn pixel is of one class, but '{name}' has {len(several)}; keep one of them")
        return value

    @field_validator("mpp", mode="before")
    @classmethod
    def _one_or_several_mpp(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | float) else value


_AnyDataset = (
    LabelImageDataset | GeoJsonDataset | HoverNetDataset | PannukeDataset | MonusegDataset | TileDataset | DrawnDataset
)
_KINDS: Final[Mapping[str, type[BaseModel]]] = {
    "label-images": LabelImageDataset,
    "geojson": GeoJsonDataset,
    "hovernet-mat": HoverNetDataset,
    "pannuke": PannukeDataset,
    "monuseg-xml": MonusegDataset,
    "tiles": TileDataset,
    "drawn": DrawnDataset,
}


def _check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Validate a data set; what is wrong is said in words, with the data set's name."""
    if isinstance(value, BaseModel):
        return handler(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"a data set is a mapping of keys, got {value!r}")
    where = f"data set {value['name']!r}" if value.get("name") else "a data set"
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        problem = "kind is missing" if kind is None else f"unknown kind {kind!r}"
        raise ValueError(f"{where}: {problem}; {nearest(str(kind), _KINDS)}")
    try:
        return handler(value)
    except ValidationError as error:
        said = [each for each in error.errors() if not _is_of_other_branch(each)] or error.errors()
        raise ValueError(f"{where}: " + "; ".join(_explain(each, _KINDS[kind]) for each in said)) from None


def _is_of_other_branch(error: Any) -> bool:
    """A number is no mapping and a mapping no number: the complaint of the other branch of ``mpp`` helps nobody."""
    return "mpp" in error["loc"] and (
        error["type"] == "dict_type" or error["type"] == "mapping_type" or isinstance(error["input"], Mapping)
    )


def _explain(error: Any, model: type[BaseModel]) -> str:
    location: Sequence[str] = [str(part) for part in error["loc"]]
    location = [part for part in location if part not in _KINDS]
    # The branches of a union are no keys.
    keys = [part for part in location if part != "[key]" and not re.match(r"(float|dict|constrained)", part)]
    name = ".".join(keys)
    if error["type"] == "extra_forbidden":
        return f"unknown key '{name}'; {nearest(name, model.model_fields)}"
    if error["type"] == "missing":
        mend = ": how many micrometres a pixel is wide" if name == "mpp" else ""
        return f"{name} is missing; give it{mend}"
    if error["type"] == "value_error":
        return f"{name}: {error['ctx']['error']}" if name else str(error["ctx"]["error"])
    if error["type"] == "literal_error" and "[key]" in location:
        return f"{name}: unknown task; {nearest(str(error['input']), OBJECT_TASKS)}"
    return f"{name}: {error['msg'].lower()}, got {error['input']!r}"


DatasetSettings = Annotated[Annotated[_AnyDataset, Field(discriminator="kind")], WrapValidator(_check)]
"""One data set, told apart by ``kind``; for fields of settings and for ``TypeAdapter``."""
