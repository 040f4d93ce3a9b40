"""Targets of crops: distances, borders and tissue cells against other implementations and counts by hand."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import find_boundaries

from pathopipe.segmentation.augment import Crop
from pathopipe.segmentation.examples import UNKNOWN
from pathopipe.segmentation.network import ClassSpec, NetworkSpec, TaskSpec
from pathopipe.segmentation.targets import border_target, distance_target, make_targets

SIDE = 96


def spec_of(*tasks: str, n_classes: int = 1) -> NetworkSpec:
    classes = tuple(ClassSpec(name=f"class {k}", color=(k, 90, 200)) for k in range(n_classes))
    return NetworkSpec(tasks=tuple(TaskSpec(name=task, classes=classes) for task in tasks))


def crop_of(side: int = SIDE, **said: Any) -> Crop:
    everything: dict[str, Any] = {
        "rgb": np.zeros((side, side, 3), np.uint8),
        "labels": {},
        "classes": {},
        "known": {},
        "inside_image": np.ones((side, side), np.bool_),
        "merged": frozenset(),
        "tissue_types": None,
        "tissue_map": None,
    }
    return Crop(**(everything | said))


def drawn_labels() -> NDArray[np.int32]:
    """A disc, a long ellipse, two squares side by side, a dot, a disc that the image cuts."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    labels = np.zeros((SIDE, SIDE), np.int32)
    labels[np.hypot(x - 22, y - 22) < 15] = 1
    labels[((x - 65) / 24) ** 2 + ((y - 20) / 9) ** 2 < 1] = 2
    labels[50:70, 10:30] = 3
    labels[50:70, 30:44] = 4
    labels[80, 20] = 5
    labels[np.hypot(x - SIDE, y - 70) < 18] = 6
    return labels


def own_distance(labels: NDArray[np.int32]) -> NDArray[np.float64]:
    """The exact distance of each pixel from its own object's outermost pixels, these at 1, over the greatest."""
    out = np.zeros(labels.shape)
    for number in np.unique(labels[labels > 0]):
        own = labels == number
        inner = ndimage.binary_erosion(own, np.ones((3, 3)), border_value=1)
        depth = np.where(own, ndimage.distance_transform_edt(inner) + 1, 0)
        out = np.where(own, depth / depth.max(), out)
    return out


def test_distances_are_those_of_each_object_by_itself() -> None:
    labels = drawn_labels()
    found = distance_target(labels)
    assert found.dtype == np.float32
    assert np.abs(found - own_distance(labels)).max() < 0.08  # steps of a chamfer distance
    assert (found[labels == 0] == 0).all()
    deepest = ndimage.maximum(found, labels, np.arange(1, 7))
    assert deepest == pytest.approx(np.ones(6))


def test_a_valley_parts_objects_that_touch() -> None:
    found = distance_target(drawn_labels())
    row = found[60]
    assert row[29] == pytest.approx(1 / 10, abs=0.02)
    assert row[30] == pytest.approx(1 / 7, abs=0.02)
    assert row[18:21].min() > 0.85
    assert row[36:38].min() > 0.85
    as_one = distance_target(np.isin(drawn_labels(), [3, 4]).astype(np.int32))
    assert as_one[60, 29:31].min() > 0.9


def test_numbers_of_objects_may_have_gaps() -> None:
    labels = drawn_labels()
    assert (distance_target(labels * 1000) == distance_target(labels)).all()


def test_an_object_that_fills_the_crop_has_no_edge() -> None:
    assert (distance_target(np.full((32, 32), 7, np.int32)) == 1).all()
    assert not distance_target(np.zeros((32, 32), np.int32)).any()
    assert not border_target(np.full((32, 32), 7, np.int32)).any()


