"""Label images to outlines and back: exact, valid, and the same in whatever image an object is seen."""

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from scipy import ndimage
from shapely.geometry import Polygon

from pathopipe.geometry import Outlines, outlines_from_shapes, outlines_to_shapes
from pathopipe.segmentation import trace as trace_module
from pathopipe.segmentation.trace import (
    connect_runs,
    find_runs,
    paint_runs,
    rasterise_outlines,
    sum_runs,
    trace_labels,
)
from pathopipe.synth import DrawnSlide, SynthSpec
from pathopipe.tissue.outline import trace as trace_mask

SMALL_LABELS = arrays(np.int32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 3))
SCALE = (2.0126, 2.0119)


def image(text: str) -> NDArray[np.int32]:
    """A label image of digits, dots for background."""
    return np.array([[int(c) if c != "." else 0 for c in line] for line in text.split()], np.int32)


def ring(outlines: Outlines, number: int) -> list[tuple[float, float]]:
    start, stop = outlines.ring_offsets[number : number + 2]
    return [(float(x), float(y)) for x, y in outlines.vertices_l0[start:stop]]


def rings_of(outlines: Outlines, row: int) -> list[list[tuple[float, float]]]:
    first, last = outlines.polygon_offsets[outlines.object_offsets[row : row + 2]]
    return [ring(outlines, number) for number in range(first, last)]


def areas_px(labels: NDArray[np.int32], n: int) -> NDArray[np.int64]:
    return np.bincount(labels.ravel(), minlength=n + 1)[1:]


