"""The classical nucleus finder: stain density against its surroundings, parted by shape; no weights, no GPU."""

from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import UsageError
from pathopipe.records import ObjectClass
from pathopipe.segmentation.model import Instances, Layer
from pathopipe.segmentation.parting import NucleusSize, part_nuclei, parting_reach_px
from pathopipe.stain import STAIN_STEP_OD

__all__ = ["CLASSICAL_VERSION", "ClassicalNuclei", "find_nuclei"]

CLASSICAL_VERSION: Final = 1
"""Raised when the same pixels give other nuclei."""

Plane = NDArray[np.uint8]
Floats = NDArray[np.float32]

_NUCLEUS = ObjectClass(name="Nucleus", color=(70, 90, 220))

_MOST_DENSITY = 130
"""Below a value of 13 the logarithm blows grain up: a black scan border would be full of specks."""

# Red is what haematoxylin and DAB absorb and eosin lets pass: blue and brown nuclei show, red cells and muscle do not.
_DENSITY_OF_RED: Plane = np.clip(
    np.rint(-np.log10(np.maximum(np.arange(256), 1) / 255.0) / STAIN_STEP_OD), 0, _MOST_DENSITY
).astype(np.uint8)

_CORE_PX, _MARGIN_PX = 512, 64
_LEAST_MPP, _MOST_MPP = 0.245, 0.6
"""Finer, even the wide margin no longer holds what is looked at; coarser, a lymphocyte is a handful of pixels."""
_SMOOTH_UM = 0.4
_COARSE_UM = 1.0
"""Pixel of the grid on which surroundings are measured."""
_LOCAL_UM = 7.0
"""Half the side of the square in which a pixel is set against tissue and nuclei."""
_WIDE_UM = 15.0
"""Half the side of the square whose nuclei say how dark one ought to be at least."""
_MASS_UM = 19.0
"""Side of a square that no nucleus fills."""
_TISSUE = 6
"""Density (hundredths of OD) below which a pixel is glass, not background of nuclei."""
_WIDE_SHARE = 0.55
_PRIOR = 0.02
"""Weight of the local mean in that of either class, so that a class without pixels has a mean too."""
_MOST_EXCESS = 40
_NUCLEUS_SIGNAL = 128


