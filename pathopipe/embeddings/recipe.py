"""What a row of the catalogue holds: how an encoder is built, which tiles it wants, what it returns, what it costs."""

import re
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["OUTPUTS", "EncoderSpec", "Loader", "Output", "Transform", "Weights"]

Loader = Literal["handcrafted", "timm", "transformers", "open_clip", "torch", "custom", "keras"]
"""Who builds the network. ``torch``: a network of our own, or one of timm whose checkpoint needs its keys
mended. ``custom``: the authors' own package or code. ``keras``: TensorFlow, listed only."""

Output = Literal["pooled", "cls", "mean", "cls-mean", "tokens"]
"""What is taken from a network: ``pooled`` what it returns by itself, ``cls`` the class token, ``mean`` the mean of the
patch tokens, ``cls-mean`` both one behind the other, ``tokens`` all patch tokens, row by row, as one long vector.
Register tokens are in none of them."""

OUTPUTS: Final[tuple[Output, ...]] = ("pooled", "cls", "mean", "cls-mean", "tokens")

_NAME = re.compile(r"[a-z0-9._-]+")


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Transform(_Row):
    """From a tile to the network's input. Pixels are resized as PIL does, with antialias."""

    resize: Literal["none", "short", "exact"] = "short"
    """``short``: the shorter side becomes ``resize_px``; ``exact``: both sides do; ``none``: left as it is."""
    resize_px: int | None = Field(default=224, ge=16)
    crop_px: int | None = Field(default=None, ge=16)
    """Side of the square cut from the middle; no cut where None."""
    filter: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Taken from pixels of 0 to 1, each channel its own."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divided by."""

    @model_validator(mode="before")
    @classmethod
    def _no_resize_has_no_size(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("resize") == "none":
            return {"resize_px": None, **given}
        return given

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if (self.resize == "none") != (self.resize_px is None):
            raise ValueError("resize_px goes with resize: short or exact, and with them only")
        if self.resize_px is not None and self.crop_px is not None and self.crop_px > self.resize_px:
            raise ValueError(f"crop_px {self.crop_px} can't be cut from {self.resize_px} px; correct one of them")
        if not all(0 <= mean <= 1 for mean in self.mean) or not all(std > 0 for std in self.std):
            raise ValueError("mean and std are of pixels from 0 to 1, and std is above 0; divide those of 0 to 255")
        return self


class Weights(_Row):
    """Where weights are, and how their keys become those of the network that is built."""

    hub: str = ""
    """``owner/name`` on the Hugging Face hub; empty where they are not there."""
    file: str = ""
    """File in that repository, or as the authors hand it out; empty where it is not known."""
    revision: str = ""
    """Commit or tag of the hub repository; its newest where empty."""
    entry: str = ""
    """Key of the checkpoint under which the tensors are."""
    keep: tuple[str, ...] = ()
    """Only keys that begin with one of these are taken; all where empty. Comes first."""
    drop: tuple[str, ...] = ()
    """Keys that begin with one of these are left out."""
    strip: tuple[str, ...] = ()
    """Beginnings that are taken off keys."""
    rename: dict[str, str] = {}
    """Regular expression and what takes its place, in this order, in keys."""
    convert: Literal["", "dinov2", "swin-downsample"] = ""
    """A conversion with arithmetic or shapes in it: of a DINOv2 checkpoint to timm, or of a Swin one of timm 0.5."""


class EncoderSpec(_Row):
    """One encoder: a row of the catalogue."""

    name: str
    """As users type it and stores keep it."""
    title: str = ""
    """As its authors write it."""
    paper: str = ""
    year: int | None = None
    loader: Loader
    architecture: str = ""
    """Name of the architecture at its loader: timm's, torchvision's, the class of transformers, open_clip's model."""
    arguments: dict[str, Any] = {}
    """What the loader is called with: arguments of timm, the configuration of transformers. Names of classes stand as
    text (``timm.layers.SwiGLUPacked``)."""
    package: str = ""
    """Module that must be installed where it is not one of ours: of the authors, or of an extra."""
    remote_code: bool = False
    """The hub repository holds code that has to run."""
    weights: Weights = Weights()
    transform: Transform | None = Transform()
    """None only for ``timm.<architecture>``: timm's own recipe for it holds."""
    tile_px: int = Field(default=256, ge=16, le=8192)
    """Side of the tiles the authors cut."""
    mpp: float = Field(default=0.5, ge=0.05, le=50)
    """Micrometres per pixel of those tiles."""
    outputs: dict[Output, int]
    """What can be taken from it, and how many numbers that is at the recipe's input size."""
    output: Output
    """What is taken."""
    prefix_tokens: int = Field(default=1, ge=0)
    """Tokens before the patches: the class token and the registers."""
    tokens: int | None = None
    """Tokens a tile, prefix and patches; None where it has none, or they are not known."""
    params_m: float | None = None
    """Millions of parameters of the network that is built; None where not known."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast that its authors use on a GPU."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of the stored numbers."""
    license: str = ""
    commercial: Literal["yes", "no", "unclear"] = "unclear"
    """Whether the licence allows commercial use, as we read it; no legal advice."""
    gated: Literal["yes", "no", "unclear"] = "no"
    """Whether an account and accepted terms come before the download."""
    access: str = ""
    """How to get the weights, where it takes more than the hub."""
    summary: str = ""
    """One line for lists."""
    notes: str = ""
    """What others got wrong, and what is not certain."""

    @field_validator("weights")
    @classmethod
    def _renames_are_expressions(cls, weights: Weights) -> Weights:
        for expression in weights.rename:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"rename '{expression}' is no regular expression ({error})") from None
        return weights

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name '{self.name}': use small letters, digits, '.', '_' and '-'")
        if self.transform is not None and min(self.outputs.values(), default=1) < 1:
            raise ValueError("outputs: say how many numbers each has, at least 1")
        if self.output not in self.outputs:
            raise ValueError(f"output '{self.output}' is not among outputs ({', '.join(self.outputs)})")
        return self

    @property
    def features(self) -> int:
        """Numbers a tile."""
        return self.outputs[self.output]

    @property
    def base_name(self) -> str:
        """Name of the row, without the output that a user chose: ``virchow2`` of ``virchow2.cls``."""
        base, _, output = self.name.rpartition(".")
        return base if base and output in OUTPUTS else self.name
