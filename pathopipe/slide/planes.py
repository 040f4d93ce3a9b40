"""One level of a TIFF pyramid: where its compressed blocks lie, and how one becomes RGB."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pathopipe.slide.jpeg import JpegTiles

__all__ = [
    "MAX_BLOCK_PX",
    "SCALES",
    "Plane",
    "UnsupportedTiffError",
    "decode_block",
    "decode_shrunk",
    "plane_from_page",
    "shrink",
]

SCALES = (2, 4, 8)
"""By how much libjpeg can shrink while it decodes."""

MAX_BLOCK_PX = 64 * 1024 * 1024
_MAX_SIDE_PX = 1 << 24

_NONE, _LZW, _JPEG, _DEFLATE, _ADOBE_DEFLATE, _ZSTD = 1, 5, 7, 32946, 8, 50000
_JPEG_2000 = (33003, 33004, 33005, 34712)
_COMPRESSIONS = (_NONE, _LZW, _JPEG, _DEFLATE, _ADOBE_DEFLATE, _ZSTD, *_JPEG_2000)
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _YCBCR = 0, 1, 2, 6
_ASSOCIATED_ALPHA, _UNASSOCIATED_ALPHA = 1, 2


class UnsupportedTiffError(ValueError):
    """A TIFF holds what is not read here; the message goes on from the file's name."""


@dataclass(frozen=True, slots=True)
class Plane:
    """One level and its blocks: tiles, or strips as wide as the image."""

    width_px: int
    height_px: int
    block_width_px: int
    block_height_px: int
    across: int
    """Blocks in a row of blocks."""
    down: int
    """Rows of blocks."""
    samples: int
    separate: bool
    """Each sample has blocks of its own (planar configuration 2)."""
    tiled: bool
    offsets: tuple[int, ...]
    counts: tuple[int, ...]
    tables: bytes | None
    compression: int
    photometric: int
    alpha: int | None
    """What the fourth (or second) sample is, as TIFF's ExtraSamples says; None without one."""
    jpeg: JpegTiles | None
    """Decoder of JPEG segments of one or three components."""
    decode: Callable[..., Any]
    """tifffile's decoder of one segment; for all others."""

    def segments(self, row: int, column: int) -> list[int]:
        """Indices of the stored segments that make up one block."""
        index = row * self.across + column
        return [index + n * self.across * self.down for n in range(self.samples)] if self.separate else [index]

    def is_padded(self, row: int, column: int) -> bool:
        """Whether a block reaches beyond the image."""
        return (column + 1) * self.block_width_px > self.width_px or (row + 1) * self.block_height_px > self.height_px

    def sizes(self, row: int, column: int) -> tuple[tuple[int, int], ...]:
        """List the (width, height) that a stored block may have."""
        whole_px = (self.block_width_px, self.block_height_px)
        if not self.is_padded(row, column):
            return (whole_px,)
        # The last strip ends with the image; some writers also cut compressed tiles there.
        cut_width_px = min(self.block_width_px, self.width_px - column * self.block_width_px)
        cut_height_px = min(self.block_height_px, self.height_px - row * self.block_height_px)
        return (whole_px, (cut_width_px, cut_height_px))

    def is_missing(self, row: int, column: int) -> bool:
        """Whether nothing was written for a block: scanners leave out empty glass."""
        index = row * self.across + column
        if not self.separate:
            return self.counts[index] == 0 or self.offsets[index] == 0
        return all(self.counts[n] == 0 or self.offsets[n] == 0 for n in self.segments(row, column))


