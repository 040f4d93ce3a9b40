"""Crops: pixels stay pixels where nothing is changed, and labels go where their pixels go."""

from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from pathopipe.segmentation.augment import Crop, cut_crop, restain, whole_image
from pathopipe.segmentation.examples import Example

COLOURS = np.array(
    [[240, 240, 240], [200, 20, 20], [20, 160, 20], [20, 20, 200], [220, 200, 20], [10, 10, 10], [150, 20, 200]],
    np.uint8,
)
"""Of object 0 to 6; far apart."""


def discs(height: int, width: int) -> NDArray[np.int32]:
    y, x = np.mgrid[:height, :width] + 0.5
    labels = np.zeros((height, width), np.int32)
    for number, (cx, cy) in enumerate([(20, 18), (60, 22), (100, 20), (22, 64), (58, 70), (96, 66)], start=1):
        labels[np.hypot(x - cx * width / 120, y - cy * height / 90) < 0.15 * min(height, width)] = number
    return labels


def example_of(rgb: NDArray[np.uint8], **said: Any) -> Example:
    everything: dict[str, Any] = {
        "name": "one",
        "dataset": "own",
        "source": "own/one",
        "rgb": rgb,
        "mpp": 0.5,
        "labels": {},
        "classes": {},
        "ignore": {},
    }
    return Example(**(everything | said))


def painted_example(height: int = 120, width: int = 160, **said: Any) -> Example:
    """Its colours tell the labels."""
    labels = discs(height, width)
    return example_of(COLOURS[labels], labels={"nuclei": labels}, **said)


class Still(np.random.Generator):
    """Draws what changes nothing: no turn, no flip, no stretch, the first place."""

    def __init__(self, quarter: int = 0, flip: bool = False) -> None:
        super().__init__(np.random.PCG64(0))
        self._quarter = quarter
        self._random = [0.1 if flip else 0.9, 0.9]

    def integers(self, *_: Any, **__: Any) -> Any:
        return self._quarter

    def random(self, *_: Any, **__: Any) -> Any:
        return self._random.pop(0)

    def uniform(self, low: Any = 0.0, high: Any = 1.0, size: Any = None) -> Any:
        return low

    def normal(self, loc: Any = 0.0, scale: Any = 1.0, size: Any = None) -> Any:
        return loc if size is None else np.full(size, loc)


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_crop_that_changes_nothing_is_the_image() -> None:
    rgb = noise(80, 100)
    labels = discs(80, 100)
    types, tissue = frozenset({2}), (labels % 3).astype(np.uint8)
    example = example_of(
        rgb,
        labels={"nuclei": labels, "glands": labels * 2},
        classes={"nuclei": np.array([4, 0, 2, 255, 1, 3], np.uint8)},
        merged=frozenset({"glands"}),
        tissue_types=types,
        tissue_map=tissue,
    )
    crop = cut_crop(example, Still(), side_px=64, mpp=0.5, zoom=(1, 1))
    assert (crop.rgb == rgb[:64, :64]).all()
    assert (crop.labels["nuclei"] == labels[:64, :64]).all()
    assert (crop.labels["glands"] == labels[:64, :64] * 2).all()
    assert crop.labels["nuclei"].dtype == np.int32
    assert crop.classes["nuclei"].tolist() == [255, 4, 0, 2, 255, 1, 3]
    assert crop.classes["glands"].tolist() == [255] * 13
    assert all(crop.known[task].all() for task in ("nuclei", "glands"))
    assert crop.inside_image.all()
    assert (crop.merged, crop.tissue_types) == ({"glands"}, types)
    assert crop.tissue_map is not None
    assert (crop.tissue_map == tissue[:64, :64]).all()
    assert "lumina" not in crop.labels
    assert "lumina" not in crop.known


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("quarter", [0, 1, 2, 3])
def test_quarter_turns_and_flips_keep_every_pixel(quarter: int, flip: bool) -> None:
    rgb = noise(64, 64)
    labels = discs(64, 64)
    crop = cut_crop(example_of(rgb, labels={"nuclei": labels}), Still(quarter, flip), side_px=64, mpp=0.5, zoom=(1, 1))
    mirrored, numbers = (rgb[:, ::-1], labels[:, ::-1]) if flip else (rgb, labels)
    assert (crop.rgb == np.rot90(mirrored, -quarter)).all()
    assert (crop.labels["nuclei"] == np.rot90(numbers, -quarter)).all()
    assert crop.inside_image.all()


