"""The outlines that nuclei can have, in micrometres, and how dark they are."""

import numpy as np
from numpy.typing import NDArray

from pathopipe.synth.noise import stream_rng

__all__ = [
    "CLASSES",
    "ENDOTHELIAL",
    "EPITHELIAL",
    "FIBROBLAST",
    "LONGEST_UM",
    "LYMPHOCYTE",
    "N_VARIANTS",
    "OUTLINES_UM",
    "SEMI_AXES_UM",
]

CLASSES = ("Epithelial", "Lymphocyte", "Fibroblast", "Endothelial")
EPITHELIAL, LYMPHOCYTE, FIBROBLAST, ENDOTHELIAL = range(4)
N_VARIANTS = 20
LONGEST_UM = 8.5
"""No nucleus reaches farther than this from its centre."""
_POINTS = 28

# Long and short semi-axes: mean and spread of each, then how uneven the outline is.
_SIZES = (
    (4.5, 0.5, 2.9, 0.3, 0.06),
    (3.1, 0.35, 2.75, 0.28, 0.06),
    (5.8, 0.8, 1.85, 0.45, 0.08),
    (5.6, 0.6, 1.35, 0.15, 0.05),
)


def _draw_shapes() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rng = stream_rng(0, 1)
    angle = np.arange(_POINTS) * 2 * np.pi / _POINTS
    axes = np.empty((len(CLASSES), N_VARIANTS, 2))
    outlines = np.empty((len(CLASSES), N_VARIANTS, _POINTS, 2))
    for kind, (long, long_spread, short, short_spread, uneven) in enumerate(_SIZES):
        for variant in range(N_VARIANTS):
            a = long + long_spread * float(np.clip(rng.normal(), -2, 2))
            b = min(short + short_spread * float(np.clip(rng.normal(), -2, 2)), a)
            ripple = np.zeros(_POINTS)
            for order in (2, 3, 4, 5):
                ripple += np.clip(rng.normal(), -2, 2) * uneven / order * np.cos(order * angle + rng.uniform(0, 6.28))
            scale = 1 + ripple
            bend = rng.uniform(-0.035, 0.035) if kind in (FIBROBLAST, ENDOTHELIAL) else 0.0
            x = a * scale * np.cos(angle)
            outlines[kind, variant] = np.stack([x, b * scale * np.sin(angle) + bend * (x**2 - a * a / 2)], axis=1)
            axes[kind, variant] = a * 1.02, b * 1.04
    outlines *= np.minimum(1, LONGEST_UM / np.hypot(outlines[..., 0], outlines[..., 1]).max(axis=-1))[..., None, None]
    return axes, outlines


SEMI_AXES_UM, OUTLINES_UM = _draw_shapes()
"""Half the length and width, (classes, variants, 2), and outlines around (0, 0), (classes, variants, points, 2).

The long axis lies along x.
"""
