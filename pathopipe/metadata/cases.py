"""The cohort: each slide with its bag of embeddings, its report and its row of the table, whichever there are."""

import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pathopipe.cohort import LabelTable, is_missing, join_labels, read_labels
from pathopipe.cohort.table import quote, refuse
from pathopipe.errors import UsageError
from pathopipe.metadata.leakage import deny, patterns_of, refused_columns, without_ids
from pathopipe.metadata.tasks import TaskSpec, encode, settle
from pathopipe.mil.bags import Bag, find_features, open_bags
from pathopipe.registry import nearest

__all__ = ["Case", "MetadataCohort", "Reports", "check_tasks", "read_cohort", "read_reports"]

_SHOWN: Final = 3
_DELIMITERS: Final = (",", ";", "\t")
# Control characters and those that are nowhere in Unicode; line ends and tabs are spaces.
_UNSEEN: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\ufeff\ufffd]")
# Of a text in any 8-bit encoding hardly any byte is a control character; of a PDF or a picture many are.
_MOST_CONTROLS: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One slide."""

    slide_id: str
    patient_id: str
    site: str
    """``""`` where not stated."""
    bag: Bag | None = None
    """None: no image; never without a tile."""
    text: str | None = None
    """The report without ids and without sentences that state a label; None: no report."""
    row: Mapping[str, str]
    """Cells of the columns that may be inputs, and of no other."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """Which of ``image``, ``text``, ``table`` are there."""
        stated = any(not is_missing(cell) for cell in self.row.values())
        there = (self.bag is not None, self.text is not None, stated)
        return tuple(name for name, is_there in zip(("image", "text", "table"), there, strict=True) if is_there)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataCohort:
    """Slides, tasks and what the catalogue says of them."""

    cases: tuple[Case, ...]
    tasks: tuple[TaskSpec, ...]
    """Settled: all classes named."""
    truth: dict[str, NDArray[np.float64]]
    """Task name to (n, width) labels as :func:`pathopipe.metadata.tasks.encode` gives them, NaN where missing."""
    patients: tuple[str, ...]
    sites: tuple[str, ...]
    table_columns: tuple[str, ...]
    """Columns that may be inputs."""
    notes: tuple[str, ...] = ()
    """What was left out and why, a sentence each."""

    def __len__(self) -> int:
        return len(self.cases)

    def take(self, rows: Sequence[int] | NDArray[np.intp]) -> "MetadataCohort":
        """Some of the slides, in the order given."""
        numbers = np.asarray(rows, np.intp)
        return replace(
            self,
            cases=tuple(self.cases[row] for row in numbers),
            truth={name: values[numbers] for name, values in self.truth.items()},
            patients=tuple(self.patients[row] for row in numbers),
            sites=tuple(self.sites[row] for row in numbers),
        )


def read_cohort(
    manifest: Path,
    tasks: Sequence[TaskSpec],
    *,
    features: Path | None = None,
    encoder: str | None = None,
    grid: str | None = None,
    reports: Path | None = None,
    table_columns: Sequence[str] | None = None,
    labels: bool = True,
    deny_stating: bool = True,
) -> MetadataCohort:
    """Read the manifest, and what there is of embeddings and reports of its slides.

    Slides without any of the three are left out. Nothing that names the patient becomes an input: ids and barcodes are
    cut out of reports, and columns of :func:`pathopipe.metadata.leakage.refused_columns` are left out.

    Args:
        manifest: CSV table with ``slide_id``, ``patient_id``, if need be ``site``, and any further columns.
        tasks: What is recorded. A task whose column is not there has no label (see :func:`check_tasks`).
        features: Folder of stores or feature files; None: no images.
        encoder: Of the features, where there are several.
        grid: Of stores, where there are several.
        reports: CSV table or folder of text files, as :func:`read_reports` takes them; None: no reports.
        table_columns: Columns to learn from; None: all that may be; (): none.
        labels: Look at what is recorded. False is for prediction: all labels are missing, and ``table_columns`` are
            those of training, of which any may be absent.
        deny_stating: Take out of reports the sentences that state a label of any task.

    Raises:
        UsageError: A table can't be read, a cell is no class of its task, a wanted column is not there or can't be an
            input, features or reports are of no slide of the manifest, or there is nothing to learn from.
        StoreError: A store is damaged or not complete.
    """
    table = read_labels(manifest)
    if not labels and table_columns is not None:
        table_columns = [name for name in table_columns if name in table.columns]
    columns, notes = _input_columns(table, tasks, table_columns, judge=labels)
    settled, truth, left_out = _labels(table, tasks, look=labels)
    notes += left_out
    bags: dict[str, Bag] = {}
    if features is not None:
        bags, said = _open(table, features, encoder, grid)
        notes += said
    texts: list[str | None] = [None] * len(table)
    if reports is not None:
        texts, said = _texts_of(table, read_reports(reports), tasks if deny_stating else (), reports.name)
        notes += said
    cases = tuple(
        Case(
            slide_id=slide_id,
            patient_id=table.patient_ids[row],
            site=table.sites[row],
            bag=bags.get(slide_id),
            text=texts[row],
            row={name: table.columns[name][row] for name in columns},
        )
        for row, slide_id in enumerate(table.slide_ids)
    )
    cohort = MetadataCohort(
        cases=cases,
        tasks=settled,
        truth=truth,
        patients=table.patient_ids,
        sites=table.sites,
        table_columns=columns,
    )
    there = [row for row, case in enumerate(cases) if case.modalities]
    if not there:
        raise UsageError(
            f"{table.source}: none of {len(table)} slides has an image, a report or a column to learn from; "
            "give --features or --reports, or columns beside those of the tasks"
        )
    if len(there) < len(cases):
        bare = [case.slide_id for case in cases if not case.modalities]
        notes.append(f"{_count(len(bare), 'slide')} without image, report and table cells left out ({_some(bare)})")
        cohort = cohort.take(there)
    return replace(cohort, notes=tuple(notes))


def check_tasks(cohort: MetadataCohort, *, least_patients: int = 10) -> None:
    """Make sure that every task can be learnt; called before training, not before prediction.

    Raises:
        UsageError: A task has no label, one class only, fewer than ``least_patients`` patients with a label, or less
            than two classes of two or more patients; one line for each such task.
    """
    problems = []
    for task in cohort.tasks:
        truth = cohort.truth[task.name]
        known = np.flatnonzero(np.isfinite(truth).all(axis=1))
        patients = {cohort.patients[row] for row in known}
        where = f"task '{task.name}'"
        mend = "fill in the labels, or take the task out of the task file"
        if not len(known):
            problems.append(f"{where}: no slide has a label in column '{task.column}'; {mend}")
            continue
        if task.kind == "multi-label":
            parts = [(name, truth[:, number] == 1) for number, name in enumerate(task.classes)]
            parts += [("none", np.isfinite(truth).all(axis=1) & (truth == 0).all(axis=1))]
        elif task.kind == "continuous":
            parts = [(f"{value:g}", truth[:, 0] == value) for value in np.unique(truth[known, 0])]
        else:
            parts = [(name, truth[:, 0] == number) for number, name in enumerate(task.classes)]
        counts = {name: len({cohort.patients[row] for row in np.flatnonzero(of)}) for name, of in parts if of.any()}
        if len(counts) < 2:
            only = next(iter(counts))
            problems.append(
                f"{where}: column '{task.column}' holds {quote(only)} only, so there is nothing to learn; {mend}"
            )
        elif len(patients) < least_patients:
            problems.append(
                f"{where}: {_count(len(patients), 'patient')} with a label, {least_patients} are the least; {mend}"
            )
        elif task.kind != "continuous" and sorted(counts.values())[-2] < 2:
            problems.append(f"{where}: no two classes have two patients each ({_counts(counts)}); {mend}")
    if problems:
        refuse("tasks", problems)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{quote(name)}: {count}" for name, count in Counter(counts).most_common(_SHOWN))


# --- table -------------------------------------------------------------------------------------------------------


def _input_columns(
    table: LabelTable, tasks: Sequence[TaskSpec], wanted: Sequence[str] | None, *, judge: bool
) -> tuple[tuple[str, ...], list[str]]:
    if wanted is not None and (not wanted or not judge):
        return tuple(dict.fromkeys(wanted)), []
    refused = refused_columns(table, tasks)
    if wanted is None:
        # That a recorded column is no input goes without saying.
        recorded = {task.column for task in tasks}
        said = [f"column '{name}' is no input: {why}" for name, why in refused.items() if name not in recorded]
        return tuple(name for name in table.columns if name not in refused), said
    problems = []
    for name in dict.fromkeys(wanted):
        if name not in table.columns:
            problems.append(f"no column '{name}'; {nearest(name, table.columns)}")
        elif name in refused:
            problems.append(f"column '{name}' can't be an input: {refused[name]}; leave it out")
    if problems:
        refuse(table.source, problems)
    return tuple(dict.fromkeys(wanted)), []


def _labels(
    table: LabelTable, tasks: Sequence[TaskSpec], *, look: bool
) -> tuple[tuple[TaskSpec, ...], dict[str, NDArray[np.float64]], list[str]]:
    settled, truth, notes = [], {}, []
    for task in tasks:
        there = look and (task.column in table.columns or (task.column == "site" and any(table.sites)))
        if there:
            task, left_out = settle(task, table)
            notes += [left_out] if left_out else []
        elif look:
            hint = nearest(task.column, table.columns) if table.columns else "there is none beside the ids"
            notes.append(f"task '{task.name}': no column '{task.column}' in {table.source}; {hint}")
        settled.append(task)
        if there and (task.classes or task.kind == "continuous"):
            truth[task.name] = encode(task, table)
        else:
            width = len(task.classes) if task.kind == "multi-label" else 1
            truth[task.name] = np.full((len(table), width), np.nan)
    return tuple(settled), truth, notes


# --- images ------------------------------------------------------------------------------------------------------


def _open(table: LabelTable, features: Path, encoder: str | None, grid: str | None) -> tuple[dict[str, Bag], list[str]]:
    join = join_labels(table, find_features(features, encoder=encoder), where=str(features))
    bags = open_bags(features, join.table, encoder=encoder, grid=grid)
    notes = []
    if join.without_features:
        notes.append(f"{_count(len(join.without_features), 'slide')} without features ({_some(join.without_features)})")
    if join.unlisted:
        notes.append(
            f"{_count(len(join.unlisted), 'slide')} with features but not in {table.source} ({_some(join.unlisted)})"
        )
    empty = [bag.bag_id for bag in bags if not bag.n_tiles]
    if empty:
        notes.append(f"{_count(len(empty), 'slide')} without a tile counted as without image ({_some(empty)})")
    return {bag.bag_id: bag for bag in bags if bag.n_tiles}, notes


# --- reports -----------------------------------------------------------------------------------------------------


class Reports(NamedTuple):
    """Reports by the id they are filed under."""

    by_id: dict[str, str]
    """Slide or patient id, in Unicode's composed form, to text."""
    notes: tuple[str, ...]
    """Which were not UTF-8, a sentence."""


