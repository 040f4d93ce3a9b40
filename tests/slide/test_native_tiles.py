"""The faster road shows OpenSlide's pixels, bit for bit, or leaves a file to OpenSlide."""

from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from slide_files import damage_block, expect, forget_block, picture, pyramid, write_svs, write_tiff, write_tiles

from pathopipe.errors import TileReadError
from pathopipe.geometry import Region
from pathopipe.slide import native
from pathopipe.slide.native import NativeReader
from pathopipe.slide.open import open_slide
from pathopipe.slide.openslide import OpenSlideReader, over_white


def theirs(path: Path, region: Region) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        size = (region.width_px, region.height_px)
        return over_white(np.asarray(slide.read_region((region.x_l0, region.y_l0), region.level, size)))


def assert_reads_as_openslide(path: Path, *, reads: int = 25, seed: int = 0) -> NativeReader:
    """Compare whole levels and random regions, aligned and not, inside and across every edge."""
    slide = open_slide(path)
    assert isinstance(slide, NativeReader)
    rng = np.random.default_rng(seed)
    reference = OpenSlideReader(path, slide_id="reference", files=("", 0))
    for number, level in enumerate(slide.info.levels):
        whole = Region(0, 0, number, min(level.width_px, 1200), min(level.height_px, 1200))
        np.testing.assert_array_equal(slide.read(whole), theirs(path, whole))
        for _ in range(reads):
            x = int(rng.integers(-100, slide.info.dims_l0[0] + 100))
            y = int(rng.integers(-100, slide.info.dims_l0[1] + 100))
            width, height = (int(n) for n in rng.integers(1, 400, 2))
            region = Region(x, y, number, width, height)
            np.testing.assert_array_equal(slide.read(region), reference.read(region), err_msg=str(region))
    reference.close()
    return slide


def native_reads(slide: NativeReader, monkeypatch: pytest.MonkeyPatch) -> list[Region]:
    """Collect the reads that OpenSlide serves from here on."""
    served: list[Region] = []
    read = slide._slide.read
    monkeypatch.setattr(slide._slide, "read", lambda region: served.append(region) or read(region))
    return served


