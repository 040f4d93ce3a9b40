"""Texture numbers of one tile at fixed scales in micrometres; they keep their values when the tile is turned."""

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.embeddings.handcrafted.histogram import histogram, shares
from pathopipe.embeddings.handcrafted.planes import Planes

__all__ = ["TEXTURE_NAMES", "cooccurrence", "haralick", "local_binary_patterns", "texture_features"]

Plane = NDArray[np.uint8]

_ENERGY_UM: dict[str, tuple[str, ...]] = {
    "grey": ("0.5", "1", "2", "4"),
    "haematoxylin": ("1", "2", "4"),
    "eosin": ("1", "2", "4"),
}
"""Planes and the octaves that they begin with."""
_LBP_PLANES = (("grey", 1, "1"), ("grey", 2, "2"), ("haematoxylin", 1, "2"))
_GLCM_PLANES = ("grey", "haematoxylin")
_GLCM_STEPS_PX = (1, 4)
"""At the octave of 1 um per pixel, so these are micrometres too."""
_HARALICK = ("contrast", "homogeneity", "entropy", "correlation")
_LEVELS = 16
_FIBRE_WINDOWS_UM = (8, 32)

TEXTURE_NAMES: tuple[str, ...] = (
    *(
        f"texture_{plane}_{um}um_{measure}"
        for plane, octaves in _ENERGY_UM.items()
        for um in octaves
        for measure in ("gradient_log", "laplacian_log", "gradient_sparsity")
    ),
    "focus_log",
    *(f"lbp_{plane}_{um}um_{k}_share" for plane, _, um in _LBP_PLANES for k in range(10)),
    *(f"glcm_{p}_{um}um_{measure}" for p in _GLCM_PLANES for um in _GLCM_STEPS_PX for measure in _HARALICK),
    *(f"fibre_coherence_{um}um" for um in _FIBRE_WINDOWS_UM),
    "fibre_coherence_tile",
)


def texture_features(planes: Planes) -> NDArray[np.float64]:
    """(len(TEXTURE_NAMES),) numbers of one tile."""
    octaves = {"grey": planes.grey, "haematoxylin": planes.haematoxylin, "eosin": planes.eosin}
    at_1um = {"grey": planes.grey[1], "haematoxylin": planes.haematoxylin[0], "eosin": planes.eosin[0]}
    energies = np.asarray([_energies(plane) for name, um in _ENERGY_UM.items() for plane in octaves[name][: len(um)]])
    # Blur takes the finest Laplacian first: 0 when all is gone, log 2 where both octaves are equal.
    focus = np.log1p(energies[0, 1] / (energies[1, 1] + 1.0))
    energies[:, :2] = np.log1p(energies[:, :2])
    patterns = [local_binary_patterns(octaves[name][octave]) for name, octave, _ in _LBP_PLANES]
    matrices = [cooccurrence(_levels(name, at_1um[name]), step) for name in _GLCM_PLANES for step in _GLCM_STEPS_PX]
    fibres = _coherences(planes)
    return np.concatenate(
        [energies.ravel(), [focus], np.concatenate(patterns), haralick(np.stack(matrices)).ravel(), fibres]
    )


def _energies(plane: Plane) -> tuple[float, float, float]:
    """Root mean square of gradient and Laplacian in bytes per pixel, and how sparse the gradient is, 0 to 1.

    Sums over int16, hence whole numbers. Sparsity is the squared mean of the absolute gradient over its mean square:
    near 1 for even grain, small for few sharp edges on smooth ground.
    """
    gx, gy = cv2.spatialGradient(plane, borderType=cv2.BORDER_REPLICATE)
    laplacian = cv2.Laplacian(plane, cv2.CV_16S, borderType=cv2.BORDER_REPLICATE)
    n = plane.size
    square = (cv2.norm(gx, cv2.NORM_L2SQR) + cv2.norm(gy, cv2.NORM_L2SQR)) / (2 * n)
    absolute = (cv2.norm(gx, cv2.NORM_L1) + cv2.norm(gy, cv2.NORM_L1)) / (2 * n)
    curvature = cv2.norm(laplacian, cv2.NORM_L2SQR) / n
    # A Sobel filter weighs a step of one byte per pixel with 8.
    return float(np.sqrt(square)) / 8, float(np.sqrt(curvature)), absolute**2 / square if square > 0 else 0.0


