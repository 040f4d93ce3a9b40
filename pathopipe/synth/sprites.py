"""Nuclei and red cells rendered once for each outline, turn and resolution, and stamped ever after."""

import functools
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.synth.cells import Nuclei
from pathopipe.synth.noise import stream_rng
from pathopipe.synth.shapes import EPITHELIAL, OUTLINES_UM

__all__ = [
    "N_TURNS",
    "OD_SCALE",
    "Sprite",
    "drawn_at",
    "fill_polygon",
    "nucleus_inside",
    "nucleus_sprite",
    "red_cell_sprite",
]

N_TURNS = 24
OD_SCALE = 126.0
"""A sprite holds haematoxylin density times this, so that 255 is 2.02."""

# Mean density, spread between nuclei, strength of clumped chromatin, darkness of the membrane.
_LOOKS = ((0.50, 0.13, 0.15, 0.24), (0.82, 0.12, 0.20, 0.12), (0.62, 0.18, 0.12, 0.14), (0.74, 0.12, 0.10, 0.10))
_BLUR_UM = 0.30


@dataclass(frozen=True, slots=True)
class Sprite:
    """A nucleus around its centre, which is the corner between the four middle pixels."""

    half_px: int
    stain: NDArray[np.uint8]
    """(2 half, 2 half) haematoxylin density times ``OD_SCALE``."""
    outline_px: NDArray[np.float64]
    """(points, 2) around (0, 0)."""


@functools.lru_cache(maxsize=16_384)
def nucleus_sprite(kind: int, variant: int, turn: int, mpp: float) -> Sprite:
    """One nucleus, turned."""
    angle = 2 * np.pi * turn / N_TURNS
    cos, sin = np.cos(angle), np.sin(angle)
    outline_px = OUTLINES_UM[kind, variant] @ np.array([[cos, sin], [-sin, cos]]) / mpp
    half = int(np.ceil(np.abs(outline_px).max() + 3 * _BLUR_UM / mpp)) + 1
    fine, fine_half, density = _upright(kind, variant, mpp)
    # From the centre of a pixel of the sprite back to the fine image of the upright nucleus.
    back = np.array([[cos, sin], [-sin, cos]]) * fine
    shift = back @ np.full(2, 0.5 - half) + fine_half - 0.5
    turned = cv2.warpAffine(
        density,
        np.column_stack([back, shift]),
        (2 * half, 2 * half),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
    )
    return Sprite(half, np.clip(turned * OD_SCALE, 0, 190).astype(np.uint8), outline_px)


@functools.lru_cache(maxsize=16_384)
def nucleus_inside(kind: int, variant: int, turn: int, mpp: float) -> NDArray[np.bool_]:
    """The pixels of a sprite whose centre is in the outline."""
    sprite = nucleus_sprite(kind, variant, turn, mpp)
    inside = np.zeros(sprite.stain.shape, np.uint8)
    fill_polygon(inside, sprite.outline_px + sprite.half_px, 1)
    return inside.astype(np.bool_)


@functools.lru_cache(maxsize=1024)
def _upright(kind: int, variant: int, mpp: float) -> tuple[int, int, NDArray[np.float32]]:
    """A nucleus with its long axis along x: fine pixels a pixel, half the side in fine pixels, density.

    Already as blurred as optics and pixels make it, so that it can be sampled at whole pixels.
    """
    rng = stream_rng(1, (kind * 1000 + variant) * 100)
    fine = 3 if mpp < 0.75 else 6
    outline = OUTLINES_UM[kind, variant] * (fine / mpp)
    sigma = fine * float(np.hypot(_BLUR_UM / mpp, 0.35))
    half = int(np.ceil(np.abs(outline).max() + 3 * sigma)) + 1
    mask = np.zeros((2 * half, 2 * half), np.uint8)
    cv2.fillPoly(mask, [np.round((outline + half - 0.5) * 256).astype(np.int32)], 1, shift=8)
    depth_um = cv2.distanceTransform(mask, cv2.DIST_L2, 3) * (mpp / fine)
    mean, spread, clumps, membrane = _LOOKS[kind]
    level = mean + spread * float(np.clip(rng.normal(), -1.8, 1.8))
    chromatin = _chromatin(mpp / fine)
    top, left = rng.integers(0, len(chromatin), 2)
    rows, columns = ((start + np.arange(2 * half)) % len(chromatin) for start in (top, left))
    density = level + clumps * chromatin[np.ix_(rows, columns)] + membrane * np.exp(-((depth_um / 0.55) ** 2))
    if kind == EPITHELIAL:
        grid = (np.arange(2 * half) + 0.5 - half) * (mpp / fine)
        for _ in range(int(rng.integers(1, 3))):
            x, y = rng.uniform(-1.3, 1.3, 2) * (1.2, 0.8)
            away = ((grid[None, :] - x) ** 2 + (grid[:, None] - y) ** 2) / rng.uniform(0.55, 0.85) ** 2
            density += 0.5 * np.exp(-(away**2))
    blurred: NDArray[np.float32] = cv2.GaussianBlur((density * mask).astype(np.float32), (0, 0), sigma)
    return fine, half, blurred


