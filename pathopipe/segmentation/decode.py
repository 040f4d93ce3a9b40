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
from pathopipe.segmentation.parting import NucleusSize, part_landscape, parting_reach_px

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

_CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)
_SQUARE = np.ones((3, 3), np.uint8)

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

    Probabilities are 0 to 255; classes are those of the highest probability.
    """
    planes: list[Tensor] = []
    for task in spec.tasks:
        logits = outputs[task.name].float()
        if task.name == "tissue_types":
            planes += _tissue_planes(logits)
            continue
        n_maps = 2 if task.name in {"nuclei", "glands"} else 1
        planes += list(_bytes(logits[:, :n_maps].sigmoid()).unbind(1))
        if task.name == "nuclei" and len(task.classes) > 1:
            planes.append((logits[:, n_maps:].argmax(1) + 1).to(torch.uint8))
    return torch.stack(planes, dim=-1)


def _bytes(share: Tensor) -> Tensor:
    return (share * 255).round_().to(torch.uint8)


def _tissue_planes(logits: Tensor) -> list[Tensor]:
    share = functional.interpolate(
        logits.softmax(1), scale_factor=32 // _TISSUE_STRIDE, mode="bilinear", align_corners=False
    )
    highest, at = share.max(1)

    def enlarged(plane: Tensor) -> Tensor:
        return plane.repeat_interleave(_TISSUE_STRIDE, 1).repeat_interleave(_TISSUE_STRIDE, 2)

    return [enlarged((at + 1).to(torch.uint8)), enlarged(_bytes(highest))]


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


def instances_of(maps: Plane, spec: NetworkSpec, mpp: float) -> dict[str, Instances]:
    """The objects of every layer.

    Args:
        maps: (height, width, channels) as :func:`to_maps` makes them.
        spec: The network.
        mpp: Micrometres per pixel of the maps.
    """
    plane = {name: np.ascontiguousarray(maps[..., at]) for at, name in enumerate(map_channels(spec))}
    found: dict[str, Instances] = {}
    for task in spec.tasks:
        if task.name == "nuclei":
            found["nuclei"] = _nuclei(plane, task, mpp)
        elif task.name == "glands":
            found["glands"] = _glands(plane, mpp)
        elif task.name == "lumina":
            found["lumina"] = _lumina(plane)
        else:
            found["tissue_types"] = _tissue_types(plane)
    return found


def _instances(labels: NDArray[np.int32], inside: Plane) -> Instances:
    """Objects of one class; how sure the network is of one is its mean over the object."""
    n = int(labels.max(initial=0))
    return Instances(labels, np.zeros(n, np.uint8), _mean_share(labels, inside, n))


def _mean_share(labels: NDArray[np.int32], plane: Plane, n: int) -> NDArray[np.float32]:
    at = np.flatnonzero(labels)
    label = labels.ravel()[at]
    total = np.bincount(label, weights=plane.ravel()[at], minlength=n + 1)[1:]
    count = np.maximum(np.bincount(label, minlength=n + 1)[1:], 1)
    return (total / count / 255).astype(np.float32)


def _nuclei(plane: Mapping[str, Plane], task: TaskSpec, mpp: float) -> Instances:
    inside, distance = plane["nuclei.inside"], plane["nuclei.distance"]
    nuclear = (inside >= _NUCLEAR).view(np.uint8)
    landscape = cv2.blur(distance, (3, 3), borderType=cv2.BORDER_REPLICATE)
    labels = part_landscape(landscape, nuclear, mpp, _SIZE)
    kept = np.concatenate([[False], _mean_share(labels, inside, int(labels.max(initial=0))) >= _SURE])
    number = np.cumsum(kept, dtype=np.int32)
    number[~kept] = 0
    labels = number[labels]
    found = _instances(labels, inside)
    if "nuclei.class" not in plane or not len(found.class_id):
        return found
    # Every pixel of a nucleus votes.
    n_classes, at = len(task.classes), np.flatnonzero(labels)
    vote = np.clip(plane["nuclei.class"].ravel()[at].astype(np.int64) - 1, 0, n_classes - 1)
    votes = np.bincount((labels.ravel()[at] - 1) * n_classes + vote, minlength=len(found.class_id) * n_classes).reshape(
        -1, n_classes
    )
    return Instances(
        labels,
        votes.argmax(axis=1).astype(np.uint8),
        (votes.max(axis=1) / np.maximum(votes.sum(axis=1), 1)).astype(np.float32),
    )


def _glands(plane: Mapping[str, Plane], mpp: float) -> Instances:
    inside = (plane["glands.inside"] >= _GLAND).view(np.uint8)
    core = inside & (plane["glands.border"] < _BORDER).view(np.uint8)
    labels = _components(core)
    grown = labels.astype(np.float32)
    for step in range(max(round(_GLAND_GROW_UM / mpp), 1)):
        free = inside & (grown == 0).view(np.uint8)
        cv2.copyTo(cv2.dilate(grown, _SQUARE if step % 2 else _CROSS), free, grown)
    return _instances(grown.astype(np.int32), plane["glands.inside"])


def _lumina(plane: Mapping[str, Plane]) -> Instances:
    inside = (plane["lumina.inside"] >= _LUMEN).view(np.uint8)
    if "glands.inside" in plane:
        inside &= (plane["glands.inside"] >= _GLAND).view(np.uint8)
    return _instances(_components(inside), plane["lumina.inside"])


def _components(mask: Plane) -> NDArray[np.int32]:
    labels: NDArray[np.int32] = cv2.connectedComponents(mask, connectivity=4, ltype=cv2.CV_32S)[1]
    return labels


def _tissue_types(plane: Mapping[str, Plane]) -> Instances:
    kind = plane["tissue_types.class"]
    labels = np.zeros(kind.shape, np.int32)
    class_id: list[NDArray[np.uint8]] = []
    n = 0
    for one in np.unique(kind[kind > 0]).tolist():
        parts = _components((kind == one).view(np.uint8))
        n_parts = int(parts.max())
        np.copyto(labels, parts + n, where=parts > 0)
        class_id.append(np.full(n_parts, one - 1, np.uint8))
        n += n_parts
    ids = np.concatenate(class_id) if class_id else np.zeros(0, np.uint8)
    return Instances(labels, ids, _mean_share(labels, plane["tissue_types.probability"], n))
