"""Measurements of objects from their pixels or polygons, of their neighbourhood, and of glands; docs/morphology.md."""

import math
from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from pathopipe.segmentation.trace import Runs, find_runs
from pathopipe.stain import STAIN_STEP_OD, STAIN_ZERO, stain_bytes

__all__ = [
    "GLAND_NAMES",
    "MEASUREMENT_NAMES",
    "NEIGHBOUR_NAMES",
    "SHAPE_NAMES",
    "Measured",
    "assign_parents",
    "gland_measurements",
    "measure_labels",
    "measure_shapes",
    "neighbourhood",
]

SHAPE_NAMES: tuple[str, ...] = (
    "Area µm^2",
    "Perimeter µm",
    "Major axis µm",
    "Minor axis µm",
    "Eccentricity",
    "Solidity",
    "Circularity",
    "Orientation °",
)
"""Of one object from its outline."""

MEASUREMENT_NAMES: tuple[str, ...] = (
    *SHAPE_NAMES,
    "Haematoxylin OD mean",
    "Haematoxylin OD std",
    "Eosin OD mean",
    "Eosin OD std",
    "DAB OD mean",
    "DAB OD std",
)
"""Of one object from its pixels."""

NEIGHBOUR_NAMES: tuple[str, ...] = ("Nearest neighbour µm", "Neighbours within 50 µm per mm^2")
"""Of one object from the centroids of all."""

GLAND_NAMES: tuple[str, ...] = ("Nucleus count", "Nuclei per mm^2", "Lumen share")
"""Of one gland from what lies in it."""

_NEIGHBOURHOOD_UM = 50.0
_NEIGHBOUR_BATCH = 100_000
_PIXEL_BATCH = 2**17
_ROUND = 1e-9
"""Second moments that differ by less than this share of their sum give no direction."""


class Measured(NamedTuple):
    """What is measured of objects from their pixels."""

    centroid_px: NDArray[np.float64]
    """(n, 2) x, y in the whole-slide working grid; the centre of its first pixel is (0.5, 0.5)."""
    values: NDArray[np.float32]
    """(n, K) in the order of ``MEASUREMENT_NAMES``."""


class _Moments(NamedTuple):
    """Area and second moments of objects, each n values in one unit of length."""

    area: NDArray[np.float64]
    variance_x: NDArray[np.float64]
    variance_y: NDArray[np.float64]
    covariance: NDArray[np.float64]


