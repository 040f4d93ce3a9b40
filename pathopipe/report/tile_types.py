"""Tissue types by tile: which class covers most of each tile of a grid, and what share of it every class covers."""

import csv
import io
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pathopipe.files import durable_file
from pathopipe.report.summary import escape_cell
from pathopipe.segmentation.trace import rasterise_outlines
from pathopipe.store import ObjectArray, SlideStore

__all__ = ["TISSUE_TYPES", "tile_shares", "write_tile_types"]

TISSUE_TYPES: Final = "tissue_types"
"""The layer that tiles are set against."""

_CELL_UM = 4.0
"""Areas are counted in cells of this side."""
_MOST_CELLS = 1 << 24


def write_tile_types(path: Path, store: SlideStore, grid: str) -> None:
    """Write a row a tile of one grid, in its order, as CSV; whole or not at all.

    Columns: ``tile`` (its row in the grid), ``x_l0``, ``y_l0``, ``tissue_type`` (the class that covers most of it;
    empty where no class covers any of it), ``share`` of the tile that this class covers, and the share of each class.
    """
    layer, tiles = store.objects(TISSUE_TYPES), store.read_grid(grid)
    share = tile_shares(store, layer, tiles.xy_l0, tiles.side_l0)
    names = [each.name for each in layer.classes]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["tile", "x_l0", "y_l0", "tissue_type", "share", *(escape_cell(name) for name in names)])
    best = share.argmax(axis=1)
    for tile, (corner, of_tile) in enumerate(zip(tiles.xy_l0.tolist(), share, strict=True)):
        most = of_tile[best[tile]]
        name = escape_cell(names[best[tile]]) if most > 0 else ""
        writer.writerow([tile, *corner, name, f"{most:.3f}", *(f"{each:.3f}" for each in of_tile)])
    with durable_file(path) as file:
        file.write(text.getvalue().encode())


def tile_shares(
    store: SlideStore, layer: ObjectArray, xy_l0: NDArray[np.int64], side_l0: tuple[int, int]
) -> NDArray[np.float64]:
    """What share of each tile every class of a layer covers.

    Areas are counted in cells of about 4 um (more on slides of over 16 million such cells), each of the class at its
    centre; a cell that a tile's edge cuts counts in part.

    Args:
        store: Of the slide.
        layer: Areas of classes.
        xy_l0: (N, 2) corners of the tiles.
        side_l0: Their width and height.

    Returns:
        (N, classes); what lies outside the slide, or in no object, counts for no class.
    """
    dims, mpp = store.slide["dims_l0"], store.slide["mpp"]
    # In whole pixels of the grid that the outlines were traced on, the cells of outlines and these are the same.
    pixel_um = np.asarray(layer.attributes.get("mpp", mpp), np.float64)
    cell_l0 = pixel_um / mpp * np.maximum(np.rint(_CELL_UM / pixel_um), 1)
    while np.prod(np.ceil(np.asarray(dims) / cell_l0)) > _MOST_CELLS:
        cell_l0 = cell_l0 * 2
    width, height = np.ceil(np.asarray(dims) / cell_l0).astype(int).tolist()
    table = layer.read()
    labels, _ = rasterise_outlines(table.outlines, width, height, (float(cell_l0[0]), float(cell_l0[1])))
    class_of_label = np.concatenate([[-1], table.class_id.astype(np.int64)])
    kind = class_of_label[labels]
    low, high = xy_l0 / cell_l0, (xy_l0 + side_l0) / cell_l0
    area = np.prod(np.asarray(side_l0) / cell_l0)
    shares = np.empty((len(xy_l0), len(layer.classes)))
    for number in range(len(layer.classes)):
        summed = np.zeros((height + 1, width + 1))
        np.cumsum(kind == number, axis=0, out=summed[1:, 1:])
        np.cumsum(summed[1:, 1:], axis=1, out=summed[1:, 1:])
        inside = _looked_up(summed, high[:, 0], high[:, 1]) - _looked_up(summed, low[:, 0], high[:, 1])
        inside -= _looked_up(summed, high[:, 0], low[:, 1]) - _looked_up(summed, low[:, 0], low[:, 1])
        shares[:, number] = np.clip(inside / area, 0, 1)
    return shares


def _looked_up(summed: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """A table of sums at places between its entries: linear there, constant beyond its edge."""
    x, y = np.clip(x, 0, summed.shape[1] - 1), np.clip(y, 0, summed.shape[0] - 1)
    column = np.minimum(x.astype(np.int64), summed.shape[1] - 2)
    row = np.minimum(y.astype(np.int64), summed.shape[0] - 2)
    right, down = x - column, y - row
    upper = summed[row, column] * (1 - right) + summed[row, column + 1] * right
    lower = summed[row + 1, column] * (1 - right) + summed[row + 1, column + 1] * right
    found: NDArray[np.float64] = upper * (1 - down) + lower * down
    return found
