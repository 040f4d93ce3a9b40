"""How well found objects agree with true ones: Dice, AJI, PQ, F1, and the figures of the GlaS contest.

Every figure begins with :func:`overlap`, which counts once how many pixels each true object shares with each found
one. What follows are sums that can be added over images (``a + b``), each with its figures as properties: the figure of
one image and the figure pooled over many come from the same numbers. A figure is NaN where it is not defined, and is
then left out of means; each docstring says when. No figure depends on how objects are numbered: they are taken in the
order of their first pixel, row by row, wherever a tie must be broken.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Final, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching
from scipy.spatial import cKDTree

from pathopipe.errors import UsageError

__all__ = [
    "CUSTOMARY_RADIUS_UM",
    "Counts",
    "GlandSums",
    "Objects",
    "Overlap",
    "Panoptic",
    "PixelSums",
    "Tally",
    "TypeCounts",
    "aji",
    "aji_plus",
    "centroid_pairs",
    "check_labels",
    "count_r2",
    "detection",
    "gland_sums",
    "overlap",
    "panoptic",
    "panoptic_by_class",
    "pixels",
    "tally",
    "type_counts",
]

CUSTOMARY_RADIUS_UM: Final = 3.0
"""How far a found centroid may lie from the true one: 12 px at 0.25 um/px (Graham et al. 2019), 6 px at 0.5 um/px."""


# ---------------------------------------------------------------------------------------------------------------------
# Label images and their overlap
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Objects:
    """The objects of one label image, in the order of their first pixel, row by row."""

    numbers: NDArray[np.int64]
    """(n,) the label of each object in the image."""
    area_px: NDArray[np.int64]
    """(n,)"""
    centroid_px: NDArray[np.float64]
    """(n, 2) x, y; the centre of the first pixel is (0.5, 0.5)."""
    rows: NDArray[np.int32]
    """(H, W) which object a pixel belongs to, -1 on background."""

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Which true object shares how many pixels with which found one; pairs that share none are left out."""

    truth: Objects
    predicted: Objects
    truth_row: NDArray[np.int64]
    """(k,) index into ``truth``; the pairs are sorted by it, then by ``predicted_row``."""
    predicted_row: NDArray[np.int64]
    """(k,) index into ``predicted``."""
    shared_px: NDArray[np.int64]
    """(k,) at least 1."""

    @property
    def union_px(self) -> NDArray[np.int64]:
        """(k,) pixels of either object of a pair."""
        return self.truth.area_px[self.truth_row] + self.predicted.area_px[self.predicted_row] - self.shared_px

    @property
    def iou(self) -> NDArray[np.float64]:
        """(k,) intersection over union, above 0, at most 1."""
        return self.shared_px / self.union_px


