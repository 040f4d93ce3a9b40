"""Data sets in published forms: every pixel and class is where it was written, and damage is named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter

from pathopipe.errors import UsageError
from pathopipe.segmentation.datasets import DatasetSettings
from pathopipe.segmentation.published_formats import (
    PANNUKE_CLASSES,
    hovernet_entries,
    monuseg_entries,
    pannuke_entries,
    read_hovernet,
    read_monuseg,
)

INST_MAP = np.array([[0, 3, 3, 0], [9, 9, 0, 0], [9, 0, 4, 4]])
RGB = np.random.default_rng(1).integers(0, 256, (3, 4, 3), dtype=np.uint8)


def settings_of(kind: str, **keys: Any) -> Any:
    return TypeAdapter[Any](DatasetSettings).validate_python({"kind": kind, "name": "own", "mpp": 0.25, **keys})


def save_picture(path: Path, rgb: NDArray[np.uint8] = RGB) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb).save(path)


# HoVer-Net


@pytest.mark.parametrize(
    "classes",
    [
        {"inst_type": [[2], [5], [1]]},
        {"inst_type": [[1], [5], [2]], "inst_uid": [[9], [4], [3]]},
        {"class": [[5], [1], [2]], "id": [[4], [9], [3]]},
        {"class": [[7], [5], [1], [2]], "id": [[8], [4], [9], [3]]},  # a nucleus that was cut away
        {"type_map": [[0, 2, 2, 0], [1, 1, 0, 0], [2, 0, 5, 5]]},
    ],
    ids=["in order", "by uid", "lizard", "lizard with more", "by pixel"],
)
def test_classes_of_mat_files_go_with_their_nucleus(tmp_path: Path, classes: dict[str, Any]) -> None:
    scipy.io.savemat(tmp_path / "a.mat", {"inst_map": INST_MAP.astype(float), **classes})
    labels, class_of = read_hovernet(tmp_path / "a.mat")
    assert np.array_equal(labels, INST_MAP)
    assert class_of is not None
    assert {number: class_of[number] for number in (3, 4, 9)} == {3: "2", 4: "5", 9: "1"}


def test_a_mat_file_without_classes_or_without_nuclei(tmp_path: Path) -> None:
    save_picture(tmp_path / "images" / "a.png")
    (tmp_path / "labels").mkdir()
    path = tmp_path / "labels" / "a.mat"
    scipy.io.savemat(path, {"inst_map": INST_MAP})
    (entry,) = hovernet_entries(settings_of("hovernet-mat", images=tmp_path / "images", labels=tmp_path / "labels"))
    raw = entry.read()
    assert np.array_equal(raw.labels["nuclei"], INST_MAP)
    assert raw.class_of == {}
    scipy.io.savemat(path, {"inst_map": np.zeros((3, 4)), "inst_type": np.zeros((0, 1))})
    raw = entry.read()
    assert not raw.labels["nuclei"].any()
    assert raw.class_of == {"nuclei": {}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"labels": INST_MAP}, r"holds no inst_map \(found: labels\)"),
        ({"inst_map": INST_MAP / 2}, "inst_map: labels are whole numbers"),
        ({"inst_map": INST_MAP, "inst_type": [[1], [2]]}, "2 classes in inst_type for 3 nuclei"),
        ({"inst_map": INST_MAP, "class": [[1]], "id": [[3]]}, "nucleus 4 of inst_map has no class in class"),
        ({"inst_map": INST_MAP, "type_map": INST_MAP.T}, "type_map of shape"),
    ],
)
def test_odd_mat_files_are_named(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    scipy.io.savemat(tmp_path / "odd.mat", content)
    with pytest.raises(UsageError, match=said) as raised:
        read_hovernet(tmp_path / "odd.mat")
    assert "odd.mat" in str(raised.value)


def test_damaged_and_newer_mat_files_are_named(tmp_path: Path) -> None:
    scipy.io.savemat(tmp_path / "cut.mat", {"inst_map": INST_MAP})
    data = (tmp_path / "cut.mat").read_bytes()
    (tmp_path / "cut.mat").write_bytes(data[: len(data) // 2])
    with pytest.raises(UsageError, match=r"cut\.mat: can't be read as a \.mat file"):
        read_hovernet(tmp_path / "cut.mat")
    header = b"MATLAB 7.3 MAT-file".ljust(124) + bytes([0, 2]) + b"IM"
    (tmp_path / "new.mat").write_bytes(header + bytes(512))
    with pytest.raises(UsageError, match=r"new\.mat: MATLAB 7\.3 is not read here; save it with '-v7'"):
        read_hovernet(tmp_path / "new.mat")


# PanNuke


def save_pannuke(folder: Path, *, images: Any = None, masks: Any = None, tissues: Any = None) -> Any:
    pictures = np.stack([RGB, RGB[::-1]]).astype(np.float64) if images is None else images
    layers = np.zeros((2, 3, 4, 6)) if masks is None else masks
    names = np.array(["Breast", "Colon"]) if tissues is None else tissues
    for key, array in (("images", pictures), ("masks", layers), ("types", names)):
        np.save(folder / f"{key}.npy", array, allow_pickle=True)
    return settings_of(
        "pannuke", images=folder / "images.npy", masks=folder / "masks.npy", tissues=folder / "types.npy"
    )


def test_every_nucleus_of_pannuke_has_the_class_of_its_channel(tmp_path: Path) -> None:
    masks = np.zeros((2, 3, 4, 6))
    masks[0, 0, :2, 0] = 7  # neoplastic
    masks[0, 0, 1:3, 1] = 7  # inflammatory, one pixel of it taken already
    masks[0, 2, 0, 1] = 12
    masks[0, 2, 2:, 4] = 1  # epithelial
    masks[..., 5] = 1
    first, second = pannuke_entries(save_pannuke(tmp_path, masks=masks))
    raw = first.read()
    labels, class_of = raw.labels["nuclei"], raw.class_of["nuclei"]
    assert raw.rgb.dtype == np.uint8
    assert np.array_equal(raw.rgb, RGB)
    named = np.array([[class_of.get(int(number), "") for number in row] for row in labels])
    assert named.tolist() == [
        ["neoplastic", "neoplastic", "inflammatory", ""],
        [""] * 4,
        ["inflammatory", "", "epithelial", "epithelial"],
    ]
    assert labels[0, 2] != labels[2, 0]
    assert set(class_of.values()) <= set(PANNUKE_CLASSES)
    assert first.cells == {"tissue": "Breast"}
    assert np.array_equal(second.read().rgb, RGB[::-1])
    assert not second.read().labels["nuclei"].any()


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": np.zeros((2, 3, 4))}, r"images\.npy: shape \(2, 3, 4\), but pictures are"),
        ({"masks": np.zeros((2, 3, 4, 5))}, r"masks\.npy: shape \(2, 3, 4, 5\), but masks of these pictures are"),
        ({"tissues": np.array(["Breast"])}, r"types\.npy: <U6 of shape \(1,\)"),
        ({"tissues": np.array(["Breast", None])}, r"types\.npy: an array of objects, which are not read here"),
    ],
)
def test_pannuke_arrays_that_do_not_fit_are_named(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        pannuke_entries(save_pannuke(tmp_path, **arrays))


def test_pannuke_pictures_of_another_scale_are_refused(tmp_path: Path) -> None:
    for pictures in (np.full((2, 3, 4, 3), 0.5), np.full((2, 3, 4, 3), 300.0), np.full((2, 3, 4, 3), np.nan)):
        entry, _ = pannuke_entries(save_pannuke(tmp_path, images=pictures))
        with pytest.raises(UsageError, match=r"images\.npy\[0\]: values from .* but colours go from 0 to 255"):
            entry.read()


# MoNuSeg

XML = """<?xml version="1.0"?>
<Annotations MicronsPerPixel="0.252">
 <Annotation Id="1"><Attributes>{attributes}</Attributes>
  <Regions><RegionAttributeHeaders/>
   <Region Id="1"><Vertices>{first}</Vertices></Region>
   <Region Id="2"><Vertices><Vertex X="0" Y="0"/><Vertex X="1" Y="1"/></Vertices></Region>
  </Regions></Annotation>
 <Annotation Id="2"><Regions>
   <Region Id="1"><Vertices>{second}</Vertices></Region>
 </Regions><Attributes><Attribute Name=" Mitotic  figure "/></Attributes></Annotation>
