"""What gives a label away: sentences and columns that state it, and a probe for single words and columns that do."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, rankdata
from sklearn.feature_extraction.text import CountVectorizer

from pathopipe.cohort import LabelTable, is_missing
from pathopipe.metadata.table import as_number
from pathopipe.metadata.tasks import TaskSpec

if TYPE_CHECKING:
    from pathopipe.metadata.cases import MetadataCohort

__all__ = ["Leak", "deny", "patterns_of", "probe", "refused_columns", "without_ids"]

Floats = NDArray[np.float64]

# Reports are often scanned text, in which l and I stand for 1 and O for 0.
_STAGE: Final = (
    r"(?<![A-Za-z0-9])[acpruymACPRUYM]{0,3} ?T ?-?(?:[0-4lXx]|is|IS|I{1,3}|IV)[a-d]?[0-3]?(?![A-Za-z0-9]*[a-z0-9]{2})",
    r"(?<![A-Za-z0-9])[acpruymACPRUYM]{1,3} ?[NM] ?-?[0-3lIOoXx](?![A-Za-z0-9]*[a-z0-9]{3})",
    r"(?<![A-Za-z0-9])[NM][0-3XO](?![A-Za-z0-9])",
    r"(?i)\b(?:stage|stages|staged|staging|ajcc|uicc|figo|p?tnm|ptn|dukes?|duke's|astler)\b",
)
_GRADE: Final = (r"(?i)\b(?:grade[ds]?|grading|gleason|fuhrman|nottingham|differentiat\w+)\b", r"\bG ?[1-4]\b")
_STAGE_TASK: Final = frozenset(("stage", "staging", "tnm", "ajcc", "uicc", "figo", "pt", "pn", "pm"))
_GRADE_TASK: Final = frozenset(("grade", "grading", "gleason"))

_SENTENCE_END: Final = re.compile(r"(?<=[.!?;])\s+|\n+")
_BARCODE: Final = re.compile(r"\bTCGA-[A-Z0-9]{2}-[A-Z0-9]{4}[A-Z0-9.-]*", re.IGNORECASE)
_UUID: Final = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", re.IGNORECASE)
# Shorter ids are numbers and words of everyday language, too.
_LEAST_ID_LETTERS: Final = 4

_WORD: Final = re.compile(r"[^a-z0-9]+")
_NAMES_A_FILE: Final = frozenset(
    (
        "id",
        "ids",
        "uuid",
        "guid",
        "barcode",
        "barcodes",
        "bytes",
        "md5",
        "sha256",
        "filename",
        "accession",
        "mrn",
        "url",
    )
)
_KEYS: Final = frozenset(
    (
        *(
            "section",
            "slide",
            "slides",
            "path",
            "file",
            "file name",
            "file size",
            "file path",
            "tss",
            "patient",
            "case",
        ),
        *("participant", "portion", "vial", "plate", "center", "aliquot", "analyte", "sample type code", "name"),
        *("patient name", "surname", "first name", "last name", "fold", "split"),
    )
)
_DATES: Final = re.compile(
    r"\d{4}[-/.]\d{1,2}([-/.]\d{1,2}([T ].*)?)?|\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2})( .*)?|(19|20)\d{6}"
    r"|\d{1,2}[-. ]+(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*[-., ]+\d{2,4}"
    r"|(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.? (\d{1,2},? )?\d{4}",
    re.IGNORECASE,
)
_DATE_SHARE: Final = 0.8
_YEARS: Final = (1900, 2100)
_UNIQUE_SHARE: Final = 0.9
# Free text that few patients share; a quantity with decimals is none.
_TEXT_UNIQUE_SHARE: Final = 0.5
# Values of fewer patients differ by nature.
_LEAST_TO_JUDGE: Final = 20
_PART_SHARE: Final = 0.95
_STATES: Final = 0.9
_STATES_ODDS: Final = 0.2
_STATES_SHARE: Final = 0.1
_STATES_P: Final = 0.01
_WORD_OF_REPORT: Final = r"(?u)\b\w[\w/+-]*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """One word of the reports, or one column, that gives a label away."""

    task: str
    label: str
    """The class that it tells from all others best."""
    what: str
    """The word, or the column."""
    where: Literal["report", "table"]
    auroc: float
    """Of the class against the others by this alone, on patients that had no part in finding which way it points."""
    precision: float | None
    """Share of the class among the cases that have the word; None for a column."""
    support: int
    """Patients with the word, or with a value in the column."""

    def line(self) -> str:
        """One sentence."""
        of = f"{self.task} = {self.label}"
        advice = "if it states the label, deny it in the task file"
        if self.precision is None:
            return f"column '{self.what}' alone tells {of}: AUROC {self.auroc:.3f}, {self.support} patients; {advice}"
        return (
            f"the word '{self.what}' gives {of} away: {self.precision:.0%} of the {self.support} patients with it, "
            f"AUROC {self.auroc:.3f} by it alone; {advice}"
        )


# --- the deny list -----------------------------------------------------------------------------------------------


def patterns_of(task: TaskSpec) -> tuple[str, ...]:
    """What states a task's label in a report: its own patterns, and those of TNM or grade where it is a stage or grade.

    A stage is told by its name or column: ``t_stage``, ``ajcc_pathologic_t``, ``pT``.
    """
    words = {word for name in (task.name, task.column) for word in _WORD.split(name.casefold())}
    known = (*(_STAGE if words & _STAGE_TASK else ()), *(_GRADE if words & _GRADE_TASK else ()))
    return (*task.deny_text, *known)


def deny(text: str, patterns: Sequence[str]) -> tuple[str, int]:
    """Take out the sentences in which a pattern is found.

    A sentence ends at a full stop, a semicolon, a question or exclamation mark before a space, or with its line.

    Returns:
        The text, and how many sentences were taken out.
    """
    # Patterns carry flags of their own, so they can't be joined into one.
    compiled = [pattern for pattern in map(re.compile, patterns) if pattern.search(text)]
    if not compiled:
        return text, 0
    sentences = _SENTENCE_END.split(text)
    kept = [sentence for sentence in sentences if not any(pattern.search(sentence) for pattern in compiled)]
    return " ".join(kept), len(sentences) - len(kept)


def without_ids(text: str, ids: Sequence[str]) -> str:
    """The text without TCGA barcodes, UUIDs and the given ids (of four letters or more, as whole words)."""
    for pattern in (_BARCODE, _UUID):
        text = pattern.sub(" ", text)
    lowered = text.casefold()
    for name in {name for name in ids if len(name) >= _LEAST_ID_LETTERS and name.casefold() in lowered}:
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", " ", text, flags=re.IGNORECASE)
    return text


def refused_columns(table: LabelTable, tasks: Sequence[TaskSpec]) -> dict[str, str]:
    """Columns that can't be inputs, each with the reason.

    They record a task or are denied by one, they bear the name of a key, a file or a barcode part, or their values say
    so: they hold the slide's or the patient's id or a part of it, dates, or nearly as many values as there are patients
    (quantities with decimals may).
    """
    recorded = {task.column: task.name for task in tasks}
    denied = {column: task.name for task in tasks for column in task.deny_columns}
    parts = [_id_parts(slide, patient) for slide, patient in zip(table.slide_ids, table.patient_ids, strict=True)]
    refused = {}
    for name, cells in table.columns.items():
        if name in recorded:
            refused[name] = f"it records the task '{recorded[name]}'"
        elif name in denied:
            refused[name] = f"the task '{denied[name]}' denies it"
        elif _is_key(name):
            refused[name] = "its name is that of an id, a file or a part of a barcode"
        elif reason := _reason_in_values(table, cells, parts):
            refused[name] = reason
    return refused


def _is_key(name: str) -> bool:
    words = [word for word in _WORD.split(name.casefold()) if word]
    return " ".join(words) in _KEYS or not _NAMES_A_FILE.isdisjoint(words)


def _id_parts(slide: str, patient: str) -> frozenset[str]:
    """Ids and what stands between their separators, with and without the letters or digits at a part's end."""
    parts = {part for of in (slide, patient) for part in re.split(r"[^a-z0-9]+", of.casefold())}
    ends = {cut for part in parts for cut in (part.rstrip("0123456789"), part.rstrip("abcdefghijklmnopqrstuvwxyz"))}
    return frozenset(parts | ends | {slide.casefold(), patient.casefold()}) - {""}


