"""Proves an encoder: that it is built as its row says, and that its weights still give the numbers they once gave."""

import json
import math
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import pathopipe
from pathopipe.config import EmbedConfig
from pathopipe.embeddings.encoder import NetworkEncoder
from pathopipe.embeddings.networks import build_network, measure, timm_recipe
from pathopipe.embeddings.precision import LEAST_COSINE, Asked, check_tiles, cpu_has_bf16, least_cosine
from pathopipe.embeddings.recipe import EncoderSpec, Transform
from pathopipe.embeddings.transform import TileTransform, resized_size
from pathopipe.errors import EncoderError, StoreWriteError
from pathopipe.files import durable_file

__all__ = ["Check", "check_recipe", "check_weights"]

SAME_COSINE: Final = 0.9999
"""The vector of the drawn tile must be nearer than this to the one that was kept; fp32 on a CPU."""

_SAME_LENGTH = 0.01
_SAME_PARAMS = 1e-3
_GREY_LEVELS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    what: str
    found: str
    expected: str = ""
    """Empty where nobody says what it should be."""
    holds: bool | None = None
    """None where it is only told."""


def check_recipe(spec: EncoderSpec) -> list[Check]:
    """Look at what needs no weights: size, tokens, numbers a tile and transform of a row, built without memory.

    Parameters must agree within 0.1 %, for that much already means another architecture (a missing SwiGLU, another
    position grid). A white tile and one bright pixel go through the transform, and through PIL by hand.

    Raises:
        EncoderError: A bare architecture of timm that timm does not have.
    """
    recipe = spec.transform or timm_recipe(build_network(spec, device="meta").network)
    return [*_check_network(spec), *_check_transform(recipe, spec.tile_px)]


def check_weights(
    spec: EncoderSpec, config: EmbedConfig, vectors: Path, *, download: bool = False
) -> tuple[list[Check], list[str]]:
    """Load the weights and compare the vector of a drawn tile with the one of the first time.

    The vector is computed in fp32 on the CPU. It is kept in ``vectors``, one file a set of weights, and belongs to
    this machine's user; what it is compared with was computed there too.

    Args:
        spec: The encoder.
        config: Where the weights are, and the device whose half precisions are tried.
        vectors: Folder of the kept vectors.
        download: Whether weights may be fetched.

    Returns:
        The checks, and notes for the user.

    Raises:
        EncoderError: It can't be built here, there are no weights, or they don't fit.
    """
    on_cpu = config.model_copy(update={"device": "cpu", "precision": "fp32"})
    encoder = NetworkEncoder(spec, on_cpu, download=download)
    side_px = spec.tile_px if spec.transform is not None and spec.transform.resize == "none" else 256
    tiles = check_tiles(side_px)
    full = encoder.encode(tiles)
    checks = [
        Check(what="weights", found=f"{encoder.about['weights_file']}: every key fits", holds=True),
        Check(what="sha256", found=encoder.identity["weights_sha256"]),
    ]
    compared, notes = _compare_vector(encoder, full[0], tiles[0], vectors)
    checks.append(compared)
    for asked, device in _half_precisions(config):
        half = NetworkEncoder(spec, config.model_copy(update={"device": device, "precision": asked}), download=False)
        cosine = least_cosine(full, half.encode(tiles))
        checks.append(
            Check(
                what=f"{half.precision} on {device}",
                found=f"least cosine to fp32 {cosine:.6f}",
                expected=f"above {LEAST_COSINE:g}",
                holds=cosine > LEAST_COSINE,
            )
        )
    return checks, notes


