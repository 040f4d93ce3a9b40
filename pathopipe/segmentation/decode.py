"""From the network's logits to maps of bytes, and from maps to objects, by rules of bounded reach."""

from collections.abc import Mapping
from typing import Final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pathopipe.segmentation.model import Instances, Layer
from pathopipe.segmentation.network import NetworkSpec, TaskSpec
from pathopipe.segmentation.parting import NucleusSize, grow_labels, part_landscape, parting_reach_px
from pathopipe.segmentation.trace import Runs, connect_runs, find_runs, paint_runs, sum_runs

__all__ = ["DECODE_VERSION", "instances_of", "layers_of", "map_channels", "reach_px", "to_maps"]

DECODE_VERSION: Final = 1
"""Raised when the same logits give other objects."""

_SIZE = NucleusSize(min_um2=6.0, max_um2=700.0, max_extent_um=30.0, usual_um2=300.0)
_NUCLEAR = 128
_SURE = 0.75
"""Least mean probability of a nucleus: what the network doubts all over is out of focus, debris or texture."""
_GLAND = 128
_BORDER = 128
_LUMEN = 128
_GLAND_GROW_UM = 3.0
"""A gland's own half of the border that parts it from its neighbour."""
_MIN_UM2 = {"glands": 300.0, "lumina": 40.0, "tissue_types": 2000.0}
_MIN_HOLE_UM2 = {"glands": 400.0, "lumina": 40.0, "tissue_types": 2000.0}
_TISSUE_STRIDE = 8
"""Classes of tissue are decided on a grid of this many pixels, from probabilities interpolated between cells of 32."""

Plane = NDArray[np.uint8]


def map_channels(spec: NetworkSpec) -> tuple[str, ...]:
    """What the channels of :func:`to_maps` are. Those that end in ``.class`` hold a class + 1, 0 for none."""
    channels: list[str] = []
    for task in spec.tasks:
        if task.name == "nuclei":
            channels += ["nuclei.inside", "nuclei.distance", *(["nuclei.class"] if len(task.classes) > 1 else [])]
        elif task.name == "glands":
            channels += ["glands.inside", "glands.border"]
        elif task.name == "lumina":
            channels += ["lumina.inside"]
        else:
            channels += ["tissue_types.class", "tissue_types.probability"]
    return tuple(channels)


def to_maps(outputs: Mapping[str, Tensor], spec: NetworkSpec) -> Tensor:
    """Logits of a batch -> (n, height, width, channels) uint8, on their device; see :func:`map_channels`.

    Probabilities are 0 to 255; classes are those of the highest probability. In memory each channel is a plane.
    """
    first = outputs[spec.tasks[0].name]
    scale = 32 if spec.tasks[0].name == "tissue_types" else 1
    maps = torch.empty(
        (len(first), len(map_channels(spec)), first.shape[2] * scale, first.shape[3] * scale),
        dtype=torch.uint8,
        device=first.device,
    )
    at = 0
    for task in spec.tasks:
        logits = outputs[task.name]
        if task.name == "tissue_types":
            _tissue_planes(logits.float(), maps[:, at : at + 2])
            at += 2
            continue
        for channel in range(2 if task.name in {"nuclei", "glands"} else 1):
            # What a plane is made from lies close together, which is quicker than all channels at once.
            maps[:, at] = _bytes(logits[:, channel].float().contiguous().sigmoid())
            at += 1
        if task.name == "nuclei" and len(task.classes) > 1:
            maps[:, at] = logits[:, 2:].float().argmax(1) + 1
            at += 1
    return maps.permute(0, 2, 3, 1)


def _bytes(share: Tensor) -> Tensor:
    return share.mul_(255).round_()


def _tissue_planes(logits: Tensor, into: Tensor) -> None:
    share = functional.interpolate(
        logits.softmax(1), scale_factor=32 // _TISSUE_STRIDE, mode="bilinear", align_corners=False
    )
    highest, at = share.max(1)
    for plane, values in ((0, at + 1), (1, _bytes(highest))):
        small = values.to(torch.uint8)
        into[:, plane] = small.repeat_interleave(_TISSUE_STRIDE, 1).repeat_interleave(_TISSUE_STRIDE, 2)


def layers_of(spec: NetworkSpec) -> tuple[Layer, ...]:
    """The layers that a network finds."""
    return tuple(
        Layer(
            name=task.name,
            classes=tuple(one.record for one in task.classes),
            joined=task.name != "nuclei",
            min_um2=_MIN_UM2.get(task.name, 0.0),
            min_hole_um2=_MIN_HOLE_UM2.get(task.name, 0.0),
        )
        for task in spec.tasks
    )


def reach_px(spec: NetworkSpec) -> int:
    """How far a pixel may lie that has a say in an object: see :class:`~pathopipe.segmentation.model.Model`."""
    return max(parting_reach_px(spec.mpp, _SIZE), round(_GLAND_GROW_UM / spec.mpp) + 2)


