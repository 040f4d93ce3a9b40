"""DICOM headers, as far as needed to group files into series and to see false colours. Reads no names or dates."""

import mmap
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pathopipe.slide.jpeg import parse_header, shows_false_colours

__all__ = ["DicomHeader", "false_colours", "read_header", "series_files"]

_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_IMPLICIT_VR = "1.2.840.10008.1.2"
_BIG_ENDIAN = "1.2.840.10008.1.2.2"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_LONG_VRS = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_TRANSFER_SYNTAX, _SOP_CLASS, _IMAGE_TYPE, _SERIES, _PHOTOMETRIC = (
    0x00020010,
    0x00080016,
    0x00080008,
    0x0020000E,
    0x00280004,
)
_WANTED = (_TRANSFER_SYNTAX, _SOP_CLASS, _IMAGE_TYPE, _SERIES, _PHOTOMETRIC)
_MAX_ELEMENTS = 100_000
_MAX_VALUE_BYTES = 4096
_PIXEL_DATA = b"\xe0\x7f\x10\x00OB\x00\x00\xff\xff\xff\xff"


class DicomHeader(NamedTuple):
    """What is read of a DICOM file; empty where it is not stated."""

    series: str
    sop_class: str
    image_type: tuple[str, ...]
    photometric: str

    @property
    def is_scan(self) -> bool:
        """Whether it holds the scan itself: a whole-slide image that is no label, overview or thumbnail."""
        side = ("LABEL", "OVERVIEW", "THUMBNAIL", "LOCALIZER")
        return self.sop_class == _WHOLE_SLIDE and not any(word in side for word in self.image_type)


def read_header(path: Path) -> DicomHeader | None:
    """Read a file's header; None where it is not DICOM, or is damaged or encoded past reading."""
    try:
        with path.open("rb") as file:
            if file.read(132)[128:] != b"DICM":
                return None
            values = _walk(file)
    except (OSError, ValueError, RecursionError):
        return None
    return DicomHeader(
        series=values.get(_SERIES, ""),
        sop_class=values.get(_SOP_CLASS, ""),
        image_type=tuple(values.get(_IMAGE_TYPE, "").split("\\")),
        photometric=values.get(_PHOTOMETRIC, ""),
    )


def series_files(path: Path) -> list[Path]:
    """List the files beside ``path`` that hold scans of its series, itself among them, by name."""
    header = read_header(path)
    if header is None or not header.series:
        return [path]
    files = [path]
    for other in sorted(path.parent.iterdir()):
        if other == path or not other.is_file():
            continue
        found = read_header(other)
        if found is not None and found.series == header.series and found.is_scan:
            files.append(other)
    return sorted(files)


def false_colours(path: Path) -> str | None:
    """Say so if the colour space that a DICOM file declares is certainly not that of its JPEG frames, else None."""
    header = read_header(path)
    if header is None:
        return None
    try:
        frame = parse_header(_first_frame(path))
    except (OSError, ValueError):
        return None
    if not shows_false_colours(frame, header.photometric):
        return None
    inside = "YCbCr" if header.photometric == "RGB" else "RGB"
    return f"false colours: the DICOM file declares {header.photometric} over {inside} JPEG frames"


def _first_frame(path: Path) -> bytes:
    """Return the head of the first encapsulated frame, at most 64 KiB."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(_PIXEL_DATA)
        if at < 0:
            raise ValueError("no encapsulated pixel data")
        at += len(_PIXEL_DATA)
        # The first item is the table of frame offsets, possibly empty; the frames follow.
        at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        return data[at + 8 : at + 8 + 65536]


def _walk(file: BinaryIO) -> dict[int, str]:
    """Collect the wanted top-level values; stops behind the last of them."""
    values: dict[int, str] = {}
    explicit = True
    for _ in range(_MAX_ELEMENTS):
        at = file.tell()
        tag, vr, length = _element(file, explicit or not values.get(_TRANSFER_SYNTAX))
        if tag is None or tag > _PHOTOMETRIC:
            break
        if tag >> 16 > 2 and explicit and values.get(_TRANSFER_SYNTAX) == _IMPLICIT_VR:
            explicit = False
            file.seek(at)
            continue
        if tag >> 16 > 2 and values.get(_TRANSFER_SYNTAX) in (_BIG_ENDIAN, _DEFLATED):
            raise ValueError("encoding not read")
        if length == _UNDEFINED:
            _skip_sequence(file, explicit)
        elif tag in _WANTED and vr != b"SQ" and length <= _MAX_VALUE_BYTES:
            values[tag] = file.read(length).decode("ascii", "replace").strip(" \0")
        else:
            file.seek(length, 1)
    return values


def _element(file: BinaryIO, explicit: bool) -> tuple[int | None, bytes, int]:
    head = file.read(8)
    if len(head) < 8:
        return None, b"", 0
    tag = int.from_bytes(head[:2], "little") << 16 | int.from_bytes(head[2:4], "little")
    vr = head[4:6]
    if not explicit or tag >> 16 == 0xFFFE:
        return tag, b"", int.from_bytes(head[4:8], "little")
    if vr in _LONG_VRS:
        return tag, vr, int.from_bytes(file.read(4), "little")
    return tag, vr, int.from_bytes(head[6:8], "little")


def _skip_sequence(file: BinaryIO, explicit: bool) -> None:
    """Step over items until the sequence's end."""
    for _ in range(_MAX_ELEMENTS):
        tag, _vr, length = _element(file, explicit)
        if tag is None or tag == _SEQUENCE_END:
            return
        if tag != _ITEM:
            raise ValueError("no item in a sequence")
        if length != _UNDEFINED:
            file.seek(length, 1)
            continue
        for _ in range(_MAX_ELEMENTS):
            inner, _vr, inner_length = _element(file, explicit)
            if inner is None or inner == _ITEM_END:
                break
            if inner_length == _UNDEFINED:
                _skip_sequence(file, explicit)
            else:
                file.seek(inner_length, 1)