def plane_from_page(page: Any, *, believe_markers: bool) -> Plane:
    """Check that a tifffile page is of a kind that is read here, and note where its blocks lie.

    Args:
        page: The page, its file still open.
        believe_markers: Let a JPEG tile's own JFIF or Adobe marker overrule a photometric interpretation of RGB.
            Bio-Formats writes YCbCr with a JFIF marker under photometric RGB; OpenSlide goes by the photometric
            interpretation alone.

    Raises:
        UnsupportedTiffError: It is too large, of another pixel type or compression, or lacks blocks.
    """
    width_px, height_px = int(page.imagewidth), int(page.imagelength)
    block_width_px, block_height_px = (
        (int(page.tilewidth), int(page.tilelength))
        if page.is_tiled
        else (width_px, min(int(page.rowsperstrip), height_px))
    )
    if not (0 < width_px <= _MAX_SIDE_PX and 0 < height_px <= _MAX_SIDE_PX):
        raise UnsupportedTiffError(f"declares an impossible size of {width_px} x {height_px} px; copy it again")
    # Checked before anything is allocated: a few bytes may declare a tile of any size.
    if min(block_width_px, block_height_px) < 1:
        raise UnsupportedTiffError("declares blocks without a size; copy the file again from its source")
    if block_width_px * block_height_px > MAX_BLOCK_PX:
        raise UnsupportedTiffError(
            f"declares blocks of {block_width_px} x {block_height_px} px, more than 64 megapixels each; "
            "convert it to a tiled TIFF, for example with vips tiffsave --tile --pyramid"
        )
    samples = int(page.samplesperpixel)
    if page.bitspersample != 8 or page.sampleformat != 1:
        raise UnsupportedTiffError(
            f"has {page.bitspersample}-bit samples of format {int(page.sampleformat)}; "
            "only 8-bit unsigned RGB and grey are read, so export it as 8-bit RGB"
        )
    if page.photometric not in _photometrics(samples) or page.imagedepth != 1:
        raise UnsupportedTiffError(
            f"has {samples} samples a pixel of photometric type {int(page.photometric)}; "
            "only grey and RGB are read, so export it as 8-bit RGB"
        )
    if page.photometric == _YCBCR and page.compression != _JPEG:
        raise UnsupportedTiffError("stores YCbCr without JPEG, which is not read; export it as 8-bit RGB")
    if page.compression not in _COMPRESSIONS:
        raise UnsupportedTiffError(
            f"is compressed with TIFF scheme {int(page.compression)}, which is not read; "
            "convert it to JPEG, JPEG 2000, deflate, LZW or Zstandard"
        )
    across, down = -(-width_px // block_width_px), -(-height_px // block_height_px)
    separate = page.planarconfig == 2 and samples > 1
    wanted = across * down * (samples if separate else 1)
    offsets, counts = tuple(page.dataoffsets), tuple(page.databytecounts)
    if min(len(offsets), len(counts)) < wanted:
        raise UnsupportedTiffError(
            f"lists {min(len(offsets), len(counts))} of its {wanted} blocks; copy the file again from its source"
        )
    return Plane(
        width_px=width_px,
        height_px=height_px,
        block_width_px=block_width_px,
        block_height_px=block_height_px,
        across=across,
        down=down,
        samples=samples,
        separate=separate,
        tiled=bool(page.is_tiled),
        offsets=offsets,
        counts=counts,
        tables=page.jpegtables,
        compression=int(page.compression),
        photometric=int(page.photometric),
        alpha=int(page.extrasamples[0]) if page.extrasamples else None,
        jpeg=_jpeg_tiles(page, 1 if separate else samples, believe_markers),
        # Built here, in one thread: tifffile makes it at first use, and that is not safe in several.
        decode=page.decode,
    )


def _jpeg_tiles(page: Any, components: int, believe_markers: bool) -> JpegTiles | None:
    if page.compression != _JPEG or components not in (1, 3):
        return None
    rgb_inside = page.photometric == _RGB
    return JpegTiles(
        tables=page.jpegtables,
        components=components,
        rgb_inside=rgb_inside,
        believe_markers=believe_markers and rgb_inside,
    )


def decode_block(
    plane: Plane, row: int, column: int, stored: list[bytes], buffer: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Decode one block to RGB over white.

    Args:
        plane: Its level.
        row: Row of blocks.
        column: Block in that row.
        stored: The bytes of each of its segments.
        buffer: Contiguous memory of a block's size, (block height, block width, 3), which may serve for the result.

    Returns:
        (height, width, 3) uint8; a block at the right or bottom edge may be cut to the image or reach beyond it.

    Raises:
        Exception: The bytes are damaged; each codec has exceptions of its own.
    """
    indices = plane.segments(row, column)
    if not plane.separate:
        return _to_rgb(_decode_segment(plane, row, column, indices[0], stored[0], buffer=buffer), plane)
    parts = [_decode_segment(plane, row, column, index, data) for index, data in zip(indices, stored, strict=True)]
    return _to_rgb(np.concatenate(parts, axis=2), plane)


def decode_shrunk(
    plane: Plane,
    row: int,
    column: int,
    stored: list[bytes],
    factor: int,
    *,
    dct: bool,
    buffer: NDArray[np.uint8] | None = None,
    place: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Decode one block at a fraction of its size; what lies beyond the image counts as white.

    Args:
        plane: Its level; the sides of its blocks are multiples of ``factor``.
        row: Row of blocks.
        column: Block in that row.
        stored: The bytes of each of its segments.
        factor: By how much it shrinks.
        dct: Let libjpeg shrink while it decodes; else each pixel is the mean of those it covers. Blocks that reach
            beyond the image are always averaged: what a writer puts there would bleed through the transform.
        buffer: As of :func:`decode_block`, of the size of a whole block.
        place: Where the result is wanted; a part of a larger image may do.

    Returns:
        (block height / factor, block width / factor, 3) uint8; ``place`` itself where the result was put there.

    Raises:
        Exception: As :func:`decode_block`.
    """
    is_padded = plane.is_padded(row, column)
    if dct and not is_padded:
        index = plane.segments(row, column)[0]
        return _to_rgb(_decode_segment(plane, row, column, index, stored[0], factor, buffer), plane)
    block = decode_block(plane, row, column, stored, buffer)
    if is_padded:
        seen = block[: plane.height_px - row * plane.block_height_px, : plane.width_px - column * plane.block_width_px]
        block = np.full((plane.block_height_px, plane.block_width_px, 3), 255, np.uint8)
        block[: seen.shape[0], : seen.shape[1]] = seen
    return shrink(block, factor, place)


def shrink(pixels: NDArray[np.uint8], factor: int, place: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Average squares of ``factor`` x ``factor`` pixels; the sides of ``pixels`` are multiples of it.

    Returns:
        ``place`` with the result, where its rows of pixels are contiguous; else fresh memory.
    """
    size_px = (pixels.shape[1] // factor, pixels.shape[0] // factor)
    dst = place if place is not None and place.strides[1:] == (3, 1) and place.strides[0] > 0 else None
    return np.asarray(cv2.resize(pixels, size_px, dst=dst, interpolation=cv2.INTER_AREA), np.uint8)


def _decode_segment(
    plane: Plane,
    row: int,
    column: int,
    index: int,
    data: bytes,
    factor: int = 1,
    buffer: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    sizes = plane.sizes(row, column)
    if plane.jpeg is not None:
        return plane.jpeg.decode(data, sizes=sizes, factor=factor, buffer=buffer)
    if factor != 1:
        raise ValueError("only JPEG tiles of one or three components can be decoded at a reduced size")
    # These decoders fill up what is missing without a word, but a stream that was cut lacks its end marker.
    if plane.compression in (_JPEG, *_JPEG_2000) and not data.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise ValueError("the stream has no end")
    if plane.compression == _JPEG:
        height_px, width_px, _, _ = simplejpeg.decode_jpeg_header(data)
        _check_size((width_px, height_px), sizes)
    elif plane.compression in _JPEG_2000:
        _check_size(_jpeg_2000_size(data), sizes)
    decoded, _, shape = plane.decode(data, index, jpegtables=plane.tables)
    block: NDArray[np.uint8] = decoded.reshape(decoded.shape if decoded.ndim == 4 else shape)[0]
    _check_size((block.shape[1], block.shape[0]), sizes)
    samples = 1 if plane.separate else plane.samples
    if block.shape[2:] != (samples,) or block.dtype != np.uint8:
        raise ValueError(f"decoded to {block.dtype} {block.shape}")
    return block


def _check_size(found: tuple[int, int], sizes: tuple[tuple[int, int], ...]) -> None:
    if found not in sizes:
        wanted = " or ".join(f"{width} x {height}" for width, height in sizes)
        raise ValueError(f"it holds {found[0]} x {found[1]} px in place of {wanted}")


def _jpeg_2000_size(data: bytes) -> tuple[int, int]:
    at = data.find(b"\xff\x4f\xff\x51")
    if at < 0 or len(data) < at + 24:
        raise ValueError("no JPEG 2000 stream")
    right, bottom, left, top = (int.from_bytes(data[at + n : at + n + 4], "big") for n in (8, 12, 16, 20))
    return right - left, bottom - top


def _photometrics(samples: int) -> tuple[int, ...]:
    if samples in (1, 2):
        return (_WHITE_IS_ZERO, _BLACK_IS_ZERO)
    return (_RGB, _YCBCR) if samples == 3 else (_RGB,) if samples == 4 else ()


def _to_rgb(block: NDArray[np.uint8], plane: Plane) -> NDArray[np.uint8]:
    """Turn (h, w, 1 to 4) samples into (h, w, 3) RGB over white."""
    if plane.samples == 3:
        return np.ascontiguousarray(block)
    colours = 1 if plane.samples < 3 else 3
    rgb = block[..., :colours]
    if plane.photometric == _WHITE_IS_ZERO:
        rgb = 255 - rgb
    if plane.samples > colours and plane.alpha in (_ASSOCIATED_ALPHA, _UNASSOCIATED_ALPHA):
        alpha = block[..., colours : colours + 1].astype(np.uint16)
        if plane.alpha == _ASSOCIATED_ALPHA:
            rgb = np.minimum(rgb + (255 - alpha), 255).astype(np.uint8)
        else:
            rgb = ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    if colours == 1:
        rgb = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_GRAY2RGB)
    return np.ascontiguousarray(rgb)
