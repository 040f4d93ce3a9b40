"""Nucleus numbers of one tile: how many, how large, how round, how dark, how near to each other.

A quick count for statistics, not the segmentation of ``pathopipe segment``: touching nuclei are parted by shape alone.
Only whole numbers and symmetric filters up to the last divisions, so a turned or flipped tile gives the same nuclei.
"""

from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from pathopipe.embeddings.handcrafted.histogram import histogram
from pathopipe.embeddings.handcrafted.planes import Planes, halve
from pathopipe.stain import STAIN_STEP_OD, STAIN_ZERO, unmix

__all__ = ["NUCLEUS_NAMES", "find_nuclei", "nucleus_features"]

Plane = NDArray[np.uint8]
Labels = NDArray[Any]
"""Whole numbers: uint16, or float32 where a tile has more seeds than uint16 counts."""

_SQUARE = np.ones((3, 3), np.uint8)
_WIDE_SQUARE = np.ones((5, 5), np.uint8)
_CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)

# Optical density of a channel's value in the steps and with the zero of the stain planes.
_DENSITY_OF_VALUE: Plane = np.clip(
    np.rint(STAIN_ZERO - np.log10(np.maximum(np.arange(256), 1) / 255.0) / STAIN_STEP_OD), 0, 254
).astype(np.uint8)

_SURROUNDINGS_PX = 13
"""Side of the window of the local mean at 2 um per pixel: 26 um, three to four nuclei wide."""
_ABOVE_SURROUNDINGS = 3
_LEAST_DENSITY = STAIN_ZERO + 8
"""Paler than 0.08 OD is no nucleus, however pale its surroundings."""
_TISSUE_DENSITY = STAIN_ZERO + 6

_MAX_DEPTH_PX = 14
_PEAK_WINDOW_PX = 15
_PEAK_PERCENT = 75
_GROW_STEPS = 6

_MIN_UM2, _MAX_UM2 = 10.0, 400.0
_SMALL_UM2, _LARGE_UM2 = 25.0, 80.0
"""About a lymphocyte's nucleus, and twice the usual epithelial one."""
_CROWD = 5
_REACH_UM = 15.0

_MEASURES = (
    "area_um2",
    "axis_ratio",
    "ellipse_fit",
    "haematoxylin_od",
    "dab_od",
    "chromatin_od",
    "contrast_od",
    "neighbour_um",
)
_PERCENT = (10, 50, 90)
_ARRANGEMENT = (
    "fifth_neighbour_um",
    "spacing_evenness",
    "alignment_15um",
    "alignment_tile",
    "size_difference_15um_log",
    "large_share",
    "small_share",
)
_N_ARRANGEMENT = len(_ARRANGEMENT)

NUCLEUS_NAMES: tuple[str, ...] = (
    "nucleus_count_log",
    "nucleus_per_mm2_log",
    "nucleus_area_share",
    *(f"nucleus_{m}_{s}" for m in _MEASURES for s in ("mean", "sd", *(f"p{p:02d}" for p in _PERCENT))),
    *(f"nucleus_{arrangement}" for arrangement in _ARRANGEMENT),
    "od_haematoxylin_outside_nuclei",
    "od_eosin_outside_nuclei",
)


def nucleus_features(planes: Planes) -> NDArray[np.float64]:
    """(len(NUCLEUS_NAMES),) numbers of one tile; all but the last two are zero where no nucleus is found."""
    density = _density(planes)
    surroundings = _surroundings(density)
    labels = _part(_nuclear(density, surroundings))
    nuclei = _measure(labels, planes, density, surroundings)
    n = len(nuclei.area_um2)
    area_mm2 = planes.scale.area_mm2
    tissue_share = 1 - cv2.countNonZero(planes.white) / planes.white.size
    area_share = nuclei.area_um2.sum() / max(tissue_share * area_mm2 * 1e6, planes.scale.pixel_um2)
    counts = [np.log1p(n), np.log1p(n / area_mm2), min(area_share, 1.0)]
    neighbour_um, arrangement = _arrangement(nuclei, area_mm2)
    spread = _spread(np.stack([*nuclei.measures, neighbour_um]))
    return np.concatenate([counts, spread, arrangement, _outside(planes, labels)])


