"""``pathopipe tissue``, ``tiles`` and ``embed``: one stage of one slide."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from pathopipe.cli.options import ConfigFile, Device, EncoderNames, Mpp, Out, Settings, SlideFile, SlideId, read_config
from pathopipe.cli.progress import describe_outcome

if TYPE_CHECKING:
    from pathopipe.config import Config
    from pathopipe.pipeline import SlideOutcome, Stage
    from pathopipe.records import SlideRef

__all__ = ["embed", "slide_ref", "tiles", "tissue"]


def tissue(
    slide: SlideFile,
    out: Out,
    slide_id: SlideId = None,
    mpp: Mpp = None,
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
    outcome = _run_stage("tissue", slide, slide_id, out, settled)
    flags = ", ".join(outcome.flags) or "none"
    print(f"{outcome.slide_id}: tissue {_how(outcome)}: {outcome.tissue_mm2:.2f} mm2; flags: {flags}")
    print(f"outline: {out / 'geojson' / f'{outcome.slide_id}.tissue.geojson'}")
    print(f"picture: {out / 'thumbnails' / f'{outcome.slide_id}.png'}")


def tiles(
    slide: SlideFile,
    out: Out,
    slide_id: SlideId = None,
    mpp: Mpp = None,
    encoder: EncoderNames = None,
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
    outcome = _run_stage("tiles", slide, slide_id, out, read_config(config, settings, encoder=encoder, mpp=mpp))
    print(f"{outcome.slide_id}: tiles {_how(outcome)}: {outcome.tiles} tiles")


def embed(
    slide: SlideFile,
    out: Out,
    slide_id: SlideId = None,
    mpp: Mpp = None,
    encoder: EncoderNames = None,
    device: Device = None,
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Embed the tiles of one slide, or go on where a run was stopped; the tiles stage comes first.

    \b
    Examples:
      pathopipe embed slide.svs --out results
      pathopipe embed slide.svs --out results --encoder timm.resnet18 --set embed.weights=resnet18.safetensors
    """
    outcome = _run_stage(
        "embed", slide, slide_id, out, read_config(config, settings, encoder=encoder, mpp=mpp, device=device)
    )
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


def _run_stage(stage: "Stage", slide: Path, slide_id: str | None, out: Path, config: "Config") -> "SlideOutcome":
    from pathopipe.cli.progress import RunProgress
    from pathopipe.cluster import check_writable, usable_cores
    from pathopipe.pipeline import RunPlan, run_slide

    ref = slide_ref(slide, slide_id)
    check_writable(out)
    with RunProgress(1) as progress:
        plan = RunPlan(out=out, config=config, stages=(stage,), threads=usable_cores())
        return run_slide(ref, plan, progress.on_tiles)


def _how(outcome: "SlideOutcome") -> str:
    return f"done in {outcome.seconds:.1f} s" if outcome.did else "was done already"