def measure_labels(
    labels: NDArray[np.integer],
    rgb: NDArray[np.uint8],
    *,
    mpp: tuple[float, float],
    origin_px: tuple[int, int] = (0, 0),
    numbers: NDArray[np.integer] | None = None,
) -> Measured:
    """Measure every label of a label image: shape, and stain within it.

    All sums are of whole numbers, counted from the top-left corner of the object's own bounding box, so an object
    measures the same to the last bit in every image that holds it whole. A pixel counts as a square, not as a point:
    second moments are larger than scikit-image's by 1/12 px², and equal to those of the traced polygon.

    Sources: perimeter by Crofton's formula in four directions (Legland, Kiêu & Devaux 2007, Image Anal. Stereol. 26;
    weights of the directions for oblong pixels as in Lehmann & Legland 2012, Insight J.); stains by Ruifrok & Johnston
    2001, Anal. Quant. Cytol. Histol. 23(4).

    Args:
        labels: (height, width) whole numbers; 0 (or less) is background.
        rgb: (height, width, 3) of the same pixels.
        mpp: Micrometres per pixel, x then y.
        origin_px: Where the image's top-left corner lies in the working grid, x then y.
        numbers: Labels to measure, each once; by default 1 to the highest there is.

    Returns:
        One row a label, in the order of ``numbers``; NaN for one that is not in the image. The orientation of an object
        that is as long as wide is NaN.

    Raises:
        ValueError: Labels and pixels differ in size.
    """
    if rgb.shape != (*labels.shape, 3):
        raise ValueError(f"pixels of shape {rgb.shape} do not fit labels of shape {labels.shape}")
    if numbers is None:
        numbers = np.arange(1, max(int(labels.max(initial=0)), 0) + 1)
    n = len(numbers)
    framed = np.pad(labels, 1)
    runs = find_runs(framed)
    wanted = np.isin(runs.label, numbers)
    runs = Runs(runs.start[wanted], runs.stop[wanted], runs.label[wanted])
    if len(runs.label) == 0:
        return Measured(np.full((n, 2), np.nan), np.full((n, len(MEASUREMENT_NAMES)), np.nan, np.float32))
    by_label = np.argsort(numbers)
    owner = by_label[np.searchsorted(numbers, runs.label, sorter=by_label)]

    width = framed.shape[1]
    length = runs.stop - runs.start
    row, column = np.divmod(runs.start, width)
    top, left = np.full(n, framed.shape[0]), np.full(n, width)
    np.minimum.at(top, owner, row)
    np.minimum.at(left, owner, column)
    y, x = row - top[owner], column - left[owner]
    x_1 = x + length

    def total(values: NDArray[np.integer]) -> NDArray[np.float64]:
        # In float64, yet exact: whole numbers below 2**53.
        return np.asarray(np.bincount(owner, values, minlength=n), np.float64)

    pixels = total(length)
    area = np.where(pixels > 0, pixels, np.nan)
    # Integrals over squares, freed of their denominators.
    mean_x = total(x_1**2 - x**2) / (2 * area)
    mean_y = total(length * (2 * y + 1)) / (2 * area)
    moments = _Moments(
        area,
        total(x_1**3 - x**3) / (3 * area) - mean_x * mean_x,
        total(length * (3 * y * (y + 1) + 1)) / (3 * area) - mean_y * mean_y,
        total((x_1**2 - x**2) * (2 * y + 1)) / (4 * area) - mean_x * mean_y,
    )
    centroid_px = np.stack([mean_x + (left - 1 + origin_px[0]), mean_y + (top - 1 + origin_px[1])], axis=1)

    across = total(np.full_like(owner, 2))
    down, diagonal, *stains = _pixel_sums(framed, rgb, runs, owner, n)
    perimeter_um = _crofton(across, down, diagonal, mpp)
    hull_px = _hull_areas(owner, y, x, x_1, n)

    columns = _describe(moments, hull_px, perimeter_um, mpp)
    for values, squares in zip(stains[0::2], stains[1::2], strict=True):
        mean = values / area
        columns.append((mean - STAIN_ZERO) * STAIN_STEP_OD)
        columns.append(np.sqrt(np.maximum(squares / area - mean * mean, 0)) * STAIN_STEP_OD)
    return Measured(centroid_px, np.stack(columns, axis=1).astype(np.float32))