def check_labels(labels: ArrayLike, what: str) -> NDArray[np.integer]:
    """Make sure that an array is a label image.

    Args:
        labels: (H, W) whole numbers, 0 on background; they need not be consecutive. Truth values count as 0 and 1,
            floating-point numbers are taken where they are whole.
        what: What the message begins with: a file's name.

    Returns:
        (H, W) of an integer type.

    Raises:
        UsageError: Not two-dimensional (a colour picture, a stack), empty, negative, not whole, or not numbers.
    """
    array = np.asarray(labels)
    if array.ndim == 3 and array.shape[2] in (3, 4):
        raise UsageError(
            f"{what}: a colour picture {array.shape} is no label image; "
            "give one channel in which 0 is background and every object has a number of its own"
        )
    if array.ndim != 2 or array.size == 0:
        raise UsageError(f"{what}: an array of shape {array.shape} is no label image; give (height, width)")
    if array.dtype == np.bool_:
        return array.view(np.uint8)
    if np.issubdtype(array.dtype, np.floating):
        odd = array[~((array == np.rint(array)) & (np.abs(array) < 2**53))]  # NaN and infinity too
        if odd.size:
            raise UsageError(
                f"{what}: labels are whole numbers, but {odd.size} pixels are not (the first is {odd[0]:g}); "
                "give the label image, not a probability or a map scaled to 0..1"
            )
        array = array.astype(np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise UsageError(f"{what}: labels are whole numbers, these are {array.dtype}")
    if array.min() < 0:
        raise UsageError(f"{what}: labels are 0 (background) or above, found {array.min()}; mend the background value")
    if array.max() > np.iinfo(np.int64).max:
        raise UsageError(f"{what}: label {array.max()} is too large; number the objects from 1")
    return array


def overlap(truth: ArrayLike, predicted: ArrayLike) -> Overlap:
    """Count the pixels that true and found objects share; linear in pixels, sorts runs of pixels only.

    Args:
        truth: (H, W) label image, 0 on background.
        predicted: (H, W) label image, 0 on background.

    Returns:
        Objects of either side and all pairs that share a pixel; empty where there are none.

    Raises:
        UsageError: One is no label image, or they differ in size.
    """
    truth_labels, predicted_labels = check_labels(truth, "truth"), check_labels(predicted, "prediction")
    if truth_labels.shape != predicted_labels.shape:
        sizes = [f"{labels.shape[1]} x {labels.shape[0]} px" for labels in (truth_labels, predicted_labels)]
        raise UsageError(
            f"the truth has {sizes[0]} and the prediction {sizes[1]}; give both at one size and of the same field"
        )
    height, width = truth_labels.shape
    # Runs along a row in which neither label changes: some tenths of a per cent of the pixels have to be sorted.
    flat_truth, flat_predicted = truth_labels.ravel(), predicted_labels.ravel()
    begins = np.ones(flat_truth.size, bool)
    np.not_equal(flat_truth[1:], flat_truth[:-1], out=begins[1:])
    begins[1:] |= flat_predicted[1:] != flat_predicted[:-1]
    begins[::width] = True
    start = np.flatnonzero(begins)
    length = np.diff(start, append=flat_truth.size)
    truth_objects, truth_row = _objects(flat_truth[start], start, length, (height, width))
    predicted_objects, predicted_row = _objects(flat_predicted[start], start, length, (height, width))
    both = (truth_row >= 0) & (predicted_row >= 0)
    pair, inverse = np.unique(truth_row[both] * len(predicted_objects) + predicted_row[both], return_inverse=True)
    shared_px = _sum_by(inverse, length[both], len(pair))
    n_predicted = max(1, len(predicted_objects))
    return Overlap(
        truth=truth_objects,
        predicted=predicted_objects,
        truth_row=pair // n_predicted,
        predicted_row=pair % n_predicted,
        shared_px=shared_px,
    )


def _objects(
    label: NDArray[np.integer], start: NDArray[np.int64], length: NDArray[np.int64], shape: tuple[int, int]
) -> tuple[Objects, NDArray[np.int64]]:
    """The objects that runs of pixels make up, and the object of each run, -1 for background."""
    numbers, first, inverse = np.unique(label, return_index=True, return_inverse=True)
    order = np.argsort(np.where(numbers == 0, -1, first))  # background, if any, comes first
    n_background = int(numbers[order[0]] == 0)
    rank = np.empty(len(numbers), np.int64)
    rank[order] = np.arange(len(numbers)) - n_background
    row = rank[inverse]
    n = len(numbers) - n_background
    inside = row >= 0
    own, size = row[inside], length[inside]
    y, x = start[inside] // shape[1], start[inside] % shape[1]
    area = _sum_by(own, size, n)
    # Twice the sums of pixel centres are whole numbers, hence exact.
    doubled = np.stack([_sum_by(own, size * (2 * x + size), n), _sum_by(own, size * (2 * y + 1), n)], axis=1)
    objects = Objects(
        numbers=numbers[order[n_background:]].astype(np.int64),
        area_px=area,
        centroid_px=doubled / (2 * np.maximum(area, 1)[:, None]),
        rows=np.repeat(row.astype(np.int32), length).reshape(shape),
    )
    return objects, row


def _sum_by(index: NDArray[np.intp], values: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Whole-number sums of the values that have one index; bincount adds in float64, exact below 2**53."""
    return np.bincount(index, values, minlength=n).astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Sums that can be added
# ---------------------------------------------------------------------------------------------------------------------


class _Sums:
    """Something whose fields are added one by one."""

    __slots__ = ()

    def __add__(self, other: Self) -> Self:
        if type(other) is not type(self):
            return NotImplemented
        mine: Any = self
        return type(self)(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(mine)})


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelSums(_Sums):
    """Areas of two sets of pixels."""

    truth_px: int = 0
    predicted_px: int = 0
    shared_px: int = 0

    @property
    def dice(self) -> float:
        """2 shared / (truth + predicted): 0 to 1; 0 where one side is empty, NaN where both are (Dice 1945)."""
        return _ratio(2 * self.shared_px, self.truth_px + self.predicted_px)

    @property
    def jaccard(self) -> float:
        """Shared / union: 0 to 1; 0 where one side is empty, NaN where both are. For AJI the aggregated index."""
        return _ratio(self.shared_px, self.truth_px + self.predicted_px - self.shared_px)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts(_Sums):
    """Objects found (``tp``), found where there is none (``fp``) and missed (``fn``)."""

    tp: int = 0
    fp: int = 0
    fn: int = 0

    @property
    def precision(self) -> float:
        """TP / (TP + FP): 0 to 1, NaN where nothing was found."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """TP / (TP + FN): 0 to 1, NaN where there is no truth."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN): 0 to 1; 0 where one side is empty, NaN where both are."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)


@dataclass(frozen=True, slots=True, kw_only=True)
class Panoptic(Counts):
    """Matched and unmatched objects, and how well the matched ones overlap (Kirillov et al. 2019, CVPR)."""

    iou_sum: float = 0.0
    """Of the matched pairs."""

    @property
    def dq(self) -> float:
        """Detection quality TP / (TP + FP / 2 + FN / 2): F1 at IoU > 0.5.

        0 to 1; 0 where one side is empty, NaN where both are.
        """
        return self.f1

    @property
    def sq(self) -> float:
        """Segmentation quality, the mean IoU of the matched pairs: above 0.5, at most 1.

        0 where none is matched, as in the figures of Graham et al. 2019; NaN where both sides are empty.
        """
        return _ratio(self.iou_sum, self.tp) if self.tp else 0 * self.f1

    @property
    def pq(self) -> float:
        """Panoptic quality DQ * SQ: 0 to 1; 0 where one side is empty, NaN where both are."""
        return _ratio(2 * self.iou_sum, 2 * self.tp + self.fp + self.fn)


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeCounts(_Sums):
    """Of one class: matched pairs by how they are classed, and unmatched objects (Graham et al. 2019)."""

    tp: int = 0
    """Matched, both of this class."""
    fp: int = 0
    """Matched, found as this class, truly of another."""
    fn: int = 0
    """Matched, truly of this class, found as another."""
    fp_detection: int = 0
    """Not matched, found as this class."""
    fn_detection: int = 0
    """Not matched, truly of this class."""

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + 2 FP + 2 FN + FP_d + FN_d): 0 to 1; 0 where one side is empty, NaN where both are.

        Source: F_c of Graham et al. 2019 (HoVer-Net, Med. Image Anal. 58), weights 2, 2, 1, 1. Pairs in which neither
        side is of the class are left out: counted as true negatives, they would lift rare classes most.
        """
        twice = 2 * self.tp
        return _ratio(twice, twice + 2 * self.fp + 2 * self.fn + self.fp_detection + self.fn_detection)


@dataclass(frozen=True, slots=True, kw_only=True)
class GlandSums(_Sums):
    """What the three figures of the GlaS contest are made of (Sirinukunwattana et al. 2017, Med. Image Anal. 35)."""

    tp: int = 0
    """Found objects that cover at least half of their true object, the one they share most pixels with."""
    fp: int = 0
    """Found objects that do not."""
    fn: int = 0
    """True objects that no found object of ``tp`` belongs to."""
    truth_px: int = 0
    predicted_px: int = 0
    truth_dice_px: float = 0.0
    """Area times Dice with the found object that shares most pixels, summed over the true objects."""
    predicted_dice_px: float = 0.0
    """The same from the other side."""
    truth_measured_px: int = 0
    """Area of true objects in images that have found ones too: only there is a Hausdorff distance."""
    predicted_measured_px: int = 0
    truth_hausdorff_px: float = 0.0
    """Area times Hausdorff distance (pixels) to the found object that shares most, or else is nearest, summed."""
    predicted_hausdorff_px: float = 0.0

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN): 0 to 1; 0 where one side is empty, NaN where both are. Not symmetric."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def dice(self) -> float:
        """Object Dice: the mean, weighted by area, over true objects and over found ones, halved and added.

        0 to 1; 0 where one side is empty, NaN where both are. Symmetric.
        """
        if not self.truth_px + self.predicted_px:
            return float("nan")
        sides = ((self.truth_dice_px, self.truth_px), (self.predicted_dice_px, self.predicted_px))
        return float(sum(weighted / area for weighted, area in sides if area) / 2)

    @property
    def hausdorff_px(self) -> float:
        """Object Hausdorff distance in pixels, weighted as :attr:`dice` is: 0 and more, less is better. Symmetric.

        NaN where one side or both are empty: the paper leaves it open, and any number would be made up. Report how many
        images it stands for.
        """
        if not (self.truth_measured_px and self.predicted_measured_px):
            return float("nan")
        from_truth = self.truth_hausdorff_px / self.truth_measured_px
        return float((from_truth + self.predicted_hausdorff_px / self.predicted_measured_px) / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally(_Sums):
    """Everything that is counted about one image, or about several added up. What was not counted stays empty (NaN)."""

    n_truth: int = 0
    n_predicted: int = 0
    pixels: PixelSums = PixelSums()
    aji: PixelSums = PixelSums()
    aji_plus: PixelSums = PixelSums()
    panoptic: Panoptic = Panoptic()
    detection: Counts = Counts()
    glands: GlandSums = GlandSums()


# ---------------------------------------------------------------------------------------------------------------------
# Figures of all objects
# ---------------------------------------------------------------------------------------------------------------------


def tally(found: Overlap, *, radius_px: float | None = None, glands: bool = False) -> Tally:
    """Count everything about one image.

    Args:
        found: The overlap of both sides.
        radius_px: Greatest distance of centroids for :func:`detection`; left out without.
        glands: Count :func:`gland_sums` too, with distances.
    """
    return Tally(
        n_truth=len(found.truth),
        n_predicted=len(found.predicted),
        pixels=pixels(found),
        aji=aji(found),
        aji_plus=aji_plus(found),
        panoptic=panoptic(found),
        detection=detection(found, radius_px) if radius_px is not None else Counts(),
        glands=gland_sums(found) if glands else GlandSums(),
    )


def pixels(found: Overlap) -> PixelSums:
    """Foreground pixels of either side and of both, whatever object they belong to; ``.dice`` is pixel Dice."""
    return PixelSums(
        truth_px=int(found.truth.area_px.sum()),
        predicted_px=int(found.predicted.area_px.sum()),
        shared_px=int(found.shared_px.sum()),
    )


def aji(found: Overlap) -> PixelSums:
    """Aggregated Jaccard index: ``.jaccard`` of what is returned.

    For each true object the found object with the greatest IoU is taken, and intersection and union of the pair are
    added up. One found object may be taken by several true ones. True objects that overlap none, and found objects that
    none took, are added to the union with their whole area.

    Source: Kumar et al. 2017, IEEE Trans. Med. Imaging 36(7), algorithm 1. Not symmetric. Of equal IoU the pair with
    more pixels, then the object that comes first in the image, is taken.

    Returns:
        Sums with ``shared_px`` the intersections and ``truth_px + predicted_px - shared_px`` the unions.
    """
    best = _first_by(found.truth_row, found.predicted_row, found.shared_px, found.iou)
    return _paired_areas(found, best)


def aji_plus(found: Overlap) -> PixelSums:
    """AJI+: as :func:`aji`, but one to one, by the matching with the greatest sum of IoU.

    Source: Graham et al. 2019, Med. Image Anal. 58. Symmetric but for ties between equally good matchings.
    """
    matched = _best_matching(found.truth_row, found.predicted_row, 1 - found.iou, 1.0, found)
    return _paired_areas(found, matched)


def _paired_areas(found: Overlap, pairs: NDArray[np.int64]) -> PixelSums:
    """Areas of pairs, of true objects in none and of found objects in none; a found object counts once a pair."""
    lone_truth = np.ones(len(found.truth), bool)
    lone_predicted = np.ones(len(found.predicted), bool)
    lone_truth[found.truth_row[pairs]] = False
    lone_predicted[found.predicted_row[pairs]] = False
    paired = found.predicted.area_px[found.predicted_row[pairs]].sum()
    return PixelSums(
        truth_px=int(found.truth.area_px.sum()),
        predicted_px=int(paired + found.predicted.area_px[lone_predicted].sum()),
        shared_px=int(found.shared_px[pairs].sum()),
    )


def panoptic(found: Overlap, threshold: float = 0.5) -> Panoptic:
    """Match objects of IoU above a threshold; ``.dq``, ``.sq``, ``.pq``, and ``.f1`` (which is ``.dq``).

    Source: Kirillov et al. 2019, CVPR.

    Args:
        found: The overlap of both sides.
        threshold: 0.5 or more: above it no object can have two partners, so the matching is unique.

    Raises:
        UsageError: The threshold is below 0.5, or 1 and more.
    """
    _check_threshold(threshold)
    iou = found.iou
    matched = iou > threshold
    tp = int(matched.sum())
    return Panoptic(tp=tp, fp=len(found.predicted) - tp, fn=len(found.truth) - tp, iou_sum=float(iou[matched].sum()))


def panoptic_by_class(
    found: Overlap,
    truth_class: NDArray[np.integer],
    predicted_class: NDArray[np.integer],
    n_classes: int,
    threshold: float = 0.5,
) -> list[Panoptic]:
    """:func:`panoptic` of each class by itself: as if all objects of other classes were background.

    Averages over classes are the caller's choice. PanNuke's mPQ (Gamper et al. 2020, arXiv:2003.10778): for each image
    the mean of ``pq`` over the classes that its truth holds, then the mean over images; a class that is absent from the
    truth is left out even where it was found. CoNIC's mPQ+ (Graham et al. 2024, Med. Image Anal. 92): add up the sums
    of all images, then take the mean of ``pq`` over classes.

    Args:
        found: The overlap of both sides.
        truth_class: (n,) class of each object of ``found.truth``, 0 to n_classes - 1; -1 for none.
        predicted_class: The same of ``found.predicted``.
        n_classes: How many classes there are.
        threshold: 0.5 or more.

    Returns:
        One for each class; all zero (NaN figures) where a class is absent from both sides.
    """
    _check_threshold(threshold)
    iou = found.iou
    same = truth_class[found.truth_row] == predicted_class[found.predicted_row]
    matched = np.flatnonzero(same & (iou > threshold))
    matched_class = truth_class[found.truth_row[matched]]
    sums = []
    for each in range(n_classes):
        own = matched[matched_class == each]
        n_truth, n_predicted = int((truth_class == each).sum()), int((predicted_class == each).sum())
        fp, fn = n_predicted - len(own), n_truth - len(own)
        sums.append(Panoptic(tp=len(own), fp=fp, fn=fn, iou_sum=float(iou[own].sum())))
    return sums


def _check_threshold(threshold: float) -> None:
    if not 0.5 <= threshold < 1:
        raise UsageError(
            f"IoU threshold {threshold:g}: give 0.5 to less than 1; below 0.5 an object could match two others"
        )


def centroid_pairs(found: Overlap, radius_px: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pair true and found objects whose centroids lie within a radius of each other, one to one.

    As many pairs as possible, and of such pairings the one with the least sum of distances.

    Args:
        found: Both sides; whether objects overlap does not matter.
        radius_px: Greatest distance, inclusive.

    Returns:
        Rows of the true and of the found objects, (k,) each.
    """
    none = np.empty(0, np.int64)
    if not (len(found.truth) and len(found.predicted)):
        return none, none
    near = cKDTree(found.truth.centroid_px).sparse_distance_matrix(
        cKDTree(found.predicted.centroid_px), radius_px, output_type="ndarray"
    )
    order = np.lexsort((near["j"], near["i"]))
    truth_row, predicted_row, distance = (near[key][order] for key in ("i", "j", "v"))
    # To leave one object alone costs more than all distances of any chain of pairs, so their number comes first.
    alone = (radius_px + 1) * (min(len(found.truth), len(found.predicted)) + 1)
    pairs = _best_matching(truth_row, predicted_row, distance, alone, found)
    return truth_row[pairs], predicted_row[pairs]


