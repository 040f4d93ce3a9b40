"""Grounds of training fields: stroma, muscle, fat, lymphoid tissue, cell sheets, blood, mucin, necrosis and glass.

Each ground draws on the whole canvas and gives its nuclei; ``field`` keeps what lies in the ground's part of the field.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.synth.field_canvas import Canvas, Floats, Plane, fibres, grid_points, soft
from pathopipe.synth.field_nuclei import LOOKS, Nuclei, make_nuclei, with_figures

__all__ = ["GROUNDS", "Ground", "cells_around", "draw_ground", "red_cells", "thinned"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What a ground leaves: densities on the whole canvas, other absorption, and nuclei."""

    haem: Plane
    eosin: Plane
    other: NDArray[np.float32] | None
    nuclei: list[Nuclei]


def draw_ground(canvas: Canvas, name: str) -> Ground:
    """Draw one of ``GROUNDS`` on the whole canvas."""
    return GROUNDS[name](canvas)


def thinned(canvas: Canvas, x: Floats, y: Floats, share: float, patchy: float = 0.8) -> tuple[Floats, Floats]:
    """Keep about ``share`` of the points, in patches rather than evenly."""
    patches = canvas.at(canvas.noise(canvas.rng.uniform(15, 60)), x, y)
    chance = share * np.exp(patchy * patches)
    keep = canvas.rng.random(len(x)) < chance
    return x[keep], y[keep]


def cells_around(canvas: Canvas, x: Floats, y: Floats) -> tuple[NDArray[np.int32], Plane, Plane]:
    """Cells as the pixels nearest to each nucleus, their edges made a little wavy.

    Returns:
        The row of the nearest nucleus, distance to it in px, and the distance to the cell's edge in px.
    """
    seeds = np.ones((canvas.side, canvas.side), np.uint8)
    inside = (x >= 0) & (x < canvas.side) & (y >= 0) & (y < canvas.side)
    rows = np.flatnonzero(inside)
    if not len(rows):
        far = np.full(seeds.shape, 1e3, np.float32)
        return np.zeros(seeds.shape, np.int32), far, far
    column, line = x[rows].astype(np.intp), y[rows].astype(np.intp)
    seeds[line, column] = 0
    distance, label = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    owner = np.zeros(int(label.max()) + 1, np.int32)
    owner[label[line, column]] = rows
    cell = owner[label]
    alone = np.ones(seeds.shape, np.uint8)
    alone[:, 1:] &= cell[:, 1:] == cell[:, :-1]
    alone[1:] &= cell[1:] == cell[:-1]
    edge = cv2.distanceTransform(alone, cv2.DIST_L2, 3)
    return cell, distance, np.minimum(edge, np.float32(canvas.side))  # one cell alone has no edge


def red_cells(canvas: Canvas, x: Floats, y: Floats) -> Plane:
    """Density (0 to 1) of red cells at the points: discs with a paler middle, some bent or cut."""
    rng = canvas.rng
    radius = rng.uniform(2.6, 3.7) * canvas.px_per_um
    plane = np.zeros((canvas.side, canvas.side), np.uint8)
    hollow = rng.uniform(0.45, 1.0)
    for row in range(len(x)):
        axes = radius * rng.uniform(0.7, 1.1, 2)
        centre, turn = (float(x[row]), float(y[row])), float(rng.uniform(0, 180))
        size = (2 * float(axes[0]), 2 * float(axes[1]))
        cv2.ellipse(plane, (centre, size, turn), 255 - int(rng.integers(60)), -1)
        if hollow < 0.9:
            cv2.ellipse(plane, (centre, (size[0] * 0.5, size[1] * 0.5), turn), int(230 * hollow), -1)
    return soft(plane, 0.35 * canvas.px_per_um) * np.float32(1 / 255)


