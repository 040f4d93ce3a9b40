"""What a segmentation model is to the rest: windows of pixels in, maps out; maps of a region in, instances out."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pathopipe.records import ObjectClass

__all__ = ["Instances", "Layer", "Model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One kind of objects that a model finds."""

    name: str
    """``nuclei``, ``glands``, ``lumina``, ``tissue_types``: the name of the layer in the store."""
    classes: tuple[ObjectClass, ...]
    joined: bool = False
    """False: an object is smaller than the halo and belongs to the region that holds its centroid (nuclei). True: it
    may be larger than a region, is cut at region borders and joined again (glands, lumina)."""
    min_um2: float = 0.0
    """Joined objects below this area are dropped; only after joining, for a region may see but a corner of one."""
    min_hole_um2: float = 0.0
    """Holes of joined objects below this area are filled."""
    joined_share: float = 0.5
    """Joined objects: two regions see the same one where they share this much of the smaller of what they see at their
    border. 0 where every region finds the same pixels (areas of one class): then a single pixel joins."""


@dataclass(frozen=True, slots=True)
class Instances:
    """The objects of one layer in one region."""

    labels: NDArray[np.int32]
    """(height, width) of the working grid: 0 is background, objects are 1 to n."""
    class_id: NDArray[np.uint8]
    """(n,) index into the layer's classes; of label i + 1."""
    class_probability: NDArray[np.float32]
    """(n,) NaN where the model states none."""


class Model(Protocol):
    """Finds objects in two steps, so that region borders can't show.

    Maps are computed on windows of one fixed lattice, hence a pixel's map depends on the slide alone. Where the maps of
    neighbouring windows overlap, they are blended. Instances are
    found in regions of any size, each seen with a halo; the rule that finds them must be local: whether and how an
    object is there depends on maps no farther than ``halo_px`` from its centroid (for joined layers: from each of its
    pixels).
    """

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What it finds."""
        ...

    @property
    def mpp(self) -> float:
        """Micrometres per pixel of the working grid."""
        ...

    @property
    def core_px(self) -> int:
        """Side of the part of a window whose maps are used; a multiple of ``margin_px``."""
        ...

    @property
    def margin_px(self) -> int:
        """Context on each side: a window has ``core_px + 2 * margin_px`` pixels a side."""
        ...

    @property
    def overlap_px(self) -> int:
        """How far the maps of a window reach beyond its core, at most ``margin_px`` and half of ``core_px``.

        0: every window has the say over its core alone. Else what neighbours say is blended, and maps are uint8.
        """
        ...

    @property
    def categorical(self) -> tuple[int, ...]:
        """Channels of the maps that can't be blended (numbers of classes): there a window has the say over its core."""
        ...

    @property
    def halo_px(self) -> int:
        """How far :meth:`instances` must see beyond the core of a region."""
        ...

    @property
    def batch_size(self) -> int:
        """Windows that :meth:`maps` gets at once; the last batch of a run may be smaller."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result (name, version, weights, settings); goes into the inputs of the layers."""
        ...

    def maps(self, windows: NDArray[np.uint8]) -> NDArray[Any]:
        """(n, side, side, 3) uint8 RGB -> (n, core + 2 overlap, the same, channels); zeros mean nothing is there."""
        ...

    def instances(self, maps: NDArray[Any]) -> dict[str, Instances]:
        """(height, width, channels) of a region with its halo -> the objects of every layer, by its name.

        Objects of the halo that belong to other regions may be left out.
        """
        ...
