"""Stained tissue on bright glass."""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.config import TissueConfig
from pathopipe.tissue.light import Light, measure_light, thin_out
from pathopipe.tissue.marks import find_border, find_pen, outside_stains
from pathopipe.tissue.parts import drop_small, fill_holes, label_parts, square, widen

__all__ = ["Stained", "find_stained", "shows_ycbcr"]

_LEAST_CHROMA = 0.010
"""Colour, in optical density, that is never taken for noise of the glass; about three of 256 levels."""
_LEAST_GREY = 0.015
"""Density that is never taken for noise of the glass; about eight of 256 levels."""
_LEAST_CHROMA_OF_GREY = 0.18
"""Colour over grey of the palest mixtures of stains is 0.26 (DAB with blue); of dust, shadow and edges 0.15."""
_LEAST_PX = 20
"""Smaller regions can't be judged, whatever their area."""
_BLUR_UM = 16.0
"""Colour is averaged over about a cell, so that brown and blue neighbours, or noise, do not decide alone."""


class Stained(NamedTuple):
    """What was found on bright glass; masks are (height, width)."""

    mask: NDArray[np.bool_]
    """True on tissue."""
    has_pen: bool
    odd_colours: bool
    """The colours are not those of H&E or DAB staining on near-white glass."""


def find_stained(rgb: NDArray[np.uint8], pixel_um: float, config: TissueConfig) -> Stained:
    """Find what is coloured, not what is merely dark.

    Args:
        rgb: (height, width, 3) overview on bright glass.
        pixel_um: Micrometres per pixel.
        config: Smallest regions and holes.
    """
    ycbcr = shows_ycbcr(rgb)
    if ycbcr:
        rgb = cv2.cvtColor(np.ascontiguousarray(rgb[..., [0, 2, 1]]), cv2.COLOR_YCrCb2RGB)
    light = measure_light(rgb)
    border = find_border(light)
    foreign = outside_stains(light)
    pen = find_pen(light, border, foreign, pixel_um)
    excluded = border | widen(pen, 2)

    mask, chroma = _segment(light, excluded, pixel_um)
    # What is more than half surrounded is inside: closes frayed tissue, and does not move straight edges.
    side = 2 * round(20 / pixel_um) + 1
    mask |= cv2.blur(mask.astype(np.float32), (side, side), borderType=cv2.BORDER_REPLICATE) > 0.5
    mask = _keep_tissue(mask, chroma, foreign, light, pixel_um, config)
    mask = fill_holes(mask, config.min_hole_mm2 * 1e6 / pixel_um**2)
    mask = _fill_threaded_holes(mask, light, pixel_um) & ~excluded
    mask = drop_small(mask, config.min_region_mm2 * 1e6 / pixel_um**2)

    coloured = mask & (light.chroma > 0.04)
    odd = np.count_nonzero(foreign & coloured) > 0.3 * np.count_nonzero(coloured)
    return Stained(mask, bool(pen.any()), bool(ycbcr or odd))


def shows_ycbcr(rgb: NDArray[np.uint8]) -> bool:
    """Tell whether YCbCr values are shown as RGB: then glass is (bright, 128, 128), and nothing is white.

    Some files (DICOM that declares RGB over YCbCr JPEG) come out so.
    """
    first, second, third = cv2.split(np.ascontiguousarray(rgb[thin_out(rgb)]))
    bright = first > 200
    if np.count_nonzero(bright) < 0.02 * bright.size:
        return False
    neutral = (cv2.absdiff(second, 128) <= 6) & (cv2.absdiff(third, 128) <= 6)
    whitish = np.count_nonzero(cv2.min(second, third) > 190)
    return bool(neutral[bright].mean() > 0.5 and whitish < 0.001 * bright.size)


def _segment(
    light: Light, excluded: NDArray[np.bool_], pixel_um: float
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Separate stained pixels from glass.

    Returns:
        The mask and the locally averaged colour over its threshold (at least 1 on the mask), both (height, width).
    """
    usable = (~(excluded | light.dim)).astype(np.float32)
    sigma_px = max(_BLUR_UM / pixel_um, 0.6)

    def average(values: NDArray[np.float32]) -> NDArray[np.float32]:
        blurred: NDArray[np.float32] = cv2.GaussianBlur(values * usable, (0, 0), sigma_px)
        return blurred

    weight: NDArray[np.float32] = np.maximum(average(usable), np.float32(0.1))
    chroma: NDArray[np.float32] = np.divide(average(np.minimum(light.chroma, np.float32(0.3))), weight)
    grey = average(light.grey) / weight
    least_chroma = float(np.clip(6 * light.chroma_noise, _LEAST_CHROMA, 0.03))
    least_grey = float(np.clip(6 * light.grey_noise, _LEAST_GREY, 0.03))
    supported = (chroma > least_chroma) & (chroma > _LEAST_CHROMA_OF_GREY * grey) & ~excluded
    mask = supported & (light.grey > least_grey)
    mask = fill_holes(mask, 0.005e6 / pixel_um**2) & ~excluded
    # Colour was averaged, and JPEG spreads it, so the rim reaches outward: peel off pixels that are thinner than
    # their surroundings, for an edge pixel that tissue covers by half has half the density.
    thin = light.grey <= 0.8 * cv2.blur(light.grey, (3, 3))
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    for _ in range(2):
        mask &= (cv2.erode(mask.astype(np.uint8), cross) > 0) | ~thin
    return mask, chroma / np.float32(least_chroma)


def _keep_tissue(
    mask: NDArray[np.bool_],
    chroma: NDArray[np.float32],
    foreign: NDArray[np.bool_],
    light: Light,
    pixel_um: float,
    config: TissueConfig,
) -> NDArray[np.bool_]:
    """Drop regions that are too small, too faint, perfectly even, or of a colour that the rest does not have."""
    parts = label_parts(mask, 4)
    good = parts.n_px >= max(config.min_region_mm2 * 1e6 / pixel_um**2, _LEAST_PX)
    good &= parts.share(chroma > 2) > 0.2
    if light.glass_seen:
        # A smear of stain or mounting medium is as even as glass; tissue is not.
        good &= parts.share(light.flat) < 0.8
    if np.count_nonzero(foreign & mask) < 0.1 * np.count_nonzero(mask):
        good &= parts.share(foreign) < 0.25
    return parts.pick(good)


def _fill_threaded_holes(mask: NDArray[np.bool_], light: Light, pixel_um: float) -> NDArray[np.bool_]:
    """Fill holes crossed by stained threads: those are fat, whose cells are empty; a tear is clean glass."""
    outside = ~mask
    inner = cv2.erode(outside.astype(np.uint8), square(5), borderValue=1) > 0
    holes = label_parts(outside)
    n_inner = np.bincount(holes.labels[inner], minlength=len(holes.n_px))
    # The share over a whole hole decides, so a single pixel needs only half of what tissue does.
    faint_chroma = max(5 * light.chroma_noise, 0.5 * _LEAST_CHROMA)
    faint_grey = max(3 * light.grey_noise, 0.5 * _LEAST_GREY)
    thread = inner & (light.chroma > faint_chroma) & (light.grey > faint_grey)
    n_thread = np.bincount(holes.labels[thread], minlength=len(holes.n_px))
    fat = (n_thread > 0.1 * n_inner) & (n_inner > 0.001e6 / pixel_um**2) & (holes.touching_edge() == 0)
    return mask | holes.pick(fat)
