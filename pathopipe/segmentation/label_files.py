"""Files of pictures and of labels: finds and reads them, and draws GeoJSON objects as label images."""

import json
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import shapely
import tifffile
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from pathopipe.errors import GeoJSONError, UsageError
from pathopipe.geojson import read_features
from pathopipe.segmentation.metrics import check_labels

__all__ = [
    "GEOJSON_KINDS",
    "LABEL_KINDS",
    "PICTURE_KINDS",
    "LabelImage",
    "Note",
    "check_size",
    "counted",
    "draw_features",
    "draw_polygons",
    "find_files",
    "first_names",
    "number_regions",
    "read_array",
    "read_label_image",
    "read_rgb",
    "split_name",
]

GEOJSON_KINDS: Final = (".geojson", ".json", ".geojson.gz", ".json.gz")
_TIFF: Final = (".tif", ".tiff")
LABEL_KINDS: Final = (".png", *_TIFF, ".bmp", ".npy", *GEOJSON_KINDS)
PICTURE_KINDS: Final = (".png", *_TIFF, ".jpg", ".jpeg", ".bmp")
_MOST_PX: Final = 1 << 28
"""Counting needs some twenty bytes a pixel."""
_SHOWN: Final = 5


def find_files(path: Path, kinds: Sequence[str], suffix: str) -> dict[str, Path]:
    """The files of a folder (not of folders within it), or one file, by stem without ``suffix``.

    Files whose stem lacks the suffix, hidden files and other kinds of file are passed over.

    Raises:
        UsageError: The path is missing or of another kind, or the folder holds no such file, or two for one image.
    """
    if path.is_file():
        stem, kind = split_name(path, kinds)
        if kind is None:
            raise UsageError(
                f"{path}: {path.suffix or 'no ending'} is none of the kinds that are read here: {_list(kinds)}"
            )
        return {stem.removesuffix(suffix): path}
    if not path.is_dir():
        raise UsageError(f"{path}: no such file or folder; check the path")
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        stem, kind = split_name(file, kinds)
        if kind is None or file.name.startswith(".") or not stem.endswith(suffix) or not file.is_file():
            continue
        name = stem.removesuffix(suffix)
        if name in found:
            raise UsageError(f"{path}: {found[name].name} and {file.name} are of one image; keep one of them here")
        found[name] = file
    if not found:
        ending = f" whose stem ends in '{suffix}'" if suffix else ""
        raise UsageError(f"{path}: this folder holds no file{ending} of the kinds that are read here: {_list(kinds)}")
    return found


def split_name(path: Path, kinds: Sequence[str]) -> tuple[str, str | None]:
    """Stem and ending of a file, ending None where it is none of the kinds."""
    name = unicodedata.normalize("NFC", path.name)
    for kind in sorted(kinds, key=len, reverse=True):
        if name.lower().endswith(kind):
            return name[: -len(kind)], kind
    return path.stem, None


def _list(kinds: Iterable[str]) -> str:
    return ", ".join(kinds)


def first_names(files: Iterable[Path]) -> str:
    """The first few names for a message, and how many more there are."""
    names = [file.name for file in files]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


Note = tuple[str, str]
"""A file's name, and what is odd about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelImage:
    """Objects as a label image, and what was odd about the file."""

    labels: NDArray[np.integer]
    """(H, W), 0 on background."""
    class_of: Mapping[int, str] | None = None
    """Class by label; labels without a class are not in it. None where the file can't hold classes."""
    notes: tuple[Note, ...] = ()


def read_label_image(path: Path, *, components: bool = False) -> LabelImage:
    """Read a label image: PNG (8 or 16 bit, palette), TIFF or ``.npy``.

    Args:
        path: The file.
        components: It is a mask: number its connected regions, pixels that touch at a corner being connected.

    Raises:
        UsageError: The file can't be read, is no label image (see :func:`metrics.check_labels`), is too large, or is
            no mask where it should be.
    """
    labels = check_labels(read_array(path), str(path))
    check_size(labels.shape[1], labels.shape[0], path)
    is_mask = bool(np.isin(labels, (0, labels.max())).all())
    if components:
        if not is_mask:
            n_labels = np.count_nonzero(np.unique(labels))
            raise UsageError(f"{path}: holds {n_labels} labels, so it is no mask; leave --components out for this side")
        return LabelImage(labels=number_regions(labels))
    if is_mask and int(number_regions(labels).max()) > 1:
        what = "one label in several pieces counts as one object; if this is a mask, use --components"
        return LabelImage(labels=labels, notes=((path.name, what),))
    return LabelImage(labels=labels)