def read_reports(path: Path) -> Reports:
    """Read reports: a CSV table with ``text`` and ``slide_id`` or ``patient_id``, or a folder of ``<id>.txt``.

    UTF-8, UTF-16 and UTF-32 (with or without byte-order mark) are told apart by their bytes; all else is read as
    Windows-1252, and a note says so. Several reports under one id are one text. A report of a patient serves all slides
    of the patient.

    Raises:
        UsageError: The file or folder can't be read, holds no report, is not text, or lacks a column.
    """
    odd: list[str] = []
    found: dict[str, list[str]] = {}
    if path.is_dir():
        for file in sorted(path.glob("*.txt")):
            found.setdefault(unicodedata.normalize("NFC", file.stem), []).append(_decode(file, odd))
        if not found:
            raise UsageError(f"{path}: no .txt files here; name each report <slide_id>.txt or <patient_id>.txt")
    else:
        for name, text in _rows_of_reports(path, _decode(path, odd)):
            found.setdefault(name, []).append(text)
    by_id = {name: text for name, texts in found.items() if (text := _cleaned("\n".join(texts)))}
    if not by_id:
        raise UsageError(f"{path}: all reports are empty; check the file or the column 'text'")
    notes = []
    if odd:
        what = "1 file of reports is" if len(odd) == 1 else f"{len(odd)} files of reports are"
        notes.append(f"{what} not in Unicode, read as Windows-1252; look whether accents came out right ({_some(odd)})")
    return Reports(by_id, tuple(notes))


