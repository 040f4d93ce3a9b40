"""How the tiles of a grid are read: at once from native blocks where the slide can, else region by region."""

from dataclasses import dataclass

from pathopipe.errors import SlideError
from pathopipe.records import TileGrid
from pathopipe.slide.base import BlockSlide, Slide

__all__ = ["ReadPlan", "plan_reading"]


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """One road for all tiles of a grid; depends on slide and grid alone."""

    blocks: BlockSlide | None
    """The slide, where its blocks go straight into a tile; None where a region is read and resized."""
    factor: int = 1
    """By how much each block is shrunk before it is put into the tile."""
    dct: bool = False
    """Blocks are shrunk by the JPEG decoder."""
    keep: bool = True
    """A block that lies wholly in one tile serves others, too."""


def plan_reading(slide: Slide, grid: TileGrid) -> ReadPlan:
    """Choose the road.

    Raises:
        SlideError: The tiles were laid out for decoding at reduced size, which this slide no longer allows.
    """
    factor = grid.read_px[0] // grid.side_px
    is_whole = factor >= 1 and grid.read_px == (factor * grid.side_px, factor * grid.side_px)
    if grid.resample == "dct" and not (
        is_whole and isinstance(slide, BlockSlide) and factor in slide.info.levels[grid.level].scales
    ):
        raise SlideError(
            f"{slide.info.slide_id}: its tiles were planned for JPEG decoding at reduced size, which can't be done "
            "with the file and libraries at hand; use --fresh tiles",
            slide_id=slide.info.slide_id,
        )
    if not (is_whole and isinstance(slide, BlockSlide)):
        return ReadPlan(None)
    # Only where tiles overlap does a second one ask for a block that lies wholly in the first.
    return ReadPlan(slide, factor, grid.resample == "dct", keep=grid.overlap_px > 0)
