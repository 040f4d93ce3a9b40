"""A faster road to OpenSlide's pixels: the tiles of a TIFF decoded natively, where that is proven equal."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from pathopipe.errors import TileReadError
from pathopipe.geometry import Region
from pathopipe.records import Level, SlideInfo
from pathopipe.slide.base import Slide, check_region, describe, empty_pixels
from pathopipe.slide.blocks import BlockReader
from pathopipe.slide.jpeg import parse_header, shows_false_colours
from pathopipe.slide.openslide import OpenSlideReader
from pathopipe.slide.planes import Plane, plane_from_page, shrink

__all__ = ["NativeReader", "with_native_tiles"]

_VENDORS = ("aperio", "generic-tiff")
_SAMPLES = 3
_RGB, _YCBCR = 2, 6
_NONE, _LZW, _JPEG, _ADOBE_DEFLATE, _DEFLATE = 1, 5, 7, 8, 32946
_ORIENTATION = 274


def with_native_tiles(slide: OpenSlideReader) -> Slide:
    """Give a slide native tile decoding if it can be proven to change no pixel; else return it as it is.

    Needed of the file: Aperio or generic TIFF; each level one page of contiguous 8-bit RGB or YCbCr tiles in a
    compression known to agree. Then tiles of each level are read both ways and must be equal bit for bit.
    """
    if slide.info.vendor not in _VENDORS:
        return slide
    path, info = slide.info.path, slide.info
    planes = _planes(path, info)
    if planes is None:
        return slide
    blocks = BlockReader(path, planes, slide_id=info.slide_id)
    native = NativeReader(slide, blocks)
    try:
        proven = all(_agrees(slide, blocks, number) for number in range(len(planes)) if native.is_native(number))
    except BaseException:
        blocks.close()
        raise
    if not proven:
        blocks.close()
        return slide
    return native


class NativeReader:
    """Reads what it can from native tiles, and all else through OpenSlide; made by :func:`with_native_tiles`.

    OpenSlide serves reads whose corner is not a whole pixel of the level (it blends there) or whose tile does not
    decode, and the coarser levels of Aperio slides with tiles that were never written.
    """

    def __init__(self, slide: OpenSlideReader, blocks: BlockReader) -> None:
        self._slide = slide
        self._blocks = blocks
        self._is_sparse = any(0 in plane.counts or 0 in plane.offsets for plane in blocks.planes)
        self._info = slide.info  # known to is_native before it is complete
        self._info = replace(
            slide.info,
            reader="tiff",
            levels=tuple(
                replace(level, scales=blocks.scales(number)) if self.is_native(number) else level
                for number, level in enumerate(slide.info.levels)
            ),
            problems=(*slide.info.problems, *_false_colours(blocks)),
        )

    @property
    def info(self) -> SlideInfo:
        """What is known without reading pixels."""
        return self._info

    def is_native(self, number: int) -> bool:
        """Whether a level can be read natively at all.

        Its pixels must lie on whole level-0 pixels, and where Aperio left out tiles in any level, OpenSlide no longer
        shows the coarser levels as they are stored.
        """
        is_aligned = self._info.levels[number].downsample_x.is_integer()
        return is_aligned and (number == 0 or not self._is_sparse or self._info.vendor != "aperio")

    def read(self, region: Region) -> NDArray[np.uint8]:
        """Read one region, (height_px, width_px, 3) uint8 RGB over white; see :class:`Slide`."""
        canvas = empty_pixels((region.height_px, region.width_px, 3))
        self.read_into(canvas, region)
        return canvas

    def read_into(
        self, out: NDArray[np.uint8], region: Region, *, factor: int = 1, dct: bool = False, keep: bool = True
    ) -> None:
        """Read one region, shrunk, into ``out``; see :class:`BlockSlide`.

        What is read with ``dct`` is never mixed with pixels that another filter made: a block that does not decode so
        is an error.
        """
        level = check_region(self._info, region)
        corner = _whole_corner(level, region) if self.is_native(region.level) else None
        if corner is not None and (dct or factor == 1 or self._blocks.can_shrink(region.level, *corner, factor)):
            try:
                self._blocks.read_into(out, region, *corner, factor=factor, dct=dct, keep=keep)
                return
            except TileReadError:
                if dct:
                    raise
        elif dct:
            raise ValueError(f"{self._info.slide_id}: {describe(region)} can't be decoded at a reduced size")
        out[...] = self._slide.read(region) if factor == 1 else shrink(self.read(region), factor)

    def close(self) -> None:
        """Close both readers."""
        self._blocks.close()
        self._slide.close()


def _whole_corner(level: Level, region: Region) -> tuple[int, int] | None:
    step = int(level.downsample_x)
    if region.x_l0 % step or region.y_l0 % step:
        return None
    return region.x_l0 // step, region.y_l0 // step


def _false_colours(blocks: BlockReader) -> tuple[str, ...]:
    """Say so if the file declares RGB over JPEG tiles that certainly hold YCbCr: OpenSlide shows them as declared."""
    plane = blocks.planes[0]
    index = next((n for n, count in enumerate(plane.counts) if count), None)
    if plane.compression != _JPEG or plane.photometric != _RGB or index is None:
        return ()
    try:
        header = parse_header(blocks.stored(0, index))
    except ValueError:
        return ()
    return ("false colours: the TIFF declares RGB over YCbCr JPEG tiles",) if shows_false_colours(header, "RGB") else ()


def _planes(path: Path, info: SlideInfo) -> list[Plane] | None:
    """Find the page of each level; None where one is missing, ambiguous or of a kind that is not known to agree."""
    try:
        with tifffile.TiffFile(path) as tif:
            pages = [page.aspage() for page in tif.pages]
            planes = []
            for level in info.levels:
                fitting = [
                    page for page in pages if (page.imagewidth, page.imagelength) == (level.width_px, level.height_px)
                ]
                if len(fitting) != 1 or not _is_plain(fitting[0], level):
                    return None
                planes.append(plane_from_page(fitting[0], believe_markers=False))
    except Exception:  # tifffile meets an odd file with any of a dozen exception types; OpenSlide has opened it
        return None
    return planes


def _is_plain(page: tifffile.TiffPage, level: Level) -> bool:
    return bool(
        page.is_tiled
        and (page.tilewidth, page.tilelength) == (level.block_width_px, level.block_height_px)
        and page.compression in (_NONE, _LZW, _JPEG, _ADOBE_DEFLATE, _DEFLATE)
        and (page.photometric == _RGB or (page.photometric == _YCBCR and page.compression == _JPEG))
        and page.samplesperpixel == 3
        and page.planarconfig == 1
        and page.bitspersample == 8
        and page.fillorder == 1
        and page.tags.valueof(_ORIENTATION, 1) == 1
    )


def _agrees(slide: OpenSlideReader, blocks: BlockReader, number: int) -> bool:
    """Read some written tiles of a level both ways; False where one differs or none can be compared."""
    plane, level = blocks.planes[number], slide.info.levels[number]
    step = int(level.downsample_x)
    written = [n for n in range(plane.across * plane.down) if plane.counts[n] and plane.offsets[n]]
    compared = 0
    for place in sorted(
        {round(share * (len(written) - 1)) for share in np.linspace(0, 1, _SAMPLES)} if written else ()
    ):
        row, column = divmod(written[place], plane.across)
        x, y = column * plane.block_width_px, row * plane.block_height_px
        region = Region(x * step, y * step, number, plane.block_width_px, plane.block_height_px)
        try:
            expected = slide.read(region)
        except TileReadError:
            continue
        try:
            found = blocks.read(region, x, y)
        except TileReadError:
            return False
        if not np.array_equal(found, expected):
            return False
        compared += 1
    return compared > 0
