"""Slides that OpenSlide reads. The only home of OpenSlide."""

import threading
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import openslide
from numpy.typing import NDArray

from pathopipe.errors import SlideOpenError, TileReadError
from pathopipe.geometry import BoxL0, Region
from pathopipe.records import Level, SlideInfo
from pathopipe.slide.base import check_region, describe
from pathopipe.slide.resolution import evidence_from_openslide, resolve_mpp

__all__ = ["OpenSlideReader", "bounds_from_properties", "detect_vendor", "over_white"]

_CACHE_BYTES = 64 * 1024 * 1024
_SIDES = ("width", "height")
_PROPERTIES = (
    "openslide.vendor",
    "openslide.mpp-x",
    "openslide.mpp-y",
    "openslide.objective-power",
    "openslide.bounds-x",
    "openslide.bounds-y",
    "openslide.bounds-width",
    "openslide.bounds-height",
    "tiff.XResolution",
    "tiff.YResolution",
    "tiff.ResolutionUnit",
)
_MAX_BLOCK_PX = 64 * 1024 * 1024


def detect_vendor(path: Path) -> str | None:
    """Name the format by its content as OpenSlide knows it, None where it knows none."""
    try:
        return openslide.OpenSlide.detect_format(path)
    except openslide.OpenSlideError:
        return None


class OpenSlideReader:
    """A slide read through OpenSlide, safe from several threads.

    A handle of OpenSlide fails for ever after one failed read. So every read in flight has a handle to itself, lent
    from a pool that grows to the number of threads reading at once; one that failed is closed and never lent again.

    Args:
        path: File to open; for DICOM any file of the series.
        slide_id: Name of the slide.
        files: What :func:`~pathopipe.slide.fingerprint.fingerprint_files` found: the hash and the size in bytes.
        mpp: Overrides what the file states.
        mpp_source: Where ``mpp`` comes from, ``manifest`` or ``config``.
        problems: What is already known to be odd.

    Raises:
        SlideOpenError: OpenSlide can't open it.
    """

    def __init__(
        self,
        path: Path,
        *,
        slide_id: str,
        files: tuple[str, int],
        mpp: float | None = None,
        mpp_source: str = "manifest",
        problems: tuple[str, ...] = (),
    ) -> None:
        self._path = path
        self._slide_id = slide_id
        self._lock = threading.Lock()
        self._idle: list[openslide.OpenSlide] = []
        self._closed = False
        # One bounded cache for all handles, else every thread would bring its own.
        self._cache = openslide.OpenSlideCache(_CACHE_BYTES)
        handle = self._open_handle()
        try:
            properties = _known_properties(handle)
            sizes, downsamples = handle.level_dimensions, handle.level_downsamples
        except openslide.OpenSlideError as error:
            handle.close()
            raise SlideOpenError(
                f"{path.name}: OpenSlide opened it but can't describe it ({_one_line(error)}); copy the file again",
                slide_id=slide_id,
            ) from None
        self._idle.append(handle)
        resolution = resolve_mpp(evidence_from_openslide(properties), override=mpp, override_source=mpp_source)
        levels = tuple(
            Level(width_px, height_px, downsample, downsample, *_block_size(properties, number))
            for number, ((width_px, height_px), downsample) in enumerate(zip(sizes, downsamples, strict=True))
        )
        # A few bytes may declare a tile of any size, and OpenSlide would allocate it.
        largest = max(levels, key=_block_px)
        if _block_px(largest) > _MAX_BLOCK_PX:
            self.close()
            raise SlideOpenError(
                f"{path.name}: declares blocks of {largest.block_width_px} x {largest.block_height_px} px, more than "
                "64 megapixels each; convert it to a tiled TIFF, for example with vips tiffsave --tile --pyramid",
                slide_id=slide_id,
            )
        fingerprint, size_bytes = files
        self._info = SlideInfo(
            slide_id=slide_id,
            path=path,
            reader="openslide",
            vendor=properties.get("openslide.vendor", ""),
            dims_l0=sizes[0],
            levels=levels,
            size_bytes=size_bytes,
            fingerprint=fingerprint,
            mpp=resolution.mpp,
            mpp_evidence=resolution.evidence,
            bounds_l0=bounds_from_properties(properties),
            problems=(*resolution.problems, *problems),
        )

    @property
    def info(self) -> SlideInfo:
        """What is known without reading pixels."""
        return self._info

    def read(self, region: Region) -> NDArray[np.uint8]:
        """Read one region, (height_px, width_px, 3) uint8 RGB over white; see :class:`Slide`."""
        check_region(self._info, region)
        if region.width_px == 0 or region.height_px == 0:
            return np.empty((region.height_px, region.width_px, 3), np.uint8)
        try:
            handle = self._borrow()
        except SlideOpenError as error:
            raise TileReadError(str(error), slide_id=self._slide_id) from None
        try:
            image = handle.read_region((region.x_l0, region.y_l0), region.level, (region.width_px, region.height_px))
        except openslide.OpenSlideError as error:
            handle.close()
            raise TileReadError(
                f"{self._path.name}: {describe(region)} can't be read ({_one_line(error)}); "
                "the file is damaged there: copy it again from its source",
                slide_id=self._slide_id,
            ) from None
        except BaseException:
            handle.close()
            raise
        self._give_back(handle)
        return over_white(np.asarray(image))

    def close(self) -> None:
        """Close every handle; those in use close when their read ends."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for handle in idle:
            handle.close()

    def _borrow(self) -> openslide.OpenSlide:
        with self._lock:
            if self._closed:
                raise ValueError(f"{self._slide_id}: the slide was closed")
            # Last in, first out: a lone reader keeps meeting the handle whose tiles are cached.
            if self._idle:
                return self._idle.pop()
        return self._open_handle()

    def _give_back(self, handle: openslide.OpenSlide) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(handle)
                return
        handle.close()

    def _open_handle(self) -> openslide.OpenSlide:
        try:
            handle = openslide.OpenSlide(self._path)
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideOpenError(
                f"{self._path.name}: OpenSlide can't open it ({_one_line(error)}); "
                "check that the file is whole and that its companion files lie beside it",
                slide_id=self._slide_id,
            ) from None
        handle.set_cache(self._cache)
        return handle


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def over_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay straight (not premultiplied) RGBA over white, rounding to nearest; opaque pixels pass unchanged.

    Args:
        rgba: (height, width, 4) uint8.

    Returns:
        (height, width, 3) uint8.
    """
    rgb: NDArray[np.uint8] = cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB)
    alpha = rgba[..., 3]
    if alpha.min() == 255:
        return rgb
    # Unscanned glass is transparent; with alpha dropped it turns black, and black reads as tissue.
    rows, columns = np.nonzero(alpha < 255)
    a = alpha[rows, columns, None].astype(np.uint16)
    rgb[rows, columns] = (rgb[rows, columns] * a + 255 * (255 - a) + 127) // 255
    return rgb


