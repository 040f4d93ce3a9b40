"""Data sets in the forms that others published: HoVer-Net's ``.mat``, PanNuke's arrays, MoNuSeg's XML."""

from functools import partial
from pathlib import Path
from typing import Any, Final, cast
from xml.parsers import expat

import numpy as np
import scipy.io
import shapely
from numpy.typing import NDArray

from pathopipe.errors import UsageError
from pathopipe.segmentation.datasets import HoverNetDataset, MonusegDataset, PannukeDataset
from pathopipe.segmentation.label_files import PICTURE_KINDS, check_size, draw_polygons, find_files, read_rgb
from pathopipe.segmentation.label_formats import Entry, RawExample, pair_labels
from pathopipe.segmentation.metrics import check_labels

__all__ = [
    "PANNUKE_CLASSES",
    "hovernet_entries",
    "monuseg_entries",
    "pannuke_entries",
    "read_hovernet",
    "read_monuseg",
]

PANNUKE_CLASSES: Final = ("neoplastic", "inflammatory", "connective", "dead", "epithelial")
"""Classes of the channels of a PanNuke mask; a sixth channel is background."""


# ---------------------------------------------------------------------------------------------------------------------
# HoVer-Net
# ---------------------------------------------------------------------------------------------------------------------


def hovernet_entries(settings: HoverNetDataset) -> list[Entry]:
    """Pictures with ``.mat`` files.

    Raises:
        UsageError: A folder is missing or empty, or a file has no partner.
    """
    images = find_files(settings.images, PICTURE_KINDS, "")
    labels = find_files(settings.labels, (".mat",), "")
    pair_labels(images, labels, (settings.images, settings.labels))
    return [
        Entry(name=name, where=str(labels[name]), read=partial(_read_hovernet, path, labels[name]))
        for name, path in images.items()
    ]


def _read_hovernet(picture: Path, path: Path) -> RawExample:
    labels, class_of = read_hovernet(path)
    return RawExample(
        rgb=read_rgb(picture),
        labels={"nuclei": labels},
        class_of={} if class_of is None else {"nuclei": class_of},
    )


def read_hovernet(path: Path) -> tuple[NDArray[np.integer], dict[int, str] | None]:
    """Read the nuclei of a ``.mat`` file.

    The nuclei are in ``inst_map``. Their classes are in ``type_map`` by pixel; or in ``class`` with their numbers in
    ``id`` (Lizard); or in ``inst_type``, in the order of the numbers or with the numbers in ``inst_uid``.

    Returns:
        (H, W) label image, and the class by number; None where the file has no classes.

    Raises:
        UsageError: The file can't be read, lacks ``inst_map``, or its classes do not fit its nuclei.
    """
    keys = ("inst_map", "type_map", "class", "id", "inst_type", "inst_uid")
    try:
        found: dict[str, Any] = scipy.io.loadmat(path, appendmat=False, variable_names=keys)
    except NotImplementedError:
        raise UsageError(f"{path}: MATLAB 7.3 is not read here; save it with '-v7'") from None
    except Exception as error:  # the reader raises whatever it please on a damaged file
        raise UsageError(f"{path}: can't be read as a .mat file ({error}); copy it again") from error
    if "inst_map" not in found:
        there = [name for name, *_ in scipy.io.whosmat(path, appendmat=False)]
        raise UsageError(f"{path}: holds no inst_map (found: {', '.join(there) or 'nothing'}); is it of this kind?")
    labels = check_labels(found["inst_map"], f"{path}: inst_map")
    check_size(labels.shape[1], labels.shape[0], path)
    numbers = np.unique(labels)
    numbers = numbers[numbers > 0]
    if "type_map" in found:
        return labels, _classes_by_pixel(path, labels, found["type_map"])
    for classes_key, ids_key in (("class", "id"), ("inst_type", "inst_uid")):
        if classes_key not in found:
            continue
        classes = [int(value) for value in np.ravel(found[classes_key])]
        ids = [int(value) for value in np.ravel(found[ids_key])] if ids_key in found else numbers.tolist()
        # Some programs number without gaps and list the class of numbers that were lost at the border, too.
        if ids_key not in found and len(numbers) < len(classes) and int(numbers.max(initial=0)) <= len(classes):
            ids = list(range(1, len(classes) + 1))
        if len(ids) != len(classes):
            raise UsageError(f"{path}: {len(classes)} classes in {classes_key} for {len(ids)} nuclei; they must match")
        class_of = {number: str(value) for number, value in zip(ids, classes, strict=True)}
        absent = [number for number in numbers.tolist() if number not in class_of]
        if absent:
            raise UsageError(f"{path}: nucleus {absent[0]} of inst_map has no class in {classes_key}")
        return labels, class_of
    return labels, None


