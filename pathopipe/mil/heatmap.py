"""What a model looked at, from a slide's store alone: values of tiles as rasters, percentiles, extreme tiles."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import StoreError, UsageError
from pathopipe.records import TileGrid
from pathopipe.registry import nearest
from pathopipe.store import SlideStore

__all__ = ["MAP_KINDS", "Raster", "TileMap", "extreme_tiles", "pyramid", "read_maps", "tile_percentiles", "tile_raster"]

MAP_KINDS = ("attention", "contribution")
"""``attention``: weights that sum to one over the slide. ``contribution``: what a tile adds to the logit."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class TileMap:
    """One value for each tile of a slide."""

    name: str
    """As it stands in titles and as a measurement: ``Attention``, ``Contribution: tumour``."""
    kind: str
    """One of :data:`MAP_KINDS`."""
    label: str
    """The class it is for; empty for all."""
    values: Floats
    """(N,) in the order of the grid, NaN for tiles that the model did not see."""


class Raster(NamedTuple):
    """Values on cells as wide as the step from tile to tile; the whole of level 0 from its corner."""

    values: Floats
    """(rows, columns), NaN where there is no tile."""
    cell_l0: tuple[float, float]
    """Width and height of a cell in level-0 pixels."""


def read_maps(store: SlideStore, model: str) -> tuple[TileGrid, list[TileMap], dict[str, Any]]:
    """The maps that a model left in a store: attention, by class where the head has it, and contributions.

    Returns:
        The grid, its maps, and what was stored beside them (classes, probabilities, folds).

    Raises:
        UsageError: The store has no such predictions, or the model gives no value to single tiles.
        StoreError: Predictions and grid don't fit each other.
    """
    known = store.prediction_models()
    slide_id = store.path.stem
    if model not in known:
        hint = nearest(model, known) if known else "there are none"
        raise UsageError(f"{slide_id}: no predictions of {model!r} in its store ({hint}); run 'pathopipe mil predict'")
    found = store.predictions(model)
    if found.attention is None:
        raise UsageError(
            f"{slide_id}: {model} scores the slide without weighing tiles, so there is nothing to show; "
            "use a head with attention (abmil, clam_sb, clam_mb, dsmil, transmil, additive)"
        )
    grid = store.read_grid(found.grid)
    if grid.around is not None:  # shown at the tiles in their middle, row by row the same
        grid = store.read_grid(grid.around)
    if len(grid) != len(found.attention):
        raise StoreError(
            f"{slide_id}: {len(found.attention)} predicted tiles for {len(grid)} of {found.grid}; predict again",
            slide_id=slide_id,
        )
    described = found.about["maps"]
    maps = [
        TileMap(
            name=one["kind"].capitalize() + (f": {one['label']}" if one["label"] else ""),
            kind=one["kind"],
            label=one["label"],
            values=found.attention[:, column],
        )
        for column, one in enumerate(described)
    ]
    return grid, maps, found.about


def tile_percentiles(values: Floats) -> Floats:
    """(N,) the share of tiles, in (0, 1], whose value is not higher; equal values share the mean; NaN stays.

    Attention weights sum to one over thousands of tiles and differ by orders of magnitude; ranks can be seen.
    """
    seen = np.flatnonzero(np.isfinite(values))
    shares = np.full(len(values), np.nan, np.float32)
    if len(seen):
        _, group, count = np.unique(values[seen], return_inverse=True, return_counts=True)
        rank = np.cumsum(count) - (count - 1) / 2
        shares[seen] = rank[group] / len(seen)
    return shares


def tile_raster(grid: TileGrid, dims_l0: tuple[int, int], values: Floats) -> Raster:
    """Lay the values of tiles on a raster; where tiles overlap, a cell is their mean, weighted by the shared area.

    Args:
        grid: Where the tiles are.
        dims_l0: Width and height of level 0.
        values: (N,), NaN where there is none.
    """
    stride = grid.stride_l0
    columns, rows = (max(1, int(np.ceil(dims_l0[axis] / stride[axis]))) for axis in (0, 1))
    total, weight = np.zeros((rows, columns)), np.zeros((rows, columns))
    seen = np.flatnonzero(np.isfinite(values))
    # A tile begins at floor(k * stride), so k is the whole number just above.
    place = np.ceil(grid.xy_l0[seen] / np.array(stride) - 1e-9).astype(np.intp)
    # A tile wider than the step reaches into the next cells.
    reach = [grid.side_l0[axis] / stride[axis] for axis in (0, 1)]
    for down in range(int(np.ceil(reach[1] - 1e-3))):
        for right in range(int(np.ceil(reach[0] - 1e-3))):
            share = min(1.0, reach[0] - right) * min(1.0, reach[1] - down)
            column, row = place[:, 0] + right, place[:, 1] + down
            inside = (column >= 0) & (row >= 0) & (column < columns) & (row < rows)
            np.add.at(total, (row[inside], column[inside]), share * values[seen[inside]])
            np.add.at(weight, (row[inside], column[inside]), share)
    mean = np.where(weight > 0, total / np.maximum(weight, 1e-12), np.nan).astype(np.float32)
    return Raster(mean, stride)


def pyramid(values: Floats, *, smallest_px: int = 64) -> list[Floats]:
    """A raster and its halves: each cell the mean of the 2 x 2 that have a value; NaN where none has.

    At least one half is made, and the last fits into ``smallest_px`` pixels.
    """
    levels = [values]
    while len(levels) < 2 or max(levels[-1].shape) > smallest_px:
        finer = levels[-1]
        if max(finer.shape) == 1:
            break
        rows, columns = -(-finer.shape[0] // 2), -(-finer.shape[1] // 2)
        padded = np.full((rows * 2, columns * 2), np.nan, np.float32)
        padded[: finer.shape[0], : finer.shape[1]] = finer
        blocks = padded.reshape(rows, 2, columns, 2).transpose(0, 2, 1, 3).reshape(rows, columns, 4)
        held = np.isfinite(blocks)
        total = np.where(held, blocks, 0).sum(axis=2)
        count = held.sum(axis=2)
        levels.append(np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32))
    return levels


def extreme_tiles(values: Floats, count: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows of the tiles with the highest values, highest first, and with the lowest, lowest first; never both."""
    seen = np.flatnonzero(np.isfinite(values))
    order = seen[np.argsort(values[seen], kind="stable")]
    n = min(count, len(order) // 2)
    return order[len(order) - n :][::-1], order[:n]