def bounds_from_properties(properties: Mapping[str, str]) -> BoxL0 | None:
    """Read the scanned part of the slide from ``openslide.bounds-*``, None where it is not fully stated."""
    try:
        x, y, width, height = (int(properties[f"openslide.bounds-{name}"]) for name in ("x", "y", "width", "height"))
    except (KeyError, ValueError):
        return None
    return BoxL0(x, y, width, height) if width > 0 and height > 0 else None


def _known_properties(handle: openslide.OpenSlide) -> dict[str, str]:
    """Read the properties that are used here, and no other: vendors' own fields name people, and some can't be read.

    A name that is not UTF-8 is listed by OpenSlide but then not found, so copying them all fails on such slides.
    """
    names = [*_PROPERTIES, *(f"openslide.level[{n}].tile-{side}" for n in range(handle.level_count) for side in _SIDES)]
    found = ((name, handle.properties.get(name)) for name in names)
    return {name: value for name, value in found if value is not None}


def _block_px(level: Level) -> int:
    return (level.block_width_px or 0) * (level.block_height_px or 0)


def _block_size(properties: Mapping[str, str], level: int) -> tuple[int | None, int | None]:
    try:
        width_px, height_px = (int(properties[f"openslide.level[{level}].tile-{side}"]) for side in _SIDES)
    except (KeyError, ValueError):
        return None, None
    return width_px, height_px
