"""The report of a cohort: everything in an output folder on one page, read one slide at a time."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

from pathopipe.cohort.manifest import id_problem
from pathopipe.cohort.table import quote, read_table, refuse
from pathopipe.errors import UsageError
from pathopipe.files import durable_file
from pathopipe.registry import nearest
from pathopipe.report.cohort_collect import (
    Fact,
    PictureSize,
    Vectors,
    choose_encoder,
    draw_picture,
    list_slides,
    read_fact,
)
from pathopipe.report.cohort_odd import EmbeddingMap, find_oddities, map_slides
from pathopipe.report.cohort_page import Cohort, cohort_page
from pathopipe.report.cohort_results import find_results
from pathopipe.report.cohort_words import group_reasons

__all__ = ["Labels", "Report", "read_colour", "write_report"]

_ALL_PICTURES_BYTES: Final = 12 * 2**20
_LARGEST_PICTURE_BYTES: Final = 32_000
_LEAST_PICTURE_BYTES: Final = 3_000
_MOST_PICTURES: Final = _ALL_PICTURES_BYTES // _LEAST_PICTURE_BYTES
_PRIVATE: Final = frozenset(("patient_id", "path", "mpp"))


@dataclass(frozen=True, slots=True)
class Labels:
    """One column of a table of slides."""

    column: str
    """Empty where the table is only to say which slides there are."""
    values: Mapping[str, str]
    """By slide id; empty where not stated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a report found, in short."""

    slides: int
    statuses: Mapping[str, int]
    failures: tuple[tuple[str, str, tuple[str, ...]], ...]
    """Status, reason, slide ids."""
    outliers: Mapping[str, tuple[str, ...]]
    """Reasons by slide id, the oddest slide first."""
    notes: tuple[str, ...]
    page_bytes: int


def read_colour(path: Path, column: str | None) -> Labels:
    """Read which slides a table names, and the column to colour by: ``site`` where none is asked for and there is one.

    Raises:
        UsageError: The table can't be read, it names a slide twice, or it has no such column, or it is one that names
            people or places.
    """
    if column in _PRIVATE:
        raise UsageError(f"--colour {column}: not shown on a page that may be passed on; choose a label, or site")
    table = read_table(path, needed=["slide_id"], kind="manifest")
    if column is not None and column not in table.header:
        choices = [name for name in table.header if name not in _PRIVATE]
        raise UsageError(f"{path.name}: no column '{column}'; {nearest(column, choices)}")
    chosen = column or ("site" if "site" in table.header else "")
    problems: list[str] = []
    values: dict[str, str] = {}
    for number, row in table.full_rows(problems):
        slide_id = row["slide_id"].strip()
        fault = id_problem(row["slide_id"])
        if fault:
            problems.append(f"row {number}: {fault}")
        elif slide_id in values:
            problems.append(f"row {number}: slide {quote(slide_id)} is there twice; write one row a slide")
        values[slide_id] = row[chosen].strip() if chosen else ""
    if problems:
        refuse(path.name, problems)
    return Labels(chosen, values)


def write_report(
    folder: Path,
    out: Path,
    *,
    labels: Labels | None = None,
    encoder: str | None = None,
    threads: int = 1,
    on_slide: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write the page of an output folder, whole or not at all; nothing in the folder is changed but that file.

    Memory grows by a few kilobytes a slide, not with their size, and the page holds at most 12 MiB of pictures
    (16 MiB as text): with more slides they get smaller, above 4,000 only the oddest have one.

    Args:
        folder: The ``--out`` folder of a run.
        out: The HTML file.
        labels: Slides that there should be, and what to colour by.
        encoder: Whose embeddings the map shows; the one that most slides have when left out.
        threads: Slides that are read at once.
        on_slide: Told how many slides are read, and how many there are.

    Raises:
        UsageError: There is nothing to report, or no such encoder.
        StoreWriteError: The page can't be written.
    """
    rows = list_slides(folder, labels.values if labels is not None else ())
    budget = _ALL_PICTURES_BYTES // len(rows)
    size = PictureSize(
        side_px=320 if len(rows) <= 400 else 240 if len(rows) <= 1500 else 160,
        most_bytes=min(max(budget, _LEAST_PICTURE_BYTES), _LARGEST_PICTURE_BYTES),
    )
    facts: list[Fact] = []
    vectors: dict[tuple[str, int], dict[str, Any]] = {}
    identities: dict[tuple[str, int], set[str]] = {}
    read = partial(_read, folder, size if len(rows) <= _MOST_PICTURES else None)
    for fact, own in _in_order(read, rows, threads):
        facts.append(fact)
        for key, vector in own.items():
            vectors.setdefault(key, {})[fact.slide_id] = vector
        for state in fact.encoders:
            identities.setdefault((state.name, state.features), set()).add(state.identity)
        on_slide(len(facts), len(rows))
    results = find_results(folder)
    for fact in facts:
        fact.predictions += results.fields.get(fact.slide_id, ())
        fact.group = labels.values.get(fact.slide_id, "") if labels is not None else ""
    chosen = choose_encoder({key: len(found) for key, found in vectors.items()}, encoder)
    plane: EmbeddingMap | None = None
    if chosen is not None:
        kinds = len(identities[chosen])
        note = "" if kinds == 1 else f"Computed with {kinds} different weights or versions, so compare with care."
        plane = map_slides(chosen[0], vectors[chosen], note)
    vectors.clear()
    oddities = find_oddities(facts, plane.distance if plane is not None else {})
    ranked = sorted(oddities, key=lambda slide_id: (-abs(oddities[slide_id][0].z), slide_id))
    notes = []
    if len(facts) > _MOST_PICTURES:
        first = dict.fromkeys([*ranked, *(fact.slide_id for fact in facts)])
        wanted = set(islice(first, _MOST_PICTURES))
        for fact in facts:
            if fact.slide_id in wanted and fact.status not in ("missing", "damaged"):
                draw_picture(folder, fact, size)
        notes.append(f"So many slides that only {_MOST_PICTURES:,} of them have a picture, the outliers first.")
    cohort = Cohort(
        facts=facts,
        oddities=oddities,
        plane=plane,
        results=results,
        colour=labels.column if labels is not None else "",
        notes=tuple(notes),
    )
    page = cohort_page(cohort).encode()
    with durable_file(out) as file:
        file.write(page)
    return _report(facts, oddities, ranked, notes, len(page))


