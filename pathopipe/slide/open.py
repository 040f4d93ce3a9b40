"""Open a slide by its content, whatever its name."""

from pathlib import Path

from pathopipe.errors import SlideOpenError
from pathopipe.remote import RemotePath, location
from pathopipe.slide.base import Slide
from pathopipe.slide.dicom import false_colours, series_files
from pathopipe.slide.find import only_series
from pathopipe.slide.fingerprint import fingerprint_files
from pathopipe.slide.image import is_npy, open_image, open_npy, plain_image_kind
from pathopipe.slide.native import with_native_tiles
from pathopipe.slide.openslide import OpenSlideReader, detect_vendor
from pathopipe.slide.resolution import check_override
from pathopipe.slide.tiff import TiffReader, is_ome_tiff, is_tiff

__all__ = ["open_slide"]


def open_slide(
    path: Path | str, *, slide_id: str | None = None, mpp: float | None = None, mpp_source: str = "manifest"
) -> Slide:
    """Open a slide with the reader that its content asks for; the name and extension decide nothing.

    Args:
        path: A slide file, any file of a DICOM series, or a folder that holds one DICOM series. A plain PNG or JPEG
            serves as a slide if ``mpp`` is given, and so does a .npy file of (height, width, 3) uint8.
        slide_id: Name of the slide; the file's stem when left out.
        mpp: Micrometres per level-0 pixel; overrides what the file states, which stays recorded.
        mpp_source: Where ``mpp`` comes from, ``manifest`` or ``config``.

    Raises:
        SlideOpenError: The file is missing, can't be read, or is no slide; says which and what to do.
        MissingResolutionError: ``mpp`` is outside 0.05 to 50.
    """
    path = location(path)
    if isinstance(path, RemotePath):
        raise SlideOpenError(f"{path}: a URL is not opened itself; open the copy that slide.cache.local_slide makes")
    if path.is_dir():
        slide_id = slide_id if slide_id is not None else path.name
        path = only_series(path, slide_id)
    slide_id = slide_id if slide_id is not None else path.stem
    check_override(mpp, source=mpp_source, name=path.name, slide_id=slide_id)
    head = _head(path, slide_id)
    vendor = detect_vendor(path)
    if vendor is None or (vendor == "generic-tiff" and is_ome_tiff(path)):
        # Of a pyramidal OME-TIFF OpenSlide sees level 0 alone, and not its physical size.
        return _open_without_openslide(path, head, slide_id, mpp, mpp_source)
    try:
        slide = OpenSlideReader(
            path,
            slide_id=slide_id,
            files=fingerprint_files(_files_of(path, vendor)),
            mpp=mpp,
            mpp_source=mpp_source,
            problems=_dicom_problems(path) if vendor == "dicom" else (),
        )
    except SlideOpenError:
        if vendor != "generic-tiff":
            raise
        # Knows the layout, but not the compression.
        return _open_without_openslide(path, head, slide_id, mpp, mpp_source)
    return with_native_tiles(slide)


def _open_without_openslide(path: Path, head: bytes, slide_id: str, mpp: float | None, mpp_source: str) -> Slide:
    if is_tiff(head):
        return TiffReader(path, slide_id=slide_id, files=fingerprint_files([path]), mpp=mpp, mpp_source=mpp_source)
    if plain_image_kind(head) is not None:
        return open_image(path, slide_id=slide_id, mpp=mpp, mpp_source=mpp_source)
    if is_npy(head):
        return open_npy(path, slide_id=slide_id, mpp=mpp, mpp_source=mpp_source)
    raise SlideOpenError(
        f"{path.name}: not a slide that can be read (its first bytes are {head[:8].hex(' ')}); "
        "give a format that OpenSlide knows, an OME-TIFF or a tiled TIFF",
        slide_id=slide_id,
    )


def _head(path: Path, slide_id: str) -> bytes:
    """Read the first bytes; every way in which that fails gets its own words."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        raise SlideOpenError(f"{path}: there is no such file; check the path", slide_id=slide_id) from None
    except PermissionError:
        raise SlideOpenError(
            f"{path}: no permission to read it; ask its owner, or change its mode with chmod", slide_id=slide_id
        ) from None
    except OSError as error:
        raise SlideOpenError(f"{path}: can't be read ({error.strerror}); check the disk", slide_id=slide_id) from None
    if not head:
        raise SlideOpenError(f"{path.name}: the file is empty; copy it again from its source", slide_id=slide_id)
    return head


def _files_of(path: Path, vendor: str) -> list[Path]:
    """List the files that make up a slide, for its fingerprint."""
    if vendor == "dicom":
        return series_files(path)
    side_folder = path.with_suffix("")
    if vendor == "mirax" and side_folder.is_dir():
        return [path, *(file for file in side_folder.iterdir() if file.is_file() and not file.name.startswith("."))]
    if vendor.startswith("hamamatsu") and path.suffix.lower() in (".vms", ".vmu"):
        # Their images lie beside the index and are named after it.
        return [file for file in path.parent.iterdir() if file.is_file() and file.name.startswith(path.stem)]
    return [path]


def _dicom_problems(path: Path) -> tuple[str, ...]:
    problem = false_colours(path)
    return (problem,) if problem is not None else ()
