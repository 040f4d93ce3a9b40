"""Glands and vessels of training fields: outlines, walls with their nuclei, goblets, lumina and what fills them."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.synth.field_canvas import FIXED_BITS, Canvas, Floats, Plane, fibres, grid_points, polygon_fixed, soft
from pathopipe.synth.field_grounds import cells_around, red_cells
from pathopipe.synth.field_nuclei import Nuclei, joined_nuclei, make_nuclei, with_figures

__all__ = ["GlandStyle", "choose_style", "draw_glands", "draw_vessels"]

_FORMS = ("round", "tubes", "branching", "cribriform", "solid", "ribbon")


@dataclass(frozen=True, slots=True, kw_only=True)
class GlandStyle:
    """How the glands of one field are built. Lengths in micrometres."""

    form: str
    atypical: bool
    radius_um: float
    thickness_um: float
    """Height of the epithelium, from its base to the lumen."""
    spacing: float
    """Distance of centres in diameters; below 1 glands touch."""
    irregular: float
    nucleus_um: float
    aspect: float
    rows: float
    """How far nuclei are lifted off the base, in heights of the epithelium."""
    crowding: float
    goblets: float
    look: str


def choose_style(rng: np.random.Generator) -> GlandStyle:
    """The build of the glands of one field."""
    atypical = bool(rng.random() < 0.45)
    form = str(
        rng.choice(_FORMS, p=[0.22, 0.13, 0.22, 0.22, 0.16, 0.05] if atypical else [0.5, 0.27, 0.13, 0, 0.05, 0.05])
    )
    radius = float(np.exp(rng.uniform(np.log(11), np.log(75))))
    nucleus = float(rng.uniform(4.8, 8.0) if not atypical else rng.uniform(6, 14))
    columnar = rng.random() < 0.6
    thickness = nucleus * (rng.uniform(2.2, 5.0) if columnar else rng.uniform(1.35, 2.3))
    if form in ("round", "branching", "tubes"):
        radius = max(radius, thickness * rng.uniform(1.05, 1.6))
    return GlandStyle(
        form=form,
        atypical=atypical,
        radius_um=max(radius, 28.0) if form in ("cribriform", "branching") else radius,
        thickness_um=thickness,
        spacing=float(rng.uniform(0.92, 1.1) if rng.random() < (0.5 if atypical else 0.2) else rng.uniform(1.1, 1.9)),
        irregular=float(rng.uniform(0.02, 0.12) if not atypical else rng.uniform(0.06, 0.25)),
        nucleus_um=nucleus,
        aspect=float(rng.uniform(1.3, 2.8) if columnar else rng.uniform(1.0, 1.4)),
        rows=float(rng.uniform(0, 0.12) if rng.random() < (0.3 if atypical else 0.75) else rng.uniform(0.15, 0.7)),
        crowding=float(rng.uniform(0.8, 1.25)),
        goblets=float(rng.uniform(0.2, 0.9)) if columnar and rng.random() < (0.15 if atypical else 0.45) else 0.0,
        look=str(rng.choice(["granular", "vesicular", "dense", "washed", "smudged"], p=[0.3, 0.27, 0.23, 0.1, 0.1])),
    )


def _star(rng: np.random.Generator, centre: tuple[float, float], radius: float, irregular: float, form: str) -> Floats:
    theta = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    r = np.ones(96)
    for wave in range(2, 7):
        r += rng.normal(0, irregular / np.sqrt(wave - 1)) * np.cos(wave * theta + rng.uniform(0, 2 * np.pi))
    if form == "branching":
        r += rng.uniform(0.2, 0.42) * np.cos(int(rng.integers(3, 6)) * theta + rng.uniform(0, 2 * np.pi))
    r = np.maximum(r, 0.3) * radius
    stretch, turn = np.exp(rng.normal(0, 0.18)), rng.uniform(0, np.pi)
    u, v = r * np.cos(theta) * stretch, r * np.sin(theta) / stretch
    return np.stack(
        [centre[0] + u * np.cos(turn) - v * np.sin(turn), centre[1] + u * np.sin(turn) + v * np.cos(turn)], axis=1
    )


def _tubes(canvas: Canvas, radius: float, spacing: float) -> list[Floats]:
    """Outlines of long tubes side by side, cut off here and there."""
    rng, side = canvas.rng, canvas.side
    turn = rng.uniform(0, np.pi)
    step, rings = 2 * radius * spacing, []
    reach = side * 0.75 + step
    sway, period = rng.uniform(0, 0.8) * radius, rng.uniform(80, 300) * canvas.px_per_um
    phase = rng.uniform(0, 2 * np.pi)
    for offset in np.arange(-reach, reach, step):
        start = -reach + rng.uniform(0, 0.5) * reach
        while start < reach:
            stop = start + max(rng.uniform(60, 400) * canvas.px_per_um, 4 * radius)
            s = np.linspace(start, stop, max(int((stop - start) / (1.5 * canvas.px_per_um)), 24))
            middle = offset + sway * np.sin(2 * np.pi * s / period + phase) + rng.normal(0, 0.05) * radius
            end = np.minimum(s - start, stop - s)
            half = radius * np.sqrt(np.clip(1 - (1 - np.minimum(end / radius, 1)) ** 2, 0, 1))
            half *= 1 + 0.08 * np.sin(s / (radius * 1.3) + rng.uniform(0, 6))
            u = np.concatenate([s, s[::-1]])
            v = np.concatenate([middle - half, (middle + half)[::-1]])
            rings.append(
                np.stack(
                    [side / 2 + u * np.cos(turn) - v * np.sin(turn), side / 2 + u * np.sin(turn) + v * np.cos(turn)],
                    axis=1,
                )
            )
            start = stop + rng.uniform(0.3, 2.5) * radius
    return rings


def _ribbon(canvas: Canvas, thickness: float) -> tuple[Floats, Floats]:
    """Outline of a surface epithelium that runs across the field, and of the glass beyond it."""
    rng, side = canvas.rng, canvas.side
    turn = rng.uniform(0, 2 * np.pi)
    s = np.linspace(-side, side, 240)
    wave = np.zeros_like(s)
    for _ in range(3):
        period = rng.uniform(40, 200) * canvas.px_per_um
        wave += rng.normal(0, 0.08) * period * np.sin(2 * np.pi * s / period + rng.uniform(0, 6))
    wave += rng.uniform(-0.25, 0.25) * side
    cos, sin = np.cos(turn), np.sin(turn)

    def band(low: Floats, high: Floats) -> Floats:
        u, v = np.concatenate([s, s[::-1]]), np.concatenate([low, high[::-1]])
        return np.stack([side / 2 + u * cos - v * sin, side / 2 + u * sin + v * cos], axis=1)

    return band(wave, wave + thickness), band(wave + thickness, np.full_like(wave, 3.0 * side))


def _resampled(ring: Floats, step: float) -> tuple[Floats, Floats, Floats]:
    """Points every ``step`` along a closed ring, the inward normal's direction, and the ring's running length."""
    closed = np.vstack([ring, ring[:1]])
    length = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
    n = max(int(length[-1] / step), 3)
    at = np.arange(n) * (length[-1] / n)
    points = np.stack([np.interp(at, length, closed[:, 0]), np.interp(at, length, closed[:, 1])], axis=1)
    ahead = np.stack([np.interp((at + step) % length[-1], length, closed[:, k]) for k in (0, 1)], axis=1)
    behind = np.stack([np.interp((at - step) % length[-1], length, closed[:, k]) for k in (0, 1)], axis=1)
    tangent = ahead - behind
    x, y = ring[:, 0], ring[:, 1]
    turning = np.sign(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))
    inward = np.arctan2(tangent[:, 0] * turning, -tangent[:, 1] * turning)
    return points, inward, at


def _fill(label: NDArray[np.int32], rings: list[Floats], gap_px: int) -> None:
    """Number the rings, later ones over earlier ones, each with a gap cut into what it covers."""
    for number, ring in enumerate(rings, 1):
        fixed = polygon_fixed(ring)
        if gap_px > 0:
            cv2.polylines(label, [fixed], True, 0, 2 * gap_px, cv2.LINE_8, FIXED_BITS)
        cv2.fillPoly(label, [fixed], number, cv2.LINE_8, FIXED_BITS)


def _keep_largest(label: NDArray[np.int32], rings: list[Floats], least: float) -> NDArray[np.int32]:
    """Labels with only the largest part of each, and none of those of which less than ``least`` is left."""
    kept = np.zeros_like(label)
    high, wide = label.shape
    for number, ring in enumerate(rings, 1):
        x0, y0 = np.maximum(ring.min(0).astype(int) - 1, 0)
        x1, y1 = ring.max(0).astype(int) + 2
        window = label[y0 : max(min(y1, high), y0), x0 : max(min(x1, wide), x0)] == number
        if not window.any():
            continue
        count, parts, stats, _ = cv2.connectedComponentsWithStats(window.astype(np.uint8), connectivity=4)
        best = 1 + int(np.argmax(stats[1:count, cv2.CC_STAT_AREA]))
        whole = np.zeros(window.shape, np.uint8)
        cv2.fillPoly(whole, [polygon_fixed(ring - [x0, y0])], 1, cv2.LINE_8, FIXED_BITS)
        if stats[best, cv2.CC_STAT_AREA] >= least * np.count_nonzero(whole):
            kept[y0 : y0 + window.shape[0], x0 : x0 + window.shape[1]][parts == best] = number
    return kept


def draw_glands(canvas: Canvas, where: NDArray[np.bool_], style: GlandStyle, tissue_class: int) -> Nuclei:
    """Draw glands over the ground where their centre lies in ``where``; fills ``canvas.glands`` and ``canvas.lumina``.

    Args:
        canvas: The field.
        where: (side, side) the part of the field that holds glands; tubes and surfaces run through all of it.
        style: How they are built.
        tissue_class: What the tissue map says inside them.
    """
    rng, scale = canvas.rng, canvas.px_per_um
    radius, thickness = style.radius_um * scale, style.thickness_um * scale
    if style.form == "tubes":
        rings = _tubes(canvas, radius, max(style.spacing, 1.02))
    elif style.form == "ribbon":
        ring, beyond = _ribbon(canvas, thickness)
        rings = [ring]
        canvas.void = canvas.polygons([beyond]) > 0.5
    else:
        x, y = grid_points(canvas, 2 * radius * style.spacing, rng.uniform(0.04, 0.16), radius)
        sizes = radius * np.exp(rng.normal(0, 0.18, len(x)))
        rings = [
            _star(rng, (float(x[row]), float(y[row])), float(sizes[row]), style.irregular, style.form)
            for row in range(len(x))
        ]
    centres = np.array([ring.mean(0) for ring in rings]) if rings else np.zeros((0, 2))
    if style.form not in ("tubes", "ribbon"):
        inside = canvas.at(where, centres[:, 0], centres[:, 1]).astype(bool)
        rings = [ring for ring, kept in zip(rings, inside, strict=True) if kept]
    rng.shuffle(rings)
    _fill(canvas.glands, rings, round(rng.uniform(0, 2.0) * scale) if rng.random() < 0.7 else 0)
    canvas.glands = _keep_largest(canvas.glands, rings, 0.0 if style.form in ("tubes", "ribbon") else 0.35)
    if not canvas.glands.any():
        return joined_nuclei([])
    depth = _depth(canvas)
    has_lumen = style.form not in ("solid", "ribbon")
    wavy = thickness * (1 + np.float32(rng.uniform(0.02, 0.13)) * canvas.noise(rng.uniform(8, 25)))
    body = canvas.glands > 0
    if style.form == "cribriform":
        holes_x, holes_y = grid_points(canvas, rng.uniform(14, 40) * scale, 0.2, 0)
        size = rng.uniform(3, 9) * scale
        holes = [
            _star(rng, (a, b), size * float(np.exp(rng.normal(0, 0.35))), 0.1, "round")
            for a, b in zip(holes_x, holes_y, strict=True)
        ]
        canvas.lumina = (canvas.polygons(holes) > 0.5) & (depth > np.minimum(thickness, 12 * scale))
    elif has_lumen:
        canvas.lumina = body & (depth > wavy)
    nuclei, cells, goblets = _wall_nuclei(canvas, rings, depth, style)
    _paint_epithelium(canvas, cells, depth, goblets, style)
    canvas.tissue[body] = tissue_class
    glass = soft(canvas.void & ~body, 0.4 * scale)
    canvas.mix(glass, haem=0.0, eosin=0.0)
    canvas.other *= 1 - glass[..., None]
    return nuclei


def _depth(canvas: Canvas) -> Plane:
    """Distance in px from each pixel of a gland to the gland's edge; the border of the field is no edge."""
    label = canvas.glands
    inside = (label > 0).astype(np.uint8)
    inside[:, 1:] &= label[:, 1:] == label[:, :-1]
    inside[1:] &= label[1:] == label[:-1]
    depth: Plane = cv2.distanceTransform(inside, cv2.DIST_L2, 5)
    return np.minimum(depth, np.float32(canvas.side))  # a gland that fills the field has no edge


