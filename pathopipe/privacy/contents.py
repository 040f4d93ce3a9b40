"""Opens files of every kind that pathopipe writes, and hands out what they hold piece by piece: text and pictures.

A file is known by what stands in it, not by its name. Nothing is run: of a ``.pt`` file the pickle is read as a list of
instructions. Memory is bounded by one piece, however large the file is.
"""

import base64
import codecs
import contextlib
import gzip
import pickletools
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

__all__ = [
    "Fact",
    "Picture",
    "Piece",
    "Text",
    "is_picture",
    "looks_like_label",
    "read_pieces",
    "readable_runs",
    "strings",
]

_BLOCK_BYTES = 4 << 20
_LINE_BYTES = 32 << 20
_ROWS = 65_536
_DEPTH = 3
_LEAST_RUN = 6
_OVERLAP_BYTES = 256
_PICTURE_BYTES = 256 << 20
_PICTURE_SIDE_PX = 32
_MAX_PIXELS = 64 << 20
_PRINTABLE = re.compile(rb"[\t\x20-\x7e]{%d,}" % _LEAST_RUN)
_JSON_STRING = re.compile(rb'"([^"\\]*(?:\\.[^"\\]*)*)"')
_JSON_OUTSIDE = b"0123456789.,:[]{}+-eE \r\n\ttrufalsnNI\x1e"
_CELLS = re.compile(rb"(?<=[,;\t\n])(?:-?\d{1,7}(?:\.\d+)?(?:e[+-]?\d+)?[,;\t])+")
_DATA_URI = re.compile(rb"data:image/[a-z+.-]+;base64,([A-Za-z0-9+/=]+)")
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"RIFF")
_LABEL_NAMES = re.compile(r"(?i)(?:^|[^a-z])(?:slide_?)?(?:label|macro|barcode)(?:_?image)?(?:$|[^a-z])")


@dataclass(frozen=True, slots=True)
class Text:
    """Some lines of text, or some strings, one a line."""

    place: str
    """Where in the file; empty for the file itself."""
    lines: bytes
    first: int = 1
    """Number of the first line (or row)."""
    unit: str = "line"
    whole: bytes | None = None
    """The same before repeated strings and bare numbers were left out, so that a line can be named; None: the same."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture: an encoded one, or its pixels."""

    place: str
    data: bytes | Path | NDArray[np.uint8] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that the build of a file gives away without any text."""

    place: str
    kind: str
    what: str


Piece = Text | Picture | Fact


def read_pieces(path: Path) -> Iterator[Piece]:
    """Everything that a file holds and a person could read, whatever its kind.

    Raises:
        OSError, ValueError: It can't be read, or is not what it begins like.
    """
    with path.open("rb") as file:
        head = file.read(8)
        file.seek(0)
        if head.startswith(_PICTURES):
            yield Picture("", path)
        elif head == b"\x89HDF\r\n\x1a\n":
            yield from _hdf5(path)
        elif head.startswith(b"PAR1"):
            yield from _parquet(path)
        else:
            yield from _stream(file, "", _DEPTH, path.suffixes)


def _stream(file: IO[bytes], place: str, depth: int, suffixes: list[str]) -> Iterator[Piece]:
    """What a file without a place on disk of its own holds: the member of an archive, or one that is packed."""
    head = file.read(8)
    file.seek(0)
    if head.startswith(b"\x1f\x8b") and depth:
        with gzip.open(file) as unpacked:
            yield from _stream(unpacked, place, depth - 1, suffixes[:-1])  # type: ignore[arg-type]
    elif head.startswith(b"PK\3\4") and depth:
        yield from _archive(file, place, depth)
    elif head.startswith(_PICTURES):
        yield Picture(place, file.read(_PICTURE_BYTES))
    elif head.startswith((b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5")):
        yield from _pickle(file, place)
    elif head.startswith(b"\x93NUMPY"):
        yield from _numpy(file, place)
    elif _is_safetensors(head):
        length = int.from_bytes(head, "little")
        file.seek(8)
        yield Text(place, file.read(length).replace(b",", b",\n"), unit="entry")
    elif b"\0" in (start := file.read(4096)) and not start.startswith((b"\xff\xfe", b"\xfe\xff")):
        file.seek(0)
        yield from _binary(file, place)
    else:
        file.seek(0)
        yield from _text(file, place, suffixes)


def _is_safetensors(head: bytes) -> bool:
    # The length of the header, then the header: a JSON object.
    return len(head) == 8 and 2 <= int.from_bytes(head, "little") < 100 << 20


# ---- text


def _text(file: IO[bytes], place: str, suffixes: list[str]) -> Iterator[Piece]:
    is_utf16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")  # as Excel writes it
    file.seek(0)
    reads = iter(lambda: file.read(_BLOCK_BYTES), b"")
    if is_utf16:
        decode = codecs.getincrementaldecoder("utf-16")("replace").decode
        reads = (decode(block).encode() for block in reads)
    is_json = bool({".json", ".geojson"} & set(suffixes[-2:]))
    is_table = bool({".csv", ".tsv"} & set(suffixes[-2:]))
    line = 1
    for block in _whole_lines(reads):
        text = block
        if b"data:image/" in text:
            for uri in _DATA_URI.finditer(text):
                number = line + text.count(b"\n", 0, uri.start())
                yield from _inline_picture(f"{place}line {number}", uri[1])
            text = _DATA_URI.sub(b"", text)
        if is_json:
            text = _json_strings(text)
        elif is_table:
            text = _CELLS.sub(b"", text)
        yield Text(place, text, line, whole=block)
        line += block.count(b"\n")


def _whole_lines(reads: Iterable[bytes]) -> Iterator[bytes]:
    """The same in pieces that end where a line ends; a line beyond all measure is cut at a gap."""
    rest = b""
    for block in reads:
        rest += block
        cut = rest.rfind(b"\n") + 1
        if not cut and len(rest) > _LINE_BYTES:
            cut = max(rest.rfind(gap) for gap in (b" ", b",", b"<", b'"')) or len(rest)
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _json_strings(text: bytes) -> bytes:
    """The strings of a JSON text, each once: numbers are no one's, and a million objects use the same few names."""
    # Splitting at quotes is ten times as fast as a pattern, and right where no quote is escaped.
    parts = _JSON_STRING.split(text) if b'\\"' in text else text.split(b'"')
    if b"".join(set(parts[::2])).translate(None, _JSON_OUTSIDE):
        return text  # not JSON, or cut within a string
    return b"\n".join(dict.fromkeys(parts[1::2]))


