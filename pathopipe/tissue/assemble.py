"""The record of a slide's tissue from its mask or its polygons."""

from collections.abc import Collection, Sequence

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import Polygon

from pathopipe.config import TissueConfig
from pathopipe.records import Tissue
from pathopipe.tissue.outline import trace

__all__ = ["tissue_from_mask", "tissue_from_polygons"]


def tissue_from_mask(
    mask: NDArray[np.uint8],
    dims_l0: tuple[int, int],
    mpp_l0: tuple[float, float],
    config: TissueConfig,
    *,
    method: str,
    flags: Collection[str] = (),
) -> Tissue:
    """Trace a mask that covers level 0 and measure its regions.

    Args:
        mask: (height, width), 1 on tissue.
        dims_l0: Width and height of level 0 in pixels.
        mpp_l0: Micrometres per level-0 pixel, x and y.
        config: What counts as little tissue.
        method: How the mask was found.
        flags: What else is known; ``no-tissue`` and ``little-tissue`` are added here.
    """
    height, width = mask.shape
    scale = np.array([dims_l0[0] / width, dims_l0[1] / height])
    pieces = trace(mask)
    # Measured before scaling, where areas are whole numbers of pixels.
    areas_px = [float(piece.area) for piece in pieces]
    pixel_mm2 = float(scale.prod()) * mpp_l0[0] * mpp_l0[1] / 1e6
    polygons = [shapely.transform(piece, lambda xy: xy * scale) for piece in pieces]
    areas_mm2 = [area * pixel_mm2 for area in areas_px]
    return _record(mask, scale, mpp_l0, polygons, areas_mm2, config, method, flags)


def tissue_from_polygons(
    polygons: Sequence[Polygon],
    mask: NDArray[np.uint8],
    dims_l0: tuple[int, int],
    mpp_l0: tuple[float, float],
    config: TissueConfig,
    *,
    method: str,
) -> Tissue:
    """Keep polygons (level-0 px, valid, apart from one another) as they are, beside the mask drawn from them."""
    height, width = mask.shape
    scale = np.array([dims_l0[0] / width, dims_l0[1] / height])
    ordered = sorted(polygons, key=lambda polygon: -float(polygon.area))
    areas_mm2 = [float(polygon.area) * mpp_l0[0] * mpp_l0[1] / 1e6 for polygon in ordered]
    return _record(mask, scale, mpp_l0, ordered, areas_mm2, config, method, ())


def _record(
    mask: NDArray[np.uint8],
    scale: NDArray[np.float64],
    mpp_l0: tuple[float, float],
    polygons: Sequence[Polygon],
    areas_mm2: Sequence[float],
    config: TissueConfig,
    method: str,
    flags: Collection[str],
) -> Tissue:
    amount = {"no-tissue"} if not polygons else {"little-tissue"} if sum(areas_mm2) < config.little_mm2 else set()
    return Tissue(
        mask=mask,
        mpp=(float(scale[0]) * mpp_l0[0], float(scale[1]) * mpp_l0[1]),
        polygons=tuple(polygons),
        areas_mm2=tuple(areas_mm2),
        flags=tuple(sorted({*flags, *amount})),
        method=method,
    )