def _fibrous(canvas: Canvas, *, density: float, contrast: float, gaps: float) -> tuple[Plane, Plane, float, Plane]:
    """Eosin of fibres, clear gaps between them (0 to 1), their direction and the wave they follow."""
    rng = canvas.rng
    angle = rng.uniform(0, np.pi)
    wave_scale = rng.uniform(12, 60)
    wave, wave_um = canvas.noise(wave_scale), wave_scale * rng.uniform(0.02, 0.18)
    width = rng.uniform(0.8, 3.0)
    fine = fibres(canvas, across_um=width, along_um=width * rng.uniform(6, 20), angle=angle, wave_um=wave_um, wave=wave)
    broad = fibres(
        canvas,
        across_um=width * rng.uniform(2.5, 5),
        along_um=width * rng.uniform(15, 50),
        angle=angle,
        wave_um=wave_um,
        wave=wave,
    )
    threads = fibres(
        canvas, across_um=width * 0.45, along_um=width * rng.uniform(4, 15), angle=angle, wave_um=wave_um, wave=wave
    )
    grain = canvas.noise(rng.uniform(0.35, 0.8))
    rough = rng.uniform(0.3, 1.0)
    eosin = density * np.exp(contrast * (0.4 * fine + 0.5 * broad + rough * (0.4 * threads + 0.3 * grain)))
    clear = np.clip((broad + 0.5 * fine + 0.3 * threads + gaps) * rng.uniform(1.0, 4.0), 0, 1)
    # Thin clefts where one bundle lies beside the next.
    clear *= 1 - np.float32(rng.uniform(0, 0.6)) * np.exp(-((broad / np.float32(rng.uniform(0.08, 0.25))) ** 2))
    return eosin.astype(np.float32), clear.astype(np.float32), angle, wave


def _stromal_nuclei(canvas: Canvas, angle: float, spacing_um: float, share: float, kind: str = "Fibroblast") -> Nuclei:
    rng = canvas.rng
    x, y = grid_points(canvas, spacing_um * canvas.px_per_um, 0.35, 8 * canvas.px_per_um)
    x, y = thinned(canvas, x, y, share)
    if kind == "Muscle":
        size, aspect, blunt = rng.uniform(5, 9), rng.uniform(3, 6), rng.uniform(0.75, 1.0)
    else:
        size, aspect, blunt = rng.uniform(4, 9), rng.uniform(1.6, 5.5), rng.uniform(0.9, 1.2)
    look = str(rng.choice(["dense", "granular", "washed", "smudged", "vesicular"], p=[0.35, 0.27, 0.12, 0.13, 0.13]))
    return make_nuclei(
        canvas,
        x,
        y,
        kind=kind,
        look=look,
        diameter_um=size,
        aspect=aspect,
        spread=0.2,
        blunt=blunt,
        angle=angle + rng.normal(0, rng.uniform(0.08, 0.6), len(x)),
        bend=rng.uniform(0, 0.9),
        rough=rng.uniform(0.02, 0.1),
        halo_um=rng.uniform(0, 1.2) if rng.random() < 0.25 else 0.0,
        defocus=rng.uniform(0, 0.3),
    )


def immune_cells(canvas: Canvas, x: Floats, y: Floats) -> list[Nuclei]:
    """Lymphocytes with some plasma cells and granulocytes among them, at the points."""
    rng = canvas.rng
    luck = rng.random(len(x))
    plasma, granular = rng.choice([0.0, 0.1, 0.4], 2, p=[0.5, 0.35, 0.15])
    size = rng.uniform(4.8, 8.0)
    look = str(rng.choice(["dense", "clumped", "granular"], p=[0.4, 0.45, 0.15]))
    groups = []
    kinds = [("Plasma cell", luck < plasma), ("Granulocyte", luck > 1 - granular)]
    kinds.append(("Lymphocyte", (luck >= plasma) & (luck <= 1 - granular)))
    for kind, chosen in kinds:
        groups.append(
            make_nuclei(
                canvas, x[chosen], y[chosen], kind=kind, look="clumped" if kind == "Plasma cell" else look,
                diameter_um=size * (1.1 if kind == "Plasma cell" else 1.0), aspect=1.15, spread=0.1, rough=0.05,
                lobes=0.35 if kind == "Granulocyte" else 0.0,
                halo_um=rng.uniform(0, 1.0) if rng.random() < 0.4 else 0.0, defocus=rng.uniform(0, 0.2),
            )
        )  # fmt: skip
    return groups


