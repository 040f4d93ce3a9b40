"""Files of objects: how they are read, drawn, paired, grouped, scored, and what is refused."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shapely.geometry import LineString, MultiPolygon, Point, Polygon, box, mapping

from pathopipe.errors import GeoJSONError, UsageError
from pathopipe.segmentation.metrics import Panoptic, Tally
from pathopipe.segmentation.score import (
    ClassTally,
    EvaluateConfig,
    FilePair,
    ImageScore,
    class_figures,
    draw_features,
    evaluate_config,
    figures,
    mean_figures,
    multi_class_figures,
    pair_files,
    read_groups,
    read_label_image,
    score_pair,
)

SQUARE = np.zeros((12, 16), np.uint8)
SQUARE[2:6, 2:6] = 1
SQUARE[7:10, 8:14] = 2


def save(path: Path, labels: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, labels)
    elif path.suffix == ".png":
        Image.fromarray(labels).save(path)
    else:
        tifffile.imwrite(path, labels)
    return path


def save_features(path: Path, shapes: list[Any], classes: list[str | None] | None = None) -> Path:
    features = []
    for shape, name in zip(shapes, classes or [None] * len(shapes), strict=True):
        properties: dict[str, Any] = {"objectType": "detection"}
        if name is not None:
            properties["classification"] = {"names": name.split(": "), "color": [1, 2, 3]}
        features.append({"type": "Feature", "geometry": mapping(shape), "properties": properties})
    text = json.dumps({"type": "FeatureCollection", "features": features})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def pair(truth: Path, other: Path) -> FilePair:
    return FilePair(name=truth.stem, truth=truth, other=other)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("a.png", np.uint8),
        ("a.png", np.uint16),
        ("a.tif", np.uint16),
        ("a.tiff", np.int32),
        ("a.tif", np.float32),
        ("a.npy", np.int64),
        ("a.npy", np.float64),
    ],
)
def test_label_images_of_all_kinds(tmp_path: Path, name: str, dtype: Any) -> None:
    high = 40_000 if np.dtype(dtype).itemsize > 1 else 255
    labels = np.where(SQUARE == 2, high, SQUARE).astype(dtype)
    read = read_label_image(save(tmp_path / name, labels))
    assert np.array_equal(read.labels, labels.astype(np.int64))
    assert read.class_of is None
    assert read.notes == ()


def test_a_palette_image_holds_its_indices(tmp_path: Path) -> None:
    picture = Image.fromarray(SQUARE).convert("P")
    picture.putdata(SQUARE.ravel().tolist())
    picture.putpalette([0, 0, 0, 200, 0, 0, 200, 0, 0])  # two labels of one colour
    picture.save(tmp_path / "a.png")
    assert np.array_equal(read_label_image(tmp_path / "a.png").labels, SQUARE)


def test_axes_of_length_one_are_no_fault(tmp_path: Path) -> None:
    assert read_label_image(save(tmp_path / "a.npy", SQUARE[..., None])).labels.shape == SQUARE.shape
    assert read_label_image(save(tmp_path / "b.npy", SQUARE[:1])).labels.shape == (1, 16)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", np.zeros((4, 5, 3), np.uint8), "a colour picture"),
        ("a.tif", np.full((4, 5), 0.5, np.float32), "20 pixels are not"),
        ("a.npy", np.full((4, 5), -1), "found -1"),
        ("a.npy", np.zeros((2, 4, 5), int), "shape"),
        ("a.png", b"no picture", "can't be read"),
        ("a.tif", b"", "can't be read"),
        ("a.npy", b"\x93NUMPY", "can't be read"),
    ],
)
def test_files_that_are_no_label_images(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save(path, content)
    with pytest.raises(UsageError, match=message) as caught:
        read_label_image(path)
    assert str(path) in str(caught.value)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[{}]], object), allow_pickle=True)
    with pytest.raises(UsageError, match="can't be read"):
        read_label_image(tmp_path / "a.npy")


def test_components_of_a_mask(tmp_path: Path) -> None:
    mask = np.array([[255, 0, 0, 255], [0, 255, 0, 255], [0, 0, 0, 0], [255, 255, 0, 255]], np.uint8)
    path = save(tmp_path / "a.png", mask)
    # Pixels that touch at a corner are connected: four regions, not five.
    assert read_label_image(path, components=True).labels.tolist() == [
        [1, 0, 0, 2],
        [0, 1, 0, 2],
        [0, 0, 0, 0],
        [3, 3, 0, 4],
    ]
    ((file, note),) = read_label_image(path).notes
    assert file == "a.png"
    assert "--components" in note
    assert read_label_image(save(tmp_path / "one.png", (SQUARE == 1).astype(np.uint8))).notes == ()
    with pytest.raises(UsageError, match="2 labels, so it is no mask"):
        read_label_image(save(tmp_path / "labels.png", SQUARE), components=True)
    assert read_label_image(save(tmp_path / "bool.npy", mask > 0), components=True).labels.max() == 4


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_drawing_takes_pixels_by_their_centres(tmp_path: Path) -> None:
    shapes = [box(1, 1, 3, 2), box(4.4, 0.6, 5.6, 2.4), box(6.6, 0, 7.4, 3)]
    drawn = draw_features(save_features(tmp_path / "a.geojson", shapes), 8, 3)
    # The second covers the centres 4.5 and 5.5 of one row; the third covers none.
    assert drawn.labels.tolist() == [[0] * 8, [0, 1, 1, 0, 2, 2, 0, 0], [0] * 8]
    assert drawn.notes == (
        ("a.geojson", "1 object (no. 3) without a pixel: outside the 8 x 3 px, covered, or too small"),
    )
    assert drawn.class_of == {}


def test_holes_and_parts_are_drawn(tmp_path: Path) -> None:
    ring = Polygon([(0, 0), (5, 0), (5, 5), (0, 5)], [[(1, 1), (4, 1), (4, 4), (1, 4)]])
    parts = MultiPolygon([box(2, 2, 3, 3), box(6, 0, 8, 1)])
    drawn = draw_features(save_features(tmp_path / "a.geojson.gz", [ring, parts], ["Gland", "Tumor: Positive"]), 8, 5)
    expected = np.zeros((5, 8), int)
    expected[:, :5] = 1
    expected[1:4, 1:4] = 0
    expected[2, 2] = expected[0, 6:] = 2
    assert drawn.labels.tolist() == expected.tolist()
    assert drawn.class_of == {1: "Gland", 2: "Tumor: Positive"}


def test_of_overlapping_objects_the_first_stays(tmp_path: Path) -> None:
    shapes = [box(0, 0, 4, 4), box(2, 2, 6, 6), box(3, 3, 4, 4), box(5, 5, 9, 9)]
    drawn = draw_features(save_features(tmp_path / "a.geojson", shapes), 8, 8)
    assert (drawn.labels == 1).sum() == 16
    assert (drawn.labels == 2).sum() == 16 - 4
    assert (drawn.labels == 4).sum() == 9 - 1  # cut at the border, and one pixel belongs to object 2
    overlap, absent = drawn.notes
    assert overlap[1].startswith("6 px of 3 objects (no. 2, no. 3, no. 4) are covered by an object that comes earlier")
    assert absent[1].startswith("1 object (no. 3) without a pixel")


def test_what_is_not_drawn_is_counted(tmp_path: Path) -> None:
    shapes = [Point(1, 1), LineString([(0, 0), (4, 4)]), box(0, 0, 2, 2), box(4, 0, 6, 2)]
    path = save_features(tmp_path / "a.geojson", shapes, [None, None, "Tumor", "Region*"])
    drawn = draw_features(path, 8, 8)
    assert np.unique(drawn.labels).tolist() == [0, 3]
    assert [note for _, note in drawn.notes] == [
        "2 points and lines passed over",
        "1 object of ignored classes passed over",
    ]


def test_cells_are_drawn_by_their_outline_and_said_so(tmp_path: Path) -> None:
    feature = {
        "type": "Feature",
        "geometry": mapping(box(0, 0, 4, 4)),
        "nucleusGeometry": mapping(box(1, 1, 2, 2)),
        "properties": {"objectType": "cell"},
    }
    (tmp_path / "a.geojson").write_text(json.dumps(feature))
    drawn = draw_features(tmp_path / "a.geojson", 8, 8)
    assert drawn.labels.sum() == 16
    assert drawn.notes == (("a.geojson", "1 cell drawn by the outer outline, not by the nucleus"),)


def test_an_empty_collection_is_an_empty_image(tmp_path: Path) -> None:
    path = save_features(tmp_path / "a.geojson", [])
    assert not draw_features(path, 8, 4).labels.any()
    assert draw_features(path, 8, 4).labels.shape == (4, 8)
    for text in ("", "[]", '{"type":"FeatureCollection"}', '{"type":"FeatureCollection","features":[{"type":'):
        path.write_text(text)
        with pytest.raises(GeoJSONError):
            draw_features(path, 8, 4)


@settings(max_examples=40)
@given(st.integers(0, 10_000))
def test_drawing_agrees_with_points_in_polygons(seed: int) -> None:
    """Rings of any shape, vertices on pixel centres too; what lies beyond the image is cut off."""
    import tempfile

    rng = np.random.default_rng(seed)
    shapes = []
    for _ in range(4):
        angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
        radius = rng.uniform(1, 7, len(angle))
        xy = rng.uniform(-2, 14, 2) + np.stack([np.cos(angle) * radius, np.sin(angle) * radius], axis=1)
        polygon = Polygon(np.round(xy, 2) + 0.003)  # no vertex and no edge runs through a centre
        if polygon.is_valid and polygon.area > 0.1:
            shapes.append(polygon)
    if not shapes:
        return
    with tempfile.TemporaryDirectory() as folder:
        drawn = draw_features(save_features(Path(folder) / "a.geojson", shapes), 13, 11).labels
    y, x = np.mgrid[:11, :13] + 0.5
    expected = np.zeros((11, 13), int)
    for number, shape in reversed(list(enumerate(shapes, 1))):
        expected[shapely.contains_xy(shape, x, y)] = number
    assert np.array_equal(drawn, expected)


def test_images_too_large_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="100000 x 100000 px are too many"):
        draw_features(save_features(tmp_path / "a.geojson", []), 100_000, 100_000)


# --- pairing ----------------------------------------------------------------------------------------------------------


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def pairing(tmp_path: Path, **settings: Any) -> list[tuple[str, str, str]]:
    config = EvaluateConfig(truth=tmp_path / "truth", predicted=tmp_path / "found", **settings)
    return [(each.name, each.truth.name, each.other.name) for each in pair_files(config).pairs]


def test_pairs_by_stem_whatever_the_ending(tmp_path: Path) -> None:
    touch(tmp_path / "truth", "a.png", "b.1.TIF", "c.geojson.gz", ".hidden.png", "index.csv")
    touch(tmp_path / "found", "a.npy", "b.1.geojson", "c.json", "notes.txt")
    (tmp_path / "found" / "d.png").mkdir()
    assert pairing(tmp_path) == [
        ("a", "a.png", "a.npy"),
        ("b.1", "b.1.TIF", "b.1.geojson"),
        ("c", "c.geojson.gz", "c.json"),
    ]


def test_pairs_with_suffixes(tmp_path: Path) -> None:
    touch(tmp_path / "truth", "a.png", "a_mask.png", "b_mask.png")
    touch(tmp_path / "found", "a_pred.png", "b_pred.tif")
    assert pairing(tmp_path, truth_suffix="_mask", predicted_suffix="_pred") == [
        ("a", "a_mask.png", "a_pred.png"),
        ("b", "b_mask.png", "b_pred.tif"),
    ]


def test_two_files_are_a_pair_and_a_file_picks_from_a_folder(tmp_path: Path) -> None:
    truth, found = touch(tmp_path / "truth", "a.png", "b.png"), touch(tmp_path / "found", "a.npy", "x.npy")
    one = pair_files(EvaluateConfig(truth=truth / "a.png", predicted=found / "x.npy"))
    assert one.pairs == (FilePair(name="a", truth=truth / "a.png", other=found / "x.npy"),)
    picked = pair_files(EvaluateConfig(truth=truth, predicted=found / "a.npy"))
    assert [each.name for each in picked.pairs] == ["a"]
    assert picked.truth_only == ()
    with pytest.raises(UsageError, match="no file of"):
        pair_files(EvaluateConfig(truth=truth, predicted=found / "x.npy"))


def test_files_without_a_partner(tmp_path: Path) -> None:
    truth, found = touch(tmp_path / "truth", "a.png", "b.png"), touch(tmp_path / "found", "a.png", "c.png")
    with pytest.raises(UsageError, match=r"1 in .*truth \(b.png\); 1 in .*found \(c.png\).*--allow-missing"):
        pairing(tmp_path)
    passed = pair_files(EvaluateConfig(truth=truth, predicted=found, allow_missing=True))
    assert [each.name for each in passed.pairs] == ["a"]
    assert (passed.truth_only, passed.other_only) == ((truth / "b.png",), (found / "c.png",))


@pytest.mark.parametrize(
    ("truth", "found", "message"),
    [
        (["a.png", "a.tif"], ["a.png"], "a.png and a.tif are of one image"),
        (["a.png"], ["b.png"], r"no file of .* has the name of one of .* \(a.png against b.png\)"),
        (["a.txt"], ["a.png"], "holds no file of the kinds"),
        (["a.png"], None, "no such file or folder"),
    ],
)
def test_folders_that_make_no_pairs(tmp_path: Path, truth: list[str], found: list[str] | None, message: str) -> None:
    touch(tmp_path / "truth", *truth)
    if found is not None:
        touch(tmp_path / "found", *found)
    with pytest.raises(UsageError, match=message):
        pairing(tmp_path)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    folder = touch(tmp_path, "a.docx", "a.png")
    with pytest.raises(UsageError, match=r"a.docx: .docx is none of the kinds"):
        pair_files(EvaluateConfig(truth=folder / "a.docx", predicted=folder / "a.png"))


def test_pictures_may_be_jpeg_but_labels_not(tmp_path: Path) -> None:
    touch(tmp_path / "truth", "a.png")
    touch(tmp_path / "images", "a.jpg")
    config = EvaluateConfig(truth=tmp_path / "truth", images=tmp_path / "images", mpp=0.5)
    assert pair_files(config).pairs[0].other.name == "a.jpg"
    with pytest.raises(UsageError, match="no file of the kinds"):
        pair_files(EvaluateConfig(truth=tmp_path / "truth", predicted=tmp_path / "images"))


def test_groups_of_a_table(tmp_path: Path) -> None:
    table = tmp_path / "index.csv"
    table.write_text("\ufeffname,stain,n\na.png,white,3\nb,pink,4\nc.d,pink,5\nc,white,6\n", encoding="utf-8")

    def groups(by: str, names: list[str]) -> dict[str, str]:
        return read_groups(EvaluateConfig(truth=tmp_path, predicted=tmp_path, group=table, group_by=by), names)

    assert groups("stain", ["a", "b", "c.d"]) == {"a": "white", "b": "pink", "c.d": "pink"}
    with pytest.raises(UsageError, match="no column 'stian'; did you mean 'stain'"):
        groups("stian", ["a"])
    with pytest.raises(UsageError, match=r"column 'name' lacks 2 images \(x, y\)"):
        groups("stain", ["a", "x", "y"])
    assert groups("stain", ["c"]) == {"c": "white"}
    assert read_groups(EvaluateConfig(truth=tmp_path, predicted=tmp_path), ["a"]) == {"a": ""}
    table.write_text("name,stain\na.png,white\na,white\nb,white\nb.tif,pink\n")
    with pytest.raises(UsageError, match="'b' is in two groups, 'white' and 'pink'"):
        groups("stain", ["a"])
    table.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="can't be read"):
        groups("stain", ["a"])


# --- settings ---------------------------------------------------------------------------------------------------------


def test_options_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "evaluate.yaml"
    file.write_text("truth: t\npredicted: p\nmpp: 0.5\nclasses: [a, b]\nallow_missing: true\n")
    config = evaluate_config(file, {"mpp": 0.25, "truth": None, "allow_missing": False})
    assert (config.truth, config.predicted, config.mpp, config.classes) == (Path("t"), Path("p"), 0.25, ("a", "b"))
    assert config.allow_missing is False
    other = evaluate_config(file, {"images": Path("i"), "classes": "x, y"})
    assert (other.predicted, other.images, other.classes) == (None, Path("i"), ("x", "y"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("truth: t\npredictd: p", "unknown key 'predictd'; did you mean 'predicted'"),
        ("predicted: p", "truth is missing"),
        ("truth: t", "give either predicted .* or images"),
        ("truth: t\npredicted: p\nimages: i", "give either predicted .* or images"),
        ("truth: t\nimages: i", "give mpp"),
        ("truth: t\npredicted: p\nmpp: 0", "mpp: .*, got 0"),
        ("truth: t\npredicted: p\nradius_um: -1", "radius_um: .*, got -1"),
        ("truth: t\npredicted: p\nsize: 100", "size"),
        ("truth: t\npredicted: p\nsize: 0 x 5", "write '0 x 5' as WIDTHxHEIGHT"),
        ("truth: t\npredicted: p\ngroup: g.csv", "go together"),
        ("truth: t\npredicted: p\nprotocol: mean", "protocol: .*, got 'mean'"),
        ("truth: t\nimages: p\nmpp: 1\nmodel: stardist", "model: .*, got 'stardist'"),
        ("- truth", "a config is a mapping of keys"),
        ("truth: [", "not valid YAML"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "evaluate.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        evaluate_config(file, {})
    assert str(file) in str(caught.value)


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be read"):
        evaluate_config(tmp_path / "absent.yaml", {})


def test_size() -> None:
    assert EvaluateConfig(truth=Path(), predicted=Path(), size=" 20 X 30").size_px == (20, 30)


# --- scoring ----------------------------------------------------------------------------------------------------------


def test_a_label_image_against_a_drawing(tmp_path: Path) -> None:
    truth = save(tmp_path / "a.png", SQUARE)
    found = save_features(tmp_path / "a.geojson", [box(2, 2, 6, 6), box(8, 7, 14, 9)])
    score = score_pair(pair(truth, found), EvaluateConfig(truth=truth, predicted=found))
    # 16 px equal; 12 of 18 px: IoU 1 and 2/3.
    assert score.tally.panoptic == Panoptic(tp=2, fp=0, fn=0, iou_sum=1 + 12 / 18)
    assert score.tally.pixels.dice == pytest.approx(2 * 28 / (34 + 28))
    assert math.isnan(figures(score.tally, None)["f1_distance"])
    back = score_pair(pair(found, truth), EvaluateConfig(truth=found, predicted=truth))
    assert back.tally.panoptic == score.tally.panoptic


def test_micrometres(tmp_path: Path) -> None:
    truth = save(tmp_path / "a.npy", SQUARE)
    found = save(tmp_path / "b.npy", np.roll(SQUARE, 2, axis=1))
    config = EvaluateConfig(truth=truth, predicted=found, mpp=0.5, radius_um=1.0, glands=True)
    score = score_pair(pair(truth, found), config)
    assert score.tally.detection.tp == 2  # 2 px are exactly 1 um
    assert score.tally.glands.hausdorff_px == 2
    assert figures(score.tally, 0.5)["object_hausdorff"] == 1.0
    assert figures(score.tally, None)["object_hausdorff"] == 2.0
    assert score_pair(pair(truth, found), config.model_copy(update={"mpp": 0.51})).tally.detection.tp == 0


def test_two_drawings_need_a_size(tmp_path: Path) -> None:
    path = save_features(tmp_path / "a.geojson", [box(0, 0, 4, 4)])
    with pytest.raises(UsageError, match="a: both sides are GeoJSON.*--size"):
        score_pair(pair(path, path), EvaluateConfig(truth=path, predicted=path))
    score = score_pair(pair(path, path), EvaluateConfig(truth=path, predicted=path, size="8x8"))
    assert score.tally.pixels.truth_px == 16


def test_sizes_differ(tmp_path: Path) -> None:
    truth, found = save(tmp_path / "a.png", SQUARE), save(tmp_path / "b.png", SQUARE[:, :-1])
    with pytest.raises(UsageError, match="a: the truth a.png has 16 x 12 px, b.png has 15 x 12 px"):
        score_pair(pair(truth, found), EvaluateConfig(truth=truth, predicted=found))


def test_components_of_one_side(tmp_path: Path) -> None:
    truth, found = save(tmp_path / "a.png", (SQUARE > 0).astype(np.uint8) * 255), save(tmp_path / "b.png", SQUARE)
    config = EvaluateConfig(truth=truth, predicted=found, components="truth")
    assert score_pair(pair(truth, found), config).tally.panoptic.pq == 1
    with pytest.raises(UsageError, match="b.png: holds 2 labels, so it is no mask"):
        score_pair(pair(truth, found), config.model_copy(update={"components": "both"}))


def test_classes(tmp_path: Path) -> None:
    shapes = [box(0, 0, 4, 4), box(5, 0, 9, 4), box(10, 0, 14, 4), box(0, 5, 4, 9)]
    truth = save_features(tmp_path / "a.geojson", shapes, ["Tumor", "Tumor", "Stroma", None])
    found = save_features(tmp_path / "b.geojson", shapes[:3], ["Tumor", "Stroma", "Stroma"])
    config = EvaluateConfig(truth=truth, predicted=found, size="16x16", classes="all", mpp=0.5)
    score = score_pair(pair(truth, found), config)
    assert set(score.classes) == {"Stroma", "Tumor"} == score.classes_seen
    assert score.classes["Tumor"].panoptic == Panoptic(tp=1, fp=0, fn=1, iou_sum=1.0)
    assert score.classes["Stroma"].panoptic == Panoptic(tp=1, fp=1, fn=0, iou_sum=1.0)
    assert (score.classes["Tumor"].types.tp, score.classes["Tumor"].types.fn) == (1, 1)
    assert score.tally.panoptic.tp == 3  # classes do not matter here
    assert score.notes == (("a.geojson", "1 object without a class, in no class's figures"),)
    some = score_pair(pair(truth, found), config.model_copy(update={"classes": ("Stroma", "Necrosis")}))
    assert some.classes["Stroma"].panoptic == score.classes["Stroma"].panoptic
    assert math.isnan(some.classes["Necrosis"].panoptic.pq)
    image = save(tmp_path / "c.png", np.zeros((16, 16), np.uint8))
    with pytest.raises(UsageError, match="c.png: a label image holds no classes"):
        score_pair(pair(truth, image), EvaluateConfig(truth=truth, predicted=image, classes="all"))


# --- over images ------------------------------------------------------------------------------------------------------


def score_of(panoptic: Panoptic, classes: dict[str, Panoptic] | None = None) -> ImageScore:
    by_class = {
        name: ClassTally(panoptic=each, n_truth=each.tp + each.fn, n_predicted=each.tp + each.fp)
        for name, each in (classes or {}).items()
    }
    n_truth, n_predicted = panoptic.tp + panoptic.fn, panoptic.tp + panoptic.fp
    return ImageScore(
        name="x", tally=Tally(n_truth=n_truth, n_predicted=n_predicted, panoptic=panoptic), classes=by_class
    )


def test_means_leave_out_images_without_objects_and_pooling_weighs_by_objects() -> None:
    good, bad, none = Panoptic(tp=1, iou_sum=0.8), Panoptic(fp=3, fn=6), Panoptic()
    scores = [score_of(good), score_of(bad), score_of(none)]
    # PQ 0.8, 0 and undefined.
    assert mean_figures(scores)["pq"] == (pytest.approx(0.4), 2)
    # Pooled: 0.8 / (1 + 1.5 + 3).
    assert figures(sum((s.tally for s in scores), Tally()), None)["pq"] == pytest.approx(0.8 / 5.5)
    mean, n = mean_figures(scores)["dice"]
    assert (math.isnan(mean), n) == (True, 0)


def test_pannuke_and_conic_protocols() -> None:
    first = score_of(
        Panoptic(tp=2, fp=0, fn=0, iou_sum=1.6), {"a": Panoptic(tp=1, iou_sum=0.8), "b": Panoptic(tp=1, iou_sum=0.6)}
    )
    # Class b is absent from this truth, but was found twice; class c is nowhere.
    second = score_of(
        Panoptic(tp=1, fp=2, fn=0, iou_sum=0.9),
        {"a": Panoptic(tp=1, iou_sum=0.9), "b": Panoptic(fp=2), "c": Panoptic()},
    )
    # No true object at all, but one was found.
    third = score_of(Panoptic(fp=1), {"a": Panoptic(fp=1)})
    over = multi_class_figures([first, second, third])
    # PanNuke: image 1 (0.8 + 0.6) / 2, image 2 only a, 0.9; image 3 is left out.
    assert over["mpq"] == (pytest.approx((0.7 + 0.9) / 2), 2)
    # All classes as one: 1.6 / 2 and 0.9 / (1 + 1).
    assert over["bpq"] == (pytest.approx((0.8 + 0.45) / 2), 2)
    # CoNIC: a 1.7 / (2 + 0.5), b 0.6 / (1 + 1), c left out.
    assert over["mpq_plus"] == (pytest.approx((1.7 / 2.5 + 0.3) / 2), 2)
    # Counts of a: truth 1, 1, 0 and found 1, 1, 1: 1 - 1 / (2/3). Of b: truth 1, 0, 0 and found 1, 2, 0: 1 - 4 / (2/3).
    assert over["r2"] == (pytest.approx(((1 - 1.5) + (1 - 6)) / 2), 2)
    by_class = class_figures([first, second, third])
    assert by_class["a"]["pq_mean"] == pytest.approx(0.85)
    assert (by_class["a"]["n_truth"], by_class["a"]["n_predicted"], by_class["a"]["n_images"]) == (2, 3, 2)
    assert by_class["b"]["pq"] == pytest.approx(0.3)
    assert math.isnan(by_class["c"]["pq"])


@pytest.mark.shared_data
def test_real_nuclei_moved_by_two_pixels(shared_data: Path, tmp_path: Path) -> None:
    truth = sorted((shared_data / "nuclei" / "dsb2018" / "labels").glob("*.png"))[0]
    labels = read_label_image(truth).labels
    moved = save(tmp_path / "moved.npy", np.roll(labels, 2, axis=1))
    config = EvaluateConfig(truth=truth, predicted=moved, mpp=0.25)
    score = score_pair(pair(truth, moved), config)
    assert score.tally.n_truth == len(np.unique(labels)) - 1 == 86
    assert 0.3 < score.tally.panoptic.pq < score.tally.panoptic.dq < 1
    same = score_pair(pair(truth, truth), config)
    assert same.tally.panoptic.pq == same.tally.aji.jaccard == same.tally.detection.f1 == 1
