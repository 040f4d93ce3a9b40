"""TIFF slides that are read without OpenSlide."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import simplejpeg
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slide_files import (
    block_place,
    damage_block,
    expect,
    forget_block,
    ome_xml,
    picture,
    pyramid,
    set_tag,
    write_ome,
    write_tiff,
    write_tiles,
)

from pathopipe.errors import SlideOpenError, TileReadError
from pathopipe.geometry import Region
from pathopipe.slide import blocks
from pathopipe.slide.open import open_slide
from pathopipe.slide.tiff import TiffReader

LOSSLESS: list[dict[str, Any]] = [
    {"compression": None},
    {"compression": "deflate"},
    {"compression": "deflate", "predictor": True},
    {"compression": "lzw"},
    {"compression": "lzw", "predictor": True},
    {"compression": "zstd"},
    {"compression": "jpeg2000", "compressionargs": {"level": 0, "reversible": True}},
    {"compression": "deflate", "planarconfig": "separate"},
]


def open_tiff(path: Path) -> TiffReader:
    return TiffReader(path, slide_id=path.stem, files=("0", 1))


def read_whole(slide: Any, level: int = 0) -> np.ndarray:
    found = slide.info.levels[level]
    return slide.read(Region(0, 0, level, found.width_px, found.height_px))


@pytest.mark.parametrize("tile", [None, 224, 256], ids=["strips", "224", "256"])
@pytest.mark.parametrize("options", LOSSLESS, ids=lambda o: "-".join(map(str, o.values()))[:30])
def test_lossless_pixels_come_back(tmp_path: Path, options: dict[str, Any], tile: int | None) -> None:
    whole = picture(301, 277)
    levels = [np.ascontiguousarray(whole.transpose(2, 0, 1))] if "planarconfig" in options else [whole]
    more = {} if tile else {"rowsperstrip": 100}
    slide = open_tiff(write_tiff(tmp_path / "a.tif", levels, tile=tile, **options, **more))
    assert slide.info.dims_l0 == (301, 277)
    np.testing.assert_array_equal(read_whole(slide), whole)


@pytest.mark.parametrize(
    ("photometric", "subsampling"), [("rgb", (1, 1)), ("ycbcr", (1, 1)), ("ycbcr", (2, 1)), ("ycbcr", (2, 2))]
)
@pytest.mark.parametrize("tile", [224, 240, None])
def test_jpeg_pixels_are_libjpegs(
    tmp_path: Path, photometric: str, subsampling: tuple[int, int], tile: int | None
) -> None:
    path = write_tiff(
        tmp_path / "a.tif",
        [picture(301, 277)],
        tile=tile,
        photometric=photometric,
        compression="jpeg",
        subsampling=subsampling,
        **({} if tile else {"rowsperstrip": 96}),
    )
    np.testing.assert_array_equal(read_whole(open_tiff(path)), tifffile.imread(path))


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
@pytest.mark.parametrize("subsampling", ["444", "420"])
def test_a_jfif_marker_means_ycbcr_whatever_the_tiff_says(tmp_path: Path, photometric: str, subsampling: str) -> None:
    stream = simplejpeg.encode_jpeg(picture(256, 256), quality=90, colorsubsampling=subsampling)
    slide = open_tiff(write_tiles(tmp_path / "a.tif", stream, photometric))
    np.testing.assert_array_equal(slide.read(Region(256, 0, 0, 256, 256)), simplejpeg.decode_jpeg(stream))


def test_a_jpeg_without_markers_is_what_the_tiff_says(tmp_path: Path) -> None:
    stream = simplejpeg.encode_jpeg(picture(256, 256), quality=90, colorsubsampling="444")
    unmarked = stream[:2] + stream[20:]
    for photometric, inside in (("rgb", "RGB"), ("ycbcr", "YCBCR")):
        slide = open_tiff(write_tiles(tmp_path / "a.tif", unmarked, photometric))
        expected = imagecodecs.jpeg8_decode(unmarked, colorspace=inside, outcolorspace="RGB")
        np.testing.assert_array_equal(slide.read(Region(0, 256, 0, 256, 256)), expected)


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_grey_becomes_rgb(tmp_path: Path, photometric: str) -> None:
    grey = picture(300, 200)[..., 0]
    path = write_tiff(tmp_path / "a.tif", [grey], photometric=photometric, compression="deflate")
    expected = grey if photometric == "minisblack" else 255 - grey
    np.testing.assert_array_equal(read_whole(open_tiff(path)), np.repeat(expected[..., None], 3, axis=2))


def test_grey_jpeg_becomes_rgb(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [picture(300, 200)[..., 0]], photometric="minisblack", compression="jpeg")
    expected = np.repeat(tifffile.imread(path)[..., None], 3, axis=2)
    np.testing.assert_array_equal(read_whole(open_tiff(path)), expected)


def test_alpha_is_laid_over_white(tmp_path: Path) -> None:
    rgba = np.concatenate([picture(256, 256), np.tile(np.arange(256, dtype=np.uint8), (256, 1))[..., None]], axis=2)
    straight = open_tiff(write_tiff(tmp_path / "a.tif", [rgba], extrasamples=["unassalpha"]))
    alpha = rgba[..., 3:].astype(float) / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(read_whole(straight) - expected).max() <= 0.5 + 1e-9
    premultiplied = rgba.copy()
    premultiplied[..., :3] = np.floor(rgba[..., :3] * alpha)
    assoc = open_tiff(write_tiff(tmp_path / "b.tif", [premultiplied], extrasamples=["assocalpha"]))
    np.testing.assert_array_equal(read_whole(assoc), premultiplied[..., :3] + (255 - rgba[..., 3:]))


@pytest.mark.parametrize("bigtiff", [False, True])
def test_ome_pyramid_in_subifds(tmp_path: Path, bigtiff: bool) -> None:
    levels = pyramid(901, 700, 3)
    path = write_ome(tmp_path / "a.ome.tif", levels, compression="deflate", bigtiff=bigtiff)
    slide = open_slide(path)
    assert (slide.info.reader, slide.info.vendor, slide.info.slide_id) == ("tiff", "ome-tiff", "a.ome")
    assert [(n.width_px, n.height_px) for n in slide.info.levels] == [(901, 700), (451, 350), (226, 175)]
    assert {(n.block_width_px, n.block_height_px) for n in slide.info.levels} == {(256, 256)}
    for number, level in enumerate(levels):
        np.testing.assert_array_equal(read_whole(slide, number), level)


def test_pyramid_in_following_pages(tmp_path: Path) -> None:
    levels = pyramid(640, 480, 3)
    slide = open_tiff(write_tiff(tmp_path / "a.tif", levels, tile=None, rowsperstrip=64, compression="lzw"))
    assert [n.downsample_x for n in slide.info.levels] == [1, 2, 4]
    assert (slide.info.levels[1].block_width_px, slide.info.levels[1].block_height_px) == (320, 64)
    for number, level in enumerate(levels):
        np.testing.assert_array_equal(read_whole(slide, number), level)


@pytest.mark.parametrize(
    ("physical", "mpp"),
    [
        ('PhysicalSizeX="0.25" PhysicalSizeY="0.26"', (0.25, 0.26)),
        ('PhysicalSizeX="0.25" PhysicalSizeXUnit="µm" PhysicalSizeY="0.25" PhysicalSizeYUnit="µm"', (0.25, 0.25)),
        ('PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="250" PhysicalSizeYUnit="nm"', (0.25, 0.25)),
        ('PhysicalSizeX="2.5E-4" PhysicalSizeXUnit="mm" PhysicalSizeY="0.25"', (0.25, 0.25)),
        ('PhysicalSizeX="0.25"', (0.25, 0.25)),
        ('PhysicalSizeX="1" PhysicalSizeXUnit="pixel" PhysicalSizeY="1" PhysicalSizeYUnit="pixel"', None),
        ('PhysicalSizeX="0" PhysicalSizeY="0"', None),
        ("", None),
    ],
)
def test_ome_physical_size(tmp_path: Path, physical: str, mpp: tuple[float, float] | None) -> None:
    info = open_slide(write_ome(tmp_path / "a.ome.tif", [picture(300, 280)], physical)).info
    assert info.mpp == (pytest.approx(mpp) if mpp else None)
    if mpp:
        assert info.mpp_evidence[0].source == "ome.PhysicalSizeX"


def test_ome_with_a_document_type_is_not_parsed(tmp_path: Path) -> None:
    xml = ome_xml(300, 280).replace("<OME", '<!DOCTYPE x [<!ENTITY a "0.25">]><OME')
    info = open_tiff(write_tiff(tmp_path / "a.ome.tif", [picture(300, 280)], mpp=None, ome=xml)).info
    assert info.mpp is None


def test_ome_and_tiff_tags_that_contradict(tmp_path: Path) -> None:
    info = open_slide(write_ome(tmp_path / "a.ome.tif", [picture(300, 280)], mpp=0.5)).info
    assert info.mpp is None
    assert "ome.PhysicalSizeX says 0.25" in info.problems[0]


def test_imagej_microns(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(300, 280), imagej=True, resolution=(4, 4), metadata={"unit": "um", "axes": "YXS"})
    assert open_slide(path).info.mpp == (0.25, 0.25)


def test_label_and_macro_are_never_the_slide(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        for name, size in (("Label image", 900), ("Macrophages CD68", 512), ("thumbnail", 64)):
            writer.write(
                picture(size, size), tile=(256, 256), photometric="rgb", compression="deflate", metadata={"Name": name}
            )
    slide = open_slide(path)
    assert slide.info.dims_l0 == (512, 512)
    np.testing.assert_array_equal(read_whole(slide), picture(512, 512))


@pytest.fixture(scope="module")
def ome_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    levels = pyramid(530, 410, 2)
    return write_ome(tmp_path_factory.mktemp("ome") / "a.ome.tif", levels, tile=112, compression="lzw"), levels


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    x=st.integers(-300, 700),
    y=st.integers(-300, 700),
    width=st.integers(0, 400),
    height=st.integers(0, 400),
    level=st.integers(0, 1),
)
def test_any_read_is_a_crop_of_the_whole_white_outside(
    ome_file: tuple[Path, list[np.ndarray]], x: int, y: int, width: int, height: int, level: int
) -> None:
    path, levels = ome_file
    slide = open_tiff(path)
    step = 2**level
    found = slide.read(Region(x * step, y * step, level, width, height))
    np.testing.assert_array_equal(found, expect(levels[level], x, y, width, height))
    slide.close()


def test_blocks_never_written_are_white(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [picture(512, 512)], compression="jpeg")
    forget_block(path, 0, 1)
    whole = read_whole(open_tiff(path))
    assert (whole[:256, 256:] == 255).all()
    assert (whole[:256, :256] != 255).any()
    assert (whole[256:] != 255).any()


@pytest.mark.parametrize("compression", ["jpeg", "deflate", "lzw", "jpeg2000", "zstd"])
def test_a_damaged_block_fails_alone(tmp_path: Path, compression: str) -> None:
    path = write_tiff(tmp_path / "a.tif", [picture(512, 512)], compression=compression)
    before = read_whole(open_tiff(path))
    damage_block(path, 0, 2)
    slide = open_tiff(path)
    for _ in range(2):
        with pytest.raises(
            TileReadError, match=r"a\.tif: region at level-0 \(0, 256\).*row 1, column 0.*copy it again"
        ):
            slide.read(Region(0, 256, 0, 256, 256))
        np.testing.assert_array_equal(slide.read(Region(256, 256, 0, 256, 256)), before[256:, 256:])
        np.testing.assert_array_equal(slide.read(Region(0, 0, 0, 512, 256)), before[:256])


def test_threads_share_a_slide_with_one_damaged_block(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [picture(800, 800)], tile=112, compression="jpeg")
    whole = read_whole(open_tiff(path))
    damage_block(path, 0, 3 * 8 + 4)  # columns 448 to 559, rows 336 to 447
    slide = open_tiff(path)
    rng = np.random.default_rng(1)
    regions = [Region(int(x), int(y), 0, 120, 90) for x, y in rng.integers(-50, 800, (300, 2))]

    def check(region: Region) -> bool:
        touches = region.x_l0 < 560 and region.x_l0 + 120 > 448 and region.y_l0 < 448 and region.y_l0 + 90 > 336
        try:
            found = slide.read(region)
        except TileReadError:
            return touches
        return not touches and np.array_equal(found, expect(whole, region.x_l0, region.y_l0, 120, 90))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, regions))


def test_a_file_cut_short_loses_only_what_was_behind_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    whole = picture(512, 512)
    # tifffile puts the directory in front of the pixels, so the rest still opens.
    write_tiff(path, [whole], compression="deflate")
    offset, _ = block_place(path, 0, 3)
    path.write_bytes(path.read_bytes()[: offset + 100])
    slide = open_tiff(path)
    np.testing.assert_array_equal(slide.read(Region(0, 0, 0, 512, 256)), whole[:256])
    with pytest.raises(TileReadError, match="100 of .* bytes are there, the file was cut short"):
        slide.read(Region(400, 400, 0, 10, 10))


def test_a_tile_that_declares_another_size_inside_is_refused_undecoded(tmp_path: Path) -> None:
    small = write_tiff(tmp_path / "a.tif", [picture(512, 512)], compression="jpeg")
    offset, count = block_place(small, 0, 0)
    data = bytearray(small.read_bytes())
    frame = data.index(b"\xff\xc0", offset, offset + count)
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    small.write_bytes(data)
    with pytest.raises(TileReadError, match="65535 x 65535 px"):
        open_tiff(small).read(Region(0, 0, 0, 10, 10))


def test_a_byte_count_beyond_the_file_is_not_allocated(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [picture(256, 256)], compression="jpeg")
    set_tag(path, 0, "TileByteCounts", 2**31)
    with pytest.raises(TileReadError, match="cut short"):
        open_tiff(path).read(Region(0, 0, 0, 10, 10))


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"TileWidth": 65_520, "TileLength": 65_520}, "blocks of 65520 x 65520 px, more than 64 megapixels"),
        ({"ImageWidth": 2**31 - 1}, "impossible size of 2147483647"),
        ({"ImageWidth": 100_000, "ImageLength": 100_000}, "lists 4 of its 152881 blocks"),
    ],
)
def test_absurd_sizes_are_refused(tmp_path: Path, tags: dict[str, int], reason: str) -> None:
    path = write_tiff(tmp_path / "a.tif", [picture(512, 512)], compression="jpeg")
    for name, value in tags.items():
        set_tag(path, 0, name, value)
    with pytest.raises(SlideOpenError, match=reason):
        open_tiff(path)


@pytest.mark.parametrize(
    ("array", "options", "reason"),
    [
        (picture(300, 280).astype(np.uint16), {}, "16-bit samples.*export it as 8-bit RGB"),
        (picture(300, 280).astype(np.float32), {}, "32-bit samples"),
        (np.zeros((5, 300, 280), np.uint8), {"photometric": "minisblack"}, "5 planes.*export it as 8-bit RGB"),
        (np.zeros((300, 280, 4), np.uint8), {"photometric": "separated"}, "photometric type 5"),
        (picture(300, 280), {"compression": "packbits"}, "TIFF scheme 32773"),
        (
            np.zeros((300, 280), np.uint8),
            {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)},
            "type 3",
        ),
    ],
)
def test_other_pixel_types_are_refused_by_name(
    tmp_path: Path, array: np.ndarray, options: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, array, **({"photometric": "rgb", "compression": "deflate"} | options))
    with pytest.raises(SlideOpenError, match=reason) as caught:
        open_tiff(path)
    assert str(caught.value).startswith("a.tif: ")
    assert "\n" not in str(caught.value)


def test_the_cache_is_bounded_and_spares_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiff(tmp_path / "a.tif", [picture(1024, 1024)], compression="deflate")
    monkeypatch.setattr(blocks, "_CACHE_BYTES", 3 * 256 * 256 * 3)
    decoded = []
    decode = blocks.decode_block
    monkeypatch.setattr(blocks, "decode_block", lambda *args: decoded.append(args[1:3]) or decode(*args))
    slide = open_tiff(path)
    for x in (0, 100, 200):
        slide.read(Region(x, 0, 0, 300, 200))
    assert decoded == [(0, 0), (0, 1)]
    decoded.clear()
    slide._blocks._cache.clear()
    for column in (0, 1, 2, 0, 3, 0, 1):
        slide.read(Region(column * 256, 0, 0, 256, 256))
    # Three fit; the one used least recently goes first.
    assert decoded == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 1)]
    read_whole(slide)
    assert slide._blocks._cache._held_bytes <= 3 * 256 * 256 * 3


def test_a_read_is_the_callers_own(tmp_path: Path) -> None:
    slide = open_tiff(write_tiff(tmp_path / "a.tif", [picture(256, 256)], compression="deflate"))
    first = slide.read(Region(0, 0, 0, 256, 256))
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(slide.read(Region(0, 0, 0, 256, 256)), kept)


def test_closing_waits_for_reads_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = open_tiff(write_tiff(tmp_path / "a.tif", [picture(256, 256)], compression="deflate"))
    started, go_on = threading.Event(), threading.Event()
    decode = blocks.decode_block

    def slow(*args: Any) -> np.ndarray:
        started.set()
        assert go_on.wait(10)
        return decode(*args)

    monkeypatch.setattr(blocks, "decode_block", slow)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(slide.read, Region(0, 0, 0, 256, 256))
        assert started.wait(10)
        slide.close()
        assert slide._blocks._fd >= 0
        go_on.set()
        assert reading.result(10).shape == (256, 256, 3)
    assert slide._blocks._fd == -1
    with pytest.raises(ValueError, match="closed"):
        slide.read(Region(0, 0, 0, 1, 1))


def test_odd_orientation_is_told(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [picture(256, 256)], extratags=[(274, "H", 1, 3, True)])
    assert "orientation 3" in open_tiff(path).info.problems[0]