def _classes_by_pixel(path: Path, labels: NDArray[np.integer], found: Any) -> dict[int, str]:
    """The class that most pixels of a nucleus have."""
    types = check_labels(found, f"{path}: type_map")
    if types.shape != labels.shape:
        raise UsageError(f"{path}: type_map of shape {types.shape} for an inst_map of {labels.shape}")
    inside = (labels > 0) & (types > 0)
    pairs, counts = np.unique(np.stack([labels[inside], types[inside]]).astype(np.int64), axis=1, return_counts=True)
    order = np.argsort(counts, kind="stable")
    return {int(pairs[0, place]): str(pairs[1, place]) for place in order.tolist()}  # the most frequent comes last


# ---------------------------------------------------------------------------------------------------------------------
# PanNuke
# ---------------------------------------------------------------------------------------------------------------------


def pannuke_entries(settings: PannukeDataset) -> list[Entry]:
    """The fields of three arrays, which stay on disk until they are read one by one.

    Raises:
        UsageError: A file can't be read, or the arrays do not fit each other.
    """
    images, masks = _map_array(settings.images), _map_array(settings.masks)
    n_channels = len(PANNUKE_CLASSES) + 1
    if images.ndim != 4 or images.shape[3] != 3:
        raise UsageError(f"{settings.images}: shape {images.shape}, but pictures are (N, H, W, 3)")
    if masks.shape != (*images.shape[:3], n_channels):
        wanted = (*images.shape[:3], n_channels)
        raise UsageError(f"{settings.masks}: shape {masks.shape}, but masks of these pictures are {wanted}")
    tissues = None if settings.tissues is None else _map_array(settings.tissues)
    if tissues is not None and (tissues.shape != images.shape[:1] or tissues.dtype.kind not in "US"):
        raise UsageError(
            f"{settings.tissues}: {tissues.dtype} of shape {tissues.shape}, but there is one name for each of "
            f"{len(images)} pictures"
        )
    width = len(str(max(len(images) - 1, 0)))
    return [
        Entry(
            name=f"{number:0{width}d}",
            where=f"{settings.masks}[{number}]",
            cells={} if tissues is None else {"tissue": _text(tissues[number])},
            read=partial(_read_pannuke, settings, images, masks, number),
        )
        for number in range(len(images))
    ]


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _map_array(path: Path) -> NDArray[Any]:
    try:
        return cast("NDArray[Any]", np.load(path, mmap_mode="r", allow_pickle=False))
    except ValueError as error:
        # Object arrays are pickles, and a pickle can run anything.
        mend = "; save it again as text or numbers" if "allow_pickle" in str(error) or "object" in str(error) else ""
        what = "an array of objects, which are not read here" if mend else str(error)
        raise UsageError(f"{path}: {what}{mend}") from None
    except (OSError, EOFError) as error:
        raise UsageError(f"{path}: can't be read ({error}); check the path") from None