def _stroma(canvas: Canvas) -> Ground:
    rng = canvas.rng
    loose = rng.random()
    eosin, clear, angle, _ = _fibrous(
        canvas, density=rng.uniform(0.15, 0.55), contrast=rng.uniform(0.1, 0.6), gaps=rng.uniform(0.4, 3.0)
    )
    floor = rng.beta(1.2, 1.8)
    eosin *= floor + (1 - floor) * clear
    haem = np.float32(rng.uniform(0, 0.16)) * clear * (1 + 0.3 * canvas.noise(10))
    spindles = _stromal_nuclei(canvas, angle, rng.uniform(9, 22), rng.uniform(0.2, 0.9))
    held = canvas.at(clear, spindles.x, spindles.y) > 0.45
    nuclei = [spindles.take(held | (rng.random(len(spindles)) < 0.15))]
    if rng.random() < 0.6:
        x, y = grid_points(canvas, rng.uniform(7, 16) * canvas.px_per_um, 0.3, 5 * canvas.px_per_um)
        nuclei += immune_cells(canvas, *thinned(canvas, x, y, 0.3 * loose**2, 1.5))
    return Ground(haem=haem.astype(np.float32), eosin=eosin, other=None, nuclei=nuclei)


def _mucosa(canvas: Canvas) -> Ground:
    """Loose tissue between glands: spindles and immune cells of many kinds in a pale meshwork."""
    rng, scale = canvas.rng, canvas.px_per_um
    eosin, clear, angle, _ = _fibrous(
        canvas, density=rng.uniform(0.1, 0.35), contrast=rng.uniform(0.2, 0.7), gaps=rng.uniform(0.0, 1.5)
    )
    mesh = np.clip(0.75 + rng.uniform(0.1, 0.5) * canvas.noise(rng.uniform(1.5, 5)), 0, 1.5)
    eosin *= (0.35 + 0.65 * clear) * mesh
    haem = np.float32(rng.uniform(0, 0.2)) * mesh * clear
    x, y = grid_points(canvas, rng.uniform(6.5, 13) * scale, 0.3, 5 * scale)
    x, y = thinned(canvas, x, y, rng.uniform(0.3, 0.9), 0.5)
    nuclei = [_stromal_nuclei(canvas, angle, rng.uniform(10, 22), rng.uniform(0.2, 0.6)), *immune_cells(canvas, x, y)]
    return Ground(haem=haem.astype(np.float32), eosin=eosin.astype(np.float32), other=None, nuclei=nuclei)


def _muscle(canvas: Canvas) -> Ground:
    rng = canvas.rng
    eosin, clear, angle, wave = _fibrous(
        canvas, density=rng.uniform(0.3, 0.7), contrast=rng.uniform(0.08, 0.3), gaps=rng.uniform(1.5, 3.5)
    )
    eosin *= 0.3 + 0.7 * clear
    if rng.random() < 0.3:  # cross-striation
        cross = fibres(
            canvas, across_um=rng.uniform(0.8, 1.3), along_um=8, angle=angle + np.pi / 2, wave_um=1, wave=wave
        )
        eosin *= 1 + np.float32(rng.uniform(0.05, 0.2)) * cross
    haem = np.full_like(eosin, rng.uniform(0, 0.1))
    nuclei = _stromal_nuclei(canvas, angle, rng.uniform(10, 20), rng.uniform(0.3, 1.0), "Muscle")
    return Ground(haem=haem, eosin=eosin, other=None, nuclei=[nuclei])


