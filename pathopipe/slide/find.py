"""Find the slides of a folder."""

import os
import re
import unicodedata
from pathlib import Path

from pathopipe.errors import SlideOpenError
from pathopipe.records import SlideRef
from pathopipe.slide.dicom import DicomHeader, read_header

__all__ = ["find_slides", "only_series"]

_TIFF_SUFFIXES = (".btf", ".scn", ".svs", ".svslide", ".tf2", ".tf8", ".tif", ".tiff")
_OTHER_SUFFIXES = (".bif", ".czi", ".dcm", ".dicom", ".mrxs", ".ndpi", ".vms", ".vmu")
_SUFFIXES = frozenset((*_TIFF_SUFFIXES, *_OTHER_SUFFIXES))
_DICOM_SUFFIXES = frozenset((".dcm", ".dicom", ""))
_SIDE_IMAGE_NAME = re.compile(r"(^|[-_. ])(label|macro)$", re.IGNORECASE)


def find_slides(folder: Path) -> list[SlideRef]:
    """Find every slide in a folder and the folders below it, in the order of their paths.

    The id of a slide is its file's stem. The files of a DICOM series are one slide: its id is the stem of its only
    file, else the name of its folder, followed by the end of the series' UID where the folder holds several such
    series. Left out are hidden files and folders, stores, label and macro images, and what does not look like a slide.
    A file with the extension of a slide is listed even if it can't be read, so that a run reports it.

    Raises:
        SlideOpenError: There is no such folder.
    """
    if not folder.is_dir():
        raise SlideOpenError(f"{folder}: there is no such folder; check the path")
    found: list[SlideRef] = []
    visited: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        # A link to a folder above would lead round in circles.
        real = os.path.realpath(here)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not _is_hidden(name) and not name.endswith(".zarr"))
        files = [Path(here, name) for name in sorted(names) if not _is_hidden(name)]
        headers = _dicom_headers(files)
        found += _series(Path(here), headers)
        found += [
            SlideRef(unicodedata.normalize("NFC", file.stem), file)
            for file in files
            if file not in headers and file.suffix.lower() in _SUFFIXES and not _SIDE_IMAGE_NAME.search(file.stem)
        ]
    return sorted(found, key=lambda ref: ref.path.parts)


def only_series(folder: Path, slide_id: str) -> Path:
    """Return a file of the one DICOM series in a folder.

    Raises:
        SlideOpenError: It holds none, or several; lists them.
    """
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise SlideOpenError(
            f"{folder}: the folder can't be listed ({error.strerror}); check its permissions", slide_id=slide_id
        ) from None
    series = _series(folder, _dicom_headers(files))
    if len(series) == 1:
        return series[0].path
    if series:
        raise SlideOpenError(
            f"{folder}: holds {len(series)} DICOM series; give one file of the one you want: "
            + ", ".join(ref.path.name for ref in series),
            slide_id=slide_id,
        )
    raise SlideOpenError(
        f"{folder}: a folder without a DICOM series is no slide; give a slide file, "
        "or take every slide in the folder with pathopipe run",
        slide_id=slide_id,
    )


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _dicom_headers(files: list[Path]) -> dict[Path, DicomHeader]:
    candidates = [file for file in files if file.suffix.lower() in _DICOM_SUFFIXES and file.is_file()]
    return {file: header for file in candidates if (header := read_header(file)) is not None}


def _series(folder: Path, headers: dict[Path, DicomHeader]) -> list[SlideRef]:
    """Group the scans among DICOM files of one folder into series, each standing for its first file."""
    series: dict[str, list[Path]] = {}
    for file, header in headers.items():
        if header.is_scan:
            series.setdefault(header.series or file.name, []).append(file)
    several = sum(len(files) > 1 for files in series.values()) > 1
    refs = []
    for uid, files in series.items():
        if len(files) == 1:
            name = files[0].stem
        else:
            name = folder.resolve().name + (f"-{uid.rpartition('.')[2]}" if several else "")
        refs.append(SlideRef(unicodedata.normalize("NFC", name), files[0]))
    return refs
