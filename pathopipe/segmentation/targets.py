"""What a network is to say of a crop: maps of every task, and where they are known."""

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pathopipe.segmentation.augment import Crop
from pathopipe.segmentation.examples import UNKNOWN
from pathopipe.segmentation.network import STRIDE_PX, NetworkSpec

__all__ = ["Targets", "border_target", "distance_target", "make_targets"]

_BORDER_PX = 3
_MOST_TISSUE_TYPES = 31

Floats = NDArray[np.float32]


class Targets(NamedTuple):
    """Of one crop of ``side`` pixels; weights are 0 where nothing is known."""

    nuclei: Floats
    """(2, side, side): inside, distance from the edge."""
    nuclei_weight: Floats
    """(side, side)."""
    nuclei_class: NDArray[np.uint8]
    """(side, side) class, ``UNKNOWN`` outside and where not known."""
    glands: Floats
    """(2, side, side): inside, border."""
    glands_weight: Floats
    """(2, side, side)."""
    lumina: Floats
    """(side, side)."""
    lumina_weight: Floats
    """(side, side)."""
    tissue_cells: NDArray[np.int32]
    """(side / 32, side / 32) bits of the classes that a cell may have; 0 where not known."""
    tissue_whole: int
    """Bits of the classes that the whole may have, 0 where not known; where it is set, cells are not."""
    tissue_weight: Floats
    """(side / 32, side / 32) which cells lie in the image."""


def make_targets(crop: Crop, spec: NetworkSpec) -> Targets:
    """Targets of a crop; tasks that the network or the labels lack have weight 0."""
    side = crop.rgb.shape[0]
    zero = np.zeros((side, side), np.float32)
    known = {task: mask.astype(np.float32) for task, mask in crop.known.items()}
    nuclei, nuclei_class = np.zeros((2, side, side), np.float32), np.full((side, side), UNKNOWN, np.uint8)
    if "nuclei" in crop.labels:
        labels = crop.labels["nuclei"]
        nuclei[0] = labels > 0
        nuclei[1] = distance_target(labels)
        nuclei_class = crop.classes["nuclei"][labels]
    glands, glands_weight = np.zeros((2, side, side), np.float32), np.zeros((2, side, side), np.float32)
    if "glands" in crop.labels:
        labels = crop.labels["glands"]
        glands[0] = labels > 0
        glands_weight[0] = known["glands"]
        if "glands" not in crop.merged:
            glands[1] = border_target(labels)
            glands_weight[1] = known["glands"]
    lumina = (crop.labels["lumina"] > 0).astype(np.float32) if "lumina" in crop.labels else zero
    cells, whole, weight = _tissue(crop, spec)
    return Targets(
        nuclei=nuclei,
        nuclei_weight=known.get("nuclei", zero),
        nuclei_class=nuclei_class,
        glands=glands,
        glands_weight=glands_weight,
        lumina=lumina,
        lumina_weight=known.get("lumina", zero),
        tissue_cells=cells,
        tissue_whole=whole,
        tissue_weight=weight,
    )


def _edges(labels: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Pixels of objects that touch background or another object."""
    values = labels.astype(np.float32)
    square = np.ones((3, 3), np.uint8)
    edges: NDArray[np.bool_] = (labels > 0) & (cv2.erode(values, square) != cv2.dilate(values, square))
    return edges


def distance_target(labels: NDArray[np.int32]) -> Floats:
    """(height, width) distance from an object's own edge over its greatest; 0 outside, 1 where it is deepest."""
    depth = cv2.distanceTransform(((labels > 0) & ~_edges(labels)).astype(np.uint8), cv2.DIST_L2, 3) + 1
    depth[labels == 0] = 0
    at = np.flatnonzero(labels)
    n = int(labels.max(initial=0))
    deepest = np.ones(n + 1, np.float32)
    np.maximum.at(deepest, labels.ravel()[at], depth.ravel()[at])
    target: Floats = (depth / deepest[labels]).astype(np.float32)
    return target


def border_target(labels: NDArray[np.int32]) -> Floats:
    """(height, width) 1 on a band of a few pixels along the edges of objects."""
    wide = np.ones((_BORDER_PX, _BORDER_PX), np.uint8)
    target: Floats = cv2.dilate(_edges(labels).astype(np.uint8), wide).astype(np.float32)
    return target


def _tissue(crop: Crop, spec: NetworkSpec) -> tuple[NDArray[np.int32], int, Floats]:
    n = crop.rgb.shape[0] // STRIDE_PX
    cells = np.zeros((n, n), np.int32)
    share = cv2.resize(crop.inside_image.astype(np.float32), (n, n), interpolation=cv2.INTER_AREA)
    weight: Floats = (share > 0.5).astype(np.float32)
    if spec.task("tissue_types") is None:
        return cells, 0, np.zeros_like(weight)
    if crop.tissue_map is not None:
        blocks = crop.tissue_map.reshape(n, STRIDE_PX, n, STRIDE_PX).transpose(0, 2, 1, 3).reshape(n, n, -1)
        for row in range(n):
            for column in range(n):
                count = np.bincount(blocks[row, column], minlength=256)
                most = int(count[:_MOST_TISSUE_TYPES].argmax())
                if count[most] > 0.6 * blocks.shape[-1]:
                    cells[row, column] = 1 << most
        return cells, 0, weight
    if crop.tissue_types:
        return cells, sum(1 << one for one in crop.tissue_types), weight
    return cells, 0, np.zeros_like(weight)
