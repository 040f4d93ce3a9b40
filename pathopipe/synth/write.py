"""Writes a drawn slide as a pyramidal TIFF and its truth as GeoJSON, streamed.

Tiles of a level are halved and handed up as soon as four neighbours are there, in the order of a quadtree, so nothing
but a few blocks and one path of the tree is ever in memory.
"""

import collections
import concurrent.futures
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from pathopipe.errors import UsageError
from pathopipe.files import durable_file
from pathopipe.geojson import feature, polygon_features, stable_id, write_features
from pathopipe.synth.draw import DrawnSlide
from pathopipe.synth.spec import SynthSpec
from pathopipe.synth.tiff import TILE_PX, TiffPyramid

__all__ = ["write_slide"]

_BLOCK_PX = 1024
_BLOCK_LEVELS = 3  # a block holds whole tiles of this many levels
_SMALLEST_LEVEL_PX = 1000
_QUALITY = 85
_KEPT_BLOCKS = 128

_CLASS_COLOURS: dict[str, tuple[int, int, int]] = {
    "Tissue": (0, 160, 80),
    "Gland": (200, 120, 0),
    "Lumen": (120, 200, 230),
    "Epithelial": (200, 40, 40),
    "Lymphocyte": (70, 90, 220),
    "Fibroblast": (60, 170, 60),
    "Endothelial": (170, 60, 190),
}


