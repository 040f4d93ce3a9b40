"""How much of each tile is nuclei, seen at low power, and the choice of the tiles that hold most of them.

KimiaNet was trained on the fifth of each slide's tiles that is richest in nuclei (Riasatian et al. 2021, Medical Image
Analysis 70, 102032): haematoxylin parted from eosin, nuclei over area, at low power. What follows keeps to that idea
with a rule of its own, made to hold for pale and dark stains, keratin, ink and dust.
"""

import math
from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.records import TileGrid
from pathopipe.slide.base import Slide
from pathopipe.stain import STAIN_STEP_OD, STAIN_ZERO, optical_density, stain_bytes
from pathopipe.tiles.grid import name_of_share
from pathopipe.tiles.read import TileStream

__all__ = ["cellularity", "select_cellular"]

Plane = NDArray[np.uint8]

_DENSITY: Plane = np.rint(optical_density(np.arange(256, dtype=np.uint8)) / STAIN_STEP_OD).astype(np.uint8)
"""Optical density of a channel's value, in hundredths."""

_MPP = 2.0
_MOST_MPP = 2.2
"""What can be had at once is taken up to here; three pixels still make a nucleus."""
_BATCH = 64
_ROWS = 4096
_NUCLEUS_UM = 12.0
"""No nucleus fills a square of about this side; what does is surroundings: keratin, ink, a fold."""
_TISSUE = 18
"""Density (hundredths of OD, three channels added) up to which a pixel is glass."""
_BLUEST = 1.2
"""Red over green density. Nuclei are at 0.4 to 1.1 in real H&E; blue and green ink lie above."""
_GREYEST = 1.15
"""Green density over the mean of the three. Nuclei are at 1.16 to 2 in real H&E, black ink at 1, over eosin more."""
_INK = 90
"""Density (three channels added) above which something grey or blue may be ink."""
_BINS = 64
_BIN_STEPS = 2
"""Hundredths of OD in a bin of the histograms."""
_LEAST_STEPS = 6.0
"""Least contrast of a nucleus in hundredths of OD; below, it would be grain."""


def cellularity(slide: Slide, grid: TileGrid, *, threads: int = 1, dark_field: bool = False) -> NDArray[np.float32]:
    """Share of each tile that nuclei cover, as seen at about 2 um/px.

    A pixel's signal is its haematoxylin density (:mod:`pathopipe.stain`), or twice what it has above its surroundings
    where that is less: 14 um of even density are no nucleus. Glass and its rim are not surroundings. Pixels bluer than
    haematoxylin count for nothing, nor does ink: what lies within 14 um of a patch of that size that is dark and grey,
    blue or green. Otsu's threshold (1979) parts the signals of the whole slide into two classes; a pixel there has
    half the weight of one inside a nucleus, and weights rise from 0 to 1 over half the distance between the classes.
    The number is good for putting the tiles of one slide in order; between slides it is comparable roughly. Dark
    keratin that is frayed, and folds, can still pass for nuclei; of immunostains the brown nuclei count most.

    Each place is read once. Memory is four batches of 64 tiles at low power, and 256 bytes a tile.

    Args:
        slide: Read from several threads at once.
        grid: Its tiles.
        threads: How many read; the numbers don't depend on it.
        dark_field: Nuclei are bright on black: the brightest channel stands for haematoxylin.

    Returns:
        (N,) 0 to 1; NaN where the slide can't be read.
    """
    low = _at_low_power(slide, grid)
    side_um = grid.achieved_mpp[0] * grid.side_px
    reach_px = 2 * max(1, round(_NUCLEUS_UM * low.side_px / side_um / 2)) + 1
    counts = np.zeros((len(grid), _BINS), np.uint32)
    readable = np.ones(len(grid), np.bool_)
    batches = TileStream(slide, low, [(0, slice(0, len(grid)))], batch_size=_BATCH, threads=threads)
    for batch in batches:
        readable[batch.rows] = batch.readable
        counts[batch.rows] = _signals(batch.images, reach_px, dark_field)
    counts[~readable] = 0
    weights = _weights(counts.sum(axis=0, dtype=np.int64))
    share = np.empty(len(grid), np.float32)
    for first in range(0, len(grid), _ROWS):
        rows = slice(first, first + _ROWS)
        share[rows] = (counts[rows] * weights).sum(axis=1) / low.side_px**2
    share[~readable] = np.nan
    return share


def select_cellular(grid: TileGrid, cellularity: NDArray[np.float32], share: float) -> TileGrid:
    """Keep the tiles with most nuclei, in the order they have; of equal ones the first.

    Args:
        grid: All tiles with tissue.
        cellularity: (N,), NaN where it is not known; such tiles are never kept.
        share: Which share of the tiles with any tissue at all is kept, rounded up to whole tiles.

    Returns:
        A grid with ``-cell20`` behind its name for a share of 0.2, and ``cellularity`` of what it holds.
    """
    values = np.where(grid.tissue_fraction > 0, cellularity, np.nan).astype(np.float32)
    # What rounding adds to a product that is whole must not add a tile.
    n_kept = math.ceil(share * np.count_nonzero(grid.tissue_fraction > 0) - 1e-6)
    best = np.argsort(-values, kind="stable")[:n_kept]
    kept = np.sort(best[np.isfinite(values[best])])
    return replace(
        grid,
        name=name_of_share(grid.name, share),
        xy_l0=grid.xy_l0[kept],
        tissue_fraction=grid.tissue_fraction[kept],
        cellularity=values[kept],
    )


