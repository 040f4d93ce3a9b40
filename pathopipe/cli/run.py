"""``pathopipe run``: slides, folders or a manifest through all stages."""

import sys
import unicodedata
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pathopipe.cli.options import ConfigFile, Device, EncoderNames, Out, Settings, read_config
from pathopipe.cli.progress import RunProgress, format_table

if TYPE_CHECKING:
    from pathopipe.pipeline import RunPlan, SlideOutcome
    from pathopipe.records import SlideRef

__all__ = ["run", "run_and_tell"]

_MANIFEST_SUFFIXES = {".csv", ".tsv", ".txt"}
_LONGEST_TABLE = 60


class FreshStage(StrEnum):
    """Stages that can be forgotten."""

    TISSUE = "tissue"
    TILES = "tiles"
    EMBED = "embed"


def run(
    slides: Annotated[
        list[Path], typer.Argument(metavar="SLIDE|FOLDER|MANIFEST.csv", help="Slides, folders of slides, manifests.")
    ],
    out: Out,
    encoder: EncoderNames = None,
    device: Device = None,
    config: ConfigFile = None,
    settings: Settings = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the work.")] = 1,
    fresh: Annotated[
        FreshStage | None, typer.Option(help="Forget this stage and what depends on it, and compute it anew.")
    ] = None,
    retry_bad: Annotated[bool, typer.Option("--retry-bad", help="Compute chunks with bad tiles again.")] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Record missing slide files as failed instead of stopping.")
    ] = False,
) -> None:
    """Find tissue, cut tiles and embed them, for one slide or thousands; run again to go on where it stopped.

    \b
    Examples:
      pathopipe run slide.svs --out results
      pathopipe run slides/ --out results --workers 4
      pathopipe run cohort.csv --out results --encoder uni2-h,virchow2 --device cuda
      pathopipe run slide.tif --out results --set slide.mpp=0.25 --set tiles.side_px=512
      pathopipe run slides/ --out results --fresh tiles --set tiles.min_tissue=0.5

    Tiles are cut as each encoder's authors did ("pathopipe encoders show NAME"), unless tiles.side_px or tiles.mpp say
    otherwise; encoders that want the same tiles share what is read.
    A manifest is a CSV with the columns slide_id and path, and if wanted mpp, patient_id and labels.
    Exit code: 0 all done, 1 some slide failed, 2 wrong use, 130 interrupted.
    """
    from pathopipe.cluster import usable_cores
    from pathopipe.pipeline import RunPlan, check_plan

    settled = read_config(config, settings, encoder=encoder, device=device)
    refs = gather(slides, allow_missing=allow_missing)
    plan = RunPlan(
        out=out,
        config=settled,
        fresh=fresh.value if fresh else None,
        retry_bad=retry_bad,
        threads=max(1, usable_cores() // workers),
    )
    for warning in check_plan(refs, plan):
        print(f"note: {warning}", file=sys.stderr)
    outcomes = run_and_tell(refs, plan, workers)
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(1)


def run_and_tell(refs: Sequence["SlideRef"], plan: "RunPlan", workers: int) -> list["SlideOutcome"]:
    """Run slides with progress on stderr; print and keep the summary."""
    from pathopipe.cluster import run_cohort
    from pathopipe.report.summary import update_summary

    outcomes: list[SlideOutcome] = []

    def ended(outcome: "SlideOutcome") -> None:
        outcomes.append(outcome)
        progress.on_slide(outcome)

    try:
        with RunProgress(len(refs)) as progress:
            run_cohort(refs, plan, workers=workers, on_slide=ended, on_tiles=progress.on_tiles)
    finally:
        # What was refused has changed nothing, so what is known of the slide stays.
        rows = [_summary_row(outcome) for outcome in outcomes if not outcome.refused]
        if rows:
            update_summary(plan.out / "summary.csv", rows)
    _print_summary(outcomes, plan.out)
    return outcomes


def gather(paths: Sequence[Path], *, allow_missing: bool) -> list["SlideRef"]:
    """The slides that the arguments name, checked before any work starts.

    Raises:
        UsageError: Something is missing, unsafe or there twice.
    """
    from pathopipe.cohort import check_refs, read_manifest
    from pathopipe.errors import UsageError
    from pathopipe.records import SlideRef
    from pathopipe.slide.find import find_slides

    refs: list[SlideRef] = []
    for path in paths:
        if path.suffix.lower() in _MANIFEST_SUFFIXES:
            refs += read_manifest(path, allow_missing=allow_missing)
        elif path.is_dir():
            found = find_slides(path)
            if not found:
                raise UsageError(f"{path}: no slide in this folder; give a slide file, or a manifest that names them")
            refs += found
        elif path.exists() or allow_missing:
            refs.append(SlideRef(unicodedata.normalize("NFC", path.stem), path))
        else:
            raise UsageError(f"{path}: no such file; check the path, or use --allow-missing to record it as failed")
    check_refs(refs, where=", ".join(map(str, paths)))
    return refs


def _summary_row(outcome: "SlideOutcome") -> dict[str, object]:
    return {
        "slide_id": outcome.slide_id,
        "status": outcome.status,
        "reason": outcome.reason,
        "tissue_mm2": outcome.tissue_mm2,
        "tiles": outcome.tiles,
        "bad_tiles": outcome.bad_tiles,
        "mpp": outcome.mpp,
        "flags": " ".join(outcome.flags),
        "seconds": f"{outcome.seconds:.1f}",
    }


def _print_summary(outcomes: Sequence["SlideOutcome"], out: Path) -> None:
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    shown = outcomes if len(outcomes) <= _LONGEST_TABLE else failed
    if shown:
        header = ("slide", "status", "tissue mm2", "tiles", "bad", "um/px", "seconds", "flags")
        rows = [
            (
                outcome.slide_id,
                outcome.status,
                f"{outcome.tissue_mm2:.2f}",
                str(outcome.tiles),
                str(outcome.bad_tiles),
                outcome.mpp,
                f"{outcome.seconds:.1f}",
                " ".join(outcome.flags),
            )
            for outcome in shown
        ]
        print(format_table(header, rows))
    tiles = sum(outcome.tiles for outcome in outcomes)
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} slides done, {tiles} tiles; results in {out}")
    for outcome in failed:
        print(f"failed: {outcome.reason}")
