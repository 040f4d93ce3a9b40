"""Jittered lattices and the star-shaped cells around their points, from which glands and fat are made."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pathopipe.synth.noise import hash01

__all__ = ["BoxUm", "in_box", "in_stars", "jittered", "lattice", "square_box", "squares", "star_radius", "touches"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class BoxUm(NamedTuple):
    """A rectangle in micrometres."""

    left: float
    top: float
    right: float
    bottom: float

    def grown(self, by_um: float) -> "BoxUm":
        """The box with a margin."""
        return BoxUm(self.left - by_um, self.top - by_um, self.right + by_um, self.bottom + by_um)


def jittered(
    seed: int, stream: int, ix: Ints, iy: Ints, cell_um: float, jitter: float
) -> tuple[Floats, Floats, Floats]:
    """Points and weights of a jittered lattice, every other row shifted by half a cell: (rows, columns) each."""
    u = hash01(seed, stream, iy[:, None, None], ix[None, :, None], np.arange(3))
    x = (ix[None, :] + 0.5 + 0.25 * (1 - 2 * (iy[:, None] % 2)) + jitter * (2 * u[..., 0] - 1)) * cell_um
    y = (iy[:, None] + 0.5 + jitter * (2 * u[..., 1] - 1)) * cell_um
    return x, y, 0.7 + 0.6 * u[..., 2]


def star_radius(
    x: Floats, y: Floats, weight: Floats, largest: Floats, gap: Floats, angles: Floats, power: int
) -> Floats:
    """Radius of each inner lattice point's own cell: (rows, columns, angles).

    The cell ends at the weighted bisectors to its 24 neighbours less half the gap, and at ``largest``; the sum of
    powers is a minimum with round corners that never exceeds the true one, so cells can't overlap.
    """
    rows, columns = x.shape
    x0, y0, w0 = x[2:-2, 2:-2], y[2:-2, 2:-2], weight[2:-2, 2:-2]
    total = np.repeat((1.0 / largest**power)[..., None], len(angles), axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    for down in range(5):
        for right in range(5):
            if down == 2 and right == 2:
                continue
            view = np.s_[down : rows - 4 + down, right : columns - 4 + right]
            dx, dy = x[view] - x0, y[view] - y0
            distance = np.hypot(dx, dy)
            edge = np.maximum(distance * w0 / (w0 + weight[view]) - gap / 2, 1.0)
            toward = np.maximum(dx[..., None] * cos + dy[..., None] * sin, 0.0) / (distance * edge)[..., None]
            squared = toward * toward
            total += squared * squared * squared if power == 6 else (squared * squared) ** 2
    result: Floats = total ** (-1.0 / power)
    return result


def touches(box: BoxUm, centre: Floats, reach: Floats) -> NDArray[np.bool_]:
    """Which squares around (n, 2) centres, of half side ``reach`` (n,), meet the box."""
    x, y = centre[:, 0], centre[:, 1]
    near: NDArray[np.bool_] = (
        (x + reach > box.left) & (x - reach < box.right) & (y + reach > box.top) & (y - reach < box.bottom)
    )
    return near


def in_stars(x: Floats, y: Floats, centre: Floats, radius: Floats) -> NDArray[np.bool_]:
    """Which points lie in any of the star-shaped outlines."""
    inside = np.zeros(len(x), np.bool_)
    n_angles = radius.shape[1] if len(radius) else 1
    for (cx, cy), own in zip(centre, radius, strict=True):
        dx, dy = x - cx, y - cy
        near = np.nonzero(np.abs(dx) + np.abs(dy) < 1.4143 * own.max())[0]
        place = np.arctan2(dy[near], dx[near]) % (2 * np.pi) * (n_angles / (2 * np.pi))
        low = place.astype(np.int64)
        part = place - low
        reach = own[low % n_angles] * (1 - part) + own[(low + 1) % n_angles] * part
        inside[near] |= np.hypot(dx[near], dy[near]) < reach
    return inside


def squares(box: BoxUm, side_um: float) -> list[tuple[int, int]]:
    """Column and row of each square of a grid that the box meets."""
    columns = range(math.floor(box.left / side_um), math.floor(box.right / side_um) + 1)
    rows = range(math.floor(box.top / side_um), math.floor(box.bottom / side_um) + 1)
    return [(column, row) for row in rows for column in columns]


def lattice(square: tuple[int, int], per_side: int) -> tuple[Ints, Ints]:
    """Lattice columns and rows of a square, with two more on each side for neighbours."""
    ix, iy = (np.arange(index * per_side - 2, (index + 1) * per_side + 2) for index in square)
    return ix, iy


def in_box(box: BoxUm, x_um: Floats, y_um: Floats) -> NDArray[np.bool_]:
    """Which points lie in a box, left and top edge included."""
    inside: NDArray[np.bool_] = (x_um >= box.left) & (x_um < box.right) & (y_um >= box.top) & (y_um < box.bottom)
    return inside


def square_box(square: tuple[int, int], side_um: float) -> BoxUm:
    """The box of one square of a grid."""
    column, row = square
    return BoxUm(column * side_um, row * side_um, (column + 1) * side_um, (row + 1) * side_um)
