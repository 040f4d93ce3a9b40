"""Corrected objects come back as they were drawn: in the store, and as training labels."""

import json
import logging
import uuid
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import shapely
import tifffile
from numpy.typing import NDArray

from pathopipe.errors import GeoJSONError, UsageError
from pathopipe.export.objects import export_layer, id_texts
from pathopipe.geojson import stable_ids
from pathopipe.geometry import BoxL0, outlines_from_shapes, outlines_to_shapes
from pathopipe.records import Level, ObjectClass, ObjectTable, SlideInfo
from pathopipe.segmentation import importing
from pathopipe.segmentation.importing import import_objects, open_store, read_corrected, write_labels
from pathopipe.store import SlideStore, store_path

CLASSES = (ObjectClass("Stroma", (0, 90, 20)), ObjectClass("Tumor: Positive", (200, 0, 0)))
ID = "6423a977-ffff-48db-affc-cd11632010f0"


def make_store(folder: Path, bounds: BoxL0 | None = None) -> SlideStore:
    info = SlideInfo(
        slide_id="s1",
        path=Path("s1.svs"),
        reader="array",
        vendor="generic",
        dims_l0=(50_000, 40_000),
        levels=(Level(50_000, 40_000, 1.0, 1.0),),
        size_bytes=10,
        fingerprint="abc",
        mpp=(0.25, 0.25),
        bounds_l0=bounds,
    )
    return SlideStore.create_or_open(store_path(folder, "s1"), info, created_by="test")


def blobs(xy_l0: NDArray[np.float64], radius_px: float) -> NDArray[np.object_]:
    """Octagons on the grid of quarter pixels; every fifth has a hole, every seventh a second part."""
    angle = np.arange(8) * np.pi / 4
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    shapes = np.empty(len(xy_l0), object)
    for row, corner in enumerate(np.rint(xy_l0 * 4) / 4):
        outer, inner = (np.rint(size * ring * 4) / 4 + corner for size in (radius_px, radius_px / 3))
        shapes[row] = shapely.Polygon(outer, [inner] if row % 5 == 0 else None)
        if row % 7 == 0:
            shapes[row] = shapely.MultiPolygon([shapes[row], shapely.Polygon(np.add(inner, (3 * radius_px, 0)))])
    return shapes


