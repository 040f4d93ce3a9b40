"""Tissue of a slide: one coarse picture in, mask, polygons and flags out."""

import dataclasses
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathopipe.config import TissueConfig
from pathopipe.errors import MissingResolutionError
from pathopipe.records import Tissue
from pathopipe.slide.base import Slide
from pathopipe.slide.overview import scan_overview
from pathopipe.tissue.assemble import tissue_from_mask
from pathopipe.tissue.brightfield import find_stained
from pathopipe.tissue.darkfield import find_glowing, is_dark_field
from pathopipe.tissue.focus import is_blurred
from pathopipe.tissue.given import given_tissue

__all__ = ["detect_tissue", "find_tissue", "overview_mpp"]

# Detection holds some 65 bytes a pixel; without a limit the memory of a run would grow with the slide.
_MOST_OVERVIEW_PX = 5_000_000


def find_tissue(slide: Slide, config: TissueConfig) -> Tissue:
    """Find the tissue of a slide, or take the mask that the config names.

    Raises:
        MissingResolutionError: The slide's micrometres per pixel are not known.
        UsageError: The named mask is missing, can't be read or does not fit the slide.
    """
    info = slide.info
    if info.mpp is None:
        raise MissingResolutionError(
            f"{info.slide_id}: tissue needs micrometres per pixel, and none are known; set slide.mpp",
            slide_id=info.slide_id,
        )
    if config.mask is not None:
        return given_tissue(Path(config.mask.replace("{slide_id}", info.slide_id)), info, config)
    overview = scan_overview(slide, overview_mpp(info.dims_l0, info.mpp, config))
    tissue = detect_tissue(overview.pixels, dims_l0=info.dims_l0, mpp_l0=info.mpp, config=config)
    flags = set(tissue.flags)
    if tissue.method == "brightfield" and is_blurred(slide, tissue.mask):
        flags.add("blur")
    if overview.bad_blocks:
        flags.add("unreadable")
    return dataclasses.replace(tissue, flags=tuple(sorted(flags)), unreadable_share=overview.unreadable_share)


def overview_mpp(dims_l0: tuple[int, int], mpp_l0: tuple[float, float], config: TissueConfig) -> float:
    """Resolution of the coarse read: ``tissue.mpp``, or coarser where that would make too large a picture."""
    area_um2 = dims_l0[0] * mpp_l0[0] * dims_l0[1] * mpp_l0[1]
    return max(config.mpp, math.sqrt(area_um2 / _MOST_OVERVIEW_PX))


def detect_tissue(
    rgb: NDArray[np.uint8], *, dims_l0: tuple[int, int], mpp_l0: tuple[float, float], config: TissueConfig
) -> Tissue:
    """Find the tissue on an overview of a whole slide.

    Args:
        rgb: (height, width, 3) overview; covers level 0 exactly.
        dims_l0: Width and height of level 0 in pixels.
        mpp_l0: Micrometres per level-0 pixel, x and y.
        config: Smallest regions and holes.

    Returns:
        Mask, polygons and flags. ``blur`` is never among them, for an overview can't show it.
    """
    height, width = rgb.shape[:2]
    mpp = (dims_l0[0] * mpp_l0[0] / width, dims_l0[1] * mpp_l0[1] / height)
    # Structures are measured with one pixel size: that of the square pixel of the same area.
    pixel_um = (mpp[0] * mpp[1]) ** 0.5
    flags = set()
    if is_dark_field(rgb):
        mask = find_glowing(rgb, pixel_um, config)
        flags.add("dark-field")
    else:
        stained = find_stained(rgb, pixel_um, config)
        mask = stained.mask
        if stained.has_pen:
            flags.add("pen")
        if stained.odd_colours:
            flags.add("odd-colours")
    method = "dark-field" if "dark-field" in flags else "brightfield"
    return tissue_from_mask(mask.astype(np.uint8), dims_l0, mpp_l0, config, method=method, flags=flags)
