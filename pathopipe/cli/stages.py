"""``pathopipe tissue``, ``tiles`` and ``embed``: one stage of one slide."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pathopipe.cli.options import (
    ConfigFile,
    Device,
    EncoderNames,
    Mpp,
    OutPlace,
    Settings,
    SlideFile,
    SlideId,
    read_config,
)
from pathopipe.cli.progress import describe_outcome
from pathopipe.cli.receipts import recorded

if TYPE_CHECKING:
    from pathopipe.config import Config
    from pathopipe.pipeline import SlideOutcome, Stage
    from pathopipe.records import SlideRef

__all__ = ["embed", "slide_ref", "tiles", "tissue"]

_Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads to keep busy.  [default: all usable cores]")
]


@recorded
def tissue(
    slide: SlideFile,
    out: OutPlace,
    slide_id: SlideId = None,
    mpp: Mpp = None,
    threads: _Threads = None,
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Find the tissue of one slide: mask, outline as GeoJSON, picture, flags.

    \b
    Examples:
      pathopipe tissue slide.svs --out results
      pathopipe tissue slide.svs --out results --set tissue.mask=outlines/slide.geojson
    """
    settled = read_config(config, settings, mpp=mpp)
    outcome = _run_stages(("tissue",), slide, slide_id, out, settled, threads)
    flags = ", ".join(outcome.flags) or "none"
    print(f"{outcome.slide_id}: tissue {_how(outcome)}: {outcome.tissue_mm2:.2f} mm2; flags: {flags}")
    print(f"outline: {out / 'geojson' / f'{outcome.slide_id}.tissue.geojson'}")
    print(f"picture: {out / 'thumbnails' / f'{outcome.slide_id}.png'}")


@recorded
def tiles(
    slide: SlideFile,
    out: OutPlace,
    slide_id: SlideId = None,
    mpp: Mpp = None,
    encoder: EncoderNames = None,
    threads: _Threads = None,
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Lay the tile grid over the tissue of one slide; the tissue stage comes first.

    \b
    Examples:
      pathopipe tiles slide.svs --out results
      pathopipe tiles slide.svs --out results --encoder virchow2
      pathopipe tiles slide.svs --out results --set tiles.side_px=512 --set tiles.mpp=1.0
    """
    settled = read_config(config, settings, encoder=encoder, mpp=mpp)
    outcome = _run_stages(("tiles",), slide, slide_id, out, settled, threads)
    print(f"{outcome.slide_id}: tiles {_how(outcome)}: {outcome.tiles} tiles")


@recorded
def embed(
    slide: SlideFile,
    out: OutPlace,
    slide_id: SlideId = None,
    mpp: Mpp = None,
    encoder: EncoderNames = None,
    device: Device = None,
    earlier: Annotated[
        bool, typer.Option("--earlier", help="Find the tissue and lay the tiles first, where that is not done.")
    ] = False,
    threads: _Threads = None,
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Embed the tiles of one slide, or go on where a run was stopped; the tiles stage comes first.

    \b
    Examples:
      pathopipe embed slide.svs --out results
      pathopipe embed slide.svs --out results --encoder timm.resnet18 --set embed.weights=resnet18.safetensors
      pathopipe embed slide.svs --out results --earlier --receipt results/done/embed/slide.json
    """
    settled = read_config(config, settings, encoder=encoder, mpp=mpp, device=device)
    stages: tuple[Stage, ...] = ("tissue", "tiles", "embed") if earlier else ("embed",)
    outcome = _run_stages(stages, slide, slide_id, out, settled, threads)
    print(describe_outcome(outcome))


def slide_ref(slide: Path, slide_id: str | None) -> "SlideRef":
    """The one slide that a command is about.

    Raises:
        UsageError: Its id is unsafe.
    """
    from pathopipe.cohort import check_slide_id
    from pathopipe.records import SlideRef

    if not slide.exists():
        raise typer.BadParameter(f"{slide}: no such file")
    ref = SlideRef(slide_id or slide.stem, slide)
    check_slide_id(ref.slide_id)
    return ref


def _run_stages(
    stages: "tuple[Stage, ...]",
    slide: Path,
    slide_id: str | None,
    out: Path,
    config: "Config",
    threads: int | None,
) -> "SlideOutcome":
    from pathopipe.cli.progress import RunProgress
    from pathopipe.cluster import check_writable, usable_cores
    from pathopipe.pipeline import RunPlan, run_slide

    ref = slide_ref(slide, slide_id)
    check_writable(out)
    with RunProgress(1) as progress:
        plan = RunPlan(out=out, config=config, stages=stages, threads=threads or usable_cores())
        return run_slide(ref, plan, progress.on_tiles)


def _how(outcome: "SlideOutcome") -> str:
    return f"done in {outcome.seconds:.1f} s" if outcome.did else "was done already"
