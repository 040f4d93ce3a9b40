"""Pictures of what a model looked at: a map over the slide, the tiles at both ends, and rasters for other viewers."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
import tifffile
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from pathopipe.files import durable_file
from pathopipe.mil.heatmap import Raster, TileMap, pyramid
from pathopipe.report.mil_plots import PLOT_STYLE, save_canvas

__all__ = [
    "MapCaption",
    "background_from_mask",
    "read_picture",
    "write_contact_sheet",
    "write_heatmap",
    "write_ome_tiff",
    "write_rgb_tiff",
]

_DPI: Final = 160
_WIDEST_INCH: Final = 11.0
_PANEL_INCH: Final = 5.0
_TALLEST_INCH: Final = 9.0
_OVER: Final = 0.62
_TISSUE_RGB: Final = (225, 205, 215)
_COLOUR_MAPS: Final = {"attention": "inferno", "contribution": "PuOr_r"}
_TIFF_TILE_PX: Final = 256
_CELL_PX: Final = 16
_SCALE_BARS_MM: Final = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class MapCaption:
    """What is written around a map."""

    title: str
    """Slide and model."""
    scale: str
    """What the colour bar shows."""
    lines: tuple[str, ...] = ()
    """Below the map: prediction, folds, faithfulness."""


# ---- the map over the slide


def read_picture(path: Path) -> NDArray[np.uint8] | None:
    """(height, width, 3) RGB of a picture file; None where there is none that can be read."""
    data = np.frombuffer(path.read_bytes() if path.is_file() else b"", np.uint8)
    picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    return None if picture is None else np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)


def background_from_mask(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(height, width, 3) RGB: pale tissue on white, for slides without a thumbnail."""
    return np.where(mask[..., None] != 0, np.array(_TISSUE_RGB), 255).astype(np.uint8)


def write_heatmap(
    path: Path,
    picture: NDArray[np.uint8],
    raster: Raster,
    kind: str,
    dims_l0: tuple[int, int],
    mpp: tuple[float, float] | None,
    caption: MapCaption,
) -> None:
    """Draw the slide beside the map over the slide, with colour bar, scale bar and legend; the same bytes every time.

    Args:
        path: A ``.png``.
        picture: (height, width, 3) RGB of the whole of level 0, of any size.
        raster: What is drawn. ``attention``: from 0 to 1. ``contribution``: both signs, white at zero.
        kind: ``attention`` or ``contribution``.
        dims_l0: Width and height of level 0.
        mpp: Micrometres per level-0 pixel, for shape and scale bar.
        caption: What is written around it.
    """
    pixel = mpp or (1.0, 1.0)
    aspect = dims_l0[1] * pixel[1] / (dims_l0[0] * pixel[0])
    wide = aspect < 0.6
    width = _WIDEST_INCH - 0.9 if wide else _PANEL_INCH
    panel = (width, min(width * aspect, _TALLEST_INCH))
    size = (_WIDEST_INCH, (2 if wide else 1) * panel[1] + 0.55 + 0.16 * len(caption.lines))
    with style.context(["default", PLOT_STYLE]):
        canvas = Canvas(figsize=size, dpi=_DPI, layout="constrained")
        axes = canvas.subplots(2 if wide else 1, 1 if wide else 2, squeeze=False).ravel()
        extent = (0.0, float(dims_l0[0]), float(dims_l0[1]), 0.0)
        for one in axes:
            one.imshow(picture, extent=extent, aspect=pixel[1] / pixel[0], interpolation="antialiased")
            one.set(xlim=(0, dims_l0[0]), ylim=(dims_l0[1], 0), xticks=[], yticks=[])
            one.spines[:].set_visible(False)
        if mpp is not None:
            _scale_bar(axes[0], dims_l0, mpp)
        rows, columns = raster.values.shape
        spread = (0.0, columns * raster.cell_l0[0], rows * raster.cell_l0[1], 0.0)
        seen = np.isfinite(raster.values)
        end = _far_end(raster.values) if kind == "contribution" else 1.0
        shown = axes[1].imshow(
            np.where(seen, raster.values, 0),
            extent=spread,
            aspect=pixel[1] / pixel[0],
            cmap=_COLOUR_MAPS[kind],
            vmin=-end if kind == "contribution" else 0.0,
            vmax=end,
            alpha=np.where(seen, _OVER, 0.0),
            interpolation="nearest",
        )
        axes[1].set(xlim=(0, dims_l0[0]), ylim=(dims_l0[1], 0))
        bar = canvas.colorbar(shown, ax=axes[1], fraction=0.04, pad=0.02)
        bar.set_label(caption.scale)
        if bar.solids is not None:
            bar.solids.set_alpha(1)
        canvas.suptitle(caption.title, x=0.01, ha="left", fontsize=10)
        if caption.lines:
            canvas.supxlabel("\n".join(caption.lines), x=0.01, ha="left", fontsize=8)
        save_canvas(path, canvas)


