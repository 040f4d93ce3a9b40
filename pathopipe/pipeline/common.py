"""What every stage of a slide begins with: the plan, the open slide, its tissue, and the pictures beside it."""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pathopipe.config import Config
from pathopipe.errors import StoreError, UsageError
from pathopipe.export.tissue import write_tissue_outline
from pathopipe.files import remove_leftovers
from pathopipe.records import SlideRef, TileGrid, Tissue
from pathopipe.report.thumbnail import LONGEST_SIDE_PX, draw_thumbnail, write_png
from pathopipe.slide.base import Slide
from pathopipe.slide.cache import local_slide
from pathopipe.slide.open import open_slide
from pathopipe.slide.overview import read_overview
from pathopipe.slide.resolution import require_mpp
from pathopipe.store import SlideStore, digest
from pathopipe.tissue import TISSUE_VERSION, find_tissue

__all__ = [
    "RunPlan",
    "Stage",
    "given_mask",
    "inputs_below",
    "opened",
    "outline_path",
    "thumbnail_path",
    "tissue_stage",
    "write_pictures",
]

Stage = Literal["tissue", "tiles", "embed"]
_ORDER: tuple[Stage, ...] = ("tissue", "tiles", "embed")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What is to be done with every slide; crosses process borders."""

    out: Path
    config: Config = field(default_factory=Config)
    stages: tuple[Stage, ...] = _ORDER
    """Which stages to compute; what they stand on must be in the store."""
    fresh: Stage | None = None
    """Stage to forget first, with all that depends on it."""
    retry_bad: bool = False
    """Compute chunks with quarantined tiles again."""
    threads: int = 1
    """Threads that a process may keep busy."""


def outline_path(out: Path, slide_id: str) -> Path:
    """Where the tissue outline of a slide goes."""
    return out / "geojson" / f"{slide_id}.tissue.geojson"


def thumbnail_path(out: Path, slide_id: str) -> Path:
    """Where the picture of a slide goes."""
    return out / "thumbnails" / f"{slide_id}.png"


@contextlib.contextmanager
def opened(ref: SlideRef, config: Config) -> Iterator[Slide]:
    """The slide, open, with a resolution; closed at the end."""
    mpp, source = (ref.mpp, "manifest") if ref.mpp is not None else (config.slide.mpp, "config")
    with local_slide(ref.path, config.slide) as path:
        slide = open_slide(path, slide_id=ref.slide_id, mpp=mpp, mpp_source=source)
        try:
            require_mpp(slide.info)
            yield slide
        finally:
            slide.close()


def given_mask(slide_id: str, config: Config) -> Path | None:
    """The slide's own tissue mask, where the config names one; UsageError where it is missing."""
    if config.tissue.mask is None:
        return None
    path = Path(config.tissue.mask.replace("{slide_id}", slide_id))
    if not path.is_file():
        raise UsageError(f"{slide_id}: tissue.mask={config.tissue.mask}, but there is no file {path}")
    return path


def _tissue_inputs(slide: Slide, config: Config) -> dict[str, Any]:
    settings = config.tissue.model_dump(mode="json", exclude={"mask"})
    mask = given_mask(slide.info.slide_id, config)
    if mask is not None:
        settings["mask"] = hashlib.sha256(mask.read_bytes()).hexdigest()
    return {
        "version": TISSUE_VERSION,
        "slide": slide.info.fingerprint,
        "mpp": slide.info.mpp,
        "config": settings,
    }


def tissue_stage(slide: Slide, store: SlideStore, config: Config, found: Tissue | None) -> tuple[Tissue, bool]:
    """The tissue of a slide, and whether it was computed now; ``found`` is what was found already."""
    inputs = _tissue_inputs(slide, config)
    if store.require_inputs("tissue", "tissue", inputs):
        return store.read_tissue(), False
    tissue = found if found is not None else find_tissue(slide, config.tissue)
    store.write_tissue(tissue, inputs)
    return tissue, True


def inputs_below(store: SlideStore, group: str, stage: str) -> dict[str, Any]:
    """The inputs of a stage that another one stands on; StoreError where it is not finished."""
    inputs = store.inputs(group)
    if inputs is None:
        slide_id = store.path.stem
        raise StoreError(
            f"{slide_id}: {group} is not there yet; run 'pathopipe {stage} SLIDE --out DIR' first", slide_id=slide_id
        )
    return inputs


def write_pictures(
    slide: Slide, store: SlideStore, plan: RunPlan, tissue: Tissue | None, grid: TileGrid | None, *, again: bool
) -> None:
    """Write the outline and the thumbnail of a slide, where they are missing or to be written again."""
    tissue = tissue if tissue is not None else store.read_tissue()
    slide_id = slide.info.slide_id
    outline, thumbnail = outline_path(plan.out, slide_id), thumbnail_path(plan.out, slide_id)
    for picture in (outline, thumbnail):
        if again:
            picture.unlink(missing_ok=True)  # a kill from here on leaves none, so the next run writes it, and cleans up
        if not picture.exists():
            remove_leftovers(picture.parent, picture.name)
    if not outline.exists():
        write_tissue_outline(
            outline,
            slide_id,
            tissue,
            slide.info.bounds_l0,
            provenance=digest(inputs_below(store, "tissue", "tissue")),
        )
    if not thumbnail.exists():
        mpp = require_mpp(slide.info)
        longest_um = max(side * um for side, um in zip(slide.info.dims_l0, mpp, strict=True))
        overview = read_overview(slide, max(*mpp, longest_um / LONGEST_SIDE_PX))
        write_png(thumbnail, draw_thumbnail(overview, slide.info.dims_l0, tissue, grid))