def _check_network(spec: EncoderSpec) -> list[Check]:
    try:
        measured = measure(spec)
    except EncoderError as error:
        return [Check(what="network", found=f"can't be built here: {error}", expected="built", holds=False)]
    checks = [
        Check(
            what="parameters",
            found=f"{measured.params_m:.3f} M",
            expected="" if spec.params_m is None else f"{spec.params_m:.3f} M",
            holds=None if spec.params_m is None else abs(measured.params_m / spec.params_m - 1) < _SAME_PARAMS,
        )
    ]
    if measured.tokens is not None:
        checks += [
            Check(
                what="tokens",
                found=str(measured.tokens),
                expected="" if spec.tokens is None else str(spec.tokens),
                holds=None if spec.tokens is None else measured.tokens == spec.tokens,
            ),
        ]
        if spec.outputs.keys() != {"pooled"}:
            checks.append(_check_prefix(measured.tokens, spec.prefix_tokens))
    for output, found in measured.features.items():
        expected = spec.outputs[output]
        checks.append(
            Check(
                what=f"numbers of {output}",
                found=str(found),
                expected=str(expected or ""),
                holds=found == expected if expected else None,
            )
        )
    return checks


def _check_prefix(tokens: int, prefix_tokens: int) -> Check:
    """That what follows the prefix fills a square; tokens that are counted wrong leave a ragged one."""
    side = math.isqrt(max(tokens - prefix_tokens, 0))
    is_square = side > 0 and side * side == tokens - prefix_tokens
    found = f"{side} x {side} patches" if is_square else f"{tokens - prefix_tokens} patches"
    return Check(what=f"after {prefix_tokens} prefix tokens", found=found, expected="a square", holds=is_square)


