"""Glowing tissue on a dark background: fluorescence."""

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pathopipe.config import TissueConfig
from pathopipe.tissue.light import extremes, thin_out
from pathopipe.tissue.parts import drop_small, fill_holes

__all__ = ["find_glowing", "is_dark_field"]

_DARK = 50
"""Brightest channel of a pixel that counts as dark, of 255."""


def is_dark_field(rgb: NDArray[np.uint8]) -> bool:
    """Tell fluorescence from bright field, and from bright field with a black border.

    On bright glass, whatever is not black is bright in all channels, tissue included. Fluorescence has a dark
    background, and what glows is mostly dim, or of one pure colour.

    Args:
        rgb: (height, width, 3) overview.
    """
    brightest, darkest = extremes(np.ascontiguousarray(rgb[thin_out(rgb)]))
    lit = brightest >= _DARK
    n_lit = np.count_nonzero(lit)
    if n_lit and np.count_nonzero(darkest[lit] >= 100) >= 0.5 * n_lit:
        return False
    return bool(n_lit <= 0.98 * lit.size or np.median(darkest) < 25)


def find_glowing(rgb: NDArray[np.uint8], pixel_um: float, config: TissueConfig) -> NDArray[np.bool_]:
    """Find tissue as the surroundings of what glows.

    The background is the darkest mode of the brightest channel; its noise is measured below the mode, where no
    signal can be. Nuclei are joined over the gaps between cells.

    Args:
        rgb: (height, width, 3) overview on a dark background.
        pixel_um: Micrometres per pixel.
        config: Smallest regions and holes.

    Returns:
        (height, width), True on tissue.
    """
    signal = extremes(rgb)[0].astype(np.float32)
    signal = cv2.GaussianBlur(signal, (0, 0), max(8 / pixel_um, 0.6))
    counts = np.bincount((signal * 4).astype(np.int64).ravel(), minlength=1024).astype(np.float64)  # quarter levels
    smooth = ndimage.gaussian_filter1d(counts, 3)
    is_mode = (smooth == ndimage.maximum_filter1d(smooth, 17)) & (smooth >= 0.1 * smooth.max())
    background = (int(np.flatnonzero(is_mode).min()) + 0.5) / 4
    below = signal[signal < background] - background
    noise = float(np.sqrt(np.mean(below**2))) if len(below) else 0.0
    brightest = float(np.percentile(signal, 99.5))
    least = max(6 * noise, 2.0, 0.03 * (brightest - background))
    if brightest - background < max(2 * least, 6.0):
        return np.zeros(signal.shape, bool)
    mask = signal > background + least
    # Gaps between cells are closed; then what is more than half surrounded is inside, which spares straight edges.
    reach = round(20 / pixel_um)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    # Replicated margins keep the closing from eating tissue that the picture's edge cuts.
    padded = np.pad(mask.astype(np.uint8), reach, mode="edge")
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, disc)
    mask = closed[reach : reach + mask.shape[0], reach : reach + mask.shape[1]] > 0
    side = 2 * round(50 / pixel_um) + 1
    mask |= cv2.blur(mask.astype(np.float32), (side, side), borderType=cv2.BORDER_REPLICATE) > 0.5
    mask = fill_holes(mask, config.min_hole_mm2 * 1e6 / pixel_um**2)
    return drop_small(mask, config.min_region_mm2 * 1e6 / pixel_um**2)
