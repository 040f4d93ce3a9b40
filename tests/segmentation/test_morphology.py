"""Measurements: known truth, scikit-image, and the same to the last bit wherever an object is seen."""

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from skimage import measure

from pathopipe.geometry import outlines_to_shapes
from pathopipe.segmentation import morphology
from pathopipe.segmentation.morphology import (
    GLAND_NAMES,
    MEASUREMENT_NAMES,
    NEIGHBOUR_NAMES,
    SHAPE_NAMES,
    assign_parents,
    gland_measurements,
    measure_labels,
    measure_shapes,
    neighbourhood,
)
from pathopipe.segmentation.trace import trace_labels
from pathopipe.stain import STAIN_STEP_OD, STAIN_ZERO, stain_bytes
from pathopipe.synth import DrawnSlide, SynthSpec

SMALL_LABELS = arrays(np.int32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 3))
COLUMN = {name: number for number, name in enumerate(MEASUREMENT_NAMES)}


def noise(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)


def column(name: str, labels: NDArray[np.integer], mpp: tuple[float, float] = (1.0, 1.0)) -> NDArray[np.float32]:
    return measure_labels(labels, noise(labels.shape), mpp=mpp).values[:, COLUMN[name]]


def angle_between(one: NDArray[np.floating], other: NDArray[np.floating]) -> NDArray[np.floating]:
    apart = np.abs(one - other) % 180
    return np.minimum(apart, 180 - apart)