@functools.lru_cache(maxsize=8)
def _chromatin(um_per_px: float) -> NDArray[np.float32]:
    """Clumps of about a micrometre, mean 0, variance 1."""
    noise = stream_rng(1, 7).normal(size=(320, 320)).astype(np.float32)
    sigma = 0.30 / um_per_px
    wide = cv2.GaussianBlur(noise, (0, 0), max(sigma, 0.3), borderType=cv2.BORDER_REFLECT)
    wide -= cv2.GaussianBlur(noise, (0, 0), max(3 * sigma, 0.6), borderType=cv2.BORDER_REFLECT)
    result: NDArray[np.float32] = wide / wide.std()
    return result


@functools.lru_cache(maxsize=64)
def red_cell_sprite(variant: int, mpp: float) -> NDArray[np.uint8]:
    """A red cell seen flat or on edge: eosin density times ``OD_SCALE``, centre in the middle."""
    rng = stream_rng(1, 900_000 + variant)
    long, short = 3.3 + rng.uniform(-0.3, 0.3), (3.1 if variant % 4 else 1.7) + rng.uniform(-0.2, 0.2)
    angle = rng.uniform(0, np.pi)
    half = int(np.ceil(4.2 / mpp)) + 1
    grid = ((np.arange(2 * half) + 0.5) - half) * mpp
    x = grid[None, :] * np.cos(angle) + grid[:, None] * np.sin(angle)
    y = grid[:, None] * np.cos(angle) - grid[None, :] * np.sin(angle)
    r = np.hypot(x / long, y / short)
    soft = np.clip((1 - r) * 3.0 / max(mpp, 0.35) + 0.5, 0, 1)
    density = (0.68 - 0.2 * np.exp(-((r / 0.5) ** 2))) * soft
    stain: NDArray[np.uint8] = (density * OD_SCALE).astype(np.uint8)
    return stain


def fill_polygon(image: NDArray[np.generic], ring_px: NDArray[np.float64], value: int) -> None:
    """Set the pixels whose centre lies in a ring of (x, y) points; pixel (i, j) covers [j, j+1] x [i, i+1].

    OpenCV also sets every pixel that the outline touches, which makes small objects a pixel too wide.
    """
    height, width = image.shape[:2]
    x, y = ring_px[:, 0], ring_px[:, 1]
    if len(x) > 1 and x[0] == x[-1] and y[0] == y[-1]:
        x, y = x[:-1], y[:-1]
    first = max(int(np.ceil(y.min() - 0.5)), 0)
    last = min(int(np.ceil(y.max() - 0.5)), height)
    if last <= first or x.max() <= 0 or x.min() >= width:
        return
    x2, y2 = np.roll(x, -1), np.roll(y, -1)
    # Which rows' centres an edge crosses, as flat (edge, row) pairs.
    start = np.clip(np.ceil(np.minimum(y, y2) - 0.5), first, last).astype(np.int64)
    stop = np.clip(np.ceil(np.maximum(y, y2) - 0.5), first, last).astype(np.int64)
    count = stop - start
    edge = np.repeat(np.arange(len(x)), count)
    row = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count) + start[edge]
    cross = x[edge] + (row + 0.5 - y[edge]) * (x2[edge] - x[edge]) / (y2[edge] - y[edge])
    column = np.clip(np.ceil(cross - 0.5), 0, width).astype(np.int64)
    order = np.lexsort((column, row))
    row, column = row[order], column[order]
    for r, a, b in zip(row[::2].tolist(), column[::2].tolist(), column[1::2].tolist(), strict=True):
        image[r, a:b] = value


def drawn_at(nuclei: Nuclei, mpp: float) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Kind, variant, turn and centre in whole pixels of each nucleus."""
    turn = np.round(nuclei.angle * (N_TURNS / (2 * np.pi))).astype(np.int64) % N_TURNS
    x, y = np.round(nuclei.x_um / mpp).astype(np.int64), np.round(nuclei.y_um / mpp).astype(np.int64)
    return nuclei.kind.tolist(), nuclei.variant.tolist(), turn.tolist(), x.tolist(), y.tolist()
