"""Batches for training: which crop stands where is decided by seed, step and place, so a resumed run sees the same."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathopipe.segmentation.augment import Crop, cut_crop, restain
from pathopipe.segmentation.examples import Example
from pathopipe.segmentation.network import NetworkSpec
from pathopipe.segmentation.targets import Targets, make_targets

__all__ = ["Batch", "Pool", "iterate_batches", "stack_targets"]

_SMALL = 0.7
"""Images below this share of a crop's side are laid side by side, four to a crop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The training images of one data set."""

    name: str
    share: float
    zoom: tuple[float, float]
    examples: Sequence[Example]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one step learns from."""

    step: int
    rgb: Tensor
    """(n, 3, side, side) uint8, as the student sees it."""
    plain: Tensor
    """The same before its stain was changed: what a teacher sees."""
    targets: dict[str, Tensor]
    untold: Tensor
    """(n,) True where nuclei are not labelled at all, so that a teacher may tell them."""
    inside: Tensor
    """(n, side, side) 1 where there is an image."""
    names: tuple[str, ...]
    """Data set and image of each sample."""


def iterate_batches(
    pools: Sequence[Pool],
    spec: NetworkSpec,
    *,
    first_step: int,
    last_step: int,
    batch_size: int,
    crop_px: int,
    seed: int,
    strength: float,
    threads: int,
) -> Iterator[Batch]:
    """Batches of steps ``first_step`` to ``last_step - 1``, made in threads a little ahead."""
    # By source first: a slide that gave a hundred crops says no more than one that gave five.
    sources = [_by_source(pool.examples) for pool in pools]
    share = np.array([pool.share for pool in pools])
    share /= share.sum()

    def sample(step: int, place: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Targets, bool, Crop, str]:
        rng = np.random.default_rng([seed, step, place])
        # Places take turns by share, so that every batch holds about the same mixture.
        at = int(np.searchsorted(np.cumsum(share), (place + rng.random()) / batch_size, side="right"))
        at = min(at, len(pools) - 1)
        crops, names = _crops(pools[at], sources[at], rng, crop_px, spec.mpp)
        made = [make_targets(crop, spec) for crop in crops]
        targets = made[0] if len(made) == 1 else _quartered(made)
        plain = crops[0].rgb if len(crops) == 1 else _laid([crop.rgb for crop in crops])
        stained = [restain(crop.rgb, rng, strength) for crop in crops]
        rgb = stained[0] if len(stained) == 1 else _laid(stained)
        return rgb, plain, targets, "nuclei" not in crops[0].labels, crops[0], f"{pools[at].name}: {', '.join(names)}"

    def batch(step: int) -> Batch:
        samples = [sample(step, place) for place in range(batch_size)]
        return Batch(
            step=step,
            rgb=_channels_first([one[0] for one in samples]),
            plain=_channels_first([one[1] for one in samples]),
            targets=stack_targets([one[2] for one in samples]),
            untold=torch.tensor([one[3] for one in samples]),
            inside=torch.from_numpy(
                np.stack(
                    [
                        one[4].inside_image
                        if one[4].inside_image.shape[0] == crop_px
                        else np.ones((crop_px, crop_px), np.bool_)
                        for one in samples
                    ]
                ).astype(np.float32)
            ),
            names=tuple(one[5] for one in samples),
        )

    with ThreadPoolExecutor(threads, thread_name_prefix="crops") as pool:
        ahead: list[Future[Batch]] = []
        step = first_step
        try:
            while step < last_step or ahead:
                while step < last_step and len(ahead) <= threads:
                    ahead.append(pool.submit(batch, step))
                    step += 1
                yield ahead.pop(0).result()
        finally:
            for future in ahead:
                future.cancel()


def _by_source(examples: Sequence[Example]) -> list[list[Example]]:
    grouped: dict[str, list[Example]] = {}
    for example in examples:
        grouped.setdefault(example.source, []).append(example)
    return list(grouped.values())


def _crops(
    pool: Pool, sources: list[list[Example]], rng: np.random.Generator, side_px: int, mpp: float
) -> tuple[list[Crop], list[str]]:
    """One crop, or four of half the side where the images are small."""

    def pick() -> Example:
        source = sources[int(rng.integers(len(sources)))]
        return source[int(rng.integers(len(source)))]

    first = pick()
    length_px = min(first.rgb.shape[:2]) * first.mpp / mpp * float(np.sqrt(pool.zoom[0] * pool.zoom[1]))
    if length_px >= _SMALL * side_px:
        return [cut_crop(first, rng, side_px=side_px, mpp=mpp, zoom=pool.zoom)], [first.name]
    four = [first, pick(), pick(), pick()]
    crops = [cut_crop(one, rng, side_px=side_px // 2, mpp=mpp, zoom=pool.zoom) for one in four]
    return crops, [one.name for one in four]


def _laid(four: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return np.vstack([np.hstack(four[:2]), np.hstack(four[2:])])


def _quartered(four: Sequence[Targets]) -> Targets:
    """Targets of four crops laid side by side; what is known of a whole crop is said of its cells."""
    fields = {}
    cells = [
        one.tissue_cells if not one.tissue_whole else (one.tissue_weight > 0).astype(np.int32) * one.tissue_whole
        for one in four
    ]
    for name in Targets._fields:
        if name == "tissue_whole":
            continue
        planes = cells if name == "tissue_cells" else [getattr(one, name) for one in four]
        fields[name] = np.concatenate(
            [np.concatenate(planes[:2], axis=-1), np.concatenate(planes[2:], axis=-1)], axis=-2
        )
    return Targets(tissue_whole=0, **fields)


def _channels_first(images: Sequence[NDArray[np.uint8]]) -> Tensor:
    # NHWC memory seen as NCHW: the layout in which convolutions are quickest.
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def stack_targets(targets: Sequence[Targets]) -> dict[str, Tensor]:
    """Targets of a batch, by field."""
    columns: Mapping[str, list[NDArray[np.generic]]] = {
        name: [np.asarray(getattr(one, name)) for one in targets] for name in Targets._fields
    }
    return {name: torch.from_numpy(np.stack(column)) for name, column in columns.items()}
