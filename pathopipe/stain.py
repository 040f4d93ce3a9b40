"""H&E stain arithmetic: optical density and unmixing into haematoxylin, eosin and residual."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["HE_VECTORS", "optical_density", "unmix"]

HE_VECTORS: NDArray[np.float32] = np.array(
    [[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]], np.float32
)
"""Optical-density directions (rows: haematoxylin, eosin, DAB; columns: R, G, B).

Source: Ruifrok & Johnston 2001, Analytical and Quantitative Cytology and Histology 23(4), table 1.
"""

# 256 values are all that a uint8 channel can hold, so the logarithm is looked up, not computed.
_OD_OF_VALUE: NDArray[np.float32] = (-np.log10(np.maximum(np.arange(256), 1) / 255.0)).astype(np.float32)


def optical_density(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Optical density of uint8 RGB (..., 3): ``-log10(max(value, 1) / 255)``, 0 for white, 2.41 for black."""
    return _OD_OF_VALUE[rgb]


def unmix(od: NDArray[np.float32], vectors: NDArray[np.float32] = HE_VECTORS) -> NDArray[np.float32]:
    """Split optical density (..., 3) into stain amounts (..., 3) in the order of ``vectors``' rows.

    The vectors are scaled to unit length first, so an amount is in optical-density units. Each output is a fixed
    sum of three products, never a matrix product of the whole array, so that a pixel's result does not depend on its
    neighbours.
    """
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    inverse = np.linalg.inv(unit.astype(np.float64)).astype(np.float32)
    r, g, b = od[..., 0], od[..., 1], od[..., 2]
    return np.stack([r * inverse[0, k] + g * inverse[1, k] + b * inverse[2, k] for k in range(3)], axis=-1)
