"""Settings of every stage: frozen, documented, strict; an unknown key names the nearest known one."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pathopipe.errors import UsageError
from pathopipe.registry import nearest

__all__ = [
    "DEFAULT_SEGMENT_MODEL",
    "Config",
    "EmbedConfig",
    "SegmentConfig",
    "SlideConfig",
    "TilesConfig",
    "TilesSection",
    "TissueConfig",
    "load_config",
    "read_section",
    "read_yaml",
    "settle_section",
]


_Settings = TypeVar("_Settings", bound=BaseModel)

DEFAULT_SEGMENT_MODEL: Final = "network"
"""What finds objects where nobody says."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SlideConfig(_Section):
    """How slides are opened."""

    mpp: float | None = Field(default=None, ge=0.05, le=50)
    """Micrometres per level-0 pixel for slides that do not state theirs; overrides the file, not the manifest."""
    cache_dir: Path | None = None
    """Folder for the copies of slides that are read from URLs; ``~/.cache/pathopipe/slides`` when left out."""
    cache_gb: float = Field(default=50, gt=0)
    """Most gigabytes (10^9 bytes) that these copies take up; those that were not used for longest go first."""


class TissueConfig(_Section):
    """How tissue is found."""

    mpp: float = Field(default=8.0, ge=1, le=64)
    """Resolution of the one coarse read, in micrometres per mask pixel. Coarser on slides above 320 mm2 (at 8 um), so
    that the read is never more than 5 megapixels."""
    mask: str | None = None
    """A mask to use instead of detection: GeoJSON or a label image; ``{slide_id}`` stands for the slide's id."""
    min_region_mm2: float = Field(default=0.01, ge=0)
    """Smaller pieces of tissue are dropped."""
    min_hole_mm2: float = Field(default=0.01, ge=0)
    """Smaller holes in tissue are filled."""
    little_mm2: float = Field(default=1.0, ge=0)
    """Slides with less tissue are flagged ``little-tissue``."""


def _check_overlap(overlap_px: int, side_px: int | None) -> None:
    if side_px is not None and overlap_px >= side_px:
        raise ValueError(f"overlap_px={overlap_px} must be less than side_px={side_px}")


class _TileOptions(_Section):
    overlap_px: int = Field(default=0, ge=0)
    """Pixels that neighbouring tiles share; must be less than ``side_px``."""
    min_tissue: float = Field(default=0.25, ge=0, le=1)
    """Least share of tissue in a tile that is kept; 0 keeps every tile of the grid, glass too."""
    edge: Literal["pad", "drop"] = "pad"
    """Tiles that reach beyond the slide: ``pad`` fills them up with white, ``drop`` leaves them out."""
    allow_enlarge: bool = False
    """Allow tiles finer than the slide was scanned; refused otherwise."""
    resample: Literal["auto", "area"] = "auto"
    """How tiles are made from pixels 2, 4 or 8 times finer: ``auto`` decodes JPEG blocks at reduced size where it can,
    which is quickest; ``area`` always decodes them whole and averages."""
    cellular_share: float | None = Field(default=None, gt=0, le=1)
    """Keep only this share of the tiles with tissue, those with most nuclei: 0.2 is the fifth that KimiaNet was trained
    on. All are kept when left out."""
    scales_um: tuple[Annotated[float, Field(ge=0.05, le=50)], ...] = ()
    """Further micrometres a pixel at which the place of every tile is cut as well: the same centre, the same side in
    pixels, hence more or less tissue around it, beyond the slide where need be. One that is ``mpp``
    itself is passed over."""

    @field_validator("scales_um")
    @classmethod
    def _scales_are_different(cls, scales_um: tuple[float, ...]) -> tuple[float, ...]:
        if len({f"{scale:g}" for scale in scales_um}) < len(scales_um):
            raise ValueError("each of scales_um may be given once")
        return scales_um


class TilesConfig(_TileOptions):
    """Which tiles are cut, for one encoder."""

    side_px: int = Field(default=256, ge=16, le=8192)
    """Side of a tile in pixels at ``mpp``; 256 px at 0.5 um/px is 128 um of tissue."""
    mpp: float = Field(default=0.5, ge=0.05, le=50)
    """Micrometres per tile pixel."""

    @model_validator(mode="after")
    def _overlap_is_less_than_a_tile(self) -> Self:
        _check_overlap(self.overlap_px, self.side_px)
        return self


