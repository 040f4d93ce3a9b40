"""From maps to objects: drawn discs come back, crops give the same objects, and each kind keeps to its rules."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import expit, softmax
from skimage.measure import label

from pathopipe.segmentation.decode import instances_of, layers_of, map_channels, reach_px, to_maps
from pathopipe.segmentation.model import Instances
from pathopipe.segmentation.network import ClassSpec, NetworkSpec, TaskSpec
from pathopipe.segmentation.targets import border_target, distance_target

torch.set_num_threads(1)

MPP = 0.5


def spec_of(*tasks: str, n_classes: int = 1) -> NetworkSpec:
    classes = tuple(ClassSpec(name=f"class {k}", color=(k, 90, 200)) for k in range(n_classes))
    return NetworkSpec(tasks=tuple(TaskSpec(name=task, classes=classes) for task in tasks), mpp=MPP)


def maps_of(spec: NetworkSpec, shape: tuple[int, int], **planes: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Maps with the planes given (``nuclei_inside`` for ``nuclei.inside``), the others 0."""
    names = map_channels(spec)
    maps = np.zeros((*shape, len(names)), np.uint8)
    for name, plane in planes.items():
        maps[..., names.index(name[::-1].replace("_", ".", 1)[::-1])] = plane
    return maps


def discs(side: int, *circles: tuple[float, float, float]) -> NDArray[np.int32]:
    """Discs by x, y and radius; a pixel is of the disc in which it is deepest."""
    y, x = np.mgrid[:side, :side] + 0.5
    depth = np.stack([r - np.hypot(x - cx, y - cy) for cx, cy, r in circles])
    return np.where(depth.max(0) > 0, depth.argmax(0) + 1, 0).astype(np.int32)


def ious(truth: NDArray[np.int32], found: NDArray[np.int32]) -> list[float]:
    """Of each true object with the found one that covers most of it."""
    out = []
    for number in range(1, truth.max() + 1):
        own = truth == number
        best = np.bincount(found[own]).argmax()
        other = (found == best) & (best > 0)
        out.append((own & other).sum() / (own | other).sum())
    return out


def nuclear_maps(truth: NDArray[np.int32], spec: NetworkSpec | None = None) -> NDArray[np.uint8]:
    return maps_of(
        spec or spec_of("nuclei"),
        truth.shape,
        nuclei_inside=np.where(truth > 0, 230, 5),
        nuclei_distance=np.rint(distance_target(truth) * 255),
    )


# Channels


def test_channels_of_tasks() -> None:
    assert map_channels(spec_of("nuclei", "glands", "lumina", "tissue_types", n_classes=2)) == (
        "nuclei.inside",
        "nuclei.distance",
        "nuclei.class",
        "glands.inside",
        "glands.border",
        "lumina.inside",
        "tissue_types.class",
        "tissue_types.probability",
    )
    assert map_channels(spec_of("lumina", "nuclei")) == ("lumina.inside", "nuclei.inside", "nuclei.distance")


def test_maps_are_probabilities_and_classes() -> None:
    spec = spec_of("nuclei", "glands", "lumina", "tissue_types", n_classes=3)
    rng = np.random.default_rng(0)
    logits = {
        "nuclei": rng.normal(0, 3, (2, 5, 64, 96)),
        "glands": rng.normal(0, 3, (2, 2, 64, 96)),
        "lumina": rng.normal(0, 3, (2, 1, 64, 96)),
        "tissue_types": rng.normal(0, 3, (2, 3, 2, 3)),
    }
    maps = to_maps({task: torch.from_numpy(value) for task, value in logits.items()}, spec).numpy()
    assert maps.shape == (2, 64, 96, 8)
    assert all(maps[0, ..., channel].flags.c_contiguous for channel in range(8))
    assert maps.dtype == np.uint8
    soft = np.concatenate([logits["nuclei"][:, :2], logits["glands"], logits["lumina"]], 1)
    assert np.abs(maps[..., [0, 1, 3, 4, 5]] - np.moveaxis(expit(soft) * 255, 1, -1)).max() <= 0.501
    assert (maps[..., 2] == logits["nuclei"][:, 2:].argmax(1) + 1).all()
    share = softmax(logits["tissue_types"], axis=1)
    for at, expected in (((0, 0), share[:, :, 0, 0]), ((63, 95), share[:, :, 1, 2])):
        assert (maps[:, *at, 6] == expected.argmax(1) + 1).all()
        assert np.abs(maps[:, *at, 7] - expected.max(1) * 255).max() <= 0.501
    # The 8 x 8 px at (16, 16) have their middle 4 px beyond that of the first cell: 7/8 and 1/8 of the way.
    weight = np.outer([7 / 8, 1 / 8], [7 / 8, 1 / 8])
    expected = np.einsum("ncij,ij->nc", share[:, :, :2, :2], weight)
    assert (maps[:, 16:24, 16:24, 6] == expected.argmax(1)[:, None, None] + 1).all()
    assert np.abs(maps[:, 16:24, 16:24, 7] - expected.max(1)[:, None, None] * 255).max() <= 0.501


