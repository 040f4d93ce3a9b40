"""Whether a slide is out of focus, from a few patches at high resolution."""

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import TileReadError
from pathopipe.geometry import Region
from pathopipe.slide.base import Slide

__all__ = ["BLURRED", "is_blurred", "measure_blur"]

_PATCH_PX = 512
_PATCHES = 8
_REBLUR_PX = 11
_JUDGED_UM = 0.5
"""Micrometres per pixel at which focus is judged."""
_COARSEST_UM = 1.05
"""Above this a slide's pixels are too coarse for its focus to be told."""
BLURRED = 0.62
"""Least blur measure of a patch that is out of focus.

Sharp patches of several scanners and stains score 0.24 to 0.46; after a Gaussian blur of 1 um 0.41 to 0.68, of 1.5 um
0.52 to 0.77, of 2 um 0.63 to 0.81. So a patch counts once the blur is about that of a fine nuclear detail.
"""


def is_blurred(slide: Slide, mask: NDArray[np.uint8]) -> bool:
    """Judge focus on up to eight patches of 512 px spread over the tissue; True if most are blurred.

    An overview of several micrometres per pixel looks the same in and out of focus, so this reads the slide itself:
    its level nearest to, and not coarser than, 0.5 um/px. Slides coarser than 1 um/px are never called blurred.

    Args:
        slide: Open slide with known resolution.
        mask: (height, width) tissue mask of the whole of level 0.
    """
    info = slide.info
    if info.mpp is None or max(info.mpp) > _COARSEST_UM or not mask.any():
        return False
    fine = [n for n, level in enumerate(info.levels) if info.mpp[0] * level.downsample_x <= 1.02 * _JUDGED_UM]
    number = max(fine, key=lambda n: info.levels[n].downsample_x) if fine else 0
    downsample = info.levels[number].downsample_x
    scores = []
    for x_l0, y_l0 in _patch_corners(mask, info.dims_l0, downsample):
        try:
            patch = slide.read(Region(x_l0, y_l0, number, _PATCH_PX, _PATCH_PX))
        except TileReadError:
            continue  # the tile stage reports it; here another patch will do
        score = measure_blur(patch, info.mpp[0] * downsample)
        if score is not None:
            scores.append(score)
    return bool(scores) and float(np.median(scores)) >= BLURRED


def measure_blur(rgb: NDArray[np.uint8], pixel_um: float) -> float | None:
    """Measure the blur of a patch on bright glass: 0 sharp, 1 blurred; None where it shows too little.

    The loss of detail under a further blur, of the darkest channel at 0.5 um/px: the measure of Crete et al. 2007,
    "The blur effect", Proc. SPIE 6492, in the form that scikit-image's ``blur_effect`` gives it.

    Args:
        rgb: (height, width, 3) at ``pixel_um`` or finer than 0.5 um/px.
        pixel_um: Micrometres per pixel.
    """
    scale = pixel_um / _JUDGED_UM
    if scale < 0.99:
        rgb = cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    darkest = np.minimum(np.minimum(rgb[:, :, 0], rgb[:, :, 1]), rgb[:, :, 2])  # min(axis=2) takes 20 times as long
    if min(darkest.shape) < 32 or float(darkest.std()) < 4:
        return None
    detail = darkest.astype(np.float32)
    return max(_kept_when_blurred(detail, (_REBLUR_PX, 1), (1, 0)), _kept_when_blurred(detail, (1, _REBLUR_PX), (0, 1)))


def _kept_when_blurred(image: NDArray[np.float32], size_px: tuple[int, int], direction: tuple[int, int]) -> float:
    """The share of the edges across one direction that a blur along it leaves."""
    blurred = cv2.blur(image, size_px, borderType=cv2.BORDER_REFLECT)
    before, after = (
        np.abs(cv2.Sobel(each, cv2.CV_32F, *direction, borderType=cv2.BORDER_REFLECT))[2:-1, 2:-1]
        for each in (image, blurred)
    )
    edges = float(before.sum(dtype=np.float64))
    lost = np.subtract(before, after, out=after)
    np.maximum(lost, 0, out=lost)
    return 1 - float(lost.sum(dtype=np.float64)) / edges if edges else 1.0


def _patch_corners(mask: NDArray[np.uint8], dims_l0: tuple[int, int], downsample: float) -> list[tuple[int, int]]:
    """Corners of patches well inside the tissue, evenly spread in reading order; the same for the same mask.

    They lie on whole pixels of the level, which are read far more quickly than what is between them.
    """
    height, width = mask.shape
    side_l0 = round(_PATCH_PX * downsample)
    scale_x, scale_y = dims_l0[0] / width, dims_l0[1] / height
    side = (max(round(side_l0 / scale_x), 1), max(round(side_l0 / scale_y), 1))
    cover = cv2.blur(mask.astype(np.float32), side, borderType=cv2.BORDER_CONSTANT)
    rows, columns = np.nonzero(cover >= min(0.8, float(cover.max())))
    chosen = np.unique(np.linspace(0, len(rows) - 1, 2 * _PATCHES + 1).round().astype(np.int64)[1::2])

    def corner(place: float, scale: float, length_l0: int) -> int:
        start_l0 = min(max((place + 0.5) * scale - side_l0 / 2, 0), max(length_l0 - side_l0, 0))
        return round(start_l0 // downsample * downsample)

    return [(corner(columns[i], scale_x, dims_l0[0]), corner(rows[i], scale_y, dims_l0[1])) for i in chosen]
