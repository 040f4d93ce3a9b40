"""What each stage of a slide needs of a machine, from its header and the settings: estimates on the safe side."""

import math
from typing import Final

from pathopipe.cohort.plan import Needs
from pathopipe.config import Config
from pathopipe.pipeline.encoders import specs_of, tilings_of
from pathopipe.records import SlideInfo

__all__ = ["most_tiles", "needs_of"]

# Measured on one core of a server (README, "Measured"), then doubled.
_HANDCRAFTED_S_A_TILE: Final = 0.018
_CPU_S_A_TILE_AND_MEGAPARAM: Final = 0.01
_GPU_S_A_TILE_AND_MEGAPARAM: Final = 0.0001
_SEGMENT_S_A_MEGAPIXEL: Final = 0.4
# Slides are rarely covered by more; those that are get a second try with twice the time.
_TISSUE_SHARE: Final = 0.5
_BASE_MB: Final = 800
_MB_A_MEGAPIXEL: Final = 0.06
_TORCH_MB: Final = 2000
# Weights in fp32, a copy while they are loaded, and what a batch leaves in between.
_MB_A_MEGAPARAM: Final = 12
_UNKNOWN_MEGAPARAMS: Final = 300.0
_LEAST_MINUTES: Final = 10


def most_tiles(info: SlideInfo, config: Config) -> int:
    """How many tiles a slide has on its largest grid, were all of it tissue; 0 where its resolution is not known."""
    if info.mpp is None:
        return 0
    width_um, height_um = (side * mpp for side, mpp in zip(info.dims_l0, info.mpp, strict=True))
    counts = []
    for tiling in tilings_of(config):
        stride_um = (tiling.side_px - tiling.overlap_px) * tiling.mpp
        counts.append(math.ceil(width_um / stride_um) * math.ceil(height_um / stride_um))
    return max(counts)


def needs_of(info: SlideInfo | None, config: Config) -> dict[str, Needs]:
    """Memory, time and GPUs of every stage.

    Args:
        info: The slide's header; None where it can't be opened, so that a stage finds out why.
        config: The settings. A GPU is asked for where ``embed.device`` is ``cuda`` and an encoder is a network;
            ``auto`` takes one that is there, but does not wait for one.
    """
    megapixels = 0.0 if info is None else info.dims_l0[0] * info.dims_l0[1] / 1e6
    tiles = 0 if info is None else math.ceil(most_tiles(info, config) * _TISSUE_SHARE)
    mem_mb = _BASE_MB + _MB_A_MEGAPIXEL * megapixels
    networks = [spec for spec in specs_of(config) if spec.loader != "handcrafted"]
    megaparams = [spec.params_m or _UNKNOWN_MEGAPARAMS for spec in networks]
    on_gpu = config.embed.device == "cuda"
    a_tile = _GPU_S_A_TILE_AND_MEGAPARAM if on_gpu else _CPU_S_A_TILE_AND_MEGAPARAM
    embed_s = tiles * (a_tile * sum(megaparams) + _HANDCRAFTED_S_A_TILE)
    embed_mb = mem_mb + (_TORCH_MB + _MB_A_MEGAPARAM * sum(megaparams) if networks else 0)
    return {
        "tissue": _needs(mem_mb, 0),
        "tiles": _needs(mem_mb, 0),
        "embed": _needs(embed_mb, embed_s, gpus=int(on_gpu and bool(networks))),
        "segment": _needs(mem_mb + _TORCH_MB, megapixels * _SEGMENT_S_A_MEGAPIXEL * _TISSUE_SHARE),
    }


def _needs(mem_mb: float, seconds: float, *, gpus: int = 0) -> Needs:
    # Round numbers: schedulers pack jobs of equal size better.
    return Needs(math.ceil(mem_mb / 100) * 100, _LEAST_MINUTES + math.ceil(seconds / 60), gpus)
