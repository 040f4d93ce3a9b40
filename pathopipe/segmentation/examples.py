"""Examples for training a segmentation network: pictures with whatever is known about them, whole sources apart."""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pathopipe.cohort.table import read_table, refuse
from pathopipe.errors import UsageError
from pathopipe.registry import nearest
from pathopipe.segmentation.datasets import (
    OBJECT_TASKS,
    TASKS,
    DatasetSettings,
    DrawnDataset,
    GeoJsonDataset,
    HoverNetDataset,
    LabelImageDataset,
    LabelledDataset,
    MonusegDataset,
    PannukeDataset,
    TileDataset,
)
from pathopipe.segmentation.label_files import PICTURE_KINDS, number_regions, split_name
from pathopipe.segmentation.label_formats import Entry, geojson_entries, label_image_entries, tile_entries
from pathopipe.segmentation.published_formats import hovernet_entries, monuseg_entries, pannuke_entries

__all__ = ["TASKS", "UNKNOWN", "DatasetSettings", "Example", "read_datasets", "read_examples", "split_by_source"]

UNKNOWN: Final = 255
"""Stands for a class that is not known."""
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A picture and what is known about it; tasks it says nothing about are unknown, never background."""

    name: str
    """Unique within the data set."""
    dataset: str
    source: str
    """Slide, patient or mosaic: the unit of splitting. The same in two data sets is one source."""
    rgb: NDArray[np.uint8]
    """(H, W, 3)."""
    mpp: float
    """Micrometres per pixel."""
    labels: Mapping[str, NDArray[np.int32]]
    """(H, W) by task: 0 on background, the objects from 1 to n. A task that is absent is not labelled."""
    classes: Mapping[str, NDArray[np.uint8]]
    """(n,) by task: object i + 1 is of this class of the network, 255 where unknown. Absent: no classes are known."""
    merged: frozenset[str] = frozenset()
    """Tasks in whose labels touching objects may run into one: borders between them are not known."""
    ignore: Mapping[str, NDArray[np.bool_]]
    """(H, W) by task, where something is not known: True there."""
    tissue_types: frozenset[int] | None = None
    """Classes of the network that the whole picture may hold; None where unknown."""
    tissue_map: NDArray[np.uint8] | None = None
    """(H, W) class of the network at each pixel, 255 where unknown."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_datasets(datasets: Sequence[DatasetSettings], tasks: Mapping[str, Sequence[str]]) -> list[Example]:
    """Read all data sets, and check that together they can teach every task.

    Args:
        datasets: Their settings.
        tasks: The tasks to learn, each with the names of its classes; objects of a task with fewer than two names have
            no class.

    Raises:
        UsageError: Two data sets have one name; nothing is labelled for a task; tissue types can't be told apart, for
            all images allow the same ones; or what :func:`read_examples` raises.
    """
    names = [settings.name for settings in datasets]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two data sets are named '{name}'; give each a name of its own")
    examples = [example for settings in datasets for example in read_examples(settings, tasks)]
    for task in tasks:
        if task in OBJECT_TASKS and not any(task in example.labels for example in examples):
            raise UsageError(
                f"no data set is labelled for {task} ({', '.join(names) or 'there is none'}); add one, or leave the "
                "task out"
            )
    if "tissue_types" in tasks:
        _check_tissue_types(examples, tasks["tissue_types"])
    return examples


def _check_tissue_types(examples: Sequence[Example], names: Sequence[str]) -> None:
    allowed = {example.tissue_types for example in examples if example.tissue_types is not None}
    drawn: set[int] = set()
    for example in examples:
        if example.tissue_map is not None:
            drawn |= set(np.unique(example.tissue_map).tolist()) - {UNKNOWN}
    if not allowed and not drawn:
        raise UsageError("no data set is labelled for tissue_types; add one, or leave the task out")
    if len(drawn | {min(one) for one in allowed if len(one) == 1}) < 2 and len(allowed) + bool(drawn) < 2:
        found = ", ".join(names[number] for number in sorted(drawn.union(*allowed)))
        raise UsageError(
            f"all tissue labels are of one class ({found}), which teaches nothing; add images of another class, or "
            "leave tissue_types out"
        )


