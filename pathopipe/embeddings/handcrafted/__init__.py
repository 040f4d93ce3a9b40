"""Handcrafted encoder: colour, stain, texture and nucleus statistics of a tile; needs no weights and no GPU."""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from pathopipe.embeddings.handcrafted.colour import COLOUR_NAMES, colour_features
from pathopipe.embeddings.handcrafted.nuclei import NUCLEUS_NAMES, nucleus_features
from pathopipe.embeddings.handcrafted.planes import Planes, Scale, plan_scale, planes_of
from pathopipe.embeddings.handcrafted.texture import TEXTURE_NAMES, texture_features
from pathopipe.errors import UsageError

__all__ = ["FEATURE_NAMES", "HANDCRAFTED_VERSION", "handcrafted_features"]

HANDCRAFTED_VERSION = 1
"""Raised whenever a number changes; kept with the embeddings, so that versions are never mixed."""

_GROUPS: tuple[tuple[tuple[str, ...], Callable[[Planes], NDArray[np.float64]]], ...] = (
    (COLOUR_NAMES, colour_features),
    (TEXTURE_NAMES, texture_features),
    (NUCLEUS_NAMES, nucleus_features),
)

FEATURE_NAMES: tuple[str, ...] = tuple(name for names, _ in _GROUPS for name in names)
"""One name a column; ``_um``, ``_um2``, ``_mm2`` and ``od`` are units, ``_log`` is log(1 + value) unless said."""

_POOLS: dict[int, ThreadPoolExecutor] = {}
# A forked child inherits the pools but not their threads, and would wait for them for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOLS.clear)


def handcrafted_features(
    images: NDArray[np.uint8], mpp: tuple[float, float], *, threads: int = 1
) -> NDArray[np.float32]:
    """Describe tiles in numbers.

    A row depends on its own tile and ``mpp`` alone: the same bytes for any batch, order and number of threads.

    Args:
        images: (n, height, width, 3) uint8 RGB.
        mpp: Micrometres per pixel, x then y. Tiles are brought to 0.5 um/px first, so that the same tissue gives
            close numbers at another resolution; tiles coarser than 1 um/px are enlarged no more than twice, and
            their scales in micrometres stretch accordingly.
        threads: Tiles worked on at once.

    Returns:
        (n, len(FEATURE_NAMES)) float32, always finite.

    Raises:
        UsageError: Images of another shape or type, or a resolution or thread count that is not positive.
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or 0 in images.shape[1:3]:
        raise UsageError(f"handcrafted wants uint8 (n, height, width, 3), got {images.dtype} {images.shape}")
    if not all(math.isfinite(side) and side > 0 for side in mpp):
        raise UsageError(f"handcrafted needs micrometres per pixel (x, y) above 0, got {mpp}")
    if threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    n, height, width, _ = images.shape
    scale = plan_scale(height, width, mpp)
    features = np.empty((n, len(FEATURE_NAMES)), np.float32)

    def fill(rows: range) -> None:
        for row in rows:
            features[row] = _features_of(images[row], scale)

    if threads == 1 or n < 2:
        fill(range(n))
    else:
        # Every thread takes every threads-th tile, so that a stretch of empty tiles is shared out.
        list(_pool(threads).map(fill, [range(k, n, threads) for k in range(min(threads, n))]))
    return features


def _features_of(tile: NDArray[np.uint8], scale: Scale) -> NDArray[np.float64]:
    planes = planes_of(tile, scale)
    return np.concatenate([measure(planes) for _, measure in _GROUPS])


def _pool(threads: int) -> ThreadPoolExecutor:
    """The pool of this size, made once: starting threads for each batch would cost more than small batches do."""
    pool = _POOLS.get(threads)
    if pool is None:
        pool = _POOLS.setdefault(threads, ThreadPoolExecutor(threads, thread_name_prefix="handcrafted"))
    return pool
