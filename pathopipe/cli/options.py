"""Options that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pathopipe.config import Config

__all__ = [
    "ConfigFile",
    "Device",
    "EncoderNames",
    "Json",
    "Mpp",
    "Out",
    "Settings",
    "SlideFile",
    "SlideId",
    "read_config",
]


class DeviceName(StrEnum):
    """Where networks run."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


Out = Annotated[Path, typer.Option("--out", help="Folder for the results; made where it is missing.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file with settings.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="STAGE.KEY=VALUE", help="One setting; may be given several times.")
]
EncoderNames = Annotated[str | None, typer.Option("--encoder", metavar="A,B", help="Encoders, separated by commas.")]
Device = Annotated[
    DeviceName | None, typer.Option("--device", help="Where networks run; auto is a GPU where there is one.")
]
SlideFile = Annotated[Path, typer.Argument(metavar="SLIDE", help="A slide file, or a folder with one DICOM series.")]
SlideId = Annotated[str | None, typer.Option("--slide-id", help="Name of the slide; the file's stem when left out.")]
Mpp = Annotated[float | None, typer.Option("--mpp", help="Micrometres per level-0 pixel, overriding the file's.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def read_config(
    config: Path | None,
    settings: list[str] | None,
    *,
    encoder: str | None = None,
    mpp: float | None = None,
    device: DeviceName | None = None,
) -> "Config":
    """The settings of a command: defaults, the file, then what the command line says."""
    from pathopipe.config import load_config

    overrides = list(settings or ())
    if encoder is not None:
        overrides.append(f"embed.encoder={encoder}")
    if mpp is not None:
        overrides.append(f"slide.mpp={mpp}")
    if device is not None:
        overrides.append(f"embed.device={device.value}")
    return load_config(config, overrides)
