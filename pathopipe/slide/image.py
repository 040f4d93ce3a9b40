"""Plain PNG and JPEG images, held in memory, and NumPy files, mapped, as slides of one level."""

from pathlib import Path

import numpy as np
from PIL import Image

from pathopipe.errors import SlideOpenError
from pathopipe.slide.array import ArraySlide

__all__ = ["is_npy", "open_image", "open_npy", "plain_image_kind"]

_KINDS = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG"}
_MAX_PX = 80_000_000


def plain_image_kind(head: bytes) -> str | None:
    """Name the kind of image that begins so, None for any other file."""
    return next((kind for magic, kind in _KINDS.items() if head.startswith(magic)), None)


def open_image(path: Path, *, slide_id: str, mpp: float | None, mpp_source: str) -> ArraySlide:
    """Open an image whose resolution is given; transparent parts become white.

    Raises:
        SlideOpenError: No resolution is given, or the image is damaged, or too large to hold in memory.
    """
    if mpp is None:
        raise SlideOpenError(
            f"{path.name}: a plain image states no micrometres per pixel; "
            "to use it as a slide, state them in the manifest column mpp or with --set slide.mpp=",
            slide_id=slide_id,
        )
    try:
        with Image.open(path) as image:
            width_px, height_px = image.size
            if width_px * height_px <= _MAX_PX:
                rgba = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SlideOpenError(
            f"{path.name}: a damaged image ({error}); copy it again from its source", slide_id=slide_id
        ) from None
    if width_px * height_px > _MAX_PX:
        raise SlideOpenError(
            f"{path.name}: a plain image of {width_px} x {height_px} px is too large to hold in memory; "
            "convert it to a tiled TIFF, for example with vips tiffsave --tile --pyramid",
            slide_id=slide_id,
        )
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    pixels = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
    return ArraySlide(pixels, mpp=mpp, slide_id=slide_id, path=path, mpp_source=mpp_source)


def is_npy(head: bytes) -> bool:
    """Whether a file that begins so is a NumPy array."""
    return head.startswith(b"\x93NUMPY")


def open_npy(path: Path, *, slide_id: str, mpp: float | None, mpp_source: str) -> ArraySlide:
    """Open a ``.npy`` file of (height, width, 3) uint8 RGB without reading it into memory.

    Raises:
        SlideOpenError: The array is of another shape or type, or the file is cut short.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        return ArraySlide(array, mpp=mpp, slide_id=slide_id, path=path, mpp_source=mpp_source)
    except (OSError, ValueError) as error:
        raise SlideOpenError(
            f"{path.name}: not a NumPy file of (height, width, 3) uint8 ({' '.join(str(error).split())})",
            slide_id=slide_id,
        ) from None
