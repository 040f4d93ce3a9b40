"""Options that several commands share."""

import functools
import re
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NewType

import typer

from pathopipe.errors import UsageError
from pathopipe.remote import RemotePath, location

if TYPE_CHECKING:
    from pathopipe.config import Config

__all__ = [
    "ConfigFile",
    "Device",
    "EncoderNames",
    "Json",
    "Location",
    "Mpp",
    "Out",
    "OutPlace",
    "Settings",
    "SlideFile",
    "SlideId",
    "SlidePlaces",
    "parse_place",
    "read_config",
    "refuse_urls",
]

_URL_START = re.compile(r"[a-z][a-z0-9+.-]+:/")

Location = NewType("Location", Path)
"""A path that may be a URL, of an option with ``parser=parse_place``: of a Path, Typer would make a local one."""


def parse_place(text: str) -> Path:
    """A path or a URL as it was typed."""
    try:
        return location(text)
    except UsageError as error:
        raise typer.BadParameter(str(error)) from None


class DeviceName(StrEnum):
    """Where networks run."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


Out = Annotated[Path, typer.Option("--out", help="Folder for the results; made where it is missing.")]
OutPlace = Annotated[
    Location,
    typer.Option(
        "--out",
        parser=parse_place,
        metavar="DIR|URL",
        help="Folder for the results, made where it is missing; or s3://BUCKET/FOLDER, gs://, az://.",
    ),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file with settings.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="STAGE.KEY=VALUE", help="One setting; may be given several times.")
]
EncoderNames = Annotated[str | None, typer.Option("--encoder", metavar="A,B", help="Encoders, separated by commas.")]
Device = Annotated[
    DeviceName | None, typer.Option("--device", help="Where networks run; auto is a GPU where there is one.")
]
SlideFile = Annotated[
    Location,
    typer.Argument(
        parser=parse_place, metavar="SLIDE", help="A slide file, its URL, or a folder with one DICOM series."
    ),
]
SlidePlaces = Annotated[
    list[Location],
    typer.Argument(
        parser=parse_place,
        metavar="SLIDE|FOLDER|MANIFEST.csv",
        help="Slides, folders of slides, manifests; slides may be URLs.",
    ),
]
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


def refuse_urls(app: typer.Typer) -> None:
    """Make all commands of a program refuse URLs where an option or argument is no :data:`Location`."""
    for command in app.registered_commands:
        if command.callback is not None:
            command.callback = _with_local_paths(command.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            refuse_urls(group.typer_instance)


def _with_local_paths(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def checked(**arguments: Any) -> Any:
        for name, value in arguments.items():
            for path in value if isinstance(value, list | tuple) else (value,):
                # What was typed as s3://bucket/x would become a folder called "s3:".
                if isinstance(path, Path) and not isinstance(path, RemotePath) and _URL_START.match(str(path)):
                    raise UsageError(
                        f"{name.replace('_', '-')} {path.parts[0]}//{'/'.join(path.parts[1:])}: a local path is wanted "
                        "here, no URL; docs/object_storage.md says which commands take URLs"
                    )
        return command(**arguments)

    return checked
