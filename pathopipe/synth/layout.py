"""Where glands, vessels, fat cells and nuclei lie, in micrometres: any box can be had without the rest of the slide.

Candidates sit on jittered lattices whose random numbers are hashes of the lattice cell. Whether one is drawn depends on
candidates next to it only, never on the box that was asked for.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import shapely
from numpy.typing import NDArray

from pathopipe.synth.cells import NO_NUCLEI, Nuclei, joined, without_overlaps
from pathopipe.synth.glands import GlandLattice, Glands
from pathopipe.synth.noise import Waves, hash01, smooth_step
from pathopipe.synth.outline import SlidePlan
from pathopipe.synth.shapes import FIBROBLAST, LONGEST_UM, LYMPHOCYTE, N_VARIANTS
from pathopipe.synth.stars import (
    BoxUm,
    in_box,
    in_stars,
    jittered,
    lattice,
    square_box,
    squares,
    star_radius,
    touches,
)

__all__ = ["Layout", "Scene"]

Floats = NDArray[np.float64]

_FAT_CELL_UM = 54.0
_FAT_REACH_UM = 46.0
_FAT_ANGLE = np.arange(32) * 2 * np.pi / 32
_FAT_RAYS = np.stack([np.cos(_FAT_ANGLE), np.sin(_FAT_ANGLE)], axis=1)
_NUCLEUS_CELL_UM = 6.0
# Placement is worked out for squares of this many lattice cells (about a millimetre), which many blocks share.
_FAT_A_SQUARE = 19
_NUCLEI_A_SQUARE = 160
_KEPT_SQUARES = 48
_RED_CELL_UM = 7.5
# Two nuclei that overlap lie within this, so nothing farther away can decide about a nucleus.
_HALO_UM = 2 * LONGEST_UM + 1.0


@dataclass(frozen=True, slots=True)
class Scene:
    """All that may touch one box."""

    tissue: shapely.Geometry | None
    """Tissue clipped to the box with a margin; None where tissue covers it all."""
    glands: Glands
    fat_um: list[Floats]
    """Outlines of fat cells, (angles, 2) each."""
    nuclei: Nuclei
    red_um: Floats
    """(n, 3) red cells: x, y, and a uniform number for its looks."""


class Layout:
    """Placement of everything in the tissue of one slide. Threads may share it; what it keeps is bounded."""

    def __init__(self, plan: SlidePlan, seed: int) -> None:
        self._seed = seed
        self._tissue = shapely.union_all(list(plan.tissue)) if plan.tissue else None
        short = plan.short_um
        region = float(np.clip(0.4 * short, 150.0, 2200.0))
        self.gland_field = Waves.draw(seed, 20, 0.35 * region, 1.4 * region)
        self.fat_field = Waves.draw(seed, 21, 0.4 * region, 1.2 * region)
        self.lymph_field = Waves.draw(seed, 22, min(150.0, 0.3 * region), min(700.0, region))
        self.dense_field = Waves.draw(seed, 23, 90.0, 700.0, 28)
        self.warp = (Waves.draw(seed, 24, 450.0, 1700.0), Waves.draw(seed, 25, 450.0, 1700.0))
        self.warp_um = 95.0
        self._columns = int(plan.width_um // _NUCLEUS_CELL_UM) + 1
        self._rows = int(plan.height_um // _NUCLEUS_CELL_UM) + 1
        self.gland_lattice = GlandLattice(seed, plan.width_um, plan.height_um, self.gland_field, self.fat_field)
        self._glands: _Kept[tuple[Glands, Nuclei]] = _Kept()
        self._fat: _Kept[tuple[Floats, Floats]] = _Kept()
        self._nuclei: _Kept[Nuclei] = _Kept()

    @property
    def most_nuclei(self) -> int:
        """No nucleus has an id above this."""
        return self._columns * self._rows + self.gland_lattice.most_nuclei

    @property
    def most_glands(self) -> int:
        """No gland or lumen has an id above this."""
        return self.gland_lattice.most_glands

    def local_tissue(self, box: BoxUm) -> tuple[shapely.Geometry | None, bool]:
        """Tissue in a box, and whether there is any; the geometry is None where tissue covers the box."""
        if self._tissue is None:
            return None, False
        clipped = shapely.clip_by_rect(self._tissue, *box)
        full = (box.right - box.left) * (box.bottom - box.top)
        if clipped.is_empty:
            return None, False
        return (None if clipped.area > full * (1 - 1e-9) else clipped), True

    def scene(self, box: BoxUm) -> Scene | None:
        """What may touch the box, or None where there is no tissue in it."""
        tissue, any_tissue = self.local_tissue(box)
        if not any_tissue:
            return None
        glands = self.glands(box)
        centre, radius = self._fat_cells(box)
        fat = [c + r[:, None] * _FAT_RAYS for c, r in zip(centre, radius, strict=True)]
        near = box.grown(LONGEST_UM)
        parts = [
            self._nuclei.get(s, self._nuclei_of_square) for s in squares(near, _NUCLEUS_CELL_UM * _NUCLEI_A_SQUARE)
        ]
        nuclei = joined(parts)
        nuclei = nuclei.take(in_box(near, nuclei.x_um, nuclei.y_um))
        return Scene(tissue, glands, fat, nuclei, self.gland_lattice.red_cells(glands, box.grown(_RED_CELL_UM)))

    def glands(self, box: BoxUm) -> Glands:
        """Glands and vessels that touch the box."""
        glands = Glands.joined([found for found, _ in self._glands_near(box)])
        return glands.take(touches(box, glands.centre_um, glands.radius_um.max(axis=1, initial=0.0)))

    def density(self, x_um: Floats, y_um: Floats) -> Floats:
        """How dense the stroma is, 0 to 1, on the grid of ``x_um`` (columns) and ``y_um`` (rows)."""
        # Looser near fat: the broad field gives large slides regions of their own.
        return smooth_step(self.dense_field.grid(x_um, y_um) - 0.55 * self.fat_field.grid(x_um, y_um), -1.2, 1.3)

    def fibre_direction(self, x_um: Floats, y_um: Floats) -> Floats:
        """Angle in which fibres run at points: along lines of equal v of the warped frame."""
        dx, dy = self.warp[1].slope(x_um, y_um)
        return np.arctan2(-self.warp_um * dx, 1 + self.warp_um * dy)

    # -- squares -----------------------------------------------------------------------------------------------------

    def _glands_near(self, box: BoxUm) -> list[tuple[Glands, Nuclei]]:
        own = self.gland_lattice
        near = squares(box.grown(own.REACH_UM + own.STRAY_UM), own.CELL_UM * own.CELLS_A_SQUARE)
        return [self._glands.get(square, self._glands_of_square) for square in near]

    def _glands_of_square(self, square: tuple[int, int]) -> tuple[Glands, Nuclei]:
        own = self.gland_lattice
        box = square_box(square, own.CELL_UM * own.CELLS_A_SQUARE).grown(own.REACH_UM + own.STRAY_UM + 10.0)
        tissue, any_tissue = self.local_tissue(box)
        if not any_tissue:
            # Still asked, with tissue nowhere, for a table of the right form; no square of glass is asked for often.
            tissue = shapely.Polygon()
        _prepare(tissue)
        return own.of_square(square, tissue)

    def _fat_cells(self, box: BoxUm) -> tuple[Floats, Floats]:
        """Centres (n, 2) and radii (n, angles) of fat cells that touch the box."""
        near = squares(box.grown(_FAT_REACH_UM + 0.6 * _FAT_CELL_UM), _FAT_CELL_UM * _FAT_A_SQUARE)
        parts = [self._fat.get(square, self._fat_of_square) for square in near]
        centre, radius = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        keep = touches(box, centre, radius.max(axis=1, initial=0.0))
        return centre[keep], radius[keep]

    def _fat_of_square(self, square: tuple[int, int]) -> tuple[Floats, Floats]:
        ix, iy = lattice(square, _FAT_A_SQUARE)
        box = square_box(square, _FAT_CELL_UM * _FAT_A_SQUARE)
        tissue, any_tissue = self.local_tissue(box.grown(_FAT_REACH_UM + 0.6 * _FAT_CELL_UM + 10.0))
        x, y, weight = jittered(self._seed, 40, ix, iy, _FAT_CELL_UM, 0.32)
        x0, y0 = x[2:-2, 2:-2], y[2:-2, 2:-2]
        there = self.fat_field.at(x0, y0) > 1.1
        # Only a small part of most slides is fat: leave before the geometry where there is none.
        if not any_tissue or not there.any():
            return np.zeros((0, 2)), np.zeros((0, len(_FAT_ANGLE)))
        u = hash01(self._seed, 41, iy[2:-2, None], ix[None, 2:-2])
        gap = np.full(x0.shape, 1.8)
        radius = star_radius(x, y, weight, 30.0 + 14.0 * u, gap, _FAT_ANGLE, 8)
        rows = np.nonzero(there & (u < 0.97))
        centre, radius = np.stack([x0[rows], y0[rows]], axis=-1), radius[rows]
        if tissue is not None:
            _prepare(tissue)
            edge = centre[:, None] + (radius[..., None] + 3.0) * _FAT_RAYS
            whole = shapely.contains_xy(tissue, edge[..., 0], edge[..., 1]).all(axis=1)
            centre, radius = centre[whole], radius[whole]
        return centre, radius

    def _nuclei_of_square(self, square: tuple[int, int]) -> Nuclei:
        box = square_box(square, _NUCLEUS_CELL_UM * _NUCLEI_A_SQUARE)
        wide = box.grown(_HALO_UM)
        tissue, any_tissue = self.local_tissue(wide.grown(LONGEST_UM))
        if not any_tissue:
            return NO_NUCLEI
        _prepare(tissue)
        rooms = [self._stroma_nuclei(wide, tissue)]
        for _, nuclei in self._glands_near(wide):
            rooms.append(nuclei._replace(id=nuclei.id + self._columns * self._rows))
        both = joined(rooms)
        return without_overlaps(both.take(in_box(wide, both.x_um, both.y_um)), self._seed, box)

    def _stroma_nuclei(self, box: BoxUm, tissue: shapely.Geometry | None) -> Nuclei:
        cell = _NUCLEUS_CELL_UM
        ix = np.arange(max(int(box.left // cell), 0), min(int(box.right // cell) + 1, self._columns))
        iy = np.arange(max(int(box.top // cell), 0), min(int(box.bottom // cell) + 1, self._rows))
        cx, cy = (index.astype(np.float64) * cell + 0.5 * cell for index in (ix, iy))
        lymph = smooth_step(self.lymph_field.grid(cx, cy), 0.75, 1.7)
        dense = self.density(cx, cy)
        chance = 0.040 + 0.045 * (1 - dense) + 0.62 * lymph
        rows, columns = np.nonzero(hash01(self._seed, 50, iy[:, None], ix[None, :]) < chance)
        jx, jy = ix[columns], iy[rows]
        u = hash01(self._seed, 51, jy[:, None], jx[:, None], np.arange(5))
        x, y = (jx + 0.1 + 0.8 * u[:, 0]) * cell, (jy + 0.1 + 0.8 * u[:, 1]) * cell
        is_lymph = u[:, 2] < 0.14 + 0.85 * lymph[rows, columns]
        slope = self.fibre_direction(x, y)
        angle = np.where(is_lymph, 2 * np.pi * u[:, 3], slope + 0.9 * (u[:, 3] - 0.5))
        nuclei = Nuclei(
            x,
            y,
            np.where(is_lymph, LYMPHOCYTE, FIBROBLAST),
            (u[:, 4] * N_VARIANTS).astype(np.int64),
            angle,
            1 + jy * self._columns + jx,
            np.zeros(len(x), np.int64),
        )
        glands = self.glands(box.grown(3.0))
        keep = ~in_stars(x, y, glands.centre_um, glands.radius_um + 3.0)
        keep &= ~in_stars(x, y, *self._fat_cells(box))
        if tissue is not None:
            keep &= shapely.contains_xy(tissue, x, y)
            rim = 0.9 * LONGEST_UM
            for dx, dy in ((rim, 0.0), (-rim, 0.0), (0.0, rim), (0.0, -rim)):
                keep &= shapely.contains_xy(tissue, x + dx, y + dy)
        return nuclei.take(keep)


def _prepare(tissue: shapely.Geometry | None) -> None:
    """Index a geometry for many points; it belongs to one thread."""
    if tissue is not None:
        shapely.prepare(tissue)


_T = TypeVar("_T")


class _Kept(Generic[_T]):
    """Results by square, the latest few; two threads that want the same one compute it once."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[int, int], Future[_T]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, square: tuple[int, int], compute: Callable[[tuple[int, int]], _T]) -> _T:
        with self._lock:
            future = self._found.get(square)
            mine = future is None
            if future is None:
                future = self._found[square] = Future()
                while len(self._found) > _KEPT_SQUARES:
                    self._found.popitem(last=False)
            self._found.move_to_end(square)
        if mine:
            try:
                future.set_result(compute(square))
            except BaseException as error:
                with self._lock:
                    self._found.pop(square, None)
                future.set_exception(error)
        return future.result()
