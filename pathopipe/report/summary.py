"""The summary table of an output folder: one row a slide, kept over several runs."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from pathopipe.files import durable_file

__all__ = ["SUMMARY_COLUMNS", "escape_cell", "read_failures", "update_summary"]

SUMMARY_COLUMNS = ("slide_id", "status", "reason", "tissue_mm2", "tiles", "bad_tiles", "mpp", "flags", "seconds")


def read_failures(path: Path) -> dict[str, str]:
    """The reason of each slide whose last run failed; nothing where there is no summary."""
    return {row["slide_id"]: row["reason"] for row in _read_rows(path) if row["status"] == "failed"}


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        # A spreadsheet may have put a byte-order mark in front, or saved in an encoding of its own.
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (FileNotFoundError, csv.Error):
        return []
    return [{name: row.get(name) or "" for name in SUMMARY_COLUMNS} for row in rows if row.get("slide_id")]


def escape_cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: one that begins like a formula gets a quote in front."""
    return f"'{text}" if text[:1] in {"=", "+", "-", "@", "\t", "\r"} else text


def update_summary(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows into a CSV; slides of earlier runs that are not among them keep theirs."""
    merged = {old["slide_id"]: old for old in _read_rows(path)}
    for row in rows:
        cells = {name: escape_cell(str(row[name])) for name in SUMMARY_COLUMNS}
        merged[cells["slide_id"]] = cells
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, SUMMARY_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(merged.values())
    with durable_file(path) as file:
        file.write(text.getvalue().encode())
