"""Goes through a folder and gathers what looks private: every file, every store, every picture."""

import csv
import datetime
import functools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pathopipe.errors import UsageError
from pathopipe.privacy.contents import Fact, Picture, Piece, Text, is_picture, looks_like_label, read_pieces, strings
from pathopipe.privacy.patterns import find_private, mask, mask_private
from pathopipe.privacy.pictures import look_into
from pathopipe.store.contents import array_blocks, describe_array

__all__ = ["Finding", "Search", "search"]

_EXAMPLES = 3
_EXCERPT = 60
_IDS = 1 << 20
_FEATURE_FILES = {".h5", ".pt", ".geojson", ".gz", ".parquet", ".h5ad"}
_IDENTIFIERS = ("barcode", "accession", "date")
_ARRAY_METADATA = ("zarr.json", ".zarray")
_DATE_FORMATS = ("%Y-%m-%d", "%Y/%m/%d", "%Y:%m:%d", "%m/%d/%Y", "%d/%m/%Y", "%d.%m.%Y", "%Y%m%d")


@dataclass(slots=True)
class Finding:
    """What looks private in one file, all of one kind together."""

    file: str
    """Path below the folder that was searched; what looks private in it is masked."""
    kind: str
    """One of :data:`~pathopipe.privacy.patterns.KINDS`."""
    severity: str
    """``private``, or ``note``: the id that the user gave a slide, or the day on which the file was written."""
    excerpts: list[str] = field(default_factory=list)
    """The first few, masked: their form, not their value."""
    places: list[str] = field(default_factory=list)
    """Where in the file; the first few."""
    count: int = 0


@dataclass(frozen=True, slots=True)
class Search:
    """All that was looked through, and what was found."""

    findings: list[Finding]
    files: int
    size_bytes: int
    seconds: float

    @property
    def is_clean(self) -> bool:
        """Whether nothing but notes was found, and everything could be looked into."""
        return all(finding.severity == "note" for finding in self.findings)


def search(where: Path) -> Search:
    """Look through a folder, a store or a file for what should not leave the house.

    Links to other folders are not followed.

    Raises:
        UsageError: There is nothing.
    """
    if not where.exists():
        raise UsageError(f"{where}: no such file or folder; give the folder that is to be looked through")
    begun = time.perf_counter()
    root = where if where.is_dir() else where.parent
    gathered = _Gathered(root, _slide_ids(where))
    files = size_bytes = 0
    for path, arrays_above in _walk(where):
        files += 1
        size_bytes += 0 if path.is_symlink() else path.stat().st_size
        gathered.look_at(path, is_chunk=arrays_above)
    return Search(gathered.findings(), files, size_bytes, time.perf_counter() - begun)


def _walk(where: Path) -> Iterator[tuple[Path, bool]]:
    """Every file, and whether it is a chunk of an array, which only has a meaning through its array."""
    if not where.is_dir():
        yield where, False
        return
    arrays: set[Path] = set()
    for folder, folders, names in os.walk(where):
        folders.sort()
        here = Path(folder)
        if here.parent in arrays or (here != where and any(name in names for name in _ARRAY_METADATA)):
            is_array = here.parent in arrays or _is_array(here)
            if is_array:
                arrays.add(here)
        for name in sorted(names):
            yield here / name, here in arrays and _is_chunk_name(name)
        # A link to a folder is not gone into, but its name and its target are looked at.
        yield from ((here / name, False) for name in folders if (here / name).is_symlink())


def _is_array(folder: Path) -> bool:
    if (folder / ".zarray").exists():
        return True
    try:
        return bool(json.loads((folder / "zarr.json").read_bytes()).get("node_type") == "array")
    except (OSError, ValueError, AttributeError):
        return False


def _is_chunk_name(name: str) -> bool:
    return name == "c" or name.replace(".", "").isdigit()


def _slide_ids(where: Path) -> list[str]:
    """The ids that the user gave the slides: names of stores, of the summary's rows, else of feature files."""
    if where.suffix == ".zarr" or not where.is_dir():
        return [where.name.partition(".")[0] if where.suffix != ".zarr" else where.stem]
    ids = [path.stem for path in (where / "slides").glob("*.zarr")]
    try:
        with (where / "summary.csv").open(encoding="utf-8", errors="replace", newline="") as file:
            ids += [row["slide_id"] for row in csv.DictReader(file) if row.get("slide_id")]
    except (OSError, csv.Error):
        pass
    if not ids:
        for path in where.rglob("*"):
            if path.suffix in _FEATURE_FILES and len(ids) < _IDS:
                ids.append(path.name.partition(".")[0])
    return sorted(set(ids))


