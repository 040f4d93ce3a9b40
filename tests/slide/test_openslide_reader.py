"""Slides read through OpenSlide."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slide_files import damage_block, expect, picture, pyramid, set_tag, write_svs, write_tiff

from pathopipe.errors import SlideOpenError, TileReadError
from pathopipe.geometry import BoxL0, Region
from pathopipe.slide.openslide import OpenSlideReader, bounds_from_properties, detect_vendor, over_white


def open_reader(path: Path) -> OpenSlideReader:
    return OpenSlideReader(path, slide_id=path.stem, files=("0", 1))


def opened_handles(monkeypatch: pytest.MonkeyPatch) -> list[openslide.OpenSlide]:
    """Collect the handles opened from here on; a closed one is taken off the list."""
    handles: list[openslide.OpenSlide] = []
    original_open, original_close = openslide.OpenSlide.__init__, openslide.OpenSlide.close

    def opening(self: openslide.OpenSlide, name: object) -> None:
        original_open(self, name)
        handles.append(self)

    def closing(self: openslide.OpenSlide) -> None:
        original_close(self)
        handles[:] = [handle for handle in handles if handle is not self]

    monkeypatch.setattr(openslide.OpenSlide, "__init__", opening)
    monkeypatch.setattr(openslide.OpenSlide, "close", closing)
    return handles


@pytest.fixture(scope="module")
def svs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_svs(tmp_path_factory.mktemp("svs") / "a.svs", pyramid(901, 700, 2))


def test_info(svs: Path) -> None:
    info = open_reader(svs).info
    assert (info.slide_id, info.reader, info.vendor) == ("a", "openslide", "aperio")
    assert info.dims_l0 == (901, 700)
    assert [(n.width_px, n.height_px, n.block_width_px, n.block_height_px) for n in info.levels] == [
        (901, 700, 240, 240),
        (451, 350, 240, 240),
    ]
    assert info.levels[1].downsample_x == openslide.OpenSlide(svs).level_downsamples[1]
    assert info.mpp == (0.25, 0.25)
    assert info.bounds_l0 is None


def test_nothing_private_reaches_the_record(svs: Path) -> None:
    properties = openslide.OpenSlide(svs).properties
    assert (properties["aperio.User"], properties["aperio.Barcode"]) == ("someone", "P-123")
    text = repr(open_reader(svs).info)
    for word in ("someone", "12/29/09", "P-123"):
        assert word not in text


@settings(max_examples=60)
@given(
    x=st.integers(-400, 1200),
    y=st.integers(-400, 1000),
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    level=st.integers(0, 1),
)
def test_reads_are_openslides_over_white(svs: Path, x: int, y: int, width: int, height: int, level: int) -> None:
    with openslide.OpenSlide(svs) as theirs:
        rgba = np.asarray(theirs.read_region((x, y), level, (width, height))).astype(int)
    slide = open_reader(svs)
    found = slide.read(Region(x, y, level, width, height))
    slide.close()
    assert found.shape == (height, width, 3)
    opaque, clear = rgba[..., 3] == 255, rgba[..., 3] == 0
    np.testing.assert_array_equal(found[opaque], rgba[..., :3][opaque])
    assert (found[clear] == 255).all()
    alpha = rgba[..., 3:] / 255
    assert np.abs(found - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 0.5 + 1e-9


def test_outside_is_white(svs: Path) -> None:
    slide = open_reader(svs)
    whole = slide.read(Region(0, 0, 0, 901, 700))
    for x, y in ((-50, -60), (870, 650), (-5000, 10), (5000, 5000)):
        np.testing.assert_array_equal(slide.read(Region(x, y, 0, 100, 110)), expect(whole, x, y, 100, 110))


def test_over_white_is_exact_for_every_value_and_alpha() -> None:
    value, alpha = np.meshgrid(np.arange(256), np.arange(256))
    rgba = np.stack([value, value, value, alpha], axis=-1).astype(np.uint8)
    exact = value * alpha / 255 + 255 - alpha
    found = over_white(rgba).astype(float)
    assert np.abs(found - exact[..., None]).max() <= 0.5 + 1e-9
    np.testing.assert_array_equal(found[255, :, 0], np.arange(256))
    assert (found[0] == 255).all()


def test_empty_region(svs: Path) -> None:
    assert open_reader(svs).read(Region(0, 0, 0, 0, 5)).shape == (5, 0, 3)


def test_vendor_fields_that_are_not_utf_8(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "a.svs", [picture(300, 280)])
    data = path.read_bytes()
    assert data.count(b"|User = someone|Date =") == 1
    path.write_bytes(data.replace(b"|User = someone|Date =", b"|Us\xe9r = som\xff\xe9ne|D\xe4te ="))
    with pytest.raises(KeyError):
        dict(openslide.OpenSlide(path).properties)
    assert open_reader(path).info.mpp == (0.25, 0.25)


def test_wrong_use_is_a_value_error(svs: Path) -> None:
    with pytest.raises(ValueError, match="no level 2"):
        open_reader(svs).read(Region(0, 0, 2, 5, 5))


def test_a_damaged_tile_fails_alone_among_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_svs(tmp_path / "a b.svs", [picture(960, 960)])
    clean = open_reader(path)
    whole = clean.read(Region(0, 0, 0, 960, 960))
    clean.close()
    damage_block(path, 0, 5)  # columns and rows 240 to 479
    handles = opened_handles(monkeypatch)
    slide = open_reader(path)
    corners = np.random.default_rng(2).integers(-50, 960, (150, 2)).tolist()

    def check(corner: list[int]) -> bool:
        x, y = corner
        touches = x < 480 and x + 70 > 240 and y < 480 and y + 90 > 240
        try:
            found = slide.read(Region(x, y, 0, 70, 90))
        except TileReadError as error:
            assert str(error).startswith(f"a b.svs: region at level-0 ({x}, {y}), 70 x 90 px of level 0 can't be read")
            assert "\n" not in str(error)
            return touches
        return not touches and np.array_equal(found, expect(whole, x, y, 70, 90))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, corners))
    assert 1 <= len(handles) <= 8
    slide.close()
    assert handles == []


def test_threads_that_come_and_go_leave_no_handles(svs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handles = opened_handles(monkeypatch)
    slide = open_reader(svs)
    for _ in range(5):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(slide.read, Region(0, 0, 0, 10, 10)).result()
    assert len(handles) == 1
    slide.close()


def test_a_closed_slide_does_not_read(svs: Path) -> None:
    slide = open_reader(svs)
    slide.close()
    with pytest.raises(ValueError, match="closed"):
        slide.read(Region(0, 0, 0, 5, 5))


def test_a_slide_that_vanishes_fails_its_reads_only(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "a.svs", [picture(500, 500)])
    slide = open_reader(path)
    slide._idle.clear()
    path.rename(tmp_path / "elsewhere.svs")
    with pytest.raises(TileReadError, match=r"a\.svs"):
        slide.read(Region(0, 0, 0, 5, 5))


def test_what_openslide_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    path.write_text("no slide")
    assert detect_vendor(path) is None
    with pytest.raises(SlideOpenError, match=r"a\.svs: OpenSlide can't open it"):
        open_reader(path)


def test_absurd_tiles_are_refused(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", [picture(512, 512)], compression="jpeg")
    for name in ("TileWidth", "TileLength"):
        set_tag(path, 0, name, 65_520)
    with pytest.raises(SlideOpenError, match="65520 x 65520"):
        open_reader(path)


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        ({"x": "10", "y": "20", "width": "300", "height": "400"}, BoxL0(10, 20, 300, 400)),
        ({"x": "10", "y": "20", "width": "300"}, None),
        ({"x": "10", "y": "20", "width": "0", "height": "400"}, None),
        ({"x": "ten", "y": "20", "width": "300", "height": "400"}, None),
        ({}, None),
    ],
)
def test_bounds(given: dict[str, str], bounds: BoxL0 | None) -> None:
    assert bounds_from_properties({f"openslide.bounds-{name}": value for name, value in given.items()}) == bounds