def test_one_pixel_is_a_unit_square() -> None:
    outlines = trace_labels(image("1"))
    assert ring(outlines, 0) == [(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]
    assert [list(part) for part in outlines[1:]] == [[0, 5], [0, 1], [0, 1]]


def test_a_ring_begins_at_its_top_left_corner_and_has_no_points_on_straight_lines() -> None:
    outlines = trace_labels(image(".11. 1111 1..."))
    assert ring(outlines, 0) == [(1, 0), (3, 0), (3, 1), (4, 1), (4, 2), (1, 2), (1, 3), (0, 3), (0, 1), (1, 1), (1, 0)]


def test_touching_labels_have_a_ring_each() -> None:
    outlines = trace_labels(image("12 32"))
    assert ring(outlines, 0) == [(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)]
    assert ring(outlines, 1) == [(1, 0), (2, 0), (2, 2), (1, 2), (1, 0)]
    assert ring(outlines, 2) == [(0, 1), (1, 1), (1, 2), (0, 2), (0, 1)]


def test_a_hole_with_islands() -> None:
    outlines = trace_labels(image("1111111 1.....1 1.1.2.1 1.....1 1111111"))
    first, second = outlines_to_shapes(outlines)
    assert [len(part.interiors) for part in first.geoms] == [1, 0]
    assert [part.area for part in first.geoms] == [20, 1]
    assert second.equals(shapely.box(4, 2, 5, 3))
    assert rings_of(outlines, 0)[1] == [(1, 1), (1, 4), (6, 4), (6, 1), (1, 1)]


def test_parts_that_touch_at_a_corner_stay_apart() -> None:
    (shape,) = outlines_to_shapes(trace_labels(image("1. .1")))
    assert shapely.get_num_geometries(shape) == 2
    assert shape.is_valid


def test_a_hole_that_touches_the_outside_at_a_corner_is_a_hole() -> None:
    (shape,) = outlines_to_shapes(trace_labels(image("111 1.1 11.")))
    assert (shapely.get_num_geometries(shape), len(shape.interiors), shape.is_valid, shape.area) == (1, 1, True, 7)


def test_two_labels_that_cross_at_a_corner() -> None:
    one, two = outlines_to_shapes(trace_labels(image("112 121 111")))
    assert one.is_valid and two.is_valid
    assert (one.area, two.area) == (7, 2)
    assert (shapely.get_num_geometries(one), shapely.get_num_geometries(two)) == (1, 2)


def test_parts_stand_from_the_largest_then_by_their_corner() -> None:
    outlines = trace_labels(image("1.1 ... 11. ... .11"))
    assert [part[0] for part in rings_of(outlines, 0)] == [(0, 2), (1, 4), (0, 0), (2, 0)]


def test_the_holes_count_when_parts_are_compared() -> None:
    ring_of_eight, block_of_nine = "111 1.1 111", "111 111 111"
    lines = [a + "." + b for a, b in zip(ring_of_eight.split(), block_of_nine.split(), strict=True)]
    outlines = trace_labels(image(" ".join(lines)))
    assert [part[0] for part in rings_of(outlines, 0)] == [(4, 0), (0, 0), (1, 1)]


def test_numbers_are_traced_in_their_order_and_missing_ones_are_empty() -> None:
    labels = image("1.7 1.. ..3").astype(np.int64) * 1_000_000_007
    numbers = np.array([7, 5, 1], np.int64) * 1_000_000_007
    shapes = outlines_to_shapes(trace_labels(labels, numbers=numbers))
    assert [shape.bounds if shape.area else None for shape in shapes] == [(2, 0, 3, 1), None, (0, 0, 1, 2)]


@pytest.mark.parametrize("labels", [np.zeros((3, 4), np.int32), np.zeros((0, 5), np.int32), np.full((2, 2), -1)])
def test_an_image_without_labels(labels: NDArray[np.integer]) -> None:
    outlines = trace_labels(labels)
    assert len(outlines.object_offsets) == 1 and len(outlines.vertices_l0) == 0
    outlines = trace_labels(labels, numbers=np.array([4]))
    assert list(outlines.object_offsets) == [0, 0]
    assert (rasterise_outlines(outlines, 4, 3)[0] == 0).all()


@given(SMALL_LABELS)
def test_tracing_and_drawing_is_the_identity(labels: NDArray[np.int32]) -> None:
    drawn, contested_px = rasterise_outlines(trace_labels(labels), labels.shape[1], labels.shape[0])
    np.testing.assert_array_equal(drawn, labels)
    assert contested_px == 0


@given(SMALL_LABELS)
def test_outlines_are_valid_exact_and_in_4_connected_parts(labels: NDArray[np.int32]) -> None:
    outlines = trace_labels(labels)
    shapes = outlines_to_shapes(outlines)
    assert shapely.is_valid(shapes).all()
    np.testing.assert_array_equal(shapely.area(shapes), areas_px(labels, len(shapes)))
    parts = [ndimage.label(labels == number + 1)[1] for number in range(len(shapes))]
    np.testing.assert_array_equal(np.diff(outlines.object_offsets), parts)
    for number in range(len(outlines.ring_offsets) - 1):
        points = ring(outlines, number)
        assert points[0] == points[-1] == min(points, key=lambda p: (p[1], p[0]))
        assert len(set(points)) == len(points) - 1
        steps = np.diff([*points, points[1]], axis=0) != 0
        assert (steps.sum(axis=1) == 1).all() and (steps[1:] != steps[:-1]).all()


@given(SMALL_LABELS, st.data())
def test_an_object_gives_the_same_vertices_in_every_crop(labels: NDArray[np.int32], data: st.DataObject) -> None:
    height, width = labels.shape
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    crop = labels[top:bottom, left:right]
    whole = np.flatnonzero(areas_px(crop, 3) == areas_px(labels, 3)) + 1
    corner = (170_001, 90_003)
    expected = trace_labels(labels, origin_px=corner, scale_l0=SCALE, numbers=whole)
    found = trace_labels(crop, origin_px=(corner[0] + left, corner[1] + top), scale_l0=SCALE, numbers=whole)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_vertices_are_scaled_before_they_are_rounded() -> None:
    outlines = trace_labels(image("1"), origin_px=(123_456, 98_765), scale_l0=SCALE)
    expected = np.float32([123_457 * SCALE[0], 98_766 * SCALE[1]])
    np.testing.assert_array_equal(outlines.vertices_l0[2], expected)


@given(arrays(np.int32, (14, 11), elements=st.integers(0, 1)))
def test_agrees_with_the_tracing_of_masks(mask: NDArray[np.int32]) -> None:
    if not mask.any():
        return
    outlines = trace_labels(mask)
    found = shapely.get_parts(outlines_to_shapes(outlines))
    expected = trace_mask(mask.astype(np.uint8))
    assert all(a.normalize().equals_exact(b.normalize()) for a, b in zip(found, expected, strict=True))


def test_the_layout_in_memory_does_not_matter() -> None:
    labels = np.random.default_rng(2).integers(0, 4, (9, 14)).astype(np.int16)
    expected = trace_labels(labels)
    for same in (
        np.asfortranarray(labels),
        np.repeat(np.repeat(labels, 2, 0), 3, 1)[::2, ::3],
        labels.astype(np.int64),
    ):
        for one, other in zip(trace_labels(same), expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_drawn_nuclei_and_glands_come_back() -> None:
    slide = DrawnSlide(SynthSpec(width_px=1200, height_px=900, mpp=0.5, seed=3))
    for labels in slide.labels(0, 0, 1200, 900).values():
        numbers = np.unique(labels)[1:]
        outlines = trace_labels(labels, numbers=numbers, origin_px=(40, -7), scale_l0=SCALE)
        assert len(numbers) > 0 and shapely.is_valid(outlines_to_shapes(outlines)).all()
        drawn, contested_px = rasterise_outlines(outlines, 1200, 900, SCALE, (40, -7))
        np.testing.assert_array_equal(np.concatenate([[0], numbers])[drawn], labels)
        assert contested_px == 0


# -- drawing -----------------------------------------------------------------------------------------------------------


def test_the_first_object_keeps_contested_pixels() -> None:
    outlines = outlines_from_shapes([shapely.box(0, 0, 3, 2), shapely.box(2, 0, 5, 2), shapely.box(2, 1, 4, 3)])
    drawn, contested_px = rasterise_outlines(outlines, 5, 3)
    np.testing.assert_array_equal(drawn, image("11122 11122 ..33."))
    assert contested_px == 3  # two shared by the first two, one of these by all three, one by the last two


def test_what_lies_outside_is_cut() -> None:
    outlines = outlines_from_shapes([shapely.box(-10, -10, 2, 1), shapely.box(3, -5, 4, 50), shapely.box(20, 0, 30, 3)])
    np.testing.assert_array_equal(rasterise_outlines(outlines, 5, 2)[0], image("11.2. ...2."))


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=3, max_size=3, unique=True),
    st.sampled_from([(4.0, 4.0), (3.7, 4.3)]),
)
def test_a_pixel_counts_by_its_centre(corners: list[tuple[int, int]], scale: tuple[float, float]) -> None:
    triangle = Polygon(corners)
    if triangle.area == 0:
        return
    drawn, _ = rasterise_outlines(outlines_from_shapes([triangle]), 10, 9, scale, (1, 1))
    x, y = np.meshgrid((np.arange(10) + 1.5) * scale[0], (np.arange(9) + 1.5) * scale[1])
    centres = shapely.points(x, y)
    clear = shapely.distance(centres, triangle.exterior) > 1e-6
    np.testing.assert_array_equal(drawn[clear] == 1, shapely.contains(triangle, centres)[clear])


