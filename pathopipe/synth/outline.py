"""The plan of a whole slide in micrometres: pieces of tissue, pen strokes, dust, scan border."""

import math
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import MultiPolygon, Polygon

from pathopipe.synth.noise import Waves, smooth_step, stream_rng
from pathopipe.synth.spec import SynthSpec

__all__ = ["Border", "Dust", "PenStroke", "SlidePlan", "plan_slide"]

_FINEST_STEP_UM = 6.0
_MOST_VERTICES = 16_384
# Transmitted red, green and blue of full ink: blue, green, black, red markers.
_INKS = ((0.16, 0.26, 0.72), (0.14, 0.52, 0.36), (0.17, 0.17, 0.20), (0.78, 0.16, 0.22))


@dataclass(frozen=True, slots=True)
class PenStroke:
    """A marker line: ink that follows a path with streaks along it."""

    path_um: NDArray[np.float64]
    """(n, 2) x and y."""
    half_width_um: float
    ink_od: NDArray[np.float32]
    """(3,) optical density of full ink for red, green, blue."""
    wobble: Waves

    def bounds_um(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of all that ink can reach."""
        reach = 1.3 * self.half_width_um
        low, high = self.path_um.min(axis=0) - reach, self.path_um.max(axis=0) + reach
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])

    def ink(self, x_um: NDArray[np.float64], y_um: NDArray[np.float64]) -> NDArray[np.float64]:
        """Amount of ink, 0 to about 1.2, on the grid of ``x_um`` (columns) and ``y_um`` (rows)."""
        a, step = self.path_um[:-1], np.diff(self.path_um, axis=0)
        px, py = x_um[None, :, None] - a[:, 0], y_um[:, None, None] - a[:, 1]
        t = np.clip((px * step[:, 0] + py * step[:, 1]) / (step**2).sum(axis=1), 0.0, 1.0)
        distance = np.sqrt(((px - t * step[:, 0]) ** 2 + (py - t * step[:, 1]) ** 2).min(axis=-1))
        wobble = self.wobble.grid(x_um, y_um)
        inside = (self.half_width_um * (1.0 + 0.07 * wobble) - distance) / self.half_width_um
        # A marker leaves more ink at its rim than in the middle, and streaks.
        rim = 1.0 + 0.35 * np.exp(-(((inside - 0.08) / 0.07) ** 2))
        # Ink is drawn from samples every 8 um; a sharper edge would show them.
        soft = max(0.09, 16.0 / self.half_width_um)
        amount: NDArray[np.float64] = smooth_step(inside, 0.0, soft) * rim * (0.9 + 0.08 * wobble)
        return amount


@dataclass(frozen=True, slots=True)
class Dust:
    """One thing on the glass that is not tissue."""

    kind: str
    """``speck`` and ``lint`` are sharp, ``ring`` is out of focus."""
    points_um: NDArray[np.float64]
    """(n, 2): outline of a speck, path of lint, centre of a ring."""
    size_um: float
    """Radius of a ring, width of lint."""
    od: NDArray[np.float32]
    """(3,) optical density for red, green, blue."""

    def bounds_um(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        reach = 1.6 * self.size_um + 4.0
        low, high = self.points_um.min(axis=0) - reach, self.points_um.max(axis=0) + reach
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])


@dataclass(frozen=True, slots=True)
class Border:
    """Black strips at the left and bottom that the scanner never saw, and the edge of the cover slip at the top."""

    left_um: float
    bottom_um: float
    slip_left_um: float
    """Height of the cover slip's edge at x = 0, from the top."""
    slip_slope: float
    slip_half_width_um: float


@dataclass(frozen=True, slots=True)
class SlidePlan:
    """What lies where on the slide; micrometres from the top left corner."""

    width_um: float
    height_um: float
    tissue: tuple[Polygon, ...]
    """Pieces with their tears as holes, apart from one another, largest first."""
    pens: tuple[PenStroke, ...]
    dust: tuple[Dust, ...]
    border: Border | None

    @property
    def short_um(self) -> float:
        """The shorter side."""
        return min(self.width_um, self.height_um)


def plan_slide(spec: SynthSpec) -> SlidePlan:
    """Lay out one slide. Tissue keeps clear of the slide's edge, so that no object is cut by it."""
    width, height = spec.width_px * spec.mpp, spec.height_px * spec.mpp
    short = min(width, height)
    tissue = _pieces(spec.seed, width, height, max(_FINEST_STEP_UM, 1.5 * spec.mpp))
    border = None
    if spec.border:
        rng = stream_rng(spec.seed, 14)
        border = Border(
            left_um=short * rng.uniform(0.012, 0.025),
            bottom_um=short * rng.uniform(0.012, 0.025),
            slip_left_um=short * rng.uniform(0.014, 0.024),
            slip_slope=rng.uniform(-0.004, 0.004),
            slip_half_width_um=min(14.0, 0.004 * short),
        )
    return SlidePlan(
        width,
        height,
        tissue,
        _pens(spec.seed, width, height, tissue) if spec.pen else (),
        _dust(spec.seed, width, height) if spec.dust else (),
        border,
    )


def _pieces(seed: int, width: float, height: float, step_um: float) -> tuple[Polygon, ...]:
    rng = stream_rng(seed, 10)
    short = min(width, height)
    margin = 0.045 * short
    boxes = [(margin, margin, width - margin, height - margin)]
    n_pieces = int(rng.choice([1, 2, 2, 3, 3, 4])) if short > 1500 else 1
    n_pieces = max(n_pieces, min(8, round(max(width, height) / short)))
    while len(boxes) < n_pieces:
        boxes.sort(key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
        left, top, right, bottom = boxes.pop()
        share = rng.uniform(0.36, 0.64)
        if right - left > bottom - top:
            cut = left + share * (right - left)
            boxes += [(left, top, cut, bottom), (cut, top, right, bottom)]
        else:
            cut = top + share * (bottom - top)
            boxes += [(left, top, right, cut), (left, cut, right, bottom)]
    solid = [_blob(rng, box, 0.02 * short, step_um) for box in boxes]
    whole = shapely.union_all(solid)
    for _ in range(int(rng.integers(2, 6)) if short > 1500 else 0):
        radius = short * rng.uniform(0.005, 0.02)
        inset = margin + radius
        x, y = rng.uniform(inset, width - inset), rng.uniform(inset, height - inset)
        bit = _blob(rng, (x - radius, y - radius, x + radius, y + radius), 0.0, step_um)
        whole = shapely.union_all([whole, shapely.difference(bit, shapely.buffer(whole, 0.004 * short))])
    for piece in solid:
        for _ in range(int(rng.poisson(1.6)) if short > 1500 else 0):
            whole = shapely.difference(whole, _tear(rng, piece, short, step_um))
    parts = list(whole.geoms) if isinstance(whole, MultiPolygon) else [whole]
    smallest = (0.004 * short) ** 2
    kept = [_without_small_holes(part, smallest) for part in parts if part.area > smallest]
    return tuple(sorted(kept, key=lambda part: -part.area))


def _without_small_holes(piece: Polygon, smallest: float) -> Polygon:
    return Polygon(piece.exterior, [hole for hole in piece.interiors if Polygon(hole).area > smallest])


def _blob(rng: np.random.Generator, box: tuple[float, float, float, float], inset: float, step_um: float) -> Polygon:
    """A ragged outline that fits a box: harmonics whose strength falls as a power, so it is organic at every scale."""
    left, top, right, bottom = box
    half_w, half_h = max((right - left) / 2 - inset, 1.0), max((bottom - top) / 2 - inset, 1.0)
    n = int(np.clip(math.pi * (half_w + half_h) / step_um, 96, _MOST_VERTICES))
    order = np.arange(n // 2 + 1)
    strength = np.zeros(len(order))
    strength[2:] = 0.17 * order[2:] ** -1.35
    coefficients = strength * (rng.normal(size=len(order)) + 1j * rng.normal(size=len(order))) * n / 2
    radius = np.exp(np.fft.irfft(coefficients, n))
    angle = np.arange(n) * 2 * np.pi / n
    turn = rng.uniform(0, np.pi)
    x, y = radius * np.cos(angle), 0.8 * radius * np.sin(angle)
    x, y = x + rng.uniform(-0.25, 0.25) * y**2, y + rng.uniform(-0.3, 0.3) * x**2
    x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
    x = (x - (x.max() + x.min()) / 2) / np.ptp(x) * 2 * half_w + (left + right) / 2
    y = (y - (y.max() + y.min()) / 2) / np.ptp(y) * 2 * half_h + (top + bottom) / 2
    return _largest(shapely.make_valid(Polygon(np.stack([x, y], axis=1))))


def _tear(rng: np.random.Generator, piece: Polygon, short: float, step_um: float) -> Polygon:
    left, top, right, bottom = piece.bounds
    x, y = rng.uniform(left, right), rng.uniform(top, bottom)
    length = short * rng.uniform(0.02, 0.07)
    tear = _blob(rng, (-length, -length * 0.22, length, length * 0.22), 0.0, step_um)
    angle = rng.uniform(0, np.pi)
    turn = [math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)]
    return shapely.transform(tear, lambda xy: xy @ np.array(turn).reshape(2, 2) + (x, y))


def _largest(shape: shapely.Geometry) -> Polygon:
    parts = [part for part in getattr(shape, "geoms", [shape]) if isinstance(part, Polygon)]
    return max(parts, key=lambda part: part.area)


def _pens(seed: int, width: float, height: float, tissue: tuple[Polygon, ...]) -> tuple[PenStroke, ...]:
    rng = stream_rng(seed, 11)
    short = min(width, height)
    strokes = []
    ink = -np.log10(np.array(_INKS[int(rng.integers(len(_INKS)))], np.float32))
    for number in range(int(rng.integers(2, 4))):
        half_width = float(np.clip(short * rng.uniform(0.012, 0.02), 10.0, 380.0))
        if number == 0 and tissue:
            # Part of a circle around a piece, as drawn to say "here"; it runs over the tissue in places.
            left, top, right, bottom = tissue[0].bounds
            reach = rng.uniform(0.86, 1.0)
            angle = rng.uniform(0, 2 * np.pi) + np.linspace(0, rng.uniform(1.0, 2.6), 28)
            x = (left + right) / 2 + reach * (right - left) / 2 * np.cos(angle)
            y = (top + bottom) / 2 + reach * (bottom - top) / 2 * np.sin(angle)
        else:
            angle = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.12, 12))
            step = short * rng.uniform(0.008, 0.02)
            x = rng.uniform(0.05, 0.95) * width + np.cumsum(np.cos(angle)) * step
            y = rng.choice([0.06, 0.94]) * height + np.cumsum(np.sin(angle)) * step * 0.4
        path = np.stack([x, y], axis=1)
        wobble = Waves.draw(seed, 100 + number, max(half_width * 0.3, 36.0), max(half_width * 2.0, 90.0), 16)
        strokes.append(PenStroke(path, half_width, (ink * rng.uniform(0.85, 1.15)).astype(np.float32), wobble))
    return tuple(strokes)