def read_examples(settings: DatasetSettings, tasks: Mapping[str, Sequence[str]]) -> list[Example]:
    """Read one data set.

    Args:
        settings: Its settings.
        tasks: The tasks to learn with the names of their classes, as for :func:`read_datasets`.

    Returns:
        The examples, sorted by name; images about which nothing is known are not among them, unless the settings say
        ``unlabelled``.

    Raises:
        UsageError: A file is missing, damaged or has no partner; a table lacks a column or a row; labels and picture
            differ in size; a class is unknown (the nearest is named); or nothing is labelled for any of the tasks.
    """
    for task in tasks:
        if task not in TASKS:
            raise UsageError(f"unknown task '{task}'; {nearest(task, TASKS)}")
    _check_named_classes(settings, tasks)
    if isinstance(settings, DrawnDataset):
        return _draw(settings, tasks)
    where = f"data set '{settings.name}'"
    labelled = _labelled_tasks(settings)
    unlabelled = isinstance(settings, TileDataset) and settings.unlabelled
    if not labelled & tasks.keys() and not unlabelled:
        raise UsageError(
            f"{where} is labelled for {', '.join(sorted(labelled)) or 'nothing'}, but the network is to learn "
            f"{', '.join(tasks)}; leave the data set out, or add the task"
        )
    entries = _entries(settings)
    if not entries:
        raise UsageError(f"{where}: holds no image; check the paths")
    rows = _rows(settings, entries)
    wanted = unlabelled or bool((labelled - {"tissue_types"}) & tasks.keys())
    examples = []
    for entry in sorted(entries, key=lambda entry: entry.name):
        row = rows.get(entry.name)
        if row is not None:
            types = _tissue_types(settings, entry.name, row, tasks)
            if wanted or types is not None:
                examples.append(_example(settings, entry, row, tasks, types))
    if not examples:
        raise UsageError(f"{where}: nothing is left of {len(entries)} images; check only, skip and types")
    if isinstance(settings, LabelImageDataset) and not settings.components:
        _check_objects_are_whole(settings, examples)
    return examples


def _labelled_tasks(settings: LabelledDataset) -> set[str]:
    tasks = set[str](settings.empty)
    if isinstance(settings, LabelImageDataset):
        tasks |= set(settings.labels)
    elif isinstance(settings, GeoJsonDataset):
        tasks |= set(settings.classes)
    elif not isinstance(settings, TileDataset):
        tasks.add("nuclei")
    if any(settings.types.values()):
        tasks.add("tissue_types")
    return tasks


def _check_named_classes(settings: DatasetSettings, tasks: Mapping[str, Sequence[str]]) -> None:
    """Classes of the network that the settings name must be there, where the network learns classes of the task."""
    named: set[tuple[str, str, str]] = {
        (f"classes.{task}", task, name)
        for task, class_of in settings.classes.items()
        for name in class_of.values()
        if name is not None
    }
    named |= {("types", "tissue_types", name) for several in settings.types.values() for name in several}
    for key, task, name in sorted(named):
        known = tasks.get(task, ())
        is_learnt = task in tasks and (task == "tissue_types" or len(known) > 1)
        if is_learnt and name not in known:
            raise UsageError(
                f"data set '{settings.name}': {key} names '{name}', no class of the network; {nearest(name, known)}"
            )


def _entries(settings: LabelledDataset) -> list[Entry]:
    if isinstance(settings, LabelImageDataset):
        return label_image_entries(settings)
    if isinstance(settings, GeoJsonDataset):
        return geojson_entries(settings)
    if isinstance(settings, HoverNetDataset):
        return hovernet_entries(settings)
    if isinstance(settings, PannukeDataset):
        return pannuke_entries(settings)
    if isinstance(settings, MonusegDataset):
        return monuseg_entries(settings)
    assert isinstance(settings, TileDataset)  # the kinds end here
    return tile_entries(settings)


