"""``pathopipe cohort``: what a workflow does once for all slides: the plan before, the count after."""

import json
import sys
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathopipe.cli.options import (
    ConfigFile,
    Device,
    EncoderNames,
    Json,
    Location,
    OutPlace,
    Settings,
    parse_place,
    read_config,
)
from pathopipe.remote import RemotePath

if TYPE_CHECKING:
    from pathopipe.cohort.plan import PlannedSlide
    from pathopipe.cohort.receipts import Receipt
    from pathopipe.config import Config
    from pathopipe.records import SlideRef

__all__ = ["app"]

_SHOWN = 20

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="A workflow's cohort: plan it, count what came of it."
)


class FailOn(StrEnum):
    """When failed slides make the exit code 1."""

    NEVER = "never"
    ANY = "any"
    ALL = "all"


@app.callback()
def _cohort() -> None:
    pass


@app.command("plan", short_help="Check a manifest and the settings; say what each slide needs.")
def plan(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST.csv", help="The slides: slide_id, path.")],
    out: OutPlace,
    encoder: EncoderNames = None,
    device: Device = None,
    config: ConfigFile = None,
    settings: Settings = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Record missing slide files as failed instead of stopping.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="Headers that are read at once.")] = 16,
) -> None:
    """Check a manifest and the settings before any work starts, read the header of every slide, and write OUT/plan.csv.

    \b
    Examples:
      pathopipe cohort plan cohort.csv --out results
      pathopipe cohort plan cohort.csv --out results --encoder virchow2 --device cuda

    The plan holds memory, minutes and GPUs that each stage of each slide is expected to need, for the scheduler.
    """
    from pathopipe.cluster import check_writable
    from pathopipe.cohort import read_manifest
    from pathopipe.cohort.plan import plan_path, write_plan
    from pathopipe.pipeline import RunPlan, check_plan

    settled = read_config(config, settings, encoder=encoder, device=device)
    refs = read_manifest(manifest, allow_missing=allow_missing)
    # The machine that plans need not have the GPU of those that work.
    here = settled.model_copy(update={"embed": settled.embed.model_copy(update={"device": "cpu"})})
    for note in check_plan(refs, RunPlan(out=out, config=here)):
        print(f"note: {note}", file=sys.stderr)
    check_writable(out)
    path = plan_path(out)
    slides = _plan_slides(refs, settled, threads)
    write_plan(path, slides)
    failed = [slide for slide in slides if slide.problem]
    for slide in failed[:_SHOWN]:
        print(f"can't be opened: {slide.slide_id}: {slide.problem}")
    size = sum(slide.size_bytes for slide in slides) / 1e9
    tiles = sum(slide.most_tiles for slide in slides)
    print(f"{len(slides)} slides, {size:.1f} GB, at most {tiles} tiles; {len(failed)} can't be opened; plan: {path}")


def _plan_slides(refs: "Iterable[SlideRef]", config: "Config", threads: int) -> "list[PlannedSlide]":
    from concurrent.futures import ThreadPoolExecutor

    from pathopipe.cohort.plan import PlannedSlide
    from pathopipe.errors import PathopipeError
    from pathopipe.pipeline.needs import most_tiles, needs_of
    from pathopipe.slide.open import open_slide
    from pathopipe.slide.resolution import require_mpp

    def plan_remote(slide_id: str, path: RemotePath) -> PlannedSlide:
        # Its header would cost a download of the whole slide; what is not known is taken for a small one.
        found, problem = None, "there is no such object"
        try:
            found = path.found(hasty=True)
        except (PathopipeError, OSError) as error:
            problem = " ".join(str(error).split())
        return PlannedSlide(
            slide_id=slide_id,
            size_bytes=found.size if found is not None else 0,
            dims_l0=(0, 0),
            most_tiles=0,
            problem="" if found is not None else f"{path}: {problem}",
            needs=needs_of(None, config),
        )

    def plan_slide(ref: "SlideRef") -> PlannedSlide:
        mpp, source = (ref.mpp, "manifest") if ref.mpp is not None else (config.slide.mpp, "config")
        if isinstance(ref.path, RemotePath):
            return plan_remote(ref.slide_id, ref.path)
        try:
            slide = open_slide(ref.path, slide_id=ref.slide_id, mpp=mpp, mpp_source=source)
            info = slide.info
            slide.close()
            require_mpp(info)
        except (PathopipeError, OSError) as error:
            return PlannedSlide(
                slide_id=ref.slide_id,
                size_bytes=0,
                dims_l0=(0, 0),
                most_tiles=0,
                problem=" ".join(str(error).split()),
                needs=needs_of(None, config),
            )
        return PlannedSlide(
            slide_id=ref.slide_id,
            size_bytes=info.size_bytes,
            dims_l0=info.dims_l0,
            most_tiles=most_tiles(info, config),
            needs=needs_of(info, config),
        )

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(plan_slide, refs))