def _fat(canvas: Canvas) -> Ground:
    rng, scale = canvas.rng, canvas.px_per_um
    x, y = grid_points(canvas, rng.uniform(25, 90) * scale, rng.uniform(0.08, 0.2), 60 * scale)
    inside = (x > 0) & (x < canvas.side) & (y > 0) & (y < canvas.side)
    if inside.sum() < 2:
        x, y = rng.uniform(0, canvas.side, 3), rng.uniform(0, canvas.side, 3)
    _, _, edge = cells_around(canvas, x, y)
    edge = edge + canvas.noise(8) * np.float32(0.35 * scale)
    wall = np.exp(-((edge / np.float32(rng.uniform(0.5, 2.2) * scale)) ** 2))
    eosin = wall * np.float32(rng.uniform(0.15, 0.5))
    spots_x, spots_y = grid_points(canvas, 9 * scale, 0.3, 0)
    on_wall = canvas.at(edge, spots_x, spots_y) < 2.0 * scale
    spots_x, spots_y = spots_x[on_wall], spots_y[on_wall]
    keep = rng.random(len(spots_x)) < rng.uniform(0.1, 0.5)
    even = cv2.GaussianBlur(edge, (0, 0), 3)
    slope_x, slope_y = (canvas.at(cv2.Sobel(even, cv2.CV_32F, *d), spots_x, spots_y) for d in ((1, 0), (0, 1)))
    along = np.arctan2(slope_y, slope_x).astype(np.float64) + np.pi / 2
    nuclei = make_nuclei(
        canvas, spots_x[keep], spots_y[keep], kind="Fibroblast", look="dense", diameter_um=rng.uniform(4, 6.5),
        aspect=rng.uniform(1.5, 4), angle=along[keep], bend=0.5,
    )  # fmt: skip
    return Ground(haem=0.08 * wall, eosin=eosin, other=None, nuclei=[nuclei])


def _lymphoid(canvas: Canvas) -> Ground:
    rng, scale = canvas.rng, canvas.px_per_um
    spacing = rng.uniform(6.0, 10.0)
    x, y = grid_points(canvas, spacing * scale, rng.uniform(0.12, 0.3), 6 * scale)
    keep = rng.random(len(x)) < rng.uniform(0.7, 1.0)
    nuclei = immune_cells(canvas, x[keep], y[keep])
    if rng.random() < 0.5:  # germinal centre cells, macrophages
        big_x, big_y = grid_points(canvas, rng.uniform(14, 30) * scale, 0.3, 6 * scale)
        big_x, big_y = thinned(canvas, big_x, big_y, 0.5, 1.0)
        nuclei.append(
            make_nuclei(
                canvas, big_x, big_y, kind="Lymphocyte", look=str(rng.choice(["vesicular", "granular"])),
                diameter_um=rng.uniform(7, 12), aspect=1.25, rough=0.06, halo_um=rng.uniform(0, 1.5),
            )
        )  # fmt: skip
    _, _, edge = cells_around(canvas, x, y)
    clear = np.clip(1 - np.exp(-((edge / np.float32(0.7 * scale)) ** 2)) * np.float32(rng.uniform(0.0, 1.0)), 0, 1)
    noise = canvas.noise(rng.uniform(1.5, 5))
    eosin = np.float32(rng.uniform(0.05, 0.3)) * clear * (1 + np.float32(rng.uniform(0.1, 0.5)) * noise)
    haem = np.float32(rng.uniform(0.0, 0.2)) * clear * (1 + 0.3 * noise)
    return Ground(haem=np.maximum(haem, 0), eosin=np.maximum(eosin, 0), other=None, nuclei=nuclei)