def _example(
    settings: LabelledDataset,
    entry: Entry,
    row: Mapping[str, str],
    tasks: Mapping[str, Sequence[str]],
    types: frozenset[int] | None,
) -> Example:
    raw = entry.read()
    height, width = raw.rgb.shape[:2]
    labels: dict[str, NDArray[np.int32]] = {
        task: np.zeros((height, width), np.int32) for task in settings.empty if task in tasks
    }
    classes: dict[str, NDArray[np.uint8]] = {}
    for task, found in raw.labels.items():
        if found.shape != (height, width):
            raise UsageError(
                f"{entry.where}: labels of {found.shape[1]} x {found.shape[0]} px for a picture of {width} x {height} "
                f"px; each needs labels of its own size"
            )
        if task in tasks:
            labels[task], numbers = _renumber(found)
            if task in raw.class_of and len(tasks[task]) > 1:
                classes[task] = _class_indices(settings, entry, task, raw.class_of[task], numbers, tasks[task])
    return Example(
        name=entry.name,
        dataset=settings.name,
        source=_source(settings, entry.name, row),
        rgb=raw.rgb,
        mpp=_mpp(settings, entry.name, row),
        labels=labels,
        classes=classes,
        merged=frozenset(settings.merged) & labels.keys() if isinstance(settings, LabelImageDataset) else frozenset(),
        ignore={task: ~raw.known for task in raw.labels if task in tasks} if raw.known is not None else {},
        tissue_types=types,
    )


