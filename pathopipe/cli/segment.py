"""``pathopipe segment``: the objects of slides, and the files that QuPath opens."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pathopipe.cli.options import ConfigFile, Device, Mpp, OutPlace, Settings, SlideId, SlidePlaces, read_config
from pathopipe.cli.progress import format_table

if TYPE_CHECKING:
    from pathopipe.cluster import Attempt
    from pathopipe.pipeline import RunPlan
    from pathopipe.pipeline.segment import Finder, SegmentOutcome
    from pathopipe.records import SlideRef

__all__ = ["segment", "segment_and_tell"]

_LONGEST_TABLE = 60


def segment(
    slides: SlidePlaces,
    out: OutPlace,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="A,B",
            help="Layers to find: nuclei, glands, lumina, tissue_types, cells. Default: all but cells that the model "
            "finds.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="What finds them: network, or classical (nuclei only).  [default: network]"),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", metavar="FILE", help="Weights of a network of your own.")
    ] = None,
    device: Device = None,
    slide_id: SlideId = None,
    mpp: Mpp = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget these layers and find them anew.")] = False,
    geojson: Annotated[
        bool, typer.Option("--geojson/--no-geojson", help="Write the layers for QuPath, too. Default: yes.")
    ] = True,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads to keep busy.  [default: all usable cores]")
    ] = None,
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Find the objects of slides, or go on where that was stopped: outlines, measurements, files for QuPath.

    \b
    Examples:
      pathopipe segment slide.svs --out results
      pathopipe segment slides/ --out results
      pathopipe segment slide.svs --out results --tasks nuclei,cells --model classical
      pathopipe segment cohort.csv --out results --weights mine.safetensors --device cuda
      pathopipe segment slide.svs --out results --tasks cells --set segment.cell_expansion_um=3 --fresh
      pathopipe segment crop.tif --out results --mpp 0.25 --set tissue.min_region_mm2=0

    Objects go to OUT/slides/<slide_id>.zarr, layer by layer; drag OUT/geojson/<slide_id>.nuclei.geojson onto the
    slide in QuPath. Other forms: pathopipe export. Pictures to judge them by: OUT/thumbnails. docs/segmentation.md
    Several slides are done one after the other; one that fails does not stop the rest.
    Exit code: 0 all done, 1 some slide failed, 2 wrong use, 130 interrupted.
    """
    from pathopipe.cli.run import gather
    from pathopipe.cli.stages import slide_ref
    from pathopipe.cluster import check_writable, keep_freed_memory, usable_cores
    from pathopipe.pipeline import RunPlan

    overrides = list(settings or ())
    if tasks is not None:
        overrides.append(f"segment.tasks={tasks}")
    if model is not None:
        overrides.append(f"segment.model={model}")
    if weights is not None:
        overrides.append(f"segment.weights={weights}")
    if device is not None:
        overrides.append(f"segment.device={device.value}")
    settled = read_config(config, overrides, mpp=mpp)
    if slide_id is not None and len(slides) > 1:
        raise typer.BadParameter("--slide-id names one slide; slides of a manifest have their ids there")
    refs = [slide_ref(slides[0], slide_id)] if slide_id is not None else gather(slides, allow_missing=False)
    check_writable(out)
    keep_freed_memory()
    plan = RunPlan(out=out, config=settled, threads=threads or usable_cores())
    if len(refs) == 1:
        segment_and_tell(refs[0], plan, fresh=fresh, geojson=geojson)
    elif not _segment_each(refs, plan, fresh=fresh, geojson=geojson):
        raise typer.Exit(1)


def segment_and_tell(ref: "SlideRef", plan: "RunPlan", *, fresh: bool, geojson: bool) -> None:
    """Segment one slide with progress on stderr; print what was found and where it is."""
    from pathopipe.pipeline.segment import fields_picture_path, objects_picture_path

    outcome = _segment(ref, plan, None, fresh=fresh)  # opening the model is part of its time
    for line in _describe(outcome):
        print(line)
    for picture in (objects_picture_path(plan.out, ref.slide_id), fields_picture_path(plan.out, ref.slide_id)):
        if picture.exists():
            print(f"picture: {picture}")
    for table in outcome.tables:
        print(f"tissue types of tiles: {table}")
    if geojson:
        started = time.perf_counter()
        for path in _write_geojson(plan, outcome):
            print(f"for QuPath: {path}")
        print(f"written in {time.perf_counter() - started:.1f} s")