def _wall_nuclei(
    canvas: Canvas, rings: list[Floats], depth: Plane, style: GlandStyle
) -> tuple[Nuclei, Floats, list[Floats]]:
    """Nuclei along the walls, the points (n, 2) that cells stand around, and outlines of goblets."""
    rng, scale = canvas.rng, canvas.px_per_um
    long = style.nucleus_um * np.sqrt(style.aspect) * scale
    short = style.nucleus_um / np.sqrt(style.aspect) * scale
    thickness = style.thickness_um * scale
    polarity = 0.12 if not style.atypical else float(rng.uniform(0.12, 0.7))
    base = 0.5 * long + rng.uniform(0.3, 2.5) * scale
    base = min(base, max(thickness - 0.45 * long, 0.5 * long))
    columns: list[Floats] = []
    goblets: list[Floats] = []
    theta = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    for number, ring in enumerate(rings, 1):
        points, inward, _ = _resampled(ring, short * style.crowding)
        n = len(points)
        lift = np.abs(rng.normal(0, style.rows, n)) * thickness + rng.normal(0, 0.06, n) * long
        deep = base + np.clip(lift, -0.3 * long, max(thickness - base - 0.3 * long, 0))
        is_goblet = rng.random(n) < style.goblets
        here = points + deep[:, None] * np.stack([np.cos(inward), np.sin(inward)], 1)
        owner = np.full(n, number)
        columns.append(np.column_stack([here, inward + rng.normal(0, polarity, n), owner]))
        room = thickness - base - 0.5 * long
        if room > 2.5 * scale:
            width = min(0.75 * short * style.crowding * rng.uniform(0.8, 1.5), 0.6 * room)
            for row in np.flatnonzero(is_goblet):
                size = (0.5 * room * rng.uniform(0.75, 1.0), width * rng.uniform(0.7, 1.1))
                at = points[row] + (base + 0.45 * long + size[0]) * np.array([np.cos(inward[row]), np.sin(inward[row])])
                u, v = size[0] * np.cos(theta), size[1] * np.sin(theta)
                cos, sin = np.cos(inward[row]), np.sin(inward[row])
                goblets.append(np.stack([at[0] + u * cos - v * sin, at[1] + u * sin + v * cos], 1))
    rows = np.concatenate(columns) if columns else np.zeros((0, 4))
    filled = style.form in ("solid", "cribriform") or style.rows > 0.4
    if filled:
        x, y = grid_points(canvas, (long + short) / 2 * style.crowding * rng.uniform(1.1, 1.7), 0.22, 0)
        inner = canvas.at(depth, x, y) > base + 0.6 * long
        rows = np.concatenate(
            [rows, np.column_stack([x, y, rng.uniform(0, np.pi, len(x)), canvas.at(canvas.glands, x, y)])[inner]]
        )
    edge = canvas.side + short
    x, y = rows[:, 0], rows[:, 1]
    seen = (x > -short) & (x < edge) & (y > -short) & (y < edge)
    right = canvas.at(canvas.glands, x, y) == rows[:, 3]
    deep_enough = canvas.at(depth, x, y) > 0.35 * short
    to_lumen = cv2.distanceTransform((~canvas.lumina).astype(np.uint8), cv2.DIST_L2, 3)
    clear = canvas.at(to_lumen, x, y) < 0.4 * short
    beyond = (x < 0) | (y < 0) | (x >= canvas.side) | (y >= canvas.side)
    rows = rows[seen & ((right & deep_enough & ~clear) | beyond)]
    cells = rows[:, :2]
    rows = rows[rng.random(len(rows)) < rng.uniform(0.85, 1.0)]
    nuclei = make_nuclei(
        canvas, rows[:, 0], rows[:, 1], kind="Epithelial", look=style.look, diameter_um=style.nucleus_um,
        aspect=style.aspect, angle=rows[:, 2], spread=0.22 if style.atypical else 0.1,
        rough=rng.uniform(0.03, 0.1) if style.atypical else 0.03, bend=0.3 if style.atypical else 0.1,
        defocus=rng.uniform(0, 0.3) * rng.random(),
    )  # fmt: skip
    if rng.random() < (0.6 if style.atypical else 0.2):
        nuclei = with_figures(canvas, nuclei, rng.uniform(0, 0.1), rng.uniform(0, 0.05))
    return nuclei, cells, goblets


