"""``pathopipe demo``: everything there is, on a drawn slide."""

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["demo"]

_WIDTH_PX, _HEIGHT_PX, _MPP, _SEED = 8000, 6000, 0.5, 3


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the slide and the results.")] = Path("demo"),
) -> None:
    """Draw a slide and run everything on it; no download, under five minutes on a laptop.

    \b
    Example:
      pathopipe demo --out demo
    """
    from pathopipe.cli.run import run_and_tell
    from pathopipe.cli.segment import segment_and_tell
    from pathopipe.cluster import check_writable, usable_cores
    from pathopipe.config import load_config
    from pathopipe.pipeline import RunPlan, outline_path, thumbnail_path
    from pathopipe.pipeline.segment import objects_picture_path
    from pathopipe.records import SlideRef
    from pathopipe.store import store_path
    from pathopipe.synth import SynthSpec, write_slide

    check_writable(out)
    slide = out / "drawn.tiff"
    if not slide.exists():
        print(f"drawing a slide of {_WIDTH_PX} x {_HEIGHT_PX} px ...", file=sys.stderr)
        spec = SynthSpec(width_px=_WIDTH_PX, height_px=_HEIGHT_PX, mpp=_MPP, seed=_SEED)
        write_slide(slide, spec, truth=out / "drawn-truth.geojson")
    ref = SlideRef("drawn", slide)
    plan = RunPlan(
        out=out,
        config=load_config(None, ["segment.tasks=nuclei,cells,glands,lumina,tissue_types"]),
        threads=usable_cores(),
    )
    outcomes = run_and_tell([ref], plan, workers=1)
    if outcomes[0].status == "failed":
        raise typer.Exit(1)
    segment_and_tell(ref, plan, fresh=False, geojson=True)
    print("look at")
    print(f"  {thumbnail_path(out, 'drawn')}   the slide with its tissue outline and tiles")
    print(f"  {outline_path(out, 'drawn')}   the outline: drag it onto the slide in QuPath")
    print(f"  {objects_picture_path(out, 'drawn')}   six fields with the nuclei and cells that were found")
    print(f"  {out / 'drawn-truth.geojson'}   what was drawn: nuclei, glands, lumina")
    print(f"  {store_path(out, 'drawn')}   embeddings and objects: zarr.open_group('{store_path(out, 'drawn')}')")
    print(f"next: pathopipe run YOUR_SLIDE.svs --out results; pathopipe verify {out}")
