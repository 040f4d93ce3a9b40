"""Paints one block: stain densities of stroma, glands, fat and nuclei, then ink and dust, then light."""

import math
from typing import Any

import cv2
import numpy as np
import shapely
from numpy.typing import NDArray

from pathopipe.synth.glands import GLAND
from pathopipe.synth.layout import Layout, Scene
from pathopipe.synth.noise import smooth_step, stream_rng
from pathopipe.synth.outline import SlidePlan
from pathopipe.synth.spec import SynthSpec
from pathopipe.synth.sprites import OD_SCALE, drawn_at, nucleus_sprite, red_cell_sprite
from pathopipe.synth.stars import BoxUm
from pathopipe.synth.textures import PERIOD_UM, fine_grain, glass_noise, tissue_texture

__all__ = ["Painter"]

Plane = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Words = NDArray[np.uint16]
Coarse = NDArray[np.float64]

_LN10 = float(np.log(10.0))
# Farthest that any soft edge reaches: two box filters of a standard deviation of three times the optical blur.
_REACH_UM = 2.6
_FIELD_STEP_UM = 8.0
_STRIP_PX = 128
_FULL_E = 1.0
"""Density of a full byte of eosin."""
_FULL_H = 255 / OD_SCALE
"""Density of a full word of haematoxylin; a byte of what is not nuclei stands for a quarter of it."""
_BASE_H = _FULL_H / 4 * 63 / 63.75


