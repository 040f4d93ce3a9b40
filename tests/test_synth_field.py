"""Training fields: the same from a seed, labels that agree with each other and with the picture, and wide variety."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation
from skimage.measure import label as parts_of

from pathopipe.synth.field import NUCLEUS_CLASSES, TISSUE_CLASSES, UNKNOWN, Field, draw_field


@pytest.fixture(scope="module")
def fields() -> list[Field]:
    """Forty fields at 0.5 um/px."""
    return [draw_field(seed, side_px=192, mpp=0.5) for seed in range(40)]


def _numbers(labels: NDArray[np.int32]) -> list[int]:
    return sorted(set(np.unique(labels).tolist()) - {0})


def test_same_seed_same_field() -> None:
    first, again, other = (draw_field(seed, side_px=128, mpp=0.4) for seed in (5, 5, 6))
    for name in ("rgb", "nuclei", "nucleus_class", "glands", "lumina", "tissue_map"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.rgb, other.rgb)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), side=st.integers(48, 200), mpp=st.sampled_from([0.2, 0.25, 0.5, 0.7, 1.0]))
def test_laws_of_any_field(seed: int, side: int, mpp: float) -> None:
    field = draw_field(seed, side_px=side, mpp=mpp)
    assert field.rgb.shape == (side, side, 3)
    assert field.rgb.dtype == np.uint8
    for labels in (field.nuclei, field.glands, field.lumina):
        assert labels.shape == (side, side)
        assert labels.dtype == np.int32
        numbers = _numbers(labels)
        assert numbers == list(range(1, len(numbers) + 1))
        # scikit-image numbers the connected parts of equal value: as many as there are labels.
        assert parts_of(labels, connectivity=1).max() == len(numbers)
    assert field.nucleus_class.shape == (field.nuclei.max(),)
    assert np.all(field.nucleus_class < len(NUCLEUS_CLASSES))
    assert np.all((field.tissue_map < len(TISSUE_CLASSES)) | (field.tissue_map == UNKNOWN))
    assert np.all(field.glands[field.lumina > 0] > 0)
    assert not np.any((field.lumina > 0) & (field.nuclei > 0))
    for number in _numbers(field.lumina):
        assert len(np.unique(field.glands[field.lumina == number])) == 1


def test_tissue_map_says_glands_where_glands_are(fields: list[Field]) -> None:
    allowed = [TISSUE_CLASSES.index("Normal glands"), TISSUE_CLASSES.index("Carcinoma")]
    assert sum(bool(field.glands.any()) for field in fields) >= 8
    for field in fields:
        inside = field.tissue_map[field.glands > 0]
        assert np.all(np.isin(inside, allowed))


def test_glass_is_bright_and_even(fields: list[Field]) -> None:
    glass = TISSUE_CLASSES.index("Glass")
    spare = [
        field.rgb[(field.tissue_map == glass) & (field.nuclei == 0)].mean()
        - field.rgb[(field.tissue_map != glass) & (field.nuclei == 0)].mean()
        for field in fields
        if 0.1 < np.mean(field.tissue_map == glass) < 0.9
    ]
    assert spare
    assert np.mean(spare) > 20


def test_nuclei_are_darker_than_what_is_around_them(fields: list[Field]) -> None:
    darker = []
    for field in fields:
        red = field.rgb[..., 0].astype(float)
        if 0.02 < np.mean(field.nuclei > 0) < 0.9:
            darker.append(red[field.nuclei > 0].mean() < red[field.nuclei == 0].mean())
    assert np.mean(darker) > 0.85


def test_lumina_are_brighter_than_the_wall(fields: list[Field]) -> None:
    brighter = [
        field.rgb[field.lumina > 0].mean() > field.rgb[(field.glands > 0) & (field.lumina == 0)].mean()
        for field in fields
        if np.count_nonzero(field.lumina) > 100
    ]
    assert len(brighter) >= 5
    assert np.mean(brighter) > 0.75


def test_variety(fields: list[Field]) -> None:
    counts = np.array([field.nuclei.max() for field in fields])
    assert counts.min() < 15
    assert counts.max() > 120
    areas = np.concatenate([np.bincount(field.nuclei.ravel())[1:] for field in fields])
    diameter_um = np.sqrt(4 * areas / np.pi) * 0.5
    assert np.percentile(diameter_um, 2) < 3.5
    assert np.percentile(diameter_um, 98) > 10
    means = np.array([field.rgb.mean(axis=(0, 1)) for field in fields])
    assert means.std(axis=0).min() > 15
    kinds = np.bincount(np.concatenate([field.nucleus_class for field in fields]), minlength=len(NUCLEUS_CLASSES))
    assert np.all(kinds[: NUCLEUS_CLASSES.index("Mitotic")] > 0)
    tissues = np.unique(np.concatenate([field.tissue_map.ravel() for field in fields]))
    assert len(tissues) >= 7


def test_sizes_follow_the_resolution() -> None:
    """The same nuclei in micrometres cover about four times the pixels when pixels are half as wide."""
    median_px = []
    for mpp in (0.25, 0.5):
        fields = [draw_field(seed, side_px=round(48 / mpp), mpp=mpp) for seed in range(24)]
        areas = [np.bincount(field.nuclei.ravel())[1:] for field in fields]
        median_px.append(np.median(np.concatenate(areas)))
    assert 2.8 < median_px[0] / median_px[1] < 5.5


def test_nuclei_that_cannot_be_told_are_not_labelled(fields: list[Field]) -> None:
    """Each labelled nucleus differs from the pixels around it, unless other nuclei are all around it."""
    differences = []
    for field in fields[:10]:
        for number in _numbers(field.nuclei):
            inside = field.nuclei == number
            ring = binary_dilation(inside, iterations=2) & (field.nuclei == 0)
            if ring.sum() > 12:
                differences.append(np.abs(field.rgb[inside].mean(0) - field.rgb[ring].mean(0)).max())
    assert np.percentile(differences, 2) > 5
