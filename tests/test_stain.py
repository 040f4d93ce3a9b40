import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pathopipe.stain import (
    HE_VECTORS,
    STAIN_STEP_OD,
    STAIN_ZERO,
    mix,
    optical_density,
    rgb_of_density,
    stain_bytes,
    unmix,
)

EVERY_VALUE = np.arange(256, dtype=np.uint8)


def test_density_of_known_values() -> None:
    rgb = np.array([[[255, 1, 0]], [[128, 26, 25]]], np.uint8)
    expected = [[[0, 2.40654, 2.40654]], [[0.29933, 0.99157, 1.00860]]]
    np.testing.assert_allclose(optical_density(rgb), expected, atol=1e-5)


def test_density_and_back_is_exact() -> None:
    grey = np.repeat(EVERY_VALUE[1:, None], 3, axis=1)
    np.testing.assert_array_equal(rgb_of_density(optical_density(grey)), grey)


@pytest.mark.parametrize("stain", [0, 1, 2])
def test_a_pure_stain_is_all_of_itself_and_none_of_the_others(stain: int) -> None:
    direction = HE_VECTORS[stain] / np.sqrt((HE_VECTORS[stain] ** 2).sum())
    amounts = unmix((0.8 * direction).astype(np.float32))
    expected = np.zeros(3)
    expected[stain] = 0.8
    np.testing.assert_allclose(amounts, expected, atol=1e-5)
    rgb = rgb_of_density(0.8 * direction)[None, None]
    measured = [(float(plane[0, 0]) - STAIN_ZERO) * STAIN_STEP_OD for plane in stain_bytes(rgb)]
    np.testing.assert_allclose(measured, expected, atol=0.02)


@given(arrays(np.float32, (4, 5, 3), elements=st.floats(0, 2, width=32)))
def test_mixing_undoes_unmixing(amounts: np.ndarray) -> None:
    np.testing.assert_allclose(unmix(mix(amounts)), amounts, atol=1e-5)


@given(arrays(np.uint8, (5, 7, 3)))
def test_bytes_are_the_amounts_to_within_a_step(rgb: np.ndarray) -> None:
    exact = unmix(optical_density(rgb)) / STAIN_STEP_OD + STAIN_ZERO
    for k, plane in enumerate(stain_bytes(rgb)):
        assert plane.dtype == np.uint8
        assert plane.max() < 255
        np.testing.assert_allclose(plane, np.clip(exact[..., k], 0, 254), atol=0.6)


def test_white_is_no_stain() -> None:
    white = np.full((2, 3, 3), 255, np.uint8)
    assert all((plane == STAIN_ZERO).all() for plane in stain_bytes(white))


@given(arrays(np.uint8, (6, 6, 3)), st.integers(0, 5), st.integers(0, 5))
def test_a_pixel_does_not_depend_on_its_neighbours(rgb: np.ndarray, row: int, column: int) -> None:
    alone = rgb[row : row + 1, column : column + 1]
    whole = unmix(optical_density(rgb))[row, column]
    np.testing.assert_array_equal(unmix(optical_density(alone))[0, 0], whole)
    assert [p[0, 0] for p in stain_bytes(alone)] == [p[row, column] for p in stain_bytes(rgb)]
