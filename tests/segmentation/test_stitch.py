"""Large objects cut into regions come back whole, whatever the regions; points have one owner."""

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from pathopipe.geometry import outlines_to_shapes
from pathopipe.segmentation.stitch import BoxPx, RegionPieces, cut_strips, join_pieces, owned_by, regions_of
from pathopipe.segmentation.trace import trace_labels

HALO_PX = 8


def blobs(seed: int, side_px: int, n: int) -> NDArray[np.int32]:
    """Objects of any shape that touch, wind and have holes: the nearest of n seeds, on smooth noise's high ground."""
    rng = np.random.default_rng(seed)
    ground = ndimage.gaussian_filter(rng.normal(size=(side_px, side_px)), 3) > -0.02
    seeds = np.zeros((side_px, side_px), np.int32)
    at = rng.choice(side_px * side_px, n, replace=False)
    seeds.ravel()[at] = np.arange(1, n + 1)
    _, nearest = ndimage.distance_transform_edt(seeds == 0, return_indices=True)
    labels = seeds[tuple(nearest)] * ground
    # One object is one 4-connected piece.
    whole = np.zeros_like(labels)
    for number in np.unique(labels[labels > 0]).tolist():
        parts, n_parts = ndimage.label(labels == number)
        for part in range(1, n_parts + 1):
            whole[parts == part] = whole.max() + 1
    return whole


def seen(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """What a region makes of its part of an image: connected pieces, numbered anew."""
    out = np.zeros_like(labels)
    for number in np.unique(labels[labels > 0]).tolist():
        parts, n_parts = ndimage.label(labels == number)
        out[parts > 0] = parts[parts > 0] + out.max()
        assert n_parts
    return out


def cut_and_join(labels: NDArray[np.int32], region_px: int, *, backwards: bool = False) -> NDArray[np.object_]:
    framed = np.pad(labels, HALO_PX)
    regions = {}
    for key, box in regions_of((labels.shape[1], labels.shape[0]), region_px).items():
        view = seen(
            framed[box.y_px : box.y_px + box.height_px + 2 * HALO_PX, box.x_px : box.x_px + box.width_px + 2 * HALO_PX]
        )
        core = view[HALO_PX:-HALO_PX, HALO_PX:-HALO_PX]
        numbers = np.unique(core[core > 0])
        shapes = outlines_to_shapes(trace_labels(core, origin_px=(box.x_px, box.y_px), numbers=numbers))
        regions[key] = RegionPieces(numbers.astype(np.int32), shapes, cut_strips(view, HALO_PX, 6))
    if backwards:
        regions = dict(reversed(regions.items()))
    joined, object_of_piece, first_piece = join_pieces(regions)
    assert len(object_of_piece) == sum(len(pieces.label) for pieces in regions.values())
    assert (object_of_piece[first_piece] == np.arange(len(joined))).all()
    return joined


@pytest.mark.parametrize("region_px", [16, 24, 40, 96])
def test_objects_of_any_shape_come_back_whole(region_px: int) -> None:
    labels = blobs(1, 96, 12)
    joined = cut_and_join(labels, region_px)
    truth = outlines_to_shapes(trace_labels(labels))
    assert {shapely.normalize(shape).wkb for shape in truth} == {shape.wkb for shape in joined}
    assert shapely.is_valid(joined).all()
    # Some do have holes and touch others, or this would be an easy picture.
    assert sum(len(part.interiors) for shape in truth for part in shapely.get_parts(shape)) > 0


@given(seed=st.integers(0, 10_000), region_px=st.integers(12, 70), side_px=st.integers(20, 64))
def test_regions_leave_no_trace(seed: int, region_px: int, side_px: int) -> None:
    labels = blobs(seed, side_px, 5)
    truth = {shapely.normalize(shape).wkb for shape in outlines_to_shapes(trace_labels(labels))}
    assert truth == {shape.wkb for shape in cut_and_join(labels, region_px)}
    assert truth == {shape.wkb for shape in cut_and_join(labels, region_px, backwards=True)}


def test_touching_objects_stay_apart() -> None:
    labels = np.zeros((40, 40), np.int32)
    labels[4:20, 2:38] = 1  # two bars, one below the other, both across the border at x = 20
    labels[20:36, 2:38] = 2
    joined = cut_and_join(labels, 20)
    assert sorted(shape.bounds for shape in joined) == [(2, 4, 38, 20), (2, 20, 38, 36)]


def test_an_object_that_leaves_and_comes_back_is_one() -> None:
    labels = np.zeros((40, 40), np.int32)
    labels[5:35, 25:35] = 1  # a U on its side: both arms reach left across x = 20, far apart
    labels[5:10, 5:25] = 1
    labels[30:35, 5:25] = 1
    (joined,) = cut_and_join(labels, 20)
    assert joined.area == np.count_nonzero(labels)


@given(
    x=st.lists(st.floats(0, 99.99), min_size=1, max_size=30),
    y=st.floats(0, 79.99),
    region_px=st.integers(1, 120),
)
def test_each_point_has_one_owner(x: list[float], y: float, region_px: int) -> None:
    points = np.array([(each, y) for each in x])
    owners = sum(owned_by(box, points).astype(int) for box in regions_of((100, 80), region_px).values())
    assert (np.asarray(owners) == 1).all()


def test_a_border_belongs_to_the_region_behind_it() -> None:
    assert owned_by(BoxPx(10, 0, 10, 10), np.array([[10.0, 0.0], [20.0, 5.0], [19.99, 9.99]])).tolist() == [
        True,
        False,
        True,
    ]


def test_nothing_gives_nothing() -> None:
    joined, object_of_piece, first_piece = join_pieces({})
    assert len(joined) == len(object_of_piece) == len(first_piece) == 0
