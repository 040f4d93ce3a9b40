"""Reading tables as spreadsheets write them: text encodings, delimiters, quotes, and faults named with their row."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from pathopipe.errors import UsageError
from pathopipe.registry import nearest

__all__ = ["TextTable", "quote", "read_table", "refuse"]

_DELIMITERS: Final = (",", ";", "\t")
_SHOWN_PROBLEMS: Final = 10


@dataclass(frozen=True, slots=True)
class TextTable:
    """The cells of a table as text."""

    header: list[str]
    delimiter: str
    rows: list[tuple[int, list[str]]]
    """The rows that are not blank with their numbers, counted as a spreadsheet does: the header is row 1."""

    def full_rows(self, problems: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
        """Rows as column to cell; those with too many or too few cells are named in ``problems`` and left out."""
        for number, cells in self.rows:
            if len(cells) != len(self.header):
                fault = "too many" if len(cells) > len(self.header) else "too few"
                problems.append(
                    f"row {number}: {len(cells)} cells under {len(self.header)} columns, {fault}; "
                    "quote cells that hold the delimiter, and fill up short rows"
                )
                continue
            yield number, dict(zip(self.header, cells, strict=True))


def read_table(path: Path, *, needed: Sequence[str], kind: str) -> TextTable:
    """Read a CSV table: UTF-8 (with or without byte-order mark) or UTF-16 with its mark; commas, semicolons or tabs.

    Args:
        path: The file.
        needed: Columns that must be there.
        kind: What the table is, for messages: ``manifest`` for example.

    Raises:
        UsageError: The file can't be read or is no CSV table, or its header lacks a column or names one twice.
    """
    text = _read_text(path, kind)
    first_line = next((line for line in re.split(r"\r\n|\r|\n", text) if line.strip()), None)
    if first_line is None:
        raise UsageError(
            f"{path.name}: the file is empty; write a header with {' and '.join(needed)}, and one row a slide"
        )
    delimiter = _find_delimiter(first_line, needed)
    rows = []
    number = 0
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
        for number, cells in enumerate(reader, 1):
            if any(cell.strip() for cell in cells):
                rows.append((number, cells))
    except csv.Error as error:
        raise UsageError(f"{path.name} row {number + 1}: not CSV ({error}); check the quotes of this row") from None
    _, names = rows.pop(0)
    header = _check_header(names, path, needed)
    for _, cells in rows:
        # Spreadsheets write empty cells beyond the last column.
        while len(cells) > len(header) and not cells[-1].strip():
            cells.pop()
    return TextTable(header, delimiter, rows)


def _find_delimiter(first_line: str, needed: Sequence[str]) -> str:
    """The delimiter that finds most of the needed columns, then most columns."""

    def rank(delimiter: str) -> tuple[int, int]:
        names = [name.strip().strip('"').strip() for name in first_line.split(delimiter)]
        return sum(name in names for name in needed), len(names)

    return max(_DELIMITERS, key=rank)


def _check_header(names: list[str], path: Path, needed: Sequence[str]) -> list[str]:
    header = [name.strip() for name in names]
    while header and not header[-1]:
        header.pop()
    found = ", ".join(name for name in header if name)
    problems = []
    for name in needed:
        if name not in header:
            other_case = [other for other in header if other.casefold() == name]
            hint = f"did you mean '{other_case[0]}'?" if other_case else nearest(name, filter(None, header))
            mend = f"{hint} rename it" if hint.startswith("did") else "add it, or rename the one that holds it"
            problems.append(f"no column '{name}' (found: {found}); {mend}")
    for name in dict.fromkeys(filter(None, header)):
        if header.count(name) > 1:
            problems.append(f"column '{name}' stands there twice; rename or remove one")
        if name != "mpp" and name.casefold() == "mpp":
            problems.append(f"column '{name}' would pass unseen; write 'mpp'")
    problems += [
        f"column {number} has no name; give it one or remove it" for number, name in enumerate(header, 1) if not name
    ]
    if problems:
        refuse(path.name, problems)
    return header


def _read_text(path: Path, kind: str) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
            encoding = _find_encoding(head)
            if encoding is None:
                raise UsageError(
                    f"{path.name}: not a text file; a {kind} is a CSV table, which spreadsheets save as 'CSV UTF-8'"
                )
            data = head + file.read()
    except OSError as error:
        raise UsageError(f"{path}: the {kind} can't be read ({error.strerror or error}); check the path") from None
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8-sig":
            raise UsageError(f"{path.name}: damaged {encoding.upper()} text; save the table as 'CSV UTF-8'") from None
        # Which of the many 8-bit code pages it is can't be known, and a wrong guess makes wrong ids.
        raise UsageError(f"{path.name} {_describe_not_utf8(data, error.start)}") from None


def _describe_not_utf8(data: bytes, first: int) -> str:
    """Which lines of a table are not UTF-8, how the first of them may read, and what to do."""
    line_number = data.count(b"\n", 0, first) + 1
    lines = data.split(b"\n")
    odd = [number for number, line in enumerate(lines, 1) if not _is_utf8(line)]
    others = sum(1 for number in set(range(1, len(lines) + 1)).difference(odd) if not lines[number - 1].isascii())
    reads = quote(lines[line_number - 1].decode("latin-1").strip())
    what = f"line {line_number}: byte 0x{data[first]:02x} is not UTF-8 (as Latin-1 the line reads {reads})"
    if not others:
        return f"{what}; save the table as 'CSV UTF-8'"
    return (
        f"{what}; {len(odd)} such lines stand among {others} with letters in UTF-8, so tables of two encodings were "
        "put together: save each as 'CSV UTF-8', then join them"
    )


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _find_encoding(head: bytes) -> str | None:
    """The encoding by its byte-order mark, else UTF-8; None for what is no text."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    # Null bytes are in nearly every file that is no text; PK begins a zip, which a spreadsheet's own file is.
    return None if b"\0" in head or head.startswith(b"PK\x03\x04") else "utf-8-sig"


def quote(text: str, *, at_most: int = 80) -> str:
    """The text in quotes, what is invisible escaped, longer ones cut at the end."""
    return repr(text if len(text) <= at_most else f"{text[: at_most - 3]}...")


def refuse(where: str, problems: list[str]) -> NoReturn:
    """Raise one UsageError that lists all problems, each with its row or file."""
    if len(problems) == 1:
        raise UsageError(f"{where}{' ' if problems[0].startswith('row') else ': '}{problems[0]}")
    shown = problems[:_SHOWN_PROBLEMS]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    raise UsageError(f"{where}: {len(problems)} problems\n" + "\n".join(f"  {problem}" for problem in shown))
