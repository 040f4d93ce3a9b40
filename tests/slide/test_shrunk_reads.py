"""Blocks shrunk while they are decoded: the right size and place, the same colours, and white beyond the edge."""

from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pytest
import simplejpeg
from slide_files import damage_block, forget_block, picture, pyramid, write_ome, write_svs, write_tiff, write_tiles

from pathopipe.errors import TileReadError
from pathopipe.geometry import Region
from pathopipe.slide.base import BlockSlide
from pathopipe.slide.native import NativeReader
from pathopipe.slide.open import open_slide
from pathopipe.slide.openslide import OpenSlideReader

JPEG_KINDS: dict[str, dict[str, Any]] = {
    "rgb": {"photometric": "rgb"},
    "ycbcr-444": {"photometric": "ycbcr", "subsampling": (1, 1)},
    "ycbcr-422": {"photometric": "ycbcr", "subsampling": (2, 1)},
    "ycbcr-420": {"photometric": "ycbcr", "subsampling": (2, 2)},
}


def shrunk(slide: Any, region: Region, factor: int, *, dct: bool, keep: bool = True) -> np.ndarray:
    out = np.full((region.height_px // factor, region.width_px // factor, 3), 77, np.uint8)
    slide.read_into(out, region, factor=factor, dct=dct, keep=keep)
    return out


def averaged(slide: Any, region: Region, factor: int) -> np.ndarray:
    size = (region.width_px // factor, region.height_px // factor)
    return cv2.resize(slide.read(region), size, interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("factor", [2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("corner", [(0, 0), (480, 240), (240, 720), (-240, 480)])
def test_averaging_by_blocks_is_averaging_the_region(
    tmp_path: Path, factor: int, corner: tuple[int, int], keep: bool
) -> None:
    """Across blocks, across the edge, with a tile that was never written, and where blocks do not divide."""
    path = write_svs(tmp_path / "a.svs", pyramid(901, 803, 1))
    forget_block(path, 0, 6)
    slide = open_slide(path)
    assert isinstance(slide, BlockSlide)
    for side in (240, 480):
        region = Region(*corner, 0, side, side)
        np.testing.assert_array_equal(
            shrunk(slide, region, factor, dct=False, keep=keep), averaged(slide, region, factor)
        )


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("kind", JPEG_KINDS)
@pytest.mark.parametrize("tile", [240, 256])
def test_reduced_decoding_is_nearly_averaging(tmp_path: Path, factor: int, kind: str, tile: int) -> None:
    options = {"tile": tile, "compression": "jpeg", **JPEG_KINDS[kind]}
    slide = open_slide(write_tiff(tmp_path / "a.tif", [picture(3 * tile, 2 * tile)], **options))
    assert slide.info.levels[0].scales == (2, 4, 8)
    region = Region(tile - 16, tile // 2, 0, 2 * tile - 32, tile)
    assert region.x_l0 % factor == region.y_l0 % factor == 0
    found = shrunk(slide, region, factor, dct=True).astype(float)
    truth = averaged(slide, region, factor).astype(float)
    assert not np.array_equal(found, truth)
    # Chroma stored at half the width alone is not shrunk by the transform as far as it should be, but smoothed again.
    assert np.sqrt(np.mean((found - truth) ** 2)) < (12 if kind == "ycbcr-422" else 8)
    # No channel is shifted, and no pixel is: moved by one, they fit far worse.
    assert np.abs((found - truth).mean(axis=(0, 1))).max() < 1
    for moved in (np.roll(truth, 1, axis=0), np.roll(truth, 1, axis=1)):
        assert np.mean((found - moved) ** 2) > 2 * np.mean((found - truth) ** 2)


JFIF = simplejpeg.encode_jpeg(picture(256, 256), quality=85, colorsubsampling="444")
MARKED = {
    "jfif": JFIF,
    "none": JFIF[:2] + JFIF[20:],
    "adobe-rgb": imagecodecs.jpeg8_encode(picture(256, 256), level=85, colorspace="RGB", outcolorspace="RGB"),
}


@pytest.mark.parametrize("marked", MARKED)
@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_colours_are_those_of_the_full_decode_whatever_the_markers_say(
    tmp_path: Path, marked: str, photometric: str
) -> None:
    slide = open_slide(write_tiles(tmp_path / "a.tif", MARKED[marked], photometric))
    region = Region(0, 0, 0, 512, 512)
    found, truth = shrunk(slide, region, 2, dct=True), averaged(slide, region, 2)
    assert np.abs(found.mean(axis=(0, 1)) - truth.mean(axis=(0, 1))).max() < 1


def test_what_lies_beyond_the_edge_does_not_bleed_in(tmp_path: Path) -> None:
    # tifffile pads edge tiles with black; the image itself is white, and so must be every shrunk pixel.
    white = np.full((300, 301, 3), 255, np.uint8)
    slide = open_slide(write_tiff(tmp_path / "a.tif", [white], compression="jpeg"))
    assert slide.info.levels[0].scales == (2, 4, 8)
    for dct in (True, False):
        assert shrunk(slide, Region(0, 0, 0, 512, 512), 8, dct=dct).min() >= 254


def test_dct_is_offered_only_where_it_is_possible(tmp_path: Path) -> None:
    def scales(path: Path) -> list[tuple[int, ...]]:
        return [level.scales for level in open_slide(path).info.levels]

    jpeg = {"compression": "jpeg"}
    assert scales(write_tiff(tmp_path / "a.tif", pyramid(1024, 768, 2), **jpeg)) == [(2, 4, 8)] * 2
    assert scales(write_ome(tmp_path / "a.ome.tif", pyramid(1024, 768, 1), **jpeg)) == [(2, 4, 8)]
    assert scales(write_tiff(tmp_path / "b.tif", pyramid(1024, 768, 1), compression="deflate")) == [()]
    # A second level that is no whole fraction is blended by OpenSlide; a lone edge tile proves nothing.
    assert scales(write_tiff(tmp_path / "c.tif", pyramid(1023, 768, 2), **jpeg)) == [(2, 4, 8), ()]
    assert scales(write_tiff(tmp_path / "d.tif", pyramid(200, 200, 1), **jpeg)) == [()]


def test_dct_is_refused_off_the_lattice(tmp_path: Path) -> None:
    slide = open_slide(write_svs(tmp_path / "a.svs", pyramid(900, 700, 1)))
    with pytest.raises(ValueError, match="2 times"):
        shrunk(slide, Region(1, 0, 0, 64, 64), 2, dct=True)


def test_a_damaged_block_is_an_error_with_dct_and_openslides_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_svs(tmp_path / "a.svs", pyramid(960, 720, 1))
    damage_block(path, 0, 5)
    slide = open_slide(path)
    assert isinstance(slide, NativeReader)
    asked: list[Region] = []

    def read(self: OpenSlideReader, region: Region) -> np.ndarray:
        asked.append(region)
        return np.full((region.height_px, region.width_px, 3), 7, np.uint8)

    monkeypatch.setattr(OpenSlideReader, "read", read)
    region = Region(240, 240, 0, 240, 240)
    with pytest.raises(TileReadError, match=r"row 1, column 1"):
        shrunk(slide, region, 2, dct=True)
    assert asked == []
    assert (shrunk(slide, region, 2, dct=False) == 7).all()
    assert asked == [region]
    assert shrunk(slide, Region(480, 240, 0, 240, 240), 2, dct=True).std() > 10


@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_reading_in_place_and_by_pieces_give_the_same(tmp_path: Path, kind: str) -> None:
    """A region that is one block is decoded where it is wanted; through scratch memory and the cache come the same."""
    path = write_tiff(tmp_path / "a.tif", [picture(700, 520)], compression="jpeg", **JPEG_KINDS[kind])
    slide = open_slide(path)
    for x, y in ((0, 0), (256, 256), (512, 0), (0, 512), (512, 512), (100, 100)):
        region = Region(x, y, 0, 256, 256)
        in_place = shrunk(slide, region, 1, dct=False, keep=False)
        strided = np.zeros((256, 300, 3), np.uint8)[:, 20:276]
        slide.read_into(strided, region, keep=False)
        fresh = open_slide(path).read(region)
        np.testing.assert_array_equal(in_place, fresh)
        np.testing.assert_array_equal(strided, fresh)
        np.testing.assert_array_equal(slide.read(region), fresh)


@pytest.mark.shared_data
def test_real_slide_differs_as_little_as_documented(shared_data: Path) -> None:
    slide = open_slide(shared_data / "slides" / "tiff" / "TCGA-V5-A7RE-11A-01-TS1.pyramid.tif")
    region = Region(6144, 4096, 0, 2048, 2048)
    found, truth = shrunk(slide, region, 2, dct=True), averaged(slide, region, 2)
    assert truth.std() > 20
    assert cv2.PSNR(found, truth) > 36


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("factor", "dct"), [(1, False), (2, False), (2, True)])
def test_any_array_may_be_read_into(tmp_path: Path, factor: int, dct: bool, keep: bool) -> None:
    """Turned round, with gaps, or a part of a larger one: blocks are put there all the same, and nowhere else."""
    slide = open_slide(write_svs(tmp_path / "a.svs", [picture(720, 720)]))
    side = 480 // factor
    region = Region(240, 0, 0, 480, 480)
    truth = shrunk(slide, region, factor, dct=dct)
    whole = np.full((2 * side, 3 * side, 3), 77, np.uint8)
    for place in (
        (slice(side - 1, None, -1), slice(0, side)),
        (slice(0, side), slice(side - 1, None, -1)),
        (slice(0, None, 2), slice(0, None, 3)),
        (slice(5, side + 5), slice(7, side + 7)),
    ):
        whole[...] = 77
        out = whole[place]
        slide.read_into(out, region, factor=factor, dct=dct, keep=keep)
        np.testing.assert_array_equal(out, truth)
        out[...] = 77
        assert (whole == 77).all()
    turned = np.empty((side, side, 3), np.uint8).transpose(1, 0, 2)
    slide.read_into(turned, region, factor=factor, dct=dct, keep=keep)
    np.testing.assert_array_equal(turned, truth)