def detection(found: Overlap, radius_px: float) -> Counts:
    """Objects found within a distance of the true centroid; ``.f1`` is F_d of Graham et al. 2019.

    Args:
        found: Both sides.
        radius_px: Greatest distance of centroids; ``CUSTOMARY_RADIUS_UM / mpp`` for nuclei.
    """
    tp = len(centroid_pairs(found, radius_px)[0])
    return Counts(tp=tp, fp=len(found.predicted) - tp, fn=len(found.truth) - tp)


def type_counts(
    found: Overlap,
    truth_class: NDArray[np.integer],
    predicted_class: NDArray[np.integer],
    n_classes: int,
    radius_px: float,
) -> list[TypeCounts]:
    """Are objects found within a distance classed rightly? ``.f1`` is F_c of Graham et al. 2019, for each class.

    Arguments as in :func:`panoptic_by_class` and :func:`detection`. Objects are paired whatever their class.
    """
    truth_row, predicted_row = centroid_pairs(found, radius_px)
    truth_alone = np.delete(truth_class, truth_row)
    predicted_alone = np.delete(predicted_class, predicted_row)
    true, given = truth_class[truth_row], predicted_class[predicted_row]
    return [
        TypeCounts(
            tp=int(((true == each) & (given == each)).sum()),
            fp=int(((true != each) & (given == each)).sum()),
            fn=int(((true == each) & (given != each)).sum()),
            fp_detection=int((predicted_alone == each).sum()),
            fn_detection=int((truth_alone == each).sum()),
        )
        for each in range(n_classes)
    ]