def test_layers_bear_the_classes() -> None:
    layers = {layer.name: layer for layer in layers_of(spec_of("nuclei", "glands", "tissue_types", n_classes=2))}
    assert list(layers) == ["nuclei", "glands", "tissue_types"]
    assert not layers["nuclei"].joined
    assert layers["glands"].joined
    assert layers["tissue_types"].joined
    assert [one.name for one in layers["nuclei"].classes] == ["class 0", "class 1"]


def test_empty_maps_hold_nothing() -> None:
    spec = spec_of("nuclei", "glands", "lumina", "tissue_types", n_classes=2)
    for found in instances_of(maps_of(spec, (96, 96)), spec, MPP).values():
        assert not found.labels.any()
        assert len(found.class_id) == len(found.class_probability) == 0


# Nuclei


TOUCHING = [(40, 40, 13), (63, 42, 12), (52, 60, 11), (140, 40, 8), (155, 40, 8)]
LARGE = [(60, 140, 29), (150, 140, 8), (190, 150, 20), (190, 190, 20)]
SMALL = [(215, 20, 5), (230, 24, 5), (225, 60, 6)]


def test_drawn_nuclei_come_back() -> None:
    truth = discs(256, *TOUCHING, *LARGE, *SMALL)
    found = instances_of(nuclear_maps(truth), spec_of("nuclei"), MPP)["nuclei"]
    assert found.labels.max() == truth.max()
    assert min(ious(truth, found.labels)) > 0.8
    assert np.mean(ious(truth, found.labels)) > 0.92
    assert found.class_id.tolist() == [0] * 12
    assert found.class_probability == pytest.approx(np.full(12, 230 / 255), abs=0.03)


def test_specks_and_floods_are_no_nuclei() -> None:
    truth = discs(400, (40, 40, 2), (200, 220, 130))
    assert not instances_of(nuclear_maps(truth), spec_of("nuclei"), MPP)["nuclei"].labels.any()


def test_pixels_vote_on_the_class() -> None:
    spec = spec_of("nuclei", n_classes=3)
    truth = discs(128, (30, 30, 12), (90, 40, 12), (60, 90, 14))
    maps = nuclear_maps(truth, spec)
    kind = np.array([0, 3, 1, 2], np.uint8)[truth]
    kind[:, :30][truth[:, :30] == 1] = 2  # the left half of the first
    kind[28:34, 20:30][truth[28:34, 20:30] == 1] = 3  # but not all of it
    maps[..., 2] = np.where(truth > 0, kind, 1)
    found = instances_of(maps, spec, MPP)["nuclei"]
    order = [int(np.bincount(found.labels[truth == number]).argmax()) - 1 for number in (1, 2, 3)]
    assert found.class_id[order].tolist() == [2, 0, 1]
    own = found.labels == order[0] + 1
    assert found.class_probability[order[0]] == pytest.approx((kind == 3)[own].mean(), abs=1e-6)
    assert 0.5 < found.class_probability[order[0]] < 0.7
    assert found.class_probability[order[1:]] == pytest.approx([1, 1], abs=0.1)


