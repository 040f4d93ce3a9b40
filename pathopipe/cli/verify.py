"""``pathopipe verify``: reads every array of one store or of all stores in a folder."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pathopipe.cli.options import Json

__all__ = ["verify"]


def verify(
    where: Annotated[Path, typer.Argument(metavar="STORE|DIR", help="A .zarr store, or the --out folder of a run.")],
    as_json: Json = False,
) -> None:
    """Read every array; exit code 0 only if all is complete and sound.

    \b
    Examples:
      pathopipe verify results
      pathopipe verify results/slides/slide.zarr --json
    """
    from pathopipe.errors import StoreError, UsageError
    from pathopipe.store import SlideStore

    stores = [where] if where.suffix == ".zarr" else sorted((where / "slides").glob("*.zarr"))
    if not stores or not stores[0].exists():
        raise UsageError(f"{where}: no store here; give a .zarr store, or a folder that 'pathopipe run --out' filled")
    found: dict[str, list[dict[str, str]]] = {}
    for path in stores:
        try:
            problems = [{"where": p.where, "what": p.what} for p in SlideStore.open(path).problems()]
        except StoreError as error:
            problems = [{"where": "", "what": str(error)}]
        found[path.stem] = problems
        if not as_json:
            print(f"{path.stem}: {'sound' if not problems else f'{len(problems)} problems'}")
            for problem in problems:
                print(f"  {problem['where']}: {problem['what']}")
    if as_json:
        print(json.dumps(found, indent=2))
    if any(found.values()):
        raise typer.Exit(1)
