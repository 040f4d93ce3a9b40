"""The canvas on which a training field is drawn: stain planes, labels and the noise they are made with."""

from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["Canvas", "Floats", "Plane", "fibres", "grid_points", "polygon_fixed", "smooth_noise", "soft"]

Plane = NDArray[np.float32]
Floats = NDArray[np.float64]

FIXED_BITS = 4
"""Polygons are handed to OpenCV in sixteenths of a pixel."""
_FINE_TILE_PX = 160


@dataclass(slots=True, kw_only=True)
class Canvas:
    """A square field while it is drawn. Lengths are in canvas pixels unless the name says micrometres.

    ``haem`` and ``eosin`` are stain densities (1.0 is an optical density of one at full strength); ``other`` is the
    optical density of all that takes neither stain, as red, green and blue.
    """

    rng: np.random.Generator
    side: int
    px_per_um: float
    red_cell: tuple[float, float, float]
    """Optical density of a red cell, as red, green and blue."""
    haem: Plane = field(init=False)
    eosin: Plane = field(init=False)
    other: Plane = field(init=False)
    tissue: NDArray[np.uint8] = field(init=False)
    glands: NDArray[np.int32] = field(init=False)
    lumina: NDArray[np.bool_] = field(init=False)
    void: NDArray[np.bool_] = field(init=False)
    """Where no nucleus of a ground may lie: vessels, and glass beyond a surface."""

    def __post_init__(self) -> None:
        """Start with empty glass of unknown tissue."""
        shape = (self.side, self.side)
        self.haem, self.eosin = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.other = np.zeros((*shape, 3), np.float32)
        self.tissue = np.full(shape, 255, np.uint8)
        self.glands = np.zeros(shape, np.int32)
        self.lumina, self.void = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)

    def noise(self, scale_um: float) -> Plane:
        """Smooth noise of about zero mean and unit variance, with blobs of ``scale_um``."""
        return smooth_noise(self.rng, self.side, scale_um * self.px_per_um)

    def at(self, plane: NDArray[Any], x: Floats, y: Floats) -> NDArray[Any]:
        """Values of a plane at points; points outside take the nearest pixel's."""
        column = np.clip(x, 0, self.side - 1).astype(np.intp)
        row = np.clip(y, 0, self.side - 1).astype(np.intp)
        values: NDArray[Any] = plane[row, column]
        return values

    def mix(self, mask: Plane, *, haem: Plane | float, eosin: Plane | float) -> None:
        """Let ``mask`` (0 to 1) of the canvas take the given densities."""
        self.haem += mask * (haem - self.haem)
        self.eosin += mask * (eosin - self.eosin)

    def absorb(self, mask: Plane, density: tuple[float, float, float]) -> None:
        """Add something that is neither stain, ``density`` being its optical density in red, green and blue."""
        self.other += mask[..., None] * np.asarray(density, np.float32)

    def polygons(self, rings: list[Floats], value: float = 1.0, blur_um: float = 0.0) -> Plane:
        """A plane of 0 with the polygons (points, 2) filled with ``value``, their edges softened."""
        canvas = np.zeros((self.side, self.side), np.uint8)
        for ring in rings:
            cv2.fillPoly(canvas, [polygon_fixed(ring)], 255, cv2.LINE_8, FIXED_BITS)
        return soft(canvas, blur_um * self.px_per_um) * np.float32(value / 255)

    def lines(self, paths: list[Floats], width_um: float, blur_um: float, closed: bool = False) -> Plane:
        """A plane of 0 with lines of 1 drawn through the points of each path."""
        canvas = np.zeros((self.side, self.side), np.uint8)
        width = max(1, round(width_um * self.px_per_um))
        for path in paths:
            cv2.polylines(canvas, [polygon_fixed(path)], closed, 255, width, cv2.LINE_AA, FIXED_BITS)
        return soft(canvas, blur_um * self.px_per_um) * np.float32(1 / 255)


def polygon_fixed(ring: Floats) -> NDArray[np.int32]:
    """Points as OpenCV wants them, kept within what its fixed-point numbers hold."""
    fixed: NDArray[np.int32] = np.round(np.clip(ring, -4000, 8000) * (1 << FIXED_BITS)).astype(np.int32)
    return fixed


def soft(mask: NDArray[np.generic], sigma_px: float) -> Plane:
    """The mask as floats, blurred by a Gaussian; a blur of less than a third of a pixel is left out."""
    plane = mask.astype(np.float32)
    if sigma_px < 0.34:
        return plane
    blurred: Plane = cv2.GaussianBlur(plane, (0, 0), sigma_px)
    return blurred