def _codes_of_pattern() -> NDArray[np.float64]:
    """(10, 256) 1 where an 8-bit ring has a rotation-invariant uniform pattern: its ones, or 9 with over 2 changes."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    changes = (bits != np.roll(bits, 1, axis=1)).sum(axis=1)
    pattern = np.where(changes <= 2, bits.sum(axis=1), 9)
    of_pattern: NDArray[np.bool_] = pattern == np.arange(10)[:, None]
    return of_pattern.astype(np.float64)


_CODES_OF_PATTERN = _codes_of_pattern()


def local_binary_patterns(plane: Plane) -> NDArray[np.float64]:
    """(10,) shares of the rotation-invariant uniform patterns of 8 neighbours at radius 1; borders are left out.

    Source: Ojala, Pietikäinen & Mäenpää 2002, IEEE TPAMI 24(7). The diagonal neighbours lie between pixels; their
    bilinear weights (0.086, 0.207, 0.207, 0.5) are taken as 22, 53, 53 and 128 parts of 256, so that the comparison
    with the centre is of whole numbers and flat ground is flat.
    """
    height, width = plane.shape
    if min(height, width) < 3:
        return np.zeros(10)
    wide = plane.astype(np.uint16)

    def shifted(source: NDArray[np.uint16], dy: int, dx: int) -> NDArray[np.uint16]:
        return source[1 + dy : height - 1 + dy, 1 + dx : width - 1 + dx]

    centre = shifted(wide, 0, 0)
    side, corner = wide * np.uint16(53), wide * np.uint16(128)
    limit = centre * np.uint16(234)  # 256 - 22: the centre's own part of the interpolated value is taken off
    code = np.zeros(centre.shape, np.uint8)
    ring = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))
    for bit, (dy, dx) in enumerate(ring):
        if dy and dx:
            brighter = shifted(side, dy, 0) + shifted(side, 0, dx) + shifted(corner, dy, dx) >= limit
        else:
            brighter = shifted(wide, dy, dx) >= centre
        code |= brighter.view(np.uint8) << np.uint8(bit)
    return shares((_CODES_OF_PATTERN * histogram(code)).sum(axis=1))


def _levels(plane_name: str, plane: Plane) -> Plane:
    """Sixteen levels: of grey, or of 0.08 OD from -0.25 to 1.03 for a stain."""
    if plane_name == "grey":
        return plane >> np.uint8(4)
    dark: Plane = cv2.min(plane, 127.0)
    return dark >> np.uint8(3)


def cooccurrence(levels: Plane, step_px: int) -> NDArray[np.float64]:
    """(16, 16) symmetric shares of level pairs ``step_px`` apart along rows and along columns; sums to 1, or 0."""
    pairs = np.zeros(256)
    for first, second in ((levels[:, :-step_px], levels[:, step_px:]), (levels[:-step_px], levels[step_px:])):
        if first.size:
            pairs += histogram(np.ascontiguousarray(first << np.uint8(4) | second))
    square = pairs.reshape(_LEVELS, _LEVELS)
    return shares((square + square.T).ravel()).reshape(_LEVELS, _LEVELS)


def haralick(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """(k, 4) contrast, homogeneity, entropy (bits) and correlation of (k, 16, 16) co-occurrence matrices.

    Source: Haralick, Shanmugam & Dinstein 1973, IEEE Trans. Systems, Man and Cybernetics 3(6). Correlation is 1
    where all pixels have one level, as in scikit-image.
    """
    i = np.arange(_LEVELS, dtype=np.float64)
    squared = (i[:, None] - i) ** 2
    contrast = (matrices * squared).sum(axis=(1, 2))
    homogeneity = (matrices / (1 + squared)).sum(axis=(1, 2))
    entropy = -(matrices * np.log2(np.where(matrices > 0, matrices, 1))).sum(axis=(1, 2))
    marginal = matrices.sum(axis=2)
    mean = (marginal * i).sum(axis=1)
    variance = (marginal * (i - mean[:, None]) ** 2).sum(axis=1)
    # The matrix is symmetric, so E[(i - j)^2] = 2 (variance - covariance).
    some = variance > 1e-12
    correlation = np.where(some, 1 - contrast / (2 * np.where(some, variance, 1)), 1.0)
    return np.stack([contrast, homogeneity, entropy, correlation], axis=1)


def _coherences(planes: Planes) -> NDArray[np.float64]:
    """How far the gradients of eosin share one direction, 0 to 1, within windows of some um and over the tile.

    Coherence of the structure tensor (Bigün & Granlund 1987, ICCV), its mean over windows weighted with their gradient
    energy: high in muscle and collagen bundles, low in round or disordered structure.
    """
    plane = planes.eosin[1]  # 2 um per pixel
    gx, gy = (g.astype(np.float64) for g in cv2.spatialGradient(plane, borderType=cv2.BORDER_REPLICATE))
    xx, yy = gx * gx, gy * gy
    tensor = cv2.merge([xx - yy, 2 * gx * gy, xx + yy])  # (height, width, 3), whole numbers
    width_um = planes.scale.width_px * planes.scale.mpp[0]
    height_um = planes.scale.height_px * planes.scale.mpp[1]
    found = []
    for window_um in _FIBRE_WINDOWS_UM:
        size = (max(round(width_um / window_um), 1), max(round(height_um / window_um), 1))
        # From the windows before: a mean of means, and a sixteenth of the work.
        tensor = cv2.resize(
            tensor, (min(size[0], tensor.shape[1]), min(size[1], tensor.shape[0])), interpolation=cv2.INTER_AREA
        )
        found.append(_aligned_share(tensor))
    return np.asarray([*found, _aligned_share(tensor.mean(axis=(0, 1), keepdims=True))])


def _aligned_share(tensor: NDArray[np.float64]) -> float:
    energy = tensor[..., 2].sum()
    aligned = np.sqrt(tensor[..., 0] ** 2 + tensor[..., 1] ** 2).sum()
    return float(aligned / energy) if energy > 0 else 0.0