def agrees(crop: Crop, task: str = "nuclei") -> tuple[float, int]:
    """Share of pixels whose colour tells their label, away from edges and beyond none of the image; how many."""
    labels = crop.labels[task]
    level = (cv2.erode(labels.astype(np.float32), np.ones((5, 5))) == labels) & (
        cv2.dilate(labels.astype(np.float32), np.ones((5, 5))) == labels
    )
    # Near the image's end the mirrored half has a say in the colour.
    sure = level & ndimage.binary_erosion(crop.inside_image, np.ones((5, 5)))
    told = np.linalg.norm(crop.rgb[:, :, None].astype(float) - COLOURS, axis=-1).argmin(-1)
    return float((told == labels)[sure].mean()), int(sure.sum())


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    mpp=st.sampled_from([0.25, 0.5, 1.0]),
    side_px=st.sampled_from([64, 96]),
    shape=st.sampled_from([(120, 160), (150, 110), (300, 280)]),
)
def test_labels_follow_their_pixels(seed: int, mpp: float, side_px: int, shape: tuple[int, int]) -> None:
    example = painted_example(*shape, mpp=mpp)
    crop = cut_crop(example, np.random.default_rng(seed), side_px=side_px, mpp=0.5, zoom=(0.7, 1.4))
    share, n_px = agrees(crop)
    assert n_px > 0.1 * crop.inside_image.sum() - 200
    assert share == 1.0
    assert (crop.labels["nuclei"][~crop.inside_image] == 0).all()
    assert (crop.known["nuclei"] == crop.inside_image).all()


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32))
def test_what_is_to_be_passed_over_stays_unknown(seed: int) -> None:
    labels = discs(120, 160)
    example = example_of(
        COLOURS[labels],
        labels={"nuclei": labels, "glands": labels},
        ignore={"nuclei": labels == 5},
        tissue_map=labels.astype(np.uint8),
    )
    crop = cut_crop(example, np.random.default_rng(seed), side_px=96, mpp=0.5, zoom=(0.7, 1.4))
    assert (crop.known["nuclei"] == (crop.inside_image & (crop.labels["nuclei"] != 5))).all()
    assert (crop.known["glands"] == crop.inside_image).all()
    assert crop.tissue_map is not None
    assert (crop.tissue_map == np.where(crop.inside_image, crop.labels["nuclei"], 255)).all()


@pytest.mark.parametrize("seed", range(5))
def test_beyond_a_small_image_nothing_is_known(seed: int) -> None:
    example = painted_example(40, 40)
    crop = cut_crop(example, np.random.default_rng(seed), side_px=128, mpp=0.5, zoom=(1, 1))
    # All of the image is there: stretching keeps the area.
    assert crop.inside_image.sum() == pytest.approx(1600, rel=0.08)
    assert not crop.known["nuclei"][~crop.inside_image].any()
    # Mirrored, not empty.
    assert len(np.unique(crop.rgb[~crop.inside_image].reshape(-1, 3), axis=0)) > 5


def test_a_seed_gives_one_crop() -> None:
    crops = [
        cut_crop(painted_example(), np.random.default_rng(seed), side_px=64, mpp=0.5, zoom=(0.7, 1.4))
        for seed in (3, 3, 4)
    ]
    assert (crops[0].rgb == crops[1].rgb).all()
    assert (crops[0].labels["nuclei"] == crops[1].labels["nuclei"]).all()
    assert (crops[0].rgb != crops[2].rgb).any()


def test_zoom_enlarges() -> None:
    """A disc of 18 px at 1 um/px has 4 times the pixels at 0.5, and 16 times when enlarged twice."""
    y, x = np.mgrid[:200, :200] + 0.5
    labels = (np.hypot(x - 100, y - 100) < 18).astype(np.int32)
    example = example_of(COLOURS[labels], labels={"nuclei": labels}, mpp=1.0)
    area = []
    for zoom in (1.0, 2.0):
        rng = np.random.default_rng(0)
        crop = cut_crop(example, rng, side_px=768, mpp=0.5, zoom=(zoom, zoom))
        area.append(int((crop.labels["nuclei"] > 0).sum()) / int(labels.sum()))
    assert area == pytest.approx([4, 16], rel=0.02)