</Annotations>"""


def corners(*xy: tuple[float, float]) -> str:
    return "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in xy)


def test_regions_of_imagescope_are_drawn(tmp_path: Path) -> None:
    save_picture(tmp_path / "images" / "a.tif")
    (tmp_path / "labels").mkdir()
    path = tmp_path / "labels" / "a.xml"
    text = XML.format(
        attributes="".join(f'<Attribute Name="{name}" Value=""/>' for name in ("Description", "Epithelial", "more")),
        first=corners((0, 0), (2, 0), (2, 2), (0, 2)),
        second=corners((1, 1), (4, 1), (4, 3), (1, 3)),
    )
    path.write_text(text)
    regions = read_monuseg(path)
    assert [name for _, name in regions] == ["Epithelial", "Mitotic figure"]
    assert regions[0][0].tolist() == [[0, 0], [2, 0], [2, 2], [0, 2]]
    (entry,) = monuseg_entries(settings_of("monuseg-xml", images=tmp_path / "images", labels=tmp_path / "labels"))
    raw = entry.read()
    assert raw.labels["nuclei"].tolist() == [[1, 1, 0, 0], [1, 1, 2, 2], [0, 2, 2, 2]]
    assert raw.class_of == {"nuclei": {1: "Epithelial", 2: "Mitotic figure"}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('<!DOCTYPE a [<!ENTITY b "c">]><Annotations/>', "declares a document type or entities"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><Annotations/>', "declares a document type or entities"),
        ("<Annotations><Annotation>", "not XML, or cut off"),
        ("<html/>", "holds no Annotation"),
        ('<A><Annotation/><Region><Vertex X="1"/></Region></A>', "a Vertex without numbers X and Y"),
        ('<A><Annotation/><Region><Vertex X="1" Y="b"/></Region></A>', "a Vertex without numbers X and Y"),
    ],
)
def test_odd_xml_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "odd.xml").write_text(text)
    with pytest.raises(UsageError, match=said) as raised:
        read_monuseg(tmp_path / "odd.xml")
    assert "odd.xml" in str(raised.value)
