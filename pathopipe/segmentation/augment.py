"""Crops of labelled images, bent and stained at random: other scanners, other laboratories, other focus.

Stain is varied in optical density, where dyes add up (Tellez et al. 2018, arXiv:1808.05896), far beyond what any data
set holds; geometry is one affine map with mirrored edges, which count as not labelled.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.segmentation.datasets import OBJECT_TASKS
from pathopipe.segmentation.examples import Example
from pathopipe.stain import HE_VECTORS, optical_density, rgb_of_density, unmix

__all__ = ["Crop", "cut_crop", "restain", "whole_image"]

Image = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Crop:
    """A square of an image at the working resolution."""

    rgb: Image
    """(side, side, 3)."""
    labels: Mapping[str, NDArray[np.int32]]
    """By task, (side, side): objects by number. Tasks that are not labelled are absent."""
    classes: Mapping[str, NDArray[np.uint8]]
    """By task, (n + 1,): class of each number, that of 0 being 255."""
    known: Mapping[str, NDArray[np.bool_]]
    """By task, (side, side): where the labels hold; False beyond the image."""
    inside_image: NDArray[np.bool_]
    """(side, side): False where the image is mirrored."""
    merged: frozenset[str]
    """Tasks whose labels do not part touching objects."""
    tissue_types: frozenset[int] | None
    """What the whole may be; None where that is not known."""
    tissue_map: NDArray[np.uint8] | None
    """(side, side) class of each pixel, 255 where not known."""


def cut_crop(
    example: Example, rng: np.random.Generator, *, side_px: int, mpp: float, zoom: tuple[float, float]
) -> Crop:
    """A crop at a random place, turned, mirrored, sheared a little, and zoomed.

    Args:
        example: Where from.
        rng: What decides.
        side_px: Side of the crop.
        mpp: Micrometres per pixel of the crop before zooming.
        zoom: Least and most enlargement; drawn so that halving is as likely as doubling.
    """
    height, width = example.rgb.shape[:2]
    scale = example.mpp / mpp * float(np.exp(rng.uniform(np.log(zoom[0]), np.log(zoom[1]))))
    stretch = float(np.exp(rng.normal(0, 0.06)))
    quarter, flip = rng.integers(4), rng.random() < 0.5
    # Mostly quarter turns: those alone keep the pixels' grid, which sharp textures need.
    turn = quarter * np.pi / 2 + (rng.uniform(-np.pi / 4, np.pi / 4) if rng.random() < 0.35 else 0.0)
    linear = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    linear = linear @ np.diag([scale * stretch * (-1 if flip else 1), scale / stretch])
    # The crop's centre lies so that as little as possible of it is beyond the image.
    half = side_px / 2 / scale
    centre = [
        rng.uniform(min(half, length / 2), max(length - half, length / 2)) for length in (width, height)
    ] + rng.normal(0, 0.05, 2) * half
    return _warp(example, linear, centre, side_px)


def whole_image(example: Example, *, mpp: float, multiple_px: int) -> Crop:
    """All of an image at the working resolution, at its top left; the rest up to a square is mirrored."""
    scale = example.mpp / mpp
    height, width = (round(length * scale) for length in example.rgb.shape[:2])
    side_px = -(-max(height, width) // multiple_px) * multiple_px
    half = side_px / 2 / scale
    return _warp(example, np.eye(2) * scale, np.array([half, half]), side_px)


def _warp(example: Example, linear: NDArray[np.float64], centre: NDArray[np.float64], side_px: int) -> Crop:
    """Map the image so that ``centre`` falls on the crop's; pixel centres are at halves."""
    size = (side_px, side_px)
    offset = np.array([side_px / 2, side_px / 2]) - linear @ np.asarray(centre)
    # OpenCV's pixel 0 has its centre at 0.
    matrix = np.hstack([linear, (offset + linear @ [0.5, 0.5] - 0.5)[:, None]])
    rgb = example.rgb
    scale = float(np.sqrt(abs(np.linalg.det(linear))))
    if scale < 0.75:
        # Linear interpolation alone would skip pixels.
        sigma = 0.45 * np.sqrt(1 / scale**2 - 1)
        rgb = cv2.GaussianBlur(rgb, (0, 0), sigma)
    interpolation = cv2.INTER_CUBIC if scale > 1.2 else cv2.INTER_LINEAR
    warped = cv2.warpAffine(rgb, matrix, size, flags=interpolation, borderMode=cv2.BORDER_REFLECT_101)

    def nearest(plane: NDArray[np.generic], outside: int) -> NDArray[np.float32]:
        # Float32 holds whole numbers to 2**24.
        values = plane.astype(np.float32)
        return cv2.warpAffine(  # type: ignore[no-any-return]
            values, matrix, size, flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=outside
        )

    inside = nearest(np.ones(rgb.shape[:2], np.uint8), 0) > 0
    labels, known, classes = {}, {}, {}
    for task in OBJECT_TASKS:
        if task not in example.labels:
            continue
        labels[task] = nearest(example.labels[task], 0).astype(np.int32)
        known[task] = inside & (nearest(example.ignore[task], 1) == 0) if task in example.ignore else inside
        n = int(example.labels[task].max(initial=0))
        classes[task] = np.full(n + 1, 255, np.uint8)
        if task in example.classes:
            classes[task][1:] = example.classes[task]
    tissue_map = None
    if example.tissue_map is not None:
        tissue_map = nearest(example.tissue_map, 255).astype(np.uint8)
    return Crop(
        rgb=np.ascontiguousarray(warped),
        labels=labels,
        classes=classes,
        known=known,
        inside_image=inside,
        merged=example.merged,
        tissue_types=example.tissue_types,
        tissue_map=tissue_map,
    )


