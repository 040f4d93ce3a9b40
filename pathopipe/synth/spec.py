"""What to draw, and the record of one known object."""

import math
from dataclasses import dataclass
from typing import Literal

from shapely.geometry import Polygon

from pathopipe.errors import UsageError

__all__ = ["SynthSpec", "TruthObject"]


@dataclass(frozen=True, kw_only=True)
class SynthSpec:
    """What to draw. Sizes of tissue are physical: at another ``mpp`` the same seed shows the same tissue."""

    width_px: int
    """Width of level 0 in pixels."""
    height_px: int
    """Height of level 0 in pixels."""
    mpp: float = 0.25
    """Micrometres per level-0 pixel."""
    seed: int = 0
    stain_strength: float = 1.0
    """Factor on the optical density of both stains; 0.3 is pale tissue."""
    pen: bool = True
    """Coloured marker strokes on the cover slip, partly over tissue."""
    dust: bool = True
    """Specks, lint and out-of-focus rings on the glass."""
    border: bool = False
    """A black scan border and the edge of the cover slip."""
    dark_field: bool = False
    """Fluorescence: blue nuclei on black instead of stained tissue on bright glass; no ink, dust or border."""
    repeat_px: int | None = None
    """Draw one slide of this side and repeat it to fill width and height: quick, for huge files.

    Quickest for multiples of 1024 up to 4096: then each block is drawn and encoded once."""

    def __post_init__(self) -> None:
        for name in ("width_px", "height_px"):
            if getattr(self, name) < 1:
                raise UsageError(f"synth: {name} must be at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.mpp) and 0.05 <= self.mpp <= 50):
            raise UsageError(f"synth: mpp must lie between 0.05 and 50 um per pixel, got {self.mpp}")
        if not (math.isfinite(self.stain_strength) and 0 <= self.stain_strength <= 3):
            raise UsageError(f"synth: stain_strength must lie between 0 and 3, got {self.stain_strength}")
        if self.seed < 0:
            raise UsageError(f"synth: seed must not be negative, got {self.seed}")
        if self.repeat_px is not None and self.repeat_px < 64:
            raise UsageError(f"synth: repeat_px must be at least 64, got {self.repeat_px}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TruthObject:
    """One drawn object: what it is and where."""

    kind: Literal["nucleus", "gland", "lumen"]
    class_name: str
    """``Epithelial``, ``Lymphocyte``, ``Fibroblast`` or ``Endothelial`` for nuclei; ``Gland``; ``Lumen``."""
    polygon: Polygon
    """Outline in level-0 pixels. A gland's outline holds its lumen; it has no hole."""
    id: int
    """Instance number, from 1, unique among objects of the kind; :meth:`DrawnSlide.labels` uses the same one."""
    parent: int | None
    """Id of the gland that a lumen or an epithelial nucleus belongs to."""
