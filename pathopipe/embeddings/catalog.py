"""The encoders that are known by name: the rows of ``catalog.yaml``, and those of a user's own file."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import yaml
from pydantic import BaseModel, ValidationError

from pathopipe.embeddings.recipe import OUTPUTS, EncoderSpec, Transform, Weights
from pathopipe.errors import UsageError
from pathopipe.registry import nearest

__all__ = ["TIMM_PREFIX", "EncoderSpec", "catalog", "find_encoder"]

TIMM_PREFIX: Final = "timm."

_PARTS: Final[Mapping[str, type[BaseModel]]] = {"": EncoderSpec, "transform": Transform, "weights": Weights}
# Safe, and ten times faster where PyYAML was built with its C part.
_SAFE_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_TIMM_NAME: Final = re.compile(r"[a-z0-9._-]+")

# YAML 1.1 reads a number with an exponent but no point as text, which timm would stumble over much later.
_NUMBER_AS_TEXT: Final = re.compile(r"[-+]?\d+e[-+]?\d+", re.IGNORECASE)


def catalog(path: Path | None = None) -> Mapping[str, EncoderSpec]:
    """All encoders by name: the shipped ones in the order of lists, then those of a user's file.

    Args:
        path: YAML file with rows of a user's own, in the form of ``pathopipe encoders show NAME --yaml``.

    Raises:
        UsageError: The file can't be read; a row of it has a name that is taken, an unknown key or a wrong value.
    """
    shipped = _shipped()
    return shipped if path is None else MappingProxyType({**shipped, **_read_rows(path, taken=shipped)})


def find_encoder(name: str, catalog_path: Path | None = None) -> EncoderSpec:
    """The row of an encoder.

    ``name.output`` is the same encoder with another of its outputs, ``timm.<architecture>`` any architecture of timm:
    its transform is None and its one output says 0 numbers, as only the network can tell.

    Raises:
        UsageError: No such name, or no such output of that encoder; the nearest known ones are suggested.
    """
    rows = catalog(catalog_path)
    if name in rows:
        return rows[name]
    if name.startswith(TIMM_PREFIX) and len(name) > len(TIMM_PREFIX):
        return _any_of_timm(name)
    base, _, output = name.rpartition(".")
    if base in rows and not output.isdigit():
        spec = rows[base]
        for known in spec.outputs:
            if known == output:
                return spec.model_copy(update={"name": name, "output": known})
        offered = ", ".join(f"{base}.{known} ({numbers} numbers)" for known, numbers in spec.outputs.items())
        raise UsageError(f"encoder '{base}' has no output '{output}'; it offers {offered}")
    known_names = [*rows, f"{TIMM_PREFIX}ARCHITECTURE"]
    is_near = get_close_matches(name.lower(), known_names, cutoff=0.6)
    hint = nearest(name.lower(), known_names) if is_near else "`pathopipe encoders list` names them"
    raise UsageError(f"unknown encoder '{name}'; {hint}")


def _any_of_timm(name: str) -> EncoderSpec:
    if not _TIMM_NAME.fullmatch(name):
        raise UsageError(f"unknown encoder '{name}'; architectures of timm have small letters, digits, '.' and '_'")
    return EncoderSpec(
        name=name,
        loader="timm",
        architecture=name.removeprefix(TIMM_PREFIX),
        transform=None,
        outputs={"pooled": 0},
        output="pooled",
        license="that of the weights file",
        summary="any timm architecture with local weights, or random ones marked as such",
    )


@cache
def _shipped() -> Mapping[str, EncoderSpec]:
    text = files("pathopipe.embeddings").joinpath("catalog.yaml").read_text(encoding="utf-8")
    rows: dict[str, dict[str, Any]] = yaml.load(text, _SAFE_LOADER)  # noqa: S506
    return MappingProxyType({name: EncoderSpec.model_validate({"name": name, **row}) for name, row in rows.items()})


def _read_rows(path: Path, taken: Mapping[str, EncoderSpec]) -> dict[str, EncoderSpec]:
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8-sig"), _SAFE_LOADER)  # noqa: S506
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the file of encoders can't be read ({error})") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(loaded, dict) or not all(isinstance(row, dict) for row in loaded.values()):
        raise UsageError(
            f"{path}: a file of encoders holds a row of settings under each name; "
            "`pathopipe encoders show NAME --yaml` prints one to begin with"
        )
    rows = {}
    for name, row in loaded.items():
        where = f"{path}: encoder '{name}'"
        _check_name(str(name), where, taken)
        rows[str(name)] = _read_row(str(name), row, where)
    return rows


def _check_name(name: str, where: str, taken: Mapping[str, EncoderSpec]) -> None:
    if name in taken:
        raise UsageError(f"{where} is one of pathopipe's own and can't be changed; give yours another name")
    if name.startswith(TIMM_PREFIX):
        raise UsageError(f"{where}: names that begin with '{TIMM_PREFIX}' stand for architectures of timm; rename it")
    if name.rpartition(".")[2] in OUTPUTS:
        raise UsageError(f"{where}: what follows the last '.' is read as an output of another encoder; rename it")


def _read_row(name: str, row: Mapping[str, Any], where: str) -> EncoderSpec:
    # Unquoted, yes and no are truth values to YAML.
    answers = {key: "yes" if row[key] else "no" for key in ("commercial", "gated") if isinstance(row.get(key), bool)}
    try:
        spec = EncoderSpec.model_validate({"name": name, **row, **answers})
    except ValidationError as error:
        raise UsageError(f"{where}: " + "; ".join(_explain(e) for e in error.errors())) from None
    if spec.loader == "handcrafted":
        raise UsageError(f"{where}: loader handcrafted is no network; use timm, transformers, open_clip or torch")
    for number in _numbers_as_text(spec.arguments):
        raise UsageError(f"{where}: '{number}' in arguments is text to YAML; write it with a point, as in 1.0e-5")
    return spec


def _numbers_as_text(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [found for inner in value.values() for found in _numbers_as_text(inner)]
    if isinstance(value, list):
        return [found for inner in value for found in _numbers_as_text(inner)]
    return [value] if isinstance(value, str) and _NUMBER_AS_TEXT.fullmatch(value) else []


def _explain(error: Mapping[str, Any]) -> str:
    location = [str(part) for part in error["loc"] if part != "[key]"]
    dotted = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = _PARTS[".".join(location[:-1])].model_fields.keys() - {"name"}
        return f"unknown key '{dotted}'; {nearest(location[-1], known)}"
    if error["type"] == "missing":
        return f"'{dotted}' is missing"
    if error["type"] == "value_error":
        return ": ".join(filter(None, (dotted, str(error["ctx"]["error"]))))
    return f"{dotted}: {error['msg'].lower()}, got {error['input']!r}"