def _reason_in_values(table: LabelTable, cells: Sequence[str], parts: Sequence[frozenset[str]]) -> str:
    stated = [(row, cell.strip().casefold()) for row, cell in enumerate(cells) if not is_missing(cell)]
    values = {cell for _, cell in stated}
    if len(values) < 2:
        return "it holds no more than one value"
    for row, cell in stated:
        own = table.patient_ids[row].casefold()
        if len(own) >= _LEAST_ID_LETTERS and own in cell:
            return f"it names the patient (slide {table.slide_ids[row]})"
    of_id = sum(cell in parts[row] for row, cell in stated)
    # Where patients are numbered, a number may be one by chance, but not in nearly all rows.
    if len(stated) >= _LEAST_TO_JUDGE and of_id >= _PART_SHARE * len(stated):
        return "it is a part of the slide's id"
    if sum(_DATES.fullmatch(value) is not None for value in values) >= _DATE_SHARE * len(values):
        return "it holds dates"
    numbers = [as_number(value) for value in values]
    whole = [number for number in numbers if number is not None and number == int(number)]
    if len(values) > 2 and len(whole) == len(values) and all(_YEARS[0] <= number <= _YEARS[1] for number in whole):
        return "it holds years"
    patients = {table.patient_ids[row] for row, _ in stated}
    is_quantity = all(number is not None for number in numbers)
    if len(patients) >= _LEAST_TO_JUDGE and not (is_quantity and len(whole) < 0.5 * len(values)):
        share = len(values) / len(patients)
        if share >= (_UNIQUE_SHARE if is_quantity else _TEXT_UNIQUE_SHARE):
            return f"its {len(values)} values nearly name the {len(patients)} patients"
    return ""


