"""JPEG streams as TIFF tiles and DICOM frames carry them: what their markers say, and strict decoding."""

from collections.abc import Container
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pathopipe.slide.base import empty_pixels

__all__ = ["JpegHeader", "JpegTiles", "parse_header", "shows_false_colours"]

_SOI = b"\xff\xd8"
_ADOBE_MARKER = 0xEE
_JFIF_MARKER = 0xE0
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SCAN_MARKER = 0xDA
_SCAN = b"\xff\xda"
_END_MARKER = 0xD9


class JpegHeader(NamedTuple):
    """What stands before the first scan."""

    width_px: int
    height_px: int
    bits: int
    sampling: tuple[tuple[int, int], ...]
    """Horizontal and vertical sampling factor of each component."""
    jfif: bool
    adobe_transform: int | None
    """0: RGB, 1: YCbCr; None without an Adobe marker."""

    @property
    def subsampled(self) -> bool:
        """Whether components after the first are stored at lower resolution."""
        return any(factors != self.sampling[0] for factors in self.sampling[1:])


def parse_header(stream: bytes) -> JpegHeader:
    """Read the markers up to the first scan.

    Raises:
        ValueError: It is no JPEG stream, or it ends before its frame header.
    """
    return _header(stream, _segments(stream))


def _header(stream: bytes, segments: list[tuple[int, int, int]]) -> JpegHeader:
    jfif, adobe, frame = False, None, None
    for marker, start, end in segments:
        body = stream[start:end]
        if marker == _JFIF_MARKER and body.startswith(b"JFIF"):
            jfif = True
        elif marker == _ADOBE_MARKER and body.startswith(b"Adobe") and len(body) >= 12:
            adobe = body[11]
        elif marker in _FRAME_MARKERS and len(body) >= 6:
            frame = body
    if frame is None or len(frame) < 6 + 3 * frame[5] or frame[5] == 0:
        raise ValueError("no JPEG frame header")
    factors = tuple((frame[7 + 3 * n] >> 4, frame[7 + 3 * n] & 15) for n in range(frame[5]))
    return JpegHeader(
        width_px=int.from_bytes(frame[3:5], "big"),
        height_px=int.from_bytes(frame[1:3], "big"),
        bits=frame[0],
        sampling=factors,
        jfif=jfif,
        adobe_transform=adobe,
    )


