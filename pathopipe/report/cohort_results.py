"""What models say in an output folder: figures of ``mil`` and ``metadata``, predicted fields, doubtful records."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pathopipe.files import listing
from pathopipe.report.cohort_collect import Prediction
from pathopipe.report.cohort_words import hide_places

__all__ = ["Doubt", "FigureTable", "Results", "find_results"]

_DEPTH: Final = 4
_PASSED_OVER: Final = {"slides", "thumbnails", "geojson", "done", "plots"}
_MOST_BYTES: Final = 64 * 2**20
_SHOWN_DOUBTS: Final = 50
_TITLES: Final = {
    "auroc": "AUROC",
    "auroc_within_sites": "AUROC within sites",
    "auprc": "AUPRC",
    "balanced_accuracy": "balanced accuracy",
    "ece": "calibration error",
    "c_index": "C-index",
    "spearman": "Spearman",
    "mae": "mean absolute error",
    "kappa_quadratic": "quadratic kappa",
    "given_right": "right where it gives a value",
}


@dataclass(frozen=True, slots=True)
class FigureTable:
    """The main figures of one training or evaluation, a row a model and target."""

    title: str
    where: str
    """The file, relative to the output folder."""
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """Target, model, figures with their intervals, patients."""
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Doubt:
    """A record of the catalogue that its prediction contradicts."""

    slide_id: str
    task: str
    recorded: str
    predicted: str
    surety: str


@dataclass(slots=True)
class Results:
    """All that was found."""

    tables: list[FigureTable]
    fields: dict[str, list[Prediction]]
    """Predicted fields by slide id."""
    doubts: list[Doubt]
    """The surest to be wrong first."""
    doubts_where: str = ""
    n_doubts: int = 0
    unread: tuple[str, ...] = ()
    """Files that could not be read, relative to the output folder."""


def find_results(folder: Path) -> Results:
    """Look for results of ``mil`` and ``metadata`` in an output folder and the folders in it.

    A file that is damaged, or of another program, is passed over; its name is kept.
    """
    results = Results(tables=[], fields={}, doubts=[])
    unread = []
    for path in _candidates(folder):
        where = path.relative_to(folder).as_posix()
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise ValueError("too large")
            _READERS[path.name](folder, path, where, results)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error):
            unread.append(where)
    results.unread = tuple(unread)
    return results


def _candidates(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    folders, files = listing(folder)
    yield from (folder / name for name in files if name in _READERS)
    for name in folders if depth else ():
        if name not in _PASSED_OVER and not name.startswith(".") and not name.endswith(".zarr"):
            yield from _candidates(folder / name, depth - 1)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _csv(path: Path) -> list[dict[str, str]]:
    text = io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")
    return [{name: cell or "" for name, cell in row.items() if name} for row in csv.DictReader(text)]


def _training(folder: Path, path: Path, where: str, results: Results) -> None:
    """``mil train``: results.json."""
    for target in _json(path):
        records = [
            {**record, "target": target["target"], "model": model}
            for model, table in target["models"].items()
            for record in table["figures"]
        ]
        _add(results, folder, f"mil train: {target['target']}", where, records, target.get("says", ()))


def _evaluation(folder: Path, path: Path, where: str, results: Results) -> None:
    """``mil evaluate``: figures.json."""
    document = _json(path)
    notes = list(dict.fromkeys(note for notes in document.get("notes", {}).values() for note in notes))
    _add(results, folder, "mil evaluate", where, document["figures"], notes)


def _metadata(folder: Path, path: Path, where: str, results: Results) -> None:
    """``metadata train``: evaluation.json."""
    document = _json(path)
    records = [
        {**record, "target": record["task"], "model": f"{record['model']}, {record['shown']}"}
        for record in document["figures"]
    ]
    _add(results, folder, "metadata train", where, records, document.get("notes", ()))


def _predictions(folder: Path, path: Path, where: str, results: Results) -> None:
    """``metadata predict``: predictions.csv; tables of that name with other columns are of ``mil``."""
    for row in _csv(path):
        if not {"slide_id", "task", "value"} <= row.keys():
            return
        probability = float(row["probability"]) if row.get("probability") else None
        note = "the model abstains" if row.get("abstained") == "true" else ""
        shown = Prediction("metadata", row["task"], row["value"].removeprefix("'"), probability, note)
        results.fields.setdefault(row["slide_id"], []).append(shown)


def _review(folder: Path, path: Path, where: str, results: Results) -> None:
    """``metadata review``: review.csv."""
    rows = _csv(path)
    if rows and not {"slide_id", "task", "recorded", "predicted", "surety"} <= rows[0].keys():
        return
    results.doubts_where = where
    results.n_doubts = len(rows)
    results.doubts = [
        Doubt(
            row["slide_id"],
            row["task"],
            row["recorded"].removeprefix("'") or "none",
            row["predicted"].removeprefix("'") or "none",
            f"{float(row['surety']):.3f}",
        )
        for row in rows[:_SHOWN_DOUBTS]
    ]


_Reader = Callable[[Path, Path, str, Results], None]
_READERS: Final[Mapping[str, _Reader]] = {
    "results.json": _training,
    "figures.json": _evaluation,
    "evaluation.json": _metadata,
    "predictions.csv": _predictions,
    "review.csv": _review,
}


def _add(
    results: Results,
    folder: Path,
    title: str,
    where: str,
    records: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
) -> None:
    """Lay the main figures out as a table; those of single classes and sites stay in their files."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    patients: dict[tuple[str, str], str] = {}
    for record in records:
        if record.get("label") or record.get("site"):
            continue
        place = str(record["target"]), str(record["model"])
        row = cells.setdefault(place, {})
        if record["figure"] in _TITLES:
            row[str(record["figure"])] = _value(record)
        if record.get("patients") is not None:
            patients.setdefault(place, str(record["patients"]))
    columns = [name for name in _TITLES if any(name in row for row in cells.values())]
    header = ("target", "model", *(_TITLES[name] for name in columns), "patients")
    rows = tuple(
        (*place, *(row.get(name, "") for name in columns), patients.get(place, "")) for place, row in cells.items()
    )
    cleaned = tuple(hide_places(str(note), folder=folder) for note in notes)
    results.tables.append(FigureTable(title, where, header, rows, cleaned))


def _value(record: Mapping[str, Any]) -> str:
    if record.get("value") is None:
        return "not computed"
    text = f"{float(record['value']):.3f}"
    if record.get("low") is not None and record.get("high") is not None:
        text += f" ({float(record['low']):.3f} to {float(record['high']):.3f})"
    return text
