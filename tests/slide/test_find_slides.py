"""Slides found in folders."""

from pathlib import Path

import pytest
from slide_files import write_dicom

from pathopipe.errors import SlideOpenError
from pathopipe.slide.find import find_slides


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(folder: Path) -> list[str]:
    return [ref.path.relative_to(folder).as_posix() for ref in find_slides(folder)]


def test_every_slide_in_order_of_paths(tmp_path: Path) -> None:
    touch(tmp_path, "b.svs", "a.ndpi", "sub/c.SVS", "sub/deep/d.ome.tif", "e.mrxs", "e/Data0000.dat", "e/Slidedat.ini")
    assert names(tmp_path) == ["a.ndpi", "b.svs", "e.mrxs", "sub/c.SVS", "sub/deep/d.ome.tif"]
    assert [ref.slide_id for ref in find_slides(tmp_path)] == ["a", "b", "e", "c", "d.ome"]


def test_what_is_no_slide_is_left_out(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "a.svs",
        ".hidden.svs",
        "._a.svs",
        ".cache/x.svs",
        "__MACOSX/y.svs",
        "old.zarr/z.tif",
        "labels.csv",
        "mask.png",
        "a_label.tif",
        "a-macro.tiff",
        "label.tif",
        "notes",
    )
    assert names(tmp_path) == ["a.svs"]


def test_a_name_that_only_contains_label_is_a_slide(tmp_path: Path) -> None:
    touch(tmp_path, "labelled.svs", "macrophages.svs")
    assert names(tmp_path) == ["labelled.svs", "macrophages.svs"]


def test_an_unreadable_slide_is_listed(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_text("no slide")
    (tmp_path / "b.svs").symlink_to("nowhere")
    (tmp_path / "c.dcm").write_text("no DICOM")
    assert names(tmp_path) == ["a.svs", "b.svs", "c.dcm"]


def test_a_dicom_series_is_one_slide(tmp_path: Path) -> None:
    folder = tmp_path / "case 1"
    folder.mkdir()
    for number in range(3):
        write_dicom(folder / f"level-{number}.dcm")
    write_dicom(folder / "label.dcm", image_type="ORIGINAL\\PRIMARY\\LABEL\\NONE")
    write_dicom(folder / "overview", image_type="ORIGINAL\\PRIMARY\\OVERVIEW\\NONE")
    (ref,) = find_slides(tmp_path)
    assert (ref.slide_id, ref.path) == ("case 1", folder / "level-0.dcm")


def test_several_series_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "case"
    folder.mkdir()
    for name, series in (("a", "1.2.10"), ("b", "1.2.10"), ("c", "1.2.20"), ("d", "1.2.20"), ("alone", "1.2.30")):
        write_dicom(folder / f"{name}.dcm", series=series)
    assert [(ref.slide_id, ref.path.name) for ref in find_slides(tmp_path)] == [
        ("case-10", "a.dcm"),
        ("alone", "alone.dcm"),
        ("case-20", "c.dcm"),
    ]


def test_other_dicom_objects_are_no_slides(tmp_path: Path) -> None:
    write_dicom(tmp_path / "ct.dcm", sop_class="1.2.840.10008.5.1.4.1.1.2")
    assert names(tmp_path) == []


def test_linked_folders_are_followed_but_never_in_circles(tmp_path: Path) -> None:
    touch(tmp_path / "archive", "a.svs")
    cohort = tmp_path / "cohort"
    cohort.mkdir()
    (cohort / "linked").symlink_to(tmp_path / "archive")
    (tmp_path / "archive" / "back").symlink_to(cohort)
    assert names(cohort) == ["linked/a.svs"]


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(SlideOpenError, match="no such folder"):
        find_slides(tmp_path / "gone")


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    assert find_slides(tmp_path) == []


@pytest.mark.shared_data
def test_the_real_slides(shared_data: Path) -> None:
    assert [ref.slide_id for ref in find_slides(shared_data / "slides")] == [
        "CMU-1-Small-Region",
        "camelyon16-lowres-jpeg2000",
        "cmu-1-small-region",
        "test3-DAPI",
        "OS-1-detail.ome",
        "OS-2-ndpi-ki67.ome",
        "TCGA-V5-A7RE-11A-01-TS1.pyramid",
    ]
