"""Colour, stain and white-space numbers of one tile."""

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.embeddings.handcrafted.histogram import describe, histogram, shares
from pathopipe.embeddings.handcrafted.planes import OUTSIDE, Planes
from pathopipe.stain import STAIN_STEP_OD, STAIN_ZERO

__all__ = ["COLOUR_NAMES", "colour_features"]

Plane = NDArray[np.uint8]

_CHANNELS = ("red", "green", "blue", "saturation")
_STAINS = ("haematoxylin", "eosin", "dab")
_CHANNEL_PERCENT = (5, 50, 95)
_STAIN_PERCENT = (5, 25, 50, 75, 95)

# Sectors of the colour circle, in degrees from red; narrow where the stains of histology lie.
_HUES = {
    "red": (340, 380),
    "yellow": (20, 80),
    "green": (80, 170),
    "cyan": (170, 220),
    "blue": (220, 250),
    "indigo": (250, 270),
    "violet": (270, 290),
    "magenta": (290, 320),
    "pink": (320, 340),
}
_HUE_BINS, _SATURATION_BINS = 36, 32

_REGION_OCTAVES = {4: 2, 8: 3, 16: 4}
"""Side of a region in um, and the octave of the stains whose pixels are such regions."""

_PAIRS = ((0, 1), (0, 2), (1, 2))

_SPACE_MIN_UM2 = 16.0
"""Smaller white spots are slits and noise; a goblet cell's mucin is some 50 um2."""

_LUMEN_MIN_UM2 = 400.0
"""A white space as large is a lumen, a vessel or glass, not a vacuole."""


def _measures(percent: tuple[int, ...]) -> tuple[str, ...]:
    return ("mean", "sd", *(f"p{p:02d}" for p in percent))


COLOUR_NAMES: tuple[str, ...] = (
    *(f"{channel}_{measure}" for channel in _CHANNELS for measure in _measures(_CHANNEL_PERCENT)),
    *(f"hue_{hue}_share" for hue in _HUES),
    *(f"od_{stain}_{measure}" for stain in _STAINS for measure in _measures(_STAIN_PERCENT)),
    "od_haematoxylin_to_eosin_log",
    *(f"od_{_STAINS[a]}_{_STAINS[b]}_correlation" for a, b in _PAIRS),
    *(f"od_{stain}_region_{um}um_sd" for stain in _STAINS[:2] for um in _REGION_OCTAVES),
    "tissue_share",
    "white_edge_mm_per_mm2_log",
    "white_spaces_per_mm2_log",
    "white_space_area_um2_log",
    "white_lumen_share",
    "white_largest_share",
)


def colour_features(planes: Planes) -> NDArray[np.float64]:
    """(len(COLOUR_NAMES),) numbers of one tile, at 1 um per pixel."""
    hsv = cv2.cvtColor(planes.rgb_coarse, cv2.COLOR_RGB2HSV)
    return np.concatenate(
        [_channels(planes.rgb_coarse, hsv), _hues(hsv), _stains(planes), _regions(planes), _white(planes)]
    )


def _channels(rgb: Plane, hsv: Plane) -> NDArray[np.float64]:
    """RGB and saturation of all pixels, glass too, as shares of full scale."""
    counts = [histogram(rgb, channel) for channel in range(3)]
    counts.append(histogram(hsv, 1))
    return describe(np.stack(counts), _CHANNEL_PERCENT).ravel() / 255


