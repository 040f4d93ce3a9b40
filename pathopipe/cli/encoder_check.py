"""``pathopipe encoders check``: whether an encoder is what its row says, and gives the numbers it once gave."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pathopipe.cli.options import Json
from pathopipe.cli.progress import format_table

__all__ = ["check"]

_LONGEST_CELL = 70
_HOLDS = {True: "ok", False: "WRONG", None: ""}


def check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An encoder, by its name of `pathopipe encoders list`.")],
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help="Its weights.")] = None,
    weights_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Mirror folder to look for them in.")] = None,
    catalog: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file with encoders of your own.")] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch the weights from the hub where they are not on this machine.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that its hub repository may hold.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build an encoder and compare it with its row; with weights, load them and compare a vector with the kept one.

    \b
    Examples:
      pathopipe encoders check uni2-h
      pathopipe encoders check virchow2 --weights pytorch_model.bin
      pathopipe encoders check midnight-12k --download --json

    Without weights nothing is computed, so it takes neither memory nor time. With them the vector of a drawn tile
    (fp32, CPU) is kept on the first time, in $XDG_CACHE_HOME/pathopipe/encoders, and compared ever after.
    Exit code: 0 all holds, 1 something does not or can't be built here, 2 wrong use.
    """
    from pathopipe.config import EmbedConfig
    from pathopipe.embeddings.catalog import find_encoder
    from pathopipe.errors import UsageError

    spec = find_encoder(name, catalog)
    if spec.loader == "handcrafted":
        raise UsageError(f"'{name}' is computed by formulas, not by a network: there is nothing to check")

    from pathopipe.embeddings.check import check_recipe, check_weights
    from pathopipe.embeddings.weights import find_weights

    config = EmbedConfig(weights=weights, weights_dir=weights_dir, trust_remote_code=trust_remote_code)
    named = weights is not None or weights_dir is not None or download
    # Code that comes with the weights can't be built without them.
    needs_weights = spec.remote_code and trust_remote_code and named
    checks = [] if needs_weights else check_recipe(spec)
    notes = ["the weights were not looked at: no file was named, and --download was not given"]
    if any(one.what == "network" for one in checks):
        notes = ["the weights were not looked at, as there is no network to put them in"]
    elif named or find_weights(spec, weights=None, weights_dir=None) is not None:
        more, notes = check_weights(spec, config, _vectors_folder(), download=download)
        checks += more
    holds = all(one.holds is not False for one in checks)
    if as_json:
        document = {"name": spec.name, "holds": holds, "checks": [asdict(one) for one in checks], "notes": notes}
        print(json.dumps(document, indent=2))
    else:
        rows = [(one.what, one.expected, _in_table(one.found), _HOLDS[one.holds]) for one in checks]
        print(format_table((spec.name, "expected", "found", ""), rows))
        for one in checks:
            if _in_table(one.found) != one.found:
                print(f"{one.what}: {one.found.replace('--set embed.trust_remote_code=true', '--trust-remote-code')}")
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    if not holds:
        raise typer.Exit(1)


def _in_table(found: str) -> str:
    return found if len(found) <= _LONGEST_CELL else "see below"


def _vectors_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or ""
    # The standard says that a relative path there counts for nothing.
    return (Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache") / "pathopipe" / "encoders"