def _inline_picture(place: str, encoded: bytes) -> Iterator[Piece]:
    with contextlib.suppress(ValueError):
        data = base64.b64decode(encoded + b"=" * (-len(encoded) % 4))
        if data.startswith(_PICTURES):
            yield Picture(place, data)
        else:
            yield Text(place, data)


def _binary(file: IO[bytes], place: str) -> Iterator[Text]:
    """The readable runs of a file of unknown kind."""
    kept = b""
    while block := file.read(_BLOCK_BYTES):
        yield readable_runs(place, kept + block)
        kept = block[-_OVERLAP_BYTES:]


def readable_runs(place: str, data: bytes) -> Text:
    """What is readable of binary data."""
    return Text(place, b"\n".join(_PRINTABLE.findall(data)), unit="run")


# ---- Python's files


def _archive(file: IO[bytes], place: str, depth: int) -> Iterator[Piece]:
    with zipfile.ZipFile(file) as archive:
        members = [entry for entry in archive.infolist() if not entry.is_dir()]
        yield Text(f"{place}names", "\n".join(entry.filename for entry in members).encode(), unit="member")
        # A .pt file: its tensors lie beside the pickle as plain numbers.
        tensors = any(entry.filename.endswith("/data.pkl") for entry in members)
        for entry in members:
            if tensors and "/data/" in entry.filename:
                continue
            with archive.open(entry) as member:
                yield from _stream(member, f"{place}{entry.filename} ", depth - 1, Path(entry.filename).suffixes)


def _pickle(file: IO[bytes], place: str) -> Iterator[Text]:
    """The strings of one pickle after another, and what is readable behind them: old .pt files end in raw tensors."""
    found: list[str] = []
    size = begun = 0
    with contextlib.suppress(ValueError):
        while True:
            begun = file.tell()
            for _, argument, _ in pickletools.genops(file):
                if isinstance(argument, str | bytes):
                    text = argument if isinstance(argument, str) else argument.decode("utf-8", "replace")
                    found.append(text)
                    size += len(text)
                if size > _BLOCK_BYTES:
                    yield strings(place, found)
                    found, size = [], 0
    yield strings(place, found)
    file.seek(begun)
    yield from _binary(file, place)


def strings(place: str, values: Iterable[Any], first: int = 1, unit: str = "string") -> Text:
    """Strings as a text with one a line; ``first`` is the number of the first."""
    # Some of them hold line breaks, and the number of the line is to be the number of the string.
    joined = "\n".join(" ".join(str(string).split("\n")) for string in values)
    return Text(place, joined.encode("utf-8", "surrogateescape"), first, unit)


