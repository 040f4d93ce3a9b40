"""Opening by content; every bad input gets one clear line."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from slide_files import picture, pyramid, write_dicom, write_ome, write_svs, write_tiff

from pathopipe.errors import MissingResolutionError, SlideOpenError, TileReadError
from pathopipe.geometry import Region
from pathopipe.slide.open import open_slide
from pathopipe.slide.resolution import require_mpp


def refusal(path: Path, **options: Any) -> str:
    """Open what must be refused; returns the one line that says why."""
    with pytest.raises(SlideOpenError) as caught:
        open_slide(path, **options)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    assert caught.value.slide_id == (options.get("slide_id") or (path.name if path.is_dir() else path.stem))
    return message


def test_missing_file(tmp_path: Path) -> None:
    assert "there is no such file; check the path" in refusal(tmp_path / "gone.svs")


def test_the_id_that_was_given_is_in_the_error(tmp_path: Path) -> None:
    refusal(tmp_path / "gone.svs", slide_id="patient-7")


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    path.touch()
    assert "the file is empty; copy it again" in refusal(path)


def test_text_with_the_extension_of_a_slide(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    path.write_text("no slide at all")
    message = refusal(path)
    assert "not a slide that can be read (its first bytes are 6e 6f 20 73" in message
    assert "OME-TIFF" in message


def test_a_tiff_that_ends_after_its_first_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(b"II*\0\x08\0\0\0")
    assert "the file was cut short" in refusal(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "a.svs", [picture(300, 300)])
    path.chmod(0)
    assert "no permission to read it" in refusal(path)


def test_no_permission_as_told_by_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_svs(tmp_path / "a.svs", [picture(300, 300)])

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "no permission to read it" in refusal(path)


def test_a_folder_that_is_no_slide(tmp_path: Path) -> None:
    folder = tmp_path / "cohort"
    folder.mkdir()
    write_svs(folder / "a.svs", [picture(300, 300)])
    message = refusal(folder)
    assert "a folder without a DICOM series is no slide" in message
    assert "pathopipe run" in message


def test_a_folder_of_two_dicom_series_lists_them(tmp_path: Path) -> None:
    for name, series in (("a.dcm", "1.2.1"), ("b.dcm", "1.2.2"), ("c.dcm", "1.2.2")):
        write_dicom(tmp_path / name, series=series)
    message = refusal(tmp_path)
    assert "holds 2 DICOM series" in message
    assert "a.dcm, b.dcm" in message


def test_a_dicom_file_of_headers_only(tmp_path: Path) -> None:
    refusal(write_dicom(tmp_path / "a.dcm"))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("write", [write_svs, write_ome])
def test_a_slide_cut_short_fails_or_loses_only_what_was_cut(tmp_path: Path, write: Any, share: float) -> None:
    whole = write(tmp_path / "whole.tif", pyramid(960, 720, 2))
    expected = open_slide(whole).read(Region(0, 0, 0, 960, 720))
    path = tmp_path / "cut.tif"
    path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    try:
        slide = open_slide(path)
    except SlideOpenError as error:
        assert str(error).startswith("cut.tif: ")
        assert re.search(r"copy (it|the file) again|check that the file is whole", str(error))
        return
    failed = 0
    for level, (width, height) in enumerate([(960, 720), (480, 360)]):
        for x in range(0, width, 120):
            for y in range(0, height, 120):
                try:
                    found = slide.read(Region(x << level, y << level, level, 120, 120))
                except TileReadError as error:
                    assert "cut short" in str(error) or "can't be read" in str(error)
                    failed += 1
                else:
                    if level == 0:
                        np.testing.assert_array_equal(found, expected[y : y + 120, x : x + 120])
    assert failed > 0


@pytest.mark.shared_data
@pytest.mark.parametrize("share", [0.3, 0.5, 0.66, 0.9, 0.999])
def test_a_real_slide_cut_short_is_refused(shared_data: Path, tmp_path: Path, share: float) -> None:
    whole = (shared_data / "slides" / "aperio" / "CMU-1-Small-Region.svs").read_bytes()
    path = tmp_path / "cut.svs"
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "the file was cut short" in refusal(path)


@pytest.mark.parametrize("name", ["a.png", "a.txt", "a", "a.ndpi", "a.mrxs"])
def test_the_content_decides_not_the_name(tmp_path: Path, name: str) -> None:
    svs = open_slide(write_svs(tmp_path / "right.svs", [picture(500, 400)]))
    path = tmp_path / name
    path.write_bytes((tmp_path / "right.svs").read_bytes())
    slide = open_slide(path)
    assert slide.info.vendor == "aperio"
    assert slide.info.fingerprint == svs.info.fingerprint
    np.testing.assert_array_equal(slide.read(Region(0, 0, 0, 500, 400)), svs.read(Region(0, 0, 0, 500, 400)))


@pytest.mark.parametrize("name", ["with space.svs", "für Müller – 病理.svs", "a'b\"c;$x.svs", "-rf.svs", "100%.svs"])
def test_names_of_all_sorts(tmp_path: Path, name: str) -> None:
    for write in (write_svs, write_ome):
        path = write(tmp_path / name, [picture(300, 280)])
        slide = open_slide(path)
        assert slide.info.slide_id == path.stem
        assert slide.read(Region(0, 0, 0, 20, 10)).shape == (10, 20, 3)


def test_links_are_followed(tmp_path: Path) -> None:
    write_svs(tmp_path / "real.svs", [picture(300, 280)])
    link = tmp_path / "link.svs"
    link.symlink_to("real.svs")
    info = open_slide(link).info
    assert (info.slide_id, info.path) == ("link", link)
    assert info.fingerprint == open_slide(tmp_path / "real.svs").info.fingerprint
    broken = tmp_path / "broken.svs"
    broken.symlink_to("nowhere.svs")
    assert "no such file" in refusal(broken)


def test_a_path_may_be_text(tmp_path: Path) -> None:
    write_svs(tmp_path / "a.svs", [picture(300, 280)])
    assert open_slide(str(tmp_path / "a.svs"), slide_id="b").info.slide_id == "b"


def test_no_resolution_opens_and_is_refused_when_needed(tmp_path: Path) -> None:
    slide = open_slide(write_tiff(tmp_path / "a.tif", [picture(300, 280)], mpp=None, compression="jpeg"))
    assert slide.info.mpp is None
    assert slide.read(Region(0, 0, 0, 5, 5)).shape == (5, 5, 3)
    with pytest.raises(MissingResolutionError, match=r"a\.tif: no micrometres per pixel"):
        require_mpp(slide.info)


@pytest.mark.parametrize("mpp", ["0.0001", "1000000"])
def test_absurd_vendor_resolution(tmp_path: Path, mpp: str) -> None:
    info = open_slide(write_svs(tmp_path / "a.svs", [picture(300, 280)], mpp=mpp)).info
    assert [e.used for e in info.mpp_evidence if e.source == "openslide.mpp-x"] == [False]
    assert info.mpp == (0.25, 0.25)
    assert "nominal" in " ".join(info.problems)


def test_screen_resolution_is_no_evidence(tmp_path: Path) -> None:
    info = open_slide(write_tiff(tmp_path / "a.tif", [picture(300, 280)], mpp=25_400 / 72, compression="jpeg")).info
    assert info.mpp is None
    assert {e.used for e in info.mpp_evidence} == {False}


@pytest.mark.parametrize("write", [write_svs, write_ome])
def test_override(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path / "a.tif", [picture(300, 280)])
    info = open_slide(path, mpp=0.5, mpp_source="config").info
    assert info.mpp == (0.5, 0.5)
    assert (info.mpp_evidence[0].source, info.mpp_evidence[0].used) == ("config", True)
    assert {e.used for e in info.mpp_evidence[1:]} == {False}
    assert any("taken from the config" in problem for problem in info.problems)
    with pytest.raises(MissingResolutionError, match="the manifest states 0 um/px"):
        open_slide(path, mpp=0.0)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_plain_image_needs_its_resolution(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(picture(300, 280)).save(path)
    message = refusal(path)
    assert "plain image" in message
    assert "--set slide.mpp=" in message
    slide = open_slide(path, mpp=0.5)
    assert (slide.info.reader, slide.info.dims_l0, slide.info.mpp) == ("array", (300, 280), (0.5, 0.5))
    assert [(e.source, e.used) for e in slide.info.mpp_evidence] == [("manifest", True)]
    with Image.open(path) as image:
        np.testing.assert_array_equal(slide.read(Region(0, 0, 0, 300, 280)), np.asarray(image))


def test_a_clear_png_is_white_where_transparent(tmp_path: Path) -> None:
    rgba = np.zeros((20, 30, 4), np.uint8)
    rgba[:, 10:, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    pixels = open_slide(tmp_path / "a.png", mpp=0.5).read(Region(0, 0, 0, 30, 20))
    assert (pixels[:, :10] == 255).all()
    assert (pixels[:, 10:] == 0).all()


def test_a_damaged_plain_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(picture(300, 280)).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    assert "a damaged image" in refusal(path, mpp=0.5)


def test_a_huge_plain_image_is_refused_undecoded(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("1", (9000, 9000)).save(path)
    assert "9000 x 9000 px is too large to hold in memory" in refusal(path, mpp=0.5)


def test_what_openslide_names_but_does_not_decode_is_read_all_the_same(tmp_path: Path) -> None:
    whole = picture(512, 512)
    path = write_tiff(tmp_path / "a.tif", [whole], compression="jpeg2000", compressionargs={"reversible": True})
    slide = open_slide(path)
    assert slide.info.reader == "tiff"
    np.testing.assert_array_equal(slide.read(Region(0, 0, 0, 512, 512)), whole)


def test_reads_of_every_reader_agree_on_the_outside(tmp_path: Path) -> None:
    Image.fromarray(picture(300, 280)).save(tmp_path / "a.png")
    slides = [
        open_slide(write_svs(tmp_path / "a.svs", [picture(300, 280)])),
        open_slide(write_ome(tmp_path / "a.ome.tif", [picture(300, 280)])),
        open_slide(tmp_path / "a.png", mpp=0.25),
    ]
    for slide in slides:
        for x, y in ((-50, 0), (300, 0), (0, 280), (-9999, -9999)):
            assert (slide.read(Region(x, y, 0, 50, 40)) == 255).all() == (x != 0 or y != 0)


def test_a_numpy_file_is_a_slide(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    np.save(tmp_path / "array.npy", pixels)
    slide = open_slide(tmp_path / "array.npy", mpp=0.5)
    assert np.array_equal(slide.read(Region(10, 5, 0, 20, 30)), pixels[5:35, 10:30])
    assert slide.info.mpp == (0.5, 0.5)
    assert open_slide(tmp_path / "array.npy").info.mpp is None


@pytest.mark.parametrize("array", [np.zeros((4, 5), np.uint8), np.zeros((4, 5, 3)), np.array([{}])])
def test_a_numpy_file_of_another_kind_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "array.npy", array, allow_pickle=True)
    with pytest.raises(SlideOpenError, match=r"array.npy: not a NumPy file of \(height, width, 3\) uint8"):
        open_slide(tmp_path / "array.npy", mpp=0.5)