def _pixel_sums(
    framed: NDArray[np.integer], rgb: NDArray[np.uint8], runs: Runs, owner: NDArray[np.int64], n: int
) -> NDArray[np.float64]:
    """What is counted of each object from its pixels, (8, n) whole numbers.

    Crossings of its border by the lines through pixel centres along columns, and along both diagonals together; sum and
    sum of squares of the bytes of each stain.
    """
    sums = np.zeros((8, n))
    width, flat, colours = framed.shape[1], framed.ravel(), rgb.reshape(-1, 3)
    length = runs.stop - runs.start
    n_before = np.cumsum(length) - length
    begin = 0
    while begin < len(length):
        # Some pixels at a time, so that memory stays bounded and the work within the processor's cache.
        end = int(np.searchsorted(n_before, n_before[begin] + _PIXEL_BATCH))
        batch = slice(begin, end)
        own = np.repeat(owner[batch], length[batch])
        pixel = np.arange(len(own)) + np.repeat(runs.start[batch] - (n_before[batch] - n_before[begin]), length[batch])
        label = flat[pixel]
        # A line leaves an object wherever the pixel ahead is another's, and enters it as often.
        for row, step in ((0, width), (1, width + 1), (1, width - 1)):
            sums[row] += 2 * np.bincount(own[flat[pixel + step] != label], minlength=n)
        # Without the frame there are two pixels less in each row.
        place = pixel - np.repeat(2 * (runs.start[batch] // width), length[batch]) - (width - 1)
        for stain, plane in enumerate(stain_bytes(np.take(colours, place, axis=0)[None])):
            value = plane.ravel().astype(np.float64)
            sums[2 + 2 * stain] += np.bincount(own, value, minlength=n)
            sums[3 + 2 * stain] += np.bincount(own, value * value, minlength=n)
        begin = end
    return sums


def _crofton(
    across: NDArray[np.float64], down: NDArray[np.float64], diagonal: NDArray[np.float64], pixel: tuple[float, float]
) -> NDArray[np.float64]:
    """Perimeter from how often lines through pixel centres cross the border: along rows, columns, both diagonals.

    A direction has the weight of the angles that are nearest to it, and of the distance between its lines.
    """
    width, height = pixel
    slant = math.atan2(height, width)
    return 0.5 * (
        slant * height * across
        + (math.pi / 2 - slant) * width * down
        + math.pi / 4 * (width * height / math.hypot(width, height)) * diagonal
    )


def _describe(
    moments: _Moments, hull_area: NDArray[np.float64], perimeter_um: NDArray[np.float64], mpp: tuple[float, float]
) -> list[NDArray[np.float64]]:
    """The columns of ``SHAPE_NAMES``; moments and hull in units of ``mpp``."""
    area_um2 = moments.area * (mpp[0] * mpp[1])
    perimeter_um = np.where(moments.area > 0, perimeter_um, np.nan)
    xx, yy = moments.variance_x * mpp[0] ** 2, moments.variance_y * mpp[1] ** 2
    xy = moments.covariance * (mpp[0] * mpp[1])
    half_sum, half_difference = (xx + yy) / 2, (xx - yy) / 2
    spread = np.sqrt(half_difference * half_difference + xy * xy)
    large, small = half_sum + spread, np.maximum(half_sum - spread, 0)
    angle = np.degrees(np.arctan2(-xy, half_difference) / 2) % 180  # y points down, angles turn up
    # What rounds to 180 is 0.
    angle = np.where(angle.astype(np.float32) >= 180, 0, angle)
    return [
        area_um2,
        perimeter_um,
        4 * np.sqrt(large),
        4 * np.sqrt(small),
        np.sqrt(1 - small / large),
        moments.area / hull_area,
        np.minimum(4 * math.pi * area_um2 / (perimeter_um * perimeter_um), 1),
        np.where(spread <= _ROUND * half_sum, np.nan, angle),
    ]


def _hull_areas(
    owner: NDArray[np.int64], y: NDArray[np.int64], x_0: NDArray[np.int64], x_1: NDArray[np.int64], n: int
) -> NDArray[np.float64]:
    """Areas of the convex hulls of pixel squares, of all objects at once; NaN where there is none.

    The left edge of the hull is the convex envelope of the leftmost pixel corners of each row, and so is the right edge
    from the other side. Points that lie on or inside the chord of their neighbours are no corners of it; they are
    dropped, all at a time, until none is left.
    """
    # One entry a row of an object; within a row, runs come from left to right.
    order = np.argsort(owner, kind="stable")
    owner, y, x_0, x_1 = owner[order], y[order], x_0[order], x_1[order]
    same_row = (owner[1:] == owner[:-1]) & (y[1:] == y[:-1])
    begin, end = np.flatnonzero(np.append(True, ~same_row)), np.flatnonzero(np.append(~same_row, True))
    owner, y = owner[begin], y[begin]
    # A line between two rows takes the farther corner; a last row has a line below as well.
    follows = np.append(False, (owner[1:] == owner[:-1]) & (y[1:] == y[:-1] + 1))
    last = ~np.append(follows[1:], False)
    at = np.arange(len(y)) + np.cumsum(last) - last
    below = at[last] + 1
    twice_area = np.zeros(n)
    for edge in (x_0[begin], -x_1[end]):
        line_owner, line_y, line_x = (np.empty(len(y) + len(below), np.int64) for _ in range(3))
        farther = edge.copy()
        farther[1:][follows[1:]] = np.minimum(edge[1:], edge[:-1])[follows[1:]]
        line_owner[at], line_y[at], line_x[at] = owner, y, farther
        line_owner[below], line_y[below], line_x[below] = owner[last], y[last] + 1, edge[last]
        twice_area -= _envelope_integrals(line_owner, line_y, line_x, n)
    return np.where(twice_area > 0, twice_area / 2, np.nan)


def _envelope_integrals(
    owner: NDArray[np.int64], y: NDArray[np.int64], x: NDArray[np.int64], n: int
) -> NDArray[np.float64]:
    """Twice the integral over y of the convex envelope from below of the points (y, x) of each owner, y ascending."""
    while True:
        inner = owner[:-2] == owner[2:]
        rise = (x[1:-1] - x[:-2]) * (y[2:] - y[:-2]) - (x[2:] - x[:-2]) * (y[1:-1] - y[:-2])
        keep = np.ones(len(x), np.bool_)
        keep[1:-1] = ~inner | (rise < 0)
        if keep.all():
            break
        owner, y, x = owner[keep], y[keep], x[keep]
    pair = owner[1:] == owner[:-1]
    twice = ((x[1:] + x[:-1]) * (y[1:] - y[:-1]))[pair]
    return np.asarray(np.bincount(owner[1:][pair], twice, minlength=n), np.float64)


def measure_shapes(
    shapes: NDArray[np.object_],
    *,
    mpp: tuple[float, float],
    pixel_l0: tuple[float, float] | None = None,
) -> NDArray[np.float32]:
    """Measure polygons, holes taken out: for large objects that no one image holds.

    What was traced from pixels measures as :func:`measure_labels` measures the pixels, if it is told their size: the
    steps of such an outline are up to 4/π too long, so its perimeter is estimated with Crofton's formula from the same
    counts, which the lengths and corners of the outline give.

    Args:
        shapes: (n,) valid polygons and multipolygons in level-0 pixels.
        mpp: Micrometres per level-0 pixel, x then y.
        pixel_l0: Size of a pixel of the grid that the outlines were traced on, x then y. Without it, and where an edge
            runs at a slant, the perimeter is the length of the outline.

    Returns:
        (n, 8) float32 in the order of ``SHAPE_NAMES``; NaN for empty shapes.
    """
    n = len(shapes)
    parts, object_of_part = shapely.get_parts(shapes, return_index=True)
    rings, part_of_ring = shapely.get_rings(parts, return_index=True)
    xy, ring_of_vertex = shapely.get_coordinates(rings, return_index=True)
    bounds = shapely.bounds(shapes)
    object_of_ring = object_of_part[part_of_ring]
    xy -= bounds[object_of_ring[ring_of_vertex], :2]
    edge = np.flatnonzero(ring_of_vertex[1:] == ring_of_vertex[:-1])
    ring = ring_of_vertex[edge]
    owner = object_of_ring[ring]
    (x_0, y_0), (x_1, y_1) = xy[edge].T, xy[edge + 1].T
    is_shell = np.append(True, part_of_ring[1:] != part_of_ring[:-1])[: len(rings)]
    cross = x_0 * y_1 - x_1 * y_0
    turn = np.sign(np.bincount(ring, cross, minlength=len(rings)))
    cross *= (turn * np.where(is_shell, 1.0, -1.0))[ring]

    def total(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.bincount(owner, values, minlength=n), np.float64)

    # Green's theorem: integrals over the inside from the edges alone.
    area = total(cross) / 2
    area = np.where(area > 0, area, np.nan)
    mean_x, mean_y = total((x_0 + x_1) * cross) / (6 * area), total((y_0 + y_1) * cross) / (6 * area)
    xx = total((x_0 * x_0 + x_0 * x_1 + x_1 * x_1) * cross) / (12 * area)
    yy = total((y_0 * y_0 + y_0 * y_1 + y_1 * y_1) * cross) / (12 * area)
    xy_mixed = total((x_0 * y_1 + 2 * x_0 * y_0 + 2 * x_1 * y_1 + x_1 * y_0) * cross) / (24 * area)
    moments = _Moments(area, xx - mean_x * mean_x, yy - mean_y * mean_y, xy_mixed - mean_x * mean_y)

    dx, dy = np.abs(x_1 - x_0), np.abs(y_1 - y_0)
    perimeter_um = total(np.hypot(dx * mpp[0], dy * mpp[1]))
    if pixel_l0 is not None and len(edge):
        across, down = np.rint(total(dy) / pixel_l0[1]), np.rint(total(dx) / pixel_l0[0])
        # Where the border runs straight on, both diagonals cross it; at a corner one does; where two corners meet in
        # a point, none does.
        first = np.flatnonzero(np.append(True, ring[1:] != ring[:-1]))
        following = np.arange(1, len(edge) + 1)
        following[np.append(first[1:], len(edge)) - 1] = first
        corner = (dx == 0) != (dx == 0)[following]
        order = np.lexsort((x_1, y_1, owner))
        meets = np.zeros(len(edge), np.bool_)
        meets[1:] = (np.diff(x_1[order]) == 0) & (np.diff(y_1[order]) == 0) & (np.diff(owner[order]) == 0)
        meetings = np.bincount(owner[order], meets, minlength=n)
        diagonal = 2 * (across + down) - total(corner.astype(np.float64)) - 2 * meetings
        pixel_um = (pixel_l0[0] * mpp[0], pixel_l0[1] * mpp[1])
        slanted = total(((dx > 0) & (dy > 0)).astype(np.float64)) > 0
        perimeter_um = np.where(slanted, perimeter_um, _crofton(across, down, diagonal, pixel_um))
    columns = _describe(moments, shapely.area(shapely.convex_hull(shapes)), perimeter_um, mpp)
    return np.stack(columns, axis=1).astype(np.float32)


def neighbourhood(centroid_um: NDArray[np.float64]) -> NDArray[np.float32]:
    """How close the neighbours of each object are, and how many there are.

    Args:
        centroid_um: (n, 2) x, y in micrometres, of all objects of a slide, in any order.

    Returns:
        (n, 2) float32 in the order of ``NEIGHBOUR_NAMES``: the distance to the nearest other centroid, NaN where there
        is no other; and how many others lie within 50 µm (the border included) per mm² of that circle. The circle is
        not cut at the edge of the tissue.
    """
    n = len(centroid_um)
    values = np.full((n, 2), np.nan, np.float32)
    values[:, 1] = 0
    if n < 2:
        return values
    # The tree then does not depend on the order of the objects, and queries run through it side by side.
    order = np.lexsort((centroid_um[:, 0], centroid_um[:, 1], np.floor(centroid_um[:, 1] / _NEIGHBOURHOOD_UM)))
    points = np.ascontiguousarray(centroid_um[order], np.float64)
    tree = cKDTree(points)
    circle_mm2 = math.pi * (_NEIGHBOURHOOD_UM / 1000) ** 2
    for start in range(0, n, _NEIGHBOUR_BATCH):
        batch = slice(start, start + _NEIGHBOUR_BATCH)
        distance = np.asarray(tree.query(points[batch], k=2)[0])
        counts = tree.query_ball_point(points[batch], _NEIGHBOURHOOD_UM, return_length=True)
        values[order[batch], 0] = distance[:, 1]
        values[order[batch], 1] = (counts - 1) / circle_mm2
    return values


def assign_parents(
    children: NDArray[np.float64] | NDArray[np.object_], parent_shapes: NDArray[np.object_]
) -> NDArray[np.int64]:
    """The object that each child lies in: of several the smallest, of equal ones the first.

    What a parent surrounds belongs to it: holes count as its inside. So a lumen has its gland whether or not that was
    drawn through it.

    Args:
        children: (n, 2) points, or (n,) shapes in the frame of the parents. A point lies in a parent or on its border,
            a polygon by at least half of its area.
        parent_shapes: (m,) valid polygons and multipolygons.

    Returns:
        (n,) rows of ``parent_shapes``; -1 where there is none.
    """
    parents = _filled(parent_shapes)
    shapes = shapely.points(children) if children.ndim == 2 else children
    # Queries prepare the larger side once each, hence parents are asked for their children.
    parent, child = shapely.STRtree(shapes).query(parents, predicate="intersects")
    area = shapely.area(shapes)
    partial = np.flatnonzero(area[child] > 0)
    shared = shapely.area(shapely.intersection(shapes[child[partial]], parents[parent[partial]]))
    within = np.ones(len(child), np.bool_)
    within[partial] = shared >= area[child[partial]] / 2
    parent, child = parent[within], child[within]
    order = np.lexsort((parent, shapely.area(parents)[parent]))[::-1]
    assigned = np.full(len(children), -1, np.int64)
    assigned[child[order]] = parent[order]  # the smallest comes last and stays
    return assigned


def gland_measurements(
    gland_shapes: NDArray[np.object_],
    *,
    mpp: tuple[float, float],
    nucleus_parent: NDArray[np.int64] | None = None,
    lumen_parent: NDArray[np.int64] | None = None,
    lumen_area_um2: NDArray[np.floating] | None = None,
) -> NDArray[np.float32]:
    """What lies in each gland. A gland's area here is that within its outer outline, lumen included.

    Args:
        gland_shapes: (n,) polygons and multipolygons in level-0 pixels.
        mpp: Micrometres per level-0 pixel, x then y.
        nucleus_parent: (k,) the gland of each nucleus, -1 for none; None where nuclei were not looked for.
        lumen_parent: (l,) the gland of each lumen, -1 for none; None where lumina were not looked for.
        lumen_area_um2: (l,) area of each lumen.

    Returns:
        (n, 3) float32 in the order of ``GLAND_NAMES``; NaN for what was not looked for.
    """
    n = len(gland_shapes)
    area_um2 = shapely.area(_filled(gland_shapes)) * (mpp[0] * mpp[1])
    values = np.full((n, len(GLAND_NAMES)), np.nan, np.float32)
    if nucleus_parent is not None:
        count = np.bincount(nucleus_parent[nucleus_parent >= 0], minlength=n)
        values[:, 0], values[:, 1] = count, count / (area_um2 / 1e6)
    if lumen_parent is not None and lumen_area_um2 is not None:
        inside = lumen_parent >= 0
        values[:, 2] = np.bincount(lumen_parent[inside], lumen_area_um2[inside], minlength=n) / area_um2
    return values


def _filled(shapes: NDArray[np.object_]) -> NDArray[np.object_]:
    """Shapes without their holes."""
    parts, owner = shapely.get_parts(shapes, return_index=True)
    whole = shapely.polygons(shapely.get_exterior_ring(parts))
    first = np.searchsorted(owner, np.arange(len(shapes) + 1))
    filled = np.asarray(shapes, object).copy()
    single = np.diff(first) == 1
    filled[single] = whole[first[:-1][single]]
    for row in np.flatnonzero(np.diff(first) > 1).tolist():
        # A part may lie in a hole of another.
        filled[row] = shapely.union_all(whole[first[row] : first[row + 1]])
    return filled