def _paint_epithelium(canvas: Canvas, cells: Floats, depth: Plane, goblets: list[Floats], style: GlandStyle) -> None:
    rng, scale = canvas.rng, canvas.px_per_um
    body = canvas.glands > 0
    edge_blur = 0.3
    shows = soft(body.astype(np.float32), edge_blur * scale)
    cell, _, edge = cells_around(canvas, cells[:, 0], cells[:, 1])
    vary = np.exp(rng.normal(0, rng.uniform(0.02, 0.2), max(len(cells), 1))).astype(np.float32)[cell]
    grain = 1 + np.float32(rng.uniform(0.03, 0.3)) * canvas.noise(rng.uniform(0.5, 2.0))
    share = np.clip(depth / np.float32(style.thickness_um * scale), 0, 1)
    apical_e, basal_e = rng.uniform(0.03, 0.5), rng.uniform(0.1, 0.5)
    apical_h, basal_h = rng.uniform(0.0, 0.2), rng.uniform(0.0, 0.4) * rng.random()
    if rng.random() < 0.45:  # dark cytoplasm, hardly lighter than the nuclei
        apical_h, basal_h = apical_h + rng.uniform(0, 0.25), basal_h + rng.uniform(0.05, 0.35)
    eosin = (basal_e + (apical_e - basal_e) * share) * vary * grain
    haem = (basal_h + (apical_h - basal_h) * share) * vary * grain
    line = np.exp(-((edge / np.float32(rng.uniform(0.3, 0.8) * scale)) ** 2)) * np.float32(rng.uniform(-0.5, 0.5))
    eosin *= 1 + line
    if goblets:
        full = canvas.polygons(goblets, blur_um=0.5)
        eosin += full * (np.float32(rng.uniform(0.0, 0.12)) - eosin)
        haem += full * (np.float32(rng.uniform(0.0, 0.16)) * grain - haem)
    canvas.mix(shows, haem=np.maximum(haem, 0), eosin=np.maximum(eosin, 0))
    canvas.other *= 1 - shows[..., None]
    if canvas.lumina.any():
        _fill_lumina(canvas)
    if rng.random() < 0.4:  # a membrane, or a cleft, around the gland
        rim = np.exp(-((depth / np.float32(rng.uniform(0.5, 1.2) * scale)) ** 2)) * body
        canvas.eosin += rim * np.float32(rng.uniform(0.05, 0.3))
    if rng.random() < 0.3:
        outside = cv2.distanceTransform((~body).astype(np.uint8), cv2.DIST_L2, 3)
        width = np.maximum(1.5 * scale * (canvas.noise(25) + rng.uniform(-0.5, 1.0)), 0.1)
        cleft = np.exp(-((outside / width) ** 2)) * ~body
        canvas.mix(cleft.astype(np.float32), haem=0.0, eosin=0.0)


