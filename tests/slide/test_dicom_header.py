"""DICOM headers: series, and colours that a file declares falsely."""

from pathlib import Path

import imagecodecs
import pytest
import simplejpeg
from slide_files import picture, write_dicom

from pathopipe.slide.dicom import false_colours, read_header, series_files
from pathopipe.slide.open import open_slide

PIXELS = picture(64, 64)
SUBSAMPLED = simplejpeg.encode_jpeg(PIXELS, colorsubsampling="420")
YCBCR_444 = simplejpeg.encode_jpeg(PIXELS, colorsubsampling="444")
TRUE_RGB = imagecodecs.jpeg8_encode(PIXELS, colorspace="RGB", outcolorspace="RGB")
GREY = simplejpeg.encode_jpeg(PIXELS[..., :1].copy(), colorspace="GRAY")


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2"], ids=["explicit", "implicit"])
def test_header_past_a_nested_sequence(tmp_path: Path, syntax: str) -> None:
    header = read_header(write_dicom(tmp_path / "a.dcm", series="1.2.345", syntax=syntax))
    assert header is not None
    assert (header.series, header.photometric, header.is_scan) == ("1.2.345", "RGB", True)
    assert header.image_type == ("ORIGINAL", "PRIMARY", "VOLUME", "NONE")


@pytest.mark.parametrize("kind", ["LABEL", "OVERVIEW", "THUMBNAIL"])
def test_side_images_are_no_scan(tmp_path: Path, kind: str) -> None:
    header = read_header(write_dicom(tmp_path / "a.dcm", image_type=f"ORIGINAL\\PRIMARY\\{kind}\\NONE"))
    assert header is not None
    assert not header.is_scan


@pytest.mark.parametrize("content", [b"", b"DICM", bytes(128) + b"DICM", bytes(128) + b"DICMnonsense" * 9])
def test_what_is_no_dicom(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(content)
    header = read_header(path)
    assert header is None or header.series == ""


@pytest.mark.parametrize("cut", range(100, 400, 7))
def test_a_header_cut_anywhere_does_no_harm(tmp_path: Path, cut: int) -> None:
    path = write_dicom(tmp_path / "a.dcm", frame=SUBSAMPLED)
    path.write_bytes(path.read_bytes()[:cut])
    read_header(path)
    false_colours(path)


def test_series_are_gathered_without_their_label(tmp_path: Path) -> None:
    first = write_dicom(tmp_path / "b.dcm")
    second = write_dicom(tmp_path / "a")
    write_dicom(tmp_path / "c.dcm", series="1.2.4")
    write_dicom(tmp_path / "d.dcm", image_type="ORIGINAL\\PRIMARY\\LABEL\\NONE")
    (tmp_path / "notes.txt").write_text("notes")
    assert series_files(first) == series_files(second) == [second, first]


@pytest.mark.parametrize(
    ("declared", "frame", "is_false"),
    [
        ("RGB", SUBSAMPLED, True),
        ("RGB", TRUE_RGB, False),
        ("RGB", YCBCR_444, False),  # proves nothing: some writers put a JFIF marker on true RGB
        ("RGB", SUBSAMPLED[:2] + SUBSAMPLED[20:], False),  # subsampled, but without a marker
        ("YBR_FULL_422", SUBSAMPLED, False),
        ("YBR_FULL_422", TRUE_RGB, True),
        ("YBR_ICT", b"\xff\x4f\xff\x51", False),
        ("MONOCHROME2", GREY, False),
        ("RGB", b"", False),
    ],
)
def test_false_colours(tmp_path: Path, declared: str, frame: bytes, is_false: bool) -> None:
    problem = false_colours(write_dicom(tmp_path / "a.dcm", photometric=declared, frame=frame))
    assert (problem is not None) is is_false
    assert problem is None or problem.startswith("false colours: ")


@pytest.mark.shared_data
def test_the_real_series(shared_data: Path) -> None:
    folder = shared_data / "slides" / "dicom"
    by_file = [open_slide(path).info for path in sorted((folder / "cmu-1-small-region").iterdir())]
    assert len(by_file) == 12
    assert {info.fingerprint for info in by_file} == {open_slide(folder / "cmu-1-small-region").info.fingerprint}
    assert {info.size_bytes for info in by_file} == {by_file[0].size_bytes}
    assert all(any("false colours" in problem for problem in info.problems) for info in by_file)
    assert open_slide(folder / "camelyon16-lowres-jpeg2000.dcm").info.problems == ()
