"""Periodic textures of stroma, fine grain and glass, rendered once."""

import functools
from typing import Any

import cv2
import numpy as np
import scipy.fft
from numpy.typing import NDArray

from pathopipe.synth.noise import stream_rng

__all__ = ["PERIOD_UM", "fine_grain", "glass_noise", "tissue_texture"]

PERIOD_UM = 320.0
_REFERENCE_PX = 640
_REACH_UM = 3 * PERIOD_UM


@functools.lru_cache(maxsize=1)
def _reference() -> NDArray[np.uint8]:
    """The textures of stroma at 0.5 um per pixel, periodic, fibres along x: (640, 640, 4).

    Eosin density (255 is 1) of dense and of loose stroma, what shows through clefts (255 is all), haematoxylin of the
    ground (255 is all of it).
    """
    rng = stream_rng(2, 1)
    n = _REFERENCE_PX
    fy = (np.fft.fftfreq(n)[:, None] * n / PERIOD_UM).astype(np.float32)  # cycles per micrometre
    fx = (np.fft.rfftfreq(n)[None, :] * n / PERIOD_UM).astype(np.float32)
    sharp = np.exp(-0.12 * (fx**2 + fy**2))

    def noise(across_um: float, along_um: float, fall: float) -> NDArray[np.float32]:
        """Filtered white noise, unit variance: flat to the given lengths, then falling as a power."""
        white = scipy.fft.rfft2(rng.standard_normal((n, n), np.float32))
        shape = (1 + (fy * across_um) ** 2 + (fx * along_um) ** 2) ** (-fall / 2) * sharp
        shape[0, 0] = 0
        field = scipy.fft.irfft2(white * shape, (n, n))
        result: NDArray[np.float32] = field / field.std()
        return result

    wavy, sway = noise(30.0, 60.0, 4.0), noise(45.0, 90.0, 4.0)
    row, column = np.meshgrid(np.arange(n, dtype=np.float32), np.arange(n, dtype=np.float32), indexing="ij")

    def waved(field: NDArray[np.float32]) -> NDArray[np.float32]:
        """Bend straight fibres into waves."""
        bent: NDArray[np.float32] = cv2.remap(
            field, column + 2 * sway, row + 7 * wavy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP
        )
        return bent

    bundles = 1 - 2 * np.abs(noise(10.0, 120.0, 3.0))
    fibre = _spread(waved(bundles + 0.55 * noise(2.2, 36.0, 2.6)), 1, 99)
    cleft = _spread(waved(noise(10.0, 60.0, 3.2)), 0.5, 99.5)
    bubbles = _spread(-np.abs(noise(13.0, 16.0, 3.4)) - 0.7 * np.abs(noise(8.0, 14.0, 3.0)), 1, 99.8)
    dense = 0.12 + 0.38 * fibre**1.3
    loose = 0.02 + 0.30 * (1 - (1 - bubbles) ** 2) * (0.55 + 0.7 * fibre)
    gap = 1 - 0.9 * np.clip((cleft - 0.76) / 0.07, 0, 1)
    ground = 0.35 + 0.65 * _spread(noise(8.0, 16.0, 2.6), 1, 99)
    return np.stack([np.clip(p * 255 + 0.5, 0, 255).astype(np.uint8) for p in (dense, loose, gap, ground)], axis=-1)


def _spread(field: NDArray[Any], low: float, high: float) -> NDArray[np.float32]:
    """A field stretched so that two percentiles become 0 and 1."""
    bottom, top = np.percentile(field[::3, ::3], [low, high])
    result: NDArray[np.float32] = np.clip((field - bottom) / (top - bottom), 0, 1)
    return result


@functools.lru_cache(maxsize=4)
def tissue_texture(mpp: float) -> tuple[NDArray[np.uint8], float]:
    """The textures at a resolution, and the micrometres per pixel that they have exactly: (side, side, 4) uint8.

    Three periods wide, so that a warped block of half a millimetre never has to wrap.
    """
    side = int(np.clip(round(PERIOD_UM / mpp), 8, _REFERENCE_PX))
    one = _reference()
    if side < _REFERENCE_PX:
        # Resized with a border of one more period, so that the period stays seamless.
        three = np.tile(one, (3, 3, 1))
        one = cv2.resize(three, (3 * side, 3 * side), interpolation=cv2.INTER_AREA)[side : 2 * side, side : 2 * side]
    repeats = max(3, -(-1536 // side))
    return np.tile(one, (repeats, repeats, 1)), PERIOD_UM / side


@functools.lru_cache(maxsize=4)
def fine_grain(side_px: int) -> NDArray[np.uint8]:
    """Grain of a pixel or two, to be multiplied in: (side, side), mean 200 of 255."""
    noise = stream_rng(2, 3).standard_normal((side_px, side_px), np.float32)
    soft = cv2.GaussianBlur(noise, (0, 0), 0.9) + 1.6 * cv2.GaussianBlur(noise[::-1], (0, 0), 2.2)
    result: NDArray[np.uint8] = np.clip(200 + 15 * soft / soft.std(), 0, 255).astype(np.uint8)
    return result


@functools.lru_cache(maxsize=4)
def glass_noise(side_px: int) -> NDArray[np.float32]:
    """Sensor noise and the faint unevenness of glass as a natural exponent: (side, side), mean 0."""
    rng = stream_rng(2, 2)
    noise = rng.standard_normal((side_px, side_px), np.float32)
    soft = cv2.GaussianBlur(noise, (0, 0), 0.8)
    broad = cv2.resize(rng.standard_normal((8, 8), np.float32), (side_px, side_px), interpolation=cv2.INTER_CUBIC)
    # Blocks lie side by side: the broad part must be gone at their edges.
    window = np.sin(np.pi * (np.arange(side_px, dtype=np.float32) + 0.5) / side_px) ** 0.5
    result: NDArray[np.float32] = 0.0065 * soft / soft.std() + 0.0012 * broad * window[:, None] * window
    return result
