"""Looks into pictures: their tags, pages that are labels, and barcodes. Written words in a picture are not read."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import ExifTags, Image

from pathopipe.privacy.barcodes import read_bars
from pathopipe.privacy.contents import Fact, Picture, Piece, Text, readable_runs

__all__ = ["look_into"]

# Tifffile tells of broken files on stderr; here they become findings.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

_LONGEST_SIDE_PX = 2048
_MAX_PIXELS = 128 << 20
# Tags of which every value tells of a person, a day, a place or one device.
_PRIVATE_TAGS = {
    "DateTime", "DateTimeOriginal", "DateTimeDigitized", "Artist", "HostComputer", "CameraOwnerName",
    "BodySerialNumber", "LensSerialNumber", "CameraSerialNumber", "GPSInfo", "ImageUniqueID", "OwnerName",
    "XPAuthor", "DocumentName", "PageName", "PreviewDateTime", "RelatedSoundFile", "ImageHistory",
}  # fmt: skip
_ASCII, _BYTES = 2, (1, 7)
# Colour profiles bear the day on which they were made, tables of JPEG hold nothing to read.
_BINARY_TAGS = {"InterColorProfile", "JPEGTables"}
_LABELS = ("label", "macro")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def look_into(picture: Picture) -> Iterator[Piece]:
    """The tags of a picture and the barcodes in it.

    Raises:
        OSError, ValueError: It can't be decoded.
    """
    data = picture.data
    if isinstance(data, np.ndarray):
        yield from _barcodes(picture.place, data)
        return
    with data.open("rb") if isinstance(data, Path) else io.BytesIO(data) as file:
        head = file.read(4)
        file.seek(0)
        if head in _TIFF:
            yield from _tiff(file, picture.place)
        else:
            yield from _encoded(file, picture.place)


def _encoded(file: Any, place: str) -> Iterator[Piece]:
    with warnings.catch_warnings():
        # We bound the size ourselves, and a text that is cut off must not stop the search.
        warnings.simplefilter("ignore")
        with Image.open(file) as image:
            yield from _exif(image.getexif(), place)
            texts = [v for v in image.info.values() if isinstance(v, str | bytes)]
            for number, text in enumerate(texts):
                # The colour profile is binary, and its date is that of the profile.
                if text is not image.info.get("icc_profile") and text is not image.info.get("exif"):
                    raw = text.encode("utf-8", "replace") if isinstance(text, str) else text
                    yield Text(f"{place} text {number + 1}".strip(), raw)
            if image.width * image.height > _MAX_PIXELS:
                yield Fact(place, "unread", "a picture too large to look for barcodes in")
                return
            image.draft("RGB", (_LONGEST_SIDE_PX, _LONGEST_SIDE_PX))
            yield from _barcodes(place, np.asarray(image.convert("L")))


def _exif(exif: Image.Exif, place: str) -> Iterator[Piece]:
    tags = dict(exif)
    with contextlib.suppress(KeyError, ValueError, TypeError):
        tags |= exif.get_ifd(ExifTags.IFD.Exif)
    for number, value in tags.items():
        name = ExifTags.TAGS.get(number, str(number))
        yield from _tag(f"{place} EXIF".strip(), name, value)


def _tag(place: str, name: str, value: Any) -> Iterator[Piece]:
    if name in _PRIVATE_TAGS:
        if value not in (None, "", b"", 0):
            yield Fact(place, "picture tag", name)
    elif isinstance(value, str | bytes):
        yield Text(f"{place} {name}", value.encode("utf-8", "replace") if isinstance(value, str) else value)


def _tiff(file: Any, place: str) -> Iterator[Piece]:
    with tifffile.TiffFile(file) as tif:
        best = None
        for number in range(len(tif.pages)):
            where = f"{place} page {number}".strip()
            page: Any = tif.pages[number].aspage()
            for tag in page.tags.values():
                if tag.dtype == _ASCII or tag.name in _PRIVATE_TAGS:
                    yield from _tag(where, tag.name, tag.value)
                elif tag.dtype in _BYTES and tag.name not in _BINARY_TAGS and isinstance(tag.value, bytes):
                    yield readable_runs(f"{where} {tag.name}", tag.value)
            # Aperio names its pages in the second line of the description, and in the page's kind: 1 label, 9 macro.
            lines = page.description.lower().splitlines()
            if (len(lines) > 1 and lines[1].startswith(_LABELS)) or page.description.lower().strip() in _LABELS:
                yield Fact(where, "label image", "a page of the slide")
            pixels = page.imagewidth * page.imagelength
            if pixels <= _MAX_PIXELS // 8 and (best is None or pixels > best[0]):
                best = (pixels, page, where)
        if not len(tif.pages):
            yield Fact(place, "unread", "a TIFF without pages")
        if best is not None and best[1].dtype == np.uint8:
            shown = np.asarray(best[1].asarray())
            if shown.ndim == 2 or (shown.ndim == 3 and shown.shape[2] in (3, 4)):
                yield from _barcodes(best[2], shown)


def _barcodes(place: str, pixels: NDArray[np.uint8]) -> Iterator[Fact]:
    grey = pixels if pixels.ndim == 2 else cv2.cvtColor(np.ascontiguousarray(pixels[..., :3]), cv2.COLOR_RGB2GRAY)
    shrink = max(grey.shape) / _LONGEST_SIDE_PX
    if shrink > 1:
        size = (max(1, round(grey.shape[1] / shrink)), max(1, round(grey.shape[0] / shrink)))
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    found = {*read_bars(grey), *(("QR code", text) for text in _square_codes(grey))}
    found |= {("EAN or UPC", text) for text in _ean(grey)}
    for name, text in sorted(found):
        yield Fact(place, "barcode", f"{name}, {len(text)} characters")


def _square_codes(grey: NDArray[np.uint8]) -> list[str]:
    with contextlib.suppress(cv2.error):
        _, texts, _, _ = cv2.QRCodeDetector().detectAndDecodeMulti(grey)
        return [text for text in texts if text]
    return []


def _ean(grey: NDArray[np.uint8]) -> list[str]:
    with contextlib.suppress(cv2.error):
        texts = cv2.barcode.BarcodeDetector().detectAndDecodeMulti(grey)[1]
        return [text for text in texts if text]
    return []