def count_r2(truth_counts: ArrayLike, predicted_counts: ArrayLike) -> NDArray[np.float64]:
    """Coefficient of determination of the counts of objects over images, for each class.

    Source: Graham et al. 2024 (CoNIC); its multi-class R2 is the mean over classes.

    Args:
        truth_counts: (images, classes).
        predicted_counts: (images, classes).

    Returns:
        (classes,) 1 - sum of squared errors / sum of squared deviations of the truth: 1 is perfect, 0 as good as always
        saying the mean, below 0 worse. NaN where the true counts of a class are all alike, or of less than two images.
    """
    truth, predicted = np.asarray(truth_counts, np.float64), np.asarray(predicted_counts, np.float64)
    residual = ((truth - predicted) ** 2).sum(axis=0)
    spread = ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)
    return np.where(spread > 0, 1 - residual / np.where(spread > 0, spread, 1), np.nan)


_SOLVED_AT_ONCE: Final = 1000


def _first_by(
    owner: NDArray[np.int64], other: NDArray[np.int64], *descending: NDArray[np.integer] | NDArray[np.float64]
) -> NDArray[np.int64]:
    """For each owner its first pair by the last key, then the one before it; ties by the smaller ``other``."""
    order = np.lexsort((other, *(-key for key in descending), owner))
    sorted_owner = owner[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = sorted_owner[1:] != sorted_owner[:-1]
    return order[is_first]


def _best_matching(
    truth_row: NDArray[np.int64],
    predicted_row: NDArray[np.int64],
    cost: NDArray[np.float64],
    alone: float,
    found: Overlap,
) -> NDArray[np.int64]:
    """The pairs of the one-to-one matching of least cost, where a true object without a partner costs ``alone``.

    Every cost must be less than ``alone``.
    """
    if len(cost) == 0:
        return np.empty(0, np.int64)
    # Objects without a chain of pairs between them do not bear on each other, and the solver's time grows with the
    # square of what it is given: lone pairs are a match, the rest is solved a few chains at a time.
    n_truth, n_all = len(found.truth), len(found.truth) + len(found.predicted)
    links = csr_array((np.ones(len(cost), bool), (truth_row, n_truth + predicted_row)), shape=(n_all, n_all))
    chain = connected_components(links, directed=False)[1][truth_row]
    lone = np.bincount(chain)[chain] == 1
    by_chain = np.flatnonzero(~lone)
    by_chain = by_chain[np.argsort(chain[by_chain], kind="stable")]
    ends = np.flatnonzero(np.diff(chain[by_chain], append=-1)) + 1  # after the last pair of each chain
    wanted = np.arange(_SOLVED_AT_ONCE, len(by_chain) + _SOLVED_AT_ONCE, _SOLVED_AT_ONCE)
    cuts = np.unique(ends[np.minimum(np.searchsorted(ends, wanted), len(ends) - 1)]) if len(ends) else ends
    solved = [
        pairs[_solve(truth_row[pairs], predicted_row[pairs], cost[pairs], alone)]
        for pairs in np.split(by_chain, cuts[:-1])
        if len(pairs)
    ]
    return np.sort(np.concatenate([np.flatnonzero(lone), *solved]))


def _solve(
    truth_row: NDArray[np.int64], predicted_row: NDArray[np.int64], cost: NDArray[np.float64], alone: float
) -> NDArray[np.int64]:
    """:func:`_best_matching` of some pairs at once."""
    _, row = np.unique(truth_row, return_inverse=True)
    _, column = np.unique(predicted_row, return_inverse=True)
    n_rows, n_columns = int(row.max()) + 1, int(column.max()) + 1
    # Each true object has a partner of its own to fall back on, so a matching of all exists.
    rows = np.concatenate([row, np.arange(n_rows)])
    columns = np.concatenate([column, n_columns + np.arange(n_rows)])
    # The solver takes a zero for "no edge".
    costs = np.concatenate([cost + 1, np.full(n_rows, alone + 1)])
    graph = csr_array((costs, (rows, columns)), shape=(n_rows, n_columns + n_rows))
    chosen_row, chosen_column = min_weight_full_bipartite_matching(graph)
    partner = np.full(n_rows, -1, np.int64)
    partner[chosen_row] = chosen_column
    return np.flatnonzero(partner[row] == column)


# ---------------------------------------------------------------------------------------------------------------------
# The GlaS contest
# ---------------------------------------------------------------------------------------------------------------------


def gland_sums(found: Overlap, *, hausdorff: bool = True) -> GlandSums:
    """The figures of the GlaS contest: ``.f1``, ``.dice`` (object Dice) and ``.hausdorff_px`` (object Hausdorff).

    The partner of an object is the object of the other side that shares most pixels with it (of equals, the first in
    the image). F1: a found object that covers at least half of its partner is a true positive. Object Dice: an object
    without a partner has Dice 0. Object Hausdorff: an object without a partner is compared with the object of the other
    side that has the least Hausdorff distance to it. Distances are exact, between the centres of pixels, over all
    pixels of both objects.

    Source: Sirinukunwattana et al. 2017, Med. Image Anal. 35. The contest weighs by area over all images of a test set,
    which is what added sums do.

    Args:
        found: Both sides.
        hausdorff: False leaves the distances out: they take most of the time.
    """
    of_truth = _first_by(found.truth_row, found.predicted_row, found.shared_px)
    of_predicted = _first_by(found.predicted_row, found.truth_row, found.shared_px)
    partner = found.truth_row[of_predicted]
    good = 2 * found.shared_px[of_predicted] >= found.truth.area_px[partner]
    tp = int(good.sum())
    both = found.truth.area_px[found.truth_row] + found.predicted.area_px[found.predicted_row]
    dice = 2 * found.shared_px / both
    truth_px, predicted_px = int(found.truth.area_px.sum()), int(found.predicted.area_px.sum())
    sums = GlandSums(
        tp=tp,
        fp=len(found.predicted) - tp,
        fn=len(found.truth) - len(np.unique(partner[good])),
        truth_px=truth_px,
        predicted_px=predicted_px,
        truth_dice_px=float((found.truth.area_px[found.truth_row[of_truth]] * dice[of_truth]).sum()),
        predicted_dice_px=float(
            (found.predicted.area_px[found.predicted_row[of_predicted]] * dice[of_predicted]).sum()
        ),
    )
    if not hausdorff or not (truth_px and predicted_px):
        return sums
    partner_of_truth = np.full(len(found.truth), -1, np.int64)
    partner_of_truth[found.truth_row[of_truth]] = found.predicted_row[of_truth]
    partner_of_predicted = np.full(len(found.predicted), -1, np.int64)
    partner_of_predicted[found.predicted_row[of_predicted]] = partner
    distances = _Distances(found)
    from_truth = [distances.of_truth(i, j) for i, j in enumerate(partner_of_truth.tolist())]
    from_predicted = [distances.of_predicted(j, i) for j, i in enumerate(partner_of_predicted.tolist())]
    return sums + GlandSums(
        truth_measured_px=truth_px,
        predicted_measured_px=predicted_px,
        truth_hausdorff_px=float(np.dot(found.truth.area_px, from_truth)),
        predicted_hausdorff_px=float(np.dot(found.predicted.area_px, from_predicted)),
    )


# So many are computed sooner than a search tree is built.
_FEW_DISTANCES: Final = 20_000


class _PixelLists:
    """The pixels of each object of one side, their border, and a box round them."""

    def __init__(self, objects: Objects) -> None:
        rows = objects.rows
        inner = np.zeros(rows.shape, bool)
        middle = rows[1:-1, 1:-1]
        inner[1:-1, 1:-1] = (
            (middle == rows[:-2, 1:-1])
            & (middle == rows[2:, 1:-1])
            & (middle == rows[1:-1, :-2])
            & (middle == rows[1:-1, 2:])
        )
        self.xy, self._offsets = _group(rows, rows >= 0, len(objects))
        # The nearest pixel of a set to one outside it always has a neighbour that is not in the set.
        self._edge_xy, self._edge_offsets = _group(rows, (rows >= 0) & ~inner, len(objects))
        begin = self._offsets[:-1]
        self.box = np.concatenate([np.minimum.reduceat(self.xy, begin), np.maximum.reduceat(self.xy, begin)], axis=1)
        self._trees: dict[int, cKDTree] = {}

    def pixels(self, row: int) -> NDArray[np.int64]:
        """(n, 2) x, y of an object."""
        return self.xy[self._offsets[row] : self._offsets[row + 1]]

    def farthest(self, row: int, points: NDArray[np.int64]) -> float:
        """Greatest distance from one of the points, all outside the object, to the object."""
        if len(points) == 0:
            return 0.0
        edge = self._edge_xy[self._edge_offsets[row] : self._edge_offsets[row + 1]]
        if len(points) * len(edge) <= _FEW_DISTANCES:
            squared = ((points[:, None, 0] - edge[:, 0]) ** 2) + (points[:, None, 1] - edge[:, 1]) ** 2
            return math.sqrt(squared.min(axis=1).max())
        if row not in self._trees:
            self._trees[row] = cKDTree(edge)
        return float(np.max(self._trees[row].query(points)[0]))


def _group(
    rows: NDArray[np.int32], where: NDArray[np.bool_], n_objects: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The chosen pixels (x, y), object after object, and the offsets of the objects among them."""
    flat = np.flatnonzero(where)
    owner = rows.ravel()[flat]
    flat = flat[np.argsort(owner, kind="stable")]
    y, x = np.divmod(flat, rows.shape[1])
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=n_objects))])
    return np.stack([x, y], axis=1), offsets


class _Distances:
    """Hausdorff distances between true and found objects, each computed once."""

    def __init__(self, found: Overlap) -> None:
        self._found = found
        self._truth = _PixelLists(found.truth)
        self._predicted = _PixelLists(found.predicted)
        self._known: dict[tuple[int, int], float] = {}

    def of_truth(self, i: int, j: int) -> float:
        """From a true object to its partner, or to the nearest found object where ``j`` is -1."""
        if j >= 0:
            return self._pair(i, j)
        return _least(_bounds(self._truth.box[i], self._predicted.box), lambda other: self._pair(i, other))

    def of_predicted(self, j: int, i: int) -> float:
        """From a found object to its partner, or to the nearest true object where ``i`` is -1."""
        if i >= 0:
            return self._pair(i, j)
        return _least(_bounds(self._predicted.box[j], self._truth.box), lambda other: self._pair(other, j))

    def _pair(self, i: int, j: int) -> float:
        if (i, j) not in self._known:
            truth, predicted = self._truth.pixels(i), self._predicted.pixels(j)
            truth_only = truth[self._found.predicted.rows[truth[:, 1], truth[:, 0]] != j]
            predicted_only = predicted[self._found.truth.rows[predicted[:, 1], predicted[:, 0]] != i]
            self._known[i, j] = max(self._predicted.farthest(j, truth_only), self._truth.farthest(i, predicted_only))
        return self._known[i, j]


def _bounds(box: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) no Hausdorff distance to another object is less than the greatest shift of a side of its box."""
    shift: NDArray[np.int64] = np.abs(others - box).max(axis=1)
    return shift


def _least(bounds: NDArray[np.int64], distance: Callable[[int], float]) -> float:
    """The least distance to other objects, computed for those only that can be nearer than the first guess."""
    least = distance(int(bounds.argmin()))
    candidates = np.flatnonzero(bounds < least)
    for other in candidates[np.argsort(bounds[candidates])].tolist():
        if bounds[other] >= least:
            break
        least = min(least, distance(other))
    return least
