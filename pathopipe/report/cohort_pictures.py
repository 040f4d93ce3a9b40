"""Pictures of a cohort page: small ones for the cards, and what stain the thumbnails show."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.records import TileGrid
from pathopipe.stain import optical_density, unmix

__all__ = ["read_picture", "small_picture", "stain_of"]

# As report/thumbnail.py draws tiles: frames in this colour, or a quarter of it over tiles too small for a frame.
_TILE_RGB: Final = np.array([40, 70, 200])
_TINT: Final = 0.25
_OUTLINE_BGR: Final = (60, 130, 0)
_INSIDE: Final = 0.9
"""Least share of tissue of a tile whose colour counts: others may lie under the outline."""
_FRACTION_BITS: Final = 4
_QUALITIES: Final = (70, 50, 30, 15)
_LEAST_SIDE_PX: Final = 64


def read_picture(path: Path) -> NDArray[np.uint8] | None:
    """(height, width, 3) BGR of a thumbnail; None where there is none, or it is no picture."""
    try:
        data = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError:
        return None
    picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    return None if picture is None else np.asarray(picture, np.uint8)


def small_picture(
    picture: NDArray[np.uint8],
    rings_l0: Iterable[NDArray[np.float64]],
    dims_l0: tuple[int, int],
    *,
    side_px: int,
    most_bytes: int,
) -> tuple[bytes, int, int]:
    """A thumbnail as a small WebP file, its tissue outlined anew, for thin lines vanish when a picture shrinks.

    Args:
        picture: (height, width, 3) BGR of the whole slide.
        rings_l0: Outlines of tissue, (n, 2) x, y each, in level-0 pixels.
        dims_l0: Width and height of level 0.
        side_px: Longest side of the result.
        most_bytes: Quality falls, then the size, until the file is no longer than this.

    Returns:
        The file, its width and height in pixels.
    """
    shrink = min(1.0, side_px / max(picture.shape[:2]))
    size = (max(1, round(picture.shape[1] * shrink)), max(1, round(picture.shape[0] * shrink)))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA) if shrink < 1 else picture.copy()
    scale = np.array([size[0] / dims_l0[0], size[1] / dims_l0[1]]) * 2**_FRACTION_BITS
    lines = [np.rint(ring * scale).astype(np.int32) for ring in rings_l0]
    if lines:
        cv2.polylines(small, lines, True, _OUTLINE_BGR, 1, cv2.LINE_AA, _FRACTION_BITS)
    while True:
        for quality in _QUALITIES:
            data = cv2.imencode(".webp", small, [cv2.IMWRITE_WEBP_QUALITY, quality])[1].tobytes()
            if len(data) <= most_bytes:
                break
        if len(data) <= most_bytes or max(small.shape[:2]) <= _LEAST_SIDE_PX:
            return data, small.shape[1], small.shape[0]
        small = cv2.resize(small, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA)


def stain_of(picture: NDArray[np.uint8], grid: TileGrid, dims_l0: tuple[int, int]) -> tuple[float, float] | None:
    """Haematoxylin and eosin of a slide's tissue, as its thumbnail shows it: medians over tiles.

    Looked up in the middle of tiles that are nearly all tissue, where the thumbnail bears neither outline nor frame;
    the tint that it lays over very small tiles is taken off.

    Args:
        picture: (height, width, 3) BGR of the whole slide, as ``report/thumbnail.py`` draws it.
        grid: Tiles of the slide.
        dims_l0: Width and height of level 0.

    Returns:
        Optical densities along the vectors of Ruifrok & Johnston 2001; None where no tile shows its colour.
    """
    height, width = picture.shape[:2]
    inner = grid.xy_l0[grid.tissue_fraction >= _INSIDE]
    middle = (inner + np.array(grid.side_l0) / 2) * np.array([width / dims_l0[0], height / dims_l0[1]])
    columns, rows = np.floor(middle).astype(int).T
    there = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    rgb = picture[rows[there], columns[there]][:, ::-1].astype(np.float64)
    framed = bool(cv2.inRange(picture, _TILE_RGB[::-1], _TILE_RGB[::-1]).any())
    # Frames of another grid may run through the middle of these tiles.
    rgb = rgb[(rgb != _TILE_RGB).any(axis=1)] if framed else (rgb - _TINT * _TILE_RGB) / (1 - _TINT)
    if not len(rgb):
        return None
    density = optical_density(np.clip(np.rint(rgb), 0, 255).astype(np.uint8))
    haematoxylin, eosin, _ = np.median(unmix(density), axis=0)
    return float(haematoxylin), float(eosin)
