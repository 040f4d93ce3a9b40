"""``pathopipe info``: what a slide says of itself."""

import json
from dataclasses import asdict

from pathopipe.cli.options import Json, SlideFile
from pathopipe.cli.progress import format_table

__all__ = ["info"]


def info(slide: SlideFile, as_json: Json = False) -> None:
    """Show size, levels, resolution and its evidence, vendor and problems of a slide.

    \b
    Examples:
      pathopipe info slide.svs
      pathopipe info slide.svs --json
      pathopipe info s3://bucket/slide.svs      (downloads it to ~/.cache/pathopipe/slides)
    """
    from pathopipe.config import SlideConfig
    from pathopipe.errors import UsageError
    from pathopipe.slide.cache import local_slide
    from pathopipe.slide.open import open_slide

    if not slide.exists():
        raise UsageError(f"{slide}: no such file; check the path")
    with local_slide(slide, SlideConfig()) as file:
        opened = open_slide(file, slide_id=None if file == slide else slide.stem)
        found = opened.info
        opened.close()
    if as_json:
        print(json.dumps({**asdict(found), "path": str(found.path if file == slide else slide)}, indent=2))
        return
    width, height = found.dims_l0
    size = f"{width} x {height} px, {found.size_bytes / 1e6:.1f} MB"
    print(f"{found.slide_id}: {size}, {found.vendor}, read by {found.reader}")
    if found.mpp is not None:
        um = " x ".join(f"{mpp:g}" for mpp in dict.fromkeys(found.mpp))
        print(f"resolution: {um} um/px ({width * found.mpp[0] / 1e3:.2f} x {height * found.mpp[1] / 1e3:.2f} mm)")
    else:
        print("resolution: unknown; state it with the manifest column mpp or --set slide.mpp=")
    for evidence in found.mpp_evidence:
        note = f" ({evidence.note})" if evidence.note else ""
        used = "used  " if evidence.used else "unused"
        print(f"  {used} {evidence.source}: {evidence.mpp_x:g} x {evidence.mpp_y:g}{note}")
    if found.bounds_l0 is not None:
        print(f"scanned part: {tuple(found.bounds_l0)} (x, y, width, height in level-0 px)")
    rows = [
        (
            str(number),
            f"{level.width_px} x {level.height_px}",
            f"{level.downsample_x:g}",
            f"{level.block_width_px} x {level.block_height_px}" if level.block_width_px else "?",
        )
        for number, level in enumerate(found.levels)
    ]
    print(format_table(("level", "size px", "downsample", "block px"), rows))
    for problem in found.problems:
        print(f"problem: {problem}")
