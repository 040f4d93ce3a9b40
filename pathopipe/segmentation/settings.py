"""What a training of a segmentation network is told: the network, how it is trained, and its data sets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pathopipe.config import read_yaml
from pathopipe.errors import UsageError
from pathopipe.registry import nearest
from pathopipe.segmentation.datasets import DatasetSettings
from pathopipe.segmentation.network import ClassSpec, NetworkSpec, TaskSpec

__all__ = ["SegmenterSettings", "TrainSettings", "read_settings"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class TrainSettings(_Frozen):
    """How a network is trained."""

    steps: int = Field(default=3000, ge=1)
    """Batches that it learns from."""
    batch_size: int = Field(default=16, ge=1)
    crop_px: int = Field(default=256, ge=64, multiple_of=64)
    """Side of a crop at the network's resolution."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """The highest; it rises over ``warmup_steps`` and falls along a cosine."""
    weight_decay: float = Field(default=0.02, ge=0)
    warmup_steps: int = Field(default=150, ge=0)
    ema: float = Field(default=0.998, ge=0, lt=1)
    """The network that is kept is the running mean of the weights; this is how much of it stays at each step."""
    stain: float = Field(default=1.0, ge=0, le=3)
    """How far the stain of crops is varied."""
    holdout: float = Field(default=0.15, ge=0, lt=1)
    """Share of each data set's sources that is kept back to choose by; 0 keeps the last network."""
    validate_every: int = Field(default=500, ge=1)
    patience: int = Field(default=6, ge=1)
    """Validations without a better one after which training ends."""
    teach_from: int | None = Field(default=None, ge=1)
    """From this step on, the running mean tells nuclei where a data set does not: self-training."""
    teach_weight: float = Field(default=0.5, gt=0, le=2)
    tissue_steps: int = Field(default=0, ge=0)
    """Steps that follow for the head of tissue types alone, on images that tell it something; all else stays as it is.
    Each label then counts by the root of the number of its sources, whatever the shares. A few hundred are enough."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps that a kill can lose."""
    threads: int = Field(default=1, ge=1, le=64)
    """Threads that make crops."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """``auto`` is bf16 where the processor or GPU has it."""
    seed: int = Field(default=0, ge=0)
    backbone_weights: Path | None = None
    """State of the backbone to begin with, ``.safetensors`` or ``.pt``: that of a foundation model, for example."""
    freeze_backbone: bool = False
    """Leave the backbone as it is, and train decoders alone."""


class SegmenterSettings(_Frozen):
    """What a training configuration holds."""

    name: str = Field(pattern=r"^[a-z0-9._-]+$")
    """Of the model; it stands in stores and on the model card."""
    network: NetworkSpec
    train: TrainSettings = TrainSettings()
    datasets: tuple[DatasetSettings, ...] = Field(min_length=1)


def read_settings(path: Path, overrides: Sequence[str] = ()) -> SegmenterSettings:
    """Read a training configuration.

    Args:
        path: A YAML file.
        overrides: ``key.key=value``, as on a command line.

    Raises:
        UsageError: The file can't be read, a key is unknown, or a value is out of range.
    """
    said = read_yaml(path)
    if not isinstance(said, dict):
        raise UsageError(f"{path}: want name, network and datasets as a YAML mapping; see configs/segmenter.yaml")
    for override in overrides:
        keys, is_given, text = override.partition("=")
        if not is_given:
            raise UsageError(f"--set {override}: want KEY=VALUE, such as train.steps=500")
        place = said
        *above, last = keys.split(".")
        for key in above:
            inner = place.setdefault(key, {})
            if not isinstance(inner, dict):
                raise UsageError(f"--set {override}: '{key}' is no section")
            place = inner
        try:
            place[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {override}: no YAML value ({' '.join(str(error).split())})") from None
    try:
        return SegmenterSettings.model_validate(said)
    except ValidationError as error:
        said = [one["loc"] for one in error.errors()]
        # A list whose entries are wrong counts as too short as well.
        told = [
            one
            for one in error.errors()
            if one["type"] != "too_short"
            or not any(len(loc) > len(one["loc"]) and loc[: len(one["loc"])] == one["loc"] for loc in said)
        ]
        raise UsageError(f"{path}: " + "; ".join(_explain(one) for one in told)) from None


def _explain(error: Mapping[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    where = ".".join(location)
    if error["type"] == "extra_forbidden":
        sections: dict[str, type[BaseModel]] = {"network": NetworkSpec, "train": TrainSettings}
        section = sections.get(location[0], SegmenterSettings) if len(location) > 1 else SegmenterSettings
        deeper: dict[int, type[BaseModel]] = {
            4: TaskSpec,
            6: ClassSpec,
        }  # network.tasks.0.key and network.tasks.0.classes.0.key
        known = deeper.get(len(location), section).model_fields
        return f"unknown key '{where}'; {nearest(location[-1], known)}"
    if error["type"] == "missing":
        return f"{where} is missing; see configs/segmenter.yaml"
    if error["type"] == "value_error":
        # What a data set says of itself names it already.
        return str(error["ctx"]["error"]) if location[0] == "datasets" else f"{where}: {error['ctx']['error']}"
    return f"{where}: {error['msg'].lower()}, got {error['input']!r}"
