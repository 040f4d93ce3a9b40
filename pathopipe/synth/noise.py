"""Random numbers that depend on a place, not on the order of drawing: hashes of lattice cells and sums of waves."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Waves", "hash01", "smooth_step", "stream_rng"]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def stream_rng(seed: int, stream: int) -> np.random.Generator:
    """The generator of one named stream of a seed."""
    return np.random.Generator(np.random.Philox(key=[seed & _MASK, stream]))


def hash01(seed: int, stream: int, *indices: ArrayLike) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), a function of seed, stream and integer indices only.

    ``indices`` broadcast against one another; at least one of them is an array. The mixer is splitmix64
    (Steele et al. 2014, OOPSLA), applied once an index.
    """
    start = (seed * _GOLDEN + (stream + 1) * 0xD1B54A32D192ED03) & _MASK
    state = np.full((1,), start, np.uint64)
    for index in indices:
        state = _mix(state ^ _mix(np.atleast_1d(np.asarray(index, np.int64)).astype(np.uint64)))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    value = value + np.uint64(_GOLDEN)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def smooth_step(value: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """0 below ``low``, 1 above ``high``, smooth between."""
    t = np.clip((value - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


@dataclass(frozen=True, slots=True)
class Waves:
    """A smooth random field of mean 0 and variance 1 over the plane, in micrometres.

    A sum of plane waves, so it can be had at any point without its neighbours, and on a grid as one small product.
    """

    kx: NDArray[np.float64]
    ky: NDArray[np.float64]
    phase: NDArray[np.float64]
    amplitude: NDArray[np.float64]

    @classmethod
    def draw(cls, seed: int, stream: int, shortest_um: float, longest_um: float, n: int = 20) -> "Waves":
        """Waves of random direction and phase; their lengths are spread evenly in the logarithm."""
        rng = stream_rng(seed, stream)
        length = np.exp(rng.uniform(np.log(shortest_um), np.log(longest_um), n))
        # Directions are stratified: with few waves, chance would often make the whole field run one way.
        angle = (np.arange(n) + rng.uniform(0, 1, n)) * np.pi / n
        rng.shuffle(angle)
        k = 2 * np.pi / length
        amplitude = np.sqrt(length)
        amplitude *= np.sqrt(2.0 / np.sum(amplitude**2))
        return cls(k * np.cos(angle), k * np.sin(angle), rng.uniform(0, 2 * np.pi, n), amplitude)

    def at(self, x_um: NDArray[np.float64], y_um: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values at points; any shape."""
        arg = x_um[..., None] * self.kx + y_um[..., None] * self.ky + self.phase
        result: NDArray[np.float64] = (np.cos(arg) * self.amplitude).sum(axis=-1)
        return result

    def slope(
        self, x_um: NDArray[np.float64], y_um: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Derivatives along x and y, per micrometre."""
        steep = -np.sin(x_um[..., None] * self.kx + y_um[..., None] * self.ky + self.phase) * self.amplitude
        return (steep * self.kx).sum(axis=-1), (steep * self.ky).sum(axis=-1)

    def grid(self, x_um: NDArray[np.float64], y_um: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values on the grid of ``x_um`` (columns) and ``y_um`` (rows): (len(y_um), len(x_um))."""
        along = np.exp(1j * (x_um[:, None] * self.kx + self.phase)) * self.amplitude  # (x, waves)
        down = np.exp(1j * (y_um[:, None] * self.ky))  # (y, waves)
        result: NDArray[np.float64] = down.real @ along.real.T - down.imag @ along.imag.T
        return result
