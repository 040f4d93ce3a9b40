"""Light through a training field: stain colours, white point, blur, sharpening, noise and JPEG."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.synth.field_canvas import Canvas, Plane, smooth_noise

__all__ = ["Optics", "choose_optics", "expose"]

_LN10 = np.float32(np.log(10.0))

# Ruifrok & Johnston 2001, Anal Quant Cytol Histol 23:291, for haematoxylin, eosin and diaminobenzidine; the others
# span what scanners and laboratories make of the first two.
_HAEMATOXYLIN = (
    (0.65, 0.70, 0.29),
    (0.58, 0.79, 0.20),
    (0.55, 0.76, 0.35),
    (0.74, 0.66, 0.15),
    (0.66, 0.74, 0.12),
    (0.62, 0.66, 0.42),
)
_EOSIN = (
    (0.07, 0.99, 0.11),
    (0.12, 0.93, 0.34),
    (0.24, 0.93, 0.27),
    (0.30, 0.92, 0.20),
    (0.20, 0.88, 0.42),
    (0.05, 0.90, 0.43),
    (0.10, 0.80, 0.60),
)
_DAB = ((0.27, 0.57, 0.78), (0.33, 0.55, 0.75), (0.22, 0.6, 0.77))


@dataclass(frozen=True, slots=True, kw_only=True)
class Optics:
    """How a field is stained and seen."""

    stain: str
    """``he``, ``lilac`` (haematoxylin alone on a lilac ground), ``pale`` (hardly any eosin) or ``dab``."""
    haematoxylin: NDArray[np.float32]
    """Optical density of a density of one, as red, green and blue."""
    eosin: NDArray[np.float32]
    red_cell: tuple[float, float, float]
    white: NDArray[np.float32]
    blur_um: float
    sharpen: float
    noise: float
    jpeg_quality: int
    shift_px: float
    """Shift of red against blue, of pixels of the finished field."""
    gamma: float


def choose_optics(rng: np.random.Generator) -> Optics:
    """A stain and a camera, from far wider ranges than one laboratory has."""
    stain = str(rng.choice(["he", "lilac", "pale", "dab"], p=[0.8, 0.07, 0.06, 0.07]))
    haematoxylin = _vector(rng, _HAEMATOXYLIN, 0.05)
    eosin = _vector(rng, _DAB if stain == "dab" else _EOSIN, 0.05)
    strength = float(np.exp(rng.normal(-0.12, 0.38)))
    eosin_strength = float(np.exp(rng.normal(-0.15, 0.5)))
    bright = rng.uniform(222, 254)
    white = bright + rng.normal(0, 3.5, 3)
    if stain == "lilac":
        haematoxylin = _vector(rng, ((0.68, 0.7, 0.14), (0.62, 0.74, 0.2)), 0.04)
        eosin_strength *= rng.uniform(0.02, 0.2)
        white = np.array([182.0, 168.0, 216.0]) + rng.normal(0, 14, 3)
    elif stain == "pale":
        haematoxylin = _vector(rng, ((0.45, 0.82, 0.3), (0.55, 0.78, 0.2), (0.5, 0.8, 0.4)), 0.05)
        eosin_strength *= rng.uniform(0.03, 0.25)
        white = np.array([222.0, 230.0, 222.0]) + rng.normal(0, 7, 3)
    elif stain == "dab":
        haematoxylin = _vector(rng, ((0.76, 0.58, 0.25), (0.68, 0.64, 0.3)), 0.04)
        strength *= 0.75
        eosin_strength *= rng.uniform(0.15, 0.6)
    elif rng.random() < 0.3:  # yellowish, bluish or greyish glass
        white = white - rng.uniform(0, 26, 3) * (1.0, 1.0, rng.choice([0.3, 1.0]))
    eosin = eosin * np.float32(np.clip(strength * eosin_strength, 0.0 if stain != "he" else 0.2, 2.2))
    # Red cells take eosin up and are a little yellow of themselves.
    own = rng.uniform(0.02, 0.25)
    red = np.minimum(rng.uniform(0.4, 1.1) * eosin, 1.1) + own * np.array([0.15, 0.6, 1.0])
    return Optics(
        stain=stain,
        haematoxylin=haematoxylin * np.float32(np.clip(strength, 0.3, 2.0)),
        eosin=eosin,
        red_cell=(float(red[0]), float(red[1]), float(red[2])),
        white=np.clip(white, 120, 255).astype(np.float32),
        blur_um=float(
            rng.choice([rng.uniform(0.05, 0.3), rng.uniform(0.3, 0.6), rng.uniform(0.6, 1.0)], p=[0.5, 0.38, 0.12])
        ),
        sharpen=float(rng.uniform(0.2, 1.4)) if rng.random() < 0.35 else 0.0,
        noise=float(rng.exponential(1.6)),
        jpeg_quality=int(rng.integers(30, 96)) if rng.random() < 0.8 else 100,
        shift_px=float(rng.normal(0, 0.35)) if rng.random() < 0.4 else 0.0,
        gamma=float(np.exp(rng.normal(0, 0.08))),
    )


def _vector(rng: np.random.Generator, choices: tuple[tuple[float, ...], ...], spread: float) -> NDArray[np.float32]:
    """A unit vector between two of the choices and a little beside."""
    first, second = rng.integers(len(choices), size=2)
    share = rng.random()
    vector = share * np.asarray(choices[first]) + (1 - share) * np.asarray(choices[second]) + rng.normal(0, spread, 3)
    vector = np.maximum(vector, 0.01)
    unit: NDArray[np.float32] = (vector / np.linalg.norm(vector)).astype(np.float32)
    return unit


def expose(canvas: Canvas, optics: Optics) -> NDArray[np.uint8]:
    """The picture (side, side, 3) of a canvas."""
    rng, side = canvas.rng, canvas.side
    haem, eosin = np.maximum(canvas.haem, 0), np.maximum(canvas.eosin, 0)
    uneven = smooth_noise(rng, side, side / 1.3) * np.float32(rng.uniform(0, 0.02))
    channels: list[Plane] = []
    for band in range(3):
        density = haem * optics.haematoxylin[band] + eosin * optics.eosin[band] + canvas.other[..., band]
        channels.append(cv2.exp(-_LN10 * density + uneven) * optics.white[band])
    picture = cv2.merge(channels)
    sigma = optics.blur_um * canvas.px_per_um
    if sigma > 0.25:
        picture = cv2.GaussianBlur(picture, (0, 0), sigma)
    if optics.shift_px:
        for band, sign in ((0, 1), (2, -1)):
            move = np.array([[1, 0, sign * optics.shift_px], [0, 1, 0.5 * sign * optics.shift_px]], np.float32)
            picture[..., band] = cv2.warpAffine(
                picture[..., band].copy(), move, (side, side), borderMode=cv2.BORDER_REFLECT
            )
    if optics.sharpen:
        picture += np.float32(optics.sharpen) * (picture - cv2.GaussianBlur(picture, (0, 0), 1.2))
    picture = 255 * (np.clip(picture, 0, 255) / 255) ** np.float32(optics.gamma)
    picture += rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(optics.noise)
    pixels: NDArray[np.uint8] = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    if optics.jpeg_quality < 100:
        _, packed = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, optics.jpeg_quality])
        cv2.cvtColor(np.asarray(cv2.imdecode(packed, cv2.IMREAD_COLOR)), cv2.COLOR_BGR2RGB, pixels)
    return pixels
