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
    """Read every array, and the summary of a folder; exit code 0 only if all is complete and sound.

    \b
    Examples:
      pathopipe verify results
      pathopipe verify results/slides/slide.zarr --json
    """
    from pathopipe.errors import StoreError, UsageError
    from pathopipe.report.summary import read_failures
    from pathopipe.store import SlideStore

    stores = [where] if where.suffix == ".zarr" else sorted((where / "slides").glob("*.zarr"))
    if not stores or not stores[0].exists():  # a summary alone tells of failures only
        raise UsageError(f"{where}: no store here; give a .zarr store, or a folder that 'pathopipe run --out' filled")
    failed = {} if where.suffix == ".zarr" else read_failures(where / "summary.csv")
    found: dict[str, list[dict[str, str]]] = {}
    for slide_id, path in sorted({**dict.fromkeys(failed), **{path.stem: path for path in stores}}.items()):
        problems = [{"where": "run", "what": f"failed: {failed[slide_id]}"}] if slide_id in failed else []
        try:
            if path is not None:
                problems += [{"where": p.where, "what": p.what} for p in SlideStore.open(path).problems()]
        except StoreError as error:
            problems.append({"where": "store", "what": str(error)})
        found[slide_id] = problems
        if not as_json:
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            print(f"{slide_id}: {count if problems else 'sound'}")
            for problem in problems:
                print(f"  {problem['where']}: {problem['what']}")
    if as_json:
        print(json.dumps(found, indent=2))
    if any(found.values()):
        raise typer.Exit(1)
