"""Data sets as others lay them out: every pixel and class is where it was written, and damage is named."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter

from pathopipe.errors import UsageError
from pathopipe.segmentation.datasets import DatasetSettings
from pathopipe.segmentation.label_formats import Entry, geojson_entries, label_image_entries, tile_entries

INST_MAP = np.array([[0, 3, 3, 0], [9, 9, 0, 0], [9, 0, 4, 4]])
RGB = np.random.default_rng(1).integers(0, 256, (3, 4, 3), dtype=np.uint8)


def settings_of(kind: str, **keys: Any) -> Any:
    return TypeAdapter[Any](DatasetSettings).validate_python({"kind": kind, "name": "own", "mpp": 0.25, **keys})


def save_picture(path: Path, rgb: NDArray[np.uint8] = RGB) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb).save(path)


def by_name(entries: list[Entry]) -> dict[str, Entry]:
    return {entry.name: entry for entry in entries}


# Label images


def test_labels_of_several_tasks_go_with_their_picture(tmp_path: Path) -> None:
    save_picture(tmp_path / "images" / "a.png")
    for task, factor in (("nuclei", 1), ("glands", 2)):
        (tmp_path / task).mkdir()
        np.save(tmp_path / task / f"a{'_g' if task == 'glands' else ''}.npy", INST_MAP * factor)
    settings = settings_of(
        "label-images",
        images=tmp_path / "images",
        labels={"nuclei": tmp_path / "nuclei", "glands": tmp_path / "glands"},
        suffixes={"glands": "_g"},
    )
    (entry,) = label_image_entries(settings)
    raw = entry.read()
    assert entry.name == "a"
    assert np.array_equal(raw.rgb, RGB)
    assert np.array_equal(raw.labels["nuclei"], INST_MAP)
    assert np.array_equal(raw.labels["glands"], INST_MAP * 2)


def test_pictures_and_their_labels_may_share_a_folder(tmp_path: Path) -> None:
    """As in GlaS: train_1.bmp and train_1_anno.bmp."""
    save_picture(tmp_path / "train_1.bmp")
    save_picture(tmp_path / "train_1_anno.bmp", INST_MAP.astype(np.uint8))
    settings = settings_of("label-images", images=tmp_path, labels={"glands": tmp_path}, suffixes={"glands": "_anno"})
    (entry,) = label_image_entries(settings)
    assert entry.name == "train_1"
    assert np.array_equal(entry.read().labels["glands"], INST_MAP)


@pytest.mark.parametrize("absent", ["images/b.png", "labels/b.png"])
def test_files_without_a_partner_are_named(tmp_path: Path, absent: str) -> None:
    for folder in ("images", "labels"):
        for name in ("a.png", "b.png"):
            save_picture(tmp_path / folder / name)
    (tmp_path / absent).unlink()
    settings = settings_of("label-images", images=tmp_path / "images", labels={"nuclei": tmp_path / "labels"})
    what = "labels without a picture" if absent.startswith("images") else "pictures without labels"
    with pytest.raises(UsageError, match=rf"1 {what} in .* \(b\.png\)"):
        label_image_entries(settings)


def test_masks_are_numbered_where_the_settings_say_so(tmp_path: Path) -> None:
    save_picture(tmp_path / "images" / "a.png")
    save_picture(tmp_path / "labels" / "a.png", np.array([[0, 255, 0, 255], [0, 0, 0, 255], [255, 0, 0, 0]], np.uint8))
    folders = {"images": tmp_path / "images", "labels": {"glands": tmp_path / "labels"}}
    numbered = [[0, 1, 0, 2], [0, 0, 0, 2], [3, 0, 0, 0]]
    for keys in ({"components": True}, {"merged": ["glands"]}):
        (entry,) = label_image_entries(settings_of("label-images", **folders, **keys))
        assert entry.read().labels["glands"].tolist() == numbered
    (entry,) = label_image_entries(settings_of("label-images", **folders))
    assert np.unique(entry.read().labels["glands"]).tolist() == [0, 255]


# Tiles


def test_tiles_of_a_folder_and_of_its_archive_are_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "tiles"
    for number, name in enumerate(("tumour/a.png", "normal/a.png", "normal/b.tif")):
        save_picture(folder / name, np.roll(RGB, number))
    (folder / "normal" / "labels.csv").write_text("nothing to see")
    save_picture(folder / ".hidden" / "c.png")
    with zipfile.ZipFile(tmp_path / "tiles.zip", "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    read = []
    for images in (folder, tmp_path / "tiles.zip"):
        entries = by_name(tile_entries(settings_of("tiles", images=images, types={"*": "Fat"})))
        assert sorted(entries) == ["normal/a", "normal/b", "tumour/a"]
        assert entries["normal/b"].cells == {"folder": "normal"}
        read.append({name: entry.read().rgb for name, entry in entries.items()})
    assert np.array_equal(read[0]["normal/a"], np.roll(RGB, 1))
    assert all(np.array_equal(read[0][name], read[1][name]) for name in read[0])


def test_damaged_archives_and_empty_folders_are_named(tmp_path: Path) -> None:
    def entries(path: Path) -> list[Entry]:
        return tile_entries(settings_of("tiles", images=path, types={"*": "Fat"}))

    with pytest.raises(UsageError, match="no such folder or archive"):
        entries(tmp_path / "absent.zip")
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(UsageError, match=r"cut\.zip: can't be read as a zip archive"):
        entries(tmp_path / "cut.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no picture; known kinds: .png"):
        entries(tmp_path / "empty")
    with zipfile.ZipFile(tmp_path / "flipped.zip", "w") as archive:
        archive.writestr("a.png", b"0123456789" * 20)
    data = bytearray((tmp_path / "flipped.zip").read_bytes())
    data[50] ^= 1
    (tmp_path / "flipped.zip").write_bytes(data)
    (entry,) = entries(tmp_path / "flipped.zip")
    with pytest.raises(UsageError, match=r"flipped\.zip/a\.png: can't be read from the archive .*CRC"):
        entry.read()


# GeoJSON


def write_features(path: Path, *shapes: tuple[tuple[int, int, int, int], str | None]) -> None:
    path.parent.mkdir(exist_ok=True)
    made = []
    for corners, name in shapes:
        properties: dict[str, Any] = {"objectType": "annotation"}
        if name is not None:
            properties["classification"] = {"name": name}
        made.append(
            {"type": "Feature", "geometry": shapely.geometry.mapping(shapely.box(*corners)), "properties": properties}
        )
    path.write_text(json.dumps({"type": "FeatureCollection", "features": made}))


def geojson_settings(folder: Path, **keys: Any) -> Any:
    classes = {"nuclei": {"Tumor": "Epithelial", "Immune cells": None, "": None}, "glands": {"Gland": None}}
    return settings_of("geojson", images=folder / "images", labels=folder / "labels", classes=classes, **keys)


def test_objects_go_to_the_task_of_their_class(tmp_path: Path) -> None:
    save_picture(tmp_path / "images" / "a.png")
    write_features(
        tmp_path / "labels" / "a.geojson",
        ((0, 0, 4, 2), "Gland"),
        ((0, 0, 1, 1), "Tumor"),
        ((1, 0, 3, 1), "Immune cells"),
        ((3, 2, 4, 3), None),
        ((0, 0, 4, 3), "Ignore*"),
    )
    (entry,) = geojson_entries(geojson_settings(tmp_path))
    raw = entry.read()
    assert raw.labels["nuclei"].tolist() == [[2, 3, 3, 0], [0, 0, 0, 0], [0, 0, 0, 4]]
    assert raw.labels["glands"].tolist() == [[1] * 4, [1] * 4, [0] * 4]
    assert raw.class_of == {"nuclei": {2: "Tumor", 3: "Immune cells", 4: ""}, "glands": {1: "Gland"}}
    assert raw.known is None


def test_only_the_labelled_region_is_known(tmp_path: Path) -> None:
    save_picture(tmp_path / "images" / "a.png")
    labels = tmp_path / "labels" / "a.geojson"
    write_features(labels, ((1, 0, 4, 2), "Region*"), ((2, 0, 3, 1), "Tumor"))
    (entry,) = geojson_entries(geojson_settings(tmp_path, region_class="Region*"))
    raw = entry.read()
    assert raw.known is not None
    assert raw.known.tolist() == [[False, True, True, True]] * 2 + [[False] * 4]
    assert raw.labels["nuclei"].tolist() == [[0, 0, 2, 0], [0] * 4, [0] * 4]
    write_features(labels, ((2, 0, 3, 1), "Tumor"))
    with pytest.raises(UsageError, match=r"no area of class 'Region\*'"):
        entry.read()


def test_a_class_of_which_nothing_is_said_is_named(tmp_path: Path) -> None:
    save_picture(tmp_path / "images" / "a.png")
    write_features(tmp_path / "labels" / "a.geojson", ((0, 0, 1, 1), "Tumour"), ((1, 1, 2, 2), "Stroma"))
    (entry,) = geojson_entries(geojson_settings(tmp_path, pass_over=["Stroma"]))
    with pytest.raises(UsageError, match=r"a\.geojson: objects of class 'Tumour', .*did you mean 'Tumor'"):
        entry.read()
