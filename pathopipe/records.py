"""What flows between stages: plain frozen records, no behaviour beyond simple derived values."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from shapely.geometry import Polygon

from pathopipe.geometry import BoxL0, Outlines

__all__ = [
    "STATUS_NOT_FINITE",
    "STATUS_OK",
    "STATUS_OVERFLOW",
    "STATUS_UNREADABLE",
    "Level",
    "MppEvidence",
    "ObjectClass",
    "ObjectTable",
    "SlideInfo",
    "SlideRef",
    "TileGrid",
    "Tissue",
]

STATUS_OK = 1
STATUS_UNREADABLE = 2
STATUS_NOT_FINITE = 3
STATUS_OVERFLOW = 4


@dataclass(frozen=True, slots=True)
class SlideRef:
    """One slide of a cohort: where it is, and what the manifest says of it."""

    slide_id: str
    path: Path
    mpp: float | None = None
    """Micrometres per level-0 pixel as the manifest states it; wins over what the file says."""
    columns: dict[str, str] = field(default_factory=dict)
    """Every further column of the manifest (patient_id, site, labels), as text."""


@dataclass(frozen=True, slots=True)
class MppEvidence:
    """One statement about a slide's resolution, kept whether or not it was used."""

    source: str
    """Where it stands: ``manifest``, ``config``, ``openslide.mpp-x``, ``tiff.XResolution``, ``objective-power``."""
    mpp_x: float
    mpp_y: float
    used: bool
    note: str = ""
    """Why it was passed over, or what is odd about it."""


@dataclass(frozen=True, slots=True)
class Level:
    """One level of a slide's pyramid."""

    width_px: int
    height_px: int
    downsample_x: float
    downsample_y: float
    block_width_px: int | None = None
    """Width of the file's own compressed blocks, where known."""
    block_height_px: int | None = None
    scales: tuple[int, ...] = ()
    """By how much the reader can shrink these blocks while it decodes them: some of 2, 4, 8."""


@dataclass(frozen=True, slots=True)
class SlideInfo:
    """What is known of a slide without reading its pixels. Holds no vendor field that could name a person."""

    slide_id: str
    path: Path
    reader: str
    """Which reader opened it: ``openslide``, ``tiff``, ``array``."""
    vendor: str
    dims_l0: tuple[int, int]
    """Width and height in level-0 pixels."""
    levels: tuple[Level, ...]
    size_bytes: int
    fingerprint: str
    """Hash of the file's size and sampled content; does not depend on name, place or date."""
    mpp: tuple[float, float] | None
    """Micrometres per level-0 pixel, x then y; None where there is no evidence."""
    mpp_evidence: tuple[MppEvidence, ...] = ()
    bounds_l0: BoxL0 | None = None
    """The scanned part as ``openslide.bounds-*`` states it; QuPath crops to it."""
    problems: tuple[str, ...] = ()
    """What a user should know: contradicting resolution, false colours, missing parts."""


@dataclass(frozen=True, slots=True)
class Tissue:
    """Where the tissue of a slide is."""

    mask: NDArray[np.uint8]
    """(height, width), 1 on tissue; covers the whole of level 0, so a mask pixel is dims_l0 / mask size wide."""
    mpp: tuple[float, float]
    """Micrometres per mask pixel, x then y."""
    polygons: tuple[Polygon, ...]
    """Regions with holes in level-0 pixels, traced along pixel edges, largest first."""
    areas_mm2: tuple[float, ...]
    """Area of each polygon, holes taken out."""
    flags: tuple[str, ...] = ()
    """Named problems: ``little-tissue``, ``no-tissue``, ``blur``, ``pen``, ``odd-colours``, ``dark-field``,
    ``unreadable``."""
    unreadable_share: float = 0.0
    """Share of the slide's area that could not be read when the tissue was looked for."""
    method: str = ""
    """How it was found: ``brightfield``, ``dark-field``, ``given``."""


@dataclass(frozen=True, slots=True)
class TileGrid:
    """The tiles of a slide: equal squares of tissue, in storage order (blocks of 16 x 16 tiles)."""

    name: str
    side_px: int
    mpp: float
    """Micrometres per tile pixel that were asked for."""
    achieved_mpp: tuple[float, float]
    """Micrometres per tile pixel that the tiles have, x then y."""
    overlap_px: int
    side_l0: tuple[int, int]
    """Width and height of a tile in level-0 pixels."""
    stride_l0: tuple[float, float]
    """Step from tile to tile in level-0 pixels; a tile starts at ``floor(k * stride)``."""
    level: int
    """Pyramid level that is read."""
    read_px: tuple[int, int]
    """Width and height of the region read at that level."""
    resample: str
    """``none`` where the region is the tile, ``area`` where an area filter reduces it, ``dct`` where its JPEG blocks
    are decoded at reduced size, ``enlarge`` where allowed."""
    xy_l0: NDArray[np.int64]
    """(N, 2) top-left corners, x then y."""
    tissue_fraction: NDArray[np.float32]
    """(N,) share of each tile that is tissue."""
    cellularity: NDArray[np.float32] | None = None
    """(N,) share of each tile that nuclei cover, where tiles were chosen by it."""
    around: str | None = None
    """Name of the grid whose tiles these have in their middle, row by row; None for a grid of its own. They start
    where their middles say, not at ``floor(k * stride)``, some of them outside the slide."""

    def __len__(self) -> int:
        return len(self.xy_l0)


@dataclass(frozen=True, slots=True)
class ObjectClass:
    """A class of objects."""

    name: str
    """As QuPath shows it; ``Tumor: Positive`` is the class Positive within Tumor."""
    color: tuple[int, int, int]
    """RGB, 0 to 255."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectTable:
    """Objects of one layer of a slide (nuclei, cells, glands, lumina), or some consecutive rows of it.

    Rows are in the order of their centroids: by y, then x.
    """

    classes: tuple[ObjectClass, ...]
    measurement_names: tuple[str, ...]
    """With the unit in QuPath's way: ``Area µm^2``."""
    centroid_l0: NDArray[np.float64]
    """(M, 2) x, y."""
    class_id: NDArray[np.uint8]
    """(M,) index into ``classes``."""
    class_probability: NDArray[np.float32]
    """(M,) NaN where the finder states none."""
    measurements: NDArray[np.float32]
    """(M, K), NaN where an object lacks one."""
    outlines: Outlines
    """M outlines in level-0 pixels of the whole scan."""
    id: NDArray[np.uint8]
    """(M, 16) the bytes of each object's UUID."""
    parent: NDArray[np.int64]
    """(M,) row in the layer ``parent_layer``; -1 where there is none."""
    parent_layer: str | None = None
    """``glands`` for nuclei and lumina; ``nuclei`` for cells: the nucleus that a cell was grown from."""

    def __len__(self) -> int:
        return len(self.centroid_l0)