def number_regions(labels: NDArray[np.integer]) -> NDArray[np.integer]:
    """Number what is connected and not 0; pixels that touch at a corner are connected."""
    numbered = np.empty(labels.shape, np.int32)
    ndimage.label(labels, structure=np.ones((3, 3), int), output=numbered)
    return numbered


def read_array(path: Path, stream: BinaryIO | None = None) -> NDArray[Any]:
    """The pixels of a file, without axes of length one beyond the second.

    Raises:
        UsageError: It can't be read.
    """
    kind = path.suffix.lower()
    source = path if stream is None else stream
    array: NDArray[Any]
    try:
        if kind == ".npy":
            array = np.load(source, allow_pickle=False)
        elif kind in _TIFF:
            array = tifffile.imread(source)
        else:
            # Pillow warns of large pictures; the size is checked by whoever asked.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(source) as picture:
                    array = np.asarray(picture)
    except Exception as error:  # decoders raise whatever they please on a damaged file
        raise UsageError(f"{path}: can't be read ({error}); give PNG, TIFF, .npy or GeoJSON") from error
    return np.squeeze(array) if array.ndim > 2 else array


def read_rgb(path: Path, stream: BinaryIO | None = None) -> NDArray[np.uint8]:
    """Read a picture.

    Args:
        path: The file; its ending decides how it is read.
        stream: What to read instead, where the file is part of an archive.

    Returns:
        (H, W, 3); grey and palette pictures turn into colours.

    Raises:
        UsageError: It can't be read, is no picture of 8 bits, or is too large.
    """
    array: NDArray[Any]
    if path.suffix.lower() in _TIFF:
        array = read_array(path, stream)
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(path if stream is None else stream) as picture:
                    check_size(picture.width, picture.height, path)
                    # Pillow would cut deeper pixels off at 255.
                    deep = picture.mode in ("F", "I") or picture.mode.startswith("I;")
                    array = np.asarray(picture if deep else picture.convert("RGB"))
        except UsageError:
            raise
        except Exception as error:  # decoders raise whatever they please on a damaged file
            raise UsageError(f"{path}: can't be read as a picture ({error}); copy or export it again") from error
    if array.ndim != 3 or array.shape[2] not in (3, 4) or array.dtype != np.uint8:
        raise UsageError(f"{path}: {array.dtype} of shape {array.shape} is no RGB picture of 8 bits")
    check_size(array.shape[1], array.shape[0], path)
    return np.ascontiguousarray(array[..., :3])


def check_size(width_px: int, height_px: int, path: Path) -> None:
    """Refuse what is too large to count on.

    Raises:
        UsageError: More than 268 megapixels.
    """
    if width_px * height_px > _MOST_PX:
        raise UsageError(f"{path}: {width_px} x {height_px} px are too many (at most {_MOST_PX}); cut it into fields")


def draw_features(
    path: Path,
    width_px: int,
    height_px: int,
    *,
    wanted: Callable[[str], bool] | None = None,
    nuclei: bool = False,
) -> LabelImage:
    """Draw the areas of a GeoJSON file as a label image; coordinates are its pixels.

    A pixel belongs to an object when its centre is inside (even-odd rule). Where objects overlap, the pixel stays with
    the one that comes first in the file; the notes count and name the others. Points, lines and objects of classes that
    QuPath ignores (a name that ends in ``*``) are passed over and counted. Labels are the numbers of the objects in the
    file, from 1.

    Args:
        path: The file.
        width_px: Of the drawing.
        height_px: Of the drawing.
        wanted: Draw only objects for whose class (``a: b`` with a subclass, "" without any) this is true, ignored or
            not.
        nuclei: Draw cells by their nucleus instead of their outer outline.

    Raises:
        GeoJSONError: The file is damaged. A FeatureCollection without features is fine: nothing was found.
        UsageError: The drawing would be too large.
    """
    check_size(width_px, height_px, path)
    shapes: list[Any] = []
    numbers: list[int] = []
    class_of: dict[int, str] = {}
    n_other = n_ignored = n_cells = 0
    for number, found in enumerate(_features(path), 1):
        name = ": ".join(found.names)
        if wanted is not None and not wanted(name):
            continue
        if found.geometry.geom_type not in ("Polygon", "MultiPolygon"):
            n_other += 1
        elif wanted is None and any(part.endswith("*") for part in found.names):
            n_ignored += 1
        else:
            is_cell = found.nucleus_geometry is not None
            shapes.append(found.nucleus_geometry if is_cell and nuclei else found.geometry)
            numbers.append(number)
            n_cells += is_cell and not nuclei
            if name:
                class_of[number] = name
    owner, flat = _inside(shapes, width_px, height_px)
    number_of = np.asarray(numbers, np.int32)
    labels = np.zeros(width_px * height_px, np.int32)
    # Of several values for one place the last one stays, so the first object of the file comes last.
    labels[flat[::-1]] = number_of[owner[::-1]]
    notes = []
    lost = labels[flat] != number_of[owner]
    if lost.any():
        losers = np.unique(number_of[owner[lost]]).tolist()
        notes.append(
            f"{int(lost.sum())} px of {counted(len(losers), 'object')} ({_numbers(losers)}) are covered by an object "
            "that comes earlier in the file, and left to it"
        )
    absent = np.setdiff1d(number_of, labels[flat]).tolist()
    if absent:
        notes.append(
            f"{counted(len(absent), 'object')} ({_numbers(absent)}) without a pixel: outside the "
            f"{width_px} x {height_px} px, covered, or too small"
        )
    if n_other:
        notes.append(f"{counted(n_other, 'point or line', 'points and lines')} passed over")
    if n_ignored:
        notes.append(f"{counted(n_ignored, 'object')} of ignored classes passed over")
    if n_cells:
        notes.append(f"{counted(n_cells, 'cell')} drawn by the outer outline, not by the nucleus")
    return LabelImage(
        labels=labels.reshape(height_px, width_px),
        class_of=class_of,
        notes=tuple((path.name, note) for note in notes),
    )