def _far_end(values: NDArray[np.float32]) -> float:
    """Where the colours end: the 99th percentile of the size, so that one tile does not pale all others."""
    size = np.abs(values[np.isfinite(values)])
    return float(np.percentile(size, 99)) or 1.0 if len(size) else 1.0


def _scale_bar(axes: Axes, dims_l0: tuple[int, int], mpp: tuple[float, float]) -> None:
    wide_mm = dims_l0[0] * mpp[0] / 1000
    length_mm = max((length for length in _SCALE_BARS_MM if length <= wide_mm / 4), default=_SCALE_BARS_MM[0])
    length_l0 = length_mm * 1000 / mpp[0]
    x, y = dims_l0[0] * 0.03, dims_l0[1] * 0.97
    axes.plot([x, x + length_l0], [y, y], color="black", linewidth=2.5, solid_capstyle="butt")
    text = f"{length_mm:g} mm" if length_mm >= 1 else f"{length_mm * 1000:g} µm"
    # White behind, for scans without glass.
    box = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1}
    axes.text(x + length_l0 / 2, y - dims_l0[1] * 0.012, text, ha="center", va="bottom", fontsize=7, bbox=box)


# ---- tiles


def write_contact_sheet(
    path: Path,
    rows: Sequence[tuple[str, Sequence[tuple[NDArray[np.uint8], str]]]],
    title: str,
) -> None:
    """Draw rows of tiles, each with what is written under it.

    Args:
        path: A ``.png``.
        rows: What a row shows, and its tiles: (side, side, 3) RGB and a text.
        title: Above all.
    """
    columns = max(len(tiles) for _, tiles in rows)
    with style.context(["default", PLOT_STYLE]):
        canvas = Canvas(figsize=(1.35 * columns, 1.95 * len(rows) + 0.35), dpi=_DPI, layout="constrained")
        parts = canvas.subfigures(len(rows), 1, squeeze=False)
        for part, (name, tiles) in zip(parts[:, 0], rows, strict=True):
            part.suptitle(name, x=0.01, ha="left", fontsize=9)
            axes = part.subplots(1, columns, squeeze=False)
            for one, (image, text) in zip(axes[0], tiles, strict=False):
                one.imshow(image, interpolation="antialiased")
                one.set_xlabel(text, fontsize=7)
            for one in axes[0]:
                one.set(xticks=[], yticks=[])
                one.spines[:].set_visible(False)
        canvas.suptitle(title, x=0.01, ha="left", fontsize=10)
        save_canvas(path, canvas)


# ---- rasters