def _renumber(labels: NDArray[np.integer]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The labels numbered from 1 in their order, and the numbers that they had."""
    numbers, place = np.unique(labels, return_inverse=True)
    background = int(numbers[0] == 0)  # a picture may be covered by one object
    renumbered = place.reshape(labels.shape).astype(np.int32) + (1 - background)
    return renumbered, numbers[background:].astype(np.int64)


def _class_indices(
    settings: LabelledDataset,
    entry: Entry,
    task: str,
    class_of_number: Mapping[int, str],
    numbers: NDArray[np.int64],
    names: Sequence[str],
) -> NDArray[np.uint8]:
    """(n,) class of each object by the settings, else by its own name where the network has a class of that name."""
    class_of: Mapping[str, str | None] = settings.classes.get(task, {})  # type: ignore[call-overload]
    index_of: dict[str, int] = {}
    indices = np.full(len(numbers), UNKNOWN, np.uint8)
    for place, number in enumerate(numbers.tolist()):
        value = class_of_number.get(number)
        if value is None:
            continue
        if value not in index_of:
            if value in class_of:
                name = class_of[value]
            elif value in names:
                name = value
            else:
                raise UsageError(
                    f"{entry.where}: {task} of class '{value}', which is no class of the network "
                    f"({nearest(value, names)}) and not in classes.{task} of data set '{settings.name}'; "
                    f"say there which it is, or null"
                )
            index_of[value] = UNKNOWN if name is None else list(names).index(name)
        indices[place] = index_of[value]
    return indices


def _check_objects_are_whole(settings: LabelImageDataset, examples: Sequence[Example]) -> None:
    """Masks that were given as label images would teach that a field is one object."""
    for task in settings.labels:
        if task in settings.merged:
            continue
        labelled = [example.labels[task] for example in examples if task in example.labels]
        if labelled and all(int(one.max()) <= 1 for one in labelled):
            n_regions = sum(int(number_regions(one).max()) for one in labelled)
            if n_regions > sum(int(one.max()) for one in labelled):
                raise UsageError(
                    f"data set '{settings.name}': the labels of {task} are masks, with {n_regions} regions in "
                    f"{len(labelled)} images and one number for all; say components: true where each region is an "
                    f"object, and merged: [{task}] where objects that touch run into one"
                )


# ---------------------------------------------------------------------------------------------------------------------
# What the table says
# ---------------------------------------------------------------------------------------------------------------------


def _rows(settings: LabelledDataset, entries: Sequence[Entry]) -> dict[str, Mapping[str, str]]:
    """Cells by name of image; images that ``only`` and ``skip`` leave out are not in it."""
    own = {entry.name: {"name": entry.name, **entry.cells} for entry in entries}
    rows: dict[str, Mapping[str, str]] = dict(own)
    columns = set(entries[0].cells) | {"name"}
    if settings.table is not None:
        told, header = _read_rows(settings)
        columns |= set(header)
        rows = {name: {**own.get(name, {}), **cells} for name, cells in told.items()}
    where = f"data set '{settings.name}'"
    asked = {"source_column": settings.source_column, "label_column": settings.label_column}
    asked |= {f"{key}.{column}": column for key in ("only", "skip") for column in getattr(settings, key)}
    if isinstance(settings.mpp, Mapping):
        asked |= {f"mpp.{column}": column for column in settings.mpp}
    for key, column in asked.items():
        if column is not None and column not in columns:
            of = settings.table if settings.table is not None else "images without a table"
            raise UsageError(f"{where}: {key}: no column '{column}' in {of}; {nearest(column, columns)}")
    for key in ("only", "skip"):
        for column, values in getattr(settings, key).items():
            there = {row.get(column, "") for row in rows.values()}
            for value in values:
                if value not in there:
                    raise UsageError(f"{where}: {key}.{column}: no image has '{value}' there; {nearest(value, there)}")
    taken = {name: row for name, row in rows.items() if _is_taken(settings, row)}
    if settings.table is not None:
        _check_partners(settings, own.keys(), rows.keys(), taken.keys())
    return taken


def _is_taken(settings: LabelledDataset, row: Mapping[str, str]) -> bool:
    wanted = all(row.get(column, "") in values for column, values in settings.only.items())
    return wanted and not any(row.get(column, "") in values for column, values in settings.skip.items())


def _read_rows(settings: LabelledDataset) -> tuple[dict[str, dict[str, str]], list[str]]:
    assert settings.table is not None  # asked by the caller
    named = settings.name_column
    table = read_table(settings.table, needed=[] if named is None else [named], kind="table of images")
    column = table.header[0] if named is None else named
    problems: list[str] = []
    rows: dict[str, dict[str, str]] = {}
    for number, cells in table.full_rows(problems):
        cell = cells[column].strip()
        stem, kind = split_name(Path(cell), PICTURE_KINDS)
        name = cell if kind is None else (Path(cell).parent / stem).as_posix()
        if name in rows:
            problems.append(f"row {number}: '{name}' has a row already; keep one")
        rows[name] = {key: value.strip() for key, value in cells.items()}
    if problems:
        refuse(settings.table.name, problems)
    return rows, table.header


def _check_partners(settings: LabelledDataset, images: Any, rows: Any, taken: Any) -> None:
    """Every image has a row, and every row that is asked for an image."""
    for absent, what, mend in (
        (sorted(images - rows), "images without a row", "add their rows"),
        (sorted(taken - images), "rows without an image", "add the images, or leave the rows out by only or skip"),
    ):
        if absent:
            raise UsageError(
                f"data set '{settings.name}': {len(absent)} {what} in {settings.table} ({_first(absent)}); {mend}"
            )


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _source(settings: LabelledDataset, name: str, row: Mapping[str, str]) -> str:
    if settings.source_pattern is not None:
        matched = re.search(settings.source_pattern, name)
        if matched is None or not matched[1]:
            raise UsageError(
                f"data set '{settings.name}': source_pattern finds no source in '{name}'; mend the pattern"
            )
        return matched[1]
    column = settings.source_column
    if column is None:
        # Names of images repeat from data set to data set ("train_1"), and mean nothing then.
        is_by_organ = isinstance(settings, PannukeDataset) and settings.tissues is not None
        return f"{settings.name}/{row['tissue'] if is_by_organ else name}"
    if not row.get(column):
        raise UsageError(f"data set '{settings.name}': '{name}' has no {column}; fill the cell in")
    return row[column]


def _mpp(settings: LabelledDataset, name: str, row: Mapping[str, str]) -> float:
    if not isinstance(settings.mpp, Mapping):
        return settings.mpp
    ((column, mpp_of),) = settings.mpp.items()
    value = row.get(column, "")
    if value not in mpp_of:
        raise UsageError(
            f"data set '{settings.name}': '{name}' has {column} '{value}', of which mpp.{column} says nothing; "
            "add the micrometres per pixel"
        )
    return mpp_of[value]


def _tissue_types(
    settings: LabelledDataset, name: str, row: Mapping[str, str], tasks: Mapping[str, Sequence[str]]
) -> frozenset[int] | None:
    if "tissue_types" not in tasks or not settings.types:
        return None
    column = settings.label_column
    if column is None and isinstance(settings, TileDataset) and settings.table is None:
        column = "folder"
    value = "" if column is None else row.get(column, "")
    types = settings.types.get(value, settings.types.get("*"))
    if types is None:
        raise UsageError(
            f"data set '{settings.name}': '{name}' has the label '{value}', which is not in types; "
            f"{nearest(value, settings.types)}"
        )
    names = list(tasks["tissue_types"])
    return frozenset(names.index(one) for one in types) or None


# ---------------------------------------------------------------------------------------------------------------------
# Drawn fields
# ---------------------------------------------------------------------------------------------------------------------


def _draw(settings: DrawnDataset, tasks: Mapping[str, Sequence[str]]) -> list[Example]:
    return list(_drawn_fields(settings, tasks))


def _drawn_fields(settings: DrawnDataset, tasks: Mapping[str, Sequence[str]]) -> Iterator[Example]:
    from pathopipe.synth import field as drawing

    nucleus_index = _drawn_indices(
        settings, "classes.nuclei", drawing.NUCLEUS_CLASSES, settings.classes.get("nuclei", {}), tasks.get("nuclei", ())
    )
    tissue_index = _drawn_indices(
        settings,
        "types",
        drawing.TISSUE_CLASSES,
        {name: several[0] if several else None for name, several in settings.types.items()},
        tasks.get("tissue_types", ()),
    )
    for number in range(settings.fields):
        # Fields of two seeds have no drawing in common: each field has a seed of its own.
        seed = int.from_bytes(hashlib.sha256(f"{settings.seed}/{number}".encode()).digest()[:4], "big")
        mpp = settings.mpp[number % len(settings.mpp)]
        field = drawing.draw_field(seed, side_px=settings.side_px, mpp=mpp)
        labels = {task: getattr(field, task) for task in OBJECT_TASKS if task in tasks}
        classes = {}
        if len(tasks.get("nuclei", ())) > 1:
            classes["nuclei"] = nucleus_index[field.nucleus_class]
        yield Example(
            name=f"{number:05d}",
            dataset=settings.name,
            source=f"{settings.name}/{number:05d}",
            rgb=field.rgb,
            mpp=mpp,
            labels=labels,
            classes=classes,
            ignore={},
            tissue_map=tissue_index[field.tissue_map] if "tissue_types" in tasks else None,
        )


def _drawn_indices(
    settings: DrawnDataset, key: str, drawn: Sequence[str], class_of: Mapping[str, str | None], names: Sequence[str]
) -> NDArray[np.uint8]:
    """(256,) index in the network by index in the drawing; unknown where the network has no such class."""
    for name in class_of:
        if name not in drawn:
            raise UsageError(f"data set '{settings.name}': {key}: nothing is drawn as '{name}'; {nearest(name, drawn)}")
    index = np.full(256, UNKNOWN, np.uint8)
    for number, name in enumerate(drawn):
        wanted = class_of.get(name, name)
        if wanted is not None and wanted in names:
            index[number] = list(names).index(wanted)
    return index


# ---------------------------------------------------------------------------------------------------------------------
# Splitting
# ---------------------------------------------------------------------------------------------------------------------


def split_by_source(
    examples: Sequence[Example], share: float, seed: int, *, shares: Mapping[str, float] | None = None
) -> tuple[list[Example], list[Example]]:
    """Keep back whole sources for validation, of each data set about the same share.

    A source that occurs in several data sets is on the same side in all of them. A data set with two sources or more
    has some on both sides, unless its share is 0 or 1 or other data sets have placed all of its sources. Data sets that
    are kept back whole come first, then the smallest, so that larger ones with the same sources follow them.

    Args:
        examples: To be split.
        share: Of the sources of a data set that are kept back, 0 to 1.
        seed: Another seed keeps others back.
        shares: By data set, where it is not ``share``.

    Returns:
        Examples to learn from and those kept back, each in the order given.
    """
    sources: dict[str, set[str]] = {}
    for example in examples:
        sources.setdefault(example.dataset, set()).add(example.source)
    is_held: dict[str, bool] = {}
    share_of = {dataset: (shares or {}).get(dataset, share) for dataset in sources}
    order = sorted(sources, key=lambda dataset: (share_of[dataset] < 1, len(sources[dataset]), dataset))
    for dataset in order:
        own, wanted = sources[dataset], share_of[dataset]
        n_held = math.floor(wanted * len(own) + 0.5)
        if 0 < wanted < 1 and len(own) > 1:
            n_held = min(max(n_held, 1), len(own) - 1)
        elif wanted < 1 and len(own) == 1:
            n_held = 0
        n_held -= sum(is_held.get(source, False) for source in own)
        free = sorted(own - is_held.keys(), key=lambda source: _rank(source, seed))
        is_held |= {source: place < n_held for place, source in enumerate(free)}
    return (
        [example for example in examples if not is_held[example.source]],
        [example for example in examples if is_held[example.source]],
    )


def _rank(source: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{source}".encode()).digest()