def _sheet(canvas: Canvas) -> Ground:
    """A sheet of cells with cytoplasm and borders: epithelium, hepatocytes, tumours of any origin."""
    rng, scale = canvas.rng, canvas.px_per_um
    diameter = float(np.exp(rng.uniform(np.log(4.8), np.log(18))))
    look = str(rng.choice(list(_SHEET_LOOKS), p=list(_SHEET_LOOKS.values())))
    spacing = diameter * (1.05 + rng.gamma(1.5, 0.35))
    x, y = grid_points(canvas, spacing * scale, rng.uniform(0.1, 0.3), diameter * scale)
    keep = rng.random(len(x)) < rng.uniform(0.75, 1.0)
    x, y = x[keep], y[keep]
    aligned = rng.random() < 0.4
    angle = rng.uniform(0, np.pi) + rng.normal(0, 0.35, len(x)) if aligned else None
    atypia = rng.beta(1, 2.5)
    nuclei = make_nuclei(
        canvas, x, y, kind="Epithelial", look=look, diameter_um=diameter, aspect=1 + rng.gamma(1.5, 0.25), angle=angle,
        spread=0.06 + 0.3 * atypia, rough=0.02 + 0.1 * atypia, bend=0.5 * atypia * rng.random(),
        halo_um=rng.uniform(0.3, 1.5) if rng.random() < 0.15 else 0.0, defocus=rng.uniform(0, 0.4) * rng.random(),
    )  # fmt: skip
    if rng.random() < 0.5:
        nuclei = with_figures(canvas, nuclei, rng.uniform(0, 0.12), rng.uniform(0, 0.08))
    haem, eosin = _cytoplasm(canvas, x, y, spacing)
    groups = [nuclei]
    if rng.random() < 0.3:
        ix, iy = grid_points(canvas, 12 * scale, 0.35, 5 * scale)
        groups += immune_cells(canvas, *thinned(canvas, ix, iy, 0.12, 1.2))
    return Ground(haem=haem, eosin=eosin, other=None, nuclei=groups)


_SHEET_LOOKS = {
    "granular": 0.25, "vesicular": 0.3, "washed": 0.13, "dense": 0.12, "smudged": 0.08, "hollow": 0.06, "clumped": 0.06,
}  # fmt: skip


def _cytoplasm(canvas: Canvas, x: Floats, y: Floats, spacing_um: float) -> tuple[Plane, Plane]:
    """Densities of cells around the points: level of each cell, grain, borders dark or clear, clear or dark cells."""
    rng, scale = canvas.rng, canvas.px_per_um
    cell, distance, edge = cells_around(canvas, x, y)
    vary = np.exp(rng.normal(0, rng.uniform(0.03, 0.25), max(len(x), 1))).astype(np.float32)[cell]
    grain = 1 + np.float32(rng.uniform(0.03, 0.35)) * canvas.noise(rng.uniform(0.4, 1.5))
    grain += np.float32(rng.uniform(0.0, 0.3)) * canvas.noise(rng.uniform(2, 6))
    eosin = np.float32(rng.uniform(0.08, 0.55)) * vary * grain
    haem = np.float32(rng.uniform(0.0, 0.4) * np.sqrt(rng.random())) * vary * grain
    style = rng.choice(["plain", "dark", "clear", "foamy"], p=[0.35, 0.25, 0.25, 0.15])
    line = np.exp(-((edge / np.float32(rng.uniform(0.25, 0.9) * scale)) ** 2))
    if style == "dark":
        eosin += line * np.float32(rng.uniform(0.1, 0.4))
    elif style == "clear":
        line *= np.clip(0.8 + 0.6 * canvas.noise(10), 0, 1)
        eosin *= 1 - line * np.float32(rng.uniform(0.4, 1.0))
        haem *= 1 - line
    elif style == "foamy":
        bubbles = np.clip(canvas.noise(rng.uniform(1.0, 3.0)) * 2, 0, 1) * np.clip(
            distance / (0.3 * spacing_um * scale), 0, 1
        )
        eosin *= 1 - bubbles * np.float32(rng.uniform(0.4, 0.95))
        haem *= 1 - bubbles
    return np.maximum(haem, 0).astype(np.float32), np.maximum(eosin, 0).astype(np.float32)