def write_ome_tiff(
    path: Path,
    slide_id: str,
    maps: Sequence[TileMap],
    rasters: Sequence[Raster],
    mpp: tuple[float, float] | None,
) -> None:
    """Write maps as one tiled, pyramidal OME-TIFF: a float32 channel each, one pixel a tile, 0 where there is no tile.

    Its pixel size is that of a tile's step, so that a viewer that heeds physical sizes (napari, QuPath) lays it over
    the slide from the corner of level 0. The same bytes every time.

    Args:
        path: An ``.ome.tiff``.
        slide_id: Name of the image.
        maps: Names of the channels.
        rasters: As many, of one shape.
        mpp: Micrometres per level-0 pixel; without it the file states no size.
    """
    levels = [np.stack(level) for level in zip(*(pyramid(raster.values) for raster in rasters), strict=True)]
    about: dict[str, object] = {"axes": "CYX", "Channel": {"Name": [one.name for one in maps]}}
    _write_pyramid(path, slide_id, [np.nan_to_num(level, nan=0) for level in levels], rasters[0].cell_l0, mpp, about)


def write_rgb_tiff(path: Path, slide_id: str, raster: Raster, kind: str, mpp: tuple[float, float] | None) -> None:
    """Write a map in its colours as a tiled, pyramidal RGB OME-TIFF that any slide viewer opens, OpenSlide too.

    Args:
        path: An ``.ome.tiff``.
        slide_id: Name of the image.
        raster: As :func:`write_heatmap` takes it; 16 x 16 pixels a cell, white where there is no tile.
        kind: ``attention`` or ``contribution``.
        mpp: Micrometres per level-0 pixel; without it the file states no size.
    """
    end = _far_end(raster.values) if kind == "contribution" else 1.0
    start = -end if kind == "contribution" else 0.0
    levels, side = [], _CELL_PX
    while side:
        share = (np.nan_to_num(raster.values, nan=start) - start) / (end - start)
        rgb = (colormaps[_COLOUR_MAPS[kind]](share)[..., :3] * 255).round().astype(np.uint8)
        rgb[~np.isfinite(raster.values)] = 255
        # Cells are of one colour, so every level down to one pixel a cell is drawn afresh and stays sharp.
        levels.append(np.repeat(np.repeat(rgb, side, axis=0), side, axis=1))
        side //= 2
    cell_l0 = (raster.cell_l0[0] / _CELL_PX, raster.cell_l0[1] / _CELL_PX)
    _write_pyramid(path, slide_id, levels, cell_l0, mpp, {"axes": "YXS"})


def _write_pyramid(
    path: Path,
    slide_id: str,
    levels: Sequence[NDArray[Any]],
    pixel_l0: tuple[float, float],
    mpp: tuple[float, float] | None,
    about: dict[str, object],
) -> None:
    """One OME-TIFF of levels that each halve the one before; lower ones in SubIFDs, as Bio-Formats wants them."""
    content = sha256(levels[0].tobytes()).hexdigest()
    # Without an id of its own it would get a random one, and be another file every time.
    about |= {"Name": slide_id, "UUID": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{slide_id} {content}"))}
    shared: dict[str, object] = {
        "tile": (_TIFF_TILE_PX, _TIFF_TILE_PX),
        "compression": "zlib",
        "photometric": "rgb" if about["axes"] == "YXS" else "minisblack",
        "software": "pathopipe",
    }
    if mpp is not None:
        size_um = [pixel_l0[axis] * mpp[axis] for axis in (0, 1)]
        for axis, name in enumerate("XY"):
            about |= {f"PhysicalSize{name}": size_um[axis], f"PhysicalSize{name}Unit": "µm"}
        # The same for readers that know plain TIFF only.
        shared |= {"resolution": (1e4 / size_um[0], 1e4 / size_um[1]), "resolutionunit": "CENTIMETER"}
    with durable_file(path) as file, tifffile.TiffWriter(file, ome=True) as tiff:
        tiff.write(levels[0], subifds=len(levels) - 1, metadata={**about, "Creator": "pathopipe"}, **shared)
        for level in levels[1:]:
            tiff.write(level, subfiletype=1, metadata=None, **{**shared, "resolution": None, "resolutionunit": None})