def counted(number: int, one: str, more: str | None = None) -> str:
    """``1 object``, ``2 objects``."""
    return f"{number} {one if number == 1 else more or one + 's'}"


def _numbers(values: list[int]) -> str:
    shown = ", ".join(f"no. {value}" for value in values[:_SHOWN])
    return shown + (", ..." if len(values) > _SHOWN else "")


def _features(path: Path) -> Iterator[Any]:
    try:
        yield from read_features(path)
    except GeoJSONError:
        if not _is_empty_collection(path):
            raise


def _is_empty_collection(path: Path) -> bool:
    """To find nothing is a result, so the file that says so is no fault here."""
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(4096))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("type") == "FeatureCollection" and document.get("features") == []


def draw_polygons(shapes: Sequence[Any], width_px: int, height_px: int) -> NDArray[np.int32]:
    """Draw polygons as a label image numbered in their order from 1, by the rule of :func:`draw_features`.

    Args:
        shapes: Polygons and MultiPolygons, valid or not.
        width_px: Of the drawing.
        height_px: Of the drawing.
    """
    owner, flat = _inside(shapes, width_px, height_px)
    labels = np.zeros(width_px * height_px, np.int32)
    labels[flat[::-1]] = owner[::-1] + 1
    return labels.reshape(height_px, width_px)


def _inside(shapes: Sequence[Any], width_px: int, height_px: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pixels whose centre is inside a polygon: which polygon, and the flat index of the pixel; polygon by polygon."""
    polygons, shape_of_polygon = shapely.get_parts(np.asarray(shapes, object), return_index=True)
    rings, polygon_of_ring = shapely.get_rings(polygons, return_index=True)
    xy, ring = shapely.get_coordinates(rings, return_index=True)
    edges = np.flatnonzero(ring[1:] == ring[:-1])
    (x_0, y_0), (x_1, y_1) = xy[edges].T, xy[edges + 1].T
    # An edge crosses the centre line of a row where upper <= row + 0.5 < lower, so a shared vertex counts once.
    first = np.clip(np.ceil(np.minimum(y_0, y_1) - 0.5), 0, height_px).astype(np.int64)
    n_rows = np.clip(np.ceil(np.maximum(y_0, y_1) - 0.5), 0, height_px).astype(np.int64) - first
    edge = np.repeat(np.arange(len(edges)), n_rows)
    row = _steps(n_rows) + first[edge]
    with np.errstate(divide="ignore", invalid="ignore"):  # level edges cross nothing
        slope = (x_1 - x_0) / (y_1 - y_0)
    x = x_0[edge] + (row + 0.5 - y_0[edge]) * slope[edge]
    column = np.clip(np.ceil(x - 0.5), 0, width_px).astype(np.int64)
    shape = shape_of_polygon[polygon_of_ring[ring[edges[edge]]]]
    # Closed rings cross a line an even number of times: sorted, crossings pair up into the runs inside.
    order = np.lexsort((column, row, shape))
    begin, end = order[0::2], order[1::2]
    length = column[end] - column[begin]
    flat = np.repeat(row[begin] * width_px + column[begin], length) + _steps(length)
    return np.repeat(shape[begin], length), flat


def _steps(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ... for each length, one after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) - np.repeat(ends - lengths, lengths)
