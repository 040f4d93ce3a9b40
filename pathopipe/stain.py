"""H&E stain arithmetic: optical density and unmixing into haematoxylin, eosin and residual, and back to RGB."""

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "HE_VECTORS",
    "STAIN_STEP_OD",
    "STAIN_ZERO",
    "mix",
    "optical_density",
    "rgb_of_density",
    "stain_bytes",
    "unmix",
]

HE_VECTORS: NDArray[np.float32] = np.array(
    [[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]], np.float32
)
"""Optical-density directions (rows: haematoxylin, eosin, DAB; columns: R, G, B).

Source: Ruifrok & Johnston 2001, Analytical and Quantitative Cytology and Histology 23(4), table 1.
"""

STAIN_STEP_OD = 0.01
"""Optical density of one step of :func:`stain_bytes`."""

STAIN_ZERO = 25
"""Byte that stands for no stain in :func:`stain_bytes`; lower bytes are negative amounts (of another stain)."""

# 256 values are all that a uint8 channel can hold, so the logarithm is looked up, not computed.
_OD_OF_VALUE: NDArray[np.float32] = (-np.log10(np.maximum(np.arange(256), 1) / 255.0)).astype(np.float32)

# Sixteenths of a step: three terms of at most 7239 each stay within int16, and rounding costs under 0.1 step.
_FRACTION_BITS = 4


def optical_density(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Optical density of uint8 RGB (..., 3): ``-log10(max(value, 1) / 255)``, 0 for white, 2.41 for black."""
    return _OD_OF_VALUE[rgb]


def rgb_of_density(od: NDArray[np.floating]) -> NDArray[np.uint8]:
    """uint8 RGB of optical density (..., 3), rounded; the inverse of :func:`optical_density` for values 1 to 255."""
    return np.clip(np.rint(255.0 * np.power(10.0, -od.astype(np.float64))), 0, 255).astype(np.uint8)


def unmix(od: NDArray[np.float32], vectors: NDArray[np.float32] = HE_VECTORS) -> NDArray[np.float32]:
    """Split optical density (..., 3) into stain amounts (..., 3) in the order of ``vectors``' rows.

    The vectors are scaled to unit length first, so an amount is in optical-density units. Each output is a fixed
    sum of three products, never a matrix product of the whole array, so that a pixel's result does not depend on its
    neighbours.
    """
    inverse = _inverse(vectors).astype(np.float32)
    r, g, b = od[..., 0], od[..., 1], od[..., 2]
    return np.stack([r * inverse[0, k] + g * inverse[1, k] + b * inverse[2, k] for k in range(3)], axis=-1)


def mix(amounts: NDArray[np.float32], vectors: NDArray[np.float32] = HE_VECTORS) -> NDArray[np.float32]:
    """Optical density (..., 3) of stain amounts (..., 3): the inverse of :func:`unmix`, summed in as fixed an order."""
    unit = _unit(vectors).astype(np.float32)
    first, second, third = amounts[..., 0], amounts[..., 1], amounts[..., 2]
    return np.stack([first * unit[0, c] + second * unit[1, c] + third * unit[2, c] for c in range(3)], axis=-1)


def stain_bytes(rgb: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Haematoxylin, eosin and DAB of uint8 RGB (height, width, 3) as three planes of bytes.

    A byte is ``STAIN_ZERO + amount / STAIN_STEP_OD``, kept within 0 to 254 (-0.25 to 2.29 OD); 255 is left free for
    callers to mark pixels with. Amounts are those of :func:`unmix` with ``HE_VECTORS`` to within 0.6 step. The
    arithmetic is of integers alone, so a pixel gives the same byte on every machine, at a quarter of the time.
    """
    channels = cv2.split(rgb)
    planes = []
    for tables in _STAIN_TABLES:
        total = cv2.LUT(channels[0], tables[0])
        total += cv2.LUT(channels[1], tables[1])
        total += cv2.LUT(channels[2], tables[2])
        total >>= _FRACTION_BITS
        np.clip(total, 0, 254, out=total)
        planes.append(total.astype(np.uint8))
    return planes[0], planes[1], planes[2]


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    length: NDArray[np.float64] = np.sqrt((wide * wide).sum(axis=1, keepdims=True))
    return wide / length


def _inverse(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.linalg.inv(_unit(vectors)).astype(np.float64)


def _stain_tables() -> NDArray[np.int16]:
    """(stain, channel, 256): what one channel's value adds to one stain, in sixteenths of a step."""
    fine = (1 << _FRACTION_BITS) / STAIN_STEP_OD
    tables = np.rint(_inverse(HE_VECTORS).T[:, :, None] * _OD_OF_VALUE.astype(np.float64) * fine)
    # The zero point, and half a step so that the shift rounds instead of cutting off.
    tables[:, 0] += (STAIN_ZERO << _FRACTION_BITS) + (1 << (_FRACTION_BITS - 1))
    return tables.astype(np.int16)


_STAIN_TABLES = _stain_tables()