class TilesSection(_TileOptions):
    """Which tiles are cut; size and resolution are those of each encoder's recipe where they are left out."""

    side_px: int | None = Field(default=None, ge=16, le=8192)
    """Side of a tile in pixels at ``mpp``; that of the encoder's recipe when left out (handcrafted: 256)."""
    mpp: float | None = Field(default=None, ge=0.05, le=50)
    """Micrometres per tile pixel; those of the encoder's recipe when left out (handcrafted: 0.5)."""

    @model_validator(mode="after")
    def _overlap_is_less_than_a_tile(self) -> Self:
        _check_overlap(self.overlap_px, self.side_px)
        return self

    def settled(self, *, side_px: int, mpp: float) -> TilesConfig:
        """The tiles of an encoder whose recipe says ``side_px`` at ``mpp``.

        Raises:
            UsageError: The overlap is no less than such a tile.
        """
        given = self.model_dump()
        given["side_px"] = side_px if self.side_px is None else self.side_px
        given["mpp"] = mpp if self.mpp is None else self.mpp
        try:
            return TilesConfig.model_validate(given)
        except ValidationError as error:
            raise UsageError("tiles: " + "; ".join(str(e["ctx"]["error"]) for e in error.errors())) from None


class EmbedConfig(_Section):
    """How tiles become embeddings."""

    encoder: tuple[str, ...] = Field(default=("handcrafted",), min_length=1)
    """Encoders to run, by the names of ``pathopipe encoders list``; or ``timm.<architecture>``."""
    weights: Path | dict[str, Path] | None = None
    """Weights file (.safetensors, or .pt read with weights_only); for several encoders a file by name. Without, a
    ``timm.`` encoder has random weights, the others look in ``weights_dir`` and on the hub."""
    weights_dir: Path | None = None
    """Folder with weights, for machines without internet: ``<name>.safetensors``, or ``<owner>/<name>/<file>`` as on
    the hub. Where it is set, nothing is downloaded."""
    catalog: Path | None = None
    """YAML file with encoders of your own, in the form of ``pathopipe encoders show NAME --yaml``."""
    trust_remote_code: bool = False
    """Run the code that some encoders keep in their hub repository; refused otherwise."""
    batch_size: int | None = Field(default=None, ge=1)
    """Tiles the model sees at once; chosen by device when left out."""
    chunk_rows: int | None = Field(default=None, ge=1)
    """Tiles a storage chunk: the unit of work that a kill can lose. 1024 on a GPU, 256 on a CPU when left out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where networks run."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of networks; ``bf16`` and ``fp16`` are autocast. ``auto`` is bf16 weights on a CPU that has bf16
    arithmetic (fp32 if they don't agree with it), fp32 on other CPUs, and on a GPU the autocast that the encoder's
    authors use (bf16 for ``timm.`` encoders where the GPU has it)."""
    engine: Literal["torch", "openvino"] = "torch"
    """What computes networks. ``openvino`` (an extra) compiles them for the CPU: convolutional ones gain."""
    read_threads: int | None = Field(default=None, ge=1, le=256)
    """Threads that read tiles; the number of usable cores when left out."""
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """A slide fails when more than this share of its tiles is unreadable or not finite."""
    seed: int = 0
    """Seed of random weights."""


