"""TIFF slides that OpenSlide does not read, or not in full: OME-TIFF, and plain TIFF in tiles or strips."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
import tifffile
from numpy.typing import NDArray

from pathopipe.errors import SlideOpenError
from pathopipe.geometry import Region
from pathopipe.records import MppEvidence, SlideInfo
from pathopipe.slide.base import check_region, level_corner, levels_from_sizes
from pathopipe.slide.blocks import BlockReader
from pathopipe.slide.planes import Plane, UnsupportedTiffError, plane_from_page, shrink
from pathopipe.slide.resolution import (
    evidence_from_pair,
    evidence_from_tiff_resolution,
    resolve_mpp,
)

__all__ = ["TiffReader", "evidence_from_ome", "is_ome_tiff", "is_tiff"]

# What it has to say of a damaged file is raised here as an error; without a handler it would also go to stderr.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SIDE_IMAGE = re.compile(r"\b(label|macro|thumbnail|overview|barcode)\b", re.IGNORECASE)
_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT, _ORIENTATION = 282, 283, 296, 274
_RESOLUTION_UNITS = {2: "inch", 3: "centimeter"}
_UM_PER_OME_UNIT = {
    "pm": 1e-6,
    "\u00c5": 1e-4,  # angstrom
    "nm": 1e-3,
    "\u00b5m": 1.0,  # micro sign
    "\u03bcm": 1.0,  # Greek mu
    "um": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "in": 25_400.0,
}
_ENDIAN: dict[str, Literal["little", "big"]] = {"<": "little", ">": "big"}
_IMAGEJ_MICRONS = ("micron", "microns", "um", "\u00b5m", "\\u00B5m")


def is_tiff(head: bytes) -> bool:
    """Whether a file that begins so is a TIFF or BigTIFF."""
    return head[:4] in _MAGICS


def is_ome_tiff(path: Path) -> bool:
    """Whether a TIFF carries OME-XML; False where it can't be read."""
    try:
        with tifffile.TiffFile(path) as tif:
            return bool(tif.is_ome)
    except Exception:  # tifffile meets a damaged file with any of a dozen exception types
        return False


class TiffReader:
    """A TIFF slide, its blocks decoded natively; safe from several threads.

    Takes 8-bit grey and RGB (with or without alpha), tiles or strips, uncompressed or compressed with JPEG, JPEG 2000,
    deflate, LZW or Zstandard, pyramids in SubIFDs or following pages. Blocks that were never written are white.

    Args:
        path: File to open.
        slide_id: Name of the slide.
        files: Hash and size from :func:`~pathopipe.slide.fingerprint.fingerprint_files`.
        mpp: Overrides what the file states.
        mpp_source: Where ``mpp`` comes from, ``manifest`` or ``config``.

    Raises:
        SlideOpenError: It is damaged, or holds what is not read here; says which.
    """

    def __init__(
        self,
        path: Path,
        *,
        slide_id: str,
        files: tuple[str, int],
        mpp: float | None = None,
        mpp_source: str = "manifest",
    ) -> None:
        try:
            with tifffile.TiffFile(path) as tif:
                _check_not_cut(tif)
                series = _main_series(tif)
                planes = _planes_of(series, tif)
                page = series.keyframe
                evidence = evidence_from_ome(tif.ome_metadata, series) + _evidence_from_tags(page, tif)
                vendor = "ome-tiff" if tif.is_ome else "tiff"
                problems = _odd_tags(page)
        except UnsupportedTiffError as error:
            raise SlideOpenError(f"{path.name}: {error}", slide_id=slide_id) from None
        except Exception as error:  # tifffile meets a damaged file with any of a dozen exception types
            reason = " ".join(str(error).split()) or type(error).__name__
            raise SlideOpenError(
                f"{path.name}: not a readable TIFF ({reason}); copy the file again from its source", slide_id=slide_id
            ) from None
        resolution = resolve_mpp(evidence, override=mpp, override_source=mpp_source)
        fingerprint, size_bytes = files
        sizes = [(plane.width_px, plane.height_px) for plane in planes]
        levels = levels_from_sizes(sizes, [(plane.block_width_px, plane.block_height_px) for plane in planes])
        self._blocks = BlockReader(path, planes, slide_id=slide_id)
        self._info = SlideInfo(
            slide_id=slide_id,
            path=path,
            reader="tiff",
            vendor=vendor,
            dims_l0=sizes[0],
            levels=tuple(
                replace(level, scales=self._blocks.scales(number)) if level.downsample_x.is_integer() else level
                for number, level in enumerate(levels)
            ),
            size_bytes=size_bytes,
            fingerprint=fingerprint,
            mpp=resolution.mpp,
            mpp_evidence=resolution.evidence,
            problems=(*resolution.problems, *problems),
        )

    @property
    def info(self) -> SlideInfo:
        """What is known without reading pixels."""
        return self._info

    def read(self, region: Region) -> NDArray[np.uint8]:
        """Read one region, (height_px, width_px, 3) uint8 RGB over white; see :class:`Slide`."""
        level = check_region(self._info, region)
        return self._blocks.read(region, *level_corner(level, region))

    def read_into(
        self, out: NDArray[np.uint8], region: Region, *, factor: int = 1, dct: bool = False, keep: bool = True
    ) -> None:
        """Read one region, shrunk, into ``out``; see :class:`BlockSlide`."""
        x, y = level_corner(check_region(self._info, region), region)
        if dct or factor == 1 or self._blocks.can_shrink(region.level, x, y, factor):
            self._blocks.read_into(out, region, x, y, factor=factor, dct=dct, keep=keep)
        else:
            out[...] = shrink(self._blocks.read(region, x, y), factor)

    def close(self) -> None:
        """Close the file once the reads in flight have ended, and free the decoded blocks."""
        self._blocks.close()


