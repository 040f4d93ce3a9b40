"""The arithmetic of the grid: tiles of a physical size on a slide, their order, and their share of tissue.

The grid starts at level-0 (0, 0); tile (column i, row j) starts at ``floor(i * stride_x), floor(j * stride_y)`` and
owns the pixels up to the next start, so that each pixel has one owner whatever the resolution. A grid around another
shows the same places at another resolution: row by row the same middles, the same side in pixels.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathopipe.config import TilesConfig
from pathopipe.errors import SlideError
from pathopipe.records import Level, SlideInfo, TileGrid, Tissue

__all__ = [
    "BLOCK_TILES",
    "CELLULARITY_VERSION",
    "GRID_VERSION",
    "Windows",
    "check_fit",
    "grid_around",
    "grid_name",
    "name_around",
    "name_of_share",
    "plan_grid",
    "plan_windows",
    "scales_around",
    "tile_starts",
    "tiles_settings",
]

GRID_VERSION = 1
"""Raised whenever the same settings would give other tiles."""

CELLULARITY_VERSION = 1
"""Raised whenever the same tiles would be found to hold other shares of nuclei."""

BLOCK_TILES = 16
"""Tiles are ordered in blocks of 16 x 16, so that a chunk covers one compact piece of the slide."""

EXACT_TOLERANCE = 0.02
"""A native mpp times a power of two this near to the wanted one is taken as it is: 0.2485 serves 0.5."""


_SOME_TISSUE = 1e-6


def grid_name(config: TilesConfig) -> str:
    """Name of the grid in a store: ``256px-0.5um``.

    Behind it comes ``-o64`` where tiles overlap by 64 px, and then ``-cell20`` where only the 20 % with most nuclei are
    kept.
    """
    return name_of_share(_name_of_all(config), config.cellular_share)


def name_of_share(name: str, share: float | None) -> str:
    """Name of what is kept of the grid ``name`` when tiles are chosen by their nuclei: ``256px-0.5um-cell20``."""
    return name if share is None else f"{name}-cell{100 * share:g}"


def name_around(name: str, scale_um: float) -> str:
    """Name of the grid at ``scale_um`` around the grid ``name``: ``256px-1um-around-0.5um`` of ``256px-0.5um``."""
    side, _, rest = name.partition("-")
    return f"{side}-{scale_um:g}um-around-{rest}"


def scales_around(config: TilesConfig) -> tuple[float, ...]:
    """The further resolutions at which each place is cut: ``scales_um`` without ``mpp`` itself."""
    return tuple(scale for scale in config.scales_um if f"{scale:g}" != f"{config.mpp:g}")


def tiles_settings(config: TilesConfig, scale_um: float | None = None) -> dict[str, Any]:
    """What the tiles of one grid depend on, for the inputs of its stage; plain JSON values.

    Settings that came later are left out while they change nothing, so that stores made before them stay valid.
    ``scales_um`` never counts: it adds grids and leaves the first one as it is.

    Args:
        config: Settings.
        scale_um: Which of the grids around the first one; None for the first.
    """
    settings = config.model_dump(mode="json", exclude={"scales_um", "cellular_share"})
    if config.cellular_share is not None:
        settings["cellular_share"] = config.cellular_share
        settings["cellularity_version"] = CELLULARITY_VERSION
    if scale_um is not None:
        settings["scale_um"] = scale_um
    return settings


def _name_of_all(config: TilesConfig) -> str:
    overlap = f"-o{config.overlap_px}" if config.overlap_px else ""
    return f"{config.side_px}px-{config.mpp:g}um{overlap}"


def tile_starts(length_l0: int, stride_l0: float) -> NDArray[np.int64]:
    """Starts of the tiles along one axis of ``length_l0`` pixels: all ``floor(k * stride)`` below it."""
    n_at_most = math.ceil(length_l0 / stride_l0) + 1
    starts: NDArray[np.int64] = np.floor(np.arange(n_at_most) * stride_l0).astype(np.int64)
    inside: NDArray[np.int64] = starts[starts < length_l0]
    return inside


def plan_grid(info: SlideInfo, mpp_l0: tuple[float, float], tissue: Tissue, config: TilesConfig) -> TileGrid:
    """Lay the grid over a slide and keep the tiles with enough tissue.

    ``cellular_share`` is not applied: :func:`~pathopipe.tiles.cellularity.select_cellular` chooses among these tiles.

    Raises:
        SlideError: The slide is coarser than the tiles asked for, or smaller than one tile with ``edge=drop``.
    """
    axes = check_fit(info, mpp_l0, config)
    side_l0 = (axes[0].side_l0, axes[1].side_l0)
    level, read_px = _choose_level(info.levels, side_l0, config.side_px)
    starts = [_starts(length, axis, config) for length, axis in zip(info.dims_l0, axes, strict=True)]
    xy_l0, fraction = _kept_tiles(starts[0], starts[1], side_l0, info.dims_l0, tissue.mask, config.min_tissue)
    return TileGrid(
        name=_name_of_all(config),
        side_px=config.side_px,
        mpp=config.mpp,
        achieved_mpp=(axes[0].achieved_mpp, axes[1].achieved_mpp),
        overlap_px=config.overlap_px,
        side_l0=side_l0,
        stride_l0=(axes[0].stride_l0, axes[1].stride_l0),
        level=level,
        read_px=read_px,
        resample=_resampling(info.levels[level], read_px, [axis.stride_l0 for axis in axes], config),
        xy_l0=xy_l0,
        tissue_fraction=fraction,
    )


def check_fit(info: SlideInfo, mpp_l0: tuple[float, float], config: TilesConfig) -> "list[_Axis]":
    """Find out whether tiles can be cut from a slide before any of its pixels are read.

    Raises:
        SlideError: The slide is coarser than the tiles asked for, at ``mpp`` or at one of ``scales_um``, or smaller
            than one tile with ``edge=drop``.
    """
    axes = _fit(info, mpp_l0, config)
    for scale_um in scales_around(config):
        _fit(info, mpp_l0, config, scale_um)
    if not all(len(_starts(length, axis, config)) for length, axis in zip(info.dims_l0, axes, strict=True)):
        raise SlideError(
            f"{info.slide_id}: {info.dims_l0[0]} x {info.dims_l0[1]} px is smaller than one tile of "
            f"{axes[0].side_l0} x {axes[1].side_l0} level-0 px; use --set tiles.edge=pad, or smaller tiles",
            slide_id=info.slide_id,
        )
    return axes


def grid_around(
    grid: TileGrid,
    info: SlideInfo,
    mpp_l0: tuple[float, float],
    tissue: Tissue,
    config: TilesConfig,
    scale_um: float,
) -> TileGrid:
    """Lay a tile of another resolution around the middle of each tile of a grid.

    It has the same rows in the same order, and tiles of the same side in pixels. Where the sides of both in level-0
    pixels are odd and even, the middles can't fall together: then those of the new tiles lie half a level-0 pixel
    further left or up, on that axis; else they are the same. Tiles reach beyond the slide where they must, whatever
    ``edge`` says, and are white there. ``tissue_fraction`` is that of the new tiles.

    Args:
        grid: Tiles of ``config``, all or some of them.
        info: The slide.
        mpp_l0: Micrometres per level-0 pixel, x then y.
        tissue: Where its tissue is.
        config: The settings of ``grid``.
        scale_um: Micrometres per pixel of the new tiles, finer or coarser than those of ``grid``.

    Raises:
        SlideError: The slide is coarser than ``scale_um``.
    """
    axes = _fit(info, mpp_l0, config, scale_um)
    side_l0 = (axes[0].side_l0, axes[1].side_l0)
    offset_l0 = [(old - new) // 2 for old, new in zip(grid.side_l0, side_l0, strict=True)]
    xy_l0 = grid.xy_l0 + np.array(offset_l0, np.int64)
    level, read_px = _choose_level(info.levels, side_l0, grid.side_px)
    shared_px = min(grid.side_px - stride / axis.factor for stride, axis in zip(grid.stride_l0, axes, strict=True))
    return TileGrid(
        name=name_around(grid.name, scale_um),
        side_px=grid.side_px,
        mpp=scale_um,
        achieved_mpp=(axes[0].achieved_mpp, axes[1].achieved_mpp),
        overlap_px=max(0, round(shared_px)),
        side_l0=side_l0,
        stride_l0=grid.stride_l0,
        level=level,
        read_px=read_px,
        # Corners are whole multiples of both, so where these fit the shrunk pixels, so does every tile.
        resample=_resampling(info.levels[level], read_px, [*grid.stride_l0, *map(float, offset_l0)], config),
        xy_l0=xy_l0,
        tissue_fraction=_tissue_share(xy_l0, side_l0, info.dims_l0, tissue.mask),
        around=grid.name,
    )


@dataclass(frozen=True, slots=True)
class Windows:
    """Overlapping tiles on one fixed lattice, for networks that need context around what they say.

    The cores of the windows tile the slide from its top-left corner, and a core is a whole number of level-0 pixels
    wide. So level-0 is the working grid times ``factor_l0``, exactly and everywhere.
    """

    grid: TileGrid
    """The windows as tiles; those at the slide's edge begin outside it."""
    place: NDArray[np.int64]
    """(N, 2) column and row of each window in the lattice."""
    factor_l0: tuple[float, float]
    """Level-0 pixels a pixel of the working grid, x then y."""
    size_px: tuple[int, int]
    """Width and height of the slide in the working grid, rounded up."""


