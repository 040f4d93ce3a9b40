"""Glands and blood vessels: their outlines, their own nuclei, mucin and blood."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from pathopipe.synth.cells import NO_NUCLEI, Nuclei, joined
from pathopipe.synth.noise import Waves, hash01, smooth_step
from pathopipe.synth.shapes import ENDOTHELIAL, EPITHELIAL, N_VARIANTS
from pathopipe.synth.stars import BoxUm, in_box, jittered, lattice, star_radius

__all__ = ["GLAND", "VESSEL", "GlandLattice", "Glands"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

GLAND, VESSEL = 1, 2

_ANGLE_COUNT = 80
_ANGLES = np.arange(_ANGLE_COUNT) * 2 * np.pi / _ANGLE_COUNT
_RAYS = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
_NUCLEI_A_GLAND = 384  # room in the numbering


@dataclass(frozen=True, slots=True)
class Glands:
    """Glands and vessels: star-shaped outlines given by a radius for each of equally spaced angles."""

    id: Ints
    """(n,) lattice number, from 1."""
    kind: Ints
    """(n,) ``GLAND`` or ``VESSEL``."""
    centre_um: Floats
    """(n, 2)"""
    radius_um: Floats
    """(n, angles) outer outline."""
    lumen_um: Floats
    """(n, angles) outline of the lumen; 0 where there is none."""
    mucin: Floats
    """(n,) how full of mucin the epithelium is, 0 to 1."""
    empty: Floats
    """(n,) how clear the lumen is, 0 to 1; less where there is secretion."""

    def take(self, index: NDArray[np.bool_]) -> "Glands":
        """A selection."""
        return Glands(*(getattr(self, column.name)[index] for column in dataclasses.fields(self)))

    @staticmethod
    def joined(parts: "list[Glands]") -> "Glands":
        """All of some, in order; at least one part."""
        columns = [column.name for column in dataclasses.fields(Glands)]
        return Glands(*(np.concatenate([getattr(part, name) for part in parts]) for name in columns))

    def outline_um(self, index: int, radius_um: Floats | None = None) -> Floats:
        """(angles, 2) points of one outline."""
        radius = self.radius_um[index] if radius_um is None else radius_um
        points: Floats = self.centre_um[index] + radius[:, None] * _RAYS
        return points


class GlandLattice:
    """Candidates on a jittered lattice; a function of the seed and the two broad fields."""

    CELL_UM = 116.0
    CELLS_A_SQUARE = 9
    """Placement is worked out for squares of this many lattice cells, about a millimetre, which many blocks share."""
    REACH_UM = 100.0
    """No gland reaches farther than this from its lattice point."""
    STRAY_UM = 0.6 * CELL_UM
    """How far a lattice point can be from its lattice cell."""

    def __init__(self, seed: int, width_um: float, height_um: float, gland_field: Waves, fat_field: Waves) -> None:
        self._seed, self._gland_field, self._fat_field = seed, gland_field, fat_field
        self._columns, self._rows = int(width_um // self.CELL_UM) + 1, int(height_um // self.CELL_UM) + 1

    @property
    def most_glands(self) -> int:
        """No gland has a number above this."""
        return self._columns * self._rows

    @property
    def most_nuclei(self) -> int:
        """No gland's nucleus has a number above this, before the caller's own are added."""
        return (self.most_glands + 1) * _NUCLEI_A_GLAND

    def of_square(self, square: tuple[int, int], tissue: shapely.Geometry | None) -> tuple[Glands, Nuclei]:
        """Glands and vessels whose lattice cell is in a square, and their nuclei as far as their own shape goes.

        ``tissue`` covers the square and all that its glands can reach; None where that is tissue all over.
        """
        ix, iy = lattice(square, self.CELLS_A_SQUARE)
        x, y, weight = jittered(self._seed, 30, ix, iy, self.CELL_UM, 0.30)
        ix, iy = ix[2:-2], iy[2:-2]
        x0, y0 = x[2:-2, 2:-2], y[2:-2, 2:-2]
        u = hash01(self._seed, 31, iy[:, None, None], ix[None, :, None], np.arange(8))  # (rows, columns, draws)
        fat = self._fat_field.at(x0, y0) > 0.95
        is_gland = (u[..., 0] < smooth_step(self._gland_field.at(x0, y0), -0.6, 0.0)) & ~fat
        is_vessel = ~is_gland & (u[..., 0] > 0.80) & ~fat
        there = (is_gland | is_vessel) & ((ix >= 0) & (ix < self._columns)) & ((iy >= 0) & (iy < self._rows))[:, None]
        largest = np.where(is_gland, 46.0 + 46.0 * u[..., 1], 10.0 + 20.0 * u[..., 1] ** 2)
        gap = np.where(is_gland, 3.0 + 9.0 * u[..., 2], 6.0)
        radius = star_radius(x, y, weight, largest, gap, _ANGLES, 6)
        ripple = hash01(self._seed, 32, iy[:, None, None], ix[None, :, None], np.arange(14))
        wave = np.zeros_like(radius)
        for k, order in enumerate((2, 3, 4, 5, 7, 9)):
            wave += (ripple[..., k, None] * 0.55 / order) * np.cos(order * _ANGLES + 6.28 * ripple[..., 6 + k, None])
        radius *= 1 - 0.4 * np.abs(wave)  # never larger, or neighbours would overlap
        there &= radius.mean(axis=-1) > np.where(is_gland, 24.0, 7.0)
        thick = np.where(is_gland, 17.0 + 17.0 * u[..., 3], 2.5 + 2.5 * u[..., 3])
        lumen = radius - thick[..., None] * (1 + 0.5 * wave)
        for order, height, k in ((23, 0.6, 12), (31, 0.5, 13)):
            lumen += is_gland[..., None] * height * np.cos(order * _ANGLES + 6.28 * ripple[..., k, None])
        is_open = lumen.mean(axis=-1) > np.where(is_gland, 6.0, 3.0)
        lumen = np.where(is_open[..., None], np.maximum(lumen, 2.0), 0.0)
        number = iy[:, None] * self._columns + ix + 1
        secretion = is_gland & (u[..., 5] < 0.35)
        glands = Glands(
            id=number[there],
            kind=np.where(is_gland, GLAND, VESSEL)[there],
            centre_um=np.stack([x0[there], y0[there]], axis=-1),
            radius_um=radius[there],
            lumen_um=lumen[there],
            mucin=smooth_step(u[..., 4], 0.4, 0.9)[there],
            empty=np.where(secretion, 0.45 + 1.3 * u[..., 5], 0.96)[there],
        )
        if tissue is not None:
            edge = glands.centre_um[:, None] + (glands.radius_um[..., None] + 4.0) * _RAYS
            glands = glands.take(shapely.contains_xy(tissue, edge[..., 0], edge[..., 1]).all(axis=1))
        own = [NO_NUCLEI]
        for index, kind in enumerate(glands.kind.tolist()):
            own.append(self._epithelium(glands, index) if kind == GLAND else self._endothelium(glands, index))
        return glands, joined(own)

    def _epithelium(self, glands: Glands, index: int) -> Nuclei:
        """Nuclei along the base of a gland, in further rows where the epithelium is thick or there is no lumen."""
        radius, lumen = glands.radius_um[index], glands.lumen_um[index]
        mean_um, hollow = float(radius.mean()), bool(lumen.any())
        outline = glands.outline_um(index)
        step = np.roll(outline, -1, axis=0) - outline
        along = np.concatenate([[0.0], np.cumsum(np.hypot(step[:, 0], step[:, 1]))])
        n = min(int(along[-1] / 6.5), _NUCLEI_A_GLAND // 2)
        k = np.arange(n)
        u = self._draws(glands, index, k)
        place = (k + 0.5 + 0.2 * (u[:, 0] - 0.5)) / n * along[-1]
        angle = np.interp(place, along, np.append(_ANGLES, 2 * np.pi))
        rows = [(angle, 5.6 + 2.6 * u[:, 1] ** 2, angle + 0.3 * (u[:, 2] - 0.5), u, k)]
        reach = float((radius - lumen).mean()) - 6.0 if hollow else mean_um - 4.0
        depth, start = 16.0, n
        while depth < reach and start < _NUCLEI_A_GLAND:
            m = max(int(n * (1 - depth / mean_um) * (0.75 if hollow else 0.9)), 1)
            k = np.arange(start, min(start + m, _NUCLEI_A_GLAND))
            u = self._draws(glands, index, k)
            angle = (k - start + u[:, 0]) * 2 * np.pi / m
            rows.append((angle, depth + 4.0 * u[:, 1], angle + 1.2 * (u[:, 2] - 0.5), u, k))
            depth, start = depth + 10.5, start + m
        angle, inward, turn, u, k = (np.concatenate(column) for column in zip(*rows, strict=True))
        distance = _at(radius, angle) - inward
        fits = (distance > 0) & (distance > _at(lumen, angle) + (4.0 if hollow else 0.0))
        parent = np.full(len(k), glands.id[index])
        return self._nuclei(glands, index, EPITHELIAL, angle, distance, turn, u, k, parent).take(fits)

    def _endothelium(self, glands: Glands, index: int) -> Nuclei:
        """Flat nuclei along the wall of a vessel."""
        k = np.arange(max(int(2 * np.pi * float(glands.radius_um[index].mean()) / 15.0), 2))
        u = self._draws(glands, index, k)
        angle = (k + 0.4 * u[:, 0]) * 2 * np.pi / len(k)
        distance = _at(glands.radius_um[index], angle) - 1.9
        parent = np.zeros(len(k), np.int64)
        return self._nuclei(glands, index, ENDOTHELIAL, angle, distance, angle + np.pi / 2, u, k, parent)

    def _draws(self, glands: Glands, index: int, k: Ints) -> Floats:
        return hash01(self._seed, 60, glands.id[index : index + 1], k[:, None], np.arange(5))

    def _nuclei(
        self,
        glands: Glands,
        index: int,
        kind: int,
        angle: Floats,
        distance: Floats,
        turn: Floats,
        u: Floats,
        k: Ints,
        parent: Ints,
    ) -> Nuclei:
        x, y = glands.centre_um[index]
        return Nuclei(
            x_um=x + distance * np.cos(angle),
            y_um=y + distance * np.sin(angle),
            kind=np.full(len(k), kind),
            variant=(u[:, 4] * N_VARIANTS).astype(np.int64),
            angle=turn,
            id=glands.id[index] * _NUCLEI_A_GLAND + k,
            parent=parent,
        )

    def goblets(self, glands: Glands, index: int) -> list[tuple[float, float, float]]:
        """Mucin-filled cells of one gland: x, y and radius in micrometres."""
        lumen, radius, mucin = glands.lumen_um[index], glands.radius_um[index], float(glands.mucin[index])
        n = int(2 * np.pi * float(lumen.mean()) / 8.0 * mucin)
        if n < 3:
            return []
        u = hash01(self._seed, 33, glands.id[index : index + 1], np.arange(n)[:, None], np.arange(3))
        angle = (np.arange(n) + 0.8 * u[:, 0]) * 2 * np.pi / n
        size = 2.2 + 2.2 * u[:, 1]
        distance = _at(lumen, angle) + size + 0.5 + 2.0 * u[:, 2]
        fits = (distance + size + 8.5 < _at(radius, angle)) & (u[:, 1] < 0.9)
        x = glands.centre_um[index, 0] + distance * np.cos(angle)
        y = glands.centre_um[index, 1] + distance * np.sin(angle)
        return list(zip(x[fits].tolist(), y[fits].tolist(), size[fits].tolist(), strict=True))

    def red_cells(self, glands: Glands, box: BoxUm) -> Floats:
        """Red cells in the vessels among ``glands`` with their centre in a box: (n, 3) x, y, and a draw for looks."""
        found = [np.zeros((0, 3))]
        for index in np.nonzero(glands.kind == VESSEL)[0].tolist():
            lumen, number = glands.lumen_um[index], glands.id[index : index + 1]
            fill = max(float(hash01(self._seed, 70, number)[0]) - 0.25, 0.0)
            n = int(fill * 0.045 * float(lumen.mean()) ** 2)
            u = hash01(self._seed, 71, number, np.arange(n)[:, None], np.arange(3))
            angle = 2 * np.pi * u[:, 0]
            distance = np.sqrt(u[:, 1]) * np.maximum(_at(lumen, angle) - 2.5, 0.0)
            x = glands.centre_um[index, 0] + distance * np.cos(angle)
            y = glands.centre_um[index, 1] + distance * np.sin(angle)
            found.append(np.stack([x, y, u[:, 2]], axis=1))
        red = np.concatenate(found)
        return red[in_box(box, red[:, 0], red[:, 1])]


def _at(radius_um: Floats, angle: Floats) -> Floats:
    """An outline's radius at any angles."""
    result: Floats = np.interp(angle, _ANGLES, radius_um, period=2 * np.pi)
    return result
