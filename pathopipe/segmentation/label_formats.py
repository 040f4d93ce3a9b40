"""Data sets as they lie on disk, one reader a kind: which images there are, and their pixels and labels as written."""

import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pathopipe.errors import UsageError
from pathopipe.registry import nearest
from pathopipe.segmentation.datasets import (
    GeoJsonDataset,
    LabelImageDataset,
    TileDataset,
)
from pathopipe.segmentation.label_files import (
    GEOJSON_KINDS,
    LABEL_KINDS,
    PICTURE_KINDS,
    draw_features,
    find_files,
    first_names,
    number_regions,
    read_label_image,
    read_rgb,
    split_name,
)

__all__ = [
    "Entry",
    "RawExample",
    "geojson_entries",
    "label_image_entries",
    "pair_labels",
    "tile_entries",
]

_MOST_BYTES: Final = 1 << 29
"""Of one picture in an archive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawExample:
    """An image as its data set has it: own numbers, own names of classes."""

    rgb: NDArray[np.uint8]
    """(H, W, 3)."""
    labels: Mapping[str, NDArray[np.integer]] = field(default_factory=dict)
    """(H, W) by task: 0 on background, else the number of an object."""
    class_of: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """By task: name of the class by number of the object; none without an entry."""
    known: NDArray[np.bool_] | None = None
    """(H, W) where labels are complete; everywhere where None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An image of a data set that can be read."""

    name: str
    where: str
    """File, for messages."""
    cells: Mapping[str, str] = field(default_factory=dict)
    """What the data set itself says, by column."""
    read: Callable[[], RawExample]


def pair_labels(images: Mapping[str, Path], labels: Mapping[str, Path], folders: tuple[Path, Path]) -> None:
    """Make sure that every picture has labels, and the other way round.

    Raises:
        UsageError: A file has no partner; the first few are named.
    """
    for here, there, what, (folder, other) in (
        (images, labels, "pictures without labels", folders),
        (labels, images, "labels without a picture", folders[::-1]),
    ):
        absent = [here[name] for name in sorted(here.keys() - there.keys())]
        if absent:
            raise UsageError(
                f"{folder}: {len(absent)} {what} in {other} ({first_names(absent)}); add the others, or take these away"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Label images
# ---------------------------------------------------------------------------------------------------------------------

_ARRAYS: Final = tuple(kind for kind in LABEL_KINDS if kind not in GEOJSON_KINDS)


def label_image_entries(settings: LabelImageDataset) -> list[Entry]:
    """Pictures with a label image for each task.

    Raises:
        UsageError: A folder is missing or empty, or a file has no partner.
    """
    images = find_files(settings.images, PICTURE_KINDS, "")
    suffix_of = {task: settings.suffixes.get(task, "") for task in settings.labels}
    shared = tuple(
        suffix
        for task, suffix in suffix_of.items()
        if suffix and settings.labels[task].resolve() == settings.images.resolve()
    )
    images = {name: path for name, path in images.items() if not name.endswith(shared)}
    labels: dict[str, dict[str, Path]] = {}
    for task, folder in settings.labels.items():
        labels[task] = find_files(folder, _ARRAYS, suffix_of[task])
        pair_labels(images, labels[task], (settings.images, folder))
    return [
        Entry(
            name=name,
            where=", ".join(str(labels[task][name]) for task in labels),
            read=partial(_read_label_images, settings, path, {task: labels[task][name] for task in labels}),
        )
        for name, path in images.items()
    ]


def _read_label_images(settings: LabelImageDataset, picture: Path, files: Mapping[str, Path]) -> RawExample:
    labels: dict[str, NDArray[np.integer]] = {}
    for task, path in files.items():
        found = read_label_image(path, components=settings.components).labels
        is_mask = len(np.unique(found)) <= 2
        labels[task] = number_regions(found) if is_mask and task in settings.merged else found
    return RawExample(rgb=read_rgb(picture), labels=labels)


# ---------------------------------------------------------------------------------------------------------------------
# Tiles
# ---------------------------------------------------------------------------------------------------------------------


def tile_entries(settings: TileDataset) -> list[Entry]:
    """Pictures of a folder and the folders in it, or of a zip archive; named by their path within it.

    Raises:
        UsageError: There is no such folder or archive, it is damaged, or it holds no picture or two of one name.
    """
    if settings.images.is_dir():
        found = {
            path.relative_to(settings.images).as_posix(): partial(_read_tile, path)
            for path in sorted(settings.images.rglob("*"))
            if path.is_file()
        }
    elif settings.images.is_file():
        found = _zip_members(settings.images)
    else:
        raise UsageError(f"{settings.images}: no such folder or archive; check the path")
    entries: dict[str, Entry] = {}
    for inner, read in found.items():
        stem, kind = split_name(Path(inner), PICTURE_KINDS)
        if kind is None or any(part.startswith((".", "__MACOSX")) for part in Path(inner).parts):
            continue
        name = (Path(inner).parent / stem).as_posix()
        if name in entries:
            raise UsageError(f"{settings.images}: two pictures are named {name}; keep one of them here")
        folder = Path(inner).parent.as_posix()
        entries[name] = Entry(
            name=name, where=f"{settings.images}/{inner}", cells={"folder": folder.removeprefix(".")}, read=read
        )
    if not entries:
        raise UsageError(f"{settings.images}: holds no picture; known kinds: {', '.join(PICTURE_KINDS)}")
    return list(entries.values())


def _read_tile(path: Path) -> RawExample:
    return RawExample(rgb=read_rgb(path))


def _zip_members(path: Path) -> dict[str, partial[RawExample]]:
    try:
        archive = zipfile.ZipFile(path)  # closed with the last entry; to open it for each picture takes far longer
    except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: can't be read as a zip archive ({error}); copy it again") from None
    return {one.filename: partial(_read_member, path, archive, one) for one in archive.infolist() if not one.is_dir()}


def _read_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> RawExample:
    where = path / member.filename
    if member.file_size > _MOST_BYTES:
        raise UsageError(f"{where}: {member.file_size} bytes are too many for a tile; cut it into fields")
    try:
        data = archive.read(member)
    except Exception as error:  # damaged, locked, packed by an unknown method: each raises something else
        raise UsageError(f"{where}: can't be read from the archive ({error}); pack it again") from error
    return RawExample(rgb=read_rgb(where, io.BytesIO(data)))


# ---------------------------------------------------------------------------------------------------------------------
# GeoJSON
# ---------------------------------------------------------------------------------------------------------------------


def geojson_entries(settings: GeoJsonDataset) -> list[Entry]:
    """Pictures with GeoJSON files.

    Raises:
        UsageError: A folder is missing or empty, or a file has no partner.
    """
    images = find_files(settings.images, PICTURE_KINDS, "")
    labels = find_files(settings.labels, GEOJSON_KINDS, "")
    pair_labels(images, labels, (settings.images, settings.labels))
    return [
        Entry(name=name, where=str(labels[name]), read=partial(_read_geojson, settings, path, labels[name]))
        for name, path in images.items()
    ]


def _read_geojson(settings: GeoJsonDataset, picture: Path, path: Path) -> RawExample:
    rgb = read_rgb(picture)
    height, width = rgb.shape[:2]
    known = {name for class_of in settings.classes.values() for name in class_of}
    passed_over = {*settings.pass_over, *([settings.region_class] if settings.region_class is not None else [])}
    unknown: set[str] = set()

    def is_of(names: Any, name: str) -> bool:
        if name not in known and name not in passed_over and not name.endswith("*"):
            unknown.add(name)
        return name in names

    labels: dict[str, NDArray[np.integer]] = {}
    class_of: dict[str, Mapping[int, str]] = {}
    for task, names in settings.classes.items():
        drawn = draw_features(path, width, height, wanted=partial(is_of, names), nuclei=task == "nuclei")
        labels[task] = drawn.labels
        numbers = np.unique(drawn.labels)
        class_of[task] = {int(number): (drawn.class_of or {}).get(int(number), "") for number in numbers if number}
    if unknown:
        name = min(unknown)
        what = f"class '{name}'" if name else "no class"
        raise UsageError(
            f"{path}: objects of {what}, of which data set '{settings.name}' says nothing "
            f"({nearest(name, known | passed_over)}); add it to classes or to pass_over"
        )
    inside = None
    if settings.region_class is not None:
        wanted = settings.region_class
        inside = draw_features(path, width, height, wanted=lambda name: name == wanted).labels > 0
        if not inside.any():
            raise UsageError(f"{path}: no area of class '{wanted}' (region_class), so nothing is known to be labelled")
    return RawExample(rgb=rgb, labels=labels, class_of=class_of, known=inside)