class ClassicalNuclei:
    """Finds nuclei by density and shape; a :class:`~pathopipe.segmentation.model.Model`.

    ``maps`` turns red optical density into a signal: 0 is the tissue around (within 7 um), 128 the nuclei around.
    ``instances`` parts it (:mod:`~pathopipe.segmentation.parting`). One layer, ``nuclei``, of one class, ``Nucleus``,
    without probabilities. Whole numbers, or sums of them: the same nuclei for any batch, region and thread count.

    Args:
        mpp: Micrometres per working pixel, 0.245 to 0.6.
        dark_field: Nuclei are brighter than their surroundings (fluorescence), in whichever channel is brightest.
        contrast_od: Least density of a nucleus above its surroundings, in OD; in dark field, in hundredths of half
            the channel's range. Lower finds paler nuclei and more that are none.
        size: What counts as a nucleus.

    Raises:
        UsageError: An argument is out of range.
    """

    def __init__(
        self,
        *,
        mpp: float = 0.5,
        dark_field: bool = False,
        contrast_od: float = 0.12,
        size: NucleusSize | None = None,
    ) -> None:
        if not _LEAST_MPP <= mpp <= _MOST_MPP:
            raise UsageError(
                f"classical nuclei: mpp must lie between {_LEAST_MPP} and {_MOST_MPP} um per pixel, got {mpp}"
            )
        if not 0.01 <= contrast_od <= 2:
            raise UsageError(f"classical nuclei: contrast_od must lie between 0.01 and 2, got {contrast_od}")
        self.layers: tuple[Layer, ...] = (Layer(name="nuclei", classes=(_NUCLEUS,)),)
        self.mpp = mpp
        self.core_px = _CORE_PX
        self.margin_px = _MARGIN_PX if mpp >= 2 * _LEAST_MPP else 2 * _MARGIN_PX
        self.size = size if size is not None else NucleusSize()
        self.overlap_px = 0
        self.categorical: tuple[int, ...] = ()
        self.halo_px = parting_reach_px(mpp, self.size)
        self.batch_size = 4
        self._dark_field = dark_field
        self._contrast = contrast_od / STAIN_STEP_OD
        self.identity: dict[str, Any] = {
            "name": "classical",
            "version": CLASSICAL_VERSION,
            "mpp": mpp,
            "dark_field": dark_field,
            "contrast_od": contrast_od,
            "min_um2": self.size.min_um2,
            "max_um2": self.size.max_um2,
            "max_extent_um": self.size.max_extent_um,
            "usual_um2": self.size.usual_um2,
        }

    def maps(self, windows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(n, side, side, 3) RGB -> (n, core, core, 1) signal."""
        inner = slice(self.margin_px, self.margin_px + self.core_px)
        maps = np.empty((len(windows), self.core_px, self.core_px, 1), np.uint8)
        for window, out in zip(windows, maps, strict=True):
            out[..., 0] = self._signal(window)[inner, inner]
        return maps

    def instances(self, maps: NDArray[np.uint8]) -> dict[str, Instances]:
        """(height, width, 1) signal -> the nuclei, in the order of their first pixels."""
        labels = part_nuclei(np.ascontiguousarray(maps[..., 0]), self.mpp, self.size)
        n = int(labels.max(initial=0))
        return {"nuclei": Instances(labels, np.zeros(n, np.uint8), np.full(n, np.nan, np.float32))}

    def _signal(self, rgb: Plane) -> Plane:
        density = self._density(rgb)
        height, width = density.shape
        factor = max(round(_COARSE_UM / self.mpp), 1)
        coarse = cv2.resize(density, (width // factor, height // factor), interpolation=cv2.INTER_AREA)
        background, span = _surroundings(coarse, self.mpp * factor, self._contrast)
        smooth = cv2.GaussianBlur(density, (0, 0), _SMOOTH_UM / self.mpp)
        signal: Floats = smooth.astype(np.float32)
        signal -= cv2.resize(background, (width, height), interpolation=cv2.INTER_LINEAR)
        signal *= _NUCLEUS_SIGNAL
        signal /= cv2.resize(span, (width, height), interpolation=cv2.INTER_LINEAR)
        return np.clip(signal, 0, 255, out=signal).astype(np.uint8)

    def _density(self, rgb: Plane) -> Plane:
        if self._dark_field:
            brightest: Plane = rgb.max(axis=-1)
            # Halved, a bright nucleus has about the density of a well-stained one.
            return np.right_shift(brightest, 1, dtype=np.uint8)
        density: Plane = cv2.LUT(np.ascontiguousarray(rgb[..., 0]), _DENSITY_OF_RED)
        return density


def _surroundings(coarse: Plane, mpp: float, least_span: float) -> tuple[Floats, Floats]:
    """Density of the background at each pixel, and how far nuclei rise above it.

    Pixels within ``_LOCAL_UM`` are split at the mean of the tissue among them into a paler and a darker class. Where
    there is no nucleus the two differ by grain alone; hence nuclei are expected to rise by at least ``_WIDE_SHARE`` of
    the strong rises within ``_WIDE_UM``, and by ``least_span`` anywhere.
    """

    def local(plane: NDArray[Any], reach_um: float) -> Floats:
        # Sums of whole numbers, in double precision within OpenCV: exact, so no pixel depends on where a window began.
        side = 2 * round(reach_um / mpp) + 1
        total: Floats = cv2.boxFilter(plane, cv2.CV_32F, (side, side), normalize=False, borderType=cv2.BORDER_REPLICATE)
        return total

    tissue = (coarse >= _TISSUE).view(np.uint8)
    value = coarse * tissue
    n, total = local(tissue, _LOCAL_UM), local(value, _LOCAL_UM)
    mean = total / np.maximum(n, 1)
    darker = (coarse > mean).view(np.uint8) & tissue
    n_darker, total_darker = local(darker, _LOCAL_UM), local(value * darker, _LOCAL_UM)
    prior = np.float32(_PRIOR) * np.maximum(n, 1)
    high = (total_darker + prior * mean) / (n_darker + prior)
    low: Floats = (total - total_darker + prior * np.minimum(mean, 20)) / (n - n_darker + prior)
    # What is dark over a larger square than any nucleus (ink, folds, the scan's border) is background too, or its rim
    # would be a chain of nuclei.
    side = 2 * round(_MASS_UM / 2 / mpp) + 1
    mass = cv2.morphologyEx(coarse, cv2.MORPH_OPEN, np.ones((side, side), np.uint8))
    low = np.maximum(low, mass)
    # The mean rise, each pixel weighted by the cube of its own: that of the nuclei, however few they are. Capped, or
    # one brown nucleus would hide the blue ones around.
    rise = np.minimum(cv2.subtract(coarse, np.rint(low).astype(np.uint8)) * darker, _MOST_EXCESS)
    cubes = cv2.LUT(rise, (np.arange(256.0) ** 3).astype(np.float32))
    fourths = cv2.LUT(rise, (np.minimum(np.arange(256.0), _MOST_EXCESS) ** 4).astype(np.float32))
    strong = local(fourths, _WIDE_UM) / (local(cubes, _WIDE_UM) + 1)
    span: Floats = np.maximum(np.maximum(high - low, np.float32(least_span)), np.float32(_WIDE_SHARE) * strong)
    return low, span


def find_nuclei(rgb: NDArray[np.uint8], mpp: float, model: ClassicalNuclei | None = None) -> NDArray[np.int32]:
    """Find the nuclei of an image that is no slide: a tile, a crop, a field of view.

    Args:
        rgb: (height, width, 3).
        mpp: Micrometres per pixel of the image.
        model: ``ClassicalNuclei()`` where not given.

    Returns:
        (height, width) 0 for background, nuclei 1 to n, at the image's own resolution.

    Raises:
        UsageError: The image is not RGB or empty, or ``mpp`` is not a positive number.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or not rgb.size:
        raise UsageError(f"find_nuclei: wants uint8 RGB (height, width, 3), got {rgb.dtype} {rgb.shape}")
    if not (np.isfinite(mpp) and mpp > 0):
        raise UsageError(f"find_nuclei: mpp must be a positive number of um per pixel, got {mpp}")
    model = model if model is not None else ClassicalNuclei()
    height, width = rgb.shape[:2]
    factor = mpp / model.mpp
    work_size = (max(round(width * factor), 1), max(round(height * factor), 1))
    work = rgb
    if work_size != (width, height):
        work = cv2.resize(rgb, work_size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    signal = _signal_of_image(work, model)
    labels = model.instances(signal)["nuclei"].labels
    return _resized_labels(labels, height, width)


def _signal_of_image(rgb: Plane, model: ClassicalNuclei) -> Plane:
    """Maps of an image of any size, window by window; beyond its edge it is mirrored."""
    height, width = rgb.shape[:2]
    core, margin = model.core_px, model.margin_px
    rows, columns = -(-height // core), -(-width // core)
    far = (margin + rows * core - height, margin + columns * core - width)
    padded = np.pad(rgb, ((margin, far[0]), (margin, far[1]), (0, 0)), mode="symmetric")
    signal = np.empty((rows * core, columns * core, 1), np.uint8)
    for y in range(0, rows * core, core):
        for x in range(0, columns * core, core):
            window = padded[y : y + core + 2 * margin, x : x + core + 2 * margin]
            signal[y : y + core, x : x + core] = model.maps(window[None])[0]
    return signal[:height, :width]


def _resized_labels(labels: NDArray[np.int32], height_px: int, width_px: int) -> NDArray[np.int32]:
    """Labels at another size; enlarged outlines are smooth, not stairs of the coarser pixels."""
    if labels.shape == (height_px, width_px):
        return labels
    size = (width_px, height_px)
    # Float32 holds whole numbers to 2**24, more nuclei than an image in memory has.
    nearest = cv2.resize(labels.astype(np.float32), size, interpolation=cv2.INTER_NEAREST)
    if height_px > labels.shape[0]:
        share = cv2.resize((labels > 0).astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
        reach = -(-height_px // labels.shape[0])
        around = cv2.dilate(nearest, np.ones((2 * reach + 1, 2 * reach + 1), np.uint8))
        nearest = np.where(share >= 0.5, np.where(nearest > 0, nearest, around), 0)
    # An object of a few pixels may be gone: 1 to n again.
    resized: NDArray[np.int32] = np.unique(nearest.astype(np.int32), return_inverse=True)[1].reshape(nearest.shape)
    if nearest.min() > 0:
        resized += 1
    return resized.astype(np.int32)
