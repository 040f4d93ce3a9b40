"""Slides in memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slide_files import expect, picture

from pathopipe.geometry import Region
from pathopipe.slide.array import ArraySlide

WHOLE = picture(83, 61)


@given(x=st.integers(-100, 150), y=st.integers(-100, 150), width=st.integers(0, 120), height=st.integers(0, 120))
def test_any_read_is_a_crop_of_the_whole_white_outside(x: int, y: int, width: int, height: int) -> None:
    slide = ArraySlide(WHOLE, mpp=0.5, slide_id="a")
    np.testing.assert_array_equal(slide.read(Region(x, y, 0, width, height)), expect(WHOLE, x, y, width, height))


def test_levels_are_read_at_the_nearest_pixel() -> None:
    slide = ArraySlide(WHOLE, mpp=0.5, slide_id="a", levels=[WHOLE[::2, ::2]])
    level = slide.info.levels[1]
    assert (level.width_px, level.height_px) == (42, 31)
    assert level.downsample_x == level.downsample_y == (83 / 42 + 61 / 31) / 2
    for x, y in ((10, 7), (0, 0), (1, 2), (33, 21)):
        found = slide.read(Region(round(x * level.downsample_x), round(y * level.downsample_y), 1, 8, 9))
        np.testing.assert_array_equal(found, WHOLE[::2, ::2][y : y + 9, x : x + 8])


def test_info() -> None:
    info = ArraySlide(WHOLE, mpp=(0.5, 0.6), slide_id="a").info
    assert (info.dims_l0, info.mpp, info.reader, info.slide_id) == ((83, 61), (0.5, 0.6), "array", "a")
    assert ArraySlide(WHOLE, mpp=0.5, slide_id="a").info.mpp == (0.5, 0.5)
    assert ArraySlide(WHOLE, mpp=None, slide_id="a").info.mpp is None


def test_fingerprint_knows_the_content() -> None:
    def fingerprint(array: np.ndarray) -> str:
        return ArraySlide(array, mpp=None, slide_id="a").info.fingerprint

    other = WHOLE.copy()
    other[30, 40, 1] ^= 1
    assert fingerprint(WHOLE) == fingerprint(WHOLE.copy())
    assert fingerprint(WHOLE) != fingerprint(other)
    assert fingerprint(WHOLE) != fingerprint(WHOLE.reshape(83, 61, 3))


def test_anything_that_slices_serves() -> None:
    class Lazy:
        shape, dtype = WHOLE.shape, WHOLE.dtype

        def __getitem__(self, key: object) -> list[list[list[int]]]:
            return WHOLE[key].tolist()

    slide = ArraySlide(Lazy(), mpp=None, slide_id="a")
    np.testing.assert_array_equal(slide.read(Region(5, 6, 0, 7, 8)), WHOLE[6:14, 5:12])


@pytest.mark.parametrize("array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3))])
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="wanted a"):
        ArraySlide(array, mpp=None, slide_id="a")


@pytest.mark.parametrize("region", [Region(0, 0, 1, 5, 5), Region(0, 0, -1, 5, 5), Region(0, 0, 0, -5, 5)])
def test_wrong_use_is_a_value_error(region: Region) -> None:
    with pytest.raises(ValueError, match="a: "):
        ArraySlide(WHOLE, mpp=None, slide_id="a").read(region)


def test_a_closed_slide_does_not_read() -> None:
    slide = ArraySlide(WHOLE, mpp=None, slide_id="a")
    slide.close()
    with pytest.raises(ValueError, match="closed"):
        slide.read(Region(0, 0, 0, 5, 5))


def test_a_read_is_the_callers_own() -> None:
    array = WHOLE.copy()
    ArraySlide(array, mpp=None, slide_id="a").read(Region(0, 0, 0, 83, 61))[:] = 0
    np.testing.assert_array_equal(array, WHOLE)