def find_nuclei(planes: Planes) -> NDArray[np.int32]:
    """(height, width) of the working grid: 0 outside, one number a nucleus (in any order, with gaps)."""
    density = _density(planes)
    labels = _part(_nuclear(density, _surroundings(density))).astype(np.int32)
    wanted = _of_nuclear_size(np.bincount(labels.ravel()) * planes.scale.pixel_um2)
    wanted[0] = False
    kept: NDArray[np.int32] = np.where(wanted[labels], labels, 0)
    return kept


def _density(planes: Planes) -> Plane:
    """Red optical density: what haematoxylin and DAB absorb and eosin lets pass, so it serves brown nuclei too."""
    density: Plane = cv2.LUT(planes.rgb[0], _DENSITY_OF_VALUE)
    return density


def _surroundings(density: Plane) -> Plane:
    """Mean density within 26 um of each pixel, from pixels of 2 um."""
    height, width = density.shape
    window = (_SURROUNDINGS_PX, _SURROUNDINGS_PX)
    local = cv2.blur(halve(halve(density)), window, borderType=cv2.BORDER_REPLICATE)
    enlarged: Plane = cv2.resize(local, (width, height), interpolation=cv2.INTER_LINEAR_EXACT)
    return enlarged


def _nuclear(density: Plane, surroundings: Plane) -> Plane:
    """(height, width) 1 where denser than the surroundings, and than five eighths from them to the tile's threshold."""
    counts = histogram(halve(density))
    counts[:_TISSUE_DENSITY] = 0
    between = cv2.LUT(surroundings, ((3 * np.arange(256) + 5 * _otsu(counts)) // 8).astype(np.uint8))
    limit = cv2.max(cv2.add(surroundings, float(_ABOVE_SURROUNDINGS)), between)
    limit = cv2.max(limit, float(_LEAST_DENSITY))
    mask = cv2.compare(cv2.blur(density, (3, 3)), limit, cv2.CMP_GT) & np.uint8(1)
    opened: Plane = cv2.morphologyEx(mask, cv2.MORPH_OPEN, _CROSS)
    return opened


def _of_nuclear_size(area_um2: NDArray[np.floating]) -> NDArray[np.bool_]:
    return (area_um2 >= _MIN_UM2) & (area_um2 <= _MAX_UM2)


def _otsu(counts: NDArray[np.float64]) -> int:
    """Half-way between the two classes of least variance in a histogram (Otsu 1979); 0 where it has but one value."""
    below = np.cumsum(counts)
    moment = np.cumsum(counts * np.arange(256))
    n, total = below[-1], moment[-1]
    parted = (below > 0) & (below < n)
    if not parted.any():
        return 0
    between = np.where(parted, (total * below - n * moment) ** 2 / np.where(parted, below * (n - below), 1), 0)
    # The means' midpoint, not the parting byte: between well-parted classes every byte parts equally well.
    best = int(np.argmax(between))
    return int(np.rint((moment[best] / below[best] + (total - moment[best]) / (n - below[best])) / 2))


def _part(mask: Plane) -> Labels:
    """Number the nuclei of a mask; parted where a neck is under three quarters as deep as what it joins.

    The depth of a pixel is the number of erosions it outlives, by a cross and a square in turn (a near-circle). Seeds
    are what is nearly as deep as the deepest pixel around; they grow back within the mask, and where two meet a line
    stays free. Unlike a watershed, nothing here depends on the order in which pixels are visited.
    """
    depth, left = mask.copy(), mask
    for step in range(_MAX_DEPTH_PX):
        left = cv2.erode(left, _CROSS if step % 2 else _SQUARE, borderType=cv2.BORDER_CONSTANT, borderValue=1)
        if not left.any():
            break
        depth += left
    depth = cv2.blur(depth * np.uint8(16), (3, 3), borderType=cv2.BORDER_REPLICATE)
    peak = cv2.dilate(depth, np.ones((_PEAK_WINDOW_PX, _PEAK_WINDOW_PX), np.uint8))
    needed = cv2.LUT(peak, (np.arange(256) * _PEAK_PERCENT // 100).astype(np.uint8))
    seeds = (depth > needed).view(np.uint8) & mask
    n_labels, labels = cv2.connectedComponents(seeds, connectivity=8, ltype=cv2.CV_32S)
    return _grow(labels, n_labels, seeds, mask)


def _grow(labels: NDArray[np.int32], n_labels: int, seeds: Plane, mask: Plane) -> Labels:
    """Grow labels within a mask by a few pixels; a pixel that two labels reach at once stays 0."""
    # Dilating the labels and their counterparts gives the greatest and the least label near a pixel: alike where only
    # one reaches it. Float32, which OpenCV dilates as well, holds whole numbers to 2^24.
    greatest: Labels = labels.astype(np.uint16 if n_labels <= 65535 else np.float32)
    counterpart = (n_labels - greatest) * seeds
    free = mask ^ seeds
    for _ in range(_GROW_STEPS):
        near, near_counterpart = cv2.dilate(greatest, _WIDE_SQUARE), cv2.dilate(counterpart, _WIDE_SQUARE)
        reached = (near > 0).view(np.uint8) & free
        if not reached.any():
            break
        free ^= reached
        reached &= (near + near_counterpart == n_labels).view(np.uint8)
        cv2.copyTo(near, reached, greatest)
        cv2.copyTo(near_counterpart, reached, counterpart)
    return greatest


class _Nuclei(NamedTuple):
    """What is known of each nucleus, in the raster order of their first pixels."""

    centroid_um: NDArray[np.float64]
    """(n, 2) x, y."""
    axis: NDArray[np.float64]
    """(n, 2) direction of the long axis as a vector of unit length at the doubled angle, (0, 0) for a circle."""
    elongation: NDArray[np.float64]
    """(n,) 0 for a circle to 1 for a line."""
    area_um2: NDArray[np.float64]
    """(n,)."""
    measures: tuple[NDArray[np.float64], ...]
    """``_MEASURES`` but for the last."""


def _measure(labels: Labels, planes: Planes, density: Plane, surroundings: Plane) -> _Nuclei:
    """Moments and stain of each nucleus from sums over its pixels: of whole numbers, hence exact in any order."""
    pixels = np.flatnonzero(labels.ravel() > 0)
    label = labels.ravel()[pixels].astype(np.intp)
    wanted = _wanted(label, pixels, planes.scale.pixel_um2)

    def total(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(label, weights=weights)[wanted].astype(np.float64, copy=False)

    def byte(plane: Plane) -> NDArray[np.float64]:
        return plane.ravel()[pixels].astype(np.float64)

    n = np.bincount(label)[wanted].astype(np.float64)
    area_um2 = n * planes.scale.pixel_um2
    y_px = pixels // labels.shape[1]
    x, y = (pixels - y_px * labels.shape[1]).astype(np.float64), y_px.astype(np.float64)
    sum_x, sum_y = total(x), total(y)
    mpp_x, mpp_y = planes.scale.mpp
    # Second moments; a pixel is a square, not a point, which adds 1 / 12.
    xx = ((n * total(x * x) - sum_x**2) / n**2 + 1 / 12) * mpp_x**2
    yy = ((n * total(y * y) - sum_y**2) / n**2 + 1 / 12) * mpp_y**2
    xy = (n * total(x * y) - sum_x * sum_y) / n**2 * mpp_x * mpp_y
    half_sum, half_difference = (xx + yy) / 2, np.sqrt(((xx - yy) / 2) ** 2 + xy**2)

    red = byte(density)
    sum_red = total(red)
    densities = [sum_red, *(total(byte(cv2.LUT(plane, _DENSITY_OF_VALUE))) for plane in planes.rgb[1:])]
    red_od, green_od, blue_od = ((channel / n - STAIN_ZERO) * STAIN_STEP_OD for channel in densities)
    # Unmixing is linear: the stain of a nucleus is that of its mean densities.
    stains = unmix(np.stack([red_od, green_od, blue_od], axis=-1).astype(np.float32)).astype(np.float64)
    return _Nuclei(
        centroid_um=np.stack([sum_x / n * mpp_x, sum_y / n * mpp_y], axis=1),
        axis=np.stack([(xx - yy) / 2, xy], axis=1) / np.maximum(half_difference, 1e-9)[:, None],
        elongation=half_difference / half_sum,
        area_um2=area_um2,
        measures=(
            area_um2,
            np.sqrt(np.maximum(half_sum - half_difference, 0) / (half_sum + half_difference)),
            # An ellipse has the area 4 pi sqrt(det) of its second moments; notches and clumps have less.
            np.minimum(area_um2 / (4 * np.pi * np.sqrt(xx * yy - xy**2)), 1),
            stains[:, 0],
            stains[:, 2],
            np.sqrt(np.maximum(n * total(red * red) - sum_red**2, 0)) / n * STAIN_STEP_OD,
            (sum_red - total(byte(surroundings))) / n * STAIN_STEP_OD,
        ),
    )


def _wanted(label: NDArray[np.intp], pixels: NDArray[np.intp], pixel_um2: float) -> NDArray[np.intp]:
    """Labels of a nucleus' size, in the raster order of their first pixels.

    OpenCV's numbering may differ with its number of threads; the raster order may not.
    """
    area_um2 = np.bincount(label) * pixel_um2
    first = np.zeros(len(area_um2), np.intp)
    first[label[::-1]] = pixels[::-1]  # of repeated indices the last assignment stays, hence backwards
    wanted = np.flatnonzero(_of_nuclear_size(area_um2))
    return wanted[np.argsort(first[wanted])]


def _spread(measures: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean, standard deviation and percentiles of each row of (k, n), row by row; zeros for n = 0."""
    if measures.shape[1] == 0:
        return np.zeros(len(measures) * (2 + len(_PERCENT)))
    ordered = np.sort(measures, axis=1)
    place = np.asarray(_PERCENT) / 100 * (ordered.shape[1] - 1)
    low, high = np.floor(place).astype(np.intp), np.ceil(place).astype(np.intp)
    percentiles = ordered[:, low] + (ordered[:, high] - ordered[:, low]) * (place - low)
    mean = ordered.mean(axis=1, keepdims=True)
    sd = np.sqrt(((ordered - mean) ** 2).mean(axis=1, keepdims=True))
    return np.concatenate([mean, sd, percentiles], axis=1).ravel()


def _arrangement(nuclei: _Nuclei, area_mm2: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance from each nucleus to its nearest in um (n,), and how the nuclei of the tile stand together."""
    n = len(nuclei.area_um2)
    if n == 0:
        return np.zeros(0), np.zeros(_N_ARRANGEMENT)
    large = np.count_nonzero(nuclei.area_um2 > _LARGE_UM2) / n
    small = np.count_nonzero(nuclei.area_um2 < _SMALL_UM2) / n
    doubled = nuclei.axis * nuclei.elongation[:, None]
    # Long nuclei count for more: the direction of a round one means nothing.
    aligned = np.sqrt((doubled.sum(axis=0) ** 2).sum()) / max(nuclei.elongation.sum(), 1e-9)
    tree = cKDTree(nuclei.centroid_um)
    distances = np.asarray(tree.query(nuclei.centroid_um, k=[2, _CROWD + 1])[0], np.float64)
    distances[~np.isfinite(distances)] = 0  # fewer nuclei than neighbours asked for
    # Clark & Evans 1954: 1 for scattered at random, less for clusters, up to 2.15 for a lattice.
    evenness = distances[:, 0].mean() * 2 * np.sqrt(n / (area_mm2 * 1e6))
    # All pairs within reach, not the nearest: of two equally near ones a flipped tile may name the other.
    pairs = tree.query_pairs(_REACH_UM, output_type="ndarray")
    neighbours_aligned = size_difference = 0.0
    if len(pairs):
        one, other = pairs.T
        weight = nuclei.elongation[one] * nuclei.elongation[other]
        cosine = (nuclei.axis[one] * nuclei.axis[other]).sum(axis=1)
        neighbours_aligned = float((weight * cosine).sum() / max(weight.sum(), 1e-9))
        log_area = np.log(nuclei.area_um2)
        size_difference = float(np.abs(log_area[one] - log_area[other]).mean())
    found = [distances[:, 1].mean(), evenness, neighbours_aligned, aligned, size_difference, large, small]
    return distances[:, 0], np.asarray(found)


def _outside(planes: Planes, labels: Labels) -> NDArray[np.float64]:
    """Mean haematoxylin and eosin of the tissue between the nuclei; zeros where there is none."""
    nuclear = halve((labels > 0).view(np.uint8) * np.uint8(255))
    outside = cv2.compare(cv2.max(nuclear, planes.white), 0.0, cv2.CMP_EQ)
    n_px = cv2.countNonZero(outside)
    if not n_px:
        return np.zeros(2)
    sums = [cv2.norm(plane, cv2.NORM_L1, outside) for plane in (planes.haematoxylin[0], planes.eosin[0])]
    return (np.asarray(sums) / n_px - STAIN_ZERO) * STAIN_STEP_OD