def instances_of(maps: Plane, spec: NetworkSpec, mpp: float, *, halo_px: int = 0) -> dict[str, Instances]:
    """The objects of every layer.

    Args:
        maps: (height, width, channels) as :func:`to_maps` makes them.
        spec: The network.
        mpp: Micrometres per pixel of the maps.
        halo_px: Width of the rim in which nuclei that have their centroid there may be left out.
    """
    plane: dict[str, Plane] = {name: np.ascontiguousarray(maps[..., at]) for at, name in enumerate(map_channels(spec))}
    found: dict[str, Instances] = {}
    for task in spec.tasks:
        if task.name == "nuclei":
            found["nuclei"] = _nuclei(plane, task, mpp, halo_px)
        elif task.name == "glands":
            found["glands"] = _glands(plane, mpp)
        elif task.name == "lumina":
            found["lumina"] = _lumina(plane)
        else:
            found["tissue_types"] = _tissue_types(plane)
    return found


def _nuclei(plane: Mapping[str, Plane], task: TaskSpec, mpp: float, halo_px: int) -> Instances:
    inside, distance = plane["nuclei.inside"], plane["nuclei.distance"]
    nuclear = (inside >= _NUCLEAR).view(np.uint8)
    landscape = cv2.blur(distance, (3, 3), borderType=cv2.BORDER_REPLICATE)
    wanted = (slice(halo_px, inside.shape[0] - halo_px), slice(halo_px, inside.shape[1] - halo_px))
    labels, share = part_landscape(landscape, nuclear, inside, mpp, _SIZE, sure=_SURE, wanted=wanted)
    if "nuclei.class" not in plane or not len(share):
        return Instances(labels, np.zeros(len(share), np.uint8), share)
    # Every pixel of a nucleus votes.
    n_classes, at = len(task.classes), np.flatnonzero(labels)
    vote = np.clip(plane["nuclei.class"].ravel()[at].astype(np.int64) - 1, 0, n_classes - 1)
    votes = np.bincount((labels.ravel()[at] - 1) * n_classes + vote, minlength=len(share) * n_classes)
    votes = votes.reshape(-1, n_classes)
    return Instances(
        labels,
        votes.argmax(axis=1).astype(np.uint8),
        (votes.max(axis=1) / np.maximum(votes.sum(axis=1), 1)).astype(np.float32),
    )


def _glands(plane: Mapping[str, Plane], mpp: float) -> Instances:
    inside = (plane["glands.inside"] >= _GLAND).view(np.uint8)
    runs, part = _connected(inside & (plane["glands.border"] < _BORDER).view(np.uint8))
    if not len(part):
        return _instances(runs, part, plane["glands.inside"])
    grown = grow_labels(paint_runs(runs, part + 1, inside.shape), inside, max(round(_GLAND_GROW_UM / mpp), 1))
    runs = find_runs(np.pad(grown, 1))
    return _instances(runs, runs.label - 1, plane["glands.inside"])


def _lumina(plane: Mapping[str, Plane]) -> Instances:
    inside = (plane["lumina.inside"] >= _LUMEN).view(np.uint8)
    if "glands.inside" in plane:
        inside &= (plane["glands.inside"] >= _GLAND).view(np.uint8)
    return _instances(*_connected(inside), plane["lumina.inside"])


def _tissue_types(plane: Mapping[str, Plane]) -> Instances:
    runs, part = _connected(plane["tissue_types.class"])
    n = int(part.max(initial=-1)) + 1
    class_id = np.empty(n, np.uint8)
    class_id[part] = runs.label - 1
    # By class, and within it as they stand in the image.
    order = np.argsort(class_id, kind="stable")
    number = np.empty(n, np.int64)
    number[order] = np.arange(n)
    found = _instances(runs, number[part], plane["tissue_types.probability"])
    return Instances(found.labels, class_id[order], found.class_probability)


def _connected(plane: Plane) -> tuple[Runs, NDArray[np.int32]]:
    """The runs of what is not 0, and for each its 4-connected part of one value; from 0, in the order of the pixels."""
    framed = np.pad(plane, 1)
    runs = find_runs(framed)
    return runs, connect_runs(runs, framed)


def _instances(runs: Runs, part: NDArray[np.integer], plane: Plane) -> Instances:
    """Objects of one class; how sure the network is of one is its mean over the object."""
    if not len(part):
        return Instances(np.zeros(plane.shape, np.int32), np.zeros(0, np.uint8), np.zeros(0, np.float32))
    n = int(part.max()) + 1
    area_px = np.bincount(part, runs.stop - runs.start, minlength=n)
    share = np.bincount(part, sum_runs(runs, plane), minlength=n) / area_px / 255
    labels = paint_runs(runs, (part + 1).astype(np.int32), (plane.shape[0], plane.shape[1]))
    return Instances(labels, np.zeros(n, np.uint8), share.astype(np.float32))