@pytest.fixture(scope="module")
def slide() -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Nuclei numbered from 1, and pixels."""
    drawn = DrawnSlide(SynthSpec(width_px=900, height_px=700, mpp=0.5, seed=5))
    labels = drawn.labels(0, 0, 900, 700)["nuclei"]
    numbers, flat = np.unique(labels, return_inverse=True)
    assert len(numbers) > 100 and numbers[0] == 0
    return flat.reshape(labels.shape).astype(np.int32), drawn.read(0, 0, 900, 700)


def ellipse(major: float, minor: float, angle: float, pixel: tuple[float, float]) -> NDArray[np.int32]:
    """A label image of half axes in micrometres; the angle turns up from the x axis."""
    reach = major + 3
    x = np.arange(-reach, reach, pixel[0])[None, :] + 0.13
    y = np.arange(-reach, reach, pixel[1])[:, None] + 0.21
    turn = np.radians(angle)
    along, across = x * np.cos(turn) - y * np.sin(turn), x * np.sin(turn) + y * np.cos(turn)
    return ((along / major) ** 2 + (across / minor) ** 2 <= 1).astype(np.int32)


# -- names -------------------------------------------------------------------------------------------------------------


def test_a_nucleus_bears_well_under_thirty_numbers() -> None:
    names = MEASUREMENT_NAMES + NEIGHBOUR_NAMES + GLAND_NAMES
    assert len(set(names)) == len(names) == 19
    assert MEASUREMENT_NAMES[: len(SHAPE_NAMES)] == SHAPE_NAMES


# -- from pixels -------------------------------------------------------------------------------------------------------


def test_shape_agrees_with_scikit_image(slide: tuple[NDArray[np.int32], NDArray[np.uint8]]) -> None:
    labels, rgb = slide
    measured = measure_labels(labels, rgb, mpp=(0.5, 0.5))
    values = {name: measured.values[:, number] for name, number in COLUMN.items()}
    theirs = measure.regionprops(labels)

    def listed(attribute: str) -> NDArray[np.float64]:
        return np.array([getattr(region, attribute) for region in theirs])

    np.testing.assert_allclose(values["Area µm^2"], listed("area") / 4, rtol=1e-6)
    np.testing.assert_allclose(measured.centroid_px, listed("centroid")[:, ::-1] + 0.5, rtol=1e-12)
    crofton = [measure.perimeter_crofton(region.image, directions=4) for region in theirs]
    np.testing.assert_allclose(values["Perimeter µm"], np.array(crofton) / 2, rtol=1e-6)
    # Their pixels are points, ours squares, which adds 1/12 px² to the variance along each axis.
    major, minor = (np.sqrt(listed(f"axis_{name}_length") ** 2 + 16 / 12) for name in ("major", "minor"))
    np.testing.assert_allclose(values["Major axis µm"], major / 2, rtol=1e-6)
    np.testing.assert_allclose(values["Minor axis µm"], minor / 2, rtol=1e-6)
    np.testing.assert_allclose(values["Eccentricity"], np.sqrt(1 - (minor / major) ** 2), rtol=1e-4, atol=1e-4)
    # They measure from the downward axis.
    long = major > 1.05 * minor
    assert angle_between(values["Orientation °"], np.degrees(listed("orientation")) + 90)[long].max() < 1e-3
    # Their hull is that of the midpoints of pixel edges, drawn into pixels: smaller than ours.
    less = (listed("solidity") - values["Solidity"])[listed("area") > 60]
    assert less.min() >= 0 and np.median(less) < 0.04 and less.max() < 0.1


def test_solidity_is_that_of_the_hull_of_pixel_corners(slide: tuple[NDArray[np.int32], NDArray[np.uint8]]) -> None:
    labels, rgb = slide
    shapes = outlines_to_shapes(trace_labels(labels))
    solidity = measure_labels(labels, rgb, mpp=(0.5, 0.5)).values[:, COLUMN["Solidity"]]
    np.testing.assert_allclose(solidity, shapely.area(shapes) / shapely.area(shapely.convex_hull(shapes)), rtol=1e-6)


def test_stain_is_the_mean_and_spread_within_the_object(slide: tuple[NDArray[np.int32], NDArray[np.uint8]]) -> None:
    labels, rgb = slide
    values = measure_labels(labels, rgb, mpp=(0.5, 0.5)).values
    planes = [(plane.astype(np.float64) - STAIN_ZERO) * STAIN_STEP_OD for plane in stain_bytes(rgb)]
    for number in (1, 7, 50, int(labels.max())):
        inside = labels == number
        expected = [number for plane in planes for number in (plane[inside].mean(), plane[inside].std())]
        np.testing.assert_allclose(values[number - 1, len(SHAPE_NAMES) :], expected, atol=1e-6)


def test_one_pixel() -> None:
    rgb = np.full((3, 3, 3), 255, np.uint8)
    labels = np.zeros((3, 3), np.int32)
    labels[1, 2] = 1
    measured = measure_labels(labels, rgb, mpp=(0.5, 0.5), origin_px=(100, 200))
    np.testing.assert_array_equal(measured.centroid_px, [[102.5, 201.5]])
    crossings_um = np.pi / 8 * (2 + 2 + 4 / np.sqrt(2)) * 0.5
    axis_um = 4 * np.sqrt(1 / 12) * 0.5
    expected = [0.25, crossings_um, axis_um, axis_um, 0, 1, 1, np.nan, 0, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(measured.values[0], expected, atol=1e-6)


@pytest.mark.parametrize("pixel", [(0.25, 0.25), (0.5, 0.3)])
@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0, 135.0, 163.0])
def test_an_ellipse_of_known_size(angle: float, pixel: tuple[float, float]) -> None:
    labels = ellipse(12, 7, angle, pixel)
    values = measure_labels(labels, noise(labels.shape), mpp=pixel).values[0]
    area = np.pi * 12 * 7
    around = np.pi * (3 * 19 - np.sqrt((3 * 12 + 7) * (12 + 3 * 7)))  # Ramanujan 1914
    expected = [area, around, 24, 14, np.sqrt(1 - (7 / 12) ** 2), 1, 4 * np.pi * area / around**2]
    # The steps of the outline leave some room within the hull of the corners.
    assert (np.abs(values[:7] / expected - 1) < [0.01, 0.03, 0.01, 0.01, 0.01, 0.04, 0.05]).all()
    assert angle_between(values[7], np.float64(angle)) < 0.5


def test_orientation_turns_up_from_the_x_axis() -> None:
    falling = np.eye(5, dtype=np.int32)
    bars = [np.ones((1, 4), np.int32), falling[::-1], np.ones((4, 1), np.int32), falling]
    np.testing.assert_allclose([column("Orientation °", bar)[0] for bar in bars], [0, 45, 90, 135], atol=1e-4)
    # On pixels twice as high as wide the rising diagonal is steeper.
    steep = column("Orientation °", falling[::-1], (1.0, 2.0))[0]
    assert 60 < steep < 75
    assert np.isnan(column("Orientation °", np.ones((2, 2), np.int32))[0])
    assert column("Orientation °", np.ones((2, 2), np.int32), (1.0, 2.0))[0] == 90


def test_numbers_are_measured_in_their_order_and_missing_ones_are_nan() -> None:
    labels = np.array([[10**9, 0, 5], [10**9, 0, 0]])
    measured = measure_labels(labels, noise(labels.shape), mpp=(1, 1), numbers=np.array([5, 6, 10**9]))
    np.testing.assert_array_equal(measured.values[:, 0], [1, np.nan, 2])
    assert np.isnan(measured.values[1]).all() and np.isnan(measured.centroid_px[1]).all()
    nothing = measure_labels(np.zeros((4, 4), np.int32), noise((4, 4)), mpp=(1, 1))
    assert nothing.values.shape == (0, len(MEASUREMENT_NAMES)) and nothing.centroid_px.shape == (0, 2)


def test_pixels_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(5, 4, 3\) do not fit labels of shape \(4, 5\)"):
        measure_labels(np.zeros((4, 5), np.int32), noise((5, 4)), mpp=(1, 1))


@given(SMALL_LABELS, st.data())
def test_an_object_measures_the_same_in_every_crop(labels: NDArray[np.int32], data: st.DataObject) -> None:
    height, width = labels.shape
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    crop = labels[top:bottom, left:right]
    areas = [np.bincount(part.ravel(), minlength=4)[1:] for part in (labels, crop)]
    whole = np.flatnonzero((areas[0] == areas[1]) & (areas[0] > 0)) + 1
    rgb, mpp, origin = noise(labels.shape), (0.5031, 0.5029), (80_001, 120_007)
    expected = measure_labels(labels, rgb, mpp=mpp, origin_px=origin, numbers=whole)
    origin = (origin[0] + left, origin[1] + top)
    found = measure_labels(crop, rgb[top:bottom, left:right], mpp=mpp, origin_px=origin, numbers=whole)
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.centroid_px, expected.centroid_px)


def test_the_layout_in_memory_does_not_matter(slide: tuple[NDArray[np.int32], NDArray[np.uint8]]) -> None:
    labels, rgb = slide
    part = np.s_[100:300, 50:350]
    expected = measure_labels(labels[part].copy(), rgb[part].copy(), mpp=(0.5, 0.5))
    found = measure_labels(np.asfortranarray(labels)[part], np.asfortranarray(rgb)[part], mpp=(0.5, 0.5))
    np.testing.assert_array_equal(found.values, expected.values)


def test_measuring_in_batches_changes_nothing(
    slide: tuple[NDArray[np.int32], NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, rgb = slide[0][:200, :200], slide[1][:200, :200]
    expected = measure_labels(labels, rgb, mpp=(0.5, 0.5))
    monkeypatch.setattr(morphology, "_PIXEL_BATCH", 100)
    np.testing.assert_array_equal(measure_labels(labels, rgb, mpp=(0.5, 0.5)).values, expected.values)


# -- from polygons -----------------------------------------------------------------------------------------------------


@given(SMALL_LABELS)
def test_outlines_measure_as_their_pixels_do(labels: NDArray[np.int32]) -> None:
    scale, mpp_l0 = (2.0, 2.0), (0.25, 0.26)
    shapes = outlines_to_shapes(trace_labels(labels, origin_px=(1000, 700), scale_l0=scale))
    expected = measure_labels(labels, noise(labels.shape), mpp=(0.5, 0.52)).values[:, : len(SHAPE_NAMES)]
    found = measure_shapes(shapes, mpp=mpp_l0, pixel_l0=scale)
    np.testing.assert_allclose(found[:, :7], expected[:, :7], rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(np.isnan(found[:, 7]), np.isnan(expected[:, 7]))
    clear = expected[:, 4] > 0.1
    assert (angle_between(found[clear, 7], expected[clear, 7]) < 1e-2).all()


def test_smooth_polygons_of_known_size() -> None:
    circle = shapely.Point(5000, 7000).buffer(100, quad_segs=200)
    ring = circle.difference(shapely.Point(5000, 7000).buffer(50, quad_segs=200))
    bar = shapely.affinity.rotate(shapely.box(0, 0, 60, 20), -30)
    pair = shapely.union(shapely.box(0, 0, 2, 2), shapely.box(6, 0, 8, 2))
    found = measure_shapes(np.array([circle, ring, bar, pair]), mpp=(0.5, 0.5), pixel_l0=(1, 1))
    root = np.sqrt(1 + 0.25)
    expected = np.array(
        [
            [np.pi * 2500, np.pi * 100, 100, 100, 0, 1, 1],
            [np.pi * 1875, np.pi * 150, 100 * root, 100 * root, 0, 0.75, 4 * 1875 / 150**2],
            [300, 80, 4 * np.sqrt(30**2 / 12), 4 * np.sqrt(10**2 / 12), np.sqrt(8 / 9), 1, 1200 * np.pi / 6400],
            [2, 0, 4 * np.sqrt(1 / 12 + 2.25), 4 * np.sqrt(1 / 12), np.sqrt(1 - 1 / 28), 0.5, 1],
        ]
    )
    expected[3, 1] = 2 * np.pi / 8 * (8 + (2 * 8 - 4) / np.sqrt(2)) * 0.5
    expected[3, 6] = 4 * np.pi * 2 / expected[3, 1] ** 2
    np.testing.assert_allclose(found[:, :7], expected, rtol=1e-3, atol=0.02)
    np.testing.assert_allclose(found[2:, 7], [30, 0], atol=1e-3)
    assert np.isnan(found[0, 7])


def test_without_a_pixel_size_the_perimeter_is_the_length() -> None:
    found = measure_shapes(np.array([shapely.box(0, 0, 4, 2)]), mpp=(0.5, 2))
    assert found[0, 1] == 12


def test_empty_shapes_and_none() -> None:
    found = measure_shapes(np.array([shapely.Polygon(), shapely.box(0, 0, 1, 1)]), mpp=(1, 1), pixel_l0=(1, 1))
    assert np.isnan(found[0]).all() and found[1, 0] == 1
    assert measure_shapes(np.array([], object), mpp=(1, 1), pixel_l0=(1, 1)).shape == (0, 8)


# -- neighbours --------------------------------------------------------------------------------------------------------


def by_brute_force(points: NDArray[np.float64]) -> NDArray[np.float32]:
    apart = np.sqrt(((points[:, None] - points[None]) ** 2).sum(axis=2))
    np.fill_diagonal(apart, np.inf)
    return np.stack([apart.min(axis=1), (apart <= 50).sum(axis=1) / (np.pi * 0.05**2)], axis=1).astype(np.float32)


def test_neighbours_of_known_places() -> None:
    found = neighbourhood(np.array([[0.0, 0], [30, 40], [30, 41], [500, 0]]))
    np.testing.assert_allclose(found[:, 0], [50, 1, 1, np.hypot(470, 40)], rtol=1e-6)
    np.testing.assert_allclose(found[:, 1] * np.pi * 0.0025, [1, 2, 1, 0], atol=1e-4)


@given(arrays(np.float64, st.tuples(st.integers(2, 60), st.just(2)), elements=st.integers(0, 300).map(float)))
def test_neighbours_agree_with_all_pairs(points: NDArray[np.float64]) -> None:
    np.testing.assert_allclose(neighbourhood(points), by_brute_force(points), rtol=1e-6)


def test_neighbours_do_not_depend_on_order_or_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    points = rng.uniform(0, 900, (3000, 2))
    expected = neighbourhood(points)
    order = rng.permutation(len(points))
    monkeypatch.setattr(morphology, "_NEIGHBOUR_BATCH", 700)
    np.testing.assert_array_equal(neighbourhood(points[order]), expected[order])


def test_few_objects_have_no_neighbour() -> None:
    assert neighbourhood(np.empty((0, 2))).shape == (0, 2)
    np.testing.assert_array_equal(neighbourhood(np.array([[3.0, 4]])), [[np.nan, 0]])


# -- parents and glands ------------------------------------------------------------------------------------------------

RING = shapely.box(0, 0, 100, 100).difference(shapely.box(20, 20, 80, 80))
INNER = shapely.box(40, 40, 60, 60)
FAR = shapely.MultiPolygon([shapely.box(200, 0, 300, 100), shapely.box(400, 0, 410, 10)])
GLANDS = np.array([RING, INNER, FAR, INNER])


def test_the_smallest_that_surrounds_a_point_is_its_parent() -> None:
    points = np.array([[5.0, 5], [30, 30], [50, 50], [100, 50], [150, 50], [405, 5]])
    assert assign_parents(points, GLANDS).tolist() == [0, 0, 1, 0, -1, 2]
    assert assign_parents(shapely.points(points), GLANDS).tolist() == [0, 0, 1, 0, -1, 2]


def test_a_shape_lies_in_what_holds_half_of_it() -> None:
    shapes = np.array([shapely.box(90, 0, 110, 10), shapely.box(91, 0, 111, 10), shapely.box(41, 41, 59, 59)])
    assert assign_parents(shapes, GLANDS).tolist() == [0, -1, 1]


def test_parents_of_nobody_and_by_nobody() -> None:
    assert assign_parents(np.empty((0, 2)), GLANDS).tolist() == []
    assert assign_parents(np.array([[1.0, 1]]), np.array([], object)).tolist() == [-1]


def test_what_glands_hold() -> None:
    found = gland_measurements(
        GLANDS[:3],
        mpp=(0.5, 2.0),
        nucleus_parent=np.array([0, -1, 0, 2]),
        lumen_parent=np.array([0, 1, -1, 0]),
        lumen_area_um2=np.array([1000.0, 100, 9, 500]),
    )
    np.testing.assert_allclose(found, [[2, 200, 0.15], [0, 0, 0.25], [1, 1e6 / 10_100, 0]], rtol=1e-6)
    unseen = gland_measurements(GLANDS, mpp=(1, 1))
    assert unseen.shape == (4, 3) and np.isnan(unseen).all()


def test_drawn_lumina_and_nuclei_find_their_glands() -> None:
    slide = DrawnSlide(SynthSpec(width_px=1600, height_px=1600, mpp=0.5, seed=2))
    objects = slide.objects(0, 0, 1600, 1600)
    glands, lumina = ([o for o in objects if o.kind == kind] for kind in ("gland", "lumen"))
    shapes = np.array([gland.polygon for gland in glands])
    rows = {gland.id: row for row, gland in enumerate(glands)}
    known = [lumen for lumen in lumina if lumen.parent in rows]
    assert len(known) > 3
    found = assign_parents(np.array([lumen.polygon for lumen in known]), shapes)
    assert found.tolist() == [rows[lumen.parent] for lumen in known]
    hollow = np.array([shapely.difference(g.polygon, shapely.union_all([o.polygon for o in lumina])) for g in glands])
    centroids = np.array([lumen.polygon.centroid.coords[0] for lumen in known])
    assert assign_parents(centroids, hollow).tolist() == found.tolist()