def plan_windows(
    info: SlideInfo,
    mpp_l0: tuple[float, float],
    tissue: Tissue,
    *,
    mpp: float,
    core_px: int,
    margin_px: int,
    allow_enlarge: bool,
) -> Windows:
    """Lay a lattice of windows over a slide and keep those that see tissue, in rows from the top.

    Args:
        info: The slide.
        mpp_l0: Micrometres per level-0 pixel, x then y.
        tissue: Where its tissue is.
        mpp: Micrometres per pixel of the windows.
        core_px: Side of the part of a window that is its own; a multiple of ``margin_px``.
        margin_px: What it sees beyond that on each side.
        allow_enlarge: Allow windows finer than the slide was scanned.

    Raises:
        SlideError: The slide is coarser than ``mpp``.
    """
    side_px = core_px + 2 * margin_px
    config = TilesConfig(side_px=side_px, mpp=mpp, overlap_px=2 * margin_px, allow_enlarge=allow_enlarge)
    margins_l0, factors = [], []
    for um in mpp_l0:
        factor = _fit_axis(um, config).factor
        if factor < 1 and not allow_enlarge:
            raise SlideError(
                f"{info.slide_id}: scanned at {um:g} um/px, coarser than the {mpp:g} um/px at which objects are looked "
                "for; use a finer scan, or allow blurred windows with --set segment.allow_enlarge=true",
                slide_id=info.slide_id,
            )
        # A whole margin in level-0 pixels makes core, window and every corner whole, too; at most half a pixel in
        # margin_px is given up for it.
        margins_l0.append(max(1, round(margin_px * factor)))
        factors.append(margins_l0[-1] / margin_px)
    stride_l0 = [margin * (core_px // margin_px) for margin in margins_l0]
    side_l0 = (stride_l0[0] + 2 * margins_l0[0], stride_l0[1] + 2 * margins_l0[1])
    starts = [
        np.arange(-(-length // stride), dtype=np.int64) * stride - margin
        for length, stride, margin in zip(info.dims_l0, stride_l0, margins_l0, strict=True)
    ]
    # Any tissue at all that a window sees, but not what rounding leaves of none.
    xy_l0, fraction = _kept_tiles(starts[0], starts[1], side_l0, info.dims_l0, tissue.mask, _SOME_TISSUE)
    place = (xy_l0 + margins_l0) // stride_l0
    order = np.lexsort((place[:, 0], place[:, 1]))
    level, read_px = _choose_level(info.levels, side_l0, side_px)
    grid = TileGrid(
        name=f"windows-{core_px}px-{mpp:g}um",
        side_px=side_px,
        mpp=mpp,
        achieved_mpp=(mpp_l0[0] * factors[0], mpp_l0[1] * factors[1]),
        overlap_px=2 * margin_px,
        side_l0=side_l0,
        stride_l0=(float(stride_l0[0]), float(stride_l0[1])),
        level=level,
        read_px=read_px,
        resample=_resampling(info.levels[level], read_px, [float(margin) for margin in margins_l0], config),
        xy_l0=xy_l0[order],
        tissue_fraction=fraction[order],
    )
    size_px = (math.ceil(info.dims_l0[0] / factors[0]), math.ceil(info.dims_l0[1] / factors[1]))
    return Windows(grid, place[order], (factors[0], factors[1]), size_px)


@dataclass(frozen=True, slots=True)
class _Axis:
    factor: float
    """Level-0 pixels a tile pixel."""
    side_l0: int
    stride_l0: float
    achieved_mpp: float


def _starts(length_l0: int, axis: _Axis, config: TilesConfig) -> NDArray[np.int64]:
    starts = tile_starts(length_l0, axis.stride_l0)
    if config.edge == "pad":
        return starts
    inside: NDArray[np.int64] = starts[starts + axis.side_l0 <= length_l0]
    return inside


def _fit(
    info: SlideInfo, mpp_l0: tuple[float, float], config: TilesConfig, scale_um: float | None = None
) -> list[_Axis]:
    """Tiles at ``mpp``, or at ``scale_um``, on both axes; SlideError where the slide is coarser."""
    mpp, setting = (config.mpp, "mpp") if scale_um is None else (scale_um, "scales_um")
    axes = [_fit_axis(um, config.model_copy(update={"mpp": mpp})) for um in mpp_l0]
    if min(axis.factor for axis in axes) < 1 and not config.allow_enlarge:
        native = " x ".join(f"{um:g}" for um in dict.fromkeys(mpp_l0))
        way = f"use --set tiles.mpp={max(mpp_l0):g} or coarser" if scale_um is None else "leave it out"
        raise SlideError(
            f"{info.slide_id}: scanned at {native} um/px, coarser than tiles.{setting}={mpp:g}; "
            f"{way}, or allow blurred tiles with --set tiles.allow_enlarge=true",
            slide_id=info.slide_id,
        )
    return axes


def _fit_axis(mpp_l0: float, config: TilesConfig) -> _Axis:
    factor = config.mpp / mpp_l0
    power = round(math.log2(factor))
    # Not below 1: a slide coarser than asked is enlarged, never taken as exact.
    if power >= 0 and abs(2**power / factor - 1) <= EXACT_TOLERANCE:
        factor = float(2**power)
    side_l0 = max(1, round(config.side_px * factor))
    return _Axis(
        factor=factor,
        side_l0=side_l0,
        stride_l0=factor * (config.side_px - config.overlap_px),
        achieved_mpp=side_l0 * mpp_l0 / config.side_px,
    )


def _choose_level(levels: tuple[Level, ...], side_l0: tuple[int, int], side_px: int) -> tuple[int, tuple[int, int]]:
    """The coarsest level that still has at least ``side_px`` pixels a tile, and how many it has."""
    best = (0, side_l0)
    for index, level in enumerate(levels):
        read_px = (round(side_l0[0] / level.downsample_x), round(side_l0[1] / level.downsample_y))
        if min(read_px) >= side_px and read_px < best[1]:
            best = (index, read_px)
    return best


def _resampling(level: Level, read_px: tuple[int, int], strides_l0: list[float], config: TilesConfig) -> str:
    side_px = config.side_px
    if read_px == (side_px, side_px):
        return "none"
    if min(read_px) < side_px:
        return "enlarge"
    factor = read_px[0] // side_px
    # Every tile must begin where a shrunk pixel begins, and so its corner in level pixels be a multiple of the factor.
    is_aligned = all(stride % (factor * level.downsample_x) == 0 for stride in strides_l0)
    is_scaled = factor in level.scales and read_px == (factor * side_px, factor * side_px)
    return "dct" if config.resample == "auto" and is_scaled and is_aligned else "area"


def _kept_tiles(
    x_starts: NDArray[np.int64],
    y_starts: NDArray[np.int64],
    side_l0: tuple[int, int],
    dims_l0: tuple[int, int],
    mask: NDArray[np.uint8],
    min_tissue: float,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(N, 2) starts and (N,) tissue share of the tiles that are kept, in storage order."""
    summed = _summed(mask)
    scale_x, scale_y = mask.shape[1] / dims_l0[0], mask.shape[0] / dims_l0[1]
    left, right = (_columns(summed, (x_starts + side) * scale_x) for side in (0, side_l0[0]))
    band = right - left  # (mask rows + 1, tile columns)
    tile_area = side_l0[0] * scale_x * side_l0[1] * scale_y

    kept_xy, kept_fraction = [], []
    # One row of blocks at a time: memory does not grow with the number of tiles in the grid.
    for first in range(0, len(y_starts), BLOCK_TILES):
        y = y_starts[first : first + BLOCK_TILES]
        top, bottom = (_columns(band.T, (y + side) * scale_y).T for side in (0, side_l0[1]))
        fraction = np.clip((bottom - top) / tile_area, 0, 1).astype(np.float32)  # (tile rows, tile columns)
        row, column = np.nonzero(fraction >= min_tissue)
        order = np.lexsort((column, row, column // BLOCK_TILES))
        row, column = row[order], column[order]
        kept_xy.append(np.stack([x_starts[column], y[row]], axis=1))
        kept_fraction.append(fraction[row, column])
    return np.concatenate(kept_xy), np.concatenate(kept_fraction)


def _tissue_share(
    xy_l0: NDArray[np.int64], side_l0: tuple[int, int], dims_l0: tuple[int, int], mask: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """(N,) share of tissue in tiles at any place; what lies outside the slide has none."""
    summed = _summed(mask)
    scale_x, scale_y = mask.shape[1] / dims_l0[0], mask.shape[0] / dims_l0[1]
    total = np.zeros(len(xy_l0))
    for down, right, sign in ((1, 1, 1), (0, 1, -1), (1, 0, -1), (0, 0, 1)):
        x = (xy_l0[:, 0] + right * side_l0[0]) * scale_x
        y = (xy_l0[:, 1] + down * side_l0[1]) * scale_y
        total += sign * _looked_up(summed, x, y)
    area = side_l0[0] * scale_x * side_l0[1] * scale_y
    share: NDArray[np.float32] = np.clip(total / area, 0, 1).astype(np.float32)
    return share


def _summed(mask: NDArray[np.uint8]) -> NDArray[np.float64]:
    # Summed from the top left, tissue in any rectangle is four look-ups; between mask pixels the sum is linear, so the
    # share is exact for tiles that cut through mask pixels.
    summed = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    np.cumsum(mask != 0, axis=0, out=summed[1:, 1:])
    np.cumsum(summed[1:, 1:], axis=1, out=summed[1:, 1:])
    return summed


def _looked_up(summed: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """``summed`` at fractional places (x, y), linear between neighbours and constant beyond the ends."""
    x = np.clip(x, 0, summed.shape[1] - 1)
    y = np.clip(y, 0, summed.shape[0] - 1)
    column = np.minimum(x.astype(np.int64), summed.shape[1] - 2)
    row = np.minimum(y.astype(np.int64), summed.shape[0] - 2)
    right, down = x - column, y - row
    upper = summed[row, column] * (1 - right) + summed[row, column + 1] * right
    lower = summed[row + 1, column] * (1 - right) + summed[row + 1, column + 1] * right
    found: NDArray[np.float64] = upper * (1 - down) + lower * down
    return found


def _columns(summed: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Columns of ``summed`` at fractional positions, linear between neighbours and constant beyond the end."""
    at = np.clip(at, 0, summed.shape[1] - 1)
    low = np.minimum(at.astype(np.int64), summed.shape[1] - 2)
    share = at - low
    picked: NDArray[np.float64] = summed[:, low] * (1 - share) + summed[:, low + 1] * share
    return picked