def _squamous(canvas: Canvas) -> Ground:
    """Layered epithelium: small dark nuclei at one side, large and flat ones and keratin at the other."""
    rng, scale = canvas.rng, canvas.px_per_um
    turn = rng.uniform(0, 2 * np.pi)
    half = canvas.side / 2
    thickness = rng.uniform(60, 180) * scale
    start = rng.uniform(-0.2, 0.4)
    spacing = rng.uniform(7, 13)
    x, y = grid_points(canvas, spacing * scale, 0.18, 8 * scale)
    wave = canvas.noise(40)

    def height(px: Floats, py: Floats) -> Floats:
        along = ((px - half) * np.cos(turn) + (py - half) * np.sin(turn)) / thickness + 0.5 + start
        return np.asarray(along + 0.1 * canvas.at(wave, px, py))

    h = np.clip(height(x, y), 0, 1.3)
    keep = (rng.random(len(x)) < 1.05 - 0.35 * h) & (h < 1.05)
    x, y, h = x[keep], y[keep], h[keep]
    groups = []
    look = str(rng.choice(["granular", "vesicular", "dense"]))
    size = spacing * rng.uniform(0.6, 0.85)
    for low, high in ((0.0, 0.25), (0.25, 0.65), (0.65, 1.1)):
        part = (h >= low) & (h < high)
        flat = low > 0.6
        groups.append(
            make_nuclei(
                canvas, x[part], y[part], kind="Epithelial", look="dense" if flat else look,
                diameter_um=size * (0.8 if flat else 1), aspect=1.5 if low == 0 else 2.2 if flat else 1.15,
                angle=turn + (np.pi / 2 if flat else 0) + rng.normal(0, 0.3, int(part.sum())),
                halo_um=rng.uniform(0, 1.2),
            )
        )  # fmt: skip
    haem, eosin = _cytoplasm(canvas, x, y, spacing)
    grid = np.arange(canvas.side, dtype=np.float32) - np.float32(half)
    plane = (grid[None, :] * np.float32(np.cos(turn)) + grid[:, None] * np.float32(np.sin(turn))) / np.float32(
        thickness
    )
    plane += np.float32(0.5 + start) + 0.1 * wave
    layers = fibres(canvas, across_um=2.5, along_um=40, angle=turn + np.pi / 2, wave_um=4, wave=wave)
    keratin = np.clip((plane - 1.0) * 8, 0, 1)
    flakes = np.clip(0.9 + layers * rng.uniform(0.2, 1.2), 0, 2) * np.float32(rng.uniform(0.3, 0.8))
    eosin = eosin * (1 - keratin) + keratin * flakes
    return Ground(
        haem=(haem * (1 - keratin)).astype(np.float32), eosin=eosin.astype(np.float32), other=None, nuclei=groups
    )


def _smear(canvas: Canvas) -> Ground:
    """Loose cells on an even ground, as in imprints, bone marrow and sections without counterstain."""
    rng, scale = canvas.rng, canvas.px_per_um
    diameter = float(np.exp(rng.uniform(np.log(4.8), np.log(18))))
    x, y = grid_points(canvas, diameter * rng.uniform(1.0, 2.2) * scale, 0.3, diameter * scale)
    x, y = thinned(canvas, x, y, rng.uniform(0.15, 0.9), rng.uniform(0, 1.5))
    groups = []
    part = rng.integers(0, 3, len(x))
    for number in range(3):
        look = str(rng.choice(list(LOOKS)))
        chosen = part == number
        groups.append(
            make_nuclei(
                canvas, x[chosen], y[chosen], kind="Lymphocyte" if diameter < 7 else "Epithelial", look=look,
                diameter_um=diameter * float(rng.uniform(0.75, 1.3)), aspect=1 + rng.gamma(1.5, 0.2), spread=0.15,
                rough=rng.uniform(0.02, 0.12), lobes=0.3 if rng.random() < 0.2 else 0.0, bend=rng.uniform(0, 0.6),
                defocus=rng.uniform(0, 0.4) * rng.random(),
            )
        )  # fmt: skip
    around = np.zeros((canvas.side, canvas.side), np.float32)
    if len(x) and rng.random() < 0.6:
        _, distance, _ = cells_around(canvas, x, y)
        around = np.clip(1.5 - distance / np.float32(diameter * scale * rng.uniform(0.7, 1.1)), 0, 1)
    eosin = np.float32(rng.uniform(0, 0.25)) * around + np.float32(rng.uniform(0, 0.12))
    haem = np.float32(rng.uniform(0, 0.2)) * around + np.float32(rng.uniform(0, 0.05))
    streaks = fibres(canvas, across_um=2, along_um=50, angle=rng.uniform(0, 3), wave_um=6, wave=canvas.noise(30))
    return Ground(haem=haem, eosin=eosin * (1 + 0.15 * streaks), other=None, nuclei=groups)


