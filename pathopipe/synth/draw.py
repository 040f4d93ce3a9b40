"""Pixels and truth of any region of a drawn slide."""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Container, Hashable

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely.geometry import Polygon

from pathopipe.synth.glands import GLAND
from pathopipe.synth.layout import Layout, Scene
from pathopipe.synth.outline import SlidePlan, plan_slide
from pathopipe.synth.paint import Painter
from pathopipe.synth.shapes import CLASSES
from pathopipe.synth.spec import SynthSpec, TruthObject
from pathopipe.synth.sprites import drawn_at, fill_polygon, nucleus_inside, nucleus_sprite
from pathopipe.synth.stars import BoxUm

__all__ = ["DrawnSlide"]

_CACHED_BLOCKS = 24


class DrawnSlide:
    """A slide that is drawn where it is looked at.

    Pixels are made in blocks of a fixed grid, each a function of the spec alone, so a region is the same however it is
    cut. Blocks are kept for a while; threads may share a slide.
    """

    def __init__(self, spec: SynthSpec) -> None:
        self.spec = spec
        self._tile: DrawnSlide | None = None
        if spec.repeat_px is not None:
            self._tile = DrawnSlide(
                dataclasses.replace(spec, width_px=spec.repeat_px, height_px=spec.repeat_px, repeat_px=None)
            )
            return
        self.block_px = 1024 if spec.mpp <= 1 else 512 if spec.mpp <= 2 else 256
        self._plan: SlidePlan = plan_slide(spec)
        self._layout = Layout(self._plan, spec.seed)
        self._painter = Painter(spec, self._plan, self._layout, self.block_px)
        self._blocks: OrderedDict[tuple[int, int], NDArray[np.uint8]] = OrderedDict()
        self._lock = threading.Lock()

    # -- pixels ------------------------------------------------------------------------------------------------------

    def read(self, x_l0: int, y_l0: int, width_px: int, height_px: int) -> NDArray[np.uint8]:
        """RGB of a region at level 0: (height_px, width_px, 3) uint8. White beyond the slide."""
        out = np.full((height_px, width_px, 3), 255, np.uint8)
        right, bottom = min(x_l0 + width_px, self.spec.width_px), min(y_l0 + height_px, self.spec.height_px)
        side = self._tile.spec.width_px if self._tile is not None else self.block_px
        for by in range(max(y_l0, 0) // side, -(-bottom // side)):
            for bx in range(max(x_l0, 0) // side, -(-right // side)):
                x0, y0 = max(x_l0, bx * side), max(y_l0, by * side)
                x1, y1 = min(right, (bx + 1) * side), min(bottom, (by + 1) * side)
                if x1 <= x0 or y1 <= y0:
                    continue
                if self._tile is not None:
                    piece = self._tile.read(x0 - bx * side, y0 - by * side, x1 - x0, y1 - y0)
                else:
                    piece = self._block(bx, by)[y0 - by * side : y1 - by * side, x0 - bx * side : x1 - bx * side]
                out[y0 - y_l0 : y1 - y_l0, x0 - x_l0 : x1 - x_l0] = piece
        return out

    def _block(self, bx: int, by: int) -> NDArray[np.uint8]:
        with self._lock:
            found = self._blocks.get((bx, by))
            if found is not None:
                self._blocks.move_to_end((bx, by))
                return found
        drawn = self._painter.block(bx, by)
        with self._lock:
            self._blocks[bx, by] = drawn
            while len(self._blocks) > _CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        return drawn

    def fresh_block(
        self, x_l0: int, y_l0: int, side_px: int, *, known: Container[Hashable]
    ) -> tuple[Hashable, NDArray[np.uint8] | None]:
        """A block for a writer that sees each block once: a key that equal blocks share, and its pixels.

        Pixels beyond the slide repeat its edge. They are None where the key is among ``known``, for then nothing need
        be drawn; the key is None where the block is like no other.
        """
        spec = self.spec
        whole = x_l0 + side_px <= spec.width_px and y_l0 + side_px <= spec.height_px
        key: Hashable = None
        if self._tile is not None:
            period = self._tile.spec.width_px
            if whole and period % side_px == 0:
                key = (x_l0 % period, y_l0 % period)
                if key in known:
                    return key, None
        elif side_px == self.block_px and whole:
            drawn = self._painter.block(x_l0 // side_px, y_l0 // side_px)
            return ("glass" if drawn is self._painter.glass else None), drawn
        width, height = min(side_px, spec.width_px - x_l0), min(side_px, spec.height_px - y_l0)
        pixels = self.read(x_l0, y_l0, width, height)
        if (width, height) != (side_px, side_px):
            pixels = np.pad(pixels, ((0, side_px - height), (0, side_px - width), (0, 0)), mode="edge")
        return key, pixels

    # -- truth -------------------------------------------------------------------------------------------------------

    def tissue_polygons(self) -> list[Polygon]:
        """Pieces of tissue in level-0 pixels, largest first.

        Lumina, vessels and fat cells are tissue; tears through which glass shows are holes. Pen does not change them.
        """
        if self._tile is not None:
            tile = self._tile.tissue_polygons()
            whole = shapely.box(0, 0, self.spec.width_px, self.spec.height_px)
            copies = self._copies(0, 0, self.spec.width_px, self.spec.height_px)
            moved = [shapely.transform(p, lambda xy, o=o: xy + o) for _, o in copies for p in tile]
            cut = [part for p in moved for part in _polygons(shapely.intersection(p, whole))]
            return sorted(cut, key=lambda p: -p.area)
        return [shapely.transform(piece, lambda xy: xy / self.spec.mpp) for piece in self._plan.tissue]

    def tissue_mask(self, height_px: int, width_px: int) -> NDArray[np.uint8]:
        """The whole slide as (height_px, width_px) uint8: 1 on tissue, else 0.

        A mask pixel counts by its centre. Lumina, vessels and fat cells inside the outline are tissue. Glass, tears,
        dust on glass, the black border and whatever lies under pen ink are not.
        """
        mask = np.zeros((height_px, width_px), np.uint8)
        scale = np.array([width_px / self.spec.width_px, height_px / self.spec.height_px])
        for piece in self.tissue_polygons():
            left, top, right, bottom = np.array(piece.bounds) * np.tile(scale, 2)
            corner = np.floor([max(left, 0), max(top, 0)]).astype(np.int64)
            spot = mask[corner[1] : int(np.ceil(bottom)), corner[0] : int(np.ceil(right))]
            own = np.zeros_like(spot)
            fill_polygon(own, np.asarray(piece.exterior.coords) * scale - corner, 1)
            for hole in piece.interiors:
                fill_polygon(own, np.asarray(hole.coords) * scale - corner, 0)
            spot |= own
        slide = self if self._tile is None else self._tile
        period = (slide.spec.width_px * scale[0], slide.spec.height_px * scale[1])
        um = slide.spec.mpp / scale
        x = (np.arange(width_px) + 0.5) % period[0] * um[0]
        y = (np.arange(height_px) + 0.5) % period[1] * um[1]
        slide._painter.erase_untrue(mask, x, y)
        return mask

    def objects(self, x_l0: int, y_l0: int, width_px: int, height_px: int) -> list[TruthObject]:
        """Glands, lumina and nuclei whose centroid lies in the box (left and top edge included), glands first."""
        found: list[TruthObject] = []
        for scene, (ox, oy), copy in self._scenes(x_l0, y_l0, width_px, height_px):
            found += [
                o
                for o in self._truth(scene, ox, oy, copy)
                if x_l0 <= o.polygon.centroid.x < x_l0 + width_px and y_l0 <= o.polygon.centroid.y < y_l0 + height_px
            ]
        order = {"gland": 0, "lumen": 1, "nucleus": 2}
        return sorted(found, key=lambda o: (order[o.kind], o.id))

    def labels(self, x_l0: int, y_l0: int, width_px: int, height_px: int) -> dict[str, NDArray[np.int32]]:
        """Instance labels of a region: ``nuclei``, ``glands`` and ``lumina``, each (height_px, width_px) int32.

        0 is background. A pixel belongs to an object when its centre lies in the outline. A gland's label covers its
        lumen. An object has the same number in every region, the one :meth:`objects` gives it.
        """
        images = {name: np.zeros((height_px, width_px), np.int32) for name in ("nuclei", "glands", "lumina")}
        for scene, (ox, oy), copy in self._scenes(x_l0, y_l0, width_px, height_px):
            shift = np.array([ox - x_l0, oy - y_l0], np.float64)
            glands = scene.glands
            for index in np.nonzero(glands.kind == GLAND)[0].tolist():
                number = int(glands.id[index]) + copy * self._numbering[1]
                fill_polygon(images["glands"], glands.outline_um(index) / self.spec.mpp + shift, number)
                if glands.lumen_um[index].any():
                    lumen = glands.outline_um(index, glands.lumen_um[index])
                    fill_polygon(images["lumina"], lumen / self.spec.mpp + shift, number)
            columns = drawn_at(scene.nuclei, self.spec.mpp)
            for kind, variant, turn, x, y, number in zip(*columns, scene.nuclei.id.tolist(), strict=True):
                inside = nucleus_inside(kind, variant, turn, self.spec.mpp)
                _stamp_label(images["nuclei"], inside, x + ox - x_l0, y + oy - y_l0, number + copy * self._numbering[0])
        return images

    @property
    def _numbering(self) -> tuple[int, int]:
        """How many numbers one copy may use, for nuclei and for glands."""
        layout = (self if self._tile is None else self._tile)._layout
        return layout.most_nuclei, layout.most_glands

    def _copies(self, x_l0: int, y_l0: int, width_px: int, height_px: int) -> list[tuple[int, tuple[int, int]]]:
        """Number and level-0 offset of each copy of the repeated part that a box meets."""
        if self._tile is None:
            return [(0, (0, 0))]
        side, per_row = self._tile.spec.width_px, -(-self.spec.width_px // self._tile.spec.width_px)
        right, bottom = min(x_l0 + width_px, self.spec.width_px), min(y_l0 + height_px, self.spec.height_px)
        rows, columns = range(max(y_l0, 0) // side, -(-bottom // side)), range(max(x_l0, 0) // side, -(-right // side))
        return [(row * per_row + column, (column * side, row * side)) for row in rows for column in columns]

    def _scenes(self, x_l0: int, y_l0: int, width_px: int, height_px: int) -> list[tuple[Scene, tuple[int, int], int]]:
        """What may touch a box: scenes, each with the level-0 offset and number of its copy."""
        slide = self if self._tile is None else self._tile
        found = []
        for copy, (ox, oy) in self._copies(x_l0, y_l0, width_px, height_px):
            left, top = max(x_l0 - ox, 0), max(y_l0 - oy, 0)
            right = min(x_l0 + width_px - ox, slide.spec.width_px, self.spec.width_px - ox)
            bottom = min(y_l0 + height_px - oy, slide.spec.height_px, self.spec.height_px - oy)
            if right <= left or bottom <= top:
                continue
            mpp = self.spec.mpp
            # A nucleus is moved to a whole pixel when drawn, and a gland's centroid may lie off its centre.
            scene = slide._layout.scene(BoxUm(left * mpp, top * mpp, right * mpp, bottom * mpp).grown(2 * mpp + 1.0))
            if scene is not None:
                found.append((scene, (ox, oy), copy))
        return found

    def _truth(self, scene: Scene, ox: int, oy: int, copy: int) -> list[TruthObject]:
        mpp, found = self.spec.mpp, []
        per_nuclei, per_glands = self._numbering
        shift = np.array([ox, oy], np.float64)
        glands = scene.glands
        for index in np.nonzero(glands.kind == GLAND)[0].tolist():
            number = int(glands.id[index]) + copy * per_glands
            outline = Polygon(glands.outline_um(index) / mpp + shift)
            found.append(TruthObject(kind="gland", class_name="Gland", polygon=outline, id=number, parent=None))
            if glands.lumen_um[index].any():
                lumen = Polygon(glands.outline_um(index, glands.lumen_um[index]) / mpp + shift)
                found.append(TruthObject(kind="lumen", class_name="Lumen", polygon=lumen, id=number, parent=number))
        numbers = zip(scene.nuclei.id.tolist(), scene.nuclei.parent.tolist(), strict=True)
        for kind, variant, turn, x, y, (number, parent) in zip(*drawn_at(scene.nuclei, mpp), numbers, strict=True):
            sprite = nucleus_sprite(kind, variant, turn, mpp)
            found.append(
                TruthObject(
                    kind="nucleus",
                    class_name=CLASSES[kind],
                    polygon=Polygon(sprite.outline_px + np.array([x + ox, y + oy])),
                    id=number + copy * per_nuclei,
                    parent=parent + copy * per_glands if parent else None,
                )
            )
        return found


def _stamp_label(image: NDArray[np.int32], inside: NDArray[np.bool_], x: int, y: int, number: int) -> None:
    half = len(inside) // 2
    height, width = image.shape
    x0, y0, x1, y1 = max(x - half, 0), max(y - half, 0), min(x + half, width), min(y + half, height)
    if x1 > x0 and y1 > y0:
        image[y0:y1, x0:x1][inside[y0 - y + half : y1 - y + half, x0 - x + half : x1 - x + half]] = number


def _polygons(shape: shapely.Geometry) -> list[Polygon]:
    return [part for part in getattr(shape, "geoms", [shape]) if isinstance(part, Polygon) and not part.is_empty]
