"""The encoders of a plan: which tiles each wants, what is wrong with them, and those that are built already."""

from collections.abc import Mapping

from pathopipe.config import Config, TilesConfig
from pathopipe.embeddings.catalog import TIMM_PREFIX, find_encoder
from pathopipe.embeddings.embed import Encoder, build_encoder
from pathopipe.embeddings.recipe import EncoderSpec
from pathopipe.errors import UsageError
from pathopipe.pipeline.common import RunPlan
from pathopipe.registry import nearest

__all__ = [
    "batch_size_of",
    "built",
    "check_weights",
    "chunk_rows_of",
    "departure",
    "spec_of",
    "specs_of",
    "tiles_of",
    "tilings_of",
]

_BATCH_SIZE = {"handcrafted": 32, "cpu": 32, "cuda": 256}
_CHUNK_ROWS = {"handcrafted": 256, "cpu": 256, "cuda": 1024}


def spec_of(name: str, config: Config) -> EncoderSpec:
    """The row of an encoder, of the catalogue or of the user's own.

    Raises:
        UsageError: No such name.
    """
    return find_encoder(name, config.embed.catalog)


def specs_of(config: Config) -> list[EncoderSpec]:
    """The rows of all encoders that a config names, each once."""
    return [spec_of(name, config) for name in dict.fromkeys(config.embed.encoder)]


def tiles_of(spec: EncoderSpec, config: Config) -> TilesConfig:
    """The tiles that an encoder is given: its own recipe's, where the config does not say otherwise."""
    return config.tiles.settled(side_px=spec.tile_px, mpp=spec.mpp)


def tilings_of(config: Config) -> dict[TilesConfig, list[EncoderSpec]]:
    """The encoders by the tiles they want: those of one grid share what is read."""
    tilings: dict[TilesConfig, list[EncoderSpec]] = {}
    for spec in specs_of(config):
        tilings.setdefault(tiles_of(spec, config), []).append(spec)
    return tilings


def departure(spec: EncoderSpec, side_px: int, mpp: float) -> str | None:
    """In words, how tiles differ from those that an encoder was trained on."""
    if spec.loader == "handcrafted" or spec.name.startswith(TIMM_PREFIX) or (side_px, mpp) == (spec.tile_px, spec.mpp):
        return None
    return f"tiles of {side_px} px at {mpp:g} um/px depart from its recipe, {spec.tile_px} px at {spec.mpp:g} um/px"


def check_weights(config: Config) -> None:
    """UsageError where weights are given for an encoder that is not run, or one file for several."""
    weights, networks = config.embed.weights, [spec for spec in specs_of(config) if spec.loader != "handcrafted"]
    names = list(dict.fromkeys(spec.base_name for spec in networks))
    if isinstance(weights, dict):
        for name in weights.keys() - names - {spec.name for spec in networks}:
            raise UsageError(f"embed.weights: '{name}' is not among the encoders of this run; {nearest(name, names)}")
    elif weights is not None and len(names) > 1:
        raise UsageError(
            f"embed.weights={weights} is one file for {len(names)} encoders ({', '.join(names)}); give a file for "
            "each: --set 'embed.weights={NAME: FILE, NAME: FILE}'"
        )


# Building a network takes seconds, so a process keeps the last ones; there are no more than a run names.
_encoders: dict[tuple[object, ...], Encoder] = {}


def built(spec: EncoderSpec, plan: RunPlan, tile_mpp: tuple[float, float]) -> Encoder:
    """The encoder, built once a process.

    Raises:
        EncoderError: It can't be built here, there are no weights, or they don't fit.
    """
    # Only handcrafted numbers depend on the exact size of a tile's pixels.
    settings = plan.config.embed.model_dump_json()
    key = (spec.name, settings, plan.threads, tile_mpp if spec.loader == "handcrafted" else None)
    if key not in _encoders:
        _encoders[key] = build_encoder(spec, plan.config.embed, mpp=tile_mpp, threads=plan.threads)
    return _encoders[key]


def batch_size_of(encoder: Encoder, plan: RunPlan) -> int:
    """Tiles that an encoder sees at once."""
    return plan.config.embed.batch_size or _by_device(_BATCH_SIZE, encoder)


def chunk_rows_of(encoder: Encoder, plan: RunPlan) -> int:
    """Tiles a storage chunk."""
    return plan.config.embed.chunk_rows or _by_device(_CHUNK_ROWS, encoder)


def _by_device(sizes: Mapping[str, int], encoder: Encoder) -> int:
    name = encoder.identity["name"]
    return sizes[name] if name in sizes else sizes[encoder.about["device"]]
