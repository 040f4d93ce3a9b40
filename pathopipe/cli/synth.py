"""``pathopipe synth``: draws a slide with known truth."""

import re
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["synth"]


def synth(
    file: Annotated[Path, typer.Argument(metavar="FILE.tiff", help="Where the slide goes.")],
    size: Annotated[str, typer.Option(metavar="WIDTHxHEIGHT", help="Size in pixels.")] = "8000x6000",
    mpp: Annotated[float, typer.Option(help="Micrometres per pixel.")] = 0.25,
    seed: Annotated[int, typer.Option(help="Another seed draws another slide.")] = 0,
    truth: Annotated[Path | None, typer.Option(help="Write what was drawn as GeoJSON.")] = None,
    stain_strength: Annotated[float, typer.Option(help="1 is an ordinary stain, 0.3 a pale one.")] = 1.0,
    pen: Annotated[bool, typer.Option(help="Draw marker strokes.")] = True,
    dust: Annotated[bool, typer.Option(help="Draw dust on the glass.")] = True,
    border: Annotated[bool, typer.Option(help="Draw a black scan border.")] = False,
    dark_field: Annotated[bool, typer.Option(help="Draw fluorescence on black instead of H&E.")] = False,
) -> None:
    """Draw an H&E slide with known nuclei, glands, lumina and tissue, of any size, as a pyramidal TIFF.

    \b
    Examples:
      pathopipe synth drawn.tiff --size 20000x15000 --seed 7 --truth drawn.geojson
      pathopipe synth pale.tiff --stain-strength 0.3 --no-pen
    """
    from pathopipe.errors import UsageError
    from pathopipe.synth import SynthSpec, write_slide

    matched = re.fullmatch(r"(\d+)\s*[xX×]\s*(\d+)", size.strip())
    if matched is None:
        raise UsageError(f"--size {size}: write it as WIDTHxHEIGHT in pixels, for example 8000x6000")
    if file.suffix.lower() not in {".tif", ".tiff"}:
        raise UsageError(f"{file}: a drawn slide is a TIFF; give a name that ends in .tiff")
    width_px, height_px = int(matched[1]), int(matched[2])
    spec = SynthSpec(
        width_px=width_px,
        height_px=height_px,
        mpp=mpp,
        seed=seed,
        stain_strength=stain_strength,
        pen=pen,
        dust=dust,
        border=border,
        dark_field=dark_field,
    )
    started = time.perf_counter()
    write_slide(file, spec, truth=truth, progress=_say if sys.stderr.isatty() else None)
    seconds = time.perf_counter() - started
    speed = width_px * height_px / 1e6 / seconds
    print(f"{file}: {width_px} x {height_px} px at {mpp:g} um/px in {seconds:.1f} s ({speed:.0f} Mpx/s)")
    if truth is not None:
        print(f"truth: {truth}")


def _say(share: float) -> None:
    end = "\n" if share >= 1 else ""
    print(f"\rdrawing {share:4.0%}", file=sys.stderr, end=end, flush=True)