def _dust(seed: int, width: float, height: float) -> tuple[Dust, ...]:
    rng = stream_rng(seed, 12)
    short = min(width, height)
    n = int(np.clip(width * height / 1e6 * 0.9, 5, 1500))
    found = []
    for kind in rng.choice(["speck", "ring", "lint"], n, p=[0.62, 0.26, 0.12]):
        centre = rng.uniform(0, 1, 2) * (width, height)
        if kind == "speck":
            radius = min(float(np.exp(rng.normal(1.7, 0.6))), 0.02 * short)
            angle = np.arange(14) * 2 * np.pi / 14
            outline = radius * (1 + 0.25 * rng.normal(size=14).clip(-2, 2))[:, None]
            points = centre + outline * np.stack([np.cos(angle), np.sin(angle) * rng.uniform(0.5, 1)], axis=1)
            tone = np.array([0.55, 0.62, 0.72]) * rng.uniform(0.6, 1.7)
            found.append(Dust("speck", points, 0.0, tone.astype(np.float32)))
        elif kind == "ring":
            tone = np.array([1.0, 0.97, 0.95]) * rng.uniform(0.012, 0.05)
            size = min(float(rng.uniform(35, 110)), 0.05 * short)
            found.append(Dust("ring", centre[None], size, tone.astype(np.float32)))
        else:
            length = min(float(rng.uniform(120, 700)), 0.15 * short)
            angle = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.16, 24))
            points = centre + np.cumsum(np.stack([np.cos(angle), np.sin(angle)], axis=1), axis=0) * length / 24
            tone = np.array([0.5, 0.4, 0.28]) * rng.uniform(0.4, 1.2)
            found.append(Dust("lint", points, float(rng.uniform(2.0, 5.0)), tone.astype(np.float32)))
    return tuple(found)