def test_drawing_in_batches_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.random.default_rng(0).integers(0, 20, (60, 50)).astype(np.int32)
    monkeypatch.setattr(trace_module, "_RASTER_BATCH", 37)
    np.testing.assert_array_equal(rasterise_outlines(trace_labels(labels), 50, 60)[0], labels)
    boxes = [shapely.box(i, i, i + 4, i + 4) for i in range(8)]
    drawn, contested_px = rasterise_outlines(outlines_from_shapes(boxes), 12, 12)
    monkeypatch.undo()
    expected, expected_px = rasterise_outlines(outlines_from_shapes(boxes), 12, 12)
    np.testing.assert_array_equal(drawn, expected)
    assert contested_px == expected_px > 0


# Runs


@given(labels=SMALL_LABELS)
def test_painted_runs_are_the_image_again(labels: NDArray[np.int32]) -> None:
    runs = find_runs(np.pad(labels, 1))
    painted = paint_runs(runs, runs.label, labels.shape)
    assert painted.flags.c_contiguous
    assert (painted == labels).all()


@given(labels=SMALL_LABELS, seed=st.integers(0, 9))
def test_runs_add_up_to_what_their_pixels_do(labels: NDArray[np.int32], seed: int) -> None:
    plane = np.random.default_rng(seed).integers(0, 256, labels.shape, dtype=np.uint8)
    runs = find_runs(np.pad(labels, 1))
    found = np.bincount(runs.label, sum_runs(runs, plane), minlength=4)[1:]
    assert found.tolist() == ndimage.sum_labels(plane.astype(np.int64), labels, [1, 2, 3]).tolist()


@given(labels=SMALL_LABELS)
def test_connected_runs_are_numbered_as_they_stand_in_the_image(labels: NDArray[np.int32]) -> None:
    framed = np.pad(labels, 1)
    runs = find_runs(framed)
    region = paint_runs(runs, connect_runs(runs, framed) + 1, labels.shape)
    flat = region.ravel()[region.ravel() > 0]
    _, first = np.unique(flat, return_index=True)
    assert (np.diff(first) > 0).all()
    for value in (1, 2, 3):
        expected, n = ndimage.label(labels == value)
        pairs = np.unique(np.stack([expected.ravel(), region.ravel()])[:, expected.ravel() > 0], axis=1)
        assert pairs[0].tolist() == list(range(1, n + 1))
        assert len(np.unique(pairs[1])) == n
