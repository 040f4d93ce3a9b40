"""How much light each pixel of a bright-field overview absorbs, measured against the slide's own glass."""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["Light", "extremes", "measure_light", "thin_out"]

_FLAT_LEVELS = 6
"""Glass differs by at most this many of 256 levels within 3 x 3 pixels."""
_GLASS_LEAST = 120
"""Darkest channel of glass; a darker slide is dark field."""
_GLASS_TINT = 40
"""Most that the channels of glass differ, in levels: lamps and scanners tint glass, but less than this."""
_ASSUMED_GLASS = 235
"""Glass of a picture that shows none, unless it holds something brighter."""
_DARKEST = 8
"""Level below which a channel is noise; caps the optical density at about 1.5."""
_SAMPLED_PX = 500_000
"""Glass, lighting and noise are measured on about this many pixels."""
_FIT_BLOCKS = 40
"""The brightness of the glass is followed over at most so many blocks along the longer side."""


class Light(NamedTuple):
    """Optical density of an overview against its glass, split into grey and colour; arrays are (height, width).

    Grey absorption (dust, shadow, cover-slip edges, black ink, dense tissue) lies along (1, 1, 1). What is left is the
    colour, and only stains and inks have it; it does not change with the brightness of the lamp.
    """

    grey: NDArray[np.float32]
    """Mean optical density of the three channels."""
    u: NDArray[np.float32]
    """Colour along (1, 0, -1) / sqrt 2: blue above 0, yellow and brown below."""
    v: NDArray[np.float32]
    """Colour along (-1, 2, -1) / sqrt 6: magenta above 0, green below."""
    chroma: NDArray[np.float32]
    """Length of (u, v)."""
    dim: NDArray[np.bool_]
    """Nearly black: too little light for a colour to be told."""
    flat: NDArray[np.bool_]
    """As even as glass within 3 x 3 pixels."""
    glass: tuple[float, float, float]
    """Red, green, blue of the glass."""
    glass_seen: bool
    """The picture shows glass; else its colour is assumed."""
    grey_noise: float
    """Standard deviation of ``grey`` on glass."""
    chroma_noise: float
    """Standard deviation of ``u`` and of ``v`` on glass."""


_AXES = np.array([[1 / 3, 1 / 3, 1 / 3], [2**-0.5, 0, -(2**-0.5)], [-(6**-0.5), 2 * 6**-0.5, -(6**-0.5)]], np.float32)