def rough_maps(side: int, spec: NetworkSpec) -> NDArray[np.uint8]:
    """Clumps of any shape and size, as an unsure network draws them."""
    rng = np.random.default_rng(4)

    def field(sigma: float, low: float, high: float) -> NDArray[np.float64]:
        plane = ndimage.gaussian_filter(rng.normal(size=(side, side)), sigma)
        return np.clip(low + (plane - plane.min()) / np.ptp(plane) * (high - low), 0, 255)

    return maps_of(
        spec,
        (side, side),
        nuclei_inside=field(5, -700, 860),
        nuclei_distance=field(3, 0, 255),
        glands_inside=field(14, -60, 330),
        glands_border=field(4, -80, 300),
        lumina_inside=field(8, -60, 300),
    )


def test_a_crop_holds_the_same_objects() -> None:
    """Whatever lies farther than the reach from a nucleus has no say in it."""
    spec = spec_of("nuclei", "glands", "lumina")
    reach = reach_px(spec)
    side, core = 2 * reach + 260, 130
    maps = rough_maps(side, spec)
    whole = instances_of(maps, spec, MPP)
    first = (side - core) // 2 - 20
    around = slice(first - reach, first + core + reach)
    cut = instances_of(maps[around, around], spec, MPP)

    nuclei = cut["nuclei"].labels
    numbers = np.unique(whole["nuclei"].labels[first : first + core, first : first + core])
    n_compared = 0
    for number in numbers[numbers > 0]:
        own = np.argwhere(whole["nuclei"].labels == number)
        if not (own.mean(0) >= first).all() or not (own.mean(0) < first + core).all():
            continue
        at = own - (first - reach)
        other = np.unique(nuclei[at[:, 0], at[:, 1]])
        assert len(other) == 1
        assert other[0] > 0
        assert (nuclei == other[0]).sum() == len(own)
        n_compared += 1
    assert n_compared > 15
    inner = slice(reach, reach + core)
    for task in ("glands", "lumina"):
        own = whole[task].labels[first : first + core, first : first + core] > 0
        assert 0.1 < own.mean() < 0.9
        assert (own == (cut[task].labels[inner, inner] > 0)).all()


@pytest.mark.parametrize("halo_px", [0, 60, 150])
def test_without_those_of_the_halo_nuclei_are_the_same(halo_px: int) -> None:
    spec, side = spec_of("nuclei", n_classes=2), 400
    maps = rough_maps(side, spec_of("nuclei", "glands", "lumina"))[..., :3]
    maps[..., 2] = maps[..., 2] // 128 + 1
    whole, cored = (instances_of(maps, spec, MPP, halo_px=halo)["nuclei"] for halo in (0, halo_px))

    def those_of_the_core(found: Instances) -> dict[bytes, tuple[int, float]]:
        nuclei = {}
        for number in range(1, found.labels.max() + 1):
            pixels = np.argwhere(found.labels == number)
            centre = pixels.mean(axis=0) + 0.5
            if (centre >= halo_px).all() and (centre < side - halo_px).all():
                at = number - 1
                nuclei[pixels.tobytes()] = (int(found.class_id[at]), float(found.class_probability[at]))
        return nuclei

    expected = those_of_the_core(whole)
    assert those_of_the_core(cored) == expected
    assert len(expected) >= {0: 60, 60: 30, 150: 3}[halo_px]
    assert (cored.labels.max() < whole.labels.max()) == (halo_px > 0)


def test_a_core_without_nuclei_is_empty() -> None:
    truth = discs(200, (20, 20, 9), (180, 100, 9))
    maps = nuclear_maps(truth)
    assert instances_of(maps, spec_of("nuclei"), MPP)["nuclei"].labels.max() == 2
    found = instances_of(maps, spec_of("nuclei"), MPP, halo_px=60)["nuclei"]
    assert found.labels.shape == (200, 200)
    assert not found.labels.any()
    assert len(found.class_id) == len(found.class_probability) == 0