def _numpy(file: IO[bytes], place: str) -> Iterator[Piece]:
    version = np.lib.format.read_magic(file)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = reader(file)
    if dtype.hasobject:
        yield from _pickle(file, place)
    elif dtype.kind in "US":
        step = max(1, _BLOCK_BYTES // max(1, dtype.itemsize))
        row = 1
        while data := file.read(step * dtype.itemsize):
            yield strings(place, _decoded(np.frombuffer(data, dtype)), row, "row")
            row += step
    elif dtype == np.uint8 and is_picture(shape):
        yield Picture(place, np.frombuffer(file.read(int(np.prod(shape))), np.uint8).reshape(shape))


def _decoded(array: NDArray[Any]) -> list[str]:
    return [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in array.ravel().tolist()]


def is_picture(shape: tuple[int, ...]) -> bool:
    """Whether an array of bytes of this shape can be a colour picture, of a size that can be looked at."""
    return (
        len(shape) == 3
        and shape[2] in (3, 4)
        and min(shape[:2]) >= _PICTURE_SIDE_PX
        and shape[0] * shape[1] <= _MAX_PIXELS
    )


def looks_like_label(name: str, shape: tuple[int, ...] | None = None) -> bool:
    """Whether a picture, or an array of some shape, bears the name of a label or macro image.

    An array has to have colours: a mask, in which every object is labelled, is often called so, too.
    """
    if shape is not None and (
        len(shape) != 3 or not {3, 4} & {shape[0], shape[2]} or sorted(shape)[1] < _PICTURE_SIDE_PX
    ):
        return False
    return bool(_LABEL_NAMES.search(name))


# ---- tables and hierarchies


def _hdf5(path: Path) -> Iterator[Piece]:
    with h5py.File(path, "r") as file:
        names: list[str] = []
        file.visit(names.append)
        yield strings("names", names, unit="name")
        yield from _hdf5_attributes(file, "/")
        for name in names:
            item = file.get(name)
            if item is None:
                continue  # a link into another file
            yield from _hdf5_attributes(item, name)
            if isinstance(item, h5py.Dataset):
                yield from _hdf5_dataset(item, name)


def _hdf5_attributes(item: Any, name: str) -> Iterator[Text]:
    found = []
    for key, value in item.attrs.items():
        found.append(key)
        if isinstance(value, bytes | str):
            found.append(value.decode("utf-8", "replace") if isinstance(value, bytes) else value)
        elif isinstance(value, np.ndarray) and value.dtype.kind in "OSU":
            found += _decoded(value)
    if found:
        yield strings(f"attributes of {name}", found, unit="string")


def _hdf5_dataset(item: Any, name: str) -> Iterator[Piece]:
    dtype, shape = item.dtype, item.shape or ()
    if dtype.names:
        yield strings(f"columns of {name}", dtype.names, unit="column")
        for column in dtype.names:
            if dtype[column].kind in "OSU":
                for start in range(0, shape[0] if shape else 0, _ROWS):
                    rows = item[start : start + _ROWS][column]
                    yield strings(f"{name}.{column}", _decoded(np.asarray(rows)), start + 1, "row")
    elif dtype.kind in "OSU":
        if not shape:
            yield strings(name, _decoded(np.asarray(item[()])), unit="row")
        for start in range(0, shape[0] if shape else 0, _ROWS):
            yield strings(name, _decoded(np.asarray(item[start : start + _ROWS])), start + 1, "row")
    else:
        if looks_like_label(name.rpartition("/")[2], shape):
            yield Fact(name, "label image", "an array of that name")
        if dtype == np.uint8 and is_picture(shape):
            yield Picture(name, np.asarray(item[()]))


def _parquet(path: Path) -> Iterator[Piece]:
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        yield strings("columns", schema.names, unit="column")
        for key, value in {**(file.metadata.metadata or {}), **(schema.metadata or {})}.items():
            if key != b"ARROW:schema":  # the schema once more, in binary
                yield Text(f"metadata {key.decode('utf-8', 'replace')}", _json_strings(value))
        for column in schema:
            if pa.types.is_temporal(column.type):
                yield Fact(f"column {column.name}", "date", f"its type is {column.type}")
        texts = [column.name for column in schema if _holds_text(column.type)]
        row = 1
        for batch in file.iter_batches(batch_size=_ROWS, columns=texts) if texts else ():
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                values = column.to_pylist()
                yield strings(f"column {name}", ("" if value is None else value for value in values), row, "row")
            row += batch.num_rows


def _holds_text(kind: Any) -> bool:
    types = pa.types
    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind):
        return _holds_text(kind.value_type)
    if types.is_struct(kind):
        return any(_holds_text(kind.field(number).type) for number in range(kind.num_fields))
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
