"""Segmentation figures: by hand, by laws, and against plain implementations that follow the papers word by word."""

import contextlib
import io
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.metrics import f1_score
from sklearn.metrics.cluster import contingency_matrix

from pathopipe.errors import UsageError
from pathopipe.segmentation.metrics import (
    Counts,
    GlandSums,
    Panoptic,
    PixelSums,
    Tally,
    TypeCounts,
    aji,
    aji_plus,
    centroid_pairs,
    check_labels,
    count_r2,
    detection,
    gland_sums,
    overlap,
    panoptic,
    panoptic_by_class,
    pixels,
    tally,
    type_counts,
)

Labels = NDArray[Any]

# Two rows of true objects and what was found:
#   truth      1 1 1 1 . . 2 2 2 2        predicted  7 7 7 . . . . 5 5 5
#              1 1 1 1 . . 2 2 2 2                   7 7 7 . . . . 5 5 5
#              . . . . . . . . . .                   . . . 9 9 . . . . .
#              3 3 . . . . . . . .                   4 . . 9 9 . . . . .
# Areas: truth 8, 8, 2; predicted 7: 6, 5: 6, 9: 4, 4: 1.
# Shared: 1 with 7: 6 (union 8), 2 with 5: 6 (union 8), 3 with 4: 1 (union 2, IoU exactly 0.5).
TRUTH = np.array([[1, 1, 1, 1, 0, 0, 2, 2, 2, 2]] * 2 + [[0] * 10] + [[3, 3] + [0] * 8])
FOUND = np.array([[7, 7, 7, 0, 0, 0, 0, 5, 5, 5]] * 2 + [[0, 0, 0, 9, 9] + [0] * 5] + [[4, 0, 0, 9, 9] + [0] * 5])
EMPTY = np.zeros_like(TRUTH)

SOME = settings(max_examples=30)


def small_images() -> Any:
    """Two label images of one size, with gaps in the numbers and objects in several pieces."""
    shapes = st.tuples(st.integers(1, 8), st.integers(1, 8))
    values = st.sampled_from([0, 0, 1, 2, 5, 900])
    return shapes.flatmap(
        lambda shape: st.tuples(arrays(np.int32, shape, elements=values), arrays(np.int64, shape, elements=values))
    )