def write_slide(
    path: Path,
    spec: SynthSpec,
    *,
    truth: Path | None = None,
    threads: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Draw a slide into a tiled, pyramidal TIFF (BigTIFF above 4 GB). Memory does not grow with the slide.

    Args:
        path: File to write; it appears whole or not at all.
        spec: What to draw.
        truth: GeoJSON (``.geojson`` or ``.geojson.gz``) to write as well: tissue, glands, lumina and nuclei.
        threads: Threads that draw and encode; the number of usable cores when left out. The file is the same for any.
        progress: Called with the finished share of the slide, 0 to 1.

    Raises:
        UsageError: ``threads`` is below 1.
        StoreWriteError: The file can't be written.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"synth: threads must be at least 1, got {threads}")
    slide = DrawnSlide(spec)
    dims = [(spec.width_px, spec.height_px)]
    while max(dims[-1]) > _SMALLEST_LEVEL_PX and min(dims[-1]) >= 2:
        dims.append((dims[-1][0] // 2, dims[-1][1] // 2))
    description = f"Drawn H&E slide, not a scan; seed {spec.seed}, {spec.mpp:g} um per pixel"
    with durable_file(path) as file:
        tiff = TiffPyramid(file, dims, spec.mpp, description)
        _Pyramid(slide, dims, tiff, threads or _usable_cores(), progress).run()
        tiff.finish()
    if truth is not None:
        write_features(truth, _truth_features(slide, path.stem))


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class _Encoded:
    """One block: tiles of each of its levels by (column, row) within the block, and its pixels for the level above."""

    tiles: list[list[tuple[int, int, bytes]]]
    rest: NDArray[np.uint8]


class _Pyramid:
    """Walks the quadtree; blocks are drawn ahead by threads."""

    def __init__(
        self,
        slide: DrawnSlide,
        dims: list[tuple[int, int]],
        tiff: TiffPyramid,
        threads: int,
        progress: Callable[[float], None] | None,
    ) -> None:
        self._slide, self._dims, self._tiff, self._threads, self._progress = slide, dims, tiff, threads, progress
        self._columns, self._rows = (-(-side // _BLOCK_PX) for side in dims[0])
        self._block_levels = min(_BLOCK_LEVELS, len(dims))
        self._kept: dict[Hashable, _Encoded] = {}
        self._kept_lock = threading.Lock()
        self._done = 0
        self._waiting: collections.deque[concurrent.futures.Future[_Encoded]] = collections.deque()

    def run(self) -> None:
        # Above the blocks, a node of level k spans 2 ** (k - 2) blocks; the roots are nodes of the top level.
        height = max(len(self._dims) - _BLOCK_LEVELS, 0)
        span = 1 << height
        roots = [(x, y) for y in range(-(-self._rows // span)) for x in range(-(-self._columns // span))]
        self._order = (block for x, y in roots for block in self._blocks_below(x, y, height))
        with concurrent.futures.ThreadPoolExecutor(self._threads, "synth") as self._pool:
            try:
                for x, y in roots:
                    self._visit(x, y, height)
            finally:
                for future in self._waiting:
                    future.cancel()

    def _blocks_below(self, x: int, y: int, height: int) -> Iterator[tuple[int, int]]:
        if (x << height) >= self._columns or (y << height) >= self._rows:
            return
        if height == 0:
            yield x, y
            return
        for down in (0, 1):
            for right in (0, 1):
                yield from self._blocks_below(2 * x + right, 2 * y + down, height - 1)

    def _visit(self, x: int, y: int, height: int) -> NDArray[np.uint8] | None:
        """Write all tiles of a node and below; return its part of the tile above, (128, 128, 3), or None outside."""
        if (x << height) >= self._columns or (y << height) >= self._rows:
            return None
        if height == 0:
            return self._take_block(x, y)
        tile = np.full((TILE_PX, TILE_PX, 3), 255, np.uint8)
        half = TILE_PX // 2
        for down in (0, 1):
            for right in (0, 1):
                quarter = self._visit(2 * x + right, 2 * y + down, height - 1)
                if quarter is not None:
                    tile[down * half : (down + 1) * half, right * half : (right + 1) * half] = quarter
        self._tiff.add_tile(height + _BLOCK_LEVELS - 1, x, y, _jpeg(tile))
        return _halved(tile)

    def _take_block(self, x: int, y: int) -> NDArray[np.uint8]:
        # Drawing runs ahead of writing by a few blocks, no more.
        while len(self._waiting) < 2 * self._threads + 1:
            ahead = next(self._order, None)
            if ahead is None:
                break
            self._waiting.append(self._pool.submit(self._encode, *ahead))
        block = self._waiting.popleft().result()
        for level, tiles in enumerate(block.tiles):
            per_block = (_BLOCK_PX // TILE_PX) >> level
            for column, row, jpeg in tiles:
                self._tiff.add_tile(level, x * per_block + column, y * per_block + row, jpeg)
        self._done += 1
        if self._progress is not None:
            self._progress(self._done / (self._columns * self._rows))
        return block.rest

    def _encode(self, x: int, y: int) -> _Encoded:
        key, pixels = self._slide.fresh_block(x * _BLOCK_PX, y * _BLOCK_PX, _BLOCK_PX, known=self._kept)
        found = self._kept.get(key) if key is not None else None
        if found is not None:
            return found
        assert pixels is not None
        tiles = []
        for _ in range(self._block_levels):
            side = len(pixels) // TILE_PX
            tiles.append(
                [
                    (c, r, _jpeg(pixels[r * TILE_PX : (r + 1) * TILE_PX, c * TILE_PX : (c + 1) * TILE_PX]))
                    for r in range(side)
                    for c in range(side)
                ]
            )
            pixels = _halved(pixels)
        block = _Encoded(tiles, pixels)
        if key is not None:
            # None is ever put out, so that a key which was among the known ones stays there.
            with self._kept_lock:
                if len(self._kept) < _KEPT_BLOCKS:
                    self._kept[key] = block
        return block


def _jpeg(tile: NDArray[np.uint8]) -> bytes:
    encoded: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(tile), _QUALITY, "RGB", "420", fastdct=False)
    return encoded


def _halved(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    half: NDArray[np.uint8] = cv2.resize(pixels, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    return half


def _truth_features(slide: DrawnSlide, slide_id: str) -> Iterator[dict[str, Any] | None]:
    um2 = slide.spec.mpp**2
    for number, piece in enumerate(slide.tissue_polygons(), 1):
        yield feature(
            piece,
            object_type="annotation",
            id=stable_id(slide_id, "tissue", number),
            classification=("Tissue", _CLASS_COLOURS["Tissue"]),
            name=f"Tissue {number}",
            measurements={"Area mm^2": piece.area * um2 / 1e6},
            locked=True,
        )
    for y in range(0, slide.spec.height_px, _BLOCK_PX):
        for x in range(0, slide.spec.width_px, _BLOCK_PX):
            width, height = min(_BLOCK_PX, slide.spec.width_px - x), min(_BLOCK_PX, slide.spec.height_px - y)
            found = slide.objects(x, y, width, height)
            # Nuclei are detections: QuPath chokes on many annotations.
            for object_type, nuclei in (("annotation", False), ("detection", True)):
                some = [item for item in found if (item.kind == "nucleus") == nuclei]
                yield from polygon_features(
                    [item.polygon for item in some],
                    object_type=object_type,
                    ids=[stable_id(slide_id, item.kind, item.id) for item in some],
                    classifications=[(item.class_name, _CLASS_COLOURS[item.class_name]) for item in some],
                    measurements={"Area µm^2": [item.polygon.area * um2 for item in some]},
                )
