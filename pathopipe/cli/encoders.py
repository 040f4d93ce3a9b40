"""``pathopipe encoders``: what can embed tiles, and what to know of each."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathopipe.cli.encoder_check import check
from pathopipe.cli.options import Json
from pathopipe.cli.progress import format_table

if TYPE_CHECKING:
    from pathopipe.embeddings.recipe import EncoderSpec, Output

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The encoders that turn tiles into embeddings.")

Catalog = Annotated[Path | None, typer.Option("--catalog", metavar="FILE", help="YAML file with rows of your own.")]

_HEADER = ("name", "numbers", "tile", "params M", "licence", "commercial", "gated", "loader")
_ABOUT_OUTPUT: "dict[Output, str]" = {
    "pooled": "what the network returns by itself",
    "cls": "the class token",
    "mean": "the mean of the patch tokens",
    "cls-mean": "the class token, then the mean of the patch tokens",
    "tokens": "all patch tokens, row by row",
}
_GATES = {"yes": "accept the terms first", "no": "open", "unclear": "unclear; terms may have to be accepted"}


app.command("check")(check)


@app.callback()
def _encoders() -> None:
    pass


@app.command("list")
def list_encoders(
    commercial: Annotated[
        bool, typer.Option("--commercial", help="Only those whose licence allows commercial use, as we read it.")
    ] = False,
    is_open: Annotated[bool, typer.Option("--open", help="Only those without a gate before the download.")] = False,
    max_params_m: Annotated[
        float | None, typer.Option("--max-params-m", metavar="N", help="Only those of at most N million parameters.")
    ] = None,
    license_text: Annotated[
        str | None, typer.Option("--license", metavar="TEXT", help="Only those with this text in the licence.")
    ] = None,
    catalog_path: Catalog = None,
    as_json: Json = False,
) -> None:
    """List the encoders by name.

    \b
    Examples:
      pathopipe encoders list
      pathopipe encoders list --commercial --open
      pathopipe encoders list --license apache --max-params-m 100
      pathopipe encoders list --catalog mine.yaml --json
    """
    from pathopipe.embeddings.catalog import TIMM_PREFIX, catalog

    specs = list(catalog(catalog_path).values())
    if commercial:
        specs = [spec for spec in specs if spec.commercial == "yes"]
    if is_open:
        specs = [spec for spec in specs if spec.gated == "no"]
    if license_text is not None:
        specs = [spec for spec in specs if license_text.lower() in spec.license.lower()]
    if max_params_m is not None:
        unknown = [spec.name for spec in specs if math.isinf(_params_m(spec))]
        specs = [spec for spec in specs if _params_m(spec) <= max_params_m]
        if unknown:
            print(f"left out, as their size is not known: {', '.join(unknown)}", file=sys.stderr)
    if as_json:
        print(json.dumps([_as_document(spec) for spec in specs], indent=2))
        return
    if not specs:
        print("no encoder fits; leave out a filter", file=sys.stderr)
        return
    print(format_table(_HEADER, [_line(spec) for spec in specs]))
    print(f"\n{TIMM_PREFIX}ARCHITECTURE is any architecture of timm, with weights of your own or random ones.")


def _params_m(spec: "EncoderSpec") -> float:
    if spec.loader == "handcrafted":
        return 0.0
    return math.inf if spec.params_m is None else spec.params_m


def _line(spec: "EncoderSpec") -> tuple[str, ...]:
    return (
        spec.name,
        str(spec.features),
        f"{spec.tile_px} @ {spec.mpp:g}",
        "-" if spec.params_m is None else f"{spec.params_m:.1f}",
        spec.license or "not stated",
        spec.commercial,
        spec.gated,
        spec.loader,
    )


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name of the list, or NAME.OUTPUT.")],
    catalog_path: Catalog = None,
    as_json: Json = False,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print its row, to begin a row of your own with.")] = False,
) -> None:
    """Show an encoder: its recipe, its licence, what to beware of, and how to get the weights.

    \b
    Examples:
      pathopipe encoders show virchow2
      pathopipe encoders show virchow2.cls
      pathopipe encoders show uni --yaml > mine.yaml
    """
    from pathopipe.embeddings.catalog import find_encoder
    from pathopipe.errors import UsageError

    if as_json and as_yaml:
        raise UsageError("--json and --yaml: give one of them")
    spec = find_encoder(name, catalog_path)
    if as_json:
        print(json.dumps(_as_document(spec), indent=2))
    elif as_yaml:
        print(_as_yaml(spec), end="")
    else:
        print(_in_words(spec))


def _as_document(spec: "EncoderSpec") -> dict[str, Any]:
    return {**spec.model_dump(mode="json"), "features": spec.features}


def _as_yaml(spec: "EncoderSpec") -> str:
    import yaml

    from pathopipe.errors import UsageError

    if spec.transform is None:
        raise UsageError(f"--yaml: '{spec.name}' is no row; begin with that of another encoder of timm, such as uni")
    row = spec.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
    # What decides the numbers is written out, default or not.
    row |= spec.model_dump(mode="json", include={"transform", "tile_px", "mpp", "prefix_tokens"})
    ordered = {key: row[key] for key in type(spec).model_fields if key in row}
    # Names of the catalogue are taken, hence another one.
    name = f"my-{spec.name.removesuffix(f'.{spec.output}')}"
    return yaml.safe_dump({name: ordered}, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)


def _in_words(spec: "EncoderSpec") -> str:
    title = f"{spec.name}: {spec.title or spec.summary}"
    facts = {
        "what": spec.summary if spec.title else "",
        "paper": spec.paper,
        "network": _describe_network(spec),
        "tiles": f"{spec.tile_px} px at {spec.mpp:g} um/px",
        "transform": _describe_transform(spec),
        "output": f"{spec.output}: {_numbers(spec.features)}, {_ABOUT_OUTPUT[spec.output]}",
        "others": _describe_other_outputs(spec),
        "precision": f"{spec.precision} on a GPU, in its authors' code" if spec.transform and spec.params_m else "",
        "stored as": spec.dtype,
        "licence": f"{spec.license or 'not stated'}; commercial use: {spec.commercial}",
        "download": _GATES[spec.gated] if spec.weights.hub else "",
        "beware": spec.notes,
    }
    lines = [title, *_columns({key: fact for key, fact in facts.items() if fact})]
    if spec.loader == "handcrafted":
        return "\n".join([*lines, "", "No weights are needed."])
    return "\n".join([*lines, "", "How to get the weights", *(f"  {line}" for line in _ways(spec))])


def _columns(facts: Mapping[str, str]) -> list[str]:
    """Lines of a name and what is to be said, broken at 110 columns."""
    import textwrap

    width = max(map(len, facts)) + 2
    return [
        line
        for key, fact in facts.items()
        for line in textwrap.wrap(
            fact,
            110,
            initial_indent=f"  {key.ljust(width)}",
            subsequent_indent=" " * (width + 2),
            break_on_hyphens=False,
            break_long_words=False,
        )
    ]


def _numbers(n: int) -> str:
    return f"{n:,} numbers" if n else "as many numbers as the network gives"


def _describe_network(spec: "EncoderSpec") -> str:
    if spec.loader == "handcrafted":
        return ""
    size = f"{spec.params_m:g} M parameters" if spec.params_m is not None else "size not known"
    by = {
        "timm": "by timm",
        "transformers": "by transformers",
        "open_clip": "by open_clip",
        "torch": "by pathopipe",
        "custom": f"by its authors' package {spec.package}" if spec.package else "by its authors' code, not built here",
        "keras": "in TensorFlow, not built here",
    }[spec.loader]
    code = ", from code in its hub repository" if spec.remote_code else ""
    tokens = f", {spec.tokens} tokens" if spec.tokens is not None else ""
    before = f" ({spec.prefix_tokens} before the patches)" if spec.tokens is not None and spec.prefix_tokens else ""
    return f"{spec.architecture or spec.title} {by}{code}, {size}{tokens}{before}"


def _describe_transform(spec: "EncoderSpec") -> str:
    if spec.loader == "handcrafted":
        return ""
    recipe = spec.transform
    if recipe is None:
        return "timm's own recipe for the architecture"
    how = {
        "none": "not resized",
        "short": f"shorter side resized to {recipe.resize_px} px ({recipe.filter}, antialias)",
        "exact": f"resized to {recipe.resize_px} x {recipe.resize_px} px ({recipe.filter}, antialias)",
    }[recipe.resize]
    cut = f", then {recipe.crop_px} px cut from the middle" if recipe.crop_px is not None else ""
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (recipe.mean, recipe.std))
    return f"{how}{cut}; mean {mean}, std {std}"


def _describe_other_outputs(spec: "EncoderSpec") -> str:
    base = spec.name.removesuffix(f".{spec.output}")
    return ", ".join(
        f"{base}.{output} ({_numbers(numbers)})" for output, numbers in spec.outputs.items() if output != spec.output
    )


def _ways(spec: "EncoderSpec") -> list[str]:
    from pathopipe.embeddings.weights import weights_help

    if spec.loader == "keras" or (spec.loader == "custom" and not spec.package):
        return [spec.access, "it can't run here: encode tiles with its authors' code, then `pathopipe import features`"]
    if spec.transform is None:
        return ["a file that you have: --set embed.weights=FILE; without, weights are random"]
    lines = [spec.access] if spec.access and spec.weights.hub else []
    if spec.loader in ("transformers", "open_clip"):
        lines.append("first: pip install 'pathopipe[hub]'")
    ways = weights_help(spec).splitlines()
    if spec.remote_code:
        hub, base = spec.weights.hub, spec.name.removesuffix(f".{spec.output}")
        lines.append(f"read the code in https://huggingface.co/{hub}; to allow it: --set embed.trust_remote_code=true")
        ways[1:] = (
            "2. a copy of that repository: --set embed.weights=FOLDER",
            f"3. a mirror folder: --set embed.weights_dir=DIR with such a copy as {base} or {hub} in it",
        )
    return lines + ways