def blobs(seed: int, n: int = 40, side: int = 96) -> Labels:
    """Discs that touch and cover each other."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((side, side), np.int32)
    for number in range(1, n + 1):
        (x_px, y_px), radius_px = rng.uniform(0, side, 2), rng.uniform(2, 7)
        left, top = max(0, int(x_px) - 8), max(0, int(y_px) - 8)
        window = labels[top : top + 17, left : left + 17]
        y, x = np.mgrid[top : top + window.shape[0], left : left + window.shape[1]]
        window[(x - x_px) ** 2 + (y - y_px) ** 2 <= radius_px**2] = number
    return labels


def objects(labels: Labels) -> list[Labels]:
    """Masks of the objects, in the order of their first pixel."""
    flat = labels.ravel()
    return [labels == number for number in sorted(set(flat.tolist()) - {0}, key=lambda n: int(np.argmax(flat == n)))]


def all_figures(sums: Tally) -> list[float]:
    return [
        sums.pixels.dice,
        sums.aji.jaccard,
        sums.aji_plus.jaccard,
        sums.panoptic.dq,
        sums.panoptic.sq,
        sums.panoptic.pq,
        sums.detection.f1,
        sums.glands.f1,
        sums.glands.dice,
    ]


# --- the overlap ------------------------------------------------------------------------------------------------------


def test_overlap_by_hand() -> None:
    found = overlap(TRUTH, FOUND)
    assert found.truth.numbers.tolist() == [1, 2, 3]
    assert found.truth.area_px.tolist() == [8, 8, 2]
    assert found.predicted.numbers.tolist() == [7, 5, 9, 4]  # by first pixel
    assert found.predicted.area_px.tolist() == [6, 6, 4, 1]
    assert found.predicted.centroid_px.tolist() == [[1.5, 1.0], [8.5, 1.0], [4.0, 3.0], [0.5, 3.5]]
    pairs = zip(found.truth_row.tolist(), found.predicted_row.tolist(), found.shared_px.tolist(), strict=True)
    assert list(pairs) == [(0, 0, 6), (1, 1, 6), (2, 3, 1)]
    assert found.iou.tolist() == [0.75, 0.75, 0.5]


@SOME
@given(small_images())
def test_overlap_is_the_contingency_table(images: tuple[Labels, Labels]) -> None:
    truth, predicted = images
    found = overlap(truth, predicted)
    table = np.zeros((len(found.truth), len(found.predicted)), int)
    table[found.truth_row, found.predicted_row] = found.shared_px
    by_truth, by_predicted = np.argsort(found.truth.numbers), np.argsort(found.predicted.numbers)
    expected = contingency_matrix(truth.ravel(), predicted.ravel())
    expected = expected[int((truth == 0).any()) :, int((predicted == 0).any()) :]
    assert np.array_equal(table[by_truth][:, by_predicted], expected)
    assert (found.shared_px > 0).all()
    for side, labels in ((found.truth, truth), (found.predicted, predicted)):
        for row, mask in enumerate(objects(labels)):
            y, x = np.nonzero(mask)
            assert side.area_px[row] == len(y)
            assert np.allclose(side.centroid_px[row], [x.mean() + 0.5, y.mean() + 0.5])
            assert np.array_equal(side.rows == row, mask)
        assert np.array_equal(side.rows < 0, labels == 0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), r"a colour picture \(4, 4, 3\)"),
        (np.zeros((2, 4, 5), np.uint8), r"shape \(2, 4, 5\)"),
        (np.zeros((0, 4), np.uint8), r"shape \(0, 4\)"),
        (np.array([[0.0, 0.5]]), "1 pixels are not .the first is 0.5"),
        (np.array([[0.0, np.nan]]), "1 pixels are not .the first is nan"),
        (np.array([[0, -3]]), "found -3"),
        (np.array([["a", "b"]]), "whole numbers, these are"),
        (np.array([[1 << 63]], np.uint64), "too large"),
    ],
)
def test_what_is_no_label_image(labels: Labels, message: str) -> None:
    with pytest.raises(UsageError, match=f"nuclei.png: .*{message}"):
        check_labels(labels, "nuclei.png")


def test_whole_floats_and_truth_values_are_labels() -> None:
    assert check_labels(np.array([[0.0, 3.0]]), "x").tolist() == [[0, 3]]
    assert check_labels(np.array([[True, False]]), "x").tolist() == [[1, 0]]


def test_sizes_must_agree() -> None:
    with pytest.raises(UsageError, match="truth has 10 x 4 px and the prediction 10 x 3 px"):
        overlap(TRUTH, FOUND[:3])


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_dice_by_hand() -> None:
    # 18 true pixels, 17 found, 13 shared: 2 * 13 / 35.
    assert pixels(overlap(TRUTH, FOUND)).dice == pytest.approx(26 / 35)


def test_aji_by_hand() -> None:
    # Intersections 6 + 6 + 1 = 13. Unions 8 + 8 + 2 = 18, and object 9 (4 px), which nobody took: 22.
    sums = aji(overlap(TRUTH, FOUND))
    assert sums.jaccard == pytest.approx(13 / 22)
    assert sums == aji_plus(overlap(TRUTH, FOUND))  # no object is wanted twice


def test_aji_takes_a_found_object_twice_and_aji_plus_does_not() -> None:
    truth = np.array([[1, 1, 1, 1, 2, 2]])
    found = overlap(truth, np.array([[3, 3, 3, 3, 3, 3]]))
    # AJI: truth 1 shares 4 of 6, truth 2 shares 2 of 6: (4 + 2) / (6 + 6).
    assert aji(found).jaccard == pytest.approx(6 / 12)
    # AJI+: only truth 1 is matched, truth 2 goes into the union: 4 / (6 + 2).
    assert aji_plus(found).jaccard == pytest.approx(4 / 8)


def test_aji_plus_takes_the_best_matching_and_not_the_greedy_one() -> None:
    truth = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 2]])
    found = np.array([[3, 3, 3, 4, 4, 4, 4, 4, 4, 4]])
    # IoU: 1-3 is 3/6, 1-4 is 3/10, 2-4 is 4/7; the best matching is 1-3 and 2-4: (3 + 4) / (6 + 7).
    assert aji_plus(overlap(truth, found)).jaccard == pytest.approx(7 / 13)
    truth = np.array([[1] * 10 + [2] * 4])
    found = np.array([[3] * 4 + [4] * 10])
    # IoU: 1-3 is 4/10, 1-4 is 6/14, 2-4 is 4/10. Greedy would take 1-4 (0.43) alone; 1-3 and 2-4 sum to 0.8.
    # Then (4 + 4) / (10 + 10).
    assert aji_plus(overlap(truth, found)).jaccard == pytest.approx(8 / 20)


def test_panoptic_by_hand() -> None:
    # IoU 0.75 twice; 3 with 4 has exactly 0.5, which is no match. TP 2, FP 2 (9 and 4), FN 1 (3).
    sums = panoptic(overlap(TRUTH, FOUND))
    assert sums == Panoptic(tp=2, fp=2, fn=1, iou_sum=1.5)
    assert sums.dq == sums.f1 == pytest.approx(2 / 3.5)
    assert sums.sq == pytest.approx(0.75)
    assert sums.pq == pytest.approx(1.5 / 3.5) == pytest.approx(sums.dq * sums.sq)
    assert (sums.precision, sums.recall) == (2 / 4, 2 / 3)
    assert panoptic(overlap(TRUTH, FOUND), 0.75).tp == 0  # 0.75 is not above 0.75
    assert panoptic(overlap(TRUTH, FOUND), 0.74).tp == 2


@pytest.mark.parametrize("threshold", [0.49, 1.0, math.nan])
def test_thresholds_that_make_no_unique_matching(threshold: float) -> None:
    with pytest.raises(UsageError, match="IoU threshold"):
        panoptic(overlap(TRUTH, FOUND), threshold)


def test_panoptic_by_class_by_hand() -> None:
    found = overlap(TRUTH, FOUND)
    # Truth 1: a, 2: b, 3: a. Found 7: a, 5: a, 9: b, 4: none. Only 1-7 is a match within a class.
    sums = panoptic_by_class(found, np.array([0, 1, 0]), np.array([0, 0, 1, -1]), 3)
    assert sums[0] == Panoptic(tp=1, fp=1, fn=1, iou_sum=0.75)
    assert sums[1] == Panoptic(tp=0, fp=1, fn=1)
    assert sums[1].pq == 0
    assert sums[2] == Panoptic()
    assert math.isnan(sums[2].pq)


def test_detection_by_hand() -> None:
    found = overlap(TRUTH, FOUND)
    # True centroids (2, 1), (8, 1), (1, 3.5); found (1.5, 1), (8.5, 1), (4, 3), (0.5, 3.5): three pairs 0.5 px apart.
    assert detection(found, 0.5) == Counts(tp=3, fp=1, fn=0)
    assert detection(found, 0.5).f1 == pytest.approx(6 / 7)
    assert detection(found, 0.49) == Counts(tp=0, fp=4, fn=3)


def test_centroids_pair_up_as_often_as_possible() -> None:
    truth, found = np.zeros((1, 30), int), np.zeros((1, 30), int)
    truth[0, [10, 14]] = 1, 2
    found[0, [13, 17]] = 3, 4
    # Within 3 px: 10-13, 14-13 (nearest of all), 14-17. Greedy takes 14-13 and leaves 10 and 17 alone.
    pairs = centroid_pairs(overlap(truth, found), 3)
    assert [each.tolist() for each in pairs] == [[0, 1], [0, 1]]


def test_centroids_that_coincide_are_a_pair() -> None:
    assert detection(overlap(TRUTH, TRUTH), 0) == Counts(tp=3, fp=0, fn=0)


def test_type_counts_by_hand() -> None:
    found = overlap(TRUTH, FOUND)
    # Pairs within 1 px: 1-7 (a, a), 2-5 (b, a), 3-4 (a, b); 9 (b) is alone.
    a, b = type_counts(found, np.array([0, 1, 0]), np.array([0, 0, 1, 1]), 2, 1.0)
    assert a == TypeCounts(tp=1, fp=1, fn=1, fp_detection=0, fn_detection=0)
    assert a.f1 == pytest.approx(2 / (2 + 2 + 2))
    assert b == TypeCounts(tp=0, fp=1, fn=1, fp_detection=1, fn_detection=0)
    assert b.f1 == 0


def test_gland_sums_by_hand() -> None:
    sums = gland_sums(overlap(TRUTH, FOUND))
    # Found 7 covers 6 of 8, 5 covers 6 of 8, 4 covers 1 of 2 (at least half counts); 9 touches nothing.
    assert (sums.tp, sums.fp, sums.fn) == (3, 1, 0)
    assert sums.f1 == pytest.approx(6 / 7)
    # Dice of the pairs: 12/14, 12/14, 2/3. Over truth (8, 8, 2 of 18), over found (6, 6, 4, 1 of 17; 9 has none).
    from_truth = (8 * 12 / 14 + 8 * 12 / 14 + 2 * 2 / 3) / 18
    from_found = (6 * 12 / 14 + 6 * 12 / 14 + 1 * 2 / 3) / 17
    assert sums.dice == pytest.approx((from_truth + from_found) / 2)
    # Hausdorff of the pairs: 1 px each. 9 has no partner: to 1 it is sqrt(13) (pixel (0, 0) to (3, 2)), to 3 the
    # farther pixel (4, 2) is sqrt(10) from (1, 3) and (0, 3) is 3 from (3, 3): sqrt(10). To 2: farther. So sqrt(10).
    assert sums.hausdorff_px == pytest.approx((1 + (6 + 6 + 4 * math.sqrt(10) + 1) / 17) / 2)


def test_a_found_object_has_one_true_object() -> None:
    truth = np.array([[1, 1, 1, 2, 2]])
    # One object covers both: it belongs to 1, of which it covers all; 2 is missed.
    sums = gland_sums(overlap(truth, np.array([[4, 4, 4, 4, 4]])))
    assert (sums.tp, sums.fp, sums.fn) == (1, 0, 1)
    # Two halves of one object: both cover half of it.
    sums = gland_sums(overlap(np.array([[1, 1, 1, 1]]), np.array([[2, 2, 3, 3]])))
    assert (sums.tp, sums.fp, sums.fn) == (2, 0, 0)
    # Three parts: none covers half.
    sums = gland_sums(overlap(np.array([[1, 1, 1, 1, 1, 1]]), np.array([[2, 2, 3, 3, 4, 4]])))
    assert (sums.tp, sums.fp, sums.fn) == (0, 3, 1)


def test_hausdorff_sees_the_inside_of_an_object() -> None:
    truth, found = np.zeros((21, 21), int), np.zeros((21, 21), int)
    truth[:] = 1
    found[0], found[-1] = 2, 2
    # The farthest pixel of the full square from its upper and lower rows is in the middle: 10 px, no border pixel.
    assert gland_sums(overlap(truth, found)).hausdorff_px == 10


def test_count_r2_by_hand() -> None:
    truth, found = [[1, 5], [3, 5], [5, 5]], [[1, 4], [4, 5], [5, 6]]
    # Class 0: errors 0, 1, 0 against deviations 4, 0, 4: 1 - 1/8. Class 1: the truth never varies.
    first, second = count_r2(truth, found).tolist()
    assert first == pytest.approx(7 / 8)
    assert math.isnan(second)
    assert count_r2(truth, [[3, 0]] * 3)[0] == 0


# --- nothing there ----------------------------------------------------------------------------------------------------


def test_both_empty_is_undefined() -> None:
    sums = tally(overlap(EMPTY, EMPTY), radius_px=5, glands=True)
    assert (sums.n_truth, sums.n_predicted) == (0, 0)
    assert all(math.isnan(figure) for figure in (*all_figures(sums), sums.glands.hausdorff_px))


@pytest.mark.parametrize("images", [(EMPTY, FOUND), (TRUTH, EMPTY)], ids=["no truth", "nothing found"])
def test_one_side_empty_is_zero(images: tuple[Labels, Labels]) -> None:
    sums = tally(overlap(*images), radius_px=5, glands=True)
    assert all_figures(sums) == [0] * 9
    assert math.isnan(sums.glands.hausdorff_px)
    (types,) = type_counts(overlap(*images), np.zeros(sums.n_truth, int), np.zeros(sums.n_predicted, int), 1, 5)
    assert types.f1 == 0


def test_precision_and_recall_of_nothing() -> None:
    assert math.isnan(Counts(fn=2).precision)
    assert Counts(fn=2).recall == 0
    assert math.isnan(Counts(fp=2).recall)
    assert math.isnan(TypeCounts().f1)


# --- laws -------------------------------------------------------------------------------------------------------------


@SOME
@given(small_images())
def test_an_image_agrees_with_itself(images: tuple[Labels, Labels]) -> None:
    labels = images[0]
    sums = tally(overlap(labels, labels), radius_px=0, glands=True)
    if not labels.any():
        return
    # Objects in several pieces can have one centroid; a distance of 0 pairs them all the same.
    assert all_figures(sums) == pytest.approx([1] * 9)
    assert sums.glands.hausdorff_px == 0


@SOME
@given(small_images(), st.permutations([1, 2, 5, 900]))
def test_label_numbers_do_not_matter(images: tuple[Labels, Labels], names: list[int]) -> None:
    truth, predicted = images
    renamed = predicted.copy()
    for old, new in zip([1, 2, 5, 900], names, strict=True):
        renamed[predicted == old] = new * 7
    assert tally(overlap(truth, predicted), radius_px=2, glands=True) == tally(
        overlap(truth, renamed), radius_px=2, glands=True
    )


@SOME
@given(small_images())
def test_what_is_symmetric(images: tuple[Labels, Labels]) -> None:
    there = tally(overlap(*images), radius_px=2, glands=True)
    back = tally(overlap(*images[::-1]), radius_px=2, glands=True)
    assert there.panoptic.iou_sum == pytest.approx(back.panoptic.iou_sum)
    for name in ("pixels.dice", "panoptic.dq", "panoptic.sq", "panoptic.pq", "detection.f1"):
        group, figure = name.split(".")
        sides = [getattr(getattr(sums, group), figure) for sums in (there, back)]
        assert sides[0] == pytest.approx(sides[1], nan_ok=True), name


@pytest.mark.parametrize("seed", range(3))
def test_gland_figures_are_symmetric_where_nothing_ties(seed: int) -> None:
    there, back = (
        gland_sums(overlap(*sides)) for sides in ((blobs(seed), blobs(seed + 50)), (blobs(seed + 50), blobs(seed)))
    )
    assert there.dice == pytest.approx(back.dice, abs=0.01)
    assert there.hausdorff_px == pytest.approx(back.hausdorff_px, rel=0.01)
    assert there.f1 != back.f1


@SOME
@given(small_images(), small_images())
def test_pooled_sums_are_those_of_images_side_by_side(
    first: tuple[Labels, Labels], second: tuple[Labels, Labels]
) -> None:
    """Two images far apart in one big image have the sums of the two."""
    height, gap = 8, 60  # farther than any object is from its nearest
    wide = np.zeros((2, height, 16 + gap), np.int64)
    for at, pair in ((0, first), (8 + gap, second)):
        for side, labels in enumerate(pair):
            wide[side, : labels.shape[0], at : at + labels.shape[1]] = np.where(labels > 0, labels + at * 1000, 0)
    added = tally(overlap(*first), radius_px=2) + tally(overlap(*second), radius_px=2)
    whole = tally(overlap(*wide), radius_px=2)
    assert added.panoptic.iou_sum == pytest.approx(whole.panoptic.iou_sum)
    for name in ("n_truth", "n_predicted", "pixels", "aji", "detection"):
        assert getattr(added, name) == getattr(whole, name), name
    assert (added.panoptic.tp, added.panoptic.fp, added.panoptic.fn) == (
        whole.panoptic.tp,
        whole.panoptic.fp,
        whole.panoptic.fn,
    )


def test_sums_of_different_kinds_do_not_add() -> None:
    with pytest.raises(TypeError):
        Counts(tp=1) + Panoptic(tp=1)  # type: ignore[operator]
    assert Panoptic(tp=1, iou_sum=0.8) + Panoptic(fp=2, iou_sum=0.0) == Panoptic(tp=1, fp=2, iou_sum=0.8)


# --- against plain implementations --------------------------------------------------------------------------------


def plain_ious(truth: Labels, predicted: Labels) -> tuple[list[Labels], list[Labels], NDArray[np.float64]]:
    true, found = objects(truth), objects(predicted)
    ious = np.array([[(a & b).sum() / (a | b).sum() for b in found] for a in true]).reshape(len(true), len(found))
    return true, found, ious


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


@SOME
@given(small_images())
def test_pq_is_that_of_the_paper(images: tuple[Labels, Labels]) -> None:
    true, found, ious = plain_ious(*images)
    matched = [(i, j) for i in range(len(true)) for j in range(len(found)) if ious[i, j] > 0.5]
    fn, fp = len(true) - len({i for i, _ in matched}), len(found) - len({j for _, j in matched})
    expected = ratio(sum(ious[pair] for pair in matched), len(matched) + fp / 2 + fn / 2)
    assert panoptic(overlap(*images)).pq == pytest.approx(expected, nan_ok=True)


@SOME
@given(small_images())
def test_aji_is_that_of_the_paper(images: tuple[Labels, Labels]) -> None:
    true, found, ious = plain_ious(*images)
    shared = union = 0
    used = set()
    for i, a in enumerate(true):
        # The greatest IoU; of equals more shared pixels, then the first.
        best = max(range(len(found)), key=lambda j: (ious[i, j], (a & found[j]).sum(), -j), default=None)
        if best is None or ious[i, best] == 0:
            union += a.sum()
            continue
        shared += (a & found[best]).sum()
        union += (a | found[best]).sum()
        used.add(best)
    union += sum(b.sum() for j, b in enumerate(found) if j not in used)
    assert aji(overlap(*images)).jaccard == pytest.approx(ratio(shared, union), nan_ok=True)


def matchings(n_true: int, n_found: int) -> Iterator[list[tuple[int, int]]]:
    """All one-to-one matchings, those that leave some objects alone too."""
    for columns in itertools.product([None, *range(n_found)], repeat=n_true):
        used = [j for j in columns if j is not None]
        if len(used) == len(set(used)):
            yield [(i, j) for i, j in enumerate(columns) if j is not None]


@SOME
@given(small_images())
def test_aji_plus_has_the_best_of_all_matchings(images: tuple[Labels, Labels]) -> None:
    true, found, ious = plain_ious(*images)
    best, outcomes = -1.0, set()
    for pairs in matchings(len(true), len(found)):
        if any(ious[pair] == 0 for pair in pairs):
            continue
        total = math.fsum(ious[pair] for pair in pairs)
        shared = int(sum((true[i] & found[j]).sum() for i, j in pairs))
        union = int(sum((true[i] | found[j]).sum() for i, j in pairs))
        union += int(sum(a.sum() for i, a in enumerate(true) if i not in {i for i, _ in pairs}))
        union += int(sum(b.sum() for j, b in enumerate(found) if j not in {j for _, j in pairs}))
        if total > best + 1e-9:
            best, outcomes = total, set()
        if total > best - 1e-9:
            outcomes.add((shared, union))
    sums = aji_plus(overlap(*images))
    assert (sums.shared_px, sums.truth_px + sums.predicted_px - sums.shared_px) in outcomes


@SOME
@given(small_images(), st.sampled_from([0.5, 1.0, 2.5]))
def test_detection_has_the_best_of_all_matchings(images: tuple[Labels, Labels], radius_px: float) -> None:
    found = overlap(*images)
    distance = cdist(found.truth.centroid_px, found.predicted.centroid_px)
    allowed = [
        pairs
        for pairs in matchings(len(found.truth), len(found.predicted))
        if all(distance[pair] <= radius_px for pair in pairs)
    ]
    most = max(map(len, allowed))
    least = min(math.fsum(distance[pair] for pair in pairs) for pairs in allowed if len(pairs) == most)
    rows, columns = centroid_pairs(found, radius_px)
    assert len(rows) == most == len(set(rows.tolist())) == len(set(columns.tolist()))
    assert distance[rows, columns].sum() == pytest.approx(least)
    assert (distance[rows, columns] <= radius_px).all()


def test_matchings_of_many_objects_are_the_best_too() -> None:
    """More pairs in chains than are solved at once, against a solver of the whole table."""
    found = overlap(blobs(5, n=2500, side=400), blobs(6, n=2500, side=400))
    assert len(found.shared_px) > 3000
    ious = np.zeros((len(found.truth), len(found.predicted)))
    ious[found.truth_row, found.predicted_row] = found.iou
    rows, columns = linear_sum_assignment(ious, maximize=True)
    rows, columns = rows[ious[rows, columns] > 0], columns[ious[rows, columns] > 0]
    shared = sum(
        found.shared_px[(found.truth_row == i) & (found.predicted_row == j)].item()
        for i, j in zip(rows, columns, strict=True)
    )
    assert aji_plus(found).shared_px == shared

    distance = cdist(found.truth.centroid_px, found.predicted.centroid_px)
    rows, columns = linear_sum_assignment(np.where(distance <= 6, distance, 1e6))
    near = distance[rows, columns] <= 6
    own_rows, own_columns = centroid_pairs(found, 6)
    assert len(own_rows) == near.sum() == len(set(own_rows.tolist())) == len(set(own_columns.tolist()))
    assert distance[own_rows, own_columns].sum() == pytest.approx(distance[rows, columns][near].sum())


def plain_hausdorff(a: Labels, b: Labels) -> float:
    distances = cdist(np.argwhere(a), np.argwhere(b))
    return float(max(distances.min(axis=0).max(), distances.min(axis=1).max()))


def plain_glas(truth: Labels, predicted: Labels) -> tuple[int, int, int, float, float]:
    """TP, FP, FN, object Dice and object Hausdorff, side by side with the text of the contest."""
    true, found = objects(truth), objects(predicted)

    def partner(one: Labels, others: list[Labels]) -> int | None:
        shared = [int((one & other).sum()) for other in others]
        return int(np.argmax(shared)) if shared and max(shared) else None

    hits = {}
    for j, b in enumerate(found):
        i = partner(b, true)
        if i is not None and (true[i] & b).sum() / true[i].sum() >= 0.5:
            hits[j] = i
    dice, hausdorff = [], []
    for ones, others in ((true, found), (found, true)):
        area = sum(one.sum() for one in ones)
        dice.append(0.0)
        hausdorff.append(0.0)
        for one in ones:
            at = partner(one, others)
            if at is not None:
                dice[-1] += one.sum() / area * 2 * (one & others[at]).sum() / (one.sum() + others[at].sum())
                hausdorff[-1] += one.sum() / area * plain_hausdorff(one, others[at])
            elif others:
                hausdorff[-1] += one.sum() / area * min(plain_hausdorff(one, other) for other in others)
    no_dice, no_hausdorff = not (true or found), not (true and found)
    return (
        len(hits),
        len(found) - len(hits),
        len(true) - len(set(hits.values())),
        math.nan if no_dice else sum(dice) / 2,
        math.nan if no_hausdorff else sum(hausdorff) / 2,
    )


@SOME
@given(small_images())
def test_gland_figures_are_those_of_the_contest(images: tuple[Labels, Labels]) -> None:
    tp, fp, fn, dice, hausdorff = plain_glas(*images)
    sums = gland_sums(overlap(*images))
    assert (sums.tp, sums.fp, sums.fn) == (tp, fp, fn)
    assert sums.dice == pytest.approx(dice, nan_ok=True)
    assert sums.hausdorff_px == pytest.approx(hausdorff, nan_ok=True)


@pytest.mark.parametrize("seed", range(3))
def test_gland_figures_of_many_objects(seed: int) -> None:
    truth, predicted = blobs(seed), blobs(seed + 100)
    tp, fp, fn, dice, hausdorff = plain_glas(truth, predicted)
    sums = gland_sums(overlap(truth, predicted))
    assert (sums.tp, sums.fp, sums.fn) == (tp, fp, fn)
    assert sums.dice == pytest.approx(dice)
    assert sums.hausdorff_px == pytest.approx(hausdorff)


def test_distances_can_be_left_out() -> None:
    found = overlap(blobs(1), blobs(2))
    sums = gland_sums(found, hausdorff=False)
    assert math.isnan(sums.hausdorff_px)
    assert (sums.f1, sums.dice) == (gland_sums(found).f1, gland_sums(found).dice)


@SOME
@given(small_images())
def test_dice_is_that_of_scikit_learn(images: tuple[Labels, Labels]) -> None:
    truth, predicted = (labels.ravel() > 0 for labels in images)
    expected = f1_score(truth, predicted, zero_division=np.nan) if truth.any() or predicted.any() else math.nan
    assert pixels(overlap(*images)).dice == pytest.approx(expected, nan_ok=True)


@SOME
@given(small_images(), st.data())
def test_a_class_is_scored_as_if_alone(images: tuple[Labels, Labels], data: st.DataObject) -> None:
    found = overlap(*images)
    classes = [
        np.array(data.draw(st.lists(st.integers(-1, 2), min_size=len(side), max_size=len(side))), int)
        for side in (found.truth, found.predicted)
    ]
    for each, sums in enumerate(panoptic_by_class(found, *classes, 3)):
        alone = [
            np.where(np.isin(labels, side.numbers[own == each]), labels, 0)
            for labels, side, own in zip(images, (found.truth, found.predicted), classes, strict=True)
        ]
        expected = panoptic(overlap(*alone))
        assert (sums.tp, sums.fp, sums.fn) == (expected.tp, expected.fp, expected.fn)
        assert sums.iou_sum == pytest.approx(expected.iou_sum)


def test_the_example_of_the_manual() -> None:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert [round(float(line), 3) for line in printed.getvalue().split()] == [0.714, 0.3, 0.556]


def test_empty_sums_are_undefined() -> None:
    assert math.isnan(GlandSums().dice)
    assert math.isnan(PixelSums().dice)
    assert math.isnan(PixelSums().jaccard)
    assert math.isnan(Panoptic().sq)
