"""The picture of a slide after a run: the overview with its tissue outline and the tiles that were kept."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import PathopipeError
from pathopipe.files import durable_file
from pathopipe.records import TileGrid, Tissue

__all__ = ["LONGEST_SIDE_PX", "draw_thumbnail", "write_png"]

LONGEST_SIDE_PX = 1600
_OUTLINE_RGB = (0, 150, 70)
_TILE_RGB = (40, 70, 200)
# Below this a tile's frame would be a smear; the tiles are tinted instead.
_LEAST_FRAMED_PX = 5
_FRACTION_BITS = 4


def draw_thumbnail(
    overview: NDArray[np.uint8], dims_l0: tuple[int, int], tissue: Tissue, grid: TileGrid | None
) -> NDArray[np.uint8]:
    """Draw outline and tiles over an overview.

    Args:
        overview: (height, width, 3) RGB of the whole slide.
        dims_l0: Width and height of level 0, to which the overview is scaled.
        tissue: Outlined in green.
        grid: Its tiles are framed in blue, or tinted where they are too small for a frame; None draws none.

    Returns:
        (height, width, 3) RGB, at most 1600 px on the longer side.
    """
    shrink = min(1.0, LONGEST_SIDE_PX / max(overview.shape[:2]))
    size = (max(1, round(overview.shape[1] * shrink)), max(1, round(overview.shape[0] * shrink)))
    # Physical shape: an overview of anisotropic pixels is drawn as it was scanned, like in any viewer.
    canvas = cv2.resize(overview, size, interpolation=cv2.INTER_AREA) if shrink < 1 else overview.copy()
    scale = np.array([size[0] / dims_l0[0], size[1] / dims_l0[1]])
    if grid is not None and len(grid):
        _draw_tiles(canvas, grid, scale)
    for polygon in tissue.polygons:
        rings = [polygon.exterior, *polygon.interiors]
        points = [np.rint(np.asarray(ring.coords) * scale * 2**_FRACTION_BITS).astype(np.int32) for ring in rings]
        cv2.polylines(canvas, points, True, _OUTLINE_RGB, 2, cv2.LINE_AA, _FRACTION_BITS)
    return np.asarray(canvas, np.uint8)


def _draw_tiles(canvas: NDArray[np.uint8], grid: TileGrid, scale: NDArray[np.float64]) -> None:
    corners = np.rint(grid.xy_l0 * scale).astype(int)
    # A tile is drawn up to the start of the next: grids without overlap then share their lines.
    ends = np.rint((grid.xy_l0 + np.array(grid.side_l0)) * scale).astype(int)
    if np.min(np.array(grid.side_l0) * scale) < _LEAST_FRAMED_PX:
        tinted = np.zeros(canvas.shape[:2], np.uint8)
        for (x, y), (x_end, y_end) in zip(corners.tolist(), ends.tolist(), strict=True):
            tinted[y : max(y_end, y + 1), x : max(x_end, x + 1)] = 1
        inside = tinted == 1
        canvas[inside] = (canvas[inside] * 0.75 + np.array(_TILE_RGB) * 0.25).astype(np.uint8)
        return
    for corner, end in zip(corners.tolist(), ends.tolist(), strict=True):
        cv2.rectangle(canvas, corner, end, _TILE_RGB, 1)


def write_png(path: Path, rgb: NDArray[np.uint8]) -> None:
    """Write (height, width, 3) RGB as PNG, whole or not at all."""
    done, data = cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    if not done:
        raise PathopipeError(f"{path}: the picture could not be encoded as PNG")
    with durable_file(path) as file:
        file.write(data.tobytes())