def _segment_each(refs: "Sequence[SlideRef]", plan: "RunPlan", *, fresh: bool, geojson: bool) -> bool:
    """Segment slide after slide with one model, tell of each on stderr and of all at the end; True if all is done."""
    from pathopipe.cluster import attempt_each
    from pathopipe.pipeline.segment import open_finder

    finder = open_finder(plan)

    def work(ref: "SlideRef") -> "SegmentOutcome":
        outcome = _segment(ref, plan, finder, fresh=fresh)
        if geojson:
            _write_geojson(plan, outcome)
        return outcome

    attempts: list[Attempt[SegmentOutcome]] = []
    notes: dict[str, None] = {}
    for attempt in attempt_each(refs, plan.out, work, on_note=_tell):
        attempts.append(attempt)
        told = f"{attempt.ref.slide_id}: FAILED after {attempt.seconds:.1f} s: {attempt.reason}"
        if attempt.result is not None:
            first, *_ = _describe(attempt.result)
            told = " · ".join([first, *(f"note: {problem}" for problem in attempt.result.problems)])
            notes.update(dict.fromkeys(attempt.result.notes))
        _tell(f"[{len(attempts)}/{len(refs)}] {told}")
    _print_table(attempts)
    for note in notes:
        print(f"note: {note}")
    failed = [attempt.reason for attempt in attempts if attempt.result is None]
    print(f"{len(refs) - len(failed)} of {len(refs)} slides done; results in {plan.out}")
    for reason in failed:
        print(f"failed: {reason}")
    return not failed


def _segment(ref: "SlideRef", plan: "RunPlan", finder: "Finder | None", *, fresh: bool) -> "SegmentOutcome":
    from pathopipe.cli.progress import WindowProgress
    from pathopipe.pipeline.segment import segment_slide

    with WindowProgress(ref.slide_id) as progress:
        return segment_slide(ref, plan, finder=finder, fresh=fresh, on_windows=progress.on_windows)


def _write_geojson(plan: "RunPlan", outcome: "SegmentOutcome") -> list[Path]:
    from pathopipe.export.objects import export_layers
    from pathopipe.store import SlideStore, store_path

    store = SlideStore.open(store_path(plan.out, outcome.slide_id))
    return list(export_layers(store, plan.out / "geojson", layers=tuple(outcome.objects)))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print_table(attempts: "Sequence[Attempt[SegmentOutcome]]") -> None:
    layers = list(dict.fromkeys(layer for attempt in attempts if attempt.result for layer in attempt.result.objects))
    rows = []
    for attempt in attempts:
        outcome = attempt.result
        if outcome is None:
            rows.append((attempt.ref.slide_id, "failed", *[""] * (len(layers) + 1), f"{attempt.seconds:.1f}", ""))
        elif len(attempts) <= _LONGEST_TABLE:
            counts = [str(outcome.objects.get(layer, "")) for layer in layers]
            area, seconds = f"{outcome.tissue_mm2:.2f}", f"{attempt.seconds:.1f}"
            rows.append((outcome.slide_id, "done", area, *counts, seconds, " ".join(outcome.flags)))
    if rows:
        print(format_table(("slide", "status", "tissue mm2", *layers, "seconds", "flags"), rows))


def _describe(outcome: "SegmentOutcome") -> list[str]:
    found = ", ".join(f"{number} {layer}" for layer, number in outcome.objects.items())
    how = f"done in {outcome.seconds:.1f} s" if outcome.did else "was done already"
    per_mm2 = ""
    if outcome.tissue_mm2 and "nuclei" in outcome.objects:
        per_mm2 = f" ({outcome.objects['nuclei'] / outcome.tissue_mm2:.0f} nuclei/mm2)"
    lines = [f"{outcome.slide_id}: {how}: {found} in {outcome.tissue_mm2:.2f} mm2 of tissue{per_mm2}"]
    if outcome.report.windows:
        spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in outcome.report.seconds().items())
        lines.append(f"{outcome.report.windows} windows in {outcome.report.regions} regions: {spent}")
    if outcome.bad_windows:
        lines.append(f"{outcome.bad_windows} windows could not be read: nothing was looked for there")
    if outcome.flags:
        lines.append("flags: " + ", ".join(outcome.flags))
    lines += [f"note: {what}" for what in (*outcome.problems, *outcome.notes)]
    return lines
