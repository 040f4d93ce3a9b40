"""What is dark or coloured on a slide but no tissue: black borders and pen marks."""

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.tissue.light import Light
from pathopipe.tissue.parts import Parts, label_parts, square, widen

__all__ = ["find_border", "find_pen", "outside_stains"]


def find_border(light: Light) -> NDArray[np.bool_]:
    """Black margins of a scan: nearly black parts that run along a tenth of the picture's edges or more.

    A margin is widened by two pixels, since resampling and JPEG blur its rim.
    """
    if not light.dim.any():
        return light.dim
    parts = label_parts(light.dim)
    return widen(parts.pick(parts.touching_edge() >= 0.1 * min(light.dim.shape)), 2)


def outside_stains(light: Light) -> NDArray[np.bool_]:
    """Pixels with the colour of no histology stain: green, cyan, yellow, orange, or too pure a blue or red.

    In the plane of colour over grey absorption (u / grey, v / grey), haematoxylin lies at (0.5, 0.4), eosin at
    (0, 1.9) to (-0.5, 1.0), blood at (-0.7, 0.6), DAB at (-0.7, 0.1), a bluish counterstain at (0.6, 0), each after
    Ruifrok & Johnston 2001 or read off slides; mixtures lie between them, so the stains fill a convex patch. Inks lie
    outside: blue at (1, 0.1), green at (0.3, -0.7), yellow at (-2, -1), red at (-0.9, 0.5).
    """
    grey, u, v = light.grey, light.u, light.v
    pure_blue = u > 0.8 * grey
    pure_red = (u < -0.85 * grey) & (v < 1.2 * grey)
    green = v < -0.25 * grey
    return (light.chroma > 0.04) & ~light.dim & (pure_blue | pure_red | green)


def find_pen(light: Light, border: NDArray[np.bool_], foreign: NDArray[np.bool_], pixel_um: float) -> NDArray[np.bool_]:
    """Marker strokes: of one ink, or neutral black.

    A colour that no stain has does not make a pen mark, for there are stains of other colours (trichrome, Alcian
    blue). But a stroke is one dye on glass, so its colour hardly varies, and often its density neither; tissue mixes
    two dyes and varies from pixel to pixel in both.

    Args:
        light: The overview.
        border: (height, width), True on the black margin.
        foreign: (height, width), what :func:`outside_stains` found.
        pixel_um: Micrometres per pixel.

    Returns:
        (height, width), True on ink.
    """
    least_px = 0.005e6 / pixel_um**2
    coloured = (light.chroma > 0.04) & (light.grey > 0.05) & ~light.dim & ~border
    tissue_like = coloured & (light.chroma > 0.25 * light.grey)
    black = (light.grey > 0.35) & ((light.chroma < 0.2 * light.grey) | light.dim) & ~border
    return (
        _find_foreign_ink(light, coloured & foreign, pixel_um, least_px)
        | _find_red_ink(light, coloured, tissue_like, pixel_um, least_px)
        | _find_lone_ink(light, coloured, pixel_um, least_px)
        | _find_black_ink(black, tissue_like, pixel_um, least_px)
    )


def _find_foreign_ink(light: Light, inked: NDArray[np.bool_], pixel_um: float, least_px: float) -> NDArray[np.bool_]:
    """Ink of a colour that no stain has."""
    parts = _label_broad(inked)
    large = parts.pick(parts.n_px >= least_px)
    if not large.any():
        return large
    one_hue, one_density = _evenness(light, large, pixel_um)
    return parts.pick((parts.n_px >= least_px) & (parts.share(one_hue | one_density) > 0.5))


def _find_red_ink(
    light: Light, coloured: NDArray[np.bool_], tissue_like: NDArray[np.bool_], pixel_um: float, least_px: float
) -> NDArray[np.bool_]:
    """Red ink is as red as blood, so it must be of one hue and lie on glass."""
    parts = _label_broad(coloured & (light.u < -0.6 * light.grey) & (light.v < 0.9 * light.grey))
    large = parts.pick(parts.n_px >= least_px)
    if not large.any():
        return large
    one_hue, _ = _evenness(light, large, pixel_um)
    return parts.pick((parts.n_px >= least_px) & (parts.share(one_hue) > 0.8) & (parts.beside(tissue_like) < 0.6))


def _label_broad(mask: NDArray[np.bool_]) -> Parts:
    """Number the parts of a mask; none where no part is three pixels broad anywhere, which is quick to tell."""
    broad = cv2.erode(mask.view(np.uint8), square(3)).any()
    return label_parts(mask if broad else np.zeros_like(mask))


def _find_lone_ink(light: Light, coloured: NDArray[np.bool_], pixel_um: float, least_px: float) -> NDArray[np.bool_]:
    """A mark apart from tissue, of any colour: one dye, evenly laid."""
    parts = label_parts(coloured)
    grey = light.grey[coloured]
    hue_variance = parts.variance(light.u[coloured] / grey, coloured) + parts.variance(
        light.v[coloured] / grey, coloured
    )
    candidate = (parts.n_px >= least_px) & (hue_variance < 0.06**2)
    if not candidate[1:].any():
        return np.zeros(coloured.shape, np.bool_)
    one_hue, one_density = _evenness(light, parts.pick(candidate), pixel_um)
    return parts.pick(candidate & (parts.share(one_hue & one_density) > 0.45))


def _find_black_ink(
    black: NDArray[np.bool_], tissue_like: NDArray[np.bool_], pixel_um: float, least_px: float
) -> NDArray[np.bool_]:
    """Black marks must be broad and lie on glass: lint and edges are thin, pigment and folds lie in tissue."""
    side = 2 * max(round(16 / pixel_um), 1) + 1
    parts = label_parts(cv2.morphologyEx(black.astype(np.uint8), cv2.MORPH_OPEN, square(side)) > 0)
    large = parts.n_px >= least_px
    if not large[1:].any():
        return np.zeros(black.shape, np.bool_)
    return parts.pick(large & (parts.beside(tissue_like & ~black) < 0.6))


def _evenness(light: Light, part: NDArray[np.bool_], pixel_um: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where colour, and where density, hardly varies among the pixels of ``part`` within about 40 um."""
    one_hue, one_density = np.zeros_like(part), np.zeros_like(part)
    left, top, width, height = cv2.boundingRect(part.view(np.uint8))
    box = np.s_[top : top + height, left : left + width]
    side = 2 * max(round(16 / pixel_um), 1) + 1
    weight = part[box].astype(np.float32)
    n = np.maximum(cv2.blur(weight, (side, side)), np.float32(1e-3))

    def mean_and_variance(values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        weighted = values * weight
        mean: NDArray[np.float32] = cv2.blur(weighted, (side, side)) / n
        weighted *= values
        variance: NDArray[np.float32] = cv2.blur(weighted, (side, side)) / n - mean * mean
        return mean, variance

    grey: NDArray[np.float32] = np.maximum(light.grey[box], np.float32(0.02))
    hue_variance: NDArray[np.float32] = (
        mean_and_variance(light.u[box] / grey)[1] + mean_and_variance(light.v[box] / grey)[1]
    )
    mean, variance = mean_and_variance(grey)
    one_hue[box] = hue_variance < 0.035**2
    one_density[box] = variance < (0.14 * mean) ** 2
    return one_hue, one_density