def _check_transform(recipe: Transform, tile_px: int) -> list[Check]:
    transform = TileTransform(recipe, torch.device("cpu"))
    white = np.full((1, tile_px, tile_px, 3), 255, np.uint8)
    try:
        batch = transform(torch.from_numpy(white)).numpy()
    except EncoderError as error:
        return [Check(what="transform", found=str(error), expected=f"takes tiles of {tile_px} px", holds=False)]
    wanted = [(1 - mean) / std for mean, std in zip(recipe.mean, recipe.std, strict=True)]
    low, high = batch.min(axis=(0, 2, 3)), batch.max(axis=(0, 2, 3))
    is_white = bool(np.allclose(low, wanted, atol=1e-5) and np.allclose(high, wanted, atol=1e-5))
    pixel = np.zeros((tile_px, tile_px, 3), np.uint8)
    pixel[tile_px // 2, tile_px // 2] = 255
    ours, by_hand = transform(torch.from_numpy(pixel[None])).numpy()[0], _by_pil(pixel, recipe)
    same_size = ours.shape == by_hand.shape
    apart = float((np.abs(ours - by_hand) * np.array(recipe.std)[:, None, None]).max() * 255) if same_size else math.nan
    size = f"{ours.shape[2]} x {ours.shape[1]} px"
    return [
        Check(
            what="a white tile",
            found=", ".join(f"{value:.4f}" for value in high),
            expected=", ".join(f"{value:.4f}" for value in wanted),
            holds=is_white,
        ),
        Check(
            what="one bright pixel",
            found=f"{size}, {apart:.2g} grey levels from PIL",
            expected=f"{by_hand.shape[2]} x {by_hand.shape[1]} px, at most {_GREY_LEVELS:g}",
            holds=same_size and apart <= _GREY_LEVELS,
        ),
    ]


def _by_pil(tile: NDArray[np.uint8], recipe: Transform) -> NDArray[np.float64]:
    """(height, width, 3) uint8 -> (3, H, W), by PIL and plain arithmetic."""
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    height, width = resized_size(recipe, (tile.shape[0], tile.shape[1]))
    image = Image.fromarray(tile)
    if image.size != (width, height):
        image = image.resize((width, height), filters[recipe.filter])
    if recipe.crop_px is not None:
        left, top = round((width - recipe.crop_px) / 2), round((height - recipe.crop_px) / 2)
        image = image.crop((left, top, left + recipe.crop_px, top + recipe.crop_px))
    values = (np.asarray(image, np.float64) / 255 - recipe.mean) / recipe.std
    return np.moveaxis(values, 2, 0)


def _half_precisions(config: EmbedConfig) -> list[tuple[Asked, str]]:
    """The half precisions of the device that a run would use."""
    if config.device != "cpu" and torch.cuda.is_available():
        halves: list[tuple[Asked, str]] = [("fp16", "cuda")]
        return [("bf16", "cuda"), *halves] if torch.cuda.is_bf16_supported() else halves
    return [("bf16", "cpu")] if cpu_has_bf16() else []


def _compare_vector(
    encoder: NetworkEncoder, vector: NDArray[np.float32], tile: NDArray[np.uint8], folder: Path
) -> tuple[Check, list[str]]:
    """Compare a vector with the kept one of these weights; keep it where there is none."""
    path = folder / f"{encoder.identity['name']}-{encoder.identity['weights_sha256'][:16]}.json"
    now = {
        "identity": encoder.identity,
        "versions": {"pathopipe": pathopipe.__version__, "torch": encoder.about["torch"], **encoder.about["versions"]},
        "tile_sha256": sha256(tile.tobytes()).hexdigest(),
        "vector": vector.tolist(),
    }
    if not path.exists():
        others = [other for other in folder.glob(f"{encoder.identity['name']}-*.json") if _is_vector_of(other, path)]
        check, notes = _keep(path, now)
        if others:
            notes = [f"this is another weights file than {len(others)} that were checked before", *notes]
        return check, notes
    kept = _read_kept(path)
    if kept is None or kept["tile_sha256"] != now["tile_sha256"]:
        why = "it was damaged" if kept is None else f"pathopipe {kept['versions']['pathopipe']} drew another tile"
        check, notes = _keep(path, now)
        return check, [f"the kept vector was made anew, as {why}: {path}", *notes]
    before = np.array(kept["vector"], np.float32)
    changed = _differences(kept, now)
    if len(before) != len(vector):
        found, holds = f"{len(vector)} numbers, {len(before)} were kept", False
    else:
        cosine = least_cosine(before[None], vector[None])
        longer = float(np.linalg.norm(vector) / np.linalg.norm(before) - 1)
        found = f"cosine {cosine:.6f} to the kept one, length {longer:+.2%}"
        holds = cosine > SAME_COSINE and abs(longer) < _SAME_LENGTH
    notes = []
    if not holds:
        reason = f"since then: {'; '.join(changed)}" if changed else "no version and nothing of the recipe has changed"
        notes.append(f"the vector is not the kept one; {reason}. To keep the new one, remove {path}")
    elif changed:
        notes.append(f"the vector has stayed the same, though since it was kept: {'; '.join(changed)}")
    return Check(
        what="vector of a drawn tile", found=found, expected=f"cosine above {SAME_COSINE:g}", holds=holds
    ), notes


def _is_vector_of(other: Path, path: Path) -> bool:
    """Whether a file holds the vector of the same encoder; names of encoders may begin alike."""
    return other.stem.rpartition("-")[0] == path.stem.rpartition("-")[0]


def _keep(path: Path, now: dict[str, Any]) -> tuple[Check, list[str]]:
    try:
        with durable_file(path) as file:
            file.write(json.dumps(now).encode())
    except StoreWriteError as error:
        return Check(what="vector of a drawn tile", found="not compared"), [f"the vector can't be kept: {error}"]
    return Check(what="vector of a drawn tile", found="kept now, for the next time"), []


def _read_kept(path: Path) -> dict[str, Any] | None:
    """What is in a file of a vector; None where it is damaged."""
    try:
        kept = json.loads(path.read_bytes())
        is_whole = (
            isinstance(kept["identity"], dict)
            and isinstance(kept["versions"], dict)
            and isinstance(kept["versions"]["pathopipe"], str)
            and isinstance(kept["tile_sha256"], str)
            and np.isfinite(np.array(kept["vector"], np.float32)).all()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept if is_whole and np.ndim(kept["vector"]) == 1 else None


def _differences(kept: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, which versions and which parts of the recipe are others than then."""
    return [
        f"{name} was {kept[part].get(name)}, is {now[part].get(name)}"
        for part in ("versions", "identity")
        for name in sorted({*kept[part], *now[part]})
        if kept[part].get(name) != now[part].get(name)
    ]
