"""The whole slide at low power."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slide_files import damage_block, picture, pyramid, write_svs, write_tiff

from pathopipe.geometry import Region
from pathopipe.slide import overview
from pathopipe.slide.array import ArraySlide
from pathopipe.slide.open import open_slide
from pathopipe.slide.overview import overview_size, read_overview, scan_overview


def area_mean(whole: np.ndarray, width: int, height: int) -> np.ndarray:
    """Average over exact rectangles, by shares: slow and plain."""

    def shares(source: int, target: int) -> np.ndarray:
        edges = np.arange(target + 1) * source / target
        lines = np.arange(source)
        found = np.minimum(edges[1:, None], lines + 1) - np.maximum(edges[:-1, None], lines)
        return np.clip(found, 0, 1) * target / source

    rows, columns = shares(whole.shape[0], height), shares(whole.shape[1], width)
    return np.einsum("yr,rcs,xc->yxs", rows, whole.astype(float), columns, optimize=True)


@given(width=st.integers(1, 150), height=st.integers(1, 150), mpp=st.floats(0.1, 60))
def test_each_pixel_is_the_mean_of_its_rectangle(width: int, height: int, mpp: float) -> None:
    whole = picture(width, height)
    found = read_overview(ArraySlide(whole, mpp=0.5, slide_id="a"), mpp)
    expected = area_mean(whole, found.shape[1], found.shape[0])
    assert np.abs(found - expected).max() <= 0.51


@pytest.mark.parametrize("strip_bytes", [1, 20_000, 200_000])
def test_strips_leave_no_seam(monkeypatch: pytest.MonkeyPatch, strip_bytes: int) -> None:
    whole = picture(400, 900)
    slide = ArraySlide(whole, mpp=0.25, slide_id="a")
    at_once = read_overview(slide, 0.9)
    monkeypatch.setattr(overview, "_STRIP_BYTES", strip_bytes)
    monkeypatch.setattr(overview, "_FLOAT_ROWS", 7)
    in_strips = read_overview(slide, 0.9)
    assert np.abs(at_once.astype(int) - in_strips).max() <= 1
    assert np.abs(in_strips - area_mean(whole, at_once.shape[1], at_once.shape[0])).max() <= 0.51


def test_size_follows_each_axis() -> None:
    info = ArraySlide(picture(400, 300), mpp=(0.25, 0.5), slide_id="a").info
    assert overview_size(info, 1.0) == (100, 150)
    assert overview_size(info, 0.1) == (400, 300)
    assert overview_size(info, 50.0) == (2, 3)
    assert overview_size(info, 1e6) == (1, 1)


def test_without_resolution_the_longer_side_is_bounded() -> None:
    whole = np.zeros((1, 1, 3), np.uint8)
    info = ArraySlide(np.broadcast_to(whole, (100, 8192, 3)), mpp=None, slide_id="a").info
    assert overview_size(info, 8.0) == (2048, 25)
    small = ArraySlide(picture(40, 30), mpp=None, slide_id="a")
    np.testing.assert_array_equal(read_overview(small, 8.0), picture(40, 30))


def reads_of(slide: Any, monkeypatch: pytest.MonkeyPatch) -> list[Region]:
    regions: list[Region] = []
    read = slide.read
    monkeypatch.setattr(slide, "read", lambda region: regions.append(region) or read(region))
    return regions


@pytest.mark.parametrize(("mpp", "level"), [(0.25, 0), (0.49, 0), (0.5, 1), (0.9, 1), (1.0, 2), (8.0, 3)])
def test_the_coarsest_level_that_is_fine_enough_is_read(
    monkeypatch: pytest.MonkeyPatch, mpp: float, level: int
) -> None:
    finest, *coarser = pyramid(1024, 768, 4)
    slide = ArraySlide(finest, mpp=0.25, slide_id="a", levels=coarser)
    regions = reads_of(slide, monkeypatch)
    read_overview(slide, mpp)
    assert {region.level for region in regions} == {level}


def test_reads_are_small_and_along_the_files_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = open_slide(write_tiff(tmp_path / "a.tif", [picture(1700, 900)], tile=240, compression="jpeg"))
    regions = reads_of(slide, monkeypatch)
    found = read_overview(slide, 2.0)
    assert max(region.width_px * region.height_px for region in regions) <= 1200 * 1200
    assert {region.x_l0 % 240 for region in regions} == {region.y_l0 % 240 for region in regions} == {0}
    whole = slide.read(Region(0, 0, 0, 1700, 900))
    assert np.abs(found - area_mean(whole, found.shape[1], found.shape[0])).max() <= 0.51


def test_a_damaged_block_is_white_and_counted(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "a.svs", [picture(960, 720)])
    sound = read_overview(open_slide(path), 2.0)
    damage_block(path, 0, 5)  # columns and rows 240 to 479
    slide = open_slide(path)
    found, bad_blocks, unreadable_share = scan_overview(slide, 2.0)
    assert (bad_blocks, unreadable_share) == (1, 240 * 240 / (960 * 720))
    assert (found[30:60, 30:60] == 255).all()
    found[30:60, 30:60] = sound[30:60, 30:60]
    np.testing.assert_array_equal(found, sound)


def test_memory_is_bounded_without_a_pyramid(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = 1_000_000
    monkeypatch.setattr(overview, "_STRIP_BYTES", budget)
    monkeypatch.setattr(overview, "_FLOAT_BYTES", budget)
    # 90 MB that are never there: one row of pixels, shown again and again.
    row = picture(5_000, 1)
    slide = ArraySlide(np.broadcast_to(row, (6_000, 5_000, 3)), mpp=0.25, slide_id="a")
    tracemalloc.start()
    found = read_overview(slide, 8.0)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == (188, 156, 3)
    assert peak_bytes < 8 * budget
