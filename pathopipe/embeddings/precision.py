"""Which arithmetic a network runs in: chosen by device and CPU, and bf16 weights only where they agree with fp32."""

import copy
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

__all__ = [
    "LEAST_COSINE",
    "Asked",
    "Native",
    "Precision",
    "check_tiles",
    "choose_precision",
    "cpu_has_bf16",
    "least_cosine",
    "with_bf16_weights",
]

Asked = Literal["auto", "fp32", "bf16", "fp16"]
"""What ``embed.precision`` may say."""

Native = Literal["fp32", "bf16", "fp16"]
"""Autocast that the authors of an encoder use on a GPU."""

Precision = Literal["fp32", "bf16 autocast", "fp16 autocast", "bf16 weights", "openvino fp32", "openvino bf16"]
"""What an encoder's identity says. All of these give different numbers, so no two are mixed."""

LEAST_COSINE = 0.999
"""Vectors of bf16 weights must be nearer to those of fp32 than this, each of them."""

_CPUINFO = Path("/proc/cpuinfo")


def choose_precision(asked: Asked, device: torch.device, native: Native | None = None) -> Precision:
    """What ``auto`` means on a device.

    On a CPU it is bf16 weights where the CPU has bf16 arithmetic, whatever the row says: they are tried against fp32.
    On a GPU it is what the encoder's authors use, or fp32 where that is bf16 and the GPU has none: fp16 has a smaller
    range, which some networks leave.

    Args:
        asked: What the user said.
        device: Where the network runs.
        native: What its authors use; None where there is no recipe, then autocast to what the GPU has.
    """
    if asked == "fp32":
        return "fp32"
    if asked == "bf16":
        return "bf16 autocast"
    if asked == "fp16":
        return "fp16 autocast"
    if device.type == "cpu":
        return "bf16 weights" if cpu_has_bf16() else "fp32"
    if native == "fp32":
        return "fp32"
    if native == "fp16":
        return "fp16 autocast"
    if torch.cuda.is_bf16_supported():
        return "bf16 autocast"
    return "fp32" if native == "bf16" else "fp16 autocast"


def cpu_has_bf16() -> bool:
    """Whether this x86 CPU multiplies bf16 in hardware (AVX-512 or AMX); False where Linux does not say so."""
    # torch tells it in public only in late versions; without the hardware it computes bf16 slower than fp32.
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return "avx512_bf16" in flags or "amx_bf16" in flags


def with_bf16_weights(model: nn.Module) -> nn.Module:
    """A copy of a network with bf16 weights, laid out channels last; the fp32 one is left as it is."""
    half: nn.Module = copy.deepcopy(model).to(torch.bfloat16).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return half


@cache
def check_tiles(side_px: int = 256) -> NDArray[np.uint8]:
    """(4, side_px, side_px, 3) uint8 drawn tiles with stroma, nuclei, a lumen and glass, always the same.

    The choice of a precision is part of an encoder's identity, so it can't hang on whichever slide comes first.
    """
    from pathopipe.synth import DrawnSlide, SynthSpec

    drawn = DrawnSlide(SynthSpec(width_px=2 * side_px, height_px=2 * side_px, mpp=0.5, seed=1, pen=False, dust=False))
    tiles = drawn.read(0, 0, 2 * side_px, 2 * side_px).reshape(2, side_px, 2, side_px, 3).swapaxes(1, 2)
    return np.ascontiguousarray(tiles.reshape(4, side_px, side_px, 3))


def least_cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The least cosine between rows of two (n, features) arrays; NaN where a row is not finite or zero."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return float(cosines.min())
