"""Labels of a cohort: a table of slides with any columns, joined with the slides that have features."""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pathopipe.cohort.manifest import double_ids, id_problem
from pathopipe.cohort.table import quote, read_table, refuse
from pathopipe.errors import UsageError
from pathopipe.registry import nearest

__all__ = ["LabelJoin", "LabelTable", "is_missing", "join_labels", "read_labels"]

logger = logging.getLogger("pathopipe")

_MISSING: Final = frozenset(("", "na", "n/a", "nan", "none", "null", "nil", "missing", "#n/a", ".", "?", "-", "--"))
_TCGA: Final = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?![A-Z0-9])", re.IGNORECASE)
_TCGA_PATIENT_LETTERS: Final = 12
_SUFFIXES: Final = (
    *(".svs", ".tiff", ".tif", ".ndpi", ".mrxs", ".scn", ".bif", ".dcm", ".vms", ".czi", ".isyntax"),
    *(".zarr", ".h5", ".hdf5", ".pt", ".npz", ".png", ".jpg", ".jpeg"),
)
_SHOWN_IDS: Final = 3


def is_missing(text: str) -> bool:
    """Whether a cell states nothing: empty, ``NA``, ``n/a``, ``NaN``, ``None``, ``null``, ``?``, ``-`` and the like."""
    return text.strip().casefold() in _MISSING


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelTable:
    """Slides and what a table says of them, one row a slide, all cells as text."""

    source: str
    """Name of the table, for messages."""
    slide_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    sites: tuple[str, ...]
    """``""`` where not stated."""
    split: tuple[str, ...] | None
    """Cells of the ``split`` column; None where there is no such column."""
    columns: dict[str, tuple[str, ...]]
    """Every other column."""

    def __len__(self) -> int:
        return len(self.slide_ids)

    @classmethod
    def of_slides(cls, slide_ids: Sequence[str]) -> "LabelTable":
        """A table without any label, each slide a patient of its own; enough to open bags and predict."""
        ids = tuple(slide_ids)
        return cls(source="slides", slide_ids=ids, patient_ids=ids, sites=("",) * len(ids), split=None, columns={})

    def column(self, name: str) -> tuple[str, ...]:
        """The cells of one column; ``slide_id``, ``patient_id``, ``site`` and ``split`` are columns too.

        Raises:
            UsageError: There is no such column.
        """
        known = {"slide_id": self.slide_ids, "patient_id": self.patient_ids, "site": self.sites, **self.columns}
        if self.split is not None:
            known["split"] = self.split
        if name not in known:
            raise UsageError(f"{self.source}: no column '{name}'; {nearest(name, known)}")
        return known[name]

    def take(self, rows: Sequence[int]) -> "LabelTable":
        """Some of the rows, in the order given."""

        def pick(cells: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(cells[row] for row in rows)

        return LabelTable(
            source=self.source,
            slide_ids=pick(self.slide_ids),
            patient_ids=pick(self.patient_ids),
            sites=pick(self.sites),
            split=None if self.split is None else pick(self.split),
            columns={name: pick(cells) for name, cells in self.columns.items()},
        )

    def by_patient(self, targets: Sequence[str]) -> "LabelTable":
        """One row a patient, in order of first appearance; its slide id is the patient's id.

        A cell is what the patient's slides state alike, missing cells aside; where they differ it is empty.

        Args:
            targets: Columns in which slides of a patient must not contradict each other.

        Raises:
            UsageError: They do, or they lie in several parts of the ``split`` column.
        """
        slides: dict[str, list[int]] = {}
        for row, patient in enumerate(self.patient_ids):
            slides.setdefault(patient, []).append(row)
        strict = {*targets, "split"}
        problems = []

        def merge(name: str, cells: tuple[str, ...]) -> tuple[str, ...]:
            merged = []
            for patient, rows in slides.items():
                stated = list(dict.fromkeys(cells[row] for row in rows if not is_missing(cells[row])))
                if len(stated) > 1 and name in strict:
                    problems.append(
                        f"patient {quote(patient)} has slides of different {name} ({', '.join(map(quote, stated))}); "
                        "make the labels one, or take slides as bags"
                    )
                merged.append(stated[0] if len(stated) == 1 else "")
            return tuple(merged)

        table = LabelTable(
            source=self.source,
            slide_ids=tuple(slides),
            patient_ids=tuple(slides),
            sites=merge("site", self.sites),
            split=None if self.split is None else merge("split", self.split),
            columns={name: merge(name, cells) for name, cells in self.columns.items()},
        )
        if problems:
            refuse(self.source, problems)
        return table


def read_labels(
    path: Path,
    *,
    id_column: str = "slide_id",
    patient_column: str = "patient_id",
    site_column: str = "site",
    split_column: str = "split",
    tcga_patients: bool = False,
) -> LabelTable:
    """Read a table of labels: a manifest, or any CSV table with a column of slide ids; slide files are not looked at.

    Without the patient column every slide counts as a patient of its own, and a warning says so.

    Args:
        path: The table; encodings and delimiters as :func:`pathopipe.cohort.read_manifest` takes them.
        id_column: The column of slide ids.
        patient_column: The column of patients; may be absent unless it is named otherwise than ``patient_id``.
        site_column: The column of sites; may be absent.
        split_column: The column of given splits; may be absent.
        tcga_patients: Where there is no patient column, take the first 12 characters of TCGA barcodes.

    Raises:
        UsageError: The table can't be read, ids are unsafe or double, patients are missing in some rows, or slides are
            named by TCGA barcodes of shared patients and nothing says which patient they are of.
    """
    needed = [id_column] + ([patient_column] if patient_column != "patient_id" else [])
    table = read_table(path, needed=needed, kind="label table")
    problems: list[str] = []
    numbers: list[int] = []
    rows: list[dict[str, str]] = []
    for number, values in table.full_rows(problems):
        row = {name: cell.strip() for name, cell in values.items()}
        fault = id_problem(values[id_column])
        if fault:
            problems.append(f"row {number}: {fault}")
        if patient_column in row and is_missing(row[patient_column]):
            problems.append(f"row {number}: {patient_column} is empty; name the patient, or leave the row out")
        numbers.append(number)
        rows.append(row)
    slide_ids = [unicodedata.normalize("NFC", row.pop(id_column)) for row in rows]
    for first, second, text in double_ids(slide_ids, case_matters=False):
        problems.append(f"rows {numbers[first]} and {numbers[second]}: {text}; write one row a slide")
    if problems:
        refuse(path.name, problems)
    if not rows:
        raise UsageError(f"{path.name}: no slide below the header; write one row a slide")
    if patient_column in table.header:
        patients = [unicodedata.normalize("NFC", row.pop(patient_column)) for row in rows]
    else:
        patients = _patients_of_slides(slide_ids, path.name, tcga_patients=tcga_patients)
    special = {name: [row.pop(name, "") for row in rows] for name in (site_column, split_column)}
    known = {id_column, patient_column, site_column, split_column}
    return LabelTable(
        source=path.name,
        slide_ids=tuple(slide_ids),
        patient_ids=tuple(patients),
        sites=tuple("" if is_missing(site) else site for site in special[site_column]),
        split=tuple(special[split_column]) if split_column in table.header else None,
        columns={name: tuple(row[name] for row in rows) for name in table.header if name not in known},
    )


def _patients_of_slides(slide_ids: list[str], where: str, *, tcga_patients: bool) -> list[str]:
    """Each slide's patient where no column names it."""
    barcodes = sum(_TCGA.match(slide_id) is not None for slide_id in slide_ids)
    if tcga_patients:
        if barcodes < len(slide_ids):
            odd = next(slide_id for slide_id in slide_ids if not _TCGA.match(slide_id))
            raise UsageError(f"{where}: slide_id {quote(odd)} is no TCGA barcode; add a column patient_id")
        return [slide_id[:_TCGA_PATIENT_LETTERS].upper() for slide_id in slide_ids]
    if barcodes:
        prefixes = Counter(slide_id[:_TCGA_PATIENT_LETTERS].upper() for slide_id in slide_ids if _TCGA.match(slide_id))
        shared = [prefix for prefix, count in prefixes.items() if count > 1]
        if shared:
            raise UsageError(
                f"{where}: no column 'patient_id', and {len(shared)} TCGA patients have several slides ({shared[0]} "
                f"has {prefixes[shared[0]]}), which would stand on both sides of a split; add patient_id, the first 12 "
                "characters of the barcode, or have it taken from the barcodes"
            )
    hint = "; they are TCGA barcodes, whose first 12 characters name the patient" if barcodes else ""
    logger.warning(
        "%s: no column 'patient_id', so each of the %d slides counts as a patient of its own; "
        "where patients have several slides the figures will be too good%s",
        where,
        len(slide_ids),
        hint,
    )
    return list(slide_ids)


# --- the join ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelJoin:
    """Which slides have both features and a label, and which lack one of them."""

    table: LabelTable
    """The rows with features and at least one target, in the order of the table."""
    without_features: tuple[str, ...]
    """Slides with a label and no features."""
    unlabelled: tuple[str, ...]
    """Slides with features whose targets are all empty."""
    unlisted: tuple[str, ...]
    """Slides with features that the table doesn't name."""

    def lines(self) -> list[str]:
        """What was left out, a sentence each; nothing where all fits."""
        said = (
            (self.without_features, "labelled but without features, left out"),
            (self.unlabelled, "with features but every target empty, left out"),
            (self.unlisted, f"with features but not in {self.table.source}, left out"),
        )
        return [f"{_count(len(ids), 'slide')} {what}: {_some(ids, 5)}" for ids, what in said if ids]


def join_labels(table: LabelTable, available: Collection[str], *, targets: Sequence[str] = (), where: str) -> LabelJoin:
    """Join a table with the slides that have features.

    Args:
        table: The labels.
        available: Ids of the slides that have features.
        targets: The columns to be learnt; a slide on which all are missing is left out. None: every row is taken.
        where: Where the features are, for messages.

    Raises:
        UsageError: Nothing matches, with three ids of each side and the likely cause; or a target is not a column or
            empty throughout.
    """
    cells = [table.column(name) for name in targets]
    for name, column in zip(targets, cells, strict=True):
        if all(map(is_missing, column)):
            raise UsageError(f"{table.source}: column '{name}' is empty in all {len(table)} rows; fill in the labels")
    composed = {unicodedata.normalize("NFC", slide_id) for slide_id in available}
    if not composed:
        raise UsageError(
            f"{where}: no features here; give the folder that 'pathopipe run --out' or another program wrote"
        )
    matched = [row for row, slide_id in enumerate(table.slide_ids) if slide_id in composed]
    if not matched:
        raise UsageError(
            f"no slide of {table.source} has features in {where} "
            f"({len(table)} labels: {_some(table.slide_ids)}; {len(composed)} features: {_some(sorted(composed))}); "
            f"{_cause(table.slide_ids, composed)}"
        )
    labelled = [row for row in matched if not cells or any(not is_missing(column[row]) for column in cells)]
    if not labelled:
        named = ", ".join(targets)
        raise UsageError(
            f"{table.source}: none of the {len(matched)} slides with features has a label in {named}; fill them in"
        )
    listed = set(table.slide_ids)
    kept = set(labelled)
    return LabelJoin(
        table=table.take(labelled),
        without_features=tuple(slide_id for slide_id in table.slide_ids if slide_id not in composed),
        unlabelled=tuple(table.slide_ids[row] for row in matched if row not in kept),
        unlisted=tuple(sorted(composed - listed)),
    )


def _cause(labels: Sequence[str], features: Collection[str]) -> str:
    """Why ids of two sides may not match, by trying what would make them."""

    def bare(slide_id: str) -> str:
        suffix = next((end for end in _SUFFIXES if slide_id.casefold().endswith(end)), "")
        return slide_id.removesuffix(slide_id[len(slide_id) - len(suffix) :]) if suffix else slide_id

    def matches(left: Iterable[str], right: Iterable[str]) -> bool:
        return not set(left).isdisjoint(right)

    bare_labels, bare_features = [bare(slide_id) for slide_id in labels], [bare(slide_id) for slide_id in features]
    if matches(bare_labels, bare_features):
        side = "labels" if matches(bare_labels, features) else "features"
        return f"the ids of the {side} end in a file extension: take it away"
    folded_labels, folded_features = [s.casefold() for s in bare_labels], [s.casefold() for s in bare_features]
    if matches(folded_labels, folded_features):
        return "they differ in upper and lower case: write them alike"
    if matches((s.split(".")[0] for s in folded_labels), (s.split(".")[0] for s in folded_features)):
        return "they differ in what follows the first dot (TCGA's file names add a UUID there): write them alike"
    for side, short, long in (("labels", folded_labels, folded_features), ("features", folded_features, folded_labels)):
        # A thousand of each side tell the cause; all of two large tables would take minutes.
        prefixes = tuple(sorted(s for s in short if len(s) >= 4)[:1000])
        if prefixes and any(s.startswith(prefixes) for s in sorted(long)[:1000]):
            patient = any(_TCGA.fullmatch(s) for s in short)
            what = "TCGA patients, not slides" if patient else "only the beginnings of the other side's ids"
            return f"the ids of the {side} are {what}: write one row a slide, with its whole id"
    return "the ids share nothing: check that table and folder belong together"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _some(ids: Sequence[str], shown: int = _SHOWN_IDS) -> str:
    more = f" and {len(ids) - shown} more" if len(ids) > shown else ""
    return ", ".join(map(quote, ids[:shown])) + more