class _Gathered:
    """What was found so far: at most one finding for each file, kind and severity."""

    def __init__(self, root: Path, slide_ids: list[str]) -> None:
        self._root = root
        self._slide_ids = frozenset(slide_ids)
        # Of each id that looks like a case number or a date: the part that does.
        raw = "\n".join(slide_ids).encode("utf-8", "surrogateescape")
        self._chosen = b"\n".join({raw[m.start : m.end] for m in find_private(raw) if m.kind in _IDENTIFIERS})
        self._found: dict[tuple[str, str, str], Finding] = {}

    def findings(self) -> list[Finding]:
        """Private ones first, then by file."""
        return sorted(self._found.values(), key=lambda f: (f.severity != "private", f.file, f.kind))

    def look_at(self, path: Path, *, is_chunk: bool) -> None:
        """Look at the name of a file and into it."""
        relative = path.relative_to(self._root).as_posix()
        shown = self._show(relative)
        written = datetime.date.today()
        try:
            written = datetime.date.fromtimestamp(path.lstat().st_mtime)
            if not is_chunk:  # chunks have no names of their own
                name = path.name if path.name not in _ARRAY_METADATA else path.parent.name
                self._look_at_text(shown, Text("its name", name.encode("utf-8", "surrogateescape")), written)
                self._look_at_name(path, shown)
            if path.is_symlink():
                target = str(path.readlink()).encode("utf-8", "surrogateescape")
                self._look_at_text(shown, Text("the target of the link", target), written)
            if path.is_file() and not is_chunk:
                for piece in self._pieces(path):
                    self._look_at_piece(shown, piece, written)
        except Exception as error:  # a broken file fails in whatever way its reader has
            self._add(shown, Fact("", "unread", ""), "private", type(error).__name__)

    def _look_at_name(self, path: Path, shown: str) -> None:
        picture = path.suffix.lower() in (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp")
        stem = path.name.partition(".")[0]
        if picture and not self._is_of_slide(path.name) and looks_like_label(stem):
            self._add(shown, Fact("its name", "label image", ""), "private", "a picture of that name")

    def _pieces(self, path: Path) -> Iterator[Piece]:
        if path.name in _ARRAY_METADATA:
            yield from _array_pieces(path)
        yield from read_pieces(path)

    def _look_at_piece(self, shown: str, piece: Piece, written: datetime.date) -> None:
        if isinstance(piece, Text):
            self._look_at_text(shown, piece, written)
        elif isinstance(piece, Fact):
            self._add(shown, piece, "private", piece.what)
        else:
            for part in look_into(piece):
                self._look_at_piece(shown, part, written)

    def _look_at_text(self, shown: str, text: Text, written: datetime.date) -> None:
        seen: dict[tuple[str, bytes], int] = {}
        for match in find_private(text.lines, in_binary=text.unit == "run"):
            seen.setdefault((match.kind, text.lines[match.start : match.end]), match.start)
        for (kind, value), start in seen.items():
            is_note = kind in _IDENTIFIERS and (value in self._chosen or (kind == "date" and _is_day(value, written)))
            place = _place(text, value, start)
            count = (text.lines if text.whole is None else text.whole).count(value)
            self._add(shown, Fact(place, kind, ""), "note" if is_note else "private", mask(kind, value), max(1, count))

    def _add(self, shown: str, fact: Fact, severity: str, excerpt: str, count: int = 1) -> None:
        key = (shown, fact.kind, severity)
        if key not in self._found:
            self._found[key] = Finding(shown, fact.kind, severity)
        finding = self._found[key]
        finding.count += count
        shortened = excerpt if len(excerpt) <= _EXCERPT else f"{excerpt[:_EXCERPT]}..."
        for known, new in ((finding.excerpts, shortened), (finding.places, self._show(fact.place))):
            if len(known) < _EXAMPLES and new and new not in known:
                known.append(new)

    @functools.lru_cache(maxsize=1024)  # noqa: B019 (it lives as long as one search)
    def _show(self, name: str) -> str:
        """A name with what looks private masked, but for the ids of slides: whoever reads this gave them."""
        return "/".join(part if self._is_of_slide(part) else mask_private(part) for part in name.split("/"))

    def _is_of_slide(self, name: str) -> bool:
        """Whether a file or folder is called like a slide, but for its endings."""
        ends = [place for place, letter in enumerate(name) if letter == "."]
        return any(name[:end] in self._slide_ids for end in (*ends, len(name)))


def _array_pieces(metadata: Path) -> Iterator[Piece]:
    """Strings and pictures of a Zarr array."""
    if not _is_array(metadata.parent):
        return
    kind, shape = describe_array(metadata.parent)
    if kind in "OSUT":
        row = 1
        for block in array_blocks(metadata.parent):
            yield strings("the array", block.ravel().tolist(), row, "row")
            row += len(block) if block.shape else 1
        return
    if looks_like_label(metadata.parent.name, shape):
        yield Fact("the array", "label image", "an array of that name")
    if kind == "B" and is_picture(shape):
        yield Picture("the array", np.concatenate(list(array_blocks(metadata.parent))))


def _place(text: Text, value: bytes, start: int) -> str:
    whole, at = text.lines, start
    if text.whole is not None:
        whole, at = text.whole, max(0, text.whole.find(value))
    if text.place and whole.count(b"\n", 0, 1 << 20) == 0 and text.unit == "line":
        return text.place.strip()
    number = text.first + whole.count(b"\n", 0, at)
    return f"{text.place.strip()} {text.unit} {number}".strip()


def _is_day(value: bytes, day: datetime.date) -> bool:
    """Whether a date is the day on which its file was written, which says nothing of the slide."""
    text = value.decode("ascii", "replace")
    for form in _DATE_FORMATS:
        try:
            found = datetime.datetime.strptime(text[: 8 if form == "%Y%m%d" else None], form).date()
        except ValueError:
            continue
        if abs((found - day).days) <= 1:
            return True
    return False
