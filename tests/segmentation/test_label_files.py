"""Files of pictures and labels: found, paired with care, read as they are, and drawn from outlines."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import shapely
import tifffile
from PIL import Image
from skimage.draw import polygon2mask

from pathopipe.errors import UsageError
from pathopipe.segmentation.label_files import (
    LABEL_KINDS,
    PICTURE_KINDS,
    draw_features,
    draw_polygons,
    find_files,
    number_regions,
    read_label_image,
    read_rgb,
)

RGB = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
LABELS = np.array([[0, 1, 1, 0], [0, 0, 0, 300], [7, 0, 0, 300]], np.uint16)


@pytest.mark.parametrize("ending", ["png", "bmp", "tif"])
def test_pictures_are_read_as_written(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "tif":
        tifffile.imwrite(path, RGB, photometric="rgb")
    else:
        Image.fromarray(RGB).save(path)
    assert np.array_equal(read_rgb(path), RGB)
    assert np.array_equal(read_rgb(Path("in a zip") / path.name, io.BytesIO(path.read_bytes())), RGB)


def test_grey_and_palette_pictures_turn_into_colours(tmp_path: Path) -> None:
    Image.fromarray(RGB[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(read_rgb(tmp_path / "grey.png"), np.repeat(RGB[..., :1], 3, axis=2))
    flat = Image.new("P", (3, 2), 1)
    flat.putpalette([0, 0, 0, 10, 20, 30])
    flat.save(tmp_path / "palette.png")
    assert read_rgb(tmp_path / "palette.png").tolist() == [[[10, 20, 30]] * 3] * 2


def test_deep_pictures_are_refused_not_cut_off(tmp_path: Path) -> None:
    Image.fromarray(LABELS).save(tmp_path / "deep.png")
    with pytest.raises(UsageError, match=r"deep\.png: uint16 of shape \(3, 4\) is no RGB picture of 8 bits"):
        read_rgb(tmp_path / "deep.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "deep.png").read_bytes()[:40])
    with pytest.raises(UsageError, match=r"cut\.png: can't be read as a picture"):
        read_rgb(tmp_path / "cut.png")


@pytest.mark.parametrize("ending", ["png", "tif", "npy"])
def test_label_images_of_sixteen_bits_are_read_as_written(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "png":
        Image.fromarray(LABELS).save(path)
    elif ending == "tif":
        tifffile.imwrite(path, LABELS)
    else:
        np.save(path, LABELS)
    assert np.array_equal(read_label_image(path).labels, LABELS)


def test_palette_bmp_is_a_label_image(tmp_path: Path) -> None:
    """The annotations of GlaS are BMP files."""
    small = (LABELS % 256).astype(np.uint8)
    picture = Image.fromarray(small, mode="L").convert("P")
    picture.save(tmp_path / "a_anno.bmp")
    assert find_files(tmp_path, LABEL_KINDS, "_anno") == {"a": tmp_path / "a_anno.bmp"}
    assert np.array_equal(read_label_image(tmp_path / "a_anno.bmp").labels, small)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.array([[0.0, 0.5]]), "labels are whole numbers, but 1 pixels are not"),
        (np.zeros((4, 5, 3), np.uint8), r"a colour picture \(4, 5, 3\) is no label image"),
        (np.array([[0, -1]]), "found -1"),
        (np.zeros((2, 3, 4, 5), np.uint8), "no label image"),
        (np.array([["a"]]), "labels are whole numbers, these are"),
    ],
)
def test_what_is_no_label_image_is_refused(tmp_path: Path, array: np.ndarray, said: str) -> None:
    np.save(tmp_path / "odd.npy", array)
    with pytest.raises(UsageError, match=said) as raised:
        read_label_image(tmp_path / "odd.npy")
    assert "odd.npy" in str(raised.value)


def test_colour_coded_png_is_refused(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "colours.png")
    with pytest.raises(UsageError, match="give one channel in which 0 is background"):
        read_label_image(tmp_path / "colours.png")


def test_files_are_found_by_name(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "c.png").touch()
    assert list(find_files(tmp_path, PICTURE_KINDS, "")) == ["a", "b"]
    with pytest.raises(UsageError, match="holds no file of the kinds that are read here"):
        find_files(tmp_path, (".npy",), "")
    (tmp_path / "a.png").touch()
    with pytest.raises(UsageError, match=r"a\.jpg and a\.png are of one image"):
        find_files(tmp_path, PICTURE_KINDS, "")
    with pytest.raises(UsageError, match="no such file or folder"):
        find_files(tmp_path / "absent", PICTURE_KINDS, "")


def test_regions_that_touch_at_a_corner_are_one() -> None:
    mask = np.array([[9, 0, 0, 9], [0, 9, 0, 9]])
    assert number_regions(mask).tolist() == [[1, 0, 0, 2], [0, 1, 0, 2]]


def test_polygons_cover_pixels_whose_centre_is_inside() -> None:
    rng = np.random.default_rng(3)
    corners = rng.uniform(1, 29, (7, 2))
    expected = polygon2mask((30, 30), corners[:, ::-1] - 0.5)  # (row, column) of pixel centres
    drawn = draw_polygons([shapely.Polygon(corners)], 30, 30)
    assert np.array_equal(drawn > 0, expected)
    assert expected.sum() > 50


def test_the_first_polygon_keeps_the_pixel() -> None:
    drawn = draw_polygons([shapely.box(0, 0, 2, 1), shapely.box(1, 0, 4, 1)], 4, 1)
    assert drawn.tolist() == [[1, 1, 2, 2]]
    assert drawn.dtype == np.int32
    assert draw_polygons([], 3, 2).tolist() == [[0, 0, 0], [0, 0, 0]]


def feature(shape: shapely.Polygon, name: str | None, *, nucleus: shapely.Polygon | None = None) -> dict[str, object]:
    made: dict[str, object] = {
        "type": "Feature",
        "geometry": shapely.geometry.mapping(shape),
        "properties": {"objectType": "annotation" if nucleus is None else "cell"},
    }
    if name is not None:
        made["properties"] = {**made["properties"], "classification": {"name": name}}  # type: ignore[dict-item]
    if nucleus is not None:
        made["nucleusGeometry"] = shapely.geometry.mapping(nucleus)
    return made


def test_features_are_drawn_by_choice(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    big, small, other = shapely.box(0, 0, 4, 1), shapely.box(1, 0, 2, 1), shapely.box(3, 0, 4, 1)
    path.write_text(json.dumps([feature(big, "Gland"), feature(small, "Nucleus"), feature(other, None)]))
    drawn = draw_features(path, 4, 1, wanted=lambda name: name == "Nucleus")
    assert drawn.labels.tolist() == [[0, 2, 0, 0]]  # the gland that comes first takes nothing away
    assert drawn.class_of == {2: "Nucleus"}
    assert drawn.notes == ()
    assert draw_features(path, 4, 1, wanted=lambda name: not name).labels.tolist() == [[0, 0, 0, 3]]


def test_cells_are_drawn_by_their_nucleus_on_wish(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps([feature(shapely.box(0, 0, 4, 1), None, nucleus=shapely.box(1, 0, 3, 1))]))
    whole, inner = draw_features(path, 4, 1), draw_features(path, 4, 1, nuclei=True)
    assert whole.labels.tolist() == [[1, 1, 1, 1]]
    assert "drawn by the outer outline" in whole.notes[0][1]
    assert inner.labels.tolist() == [[0, 1, 1, 0]]
    assert inner.notes == ()