def _hue_of_bin() -> NDArray[np.float64]:
    """(sector, bin) 1 where a bin of 10 degrees lies in a sector."""
    degrees = np.arange(_HUE_BINS) * (360 // _HUE_BINS)
    inside = [((degrees - start) % 360) < end - start for start, end in _HUES.values()]
    return np.asarray(inside, np.float64)


_HUE_OF_BIN = _hue_of_bin()


def _hues(hsv: Plane) -> NDArray[np.float64]:
    """How the colourfulness of a tile is spread over the colour circle: hue weighted with saturation."""
    counts = cv2.calcHist([hsv], [0, 1], None, [_HUE_BINS, _SATURATION_BINS], [0, 180, 0, 256]).astype(np.float64)
    # Grey pixels (saturation bin 0) have no hue to speak of.
    weights = (counts * np.arange(_SATURATION_BINS)).sum(axis=1)
    return shares((_HUE_OF_BIN * weights).sum(axis=1))


def _stains(planes: Planes) -> NDArray[np.float64]:
    """Stain amounts of the tissue pixels, their ratio and how they go together; zeros without tissue."""
    # White pixels become OUTSIDE in all three, so they fall into one bin and add nothing to a difference.
    marked = [cv2.bitwise_or(p, planes.white) for p in (planes.haematoxylin[0], planes.eosin[0], planes.dab)]
    counts = np.stack([histogram(plane) for plane in marked])
    counts[:, OUTSIDE] = 0
    n = float(counts[0].sum())
    amounts = describe(counts, _STAIN_PERCENT)
    amounts[:, [0, *range(2, amounts.shape[1])]] -= STAIN_ZERO * (n > 0)
    amounts *= STAIN_STEP_OD

    # Sums of products from sums of squared differences: 2ab = a^2 + b^2 - (a - b)^2, in whole numbers.
    values = np.arange(256, dtype=np.float64)
    sums = (counts * values).sum(axis=1)
    squares = (counts * values**2).sum(axis=1)
    spread = n * squares - sums**2
    correlations = []
    for a, b in _PAIRS:
        products = (squares[a] + squares[b] - cv2.norm(marked[a], marked[b], cv2.NORM_L2SQR)) / 2
        scale = np.sqrt(spread[a] * spread[b])
        correlations.append((n * products - sums[a] * sums[b]) / scale if scale > 0 else 0.0)
    haematoxylin, eosin = (max(amounts[k, 0], 0.0) + 0.02 for k in range(2))
    return np.concatenate([amounts.ravel(), [np.log(haematoxylin / eosin)], correlations])


def _regions(planes: Planes) -> NDArray[np.float64]:
    """How stain varies between regions of some um: even sheets of cells against glands in stroma."""
    spreads = [
        float(cv2.meanStdDev(octaves[octave])[1][0, 0]) * STAIN_STEP_OD
        for octaves in (planes.haematoxylin, planes.eosin)
        for octave in _REGION_OCTAVES.values()
    ]
    return np.asarray(spreads)


def _white(planes: Planes) -> NDArray[np.float64]:
    """Glass and lumina: share, length of their edge, number and size of the white spaces."""
    white = planes.white & np.uint8(1)
    mpp_x, mpp_y = planes.scale.coarse_mpp
    edge_um = np.count_nonzero(white[:, 1:] != white[:, :-1]) * mpp_y
    edge_um += np.count_nonzero(white[1:] != white[:-1]) * mpp_x
    _, _, boxes, _ = cv2.connectedComponentsWithStats(white, connectivity=4, ltype=cv2.CV_32S)
    # Sorted, because the numbering of the components is OpenCV's affair.
    spaces_um2 = np.sort(boxes[1:, cv2.CC_STAT_AREA]) * (mpp_x * mpp_y)
    spaces_um2 = spaces_um2[spaces_um2 >= _SPACE_MIN_UM2]
    area_mm2 = planes.scale.area_mm2
    return np.asarray(
        [
            1 - cv2.countNonZero(white) / white.size,
            np.log1p(edge_um / 1e3 / area_mm2),
            np.log1p(len(spaces_um2) / area_mm2),
            np.log1p(spaces_um2.sum() / max(len(spaces_um2), 1)),
            spaces_um2[spaces_um2 >= _LUMEN_MIN_UM2].sum() / (area_mm2 * 1e6),
            spaces_um2.max(initial=0.0) / (area_mm2 * 1e6),
        ]
    )