def _fill_lumina(canvas: Canvas) -> None:
    """Empty, or with mucin, secretion or debris; some with a brush border."""
    rng, scale = canvas.rng, canvas.px_per_um
    mask = soft(canvas.lumina.astype(np.float32), 0.4 * scale)
    filling = rng.choice(["empty", "mucin", "secretion", "debris"], p=[0.5, 0.22, 0.16, 0.12])
    haem: Plane | float = float(rng.uniform(0, 0.02))
    eosin: Plane | float = float(rng.uniform(0, 0.03))
    if filling == "mucin":
        wisps = fibres(canvas, across_um=1.2, along_um=12, angle=rng.uniform(0, 3), wave_um=3, wave=canvas.noise(20))
        wisps = rng.uniform(0.1, 0.6) * wisps + 0.5 * canvas.noise(rng.uniform(3, 12))
        haem = np.clip(rng.uniform(0.02, 0.15) * (1 + 0.5 * wisps), 0, 1).astype(np.float32)
        eosin = np.clip(rng.uniform(0.0, 0.1) * (1 + 0.3 * wisps), 0, 1).astype(np.float32)
    elif filling == "secretion":
        amount = np.clip(canvas.noise(rng.uniform(15, 60)) + rng.uniform(-0.5, 2.0), 0, 1)
        eosin = amount * np.float32(rng.uniform(0.1, 0.6)) * (1 + 0.1 * canvas.noise(1))
    elif filling == "debris":
        amount = np.clip(canvas.noise(12) + 0.3, 0, 1)
        eosin = amount * np.float32(0.3) * np.exp(0.4 * canvas.noise(1.2))
        haem = amount * np.clip(canvas.noise(1.0) - 1.5, 0, 0.8)
    canvas.mix(mask, haem=haem, eosin=eosin)
    canvas.other *= 1 - mask[..., None]
    if rng.random() < 0.25:
        away = cv2.distanceTransform((~canvas.lumina).astype(np.uint8), cv2.DIST_L2, 3)
        brush = (
            np.exp(-((away / np.float32(rng.uniform(0.6, 1.6) * scale)) ** 2)) * (canvas.glands > 0) * ~canvas.lumina
        )
        canvas.eosin += (brush * np.float32(rng.uniform(0.05, 0.35))).astype(np.float32)


