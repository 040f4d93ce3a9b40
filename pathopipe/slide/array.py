"""A slide in memory: any (H, W, 3) array that can be sliced; for tests, drawn slides and plain images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathopipe.geometry import Region
from pathopipe.records import MppEvidence, SlideInfo
from pathopipe.slide.base import check_region, level_corner, levels_from_sizes, paste
from pathopipe.slide.fingerprint import fingerprint_array

__all__ = ["ArraySlide"]


class ArraySlide:
    """A slide whose pixels are arrays.

    Args:
        array: (H, W, 3) uint8 RGB, NumPy or anything with ``shape`` that slices to one.
        mpp: Micrometres per pixel, one for both axes or (x, y); None where it is not known.
        slide_id: Name of the slide.
        levels: Coarser levels, finest first, each like ``array``; ``array`` is level 0.
        path: Where the pixels came from, for messages.
        mpp_source: What ``mpp`` is recorded as coming from.
    """

    def __init__(
        self,
        array: Any,
        *,
        mpp: float | tuple[float, float] | None,
        slide_id: str,
        levels: Sequence[Any] = (),
        path: Path | None = None,
        mpp_source: str = "given",
    ) -> None:
        self._arrays = (array, *levels)
        for level in self._arrays:
            if len(level.shape) != 3 or level.shape[2] != 3 or 0 in level.shape or level.dtype != np.uint8:
                raise ValueError(f"{slide_id}: wanted a (H, W, 3) uint8 array, got {level.dtype} {tuple(level.shape)}")
        sizes = [(int(level.shape[1]), int(level.shape[0])) for level in self._arrays]
        both = None if mpp is None else mpp if isinstance(mpp, tuple) else (mpp, mpp)
        self._closed = False
        self._info = SlideInfo(
            slide_id=slide_id,
            path=path if path is not None else Path(slide_id),
            reader="array",
            vendor="array",
            dims_l0=sizes[0],
            levels=levels_from_sizes(sizes),
            size_bytes=sizes[0][0] * sizes[0][1] * 3,
            fingerprint=fingerprint_array(array),
            mpp=both,
            mpp_evidence=() if both is None else (MppEvidence(mpp_source, *both, used=True),),
        )

    @property
    def info(self) -> SlideInfo:
        """What is known without reading pixels."""
        return self._info

    def read(self, region: Region) -> NDArray[np.uint8]:
        """Read one region, (height_px, width_px, 3) uint8, white outside the array."""
        if self._closed:
            raise ValueError(f"{self._info.slide_id}: the slide was closed")
        level = check_region(self._info, region)
        x, y = level_corner(level, region)
        left, right = max(x, 0), min(x + region.width_px, level.width_px)
        top, bottom = max(y, 0), min(y + region.height_px, level.height_px)
        canvas = np.full((region.height_px, region.width_px, 3), 255, np.uint8)
        if left < right and top < bottom:
            paste(canvas, np.asarray(self._arrays[region.level][top:bottom, left:right]), left - x, top - y)
        return canvas

    def close(self) -> None:
        """Let go of the arrays."""
        self._closed = True
        self._arrays = ()
