"""JPEG tiles one after the other: what is remembered of one never changes another, and no damage goes unseen."""

import math
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from slide_files import picture

from pathopipe.slide.base import empty_pixels
from pathopipe.slide.jpeg import JpegTiles, parse_header

SIZES = ((64, 48), (40, 48))


def tiles_of(*, rgb_inside: bool = False) -> JpegTiles:
    return JpegTiles(tables=None, components=3, rgb_inside=rgb_inside, believe_markers=False)


def encoded(width: int = 64, height: int = 48, seed: int = 0, **options: object) -> bytes:
    return simplejpeg.encode_jpeg(picture(width, height, seed), **{"quality": 85, "colorsubsampling": "420", **options})


# Two that begin alike, and others with tables, sampling, size and order of segments of their own.
KINDS = [
    encoded(),
    encoded(seed=1),
    encoded(quality=40),
    encoded(colorsubsampling="444"),
    encoded(40, 48),
    imagecodecs.jpeg8_encode(picture(64, 48), level=85, optimize=True),
]


def outcome(tiles: JpegTiles, stream: bytes, factor: int = 1) -> NDArray[np.uint8] | str:
    try:
        return tiles.decode(stream, sizes=SIZES, factor=factor)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("factor", [1, 2])
def test_tiles_that_begin_otherwise_take_turns(factor: int) -> None:
    tiles = tiles_of()
    for first in KINDS:
        for second in KINDS:
            for stream in (first, second):
                header = parse_header(stream)
                height, width = header.height_px // factor, header.width_px // factor
                truth = simplejpeg.decode_jpeg(stream, "RGB", min_height=height, min_width=width, min_factor=factor)
                np.testing.assert_array_equal(tiles.decode(stream, sizes=SIZES, factor=factor), truth)


def test_threads_share_one_decoder() -> None:
    tiles = tiles_of()
    truths = [simplejpeg.decode_jpeg(stream, "RGB") for stream in KINDS]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: tiles.decode(KINDS[n % len(KINDS)], sizes=SIZES), range(600)))
    for n, pixels in enumerate(found):
        np.testing.assert_array_equal(pixels, truths[n % len(KINDS)])


@pytest.mark.parametrize("rgb_inside", [True, False])
def test_a_changed_start_is_read_anew(rgb_inside: bool) -> None:
    """Each byte before the scan changed: a decoder that knows the unchanged start does what a new one does."""
    stream = encoded(colorsubsampling="444")
    start = stream.index(b"\xff\xda") + 14
    errors = 0
    for place in range(start):
        changed = bytearray(stream)
        changed[place] ^= 0x11
        knowing = tiles_of(rgb_inside=rgb_inside)
        knowing.decode(stream, sizes=SIZES)
        found, truth = (outcome(tiles, bytes(changed)) for tiles in (knowing, tiles_of(rgb_inside=rgb_inside)))
        if isinstance(truth, str):
            assert found == truth
            errors += 1
        else:
            np.testing.assert_array_equal(found, truth, err_msg=f"byte {place}")
    assert 50 < errors < start


def test_a_known_start_excuses_nothing() -> None:
    tiles = tiles_of()
    stream = encoded()
    tiles.decode(stream, sizes=SIZES)
    with pytest.raises(ValueError, match="64 x 48 px of 3 components with 8 bits, other than its TIFF declares"):
        tiles.decode(stream, sizes=((64, 64),))
    scan = stream.index(b"\xff\xda")
    for cut in (scan, scan + 2, scan + 14, (scan + len(stream)) // 2):
        with pytest.raises(ValueError, match=r"."):
            tiles.decode(stream[:cut], sizes=SIZES)
    with pytest.raises(ValueError, match=r"."):
        tiles.decode(stream[: scan + 14] + b"\xff\xd9", sizes=SIZES)
    np.testing.assert_array_equal(tiles.decode(stream, sizes=SIZES), simplejpeg.decode_jpeg(stream, "RGB"))


def test_a_start_without_a_scan_is_not_remembered() -> None:
    """Fill bytes may stand before a marker; what follows them is not in what would be compared."""
    stream = encoded(colorsubsampling="444")
    scan = stream.index(b"\xff\xda")
    filled = stream[:scan] + b"\xff\xff" + stream[scan:]
    # Says YCbCr, and must not be believed where the TIFF says RGB.
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x01"
    other = stream[:scan] + b"\xff\xff" + adobe + stream[scan:]
    tiles = tiles_of(rgb_inside=True)
    truth = tiles.decode(stream, sizes=SIZES)
    for each in (filled, other, stream):
        np.testing.assert_array_equal(tiles.decode(each, sizes=SIZES), truth)


@pytest.mark.parametrize("offset", [0, 1, 8, 16, 32])
def test_pixels_do_not_depend_on_where_they_are_put(offset: int) -> None:
    stream = encoded()
    memory = np.zeros(64 * 48 * 3 + 64, np.uint8)
    first = -memory.ctypes.data % 32 + offset
    place = memory[first : first + 64 * 48 * 3].reshape(48, 64, 3)
    found = tiles_of().decode(stream, sizes=SIZES, buffer=place)
    assert np.may_share_memory(found, place)
    np.testing.assert_array_equal(place, simplejpeg.decode_jpeg(stream, "RGB"))


@pytest.mark.parametrize("shape", [(1, 1, 3), (240, 240, 3), (2, 3, 64, 64, 3), (0, 5, 3)])
def test_no_row_lies_where_decoders_bypass_the_cache(shape: tuple[int, ...]) -> None:
    asked: list[tuple[int, ...]] = []

    def allocate(wanted: tuple[int, ...]) -> NDArray[np.uint8]:
        asked.append(wanted)
        return np.zeros(wanted, np.uint8)

    pixels = empty_pixels(shape, allocate)
    assert (pixels.shape, pixels.dtype, pixels.flags.c_contiguous) == (shape, np.uint8, True)
    assert len(asked) == 1
    assert math.prod(asked[0]) < math.prod(shape) + 64
    rows = pixels.reshape(-1, math.prod(shape[-2:]))
    starts = {row.ctypes.data % 16 for row in rows} if rows.shape[1] % 16 == 0 else {pixels.ctypes.data % 16}
    assert starts == {8} or not rows.size