def draw_vessels(canvas: Canvas, where: NDArray[np.bool_], count: int) -> Nuclei:
    """Vessels and capillaries: never glands, though they are round and hollow too."""
    rng, scale = canvas.rng, canvas.px_per_um
    groups: list[Nuclei] = []
    for _ in range(count):
        x, y = rng.uniform(0, canvas.side, 2)
        if not where[int(y), int(x)]:
            continue
        radius = float(np.exp(rng.uniform(np.log(4), np.log(40)))) * scale
        ring = _star(rng, (x, y), radius, 0.1, "round")
        wall_um = float(rng.uniform(0.8, 2.0) if radius < 12 * scale else rng.uniform(1.5, 8.0))
        outer = (x, y) + (ring - (x, y)) * (1 + wall_um * scale / radius)
        if canvas.at(canvas.glands, outer[:, 0], outer[:, 1]).any():
            continue
        wall = canvas.polygons([outer], blur_um=0.6)
        canvas.mix(wall, haem=float(rng.uniform(0, 0.08)), eosin=float(rng.uniform(0.25, 0.6)))
        canvas.other *= 1 - wall[..., None]
        canvas.void |= wall > 0.4
        lumen = canvas.polygons([ring], blur_um=0.4)
        canvas.mix(lumen, haem=0.01, eosin=float(rng.uniform(0, 0.12)))
        if rng.random() < 0.55:
            cx, cy = grid_points(canvas, rng.uniform(5.5, 9) * scale, 0.25, 0)
            near = canvas.at(lumen, cx, cy) > 0.5
            near &= rng.random(len(cx)) < rng.uniform(0.3, 1.0)
            red = red_cells(canvas, cx[near], cy[near]) * lumen
            canvas.absorb(red, canvas.red_cell)
        points, inward, _ = _resampled(ring, rng.uniform(8, 20) * scale)
        points = points - 0.8 * scale * np.stack([np.cos(inward), np.sin(inward)], 1)
        keep = rng.random(len(points)) < 0.8
        look = str(rng.choice(["dense", "granular", "vesicular"]))
        groups.append(
            make_nuclei(
                canvas, points[keep, 0], points[keep, 1], kind="Endothelial", look=look,
                diameter_um=rng.uniform(4, 6.5), aspect=rng.uniform(1.8, 3.5), angle=inward[keep] + np.pi / 2, bend=0.5,
            )
        )  # fmt: skip
    return joined_nuclei(groups)
