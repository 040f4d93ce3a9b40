"""One tile on its working grid: stain, grey and white planes of bytes, and their octaves.

Nearly everything that is measured later is a sum of integers over these bytes, so a number can't depend on the order
of summation, the memory layout, the number of threads or the processor.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.stain import stain_bytes

__all__ = ["N_OCTAVES", "WORKING_MPP", "Planes", "Scale", "halve", "plan_scale", "planes_of"]

Plane = NDArray[np.uint8]

WORKING_MPP = 0.5
"""Micrometres per pixel of the working grid, for tiles between 0.05 and 1 um/px."""

MAX_ENLARGE = 2.0
"""Coarser tiles are enlarged no further than this: there is nothing to find between their pixels."""

EXACT_SHARE = 0.02
"""A whole-number reduction this near to the wanted one is taken instead: 0.2485 um/px is reduced by 2."""

MIN_SIDE_PX = 4
"""No side of the working grid is shorter, whatever the tile."""

N_OCTAVES = 6
"""Planes at 0.5, 1, 2, 4, 8 and 16 um per pixel."""

WHITE_FROM = 205
"""Glass, lumen, fat and mucin: every channel is at least this bright (0.095 OD)."""

OUTSIDE = 255
"""Byte of a stain plane that marks a pixel which is not tissue; :func:`stain_bytes` never gives it."""


class Scale(NamedTuple):
    """The working grid of tiles of one shape and resolution."""

    width_px: int
    height_px: int
    mpp: tuple[float, float]
    """Micrometres per working pixel, x then y, as they came out after rounding to whole pixels."""

    @property
    def pixel_um2(self) -> float:
        """Area of a working pixel."""
        return self.mpp[0] * self.mpp[1]

    @property
    def coarse_mpp(self) -> tuple[float, float]:
        """Micrometres per pixel of the second octave."""
        width_px, height_px = (self.width_px + 1) // 2, (self.height_px + 1) // 2
        return self.mpp[0] * self.width_px / width_px, self.mpp[1] * self.height_px / height_px

    @property
    def area_mm2(self) -> float:
        """Area of the tile."""
        return self.width_px * self.height_px * self.pixel_um2 / 1e6


@dataclass(frozen=True, slots=True)
class Planes:
    """What the measurements read. Lists hold octaves, finest first; stain bytes are those of ``stain_bytes``."""

    scale: Scale
    rgb: tuple[Plane, Plane, Plane]
    """On the working grid: nuclei need it, all else is measured at 1 um per pixel and more."""
    rgb_coarse: Plane
    """(height / 2, width / 2, 3) at the second octave."""
    grey: list[Plane]
    """All octaves."""
    haematoxylin: list[Plane]
    """From the second octave (1 um per pixel) on."""
    eosin: list[Plane]
    """From the second octave (1 um per pixel) on."""
    dab: Plane
    """At the second octave."""
    white: Plane
    """255 where white, else 0, at the second octave."""


def plan_scale(height_px: int, width_px: int, mpp: tuple[float, float]) -> Scale:
    """The working grid of a tile of ``height_px`` x ``width_px`` pixels at ``mpp`` (x, y)."""
    sides = []
    for side_px, side_mpp in ((width_px, mpp[0]), (height_px, mpp[1])):
        reduction = max(WORKING_MPP / side_mpp, 1 / MAX_ENLARGE)
        whole = max(round(reduction), 1)
        if abs(reduction - whole) <= EXACT_SHARE * whole:
            reduction = float(whole)
        sides.append(max(round(side_px / reduction), MIN_SIDE_PX))
    return Scale(sides[0], sides[1], (width_px * mpp[0] / sides[0], height_px * mpp[1] / sides[1]))


def planes_of(rgb: NDArray[np.uint8], scale: Scale) -> Planes:
    """Resample one tile (height, width, 3) to its working grid and take it apart."""
    tile = _resample(np.ascontiguousarray(rgb), scale)
    # Stain at 1 um per pixel: fine enough for cells, free of most sensor and JPEG noise, and as good from a tile of
    # 1 um/px as from one of 0.25.
    coarse = halve(tile)
    haematoxylin, eosin, dab = stain_bytes(coarse)
    red, green, blue = cv2.split(tile)
    return Planes(
        scale=scale,
        rgb=(red, green, blue),
        rgb_coarse=coarse,
        grey=_octaves(cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY), N_OCTAVES),
        haematoxylin=_octaves(haematoxylin, N_OCTAVES - 1),
        eosin=_octaves(eosin, N_OCTAVES - 1),
        dab=dab,
        white=cv2.inRange(coarse, (WHITE_FROM,) * 3, (255,) * 3),
    )


def halve(plane: Plane) -> Plane:
    """Mean of 2 x 2 pixels: no filter is centred between pixels, so turning or flipping the plane turns the result."""
    height, width = plane.shape[:2]
    return _area(plane, max((width + 1) // 2, 1), max((height + 1) // 2, 1))


def _octaves(plane: Plane, n: int) -> list[Plane]:
    octaves = [plane]
    for _ in range(n - 1):
        octaves.append(halve(octaves[-1]))
    return octaves


def _resample(tile: Plane, scale: Scale) -> Plane:
    height, width = tile.shape[:2]
    if (width, height) == (scale.width_px, scale.height_px):
        return tile
    # Reduce first, then enlarge: with unlike axes a tile may need both.
    tile = _area(tile, min(width, scale.width_px), min(height, scale.height_px))
    if tile.shape[:2] == (scale.height_px, scale.width_px):
        return tile
    size = (scale.width_px, scale.height_px)
    # The bit-exact variant: fixed-point arithmetic, the same on every processor.
    enlarged: Plane = cv2.resize(tile, size, interpolation=cv2.INTER_LINEAR_EXACT)
    return enlarged


def _area(plane: Plane, width_px: int, height_px: int) -> Plane:
    if (plane.shape[1], plane.shape[0]) == (width_px, height_px):
        return plane
    reduced: Plane = cv2.resize(plane, (width_px, height_px), interpolation=cv2.INTER_AREA)
    return reduced