# --- the probe ---------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Cases told apart by patient, input and label, so that many slides of a patient count once."""

    of: NDArray[np.intp]
    """(m,) row of the cohort."""
    labels: NDArray[np.bool_]
    """(m, classes)."""
    halves: tuple[NDArray[np.bool_], NDArray[np.bool_]]
    """(m,) each; no patient is in both."""


def probe(
    cohort: "MetadataCohort", *, least_auroc: float = 0.95, least_support: int = 10, most: int = 20, seed: int = 0
) -> list[Leak]:
    """Words and columns that give a label away alone; to be stated before any result.

    Each word that stands in reports of at least ``least_support`` patients and each column that may be an input is
    tried alone against each class of at least as many patients. Which way it points is taken from one half of the
    patients and the AUROC from the other, both ways round; the lower one counts.

    A word that states the label in some reports, like ``pT2``, has no such AUROC. It is named where at least 90 % of
    the patients with it are of the class (more where most of all patients are), a tenth of the class has it, and chance
    would hardly bring any such word about (p < 0.01 over all words).

    Returns:
        By task, strongest first, at most ``most`` of each. A word of the organ itself is among them where it tells as
        much: whether a word states the label or is a finding is for the reader to say.
    """
    leaks: list[Leak] = []
    texts = list(dict.fromkeys(case.text for case in cohort.cases if case.text))
    number = {text: place for place, text in enumerate(texts)}
    of_case = np.asarray([number.get(case.text or "", -1) for case in cohort.cases], np.intp)
    words = _words(texts, least_support)
    for task in cohort.tasks:
        truth = cohort.truth[task.name]
        names, labels = _classes(task, truth)
        known = np.isfinite(truth).all(axis=1)
        tried: list[tuple[Leak, bool]] = []
        if words is not None:
            rows = _distinct(cohort, known & (of_case >= 0), [str(place) for place in of_case], labels, seed)
            tried += _try_words(task, names, rows, words[0], words[1][of_case[rows.of]], cohort, least_support)
        for column in cohort.table_columns:
            cells = ["" if is_missing(cell := case.row.get(column, "")) else cell.strip() for case in cohort.cases]
            rows = _distinct(cohort, known & np.asarray([bool(cell) for cell in cells]), cells, labels, seed)
            tried += _try_column(task, names, rows, column, cells, cohort, least_support)
        found = [leak for leak, states in tried if states or leak.auroc >= least_auroc]
        leaks += sorted(found, key=lambda leak: (-leak.auroc, leak.what))[:most]
    return leaks


def _words(texts: Sequence[str], least_support: int) -> tuple[NDArray[np.str_], NDArray[np.bool_]] | None:
    if len(texts) < least_support:
        return None
    reader = CountVectorizer(binary=True, token_pattern=_WORD_OF_REPORT, min_df=least_support, dtype=np.uint8)
    try:
        found = reader.fit_transform(texts)
    except ValueError:
        # No word stands in so many texts.
        return None
    return reader.get_feature_names_out(), found


def _classes(task: TaskSpec, truth: Floats) -> tuple[tuple[str, ...], NDArray[np.bool_]]:
    """Names, and (n, classes) which case is of which; False where missing."""
    if task.kind == "continuous":
        middle = float(np.nanmedian(truth)) if np.isfinite(truth).any() else 0.0
        return (f"above {middle:g}",), truth > middle
    if task.kind == "multi-label":
        return task.classes, truth == 1
    return task.classes, truth == np.arange(len(task.classes))


def _distinct(
    cohort: "MetadataCohort", there: NDArray[np.bool_], inputs: Sequence[str], labels: NDArray[np.bool_], seed: int
) -> _Rows:
    first: dict[tuple[str, str, bytes], int] = {}
    for row in np.flatnonzero(there).tolist():
        first.setdefault((cohort.patients[row], inputs[row], labels[row].tobytes()), row)
    of = np.asarray(list(first.values()), np.intp)
    patients = sorted({cohort.patients[row] for row in of})
    drawn = np.random.default_rng(seed).permutation(len(patients)) < len(patients) / 2
    side = dict(zip(patients, drawn.tolist(), strict=True))
    half = np.asarray([side[cohort.patients[row]] for row in of], bool)
    return _Rows(of, labels[of], (half, ~half))