def _blood(canvas: Canvas) -> Ground:
    rng, scale = canvas.rng, canvas.px_per_um
    x, y = grid_points(canvas, rng.uniform(5.5, 9) * scale, 0.25, 5 * scale)
    red = red_cells(canvas, x, y)
    other = red[..., None] * np.asarray(canvas.red_cell, np.float32)
    wx, wy = thinned(canvas, *grid_points(canvas, 25 * scale, 0.3, 0), rng.uniform(0, 0.4))
    plain = np.full_like(red, rng.uniform(0, 0.15))
    return Ground(haem=np.zeros_like(red), eosin=plain, other=other, nuclei=immune_cells(canvas, wx, wy))


def _mucin(canvas: Canvas) -> Ground:
    rng, scale = canvas.rng, canvas.px_per_um
    wisps = fibres(
        canvas, across_um=rng.uniform(1.5, 5), along_um=rng.uniform(20, 60), angle=rng.uniform(0, np.pi),
        wave_um=rng.uniform(2, 6), wave=canvas.noise(rng.uniform(20, 50)),
    )  # fmt: skip
    wisps = rng.uniform(0.1, 0.5) * wisps + 0.4 * canvas.noise(rng.uniform(4, 20)) + 0.15 * canvas.noise(0.8)
    haem = np.clip(0.08 + 0.06 * wisps, 0, 0.5) * np.float32(rng.uniform(0.4, 2.0))
    eosin = np.clip(0.05 + 0.04 * canvas.noise(10), 0, 1)
    x, y = thinned(canvas, *grid_points(canvas, 20 * scale, 0.35, 0), rng.uniform(0, 0.2))
    return Ground(
        haem=haem.astype(np.float32), eosin=eosin.astype(np.float32), other=None, nuclei=immune_cells(canvas, x, y)
    )


def _necrosis(canvas: Canvas) -> Ground:
    """Pink rubble with blue dust and ghosts that have no outline, so none of it is a nucleus."""
    rng = canvas.rng
    eosin = np.float32(rng.uniform(0.2, 0.6)) * np.exp(0.4 * canvas.noise(1.2) + 0.3 * canvas.noise(5))
    dust = np.clip(canvas.noise(rng.uniform(0.8, 1.6)) - rng.uniform(1.4, 2.2), 0, 0.8)
    ghosts = np.clip(canvas.noise(6) - 1.0, 0, 1) * np.float32(rng.uniform(0, 0.25))
    haem = dust * np.float32(rng.uniform(0.3, 1.0)) + ghosts + np.float32(rng.uniform(0, 0.08))
    return Ground(haem=haem.astype(np.float32), eosin=eosin.astype(np.float32), other=None, nuclei=[])


def _glass(canvas: Canvas) -> Ground:
    empty = np.zeros((canvas.side, canvas.side), np.float32)
    return Ground(haem=empty, eosin=empty.copy(), other=None, nuclei=[])


GROUNDS: dict[str, Callable[[Canvas], Ground]] = {
    "stroma": _stroma,
    "mucosa": _mucosa,
    "muscle": _muscle,
    "fat": _fat,
    "lymphoid": _lymphoid,
    "sheet": _sheet,
    "squamous": _squamous,
    "smear": _smear,
    "blood": _blood,
    "mucin": _mucin,
    "necrosis": _necrosis,
    "glass": _glass,
}
