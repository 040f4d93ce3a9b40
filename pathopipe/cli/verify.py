"""``pathopipe verify``: reads every array of the stores in a folder, or looks for private data there."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pathopipe.cli.options import Json, Location, parse_place
from pathopipe.errors import UsageError
from pathopipe.remote import RemotePath

__all__ = ["verify"]


def verify(
    where: Annotated[
        Location,
        typer.Argument(
            parser=parse_place, metavar="STORE|DIR|URL", help="A .zarr store, or the --out folder of a run."
        ),
    ],
    as_json: Json = False,
    phi: Annotated[
        bool,
        typer.Option("--phi", help="Look for names, dates, barcodes and other private data instead; in any folder."),
    ] = False,
) -> None:
    """Read every array, and the summary of a folder; exit code 0 only if all is complete and sound.

    With --phi: exit code 0 only if nothing private was found and everything could be looked into.

    \b
    Examples:
      pathopipe verify results
      pathopipe verify results/slides/slide.zarr --json
      pathopipe verify results --phi
    """
    if phi:
        if isinstance(where, RemotePath):
            raise UsageError(f"{where}: --phi looks into local folders; copy it to one first")
        _look_for_private_data(where, as_json)
        return
    from pathopipe.errors import StoreError
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


def _look_for_private_data(where: Path, as_json: bool) -> None:
    from dataclasses import asdict

    from pathopipe.privacy import KINDS, search

    result = search(where)
    private = [finding for finding in result.findings if finding.severity == "private"]
    if as_json:
        document = {
            "clean": result.is_clean,
            "files": result.files,
            "size_bytes": result.size_bytes,
            "seconds": round(result.seconds, 3),
            "findings": [asdict(finding) for finding in result.findings],
        }
        print(json.dumps(document, indent=2))
    else:
        for finding in result.findings:
            times = "" if finding.count == 1 else f" ({finding.count} times)"
            places = f" at {', '.join(finding.places)}" if finding.places else ""
            print(f"{finding.severity}: {finding.file}: {finding.kind} {', '.join(finding.excerpts)}{times}{places}")
        for kind in sorted({finding.kind for finding in private}):
            print(f"  {kind}: {KINDS[kind]}")
        counted = f"{result.files} files, {result.size_bytes / 1e6:.1f} MB in {result.seconds:.1f} s"
        print(f"{counted}: {f'{len(private)} private findings' if private else 'nothing private found'}")
    if private:
        raise typer.Exit(1)