def _rows_of_reports(path: Path, text: str) -> list[tuple[str, str]]:
    first_line = next((line for line in re.split(r"\r\n|\r|\n", text) if line.strip()), "")
    delimiter = max(_DELIMITERS, key=first_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    rows: list[list[str]] = []
    try:
        rows.extend(cells for cells in reader if any(cell.strip() for cell in cells))
    except csv.Error as error:
        raise UsageError(
            f"{path.name} line {reader.line_num}: not CSV ({error}); quote the reports, or give a folder of .txt files"
        ) from None
    header = [name.strip().casefold() for name in rows[0]] if rows else []
    key = next((name for name in ("slide_id", "patient_id") if name in header), None)
    if key is None or "text" not in header:
        raise UsageError(
            f"{path.name}: a table of reports has the columns 'text' and 'slide_id' or 'patient_id' "
            f"(found: {', '.join(header) or 'nothing'}); rename them, or give a folder of .txt files"
        )
    found, problems = [], []
    at, of = header.index(key), header.index("text")
    for number, cells in enumerate(rows[1:], 2):
        if len(cells) < len(header):
            problems.append(f"row {number}: {len(cells)} cells under {len(header)} columns; quote the reports")
        elif is_missing(cells[at]):
            problems.append(f"row {number}: {key} is empty; name it, or leave the row out")
        else:
            found.append((unicodedata.normalize("NFC", cells[at].strip()), cells[of]))
    if problems:
        refuse(path.name, problems)
    return found


def _decode(path: Path, odd: list[str]) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: the reports can't be read ({error.strerror or error}); check the path") from None
    for encoding in _encodings(data):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        break
    else:
        encoding = "cp1252"
        text = data.decode(encoding, errors="ignore")
    if len(_UNSEEN.findall(text)) > max(2, _MOST_CONTROLS * len(text)):
        raise UsageError(f"{path}: not a text file; save reports as plain text (UTF-8) or a CSV table")
    if encoding == "cp1252":
        odd.append(path.name)
    return text


def _encodings(data: bytes) -> tuple[str, ...]:
    """Which to try, the first that fits is it."""
    if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return ("utf-32",)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return ("utf-16",)
    sample = data[:4096]
    # Half the bytes of western text in UTF-16 are zero: the second ones if the lower byte comes first.
    if sample.count(0) > 0.3 * len(sample):
        return ("utf-16-le",) if sample[1::2].count(0) > sample[::2].count(0) else ("utf-16-be",)
    return "utf-8-sig", "cp1252"


def _cleaned(text: str) -> str:
    text = _UNSEEN.sub("", unicodedata.normalize("NFC", text))
    return re.sub(r"[^\S\n]+", " ", re.sub(r"\r\n?", "\n", text)).strip()


def _texts_of(
    table: LabelTable, reports: Reports, tasks: Sequence[TaskSpec], where: str
) -> tuple[list[str | None], list[str]]:
    patterns = tuple(dict.fromkeys(pattern for task in tasks for pattern in patterns_of(task)))
    ready: dict[str, str] = {}
    taken_out = touched = 0
    texts: list[str | None] = []
    for slide_id, patient_id in zip(table.slide_ids, table.patient_ids, strict=True):
        name = slide_id if slide_id in reports.by_id else patient_id
        if name not in reports.by_id:
            texts.append(None)
            continue
        if name not in ready:
            text, count = deny(without_ids(reports.by_id[name], (slide_id, patient_id)), patterns)
            ready[name] = text.strip()
            taken_out, touched = taken_out + count, touched + (count > 0)
        texts.append(ready[name] or None)
    if not ready:
        raise UsageError(
            f"no report of {where} is of a slide or patient of {table.source} (reports: {_some(list(reports.by_id))}; "
            f"slides: {_some(table.slide_ids)}; patients: {_some(table.patient_ids)}); write the ids alike"
        )
    notes = [*reports.notes]
    bare = [slide_id for slide_id, text in zip(table.slide_ids, texts, strict=True) if text is None]
    if bare:
        notes.append(f"{_count(len(bare), 'slide')} without a report ({_some(bare)})")
    unused = [name for name in reports.by_id if name not in ready]
    if unused:
        notes.append(f"{_count(len(unused), 'report')} of no slide of {table.source} ({_some(unused)})")
    if taken_out:
        of = _count(touched, "report")
        notes.append(f"{_count(taken_out, 'sentence')} that may state a label taken out of {of} of {len(ready)}")
    return texts, notes


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(map(quote, names[:_SHOWN])) + more