class Painter:
    """Makes the pixels of blocks; holds only what all blocks share, so threads may use it together."""

    def __init__(self, spec: SynthSpec, plan: SlidePlan, layout: Layout, block_px: int) -> None:
        self.spec, self.plan, self.layout, self.block_px = spec, plan, layout, block_px
        rng = stream_rng(spec.seed, 5)
        haematoxylin = np.array([0.60, 0.72, 0.35]) + rng.uniform(-0.03, 0.03, 3)
        eosin = np.array([0.15, 0.90, 0.42]) + rng.uniform(-1, 1, 3) * (0.04, 0.02, 0.06)
        # The unit of each plane and the change from decadic to natural exponents are folded into the stain vectors.
        strength = -_LN10 * spec.stain_strength
        haematoxylin *= strength * rng.uniform(0.92, 1.08) * _FULL_H / 65025 / np.linalg.norm(haematoxylin)
        eosin *= strength * rng.uniform(0.85, 1.15) * _FULL_E / 65025 / np.linalg.norm(eosin)
        self._haematoxylin, self._eosin = haematoxylin.tolist(), eosin.tolist()
        # Red cells take eosin up with a more orange hue.
        self._red = (np.array([0.16, 0.86, 0.62]) * strength / OD_SCALE).tolist()
        self._light = (np.array([242.0, 242.0, 242.0]) + rng.uniform(-2.0, 1.5) + rng.uniform(-0.4, 0.4, 3)).tolist()
        self._noise = glass_noise(block_px)
        self._blur = 0.32 / spec.mpp
        self._halo_px = math.ceil(_REACH_UM / spec.mpp) + 3
        step = 2 ** int(np.floor(np.log2(max(_FIELD_STEP_UM / spec.mpp, 1.0))))
        self._step = min(step, 32)
        self._texture_step = min(2 ** max(int(np.floor(np.log2(0.55 / spec.mpp))), 0), self._step)
        self._texture, self._texture_mpp = tissue_texture(spec.mpp * self._texture_step)
        self._grain = fine_grain(block_px)
        self._cytoplasm_e, self._cytoplasm_h = (cv2.LUT(self._grain, table) for table in (_CYTOPLASM_E, _CYTOPLASM_H))
        self.glass = self._expose(None, None, None, None)
        self.glass.setflags(write=False)

    def block(self, bx: int, by: int) -> Bytes:
        """Pixels of one block: (block_px, block_px, 3) uint8; bare glass is one shared array."""
        side, mpp = self.block_px, self.spec.mpp
        box = BoxUm(bx * side * mpp, by * side * mpp, (bx + 1) * side * mpp, (by + 1) * side * mpp)
        scene = self.layout.scene(box.grown(self._halo_px * mpp + 2.0))
        extra = None if self.spec.dark_field else self._extra_od(box)
        if scene is None:
            if extra is None:
                return self.glass
            return self._expose(None, None, None, extra)
        haem, eosin, red = self._tissue(box, scene)
        return self._expose(haem, eosin, red, extra)

    # -- tissue ------------------------------------------------------------------------------------------------------

    def _tissue(self, box: BoxUm, scene: Scene) -> tuple[Words, Words, Bytes | None]:
        """Haematoxylin and eosin, 65,025 being ``_FULL_H`` and ``_FULL_E``, and red cells times ``OD_SCALE``.

        Bytes and words all the way: four to eight times as many fit one vector instruction as floats would. The last
        product, of a byte of stain and a byte of what lets it show, fills a word, so no step is seen in pale tissue.
        """
        layout = self.layout
        x, y = self._field_axes(box)
        dense = layout.density(x, y)
        lymph = 0.22 * smooth_step(layout.lymph_field.grid(x, y), 0.4, 1.6)
        eosin, haem, gap = self._stroma(box, x, y, dense, lymph)
        eosin = cv2.multiply(eosin, self._grain, scale=1 / 200)
        shows = self._paint_glands(box, scene, eosin, haem, gap)
        if scene.tissue is not None:
            shows = cv2.multiply(shows, self._tissue_mask(box, scene.tissue), scale=1 / 255)
        nuclei = self._nuclei(box, scene)
        eosin_words: Words = np.multiply(
            eosin, cv2.multiply(shows, cv2.LUT(nuclei, _EOSIN_UNDER_NUCLEUS), scale=1 / 255), dtype=np.uint16
        )
        haem_words: Words = np.multiply(haem, shows >> 2, dtype=np.uint16)
        haem_words += np.multiply(nuclei, np.uint8(255), dtype=np.uint16)
        return haem_words, eosin_words, self._red_cells(box, scene) if len(scene.red_um) else None

    def _field_axes(self, box: BoxUm) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Where the coarse fields are sampled: centres of squares of ``step`` pixels, one more on each side."""
        n = self.block_px // self._step
        offset = (np.arange(-1, n + 1) + 0.5) * self._step * self.spec.mpp
        return box.left + offset, box.top + offset

    def _up(self, coarse: NDArray[np.float64]) -> Plane:
        """A coarse field on the pixels of the block."""
        step, n = self._step, len(coarse)
        big = cv2.resize(coarse.astype(np.float32), (n * step, n * step), interpolation=cv2.INTER_LINEAR)
        inner: Plane = big[step:-step, step:-step]
        return inner

    def _stroma(self, box: BoxUm, x: Coarse, y: Coarse, dense: Coarse, lymph: Coarse) -> tuple[Bytes, Bytes, Bytes]:
        """Eosin, haematoxylin and what shows, from the textures in their warped frame.

        Made at about half a micrometre per pixel, which is as sharp as stroma gets, and enlarged.
        """
        layout, scale, coarse_px = self.layout, 1.0 / self._texture_mpp, self._texture_step
        u = x[None, :] + layout.warp_um * layout.warp[0].grid(x, y)
        v = y[:, None] + layout.warp_um * layout.warp[1].grid(x, y)
        u -= np.floor(u.min() / PERIOD_UM) * PERIOD_UM
        v -= np.floor(v.min() / PERIOD_UM) * PERIOD_UM
        map_u, map_v = (self._up_some(plane * scale - 0.5, np.float32) for plane in (u, v))
        dense_e, loose_e, gap, ground = cv2.split(
            cv2.remap(self._texture, map_u, map_v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        )
        share, blue = (self._up_some(np.round(plane * 255), np.uint8) for plane in (dense, lymph))
        haem = cv2.add(cv2.LUT(ground, _STROMA_H), blue)
        both = cv2.merge([_mixed(loose_e, dense_e, share), haem, gap])
        if coarse_px > 1:
            side = len(both) * coarse_px
            both = cv2.resize(both, (side, side), interpolation=cv2.INTER_LINEAR)
        eosin, haem, gap = cv2.split(both[coarse_px:-coarse_px, coarse_px:-coarse_px])
        return eosin, haem, gap

    def _up_some(self, coarse: Coarse, kind: type) -> NDArray[Any]:
        """A coarse field at the resolution of stroma, with one pixel of it around the block."""
        factor, n = self._step // self._texture_step, len(coarse)
        big = cv2.resize(coarse.astype(kind), (n * factor, n * factor), interpolation=cv2.INTER_LINEAR)
        edge = factor - 1
        inner: NDArray[Any] = big[edge : len(big) - edge, edge : len(big) - edge]
        return inner

    def _canvas(self) -> Bytes:
        side = self.block_px + 2 * self._halo_px
        return np.zeros((side, side), np.uint8)

    def _corners(self, box: BoxUm, points_um: NDArray[np.float64]) -> NDArray[np.int32]:
        """Points as OpenCV wants them: 1/256 px from the first pixel's centre of the canvas."""
        corner = np.array([box.left, box.top])
        px = (points_um - corner) / self.spec.mpp + (self._halo_px - 0.5)
        fixed: NDArray[np.int32] = np.round(px * 256).astype(np.int32)
        return fixed

    def _soft(self, canvas: Bytes, blur_px: float | None = None) -> Bytes:
        """A mask with soft edges, cut to the block. Two box filters are near a Gaussian and four times as fast."""
        sigma = self._blur if blur_px is None else blur_px
        passes = 0 if sigma < 0.5 else 1 if sigma < 1.0 else 2
        if passes:
            width = 2 * max(round((math.sqrt(12 * sigma**2 / passes + 1) - 1) / 2), 1) + 1
            for _ in range(passes):
                canvas = cv2.blur(canvas, (width, width))
        return canvas[self._halo_px : -self._halo_px, self._halo_px : -self._halo_px]

    def _tissue_mask(self, box: BoxUm, tissue: shapely.Geometry) -> Bytes:
        canvas = self._canvas()
        clipped = shapely.clip_by_rect(tissue, *box.grown(2 * self._halo_px * self.spec.mpp))
        for piece in getattr(clipped, "geoms", [clipped]):
            if piece.is_empty or piece.geom_type != "Polygon":
                continue
            rings = [piece.exterior, *piece.interiors]
            cv2.fillPoly(canvas, [self._corners(box, np.asarray(ring.coords)) for ring in rings], 255, shift=8)
        return self._soft(canvas, 2 * self._blur)

    def _paint_glands(self, box: BoxUm, scene: Scene, eosin: Bytes, haem: Bytes, gap: Bytes) -> Bytes:
        """Put glands, vessels and fat into ``eosin`` and ``haem``; return what lets stain show, 0 (clear) to 255."""
        glands, mpp = scene.glands, self.spec.mpp
        if not len(glands.id) and not scene.fat_um:
            return gap
        body, clear, line = self._canvas(), self._canvas(), self._canvas()
        thin = max(1, round(1.0 / mpp))
        for outline_um in scene.fat_um:
            cv2.fillPoly(clear, [self._corners(box, outline_um)], 250, shift=8)
        for index, kind in enumerate(glands.kind.tolist()):
            outline = [self._corners(box, glands.outline_um(index))]
            wall = [self._corners(box, glands.outline_um(index, glands.radius_um[index] + 2.0))]
            cv2.fillPoly(clear, wall, 0, shift=8)
            if kind == GLAND:
                cv2.fillPoly(body, wall, 255, shift=8)
                cv2.polylines(clear, outline, True, 80, thickness=thin, shift=8)
                for x_um, y_um, radius_um in self.layout.gland_lattice.goblets(glands, index):
                    centre = self._corners(box, np.array([[x_um, y_um]]))[0].tolist()
                    cv2.circle(clear, centre, round(radius_um / mpp * 256), 165, -1, cv2.LINE_8, 8)
            else:
                cv2.polylines(line, outline, True, 110, thickness=max(1, round(2.4 / mpp)), shift=8)
            if glands.lumen_um[index].any():
                lumen = [self._corners(box, glands.outline_um(index, glands.lumen_um[index]))]
                cv2.fillPoly(clear, lumen, round(255 * float(glands.empty[index])), shift=8)
                cv2.polylines(line, lumen, True, 60, thickness=thin, shift=8)
        soft = self._soft(body)
        _mixed(eosin, self._cytoplasm_e, soft, out=eosin)
        _mixed(haem, self._cytoplasm_h, soft, out=haem)
        # The clefts of stroma stop at the gland.
        shows = cv2.multiply(cv2.max(gap, soft), 255 - self._soft(clear), scale=1 / 255)
        edge = self._soft(line)
        cv2.max(eosin, edge, eosin)
        result: Bytes = cv2.max(shows, edge)
        return result

    def _nuclei(self, box: BoxUm, scene: Scene) -> Bytes:
        """Haematoxylin of nuclei times ``OD_SCALE``. The darker one wins, so the order of stamping is of no account."""
        side, mpp = self.block_px, self.spec.mpp
        stain = np.zeros((side, side), np.uint8)
        left, top = round(box.left / mpp), round(box.top / mpp)
        for kind, variant, turn, x, y in zip(*drawn_at(scene.nuclei, mpp), strict=True):
            sprite = nucleus_sprite(kind, variant, turn, mpp)
            _stamp(stain, sprite.stain, x - left - sprite.half_px, y - top - sprite.half_px)
        return stain

    def _red_cells(self, box: BoxUm, scene: Scene) -> Bytes:
        side, mpp = self.block_px, self.spec.mpp
        stain = np.zeros((side, side), np.uint8)
        left, top = round(box.left / mpp), round(box.top / mpp)
        for x_um, y_um, look in scene.red_um.tolist():
            sprite = red_cell_sprite(int(look * 32), mpp)
            half = len(sprite) // 2
            _stamp(stain, sprite, round(x_um / mpp) - left - half, round(y_um / mpp) - top - half)
        return stain

    # -- what lies on the glass --------------------------------------------------------------------------------------

    def _extra_od(self, box: BoxUm) -> Plane | None:
        """Ink, dust and the cover slip's edge: (3, block, block) optical density, or None where there is none."""
        side, mpp = self.block_px, self.spec.mpp
        od: Plane | None = None
        for pen in self.plan.pens:
            if not _meets(box, pen.bounds_um()):
                continue
            od = np.zeros((3, side, side), np.float32) if od is None else od
            ink = self._up(pen.ink(*self._field_axes(box)))
            for channel in range(3):
                od[channel] += ink * pen.ink_od[channel]
        for dust in self.plan.dust:
            if not _meets(box, dust.bounds_um()):
                continue
            od = np.zeros((3, side, side), np.float32) if od is None else od
            if dust.kind == "ring":
                x, y = self._field_axes(box)
                centre = dust.points_um[0]
                r = np.hypot(x[None, :] - centre[0], y[:, None] - centre[1]) / dust.size_um
                soft = smooth_step(-r, -1.05, -0.8) * (1 - 0.35 * np.exp(-((r / 0.35) ** 2)))
                shape = np.ascontiguousarray(self._up(soft))
            else:
                canvas = self._canvas()
                points = [self._corners(box, dust.points_um)]
                if dust.kind == "speck":
                    cv2.fillPoly(canvas, points, 255, shift=8)
                else:
                    cv2.polylines(canvas, points, False, 255, max(1, round(dust.size_um / mpp)), cv2.LINE_AA, 8)
                shape = self._soft(canvas, max(3 * self._blur, 0.8)).astype(np.float32) / np.float32(255)
            for channel in range(3):
                cv2.scaleAdd(shape, float(dust.od[channel]), od[channel], od[channel])
        border = self.plan.border
        if border is not None:
            od = self._border_od(box, od)
        return od

    def _border_od(self, box: BoxUm, od: Plane | None) -> Plane | None:
        border, mpp = self.plan.border, self.spec.mpp
        assert border is not None
        centres = np.arange(self.block_px, dtype=np.float64) * mpp + 0.5 * mpp
        x, y = box.left + centres, box.top + centres
        if box.left < border.left_um + 4 or box.bottom > self.plan.height_um - border.bottom_um - 4:
            od = np.zeros((3, self.block_px, self.block_px), np.float32) if od is None else od
            dark = smooth_step(border.left_um - x, -1.5, 1.5)[None, :]
            dark = np.maximum(dark, smooth_step(y - (self.plan.height_um - border.bottom_um), -1.5, 1.5)[:, None])
            od += 1.65 * dark.astype(np.float32)
        half = border.slip_half_width_um
        reach = border.slip_left_um + abs(border.slip_slope) * self.plan.width_um + 6 * half
        if box.top < reach:
            od = np.zeros((3, self.block_px, self.block_px), np.float32) if od is None else od
            off = (y[:, None] - border.slip_left_um - border.slip_slope * x[None, :]) / half
            edge = 0.34 * np.exp(-(off**2)) + 0.10 * np.exp(-(((off - 2.4) / 0.7) ** 2)) + 0.012 * (off < 0)
            od += edge.astype(np.float32)
        return od

    def erase_untrue(self, mask: Bytes, x_um: NDArray[np.float64], y_um: NDArray[np.float64]) -> None:
        """Set a mask to 0 where ink or the black border covers it; ``x_um`` are its columns, ``y_um`` its rows."""
        if self.spec.dark_field:
            return
        for pen in self.plan.pens:
            left, top, right, bottom = pen.bounds_um()
            columns = np.nonzero((x_um >= left) & (x_um <= right))[0]
            rows = np.nonzero((y_um >= top) & (y_um <= bottom))[0]
            for some in np.array_split(rows, max(len(rows) // 64, 1)):
                if len(some) and len(columns):
                    ink = pen.ink(x_um[columns], y_um[some]) > 0.25
                    mask[np.ix_(some, columns)] &= ~ink
        border = self.plan.border
        if border is not None:
            mask[:, x_um < border.left_um] = 0
            mask[y_um > self.plan.height_um - border.bottom_um] = 0

    # -- light -------------------------------------------------------------------------------------------------------

    def _expose(self, haem: Words | None, eosin: Words | None, red: Bytes | None, extra: Plane | None) -> Bytes:
        """Beer-Lambert: densities to the light that comes through, with the noise of the sensor."""
        side = self.block_px
        if self.spec.dark_field:
            return self._expose_dark(haem, eosin)
        out = np.empty((side, side, 3), np.uint8)
        od = np.empty((_STRIP_PX, side), np.float32)
        channels = [np.empty((_STRIP_PX, side), np.uint8) for _ in range(3)]
        # Strips stay in the processor's cache from the first step to the last.
        for top in range(0, side, _STRIP_PX):
            rows = slice(top, top + _STRIP_PX)
            for channel in range(3):
                if haem is None or eosin is None:
                    od[:] = self._noise[rows]
                else:
                    h, e = self._haematoxylin[channel], self._eosin[channel]
                    cv2.addWeighted(haem[rows], h, eosin[rows], e, 0.0, od, cv2.CV_32F)
                    od += self._noise[rows]
                if red is not None:
                    cv2.scaleAdd(red[rows].astype(np.float32), self._red[channel], od, od)
                if extra is not None:
                    cv2.scaleAdd(extra[channel, rows], -_LN10, od, od)
                cv2.exp(od, od)
                cv2.convertScaleAbs(od, channels[channel], self._light[channel])
            cv2.merge(channels, out[rows])
        return out

    def _expose_dark(self, haem: Words | None, eosin: Words | None) -> Bytes:
        """Fluorescence: nuclei shine blue, the rest of the tissue hardly."""
        side = self.block_px
        out = np.empty((side, side, 3), np.uint8)
        blue = 3.0 - 60.0 * self._noise
        rest = 0.5 - 60.0 * self._noise
        if haem is not None and eosin is not None:
            nuclear = np.maximum(haem.astype(np.float32) * np.float32(_FULL_H / 65025) - np.float32(0.30), 0)
            haze = eosin.astype(np.float32) * np.float32(_FULL_E / 65025)
            blue += np.float32(self.spec.stain_strength) * (420.0 * nuclear + 24.0 * haze)
            rest += np.float32(self.spec.stain_strength) * 2.0 * haze
        out[..., 2] = np.clip(blue, 0, 255)
        out[..., 0] = out[..., 1] = np.clip(rest, 0, 255)
        return out


def _mixed(under: Bytes, over: Bytes, share: Bytes, out: Bytes | None = None) -> Bytes:
    """``over`` laid on ``under`` with an opacity of 0 to 255."""
    part = cv2.multiply(over, share, scale=1 / 255)
    rest = cv2.multiply(under, 255 - share, scale=1 / 255)
    mixed: Bytes = cv2.add(part, rest, out)
    return mixed


def _stamp(image: Bytes, sprite: Bytes, x: int, y: int) -> None:
    """Keep the larger of image and sprite; the sprite's corner is at (x, y) and may stick out."""
    height, width = image.shape
    h, w = sprite.shape
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if x1 > x0 and y1 > y0:
        spot = image[y0:y1, x0:x1]
        np.maximum(spot, sprite[y0 - y : y1 - y, x0 - x : x1 - x], out=spot)


def _meets(box: BoxUm, bounds: tuple[float, float, float, float]) -> bool:
    return bounds[0] < box.right and bounds[2] > box.left and bounds[1] < box.bottom and bounds[3] > box.top


# Densities that a byte of grain stands for, and what eosin is left under a nucleus.
_V = np.arange(256, dtype=np.float64) / 255


def _bytes(values: NDArray[np.float64], full: float) -> Bytes:
    return np.clip(np.round(values / full * 255), 0, 255).astype(np.uint8)


_STROMA_H = _bytes(0.02 + 0.10 * _V, _BASE_H)
_CYTOPLASM_E = _bytes(0.02 + 0.28 * _V, _FULL_E)
_CYTOPLASM_H = _bytes(0.03 + 0.22 * _V, _BASE_H)
_EOSIN_UNDER_NUCLEUS = _bytes(1 - 0.55 * np.clip(_V * 255 / 80, 0, 1), 1.0)
