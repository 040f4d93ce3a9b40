"""``pathopipe encoders``: what can embed tiles."""

import json
from dataclasses import asdict

import typer

from pathopipe.cli.options import Json
from pathopipe.cli.progress import format_table

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The encoders that turn tiles into embeddings.")


@app.callback()
def _encoders() -> None:
    pass


@app.command("list")
def list_encoders(as_json: Json = False) -> None:
    """List the encoders by name.

    \b
    Examples:
      pathopipe encoders list
      pathopipe encoders list --json
    """
    from pathopipe.embeddings.catalog import CATALOG, TIMM_PREFIX, find_encoder

    specs = [*CATALOG.values(), find_encoder(f"{TIMM_PREFIX}ARCHITECTURE")]
    if as_json:
        print(json.dumps([asdict(spec) for spec in specs], indent=2))
        return
    print(format_table(("name", "licence", "what"), [(spec.name, spec.license, spec.summary) for spec in specs]))
