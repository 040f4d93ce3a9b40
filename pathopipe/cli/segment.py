"""``pathopipe segment``: the objects of one slide, and the files that QuPath opens."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pathopipe.cli.options import ConfigFile, Device, Mpp, OutPlace, Settings, SlideFile, SlideId, read_config

if TYPE_CHECKING:
    from pathopipe.pipeline import RunPlan
    from pathopipe.pipeline.segment import SegmentOutcome
    from pathopipe.records import SlideRef

__all__ = ["segment", "segment_and_tell"]


def segment(
    slide: SlideFile,
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
    """Find the objects of one slide, or go on where it was stopped: outlines, measurements, files for QuPath.

    \b
    Examples:
      pathopipe segment slide.svs --out results
      pathopipe segment slide.svs --out results --tasks nuclei,cells --model classical
      pathopipe segment slide.svs --out results --weights mine.safetensors --device cuda
      pathopipe segment slide.svs --out results --tasks cells --set segment.cell_expansion_um=3 --fresh
      pathopipe segment crop.tif --out results --mpp 0.25 --set tissue.min_region_mm2=0

    Objects go to OUT/slides/<slide_id>.zarr, layer by layer; drag OUT/geojson/<slide_id>.nuclei.geojson onto the
    slide in QuPath. Other forms: pathopipe export. Pictures to judge them by: OUT/thumbnails. docs/segmentation.md
    """
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
    ref = slide_ref(slide, slide_id)
    check_writable(out)
    keep_freed_memory()
    segment_and_tell(
        ref, RunPlan(out=out, config=settled, threads=threads or usable_cores()), fresh=fresh, geojson=geojson
    )


def segment_and_tell(ref: "SlideRef", plan: "RunPlan", *, fresh: bool, geojson: bool) -> None:
    """Segment one slide with progress on stderr; print what was found and where it is."""
    from pathopipe.cli.progress import WindowProgress
    from pathopipe.export.objects import export_layers
    from pathopipe.pipeline.segment import fields_picture_path, objects_picture_path, segment_slide
    from pathopipe.store import SlideStore, store_path

    with WindowProgress(ref.slide_id) as progress:
        outcome = segment_slide(ref, plan, fresh=fresh, on_windows=progress.on_windows)
    for line in _describe(outcome):
        print(line)
    for picture in (objects_picture_path(plan.out, ref.slide_id), fields_picture_path(plan.out, ref.slide_id)):
        if picture.exists():
            print(f"picture: {picture}")
    for table in outcome.tables:
        print(f"tissue types of tiles: {table}")
    if geojson:
        started = time.perf_counter()
        store = SlideStore.open(store_path(plan.out, ref.slide_id))
        for path in export_layers(store, plan.out / "geojson", layers=tuple(outcome.objects)):
            print(f"for QuPath: {path}")
        print(f"written in {time.perf_counter() - started:.1f} s")


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