def test_zooms_are_drawn_between_the_two() -> None:
    labels = discs(120, 120)
    example = example_of(COLOURS[labels], labels={"nuclei": labels})
    n_px = [
        int(cut_crop(example, np.random.default_rng(seed), side_px=320, mpp=0.5, zoom=(0.5, 2.0)).inside_image.sum())
        for seed in range(60)
    ]
    scale = np.sqrt(np.array(n_px) / 120**2)
    assert 0.49 < scale.min() < 0.6
    assert 1.7 < scale.max() < 2.05
    assert 0.35 < (scale < 1).mean() < 0.65


def test_a_whole_image_lies_at_the_top_left() -> None:
    example = painted_example(70, 100)
    crop = whole_image(example, mpp=0.5, multiple_px=32)
    assert crop.rgb.shape == (128, 128, 3)
    assert (crop.rgb[:70, :100] == example.rgb).all()
    assert (crop.labels["nuclei"][:70, :100] == example.labels["nuclei"]).all()
    assert crop.inside_image.sum() == 7000
    assert crop.inside_image[:70, :100].all()
    half = whole_image(example, mpp=1.0, multiple_px=32)
    assert half.rgb.shape == (64, 64, 3)
    assert half.inside_image.sum() == 35 * 50
    # A pixel of it is the middle of two by two.
    share, n_px = agrees(half)
    assert share == 1.0
    assert n_px > 500


def smooth(side: int = 96) -> NDArray[np.uint8]:
    """Pink and purple blots of a few pixels."""
    field = ndimage.gaussian_filter(np.random.default_rng(2).normal(size=(side, side)), 4)
    share = ((field - field.min()) / np.ptp(field))[..., None]
    return np.rint(np.array([235, 190, 215]) * share + np.array([110, 70, 150]) * (1 - share)).astype(np.uint8)


@pytest.mark.parametrize("shape", [(96, 96), (64, 96), (96, 64)])
def test_staining_keeps_place_and_type(shape: tuple[int, int]) -> None:
    rgb = np.ascontiguousarray(smooth()[: shape[0], : shape[1]])
    before = rgb.copy()
    grey = before.mean(-1)
    for seed in range(40):
        out = restain(rgb, np.random.default_rng(seed), 1.0)
        assert out.shape == rgb.shape
        assert out.dtype == np.uint8
        assert out.flags.c_contiguous
        assert (rgb == before).all()
        # Dark stays dark, at its place.
        assert np.corrcoef(out.mean(-1).ravel(), grey.ravel())[0, 1] > 0.8
        shift, _ = cv2.phaseCorrelate(grey, out.mean(-1))
        assert np.hypot(*shift) < 0.5


def test_staining_is_by_the_draw_alone() -> None:
    rgb = smooth()
    outs = [restain(rgb, np.random.default_rng(seed), 1.0) for seed in (1, 1, 2)]
    assert (outs[0] == outs[1]).all()
    assert (outs[0] != outs[2]).any()


def test_strength_says_how_far() -> None:
    rgb = smooth()
    mean = rgb.mean((0, 1))
    away = {
        strength: [
            np.abs(restain(rgb, np.random.default_rng(seed), strength).mean((0, 1)) - mean).max() for seed in range(40)
        ]
        for strength in (0.0, 0.5, 1.0, 2.0)
    }
    assert max(away[0.0]) < 3  # of 255: noise, focus and compression leave the mean where it is
    assert np.mean(away[0.5]) > 3
    assert np.mean(away[1.0]) > 1.4 * np.mean(away[0.5])
    assert np.mean(away[2.0]) > 1.2 * np.mean(away[1.0])


def test_without_strength_pixels_are_about_the_same() -> None:
    rgb = smooth()
    for seed in range(20):
        out = restain(rgb, np.random.default_rng(seed), 0.0)
        assert np.abs(out.astype(int) - rgb).mean() < 8