VARIANTS: list[dict[str, Any]] = [
    {"photometric": photometric, "compression": "jpeg", "subsampling": subsampling, "tile": tile}
    for tile in (224, 240, 256, 512)
    for photometric, subsampling in (("rgb", None), ("ycbcr", (1, 1)), ("ycbcr", (2, 1)), ("ycbcr", (2, 2)))
] + [
    {"compression": "deflate", "tile": 240},
    {"compression": "deflate", "tile": 240, "predictor": True},
    {"compression": "lzw", "tile": 256},
    {"compression": "lzw", "tile": 224, "predictor": True},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
def test_generic_tiff(tmp_path: Path, options: dict[str, Any]) -> None:
    bigtiff = options["tile"] == 512
    path = write_tiff(tmp_path / "a.tif", pyramid(901, 700, 2), bigtiff=bigtiff, **options)
    slide = assert_reads_as_openslide(path, reads=8)
    assert (slide.info.reader, slide.info.vendor) == ("tiff", "generic-tiff")


@pytest.mark.parametrize("size", [(960, 720), (961, 719), (239, 1000), (16, 16)])
@pytest.mark.parametrize("options", [{}, {"photometric": "ycbcr", "subsampling": (2, 2)}], ids=["rgb", "ycbcr"])
def test_aperio(tmp_path: Path, size: tuple[int, int], options: dict[str, Any]) -> None:
    slide = assert_reads_as_openslide(write_svs(tmp_path / "a.svs", pyramid(*size, 2), **options), reads=8)
    assert (slide.info.vendor, slide.info.mpp) == ("aperio", (0.25, 0.25))


MARKED = {
    "jfif-444": simplejpeg.encode_jpeg(picture(256, 256), quality=85, colorsubsampling="444"),
    "jfif-420": simplejpeg.encode_jpeg(picture(256, 256), quality=85, colorsubsampling="420"),
    "adobe-rgb": imagecodecs.jpeg8_encode(picture(256, 256), level=85, colorspace="RGB", outcolorspace="RGB"),
}
# The same without markers of their own, and with an Adobe marker that says YCbCr.
MARKED["none-444"] = MARKED["jfif-444"][:2] + MARKED["jfif-444"][20:]
MARKED["none-420"] = MARKED["jfif-420"][:2] + MARKED["jfif-420"][20:]
ADOBE_YCBCR = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01"
MARKED["adobe-ycbcr"] = MARKED["jfif-420"][:2] + ADOBE_YCBCR + MARKED["jfif-420"][20:]


@pytest.mark.parametrize("marked", MARKED)
@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_tiles_with_markers_of_their_own(tmp_path: Path, marked: str, photometric: str) -> None:
    path = write_tiles(tmp_path / "a.tif", MARKED[marked], photometric)
    info = assert_reads_as_openslide(path, reads=3).info
    # OpenSlide goes by what the TIFF declares; where that is certainly wrong, the user is told.
    is_false = photometric == "rgb" and marked in ("jfif-420", "adobe-ycbcr")
    assert any("false colours" in problem for problem in info.problems) is is_false


@pytest.fixture(scope="module")
def svs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_svs(tmp_path_factory.mktemp("svs") / "a.svs", pyramid(900, 700, 2))


@pytest.fixture(scope="module")
def svs_read(svs: Path) -> tuple[Any, np.ndarray]:
    return open_slide(svs), theirs(svs, Region(0, 0, 0, 900, 700))


@given(x=st.integers(-300, 1000), y=st.integers(-300, 900), width=st.integers(0, 300), height=st.integers(0, 300))
def test_any_read_is_a_crop_of_the_whole(
    svs_read: tuple[Any, np.ndarray], x: int, y: int, width: int, height: int
) -> None:
    slide, whole = svs_read
    np.testing.assert_array_equal(slide.read(Region(x, y, 0, width, height)), expect(whole, x, y, width, height))


def test_aligned_reads_need_no_openslide_and_others_do(svs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = open_slide(svs)
    assert isinstance(slide, NativeReader)
    served = native_reads(slide, monkeypatch)
    slide.read(Region(13, 17, 0, 300, 300))
    slide.read(Region(-20, 600, 0, 300, 300))
    slide.read(Region(26, 34, 1, 100, 100))
    assert served == []
    slide.read(Region(27, 34, 1, 100, 100))
    assert len(served) == 1


def test_a_level_that_is_no_whole_fraction_is_left_to_openslide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = open_slide(write_svs(tmp_path / "a.svs", pyramid(901, 700, 2)))
    assert isinstance(slide, NativeReader)
    served = native_reads(slide, monkeypatch)
    slide.read(Region(0, 0, 1, 100, 100))
    assert len(served) == 1


@pytest.mark.parametrize("write", [write_svs, write_tiff])
@pytest.mark.parametrize("page", [0, 1])
def test_tiles_never_written_are_openslides(tmp_path: Path, write: Any, page: int) -> None:
    options = {"compression": "jpeg", "tile": 240} if write is write_tiff else {}
    path = write(tmp_path / "a.tif", pyramid(960, 720, 2), **options)
    forget_block(path, page, 1)
    assert_reads_as_openslide(path, reads=8)


def test_a_damaged_tile_fails_alone(svs: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    path.write_bytes(svs.read_bytes())
    damage_block(path, 0, 5)
    slide = open_slide(path)
    assert isinstance(slide, NativeReader)
    for _ in range(2):
        with pytest.raises(TileReadError, match=r"a\.svs: region at level-0 \(300, 300\)"):
            slide.read(Region(300, 300, 0, 50, 50))
        np.testing.assert_array_equal(
            slide.read(Region(480, 240, 0, 100, 100)), theirs(svs, Region(480, 240, 0, 100, 100))
        )


def test_a_file_that_reads_otherwise_is_left_to_openslide(svs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = native.BlockReader.read

    def off_by_one(self: Any, region: Region, x: int, y: int) -> np.ndarray:
        return decode(self, region, x, y) ^ 1

    monkeypatch.setattr(native.BlockReader, "read", off_by_one)
    slide = open_slide(svs)
    assert isinstance(slide, OpenSlideReader)
    np.testing.assert_array_equal(slide.read(Region(0, 0, 0, 50, 50)), theirs(svs, Region(0, 0, 0, 50, 50)))


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "jpeg", "extratags": [(274, "H", 1, 3, True)]},
        {"compression": "deflate", "planarconfig": "separate"},
    ],
    ids=["turned", "planes"],
)
def test_other_kinds_are_left_to_openslide(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = picture(512, 512)
    array = np.ascontiguousarray(whole.transpose(2, 0, 1)) if "planarconfig" in options else whole
    path = write_tiff(tmp_path / "a.tif", [array], **options)
    assert not isinstance(open_slide(path), NativeReader)


def test_closing_closes_both(svs: Path) -> None:
    slide = open_slide(svs)
    assert isinstance(slide, NativeReader)
    slide.close()
    assert slide._blocks._fd == -1
    for region in (Region(0, 0, 0, 5, 5), Region(1, 1, 1, 5, 5)):
        with pytest.raises(ValueError, match="closed"):
            slide.read(region)


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["aperio/CMU-1-Small-Region.svs", "tiff/TCGA-V5-A7RE-11A-01-TS1.pyramid.tif"])
def test_real_slides(shared_data: Path, name: str) -> None:
    assert_reads_as_openslide(shared_data / "slides" / name, reads=15)
