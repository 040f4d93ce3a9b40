"""Tissue that the user hands in: a GeoJSON file or a label image."""

import warnings
from pathlib import Path

import cv2
import numpy as np
import shapely
import tifffile
from numpy.typing import NDArray
from PIL import Image
from shapely.geometry import Polygon

from pathopipe.config import TissueConfig
from pathopipe.errors import MissingResolutionError, UsageError
from pathopipe.geojson import ParsedFeature, read_features
from pathopipe.records import SlideInfo, Tissue
from pathopipe.slide.overview import overview_size
from pathopipe.tissue.assemble import tissue_from_mask, tissue_from_polygons
from pathopipe.tissue.outline import rasterise

__all__ = ["given_tissue"]

_GEOJSON = (".geojson", ".json", ".geojson.gz", ".json.gz")
_TIFF = (".tif", ".tiff")
_MOST_PX = 1 << 29
"""A label image needs about two bytes a pixel while it is read."""


def given_tissue(path: Path, info: SlideInfo, config: TissueConfig) -> Tissue:
    """Take a mask that somebody drew or computed, as it is: small regions and holes stay.

    GeoJSON: polygons in level-0 pixels as QuPath shows them, so they are shifted where QuPath crops the slide to its
    scanned part. Annotations are taken where there are any, else every object with an area; objects of a class called
    tissue alone where there is one; classes that QuPath ignores (a name that ends in ``*``) never. Holes stay holes,
    overlaps are merged.

    Label image: PNG or TIFF of the whole of level 0 at any scale; above 0 is tissue.

    Args:
        path: The mask.
        info: The slide it belongs to.
        config: Resolution of the stored mask.

    Raises:
        UsageError: The file is missing, is of another kind, does not fit the slide, or is a colour picture.
        GeoJSONError: The GeoJSON is damaged.
        MissingResolutionError: The slide's micrometres per pixel are not known.
    """
    if info.mpp is None:
        raise MissingResolutionError(
            f"{info.slide_id}: tissue needs micrometres per pixel, and none are known; set slide.mpp",
            slide_id=info.slide_id,
        )
    if not path.is_file():
        raise UsageError(
            f"{path}: there is no such file to take the tissue of {info.slide_id} from; mend tissue.mask",
            slide_id=info.slide_id,
        )
    name = path.name.lower()
    width, height = overview_size(info, config.mpp)
    if name.endswith(_GEOJSON):
        polygons = _read_polygons(path, info)
        scale = (info.dims_l0[0] / width, info.dims_l0[1] / height)
        mask = rasterise(polygons, width, height, scale)
        return tissue_from_polygons(polygons, mask, info.dims_l0, info.mpp, config, method="given")
    mask = _fit(_read_labels(path, info), path, info, width, height)
    return tissue_from_mask(mask, info.dims_l0, info.mpp, config, method="given")


def _read_polygons(path: Path, info: SlideInfo) -> list[Polygon]:
    features = [f for f in read_features(path) if not any(name.endswith("*") for name in f.names)]
    features = [f for f in features if f.geometry.geom_type in ("Polygon", "MultiPolygon")]
    if not features:
        raise UsageError(f"{path}: holds no polygon to use as tissue; export areas, not points", slide_id=info.slide_id)
    features = [f for f in features if f.object_type == "annotation"] or features
    features = [f for f in features if _is_tissue(f)] or features
    offset = (info.bounds_l0.x_l0, info.bounds_l0.y_l0) if info.bounds_l0 is not None else (0, 0)
    whole = shapely.union_all(shapely.make_valid([f.geometry for f in features]))
    whole = shapely.transform(whole, lambda xy: xy + offset)
    inside = shapely.intersection(whole, shapely.box(0, 0, *info.dims_l0))
    polygons = [p for p in shapely.get_parts(inside) if isinstance(p, Polygon) and p.area > 0]
    if not polygons:
        raise UsageError(
            f"{path}: its polygons lie outside {info.slide_id} ({info.dims_l0[0]} x {info.dims_l0[1]} px); "
            "give level-0 pixels of the same slide",
            slide_id=info.slide_id,
        )
    return polygons


def _is_tissue(feature: ParsedFeature) -> bool:
    return any(name.strip().lower() == "tissue" for name in feature.names)


def _read_labels(path: Path, info: SlideInfo) -> NDArray[np.uint8]:
    """Read a label image as (height, width) uint8, 255 above 0."""
    try:
        if path.suffix.lower() in _TIFF:
            with tifffile.TiffFile(path) as tiff:
                _check_size(tiff.series[0].size, path, info)
                labels = np.squeeze(tiff.series[0].asarray())
        else:
            # Pillow warns of large pictures; the size is checked here.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(path) as picture:
                    _check_size(picture.width * picture.height, path, info)
                    labels = np.asarray(picture)
    except UsageError:
        raise
    except Exception as error:  # decoders raise whatever they please on a damaged file
        raise UsageError(
            f"{path}: can't be read as a mask ({error}); give GeoJSON, PNG or TIFF", slide_id=info.slide_id
        ) from error
    if labels.ndim == 3 and labels.shape[2] in (2, 4):
        labels = labels[..., :-1]  # the last is alpha
    if labels.ndim == 3 and all((labels[..., :1] == labels[..., k : k + 1]).all() for k in range(labels.shape[2])):
        labels = labels[..., 0]
    if labels.ndim != 2:
        raise UsageError(
            f"{path}: is a colour picture or a stack {labels.shape}, not a mask; give one channel, above 0 on tissue",
            slide_id=info.slide_id,
        )
    return np.where(labels > 0, np.uint8(255), np.uint8(0))


def _check_size(n_px: int, path: Path, info: SlideInfo) -> None:
    if n_px > _MOST_PX:
        raise UsageError(
            f"{path}: {n_px} px are too many for a mask (at most {_MOST_PX}); save it at a lower resolution",
            slide_id=info.slide_id,
        )


def _fit(labels: NDArray[np.uint8], path: Path, info: SlideInfo, width: int, height: int) -> NDArray[np.uint8]:
    """Check that a label image covers level 0, and reduce it to (height, width) where it is finer."""
    own_height, own_width = labels.shape
    scale_x, scale_y = info.dims_l0[0] / own_width, info.dims_l0[1] / own_height
    # A reduced size is rounded up or down to whole pixels: one pixel on either axis is no sign of another slide.
    rounding = 1.0 / own_width + 1.0 / own_height
    if abs(scale_x / scale_y - 1) > 0.01 + rounding:
        raise UsageError(
            f"{path}: is {own_width} x {own_height} px, another shape than {info.slide_id} "
            f"({info.dims_l0[0]} x {info.dims_l0[1]} px); give a mask of the whole slide",
            slide_id=info.slide_id,
        )
    if own_width > width and own_height > height:
        labels = cv2.resize(labels, (width, height), interpolation=cv2.INTER_AREA)
    return (labels > 127).astype(np.uint8)