def _check_not_cut(tif: Any) -> None:
    """Follow the list of images to its end: of a file that was cut short it leads past the end."""
    size = tif.filehandle.size
    at = tif.pages.next_page_offset
    if at is None:
        return
    tif.filehandle.seek(at)
    following = int.from_bytes(tif.filehandle.read(tif.tiff.offsetsize), _ENDIAN[tif.byteorder])
    if following >= size:
        raise UnsupportedTiffError(
            f"the file was cut short: its list of images goes on at byte {following}, but it ends at byte {size}; "
            "copy it again from its source"
        )


def _main_series(tif: Any) -> Any:
    """Pick the largest image that is not a label, macro or thumbnail."""
    candidates = [series for series in tif.series if not _SIDE_IMAGE.search(series.name)] or list(tif.series)
    if not candidates:
        raise UnsupportedTiffError("the TIFF holds no image; copy the file again from its source")
    return max(candidates, key=lambda series: series.keyframe.imagewidth * series.keyframe.imagelength)


def _planes_of(series: Any, tif: Any) -> list[Plane]:
    planes = []
    for level in series.levels:
        if len(level.pages) != 1:
            raise UnsupportedTiffError(
                f"holds {len(level.pages)} planes (axes {level.axes}, shape {tuple(level.shape)}), as a stack or a "
                "fluorescence image with a page a channel; only RGB and grey images of one plane are read, "
                "so export it as 8-bit RGB"
            )
        page = level.pages[0]
        if page is None or page.parent is not tif:
            raise UnsupportedTiffError("keeps its pixels in another file; convert it to one self-contained OME-TIFF")
        # A page that tifffile only sketched borrows another's tags.
        planes.append(plane_from_page(page.aspage(), believe_markers=True))
    finest = planes[0]
    # A level is the whole image made smaller; anything else is a picture beside it.
    return [finest] + [
        plane
        for plane in planes[1:]
        if plane.width_px < finest.width_px
        and abs(plane.width_px / finest.width_px * finest.height_px - plane.height_px) <= 2
    ]


def evidence_from_ome(xml: str | None, series: Any) -> list[MppEvidence]:
    """Read the physical pixel size of a tifffile series from OME-XML; micrometres where no unit is written."""
    # No writer of OME-XML needs a document type, and one that declares entities can blow up without bound.
    if not xml or "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        return []
    try:
        images = ElementTree.fromstring(xml).findall("{*}Image")
    except ElementTree.ParseError:
        return []
    size = (series.keyframe.imagewidth, series.keyframe.imagelength)
    described = [(image.get("Name", ""), pixels) for image in images if (pixels := image.find("{*}Pixels")) is not None]
    fitting = [(name, pixels) for name, pixels in described if _ome_size(pixels) == size]
    # Of several images of one size the name decides, and without one of that name nothing is known.
    named = [pixels for name, pixels in fitting if name == series.name]
    pixels = named[0] if named else fitting[0][1] if len(fitting) == 1 else None
    if pixels is None:
        return []
    return evidence_from_pair("ome.PhysicalSizeX", _ome_um(pixels, "X"), _ome_um(pixels, "Y"))


def _ome_size(pixels: ElementTree.Element) -> tuple[int, int] | None:
    try:
        return int(pixels.get("SizeX", "")), int(pixels.get("SizeY", ""))
    except ValueError:
        return None


def _ome_um(pixels: ElementTree.Element, axis: str) -> float | None:
    try:
        value = float(pixels.get(f"PhysicalSize{axis}", ""))
    except ValueError:
        return None
    # Units such as "pixel" or "reference frame" say nothing about the slide.
    um = _UM_PER_OME_UNIT.get(pixels.get(f"PhysicalSize{axis}Unit", "um"))
    return value * um if um is not None else None


def _evidence_from_tags(page: Any, tif: Any) -> list[MppEvidence]:
    x, y = _rational(page, _X_RESOLUTION), _rational(page, _Y_RESOLUTION)
    if tif.is_imagej and (tif.imagej_metadata or {}).get("unit") in _IMAGEJ_MICRONS:
        # ImageJ keeps pixels per micrometre in the tags and the unit in its own text.
        return evidence_from_tiff_resolution(x, y, "micron")
    # TIFF's default unit is the inch.
    return evidence_from_tiff_resolution(x, y, _RESOLUTION_UNITS.get(int(page.tags.valueof(_RESOLUTION_UNIT, 2)), ""))


def _rational(page: Any, code: int) -> float | None:
    value = page.tags.valueof(code)
    if not isinstance(value, tuple) or len(value) != 2 or value[1] == 0:
        return None
    return float(value[0]) / float(value[1])


def _odd_tags(page: Any) -> list[str]:
    orientation = int(page.tags.valueof(_ORIENTATION, 1))
    return [] if orientation == 1 else [f"TIFF orientation {orientation} is not applied: shown as stored"]