def _judged(rows: _Rows, cohort: "MetadataCohort", least_support: int) -> list[int]:
    """Classes with enough patients on either side, of which some are in each half."""
    judged = []
    for number in range(rows.labels.shape[1]):
        of = rows.labels[:, number]
        enough = all(len({cohort.patients[row] for row in rows.of[side]}) >= least_support for side in (of, ~of))
        if enough and all((of & half).any() and (~of & half).any() for half in rows.halves):
            judged.append(number)
    return judged


def _try_words(
    task: TaskSpec,
    names: Sequence[str],
    rows: _Rows,
    words: NDArray[np.str_],
    present: NDArray[np.bool_],
    cohort: "MetadataCohort",
    least_support: int,
) -> list[tuple[Leak, bool]]:
    """Each word with its best class, and whether it states that class where it stands."""
    judged = _judged(rows, cohort, least_support)
    if not judged:
        return []
    # Of a word that is there or not, the AUROC is (1 + sensitivity - share of false alarms) / 2.
    gaps = []
    for half in rows.halves:
        here, labels = present[half], rows.labels[half][:, judged].astype(np.float64)
        hits, total = here.T @ labels, np.asarray(here.sum(axis=0, dtype=np.int64)).reshape(-1, 1)
        n = labels.sum(axis=0)
        gaps.append(hits / n - (total - hits) / (half.sum() - n))
    auroc = np.minimum(_signed(gaps[0], gaps[1]), _signed(gaps[1], gaps[0]))
    labels = rows.labels[:, judged].astype(np.float64)
    hits = np.asarray(present.T @ labels)
    support = np.asarray(present.sum(axis=0, dtype=np.int64)).ravel()
    n = labels.sum(axis=0)
    precision = hits / np.maximum(support, 1)[:, None]
    by_chance = binom.sf(hits - 1, support[:, None], n / len(labels)) * len(support)
    least = np.maximum(_STATES, 1 - _STATES_ODDS * (1 - n / len(labels)))
    states = (precision >= least) & (hits >= _STATES_SHARE * n) & (by_chance < _STATES_P)
    best = np.where(states, 1 + auroc, auroc).argmax(axis=1)
    tried = []
    for word in np.flatnonzero(support >= least_support):
        at = best[word]
        leak = Leak(
            task=task.name,
            label=names[judged[at]],
            what=str(words[word]),
            where="report",
            auroc=float(auroc[word, at]),
            precision=float(precision[word, at]),
            support=int(support[word]),
        )
        tried.append((leak, bool(states[word, at])))
    return tried


def _signed(gap: Floats, other: Floats) -> Floats:
    return np.asarray(0.5 + 0.5 * gap * np.where(other >= 0, 1, -1))


def _try_column(
    task: TaskSpec,
    names: Sequence[str],
    rows: _Rows,
    column: str,
    cells: Sequence[str],
    cohort: "MetadataCohort",
    least_support: int,
) -> list[tuple[Leak, bool]]:
    values = [cells[row] for row in rows.of]
    numbers = [as_number(value) for value in values]
    found = []
    for number in _judged(rows, cohort, least_support):
        label = rows.labels[:, number]
        # A number is tried as it is and, where it may be a code, by its values.
        lowest = [_auroc_by_values(values, label, *rows.halves)]
        if None not in numbers:
            quantity = np.asarray(numbers, np.float64)
            sides = [_auroc(quantity[half], label[half]) - 0.5 for half in rows.halves]
            lowest.append(min(0.5 + sides[0] * np.sign(sides[1]), 0.5 + sides[1] * np.sign(sides[0])))
        found.append((max(lowest), names[number]))
    if not found:
        return []
    auroc, name = max(found)
    support = len({cohort.patients[row] for row in rows.of})
    leak = Leak(task=task.name, label=name, what=column, where="table", auroc=auroc, precision=None, support=support)
    return [(leak, False)]


def _auroc_by_values(values: Sequence[str], label: NDArray[np.bool_], *halves: NDArray[np.bool_]) -> float:
    """Each value scored by the share of the class among the other half's cases with it; the lower of both ways."""
    found = []
    for half in halves:
        learnt: Mapping[str, int] = Counter(value for value, there in zip(values, ~half, strict=True) if there)
        hits = Counter(value for value, there in zip(values, ~half & label, strict=True) if there)
        share = label[~half].mean()
        # Half a case of the average kind, so that values not seen stand in the middle.
        scores = np.asarray([(hits[value] + 0.5 * share) / (learnt[value] + 0.5) for value in values])
        found.append(_auroc(scores[half], label[half]))
    return min(found)


def _auroc(scores: Floats, label: NDArray[np.bool_]) -> float:
    n = int(label.sum())
    return float((rankdata(scores)[label].sum() - n * (n + 1) / 2) / (n * (len(label) - n)))