def restain(rgb: Image, rng: np.random.Generator, strength: float = 1.0) -> Image:
    """The same tissue from another laboratory, scanner and day.

    Args:
        rgb: (height, width, 3); is not changed.
        rng: What decides.
        strength: 0 changes nothing but noise and compression; 1 is usual.
    """
    out = rgb
    if rng.random() < 0.85:
        out = _other_stain(out, rng, strength)
    if rng.random() < 0.35:
        out = _other_hue(out, rng, strength)
    if rng.random() < 0.5:
        out = _other_light(out, rng, strength)
    return _other_optics(out, rng)


def _other_stain(rgb: Image, rng: np.random.Generator, strength: float) -> Image:
    """Other amounts and other colours of both dyes, and of what remains."""
    amounts = unmix(optical_density(rgb), HE_VECTORS)
    spread = strength * (0.18 if rng.random() < 0.6 else 0.42)
    gain = np.exp(rng.normal(0, spread, 3)).astype(np.float32)
    bias = rng.normal(0, 0.04 * strength, 3).astype(np.float32)
    bias[2] = 0
    amounts = amounts * gain + bias * (amounts.sum(axis=-1, keepdims=True) > 0.12)
    vectors = HE_VECTORS + rng.normal(0, 0.07 * strength, (3, 3)).astype(np.float32)
    vectors = np.maximum(vectors, 0.01)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return rgb_of_density(np.maximum(amounts @ vectors.astype(np.float32), 0))


def _other_hue(rgb: Image, rng: np.random.Generator, strength: float) -> Image:
    hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
    shift = int(np.clip(rng.normal(0, 9 * strength), -25, 25))  # of 180
    saturation = float(np.exp(rng.normal(0, 0.25 * strength)))
    hue = ((np.arange(256) + shift) % 180).astype(np.uint8)
    table = np.clip(np.arange(256) * saturation, 0, 255).astype(np.uint8)
    hsv[..., 0] = cv2.LUT(hsv[..., 0], hue)
    hsv[..., 1] = cv2.LUT(hsv[..., 1], table)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)


def _other_light(rgb: Image, rng: np.random.Generator, strength: float) -> Image:
    """White point, gain and gamma of each channel."""
    value = np.arange(256) / 255
    gamma = np.exp(rng.normal(0, 0.2 * strength))
    contrast = np.exp(rng.normal(0, 0.12 * strength))
    tables = np.empty((1, 256, 3), np.uint8)
    for channel in range(3):
        white = np.exp(rng.normal(0, 0.05 * strength))
        own = np.exp(rng.normal(0, 0.08 * strength))
        curve = ((value ** (gamma * own) - 0.6) * contrast + 0.6) * white
        tables[0, :, channel] = np.clip(np.rint(curve * 255), 0, 255)
    return np.asarray(cv2.LUT(rgb, tables), np.uint8)


def _other_optics(rgb: Image, rng: np.random.Generator) -> Image:
    """Focus, sharpening by the scanner, a coarser scan enlarged, grain, compression."""
    out = rgb
    kind = rng.random()
    if kind < 0.25:
        out = cv2.GaussianBlur(out, (0, 0), rng.uniform(0.4, 1.6))
    elif kind < 0.4:
        soft = cv2.GaussianBlur(out, (0, 0), rng.uniform(0.7, 1.5))
        amount = rng.uniform(0.3, 1.5)
        out = cv2.addWeighted(out, 1 + amount, soft, -amount, 0)
    elif kind < 0.5:
        height, width = out.shape[:2]
        share = rng.uniform(0.4, 0.8)
        coarse = (max(round(width * share), 8), max(round(height * share), 8))
        out = cv2.resize(out, coarse, interpolation=cv2.INTER_AREA)
        out = cv2.resize(out, (width, height), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.3:
        grain = rng.integers(-127, 128, out.shape, dtype=np.int16)
        grain = (grain * rng.uniform(0.01, 0.09)).astype(np.int16)
        out = np.clip(out + grain, 0, 255).astype(np.uint8)
    if rng.random() < 0.4:
        quality = int(rng.integers(35, 95))
        data = cv2.imencode(".jpg", out[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        out = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)[..., ::-1]
    return np.ascontiguousarray(out)