def _read_pannuke(settings: PannukeDataset, images: NDArray[Any], masks: NDArray[Any], number: int) -> RawExample:
    picture = np.asarray(images[number])
    if picture.dtype != np.uint8:
        # NaN fails each comparison.
        if not (picture.min() >= 0 and 1 < picture.max() <= 255):
            raise UsageError(
                f"{settings.images}[{number}]: values from {picture.min():g} to {picture.max():g}, but colours go from "
                "0 to 255; scale them"
            )
        picture = np.rint(picture).astype(np.uint8)
    labels = np.zeros(picture.shape[:2], np.int64)
    class_of: dict[int, str] = {}
    first = 0
    for channel, name in enumerate(PANNUKE_CLASSES):
        own = check_labels(masks[number, :, :, channel], f"{settings.masks}[{number}], channel {channel}")
        numbers, place = np.unique(own, return_inverse=True)
        place = place.reshape(own.shape)
        free = (own > 0) & (labels == 0)  # few pixels have two classes: the first keeps them
        labels[free] = place[free] + first
        class_of |= {first + one: name for one in range(len(numbers)) if numbers[one] > 0}
        first += len(numbers)
    return RawExample(rgb=picture, labels={"nuclei": labels}, class_of={"nuclei": class_of})


# ---------------------------------------------------------------------------------------------------------------------
# MoNuSeg
# ---------------------------------------------------------------------------------------------------------------------


def monuseg_entries(settings: MonusegDataset) -> list[Entry]:
    """Pictures with XML files.

    Raises:
        UsageError: A folder is missing or empty, or a file has no partner.
    """
    images = find_files(settings.images, PICTURE_KINDS, "")
    labels = find_files(settings.labels, (".xml",), "")
    pair_labels(images, labels, (settings.images, settings.labels))
    return [
        Entry(name=name, where=str(labels[name]), read=partial(_read_monuseg, path, labels[name]))
        for name, path in images.items()
    ]


def _read_monuseg(picture: Path, path: Path) -> RawExample:
    rgb = read_rgb(picture)
    regions = read_monuseg(path)
    shapes = [shapely.Polygon(vertices) for vertices, _ in regions]
    labels = draw_polygons(shapes, rgb.shape[1], rgb.shape[0])
    named = {number: name for number, (_, name) in enumerate(regions, 1) if name}
    return RawExample(rgb=rgb, labels={"nuclei": labels}, class_of={"nuclei": named} if named else {})


class _ForbiddenError(Exception):
    """The document does what labels have no need of."""


def read_monuseg(path: Path) -> list[tuple[NDArray[np.float64], str]]:
    """Read the regions of an XML file of Aperio ImageScope.

    Returns:
        For each region its corners (n, 2), x then y in pixels, and the name of its class: the ``Name`` of its
        annotation's first attribute other than ``Description`` (MoNuSAC), "" without one. Regions of fewer than three
        corners are left out.

    Raises:
        UsageError: The file can't be read, is no such XML, or declares a document type or entities, which are not read
            because they can open files and fill memory.
    """
    regions: list[tuple[list[tuple[float, float]], list[str]]] = []
    names: list[str] = []
    seen: set[str] = set()

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal names
        seen.add(tag)
        if tag == "Annotation":
            names = []
        elif tag == "Attribute" and not names:
            name = " ".join(attributes.get("Name", "").split())
            if name and name != "Description":  # a field that the program adds by itself
                names.append(name)
        elif tag == "Region":
            # The name is filled in later: regions hold the list of their annotation.
            regions.append(([], names))
        elif tag == "Vertex" and regions:
            regions[-1][0].append((float(attributes["X"]), float(attributes["Y"])))

    def refuse_it(*_: Any) -> None:
        raise _ForbiddenError

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.StartDoctypeDeclHandler = refuse_it
    parser.EntityDeclHandler = refuse_it
    try:
        parser.Parse(path.read_bytes(), True)
    except _ForbiddenError:
        raise UsageError(
            f"{path}: declares a document type or entities, which labels have no need of; save it without"
        ) from None
    except OSError as error:
        raise UsageError(f"{path}: can't be read ({error.strerror or error}); check the path") from None
    except expat.ExpatError as error:
        raise UsageError(f"{path}: not XML, or cut off ({error}); export or copy it again") from None
    except (KeyError, ValueError) as error:
        raise UsageError(f"{path}: a Vertex without numbers X and Y ({error}); export it again") from None
    if "Annotation" not in seen:
        raise UsageError(f"{path}: holds no Annotation, so it is no file of ImageScope; check the kind")
    return [(np.asarray(corners, np.float64), name[0] if name else "") for corners, name in regions if len(corners) > 2]
