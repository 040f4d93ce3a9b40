"""The summary table of an output folder: one row a slide, kept over several runs."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from pathopipe.files import durable_file

__all__ = ["SUMMARY_COLUMNS", "escape_cell", "update_summary"]

SUMMARY_COLUMNS = ("slide_id", "status", "reason", "tissue_mm2", "tiles", "bad_tiles", "mpp", "flags", "seconds")


def escape_cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: one that begins like a formula gets a quote in front."""
    return f"'{text}" if text[:1] in {"=", "+", "-", "@", "\t", "\r"} else text


def update_summary(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows into a CSV; slides of earlier runs that are not among them keep theirs."""
    merged: dict[str, dict[str, str]] = {}
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            for old in csv.DictReader(file):
                merged[old.get("slide_id", "")] = {name: old.get(name) or "" for name in SUMMARY_COLUMNS}
    for row in rows:
        cells = {name: escape_cell(str(row[name])) for name in SUMMARY_COLUMNS}
        merged[cells["slide_id"]] = cells
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, SUMMARY_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(merged.values())
    with durable_file(path) as file:
        file.write(text.getvalue().encode())