def _read(folder: Path, size: PictureSize | None, slide: tuple[str, Mapping[str, str]]) -> tuple[Fact, Vectors]:
    return read_fact(folder, *slide, size)


def _in_order(
    read: Callable[[tuple[str, Mapping[str, str]]], tuple[Fact, Vectors]],
    rows: Mapping[str, Mapping[str, str]],
    threads: int,
) -> Iterator[tuple[Fact, Vectors]]:
    """Read slides on some threads, in their order: pictures are most of the work, and they need no interpreter."""
    if threads == 1:
        yield from map(read, rows.items())
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(read, rows.items())


def _report(
    facts: list[Fact], oddities: Mapping[str, Any], ranked: list[str], notes: list[str], page_bytes: int
) -> Report:
    failures = []
    for status in ("failed", "damaged", "unfinished", "missing"):
        own = [(fact.slide_id, fact.reason) for fact in facts if fact.status == status]
        failures += [(status, group.reason, group.slide_ids) for group in group_reasons(own)]
    return Report(
        slides=len(facts),
        statuses=dict(sorted(Counter(fact.status for fact in facts).items())),
        failures=tuple(failures),
        outliers={slide_id: tuple(one.says for one in oddities[slide_id]) for slide_id in ranked},
        notes=tuple(notes),
        page_bytes=page_bytes,
    )