def _at_low_power(slide: Slide, grid: TileGrid) -> TileGrid:
    """The same places at about 2 um/px, by the quickest road."""
    mpp_l0 = grid.achieved_mpp[0] * grid.side_px / grid.side_l0[0]
    levels = slide.info.levels
    choices = [
        (level.downsample_x * mpp_l0 * factor, number, factor)
        for number, level in enumerate(levels)
        # Blocks shrink by the same on both axes, and so must the tile.
        for factor in (1, *(level.scales if grid.side_l0[0] == grid.side_l0[1] else ()))
    ]
    enough = [choice for choice in choices if choice[0] <= _MOST_MPP] or [min(choices)]
    coarsest = max(mpp for mpp, _, _ in enough)
    # Of those that are as good, the one with fewest pixels whose blocks can be taken straight from the file.
    _, number, factor = max(
        (choice for choice in enough if choice[0] > 0.95 * coarsest),
        key=lambda choice: (levels[choice[1]].scales != (), choice[1]),
    )
    level = levels[number]
    downsample = (level.downsample_x, level.downsample_y)
    read_px = [max(1, round(side / by)) for side, by in zip(grid.side_l0, downsample, strict=True)]
    if factor > 1 and min(read_px) >= factor:
        # Up to a shrunk pixel of the tile's edge is given up, so that its corner is where a shrunk pixel begins.
        side_px = min(read_px) // factor
        place = np.floor(grid.xy_l0 / np.array(downsample) / factor).astype(np.int64) * factor
        xy_l0 = np.rint(place * np.array(downsample)).astype(np.int64)
        both = factor * side_px
        return replace(grid, side_px=side_px, level=number, read_px=(both, both), resample="dct", xy_l0=xy_l0)
    side_px = max(1, min(round(grid.achieved_mpp[0] * grid.side_px / _MPP), *read_px))
    resample = "none" if read_px == [side_px, side_px] else "area"
    return replace(grid, side_px=side_px, level=number, read_px=(read_px[0], read_px[1]), resample=resample)


def _signals(images: Plane, reach_px: int, dark_field: bool) -> NDArray[np.int64]:
    """(n, bins) histograms of the signals in tiles (n, side, side, 3), of the pixels that may belong to tissue."""
    n, side = images.shape[:2]
    rows = images.reshape(n * side, side, 3)
    if dark_field:
        density: Plane = np.right_shift(rows.max(axis=-1), 1)
        glass = ink = np.zeros(density.shape, np.uint8)
        is_stain = np.ones(density.shape, np.bool_)
    else:
        density = np.maximum(stain_bytes(rows)[0], STAIN_ZERO) - np.uint8(STAIN_ZERO)
        red, green, blue = (cv2.LUT(channel, _DENSITY).astype(np.int16) for channel in cv2.split(rows))
        total = red + green + blue
        glass = (total <= _TISSUE).view(np.uint8)
        is_stain = red < _BLUEST * green
        ink = ((total > _INK) & (~is_stain | (3 * green < _GREYEST * total))).view(np.uint8)
    square, rim = np.ones((reach_px, reach_px), np.uint8), np.ones((3, 3), np.uint8)
    halo = np.ones((2 * reach_px + 1, 2 * reach_px + 1), np.uint8)
    surroundings = np.empty_like(density)
    counted = np.empty(density.shape, np.bool_)
    for first in range(0, n * side, side):
        tile = slice(first, first + side)
        # Pixels at the rim of glass are half glass: against them, whatever borders on a gap would stand out.
        near_glass = cv2.dilate(glass[tile], rim)
        lowest = cv2.erode(density[tile] | (near_glass * np.uint8(255)), square)
        lowest[lowest == 255] = 0
        surroundings[tile] = cv2.dilate(lowest, square)
        counted[tile] = glass[tile] == 0
        if ink[tile].any():
            # Ink runs out over tissue, and there it has the colour of nuclei.
            counted[tile] &= cv2.dilate(cv2.morphologyEx(ink[tile], cv2.MORPH_OPEN, square), halo) == 0
    contrast = cv2.subtract(density, surroundings)
    signal = np.minimum(density, cv2.add(contrast, contrast))
    counted &= is_stain
    place = np.repeat(np.arange(n), side * side)[counted.ravel()] * _BINS
    place += np.minimum(signal[counted] // _BIN_STEPS, _BINS - 1)
    return np.bincount(place, minlength=n * _BINS).reshape(n, _BINS)


def _weights(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """(bins,) how much of a nucleus a pixel of each signal is: Otsu's threshold, softened."""
    steps = (np.arange(_BINS) + 0.5) * _BIN_STEPS
    below = np.cumsum(counts)
    sum_below = np.cumsum(counts * steps)
    above = below[-1] - below
    parted = (below > 0) & (above > 0)
    if not parted.any():
        return np.zeros(_BINS)
    low = sum_below / np.maximum(below, 1)
    high = (sum_below[-1] - sum_below) / np.maximum(above, 1)
    between = np.where(parted, below.astype(np.float64) * above * (high - low) ** 2, -1.0)
    best = int(np.argmax(between))
    threshold = max((best + 1) * _BIN_STEPS, _LEAST_STEPS)
    half = max((high[best] - low[best]) / 4, float(_BIN_STEPS))
    weights: NDArray[np.float64] = np.clip((steps - threshold) / (2 * half) + 0.5, 0, 1)
    # Soft, but not so far down that bare grain counts.
    weights[steps < _LEAST_STEPS / 2] = 0
    return weights