def make_table(shapes: Any, layer: str = "nuclei", parent_layer: str | None = None) -> ObjectTable:
    n = len(shapes)
    return ObjectTable(
        classes=CLASSES,
        measurement_names=("Area µm^2", "Odd"),
        centroid_l0=shapely.get_coordinates(shapely.centroid(shapes)),
        class_id=(np.arange(n) // 2 % 2).astype(np.uint8),
        class_probability=np.where(np.arange(n) % 3 == 0, np.nan, 0.75).astype(np.float32),
        measurements=np.stack([np.arange(n) * 1.5, np.where(np.arange(n) % 2, np.nan, 7)], 1).astype(np.float32),
        outlines=outlines_from_shapes(shapes),
        id=stable_ids("s1", layer, range(n)),
        parent=np.arange(n) if parent_layer else np.full(n, -1),
        parent_layer=parent_layer,
    )


def in_order(shapes: NDArray[np.object_]) -> NDArray[np.object_]:
    xy = shapely.get_coordinates(shapely.centroid(shapes))
    return shapes[np.lexsort((xy[:, 0], xy[:, 1]))]


def nuclei_table(n: int = 50) -> ObjectTable:
    xy = np.random.default_rng(0).uniform(1000, 9000, (n, 2))
    return make_table(in_order(blobs(xy, 10)))


def same(one: ObjectTable, other: ObjectTable) -> None:
    # Parts and rings may begin elsewhere; no vertex moves.
    shapes = (shapely.normalize(outlines_to_shapes(table.outlines)) for table in (one, other))
    assert shapely.equals_exact(*shapes).all()
    assert np.array_equal(one.id, other.id)
    assert [one.classes[k] for k in one.class_id] == [other.classes[k] for k in other.class_id]
    assert np.allclose(one.centroid_l0, other.centroid_l0)
    assert np.allclose(one.class_probability, other.class_probability, equal_nan=True)
    assert one.measurement_names == other.measurement_names
    assert np.allclose(one.measurements, other.measurements, rtol=1e-6, equal_nan=True)


def square(x: float, y: float, side: float = 10, **properties: Any) -> dict[str, Any]:
    id = properties.pop("id", None)
    nucleus = properties.pop("nucleus", None)
    made: dict[str, Any] = {
        "type": "Feature",
        "geometry": shapely.geometry.mapping(shapely.box(x, y, x + side, y + side)),
        "properties": {"objectType": "annotation", **properties},
    }
    if id is not None:
        made["id"] = id
    if nucleus is not None:
        made["nucleusGeometry"] = shapely.geometry.mapping(nucleus)
    return made


def write(path: Path, *features: Any) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")
    return path


# ---- round trip


@pytest.mark.parametrize("bounds", [None, BoxL0(500, 700, 30_000, 30_000)])
def test_what_is_exported_comes_back_the_same(tmp_path: Path, bounds: BoxL0 | None) -> None:
    store = make_store(tmp_path, bounds)
    before = nuclei_table()
    store.write_objects("nuclei", [before], about={"inputs": {"a": 1}})
    made = export_layer(store, "nuclei", tmp_path / "q")
    report = import_objects(store, [made.files[0].path], "nuclei", replace_layer=True)
    after = store.objects("nuclei")
    same(before, after.read())
    assert after.classes == CLASSES
    assert (report.objects, report.replaced, report.notes) == ({"nuclei": 50}, {"nuclei": 50}, ())
    assert report.classes == {"Stroma": 26, "Tumor: Positive": 24}
    assert after.attributes["object_type"] == "detection"
    assert len(after.attributes["inputs"]["imported"]) == 64
    # And once more.
    again = export_layer(store, "nuclei", tmp_path / "q2")
    import_objects(store, [again.files[0].path], "second")
    same(before, store.objects("second").read())


def test_cells_come_back_as_two_layers(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    nuclei = nuclei_table()
    shapes = outlines_to_shapes(nuclei.outlines)
    cells = make_table(shapely.buffer(shapes, 6), "cells", "nuclei")
    cells = importing.replace(cells, centroid_l0=nuclei.centroid_l0)
    cells.outlines.vertices_l0[:] = np.rint(cells.outlines.vertices_l0 * 4) / 4
    store.write_objects("nuclei", [nuclei], about={"inputs": {"a": 1}})
    store.write_objects("cells", [cells], about={"inputs": {"a": 2}})
    made = export_layer(store, "cells", tmp_path / "q")
    report = import_objects(store, [made.files[0].path], "cells", replace_layer=True)
    assert report.objects == {"nuclei": 50, "cells": 50}
    assert report.replaced == {"nuclei": 50, "cells": 50}
    after = store.objects("cells")
    assert after.parent_layer == "nuclei"
    assert np.array_equal(after.column("parent"), np.arange(50))
    assert np.array_equal(after.column("id"), cells.id)
    inner = store.objects("nuclei").read()
    # The nuclei's ids are not in the file; the store knew them.
    assert np.array_equal(inner.id, nuclei.id)
    assert shapely.equals(outlines_to_shapes(inner.outlines), shapes).all()
    assert after.attributes["object_type"] == "cell"
    assert store.objects("nuclei").attributes["object_type"] == "detection"
    assert [problem.what for problem in store.problems() if problem.where.startswith("objects")] == []


def test_cells_of_a_new_layer_give_their_nuclei_to_a_layer_beside_it(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    cell = square(
        100,
        100,
        30,
        id=ID,
        objectType="cell",
        nucleus=shapely.box(110, 110, 120, 120),
        measurements={"Nucleus: Area µm^2": 6.25, "Cell: Area µm^2": 56.25},
    )
    path = write(tmp_path / "a.geojson", square(200, 90, 30, objectType="cell"), cell)
    with pytest.raises(UsageError, match="--layer cells makes the layers cells and nuclei"):
        import_objects(store, [path], "nuclei")
    assert store.layers() == []
    import_objects(store, [path], "checked")
    cells, nuclei = store.objects("checked"), store.objects("checked-nuclei")
    assert cells.parent_layer == "checked-nuclei"
    # Rows are in the order of nuclei's centroids: the cell without one lies higher up.
    assert cells.column("parent").tolist() == [-1, 0]
    assert cells.column("centroid_l0").tolist() == [[215, 105], [115, 115]]
    assert cells.measurement_names == ("Nucleus: Area µm^2", "Cell: Area µm^2")
    assert nuclei.measurement_names == ("Area µm^2",)
    assert nuclei.column("measurements").tolist() == [[6.25]]
    own = uuid.UUID(bytes=nuclei.column("id").tobytes())
    assert own == uuid.uuid5(uuid.UUID(ID), "nucleus")


def test_all_files_of_a_split_layer_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path)
    before = nuclei_table()
    store.write_objects("nuclei", [before], about={"inputs": {"a": 1}})
    monkeypatch.setattr("pathopipe.export.objects._MAX_POLYGONS", 20)
    made = export_layer(store, "nuclei", tmp_path / "q")
    paths = [file.path for file in made.files if file.kind == "polygons"]
    assert len(paths) > 2
    with pytest.raises(UsageError, match=f"give the others too: s1.nuclei-1of{len(paths)}.geojson"):
        import_objects(store, paths[1:], "nuclei", replace_layer=True)
    with pytest.raises(UsageError, match="given twice"):
        import_objects(store, [*paths, paths[0]], "nuclei", replace_layer=True)
    import_objects(store, paths[::-1], "nuclei", replace_layer=True)
    same(before, store.objects("nuclei").read())


# ---- classes, ids, measurements


def test_classes_keep_names_and_colours(tmp_path: Path) -> None:
    def classed(x: float, name: str | None, color: list[int] | None = None) -> dict[str, Any]:
        if name is None:
            return square(x, 10, color=[1, 2, 3])
        return square(x, 10, classification={"name": name} if color is None else {"name": name, "color": color})

    path = write(
        tmp_path / "a.geojson",
        classed(0, None),
        classed(20, "Ignore*", [9, 9, 9]),
        classed(40, "Mine", [1, 1, 1]),
        classed(60, "Stroma"),
        classed(80, "New"),
        classed(100, "Mine", [7, 7, 7]),
        square(120, 10, classification={"names": ["Tumor", "Positive"], "color": [2, 2, 2]}),
    )
    store = make_store(tmp_path)
    store.write_objects("nuclei", [nuclei_table()], about={"inputs": {}})
    report = import_objects(store, [path], "mine")
    array = store.objects("mine")
    # Known classes first, in their order; then the others as they turn up.
    assert [each.name for each in array.classes] == [
        "Stroma",
        "Tumor: Positive",
        "Unclassified",
        "Ignore",
        "Mine",
        "New",
    ]
    colors = {each.name: each.color for each in array.classes}
    assert colors["Stroma"] == (0, 90, 20)
    assert colors["Tumor: Positive"] == (2, 2, 2)
    assert colors["Unclassified"] == (128, 128, 128)
    assert colors["Mine"] == (1, 1, 1)
    names = [array.classes[k].name for k in array.column("class_id")]
    assert names == ["Unclassified", "Ignore", "Mine", "Stroma", "New", "Mine", "Tumor: Positive"]
    assert report.notes == ("1 classes whose name ends in '*' renamed ('Ignore*' to 'Ignore')",)
    export_layer(store, "mine", tmp_path / "q")


def test_only_the_classes_that_were_named(tmp_path: Path) -> None:
    stroma = square(0, 0, id=ID, classification={"name": "Stroma", "color": [1, 2, 3]})
    path = write(tmp_path / "a.geojson", stroma)
    kept = read_corrected([path], slide_id="s1", layer="x", classes=["Tumor", "Stroma"]).objects
    assert [each.name for each in kept.classes] == ["Tumor", "Stroma"]
    assert kept.class_id.tolist() == [1]
    with pytest.raises(
        UsageError, match=f"{ID} is of class 'Stroma'; --classes allows Tumor, Stoma: the nearest is 'Stoma'"
    ):
        read_corrected([path], slide_id="s1", layer="x", classes=["Tumor", "Stoma"])
    path = write(tmp_path / "a.geojson", stroma, square(20, 0))
    with pytest.raises(UsageError, match="object 2 has no class; --classes allows Stroma"):
        read_corrected([path], slide_id="s1", layer="x", classes=["Stroma"])


def test_ids_stay_where_they_are_uuids_and_are_made_where_not(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.geojson",
        square(0, 0, id=ID.upper()),
        square(20, 0, id="PathAnnotationObject"),
        square(40, 0, id=17),
        square(60, 0),
        square(80, 0, id=ID),
    )
    first = read_corrected([path], slide_id="s1", layer="x")
    ids = id_texts(first.objects.id)
    assert ids[0] == ID
    assert len(set(ids)) == 5
    assert first.notes == (f"1 ids that stood there twice replaced by new ones ({ID})",)
    assert id_texts(read_corrected([path], slide_id="s1", layer="x").objects.id) == ids
    assert not set(ids[1:]) & set(id_texts(read_corrected([path], slide_id="s2", layer="x").objects.id))
    # Objects that were segmented have the ids of their row numbers; new ones must not hit upon these.
    assert not set(ids) & set(id_texts(stable_ids("s1", "x", range(10))))


def test_measurements_are_numbers_or_nothing(tmp_path: Path) -> None:
    text = (
        '{"type":"FeatureCollection","features":['
        + json.dumps(square(0, 0, measurements={"Area µm^2": 4, "Class probability": 0.5, "": 3}))
        + ","
        + json.dumps(square(20, 0, measurements={"Text": "no", "None": None, "Huge": 1e300, "Odd": 2.5, "Bad": "NAN"}))
        + "]}"
    )
    path = tmp_path / "a.geojson"
    path.write_text(text.replace('"NAN"', "NaN"), encoding="utf-8")
    made = read_corrected([path], slide_id="s1", layer="x")
    assert made.objects.measurement_names == ("Area µm^2", "Huge", "Odd")
    assert np.allclose(made.objects.measurements, [[4, np.nan, np.nan], [np.nan, np.nan, 2.5]], equal_nan=True)
    assert np.allclose(made.objects.class_probability, [0.5, np.nan], equal_nan=True)
    assert made.notes == ("1 measurements beyond single precision left out (Huge)",)


# ---- what does not fit


def test_points_set_by_hand_are_an_error_and_others_are_counted(tmp_path: Path) -> None:
    points = {
        "type": "Feature",
        "id": ID,
        "geometry": {"type": "MultiPoint", "coordinates": [[1, 2], [3, 4], [5, 6]]},
        "properties": {"objectType": "annotation", "classification": {"name": "Tumor", "color": [1, 2, 3]}},
    }
    with pytest.raises(GeoJSONError, match=rf"1 annotations that are points \({ID}: 3 points of class Tumor\)"):
        read_corrected([write(tmp_path / "a.geojson", points, square(0, 0))], slide_id="s1", layer="x")
    line = {**points, "geometry": {"type": "LineString", "coordinates": [[1, 2], [3, 4]]}}
    detection = {**points, "properties": {"objectType": "detection"}}
    path = write(tmp_path / "a.geojson", line, detection, square(0, 0))
    made = read_corrected([path], slide_id="s1", layer="x")
    assert (len(made.objects), made.notes) == (1, (f"2 points and lines passed over ({ID})",))
    with pytest.raises(GeoJSONError, match="no outline among the objects: 2 points and lines"):
        read_corrected([write(tmp_path / "a.geojson", line, detection)], slide_id="s1", layer="x")


def test_broken_polygons_are_mended_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bow = square(0, 0)
    bow["geometry"]["coordinates"] = [[[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]]
    empty = {**square(0, 0), "geometry": None}
    with caplog.at_level(logging.WARNING, "pathopipe"):
        made = read_corrected([write(tmp_path / "a.geojson", bow, empty, square(50, 0))], slide_id="s1", layer="x")
    assert len(made.objects) == 2
    assert shapely.is_valid(outlines_to_shapes(made.objects.outlines)).all()
    assert "1 broken polygons repaired (feature 1)" in caplog.text
    assert "1 features without geometry passed over (feature 2)" in caplog.text


def test_objects_of_another_frame_are_refused(tmp_path: Path) -> None:
    plain = make_store(tmp_path / "plain")
    far = write(tmp_path / "far.geojson", square(10, 10), square(100_000, 10), square(150_000, 60_000))
    with pytest.raises(GeoJSONError) as caught:
        import_objects(plain, [far], "x")
    message = str(caught.value)
    assert "2 of 3 objects lie outside slide s1: they reach from x 10, y 10 to x 150010, y 60010" in message
    assert "the slide from 0, 0 to 50000, 40000; most likely they are of another slide" in message
    assert "another resolution: they reach 3 times as far" in message
    assert plain.layers() == []
    some = write(tmp_path / "some.geojson", square(10, 10), square(100_000, 10), square(20, 20))
    assert import_objects(plain, [some], "x").notes == ("1 objects lie outside the slide; they were kept",)
    cut = make_store(tmp_path / "cut", BoxL0(30_000, 20_000, 15_000, 15_000))
    whole = write(tmp_path / "whole.geojson", square(31_000, 21_000), square(44_000, 34_000))
    with pytest.raises(GeoJSONError, match="they fit with --frame scan"):
        import_objects(cut, [whole], "x")
    import_objects(cut, [whole], "x", frame="scan")
    assert cut.objects("x").column("centroid_l0")[0].tolist() == [31_005, 21_005]
    import_objects(cut, [write(tmp_path / "b.geojson", square(1000, 1000))], "y")
    assert cut.objects("y").column("centroid_l0")[0].tolist() == [31_005, 21_005]
    assert cut.objects("y").read().outlines.vertices_l0.min(axis=0).tolist() == [31_000, 21_000]


def test_a_layer_is_replaced_only_on_demand(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.write_objects("nuclei", [nuclei_table()], about={"inputs": {}})
    path = write(tmp_path / "a.geojson", square(0, 0))
    with pytest.raises(UsageError, match="layer nuclei is there already, with 50 objects; --replace"):
        import_objects(store, [path], "nuclei")
    assert len(store.objects("nuclei")) == 50
    for name in ("Nuclei", "a/b", "..", ""):
        with pytest.raises(UsageError, match="a name has the characters"):
            import_objects(store, [path], name)
    with pytest.raises(UsageError, match="slide 's2' has no store; did you mean 's1'.*pathopipe tissue SLIDE"):
        open_store(tmp_path, "s2")


def test_those_that_refer_to_a_replaced_layer_find_its_new_rows(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    glands = make_table(np.array([shapely.box(0, 0, 1000, 1000), shapely.box(0, 2000, 1000, 3000)]), "glands")
    store.write_objects("glands", [glands], about={"inputs": {"a": 1}})
    spots = np.array([shapely.box(x, x, x + 10, x + 10) for x in (100, 200, 2500, 5000)])
    nuclei = importing.replace(make_table(spots), parent=np.array([0, 0, -1, -1]), parent_layer="glands")
    store.write_objects("nuclei", [nuclei], about={"inputs": {"a": 2}})
    cells = make_table(shapely.buffer(spots, 4), "cells", "nuclei")
    store.write_objects("cells", [cells], about={"inputs": {"a": 3}})

    # A gland more, and one less.
    path = write(tmp_path / "g.geojson", square(2000, 2000, 1000), square(4500, 4500, 1000))
    report = import_objects(store, [path], "glands", replace_layer=True)
    assert report.notes == ("layer nuclei refers to glands: 2 of 4 objects still do",)
    assert store.objects("nuclei").parent_layer == "glands"
    assert store.objects("nuclei").column("parent").tolist() == [-1, -1, 0, 1]

    # Of the nuclei one goes, one comes; they find their glands, and the cells find them.
    ids = id_texts(nuclei.id)
    moved = [square(x, x, 10, id=ids[row], objectType="detection") for row, x in ((3, 5000), (0, 100), (2, 2500))]
    path = write(tmp_path / "n.geojson", square(2600, 50, 10, objectType="detection"), *moved)
    report = import_objects(store, [path], "nuclei", replace_layer=True)
    assert report.notes == ("layer cells refers to nuclei: 3 of 4 objects still do",)
    assert store.objects("nuclei").column("parent").tolist() == [-1, -1, 0, 1]
    assert store.objects("cells").column("parent").tolist() == [1, -1, 2, 3]
    assert [problem.what for problem in store.problems() if problem.where.startswith("objects")] == []


# ---- labels


@pytest.mark.parametrize("ending", ["png", "tif", "npy"])
def test_labels_are_numbered_in_order_and_named_in_a_table(tmp_path: Path, ending: str) -> None:
    path = write(
        tmp_path / "a.geojson",
        square(1002, 2001, 4, id=ID, classification={"name": "=Tumor", "color": [1, 2, 3]}),
        square(1005, 2004, 3, classification={"name": "Stroma", "color": [1, 2, 3]}),
        square(5000, 5000, 4),
    )
    made = read_corrected([path], slide_id="s1", layer="labels")
    report = write_labels(tmp_path / f"tile.{ending}", made, (10, 9), origin_l0=(1000, 2000))
    if ending == "png":
        labels = imagecodecs.png_decode(report.image.read_bytes())
        assert labels.dtype == np.uint16
    elif ending == "tif":
        labels = tifffile.imread(report.image)
        assert labels.dtype == np.uint32
    else:
        labels = np.load(report.image)
        assert labels.dtype == np.int32
    expected = np.zeros((9, 10), int)
    expected[4:7, 5:8] = 2
    expected[1:5, 2:6] = 1
    assert np.array_equal(labels, expected)
    assert (report.objects, report.unseen, report.contested_px) == (2, 1, 1)
    lines = report.table.read_text(encoding="utf-8").splitlines()
    assert report.table.name == "tile.classes.csv"
    assert lines[:2] == ["label,id,class", f"1,{ID},'=Tumor"]
    assert lines[2].startswith("2,")
    assert lines[2].endswith(",Stroma")


def test_labels_at_a_coarser_resolution_and_of_nuclei(tmp_path: Path) -> None:
    cell = square(16, 16, 32, objectType="cell", nucleus=shapely.box(24, 24, 40, 40))
    made = read_corrected([write(tmp_path / "a.geojson", cell)], slide_id="s1", layer="labels")
    write_labels(tmp_path / "cells.npy", made, (8, 8), downsample=8)
    write_labels(tmp_path / "nuclei.npy", made, (8, 8), downsample=8, nuclei=True)
    assert np.load(tmp_path / "cells.npy").nonzero()[0].tolist() == np.repeat([2, 3, 4, 5], 4).tolist()
    assert np.load(tmp_path / "nuclei.npy").nonzero()[0].tolist() == [3, 3, 4, 4]


def test_labels_that_can_not_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = read_corrected([write(tmp_path / "a.geojson", square(0, 0), square(20, 0))], slide_id="s1", layer="labels")
    with pytest.raises(UsageError, match="written as .png, .tif"):
        write_labels(tmp_path / "a.jpg", made, (10, 10))
    with pytest.raises(UsageError, match="give numbers above 0"):
        write_labels(tmp_path / "a.png", made, (0, 10))
    with pytest.raises(UsageError, match="no cell has a nucleus"):
        write_labels(tmp_path / "a.png", made, (10, 10), nuclei=True)
    with pytest.raises(UsageError, match="they reach from x 0, y 0 to x 30, y 10, the image from 500, 500 on"):
        write_labels(tmp_path / "a.png", made, (10, 10), origin_l0=(500, 500))
    monkeypatch.setattr(importing, "_LARGEST_PNG_LABEL", 1)
    with pytest.raises(UsageError, match="2 objects, but a 16-bit PNG numbers 1; write .tif or .npy"):
        write_labels(tmp_path / "a.png", made, (40, 10))
    assert write_labels(tmp_path / "a.png", made, (15, 10)).objects == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.classes.csv", "a.geojson", "a.png"]


# ---- what QuPath and others wrote


@pytest.mark.shared_data
def test_files_of_qupath(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "geojson"
    store = make_store(tmp_path)
    report = import_objects(store, [folder / "qupath05-annotations.geojson"], "regions")
    array = store.objects("regions")
    assert report.objects == {"regions": 3}
    assert report.notes == ("3 names of single objects left out, for the store keeps classes (UT, I)",)
    assert array.attributes["object_type"] == "annotation"
    assert ID in id_texts(array.column("id"))
    import_objects(store, [folder / "qupath-single-feature-with-holes.geojson"], "whole")
    (shape,) = outlines_to_shapes(store.objects("whole").read().outlines)
    assert len(shape.interiors) > 0
    with pytest.raises(GeoJSONError, match="4 annotations that are points .*1022 points of class Neoplastic"):
        import_objects(store, [folder / "TCGA-V5-A7RE-11A-01-TS1.nulite-points.geojson"], "points")


@pytest.mark.shared_data
def test_labels_of_a_real_tile(shared_data: Path, tmp_path: Path) -> None:
    made = read_corrected([shared_data / "geojson" / "tcga_tile.geojson"], slide_id="tile", layer="labels")
    report = write_labels(tmp_path / "tile.png", made, (1024, 1024))
    labels = imagecodecs.png_decode(report.image.read_bytes())
    areas = shapely.area(outlines_to_shapes(made.objects.outlines))
    drawn = np.bincount(labels.ravel())[1:]
    assert report.objects == len(made.objects) == 4
    assert np.allclose(drawn, areas, rtol=0.05)