@app.command("status", short_help="Count what became of the slides; name those that failed.")
def status(
    where: Annotated[
        Location, typer.Argument(parser=parse_place, metavar="DIR|URL", help="The --out folder of a workflow.")
    ],
    fail_on: Annotated[
        FailOn, typer.Option(help="Which failures make the exit code 1: any slide, or all.")
    ] = FailOn.ANY,
    forget_failed: Annotated[
        bool, typer.Option("--forget-failed", help="Remove the receipts of failed slides: the workflow tries again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read the receipts of a workflow, write DIR/summary.csv, and name the slides that failed with their reasons.

    \b
    Examples:
      pathopipe cohort status results
      pathopipe cohort status results --forget-failed     # then start the workflow again

    Exit code: 0, or 1 as --fail-on says.
    """
    from pathopipe.cohort.plan import plan_path, read_plan
    from pathopipe.cohort.receipts import read_receipts
    from pathopipe.errors import UsageError
    from pathopipe.report.summary import update_summary

    try:
        planned = read_plan(plan_path(where))
    except FileNotFoundError:
        planned = {}
    slides: dict[str, list[Receipt]] = {}
    stages: dict[str, dict[str, int]] = {}
    forgotten = 0
    for path, receipt in read_receipts(where):
        if planned and receipt.slide_id not in planned:
            continue  # the manifest no longer names it
        slides.setdefault(receipt.slide_id, []).append(receipt)
        counts = stages.setdefault(receipt.stage, {"ok": 0, "failed": 0, "passed-over": 0})
        counts[receipt.status] += 1
        if forget_failed and receipt.status != "ok":
            path.unlink()
            forgotten += 1
    if not slides:
        raise UsageError(f"{where}: no receipts here; give the output folder of a workflow")
    rows = [_summary_row(slide_id, receipts) for slide_id, receipts in slides.items()]
    update_summary(where / "summary.csv", rows)
    failed = [row for row in rows if row["status"] == "failed"]
    waiting = len(planned.keys() - slides.keys())
    if as_json:
        reasons = {str(row["slide_id"]): row["reason"] for row in failed}
        print(json.dumps({"slides": len(rows), "waiting": waiting, "failed": reasons, "stages": stages}, indent=2))
    else:
        for stage, counts in stages.items():
            print(f"{stage}: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count))
        for row in failed[:_SHOWN]:
            slide_id, reason = str(row["slide_id"]), str(row["reason"])
            print(f"failed: {reason if reason.startswith(slide_id) else f'{slide_id}: {reason}'}")
        if len(failed) > _SHOWN:
            print(f"and {len(failed) - _SHOWN} more, in {where / 'summary.csv'}")
        more = f", {waiting} not begun" if waiting else ""
        print(f"{len(rows) - len(failed)} of {len(rows)} slides without failure{more}; results in {where}")
    if forgotten:
        print(f"{forgotten} receipts removed; start the workflow again to try these slides once more")
        return
    if (failed and fail_on is FailOn.ANY) or (len(failed) == len(rows) and fail_on is FailOn.ALL):
        raise typer.Exit(1)


def _summary_row(slide_id: str, receipts: "Iterable[Receipt]") -> Mapping[str, object]:
    facts: dict[str, Any] = {}
    reasons = []
    seconds = 0.0
    for receipt in receipts:
        # Each stage knows what came before it; the largest numbers are the latest.
        facts |= {key: value for key, value in receipt.facts.items() if value or key not in facts}
        if receipt.status == "failed":
            reasons.append(receipt.reason)
        seconds += receipt.seconds
    return {
        "slide_id": slide_id,
        "status": "failed" if reasons else "done",
        "reason": "; ".join(dict.fromkeys(reasons)),
        "tissue_mm2": facts.get("tissue_mm2", 0.0),
        "tiles": max(facts.get("tiles", {}).values(), default=0),
        "bad_tiles": max(facts.get("bad_tiles", {}).values(), default=0),
        "mpp": facts.get("mpp", ""),
        "flags": " ".join(facts.get("flags", ())),
        "seconds": f"{seconds:.1f}",
    }
