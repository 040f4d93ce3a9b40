"""How good a network is on images that were kept back: one number a data set and task."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathopipe.segmentation.augment import whole_image
from pathopipe.segmentation.datasets import OBJECT_TASKS
from pathopipe.segmentation.decode import instances_of, to_maps
from pathopipe.segmentation.examples import Example
from pathopipe.segmentation.metrics import Panoptic, overlap, panoptic
from pathopipe.segmentation.network import STRIDE_PX, SegmentationNetwork

__all__ = ["Case", "Scores", "examine", "validate"]


@dataclass(frozen=True, slots=True)
class Scores:
    """By task and data set: PQ of nuclei, Dice of glands and lumina, share of right tissue types.

    Data sets without a single object of a task have no PQ or Dice: it would be 0 or 1 by a pixel.
    """

    by_task: Mapping[str, Mapping[str, float]]

    @property
    def mean(self) -> float:
        """Mean over tasks of the mean over data sets."""
        means = [float(np.mean(list(each.values()))) for each in self.by_task.values() if each]
        return float(np.mean(means)) if means else 0.0

    def flat(self) -> dict[str, float]:
        """``{"nuclei/dsb2018": 0.61, ...}``."""
        return {
            f"{task}/{name}": round(value, 5) for task, each in self.by_task.items() for name, value in each.items()
        }

    @classmethod
    def from_flat(cls, flat: Mapping[str, float]) -> "Scores":
        """The inverse of :meth:`flat`."""
        by_task: dict[str, dict[str, float]] = defaultdict(dict)
        for key, value in flat.items():
            task, _, name = key.partition("/")
            by_task[task][name] = value
        return cls(dict(by_task))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a network found on one image, beside what is there; all at the network's resolution."""

    dataset: str
    name: str
    rgb: NDArray[np.uint8]
    truth: Mapping[str, NDArray[np.int32]]
    """By labelled task, (height, width); 0 where nothing is known."""
    found: Mapping[str, NDArray[np.int32]]
    """The same of every task of the network; 0 where nothing is known of a labelled one."""
    nuclei: Panoptic | None
    """None where nuclei are not labelled."""
    overlap_px: Mapping[str, tuple[int, int]]
    """Of glands and lumina that are labelled: twice the pixels in common, and the pixels of both."""
    tissue_types: NDArray[np.float32]
    """(classes,) mean probabilities; empty where the network has no tissue types."""
    allowed: frozenset[int] | None
    """Tissue types that the image may be of."""

    def score(self, task: str) -> float | None:
        """PQ of nuclei, Dice of glands and lumina; None where the task is not labelled."""
        if task == "nuclei":
            return None if self.nuclei is None else self.nuclei.pq
        if task not in self.overlap_px:
            return None
        both, each = self.overlap_px[task]
        return both / each if each else 1.0


def examine(network: SegmentationNetwork, example: Example, *, device: torch.device, autocast: bool) -> Case:
    """Run a network on a whole image, at its own resolution."""
    spec = network.spec
    crop = whole_image(example, mpp=spec.mpp, multiple_px=STRIDE_PX)
    batch = torch.from_numpy(crop.rgb[None]).permute(0, 3, 1, 2).to(device)
    network.eval()
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        outputs = network(batch)
    maps = to_maps(outputs, spec)[0].cpu().numpy()
    maps[~crop.inside_image] = 0
    found = {name: one.labels for name, one in instances_of(maps, spec, spec.mpp).items()}
    truth: dict[str, NDArray[np.int32]] = {}
    overlap_px: dict[str, tuple[int, int]] = {}
    for task in OBJECT_TASKS:
        if task in found and task in crop.labels:
            known = crop.known[task]
            truth[task] = _dense(np.where(known, crop.labels[task], 0))
            found[task] = _dense(np.where(known, found[task], 0))
            if task != "nuclei":
                both = int(np.count_nonzero((truth[task] > 0) & (found[task] > 0)))
                overlap_px[task] = (2 * both, int(np.count_nonzero(truth[task])) + int(np.count_nonzero(found[task])))
    share = np.zeros(0, np.float32)
    if "tissue_types" in outputs:
        share = _mean_share(outputs["tissue_types"], crop.inside_image)
    return Case(
        dataset=example.dataset,
        name=example.name,
        rgb=crop.rgb,
        truth=truth,
        found=found,
        nuclei=panoptic(overlap(truth["nuclei"], found["nuclei"])) if "nuclei" in truth else None,
        overlap_px=overlap_px,
        tissue_types=share,
        allowed=crop.tissue_types,
    )


def validate(
    network: SegmentationNetwork, examples: Iterable[Example], *, device: torch.device, autocast: bool
) -> Scores:
    """Score a network on whole images; objects of a data set are pooled."""
    has_objects: set[tuple[str, str]] = set()
    pairs: dict[str, list[Panoptic]] = defaultdict(list)
    pixels: dict[tuple[str, str], NDArray[np.int64]] = defaultdict(lambda: np.zeros(2, np.int64))
    right: dict[str, list[bool]] = defaultdict(list)
    for example in examples:
        case = examine(network, example, device=device, autocast=autocast)
        has_objects |= {(task, case.dataset) for task, labels in case.truth.items() if labels.any()}
        if case.nuclei is not None:
            pairs[case.dataset].append(case.nuclei)
        for task, counted in case.overlap_px.items():
            pixels[task, case.dataset] += counted
        if case.allowed and len(case.tissue_types):
            right[case.dataset].append(int(case.tissue_types.argmax()) in case.allowed)
    by_task: dict[str, dict[str, float]] = defaultdict(dict)
    for name, tallies in pairs.items():
        if ("nuclei", name) in has_objects:
            by_task["nuclei"][name] = sum(tallies[1:], tallies[0]).pq
    for (task, name), (both, each) in pixels.items():
        if (task, name) in has_objects:
            by_task[task][name] = float(both / each)
    for name, hits in right.items():
        by_task["tissue_types"][name] = float(np.mean(hits))
    return Scores(dict(by_task))


def _dense(labels: NDArray[np.integer]) -> NDArray[np.int32]:
    """Numbers 1 to n without gaps: small objects may be lost at another resolution."""
    values, at = np.unique(labels, return_inverse=True)
    dense: NDArray[np.int32] = at.reshape(labels.shape).astype(np.int32)
    return dense if values[0] == 0 else dense + 1


def _mean_share(logits: Tensor, inside: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Mean probabilities over the cells that lie in the image."""
    n = logits.shape[-1]
    in_image = inside.reshape(n, STRIDE_PX, n, STRIDE_PX).mean(axis=(1, 3)) > 0.5
    if not in_image.any():
        in_image[0, 0] = True  # the image is smaller than half a cell, and lies at the top left
    share = logits[0].float().softmax(0).cpu().numpy()
    mean: NDArray[np.float32] = share[:, in_image].mean(axis=1)
    return mean