def smooth_noise(rng: np.random.Generator, side: int, scale_px: float) -> Plane:
    """Noise (side, side) of about zero mean and unit variance whose blobs are ``scale_px`` wide."""
    if side > _FINE_TILE_PX and scale_px <= 4.0:
        # Nobody sees that fine grain repeats, and to draw it is the slowest part of a field.
        times = -(-side // _FINE_TILE_PX)
        repeated: Plane = np.tile(smooth_noise(rng, _FINE_TILE_PX, scale_px), (times, times))[:side, :side]
        return repeated
    if scale_px <= 1.0:
        return rng.standard_normal((side, side), dtype=np.float32)
    # Broad blobs are made small and enlarged, which costs a tenth.
    factor = 2 ** min(max(int(np.log2(scale_px / 2.5)), 0), 6)
    small = -(-side // factor) + 2
    blob = scale_px / factor
    n = int(np.ceil(small / blob)) + 3
    coarse = rng.standard_normal((n, n), dtype=np.float32)
    step = 1 / blob
    left, top = (rng.random(2, dtype=np.float32) + np.float32(0.5)).tolist()
    warp = np.array([[step, 0, left], [0, step, top]], np.float32)
    plane = cv2.warpAffine(coarse, warp, (small, small), flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP)
    return _enlarged(plane, factor, side) * np.float32(1.3)


def _enlarged(plane: Plane, factor: int, side: int) -> Plane:
    """The plane ``factor`` times as large, cut to ``side``."""
    if factor == 1:
        return np.ascontiguousarray(plane[:side, :side])
    size = plane.shape[0] * factor
    # Enlarged much, straight lines between the samples would show as facets.
    big: Plane = cv2.resize(plane, (size, size), interpolation=cv2.INTER_LINEAR if factor < 8 else cv2.INTER_CUBIC)
    return big[:side, :side]


def fibres(canvas: Canvas, *, across_um: float, along_um: float, angle: float, wave_um: float, wave: Plane) -> Plane:
    """Noise drawn out along ``angle`` (radians): streaks ``across_um`` wide and ``along_um`` long.

    ``wave`` is a smooth noise plane; the streaks are pushed sideways by ``wave_um`` times it.
    """
    rng = canvas.rng
    across_px, along_px = across_um * canvas.px_per_um, along_um * canvas.px_per_um
    factor = 2 if across_px >= 3 else 1
    small = -(-canvas.side // factor)
    x = np.arange(small, dtype=np.float32)[None, :] * factor
    y = np.arange(small, dtype=np.float32)[:, None] * factor
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    n = 64
    texture = np.pad(rng.standard_normal((n, n), dtype=np.float32), ((0, 1), (0, 1)), mode="wrap")
    shift = rng.random(2) * n
    map_x = x * np.float32(cos / along_px) + (y * np.float32(sin / along_px) + np.float32(shift[0]))
    map_y = y * np.float32(cos / across_px) - (x * np.float32(sin / across_px) - np.float32(shift[1]))
    map_y += wave[::factor, ::factor] * np.float32(wave_um / across_um)
    for plane in (map_x, map_y):  # the texture repeats
        plane -= n * np.floor(plane / n)
    drawn = cv2.remap(texture, map_x, map_y, cv2.INTER_LINEAR)
    return _enlarged(drawn, factor, canvas.side) * np.float32(1.5)


def grid_points(canvas: Canvas, spacing: float, jitter: float, margin: float = 0.0) -> tuple[Floats, Floats]:
    """Points on a hexagonal grid of random turn, each moved by up to ``jitter`` spacings.

    Args:
        canvas: The field; points reach ``margin`` px beyond it.
        spacing: Distance of neighbours in px.
        jitter: Standard deviation of the shift in spacings; 0 gives the grid.
        margin: See ``canvas``.

    Returns:
        x and y of the points in px.
    """
    rng, half = canvas.rng, canvas.side / 2
    reach = (half + margin) * 1.42 + spacing
    n = int(np.ceil(reach / spacing)) + 1
    steps = np.arange(-n, n + 1)
    column, row = np.meshgrid(steps, np.arange(-int(n * 1.16) - 1, int(n * 1.16) + 2))
    u = ((column + 0.5 * (row % 2)) * spacing).ravel() + rng.normal(0, jitter * spacing, column.size)
    v = (row * (spacing * 0.866)).ravel() + rng.normal(0, jitter * spacing, column.size)
    turn = rng.uniform(0, np.pi)
    start = rng.uniform(-spacing, spacing, 2)
    x = u * np.cos(turn) - v * np.sin(turn) + half + start[0]
    y = u * np.sin(turn) + v * np.cos(turn) + half + start[1]
    low, high = -margin, canvas.side + margin
    near = (x > low) & (x < high) & (y > low) & (y < high)
    return x[near], y[near]