class JpegTiles:
    """Decodes the JPEG tiles of one level with libjpeg-turbo's accurate transform; safe from several threads.

    A damaged stream is an error, never half grey. Nearly all tiles of a level begin with the same bytes up to the scan,
    so what was found there is remembered and only looked for again where a tile begins otherwise.

    Args:
        tables: TIFF's JPEGTables, quantisation and Huffman tables shared by all tiles.
        components: 1 for grey, 3 for colour.
        rgb_inside: Whether the three components are RGB, else YCbCr.
        believe_markers: Let a JFIF or Adobe marker of the tile overrule ``rgb_inside``.
    """

    def __init__(self, *, tables: bytes | None, components: int, rgb_inside: bool, believe_markers: bool) -> None:
        self._tables = tables
        self._components = components
        self._rgb_inside = rgb_inside
        self._believe_markers = believe_markers
        self._colorspace = "RGB" if components == 3 else "GRAY"
        self._last: _Start | None = None

    def decode(
        self,
        stream: bytes,
        *,
        sizes: Container[tuple[int, int]],
        factor: int = 1,
        buffer: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """Decode one tile.

        Args:
            stream: The tile as stored, from SOI to EOI.
            sizes: The (width, height) that the tile may have.
            factor: 2, 4 or 8 to decode at that fraction of the size: each 8 x 8 block of coefficients becomes 4 x 4,
                2 x 2 or one pixel by a smaller inverse transform, which is less work than decoding and shrinking.
            buffer: Contiguous memory for the result, if it is large enough for the largest that may come; fresh
                without.

        Returns:
            (height, width, components) uint8, RGB or grey; height and width divided by ``factor``, rounded up.

        Raises:
            ValueError: The stream is damaged, or is not of a size that it may have.
        """
        start = self._last
        if start is None or not stream.startswith(start.stored):
            start = self._read_start(stream)
        # Checked before decoding: a small stream may declare 65,535 x 65,535 pixels.
        if start.size_px not in sizes:
            raise ValueError(_other_than_declared(start.header))
        whole = start.completed + stream[len(start.stored) :]
        height_px, width_px = -(-start.header.height_px // factor), -(-start.header.width_px // factor)
        if buffer is None:
            buffer = empty_pixels((height_px, width_px, self._components))
        # The smallest scale that still has so many pixels is the one asked for.
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            whole, self._colorspace, min_height=height_px, min_width=width_px, min_factor=factor, buffer=buffer
        )
        if pixels.shape[:2] != (height_px, width_px):
            raise ValueError(f"can't be decoded at 1/{factor} of its size")
        return pixels

    def _read_start(self, stream: bytes) -> "_Start":
        segments = _segments(stream)
        header = _header(stream, segments)
        if len(header.sampling) != self._components or header.bits != 8:
            raise ValueError(_other_than_declared(header))
        marked = self._believe_markers and (header.jfif or header.adobe_transform is not None)
        stored = stream[: segments[-1][2] + 2]
        rgb_inside = None if marked or self._components == 1 else self._rgb_inside
        start = _Start(
            stored, _completed(stored, segments, self._tables, rgb_inside), header, (header.width_px, header.height_px)
        )
        # Only then do other streams with these bytes have the same segments, and no more.
        if stored.endswith(_SCAN):
            self._last = start
        return start


class _Start(NamedTuple):
    """What a stream begins with, up to the marker of its first scan."""

    stored: bytes
    completed: bytes
    """To be put in its place."""
    header: JpegHeader
    size_px: tuple[int, int]


def _other_than_declared(header: JpegHeader) -> str:
    return (
        f"the JPEG stream holds {header.width_px} x {header.height_px} px of {len(header.sampling)} components "
        f"with {header.bits} bits, other than its TIFF declares"
    )


def shows_false_colours(header: JpegHeader, declared: str) -> bool:
    """Whether a reader that believes the declared colour space (DICOM's name for it) shows wrong colours.

    Only certain cases count: an Adobe marker that says the opposite, and a JFIF marker with subsampled chroma under
    ``RGB``, which has no chroma to subsample. Either sign alone proves nothing: some writers put JFIF on true RGB.
    """
    if len(header.sampling) != 3:
        return False
    if declared == "RGB":
        return header.adobe_transform == 1 or (header.jfif and header.subsampled and header.adobe_transform is None)
    return declared.startswith("YBR_FULL") and header.adobe_transform == 0


def _segments(stream: bytes) -> list[tuple[int, int, int]]:
    """List (marker, start of body, end of body) up to the first scan."""
    if not stream.startswith(_SOI):
        raise ValueError("no JPEG stream: it starts with " + (stream[:2].hex(" ") or "nothing"))
    found = []
    at = 2
    while at + 4 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker in (_SCAN_MARKER, _END_MARKER):
            break
        end = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        if end > len(stream):
            break
        found.append((marker, at + 4, end))
        at = end
    return found


def _completed(
    start: bytes, segments: list[tuple[int, int, int]], tables: bytes | None, rgb_inside: bool | None
) -> bytes:
    """Make a tile's start that of a stream of its own: shared tables in front, colour space marked as declared."""
    parts = [_SOI]
    if rgb_inside is not None:
        # libjpeg goes by JFIF first, then Adobe; so the tile's own markers of either kind must go.
        parts.append(b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([0 if rgb_inside else 1]))
    if tables is not None and tables.startswith(_SOI):
        end = -2 if tables.endswith(b"\xff\xd9") else len(tables)
        parts.append(tables[2:end])
    at = 2
    if rgb_inside is not None:
        for marker, body, end in segments:
            if marker in (_JFIF_MARKER, _ADOBE_MARKER):
                parts.append(start[at : body - 4])
                at = end
    parts.append(start[at:])
    return b"".join(parts)