def extremes(rgb: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Brightest and darkest channel of each pixel, (height, width) each; many times faster than ``max(axis=2)``."""
    red, green, blue = cv2.split(rgb)
    return cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue)


def thin_out(rgb: NDArray[np.uint8]) -> tuple[slice, slice]:
    """Every k-th row and column: about half a million pixels, enough for what concerns the whole picture."""
    step = max(round((rgb.shape[0] * rgb.shape[1] / _SAMPLED_PX) ** 0.5), 1)
    return slice(None, None, step), slice(None, None, step)


def measure_light(rgb: NDArray[np.uint8]) -> Light:
    """Estimate the glass, and each pixel's absorption against it.

    Glass is the brightest mode among even, nearly neutral pixels, so a slide need not show much of it. Pure white is
    not used where there is other glass: that is how unscanned areas read. Uneven lighting is followed by a quadratic
    surface through the glass. Channels brighter than the glass count as glass.

    Args:
        rgb: (height, width, 3).
    """
    brightest, darkest = extremes(rgb)
    level = cv2.transform(rgb, np.full((1, 3), 1 / 3, np.float32)).reshape(rgb.shape[:2])
    square = np.ones((3, 3), np.uint8)
    flat = cv2.morphologyEx(level, cv2.MORPH_GRADIENT, square) <= _FLAT_LEVELS
    few = thin_out(rgb)
    glass, seen = _find_glass(rgb[few], level[few], flat[few], brightest[few], darkest[few])

    tables = -np.log10(np.maximum(np.arange(256.0), _DARKEST)[:, None] / glass)  # (256, 3)
    od = cv2.LUT(rgb, tables.astype(np.float32)[None])
    grey_noise, chroma_noise = 0.0, 0.0
    if seen:
        even = flat & (darkest < 255) & (darkest > _DARKEST)
        surface = _fit_lighting(od[few], even[few])
        if surface is not None:
            od -= cv2.resize(surface, rgb.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        grey_noise, chroma_noise = _measure_noise(od[few], even[few])
    np.maximum(od, 0, out=od)
    grey, u, v = cv2.split(cv2.transform(od, _AXES))
    dim = brightest < 0.25 * max(glass)
    return Light(grey, u, v, cv2.magnitude(u, v), dim, flat, glass, seen, grey_noise, chroma_noise)


def _find_glass(
    rgb: NDArray[np.uint8],
    level: NDArray[np.uint8],
    flat: NDArray[np.bool_],
    brightest: NDArray[np.uint8],
    darkest: NDArray[np.uint8],
) -> tuple[tuple[float, float, float], bool]:
    like_glass = flat & (darkest > _GLASS_LEAST) & (brightest - darkest <= _GLASS_TINT)
    scanned = like_glass & (darkest < 255)
    least = 0.002 * level.size
    counts = np.bincount(level[scanned], minlength=256).astype(np.float64)
    smooth = np.convolve(counts, np.array([1, 2, 3, 2, 1]) / 9, "same")
    if counts.sum() < least:
        if np.count_nonzero(like_glass) >= least:
            return (255.0, 255.0, 255.0), True
        assumed = float(max(_ASSUMED_GLASS, np.percentile(brightest, 99.5)))
        return (assumed, assumed, assumed), False
    is_mode = (smooth == ndimage.maximum_filter1d(smooth, 9)) & (smooth >= 0.1 * smooth.max())
    mode = int(np.flatnonzero(is_mode).max())
    red, green, blue = np.median(rgb[scanned & (cv2.absdiff(level, np.full_like(level, mode)) <= 3)], axis=0).tolist()
    return (red, green, blue), True


def _fit_lighting(od: NDArray[np.float32], even: NDArray[np.bool_]) -> NDArray[np.float32] | None:
    """Fit a quadratic surface to the glass of each channel; None where the glass shows too little of the slide.

    Args:
        od: (height, width, 3) against one glass colour.
        even: (height, width), True where a pixel may be glass.

    Returns:
        (rows, columns, 3) optical density to take off, for blocks that cover the picture.
    """
    height, width = even.shape
    longer = max(height, width)
    if longer < 2 * _FIT_BLOCKS:
        return None
    size = (max(round(width * _FIT_BLOCKS / longer), 1), max(round(height * _FIT_BLOCKS / longer), 1))
    red, green, blue = cv2.split(od)
    spread = cv2.max(cv2.max(red, green), blue) - cv2.min(cv2.min(red, green), blue)
    usable = (even & (spread < 0.03) & (green < 0.3)).astype(np.float32)
    share = cv2.resize(usable, size, interpolation=cv2.INTER_AREA)
    sums = cv2.resize(od * usable[..., None], size, interpolation=cv2.INTER_AREA)
    rows, columns = np.nonzero(share > 0.3)
    # A surface is only trusted within what it was fitted to, so the glass must reach over most of the slide.
    if len(rows) < 24 or np.ptp(rows) < 0.6 * size[1] or np.ptp(columns) < 0.6 * size[0]:
        return None
    values = sums[rows, columns] / share[rows, columns, None]
    design = _quadratic((columns + 0.5) / size[0], (rows + 0.5) / size[1])
    weights = np.ones(len(rows))
    for _ in range(8):
        # Sums by einsum, not by BLAS: its result would depend on how many threads share the work.
        normal = np.einsum("ni,n,nj->ij", design, weights, design) + 1e-6 * np.eye(design.shape[1])
        coefficients = np.linalg.solve(normal, np.einsum("ni,n,nc->ic", design, weights, values))
        fitted = np.einsum("ni,ic->nc", design, coefficients)
        residual = np.abs(values - fitted).mean(axis=1)
        # Tukey's biweight: shadows, cover-slip edges and pale tissue lose their say.
        scale = 4.685 * 1.4826 * max(float(np.median(residual)), 1e-3)
        weights = np.clip(1 - (residual / scale) ** 2, 0, None)
    y, x = np.mgrid[: size[1], : size[0]]
    everywhere = _quadratic((x.ravel() + 0.5) / size[0], (y.ravel() + 0.5) / size[1])
    whole = np.einsum("ni,ic->nc", everywhere, coefficients)
    kept = fitted[weights > 0]
    if not len(kept):
        return None
    whole = np.clip(whole, kept.min(axis=0), kept.max(axis=0))
    surface: NDArray[np.float32] = whole.reshape(size[1], size[0], 3).astype(np.float32)
    return surface


def _quadratic(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    x, y = 2 * x - 1, 2 * y - 1
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)


def _measure_noise(od: NDArray[np.float32], even: NDArray[np.bool_]) -> tuple[float, float]:
    """Spread of grey and of colour over glass, from medians."""
    grey, u, v = (channel[even] for channel in cv2.split(cv2.transform(od, _AXES)))
    chroma = np.hypot(u, v)
    on_glass = (chroma < 0.03) & (np.abs(grey) < 0.05)
    if np.count_nonzero(on_glass) < 16:
        return 0.0, 0.0
    grey = grey[on_glass]
    # The length of a two-dimensional Gaussian has the median 1.1774 sigma.
    return float(1.4826 * np.median(np.abs(grey - np.median(grey)))), float(np.median(chroma[on_glass]) / 1.1774)
