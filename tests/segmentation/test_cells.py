"""Cells from nuclei: exactly the nearest nucleus, within the distance, the same in every crop."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from scipy import ndimage

from pathopipe.errors import UsageError
from pathopipe.segmentation.cells import expand_labels
from pathopipe.synth import DrawnSlide, SynthSpec

SPARSE_LABELS = arrays(
    np.int32, array_shapes(min_dims=2, max_dims=2, max_side=14), elements=st.sampled_from([0] * 9 + [1, 2, 3])
)
REACHES = st.sampled_from([0, 1, 1.5, 2, 3.2, 5, (2.0, 4.0), (3.1, 3.0), (0.0, 2.0)])


def by_brute_force(
    labels: NDArray[np.int32], reach: float | tuple[float, float], limit: NDArray[np.bool_] | None = None
) -> NDArray[np.int32]:
    """Offsets tried from the nearest on, then topmost, then leftmost; then what is cut off is taken away."""
    height, width = labels.shape
    reach_x, reach_y = reach if isinstance(reach, tuple) else (reach, reach)

    def square(dx: int, dy: int) -> float:
        if reach_x == reach_y:
            return dx * dx + dy * dy
        return (dx / max(reach_x, 1)) ** 2 + (dy / max(reach_y, 1)) ** 2

    farthest = reach_x**2 if reach_x == reach_y else 1
    offsets = itertools.product(range(-int(reach_y), int(reach_y) + 1), range(-int(reach_x), int(reach_x) + 1))
    ranked = sorted((square(dx, dy), dy, dx) for dy, dx in offsets if square(dx, dy) <= farthest)
    grown = labels.copy()
    for y, x in np.argwhere(labels <= 0).tolist():
        if limit is not None and not limit[y, x]:
            continue
        for _, dy, dx in ranked:
            if 0 <= y + dy < height and 0 <= x + dx < width and labels[y + dy, x + dx] > 0:
                grown[y, x] = labels[y + dy, x + dx]
                break
    for number in np.unique(labels[labels > 0]):
        parts, n = ndimage.label(grown == number)
        for part in range(1, n + 1):
            if not (labels[parts == part] == number).any():
                grown[parts == part] = 0
    return grown


@given(SPARSE_LABELS, REACHES)
def test_every_pixel_joins_the_nearest_nucleus(labels: NDArray[np.int32], reach: float | tuple[float, float]) -> None:
    np.testing.assert_array_equal(expand_labels(labels, reach), by_brute_force(labels, reach))


@given(SPARSE_LABELS, arrays(np.bool_, (14, 14)))
def test_cells_stay_within_a_limit(labels: NDArray[np.int32], limit: NDArray[np.bool_]) -> None:
    limit = limit[: labels.shape[0], : labels.shape[1]]
    grown = expand_labels(labels, 4, limit=limit)
    np.testing.assert_array_equal(grown, by_brute_force(labels, 4, limit))
    assert (grown == labels)[~limit].all()


@given(arrays(np.int32, (24, 22), elements=st.sampled_from([0] * 30 + [1, 2])), st.integers(0, 8), st.integers(0, 8))
def test_a_cell_is_the_same_in_every_crop(labels: NDArray[np.int32], top: int, left: int) -> None:
    reach, crop = 3, labels[top : top + 16, left : left + 14]
    # What a pixel joins is decided within its reach, and whether it is cut off within that of its nucleus.
    seen = slice(3 * reach, -3 * reach)
    whole, part = expand_labels(labels, reach), expand_labels(np.where(crop > 0, 3 - crop, 0), reach)
    expected = whole[top : top + 16, left : left + 14][seen, 4 * reach : 4 * reach + 2]
    np.testing.assert_array_equal(np.where(part > 0, 3 - part, 0)[seen, 4 * reach : 4 * reach + 2], expected)


def test_ties_go_to_the_topmost_then_the_leftmost_nucleus() -> None:
    labels = np.zeros((5, 5), np.int64)
    labels[0, 2], labels[2, 0], labels[2, 4], labels[4, 2] = 9, 2, 7, 1
    grown = expand_labels(labels, 2)
    assert grown[2, 2] == 9
    labels[0, 2] = 0
    assert expand_labels(labels, 2)[2, 2] == 2
    assert grown.dtype == labels.dtype


def test_the_layout_in_memory_does_not_matter() -> None:
    labels = np.where(np.random.default_rng(3).random((20, 30)) < 0.03, 1, 0) * np.arange(1, 31)
    expected = expand_labels(labels, 4)
    np.testing.assert_array_equal(expand_labels(np.asfortranarray(labels), 4), expected)
    np.testing.assert_array_equal(expand_labels(np.repeat(labels, 2, 1)[:, ::2], 4), expected)


def test_a_pixel_that_is_cut_off_stays_background() -> None:
    labels = np.array([[1, 0, 0, 0, 0]])
    limit = np.array([[True, True, False, True, True]])
    assert expand_labels(labels, 4, limit=limit).tolist() == [[1, 1, 0, 0, 0]]


def test_drawn_nuclei_grow_by_exactly_the_distance() -> None:
    nuclei = DrawnSlide(SynthSpec(width_px=700, height_px=500, mpp=0.5, seed=4)).labels(0, 0, 700, 500)["nuclei"]
    before = nuclei.copy()
    cells = expand_labels(nuclei, 10)
    np.testing.assert_array_equal(nuclei, before)
    np.testing.assert_array_equal(cells[nuclei > 0], nuclei[nuclei > 0])
    distance = ndimage.distance_transform_edt(nuclei == 0)
    assert (cells[distance > 10] == 0).all()
    near = (distance <= 10) & (nuclei == 0)
    assert (cells[near] > 0).mean() > 0.999
    rows, columns = np.nonzero(near & (cells > 0))
    for y, x in list(zip(rows.tolist(), columns.tolist(), strict=True))[:: len(rows) // 200]:
        own_y, own_x = np.nonzero(nuclei == cells[y, x])
        assert np.hypot(own_y - y, own_x - x).min() == pytest.approx(distance[y, x])


@pytest.mark.parametrize("reach", [-1, 121, float("nan"), float("inf"), (3.0, -2.0)])
def test_a_distance_that_makes_no_sense_is_refused(reach: float | tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="cells can grow by 0 to 120 px"):
        expand_labels(np.ones((2, 2), np.int32), reach)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1), (2, 3)])
def test_images_without_labels_and_smaller_than_the_distance(shape: tuple[int, int]) -> None:
    assert not expand_labels(np.zeros(shape, np.int32), 7).any()
    if 0 not in shape:
        labels = np.zeros(shape, np.int32)
        labels[0, 0] = 5
        assert (expand_labels(labels, 120) == 5).all()