def test_borders_are_a_band_of_both_sides() -> None:
    labels = drawn_labels()
    edges = find_boundaries(labels, connectivity=2, mode="inner")
    assert (border_target(labels) == ndimage.binary_dilation(edges, np.ones((3, 3)))).all()
    # Between two that touch: two pixels of each.
    assert border_target(labels)[60, 26:34].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def test_what_is_not_labelled_has_no_weight() -> None:
    targets = make_targets(crop_of(), spec_of("nuclei", "glands", "lumina", "tissue_types"))
    for name in ("nuclei", "glands", "lumina"):
        assert not getattr(targets, name).any()
        assert not getattr(targets, f"{name}_weight").any()
    assert (targets.nuclei_class == UNKNOWN).all()
    assert not targets.tissue_cells.any()
    assert targets.tissue_whole == 0
    assert not targets.tissue_weight.any()


def test_labelled_tasks_weigh_where_they_are_known() -> None:
    labels = drawn_labels()
    known = np.zeros((SIDE, SIDE), np.bool_)
    known[:, 8:] = True
    tasks = ("nuclei", "glands", "lumina")
    crop = crop_of(
        labels=dict.fromkeys(tasks, labels),
        classes={"nuclei": np.array([255, 0, 1, 0, 1, 255, 0], np.uint8)},
        known=dict.fromkeys(tasks, known),
    )
    targets = make_targets(crop, spec_of(*tasks, n_classes=2))
    assert (targets.nuclei[0] == (labels > 0)).all()
    assert (targets.nuclei[1] == distance_target(labels)).all()
    assert (targets.nuclei_weight == known).all()
    assert set(targets.nuclei_class[np.isin(labels, [1, 3, 6])]) == {0}
    assert set(targets.nuclei_class[np.isin(labels, [2, 4])]) == {1}
    assert set(targets.nuclei_class[np.isin(labels, [0, 5])]) == {UNKNOWN}
    assert (targets.glands[0] == (labels > 0)).all()
    assert (targets.glands[1] == border_target(labels)).all()
    assert (targets.glands_weight == known).all()
    assert (targets.lumina == (labels > 0)).all()
    assert (targets.lumina_weight == known).all()


def test_merged_labels_say_nothing_of_borders() -> None:
    everywhere = np.ones((SIDE, SIDE), np.bool_)
    crop = crop_of(
        labels={"glands": drawn_labels()},
        classes={"glands": np.full(7, 255, np.uint8)},
        known={"glands": everywhere},
        merged=frozenset({"glands"}),
    )
    targets = make_targets(crop, spec_of("glands"))
    assert targets.glands_weight[0].all()
    assert not targets.glands_weight[1].any()


def test_a_cell_is_of_the_class_that_fills_three_fifths() -> None:
    tissue = np.full((64, 64), 255, np.uint8)
    first, second, third = (cell.reshape(-1) for cell in (np.zeros((32, 32), np.uint8) for _ in range(3)))
    first[:] = 255
    first[:615] = 3  # of 1024: just above
    second[:] = 1
    second[:614] = 3  # just below
    third[:] = 30
    tissue[:32, :32], tissue[:32, 32:], tissue[32:, :32] = (one.reshape(32, 32) for one in (first, second, third))
    targets = make_targets(crop_of(64, tissue_map=tissue, tissue_types=frozenset({0})), spec_of("tissue_types"))
    assert targets.tissue_cells.tolist() == [[1 << 3, 0], [1 << 30, 0]]
    assert targets.tissue_whole == 0  # the map says more
    assert targets.tissue_weight.tolist() == [[1, 1], [1, 1]]


def test_the_label_of_a_whole_is_a_bit_for_each_class_it_may_have() -> None:
    inside = np.zeros((64, 64), np.bool_)
    inside[:40] = True  # 8 of 32 rows of the lower cells
    inside[:, 49:] = False  # 17 of 32 columns of those on the right
    crop = crop_of(64, tissue_types=frozenset({0, 2, 13}), inside_image=inside)
    targets = make_targets(crop, spec_of("tissue_types"))
    assert targets.tissue_whole == 1 + 4 + 8192
    assert targets.tissue_weight.tolist() == [[1, 1], [0, 0]]
    assert not targets.tissue_cells.any()
    without = make_targets(crop, spec_of("nuclei"))
    assert without.tissue_whole == 0
    assert not without.tissue_weight.any()