class SegmentConfig(_Section):
    """How objects are found."""

    model: Literal["network", "classical"] = DEFAULT_SEGMENT_MODEL
    """``network``: nuclei, glands, lumina and tissue types by a trained network, for H&E. ``classical``: nuclei by
    stain, local threshold and parting of touching ones; no weights, and fluorescence too."""
    weights: Path | None = None
    """Weights of ``network``, written by ``pathopipe segmenter train``; those that are shipped when left out. To name
    some means ``model: network``."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the network runs."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the network: ``auto`` is bf16 where the CPU or GPU has it (autocast), else fp32 on a CPU and fp16
    on a GPU."""
    batch_size: int | None = Field(default=None, ge=1)
    """Windows that the network sees at once; chosen by device when left out."""
    tasks: tuple[str, ...] = ()
    """Layers to find: ``nuclei``, ``glands``, ``lumina``, ``tissue_types``, and ``cells`` grown from nuclei. All that
    the model finds when left out, without cells."""
    region_px: int = Field(default=2048, ge=256, le=1_000_000)
    """Side of the regions that are finished at once, in pixels of the model's resolution; it decides memory and what a
    kill can lose, never the objects. Rounded up to whole windows of the model."""
    cell_expansion_um: float = Field(default=5.0, gt=0, le=20)
    """How far a cell reaches beyond its nucleus, where no other cell is nearer."""
    allow_enlarge: bool = False
    """Look for objects on slides that were scanned coarser than the model wants; refused otherwise."""
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """A slide fails when more than this share of its windows can't be read."""

    @model_validator(mode="before")
    @classmethod
    def _weights_mean_network(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("weights") is None:
            return given
        if given.get("model", "network") != "network":
            raise ValueError("weights are those of the model 'network'; leave weights out, or set model=network")
        return {**given, "model": "network"}


class Config(_Section):
    """Every setting, one section a stage."""

    slide: SlideConfig = SlideConfig()
    tissue: TissueConfig = TissueConfig()
    tiles: TilesSection = TilesSection()
    embed: EmbedConfig = EmbedConfig()
    segment: SegmentConfig = SegmentConfig()


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then a YAML file, then ``section.key=value`` overrides.

    Raises:
        UsageError: The file can't be read, a key is unknown (the nearest is named), or a value is out of range.
    """
    settings: dict[str, Any] = _read_sections(path) if path is not None else {}
    for section in ("mil", "metadata", "cluster"):  # of those commands, which check them themselves
        settings.pop(section, None)
    for text in overrides:
        _apply_override(settings, text)
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        where = f"{path}: " if path is not None else ""
        raise UsageError(where + "; ".join(_explain(e) for e in error.errors())) from None


def read_section(path: Path | None, overrides: Sequence[str], section: str, *, example: str) -> dict[str, Any]:
    """One section of a YAML file, then ``section.key=value`` overrides; the other sections are left to their commands.

    Args:
        path: The file; none where None.
        overrides: As they were typed; ``section.key.part=value`` sets a part of a setting.
        section: Its name.
        example: An override for the message where one is written otherwise.

    Raises:
        UsageError: The file can't be read, or an override is of no such form.
    """
    found = read_yaml(path) if path is not None else {}
    settings = found.get(section) if isinstance(found, dict) else found
    if not isinstance(settings or {}, dict):
        raise UsageError(f"{path}: a config is a mapping of sections, and '{section}' one of settings")
    settings = dict(settings or {})
    for text in overrides:
        override = _split_override(text)
        if override is None or override[0] != section:
            raise UsageError(f"--set {text}: write it as {section}.key=value, for example --set {example}")
        name, *inner = override[1].split(".", 1)
        target = settings.setdefault(name, {}) if inner else settings
        if not isinstance(target, dict):
            raise UsageError(f"--set {text}: {section}.{name} has no parts")
        target[inner[0] if inner else name] = override[2]
    return settings


def settle_section(model: type[_Settings], settings: Mapping[str, Any], section: str, path: Path | None) -> _Settings:
    """The settings of one section, checked.

    Raises:
        UsageError: A key is unknown (the nearest is named), or a value is out of range.
    """
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        where = f"{path}: " if path is not None else ""
        said = []
        for one in error.errors():
            name = ".".join(str(part) for part in one["loc"])
            if one["type"] == "extra_forbidden":
                said.append(f"unknown config key '{section}.{name}'; {nearest(name, model.model_fields)}")
            else:
                said.append(f"{section}.{name}: {one['msg'].lower()}, got {one['input']!r}")
        raise UsageError(where + "; ".join(said)) from None


def read_yaml(path: Path) -> Any:
    """What is in a YAML file, read by the safe loader.

    Raises:
        UsageError: It can't be read, or is no YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: config can't be read ({error})") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None


def _read_sections(path: Path) -> dict[str, Any]:
    loaded = read_yaml(path)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"{path}: a config is a mapping of sections ({', '.join(Config.model_fields)})")
    for name, section in loaded.items():
        if section is None:
            loaded[name] = {}
    return loaded


def _split_override(text: str) -> tuple[str, str, Any] | None:
    """Section, key and value of ``section.key=value``; None where it is not written so."""
    key, equals, value = text.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and section and name):
        return None
    try:
        return section, name, yaml.safe_load(value)
    except yaml.YAMLError:
        return section, name, value


def _apply_override(settings: dict[str, Any], text: str) -> None:
    override = _split_override(text)
    if override is None:
        raise UsageError(f"--set {text}: write it as section.key=value, for example --set tiles.mpp=0.5")
    section, name, parsed = override
    target = settings.setdefault(section, {})
    if not isinstance(target, dict):
        raise UsageError(f"--set {text}: '{section}' is not a section")
    if name in ("encoder", "tasks", "scales_um") and isinstance(parsed, str | int | float):
        parsed = [part.strip() for part in str(parsed).split(",") if part.strip()]
    target[name] = parsed


def _explain(error: Mapping[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    dotted = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"unknown config key '{dotted}'; {nearest(location[-1], _known_keys(location[:-1]))}"
    if error["type"] == "value_error":
        return f"{dotted}: {error['ctx']['error']}"
    return f"{dotted}: {error['msg'].lower()}, got {error['input']!r}"


def _known_keys(location: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location:
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
