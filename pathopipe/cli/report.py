"""``pathopipe report``: an output folder as one HTML page."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pathopipe.cli.options import Json, Location, parse_place

__all__ = ["report"]

_SHOWN_REASONS = 10
_TOLD_EVERY = 500


def report(
    folder: Annotated[
        Location, typer.Argument(parser=parse_place, metavar="DIR|URL", help="The --out folder of 'pathopipe run'.")
    ],
    out: Annotated[
        Location | None,
        typer.Option("--out", parser=parse_place, metavar="FILE.html", help="The page.  [default: DIR/report.html]"),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", metavar="CSV", help="A manifest: slides that should be there, and labels."),
    ] = None,
    colour: Annotated[
        str | None,
        typer.Option("--colour", metavar="COLUMN", help="Column of --labels to colour by.  [default: site]"),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whose map is shown.  [default: the one most slides have]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make one HTML page that says what happened: counts, failures, outliers, plots, models, a card a slide.

    \b
    Examples:
      pathopipe report results
      pathopipe report results --labels cohort.csv --colour diagnosis --out cohort.html

    The page is one file that loads nothing and sends nothing; slides are sorted, filtered and searched in the browser.
    Slides are named by id; folders, file names and patient ids stay out. A store that is damaged, or being written, is
    named as such. Exit code: 0 when the page is there, whatever it says; 2 where there is nothing to report.
    """
    from pathopipe.cluster import usable_cores
    from pathopipe.errors import UsageError
    from pathopipe.report.cohort import read_colour, write_report

    if colour is not None and labels is None:
        raise UsageError("--colour names a column of --labels; give the manifest, too")
    if out is not None and out.is_dir():
        raise UsageError(f"--out {out}: a folder; name a file, such as {out / 'report.html'}")
    page = out or folder / "report.html"

    def told(done: int, total: int) -> None:
        if done % _TOLD_EVERY == 0 or (done == total > _TOLD_EVERY):
            print(f"read {done} of {total} slides", file=sys.stderr, flush=True)

    found = write_report(
        folder,
        page,
        labels=read_colour(labels, colour) if labels is not None else None,
        encoder=encoder,
        threads=min(4, usable_cores()),
        on_slide=told,
    )
    if as_json:
        document = {
            "page": str(page),
            "bytes": found.page_bytes,
            "slides": found.slides,
            "statuses": found.statuses,
            "failures": [{"status": status, "reason": reason, "slides": ids} for status, reason, ids in found.failures],
            "outliers": found.outliers,
            "notes": found.notes,
        }
        print(json.dumps(document, indent=2))
        return
    counted = ", ".join(f"{n} {status}" for status, n in found.statuses.items())
    print(f"{found.slides} slides: {counted}; {len(found.outliers)} outliers")
    for status, reason, ids in found.failures[:_SHOWN_REASONS]:
        named = ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
        print(f"  {status}: {reason} ({named})")
    if len(found.failures) > _SHOWN_REASONS:
        print(f"  ... and {len(found.failures) - _SHOWN_REASONS} more reasons, on the page")
    for note in found.notes:
        print(f"note: {note}")
    print(f"report: {page} ({found.page_bytes / 1e6:.1f} MB)")