def test_objects_are_as_sure_as_their_pixels_are_on_average() -> None:
    spec = spec_of("nuclei", "glands", "lumina")
    maps = rough_maps(420, spec)
    found = instances_of(maps, spec, MPP)
    for task, channel in (("nuclei", 0), ("glands", 2), ("lumina", 4)):
        labels, sure = found[task].labels, found[task].class_probability
        expected = ndimage.mean(maps[..., channel] / 255, labels, np.arange(1, labels.max() + 1))
        assert len(sure) == labels.max() > 2
        assert sure == pytest.approx(expected, abs=1e-6)
    assert found["nuclei"].class_probability.min() >= 0.75


def test_memory_order_of_maps_does_not_matter() -> None:
    spec = spec_of("nuclei", "glands", "lumina", "tissue_types", n_classes=2)
    maps = rough_maps(300, spec)
    maps[..., map_channels(spec).index("tissue_types.class")] = maps[..., 0] // 100
    planes = np.ascontiguousarray(np.moveaxis(maps, -1, 0))
    before = planes.copy()
    found = instances_of(np.moveaxis(planes, 0, -1), spec, MPP)
    assert (planes == before).all()
    for task, expected in instances_of(maps, spec, MPP).items():
        assert (found[task].labels == expected.labels).all()
        assert (found[task].class_id == expected.class_id).all()


# Glands, lumina, tissue


def gland_maps(truth: NDArray[np.int32], spec: NetworkSpec, **planes: NDArray[np.generic]) -> NDArray[np.uint8]:
    return maps_of(
        spec, truth.shape, glands_inside=(truth > 0) * 220, glands_border=border_target(truth) * 240, **planes
    )


def test_the_border_parts_glands_that_touch() -> None:
    truth = np.zeros((200, 300), np.int32)
    truth[40:160, 30:150], truth[50:150, 150:260] = 1, 2
    found = instances_of(gland_maps(truth, spec_of("glands")), spec_of("glands"), MPP)["glands"]
    assert found.labels.max() == 2
    assert min(ious(truth, found.labels)) > 0.97
    assert ((found.labels > 0) == (truth > 0)).all()  # each got its half of the border back
    assert found.class_probability == pytest.approx([220 / 255] * 2, abs=1e-3)
    maps = gland_maps(truth, spec_of("glands"))
    maps[..., 1] = 0
    assert instances_of(maps, spec_of("glands"), MPP)["glands"].labels.max() == 1


def test_lumina_lie_in_glands() -> None:
    truth = np.zeros((200, 200), np.int32)
    truth[40:160, 40:160] = 1
    light = np.zeros((200, 200), np.uint8)
    light[60:80, 60:80], light[100:120, 150:180], light[5:20, 5:20], light[130:140, 60:80] = 255, 200, 255, 120
    spec = spec_of("glands", "lumina")
    found = instances_of(gland_maps(truth, spec, lumina_inside=light), spec, MPP)["lumina"]
    expected = np.zeros((200, 200), np.int32)
    expected[60:80, 60:80], expected[100:120, 150:160] = 1, 2
    assert (found.labels == expected).all()
    assert found.class_probability == pytest.approx([1, 200 / 255])
    alone = instances_of(maps_of(spec_of("lumina"), (200, 200), lumina_inside=light), spec_of("lumina"), MPP)
    assert (alone["lumina"].labels > 0).sum() == 400 + 600 + 225


def test_tissue_types_are_areas_of_one_class() -> None:
    spec = spec_of("tissue_types", n_classes=3)
    kind = np.zeros((96, 96), np.uint8)
    kind[:48, :48], kind[48:, 48:], kind[:48, 48:], kind[80:, :16] = 2, 2, 1, 3
    share = np.where(kind == 2, 200, 100)
    found = instances_of(maps_of(spec, (96, 96), tissue_types_class=kind, tissue_types_probability=share), spec, MPP)[
        "tissue_types"
    ]
    assert found.labels.max() == len(found.class_id) == 4
    assert (np.append(255, found.class_id)[found.labels] == np.where(kind > 0, kind.astype(int) - 1, 255)).all()
    # Squares that meet at a corner are two areas.
    assert label(kind == 2, connectivity=1).max() == 2
    assert sorted(found.class_id.tolist()) == [0, 1, 1, 2]
    assert found.class_probability == pytest.approx(np.where(found.class_id == 1, 200, 100) / 255, abs=1e-6)
