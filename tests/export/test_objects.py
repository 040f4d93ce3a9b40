"""Objects for QuPath: every rule of its importer, no object lost or doubled, files that belong together."""

import gzip
import json
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pathopipe.errors import StoreError, StoreWriteError, UsageError
from pathopipe.export import objects as exporting
from pathopipe.export.objects import (
    RowReader,
    export_layer,
    export_layers,
    id_texts,
    object_type_of,
    write_tiles,
)
from pathopipe.geojson import feature_batches, polygon_features, stable_ids
from pathopipe.geometry import BoxL0, outlines_from_shapes, outlines_to_shapes
from pathopipe.records import Level, ObjectClass, ObjectTable, SlideInfo
from pathopipe.store import SlideStore, store_path

CLASSES = (
    ObjectClass("Epithelial", (200, 0, 0)),
    ObjectClass("Tumor: Positive", (10, 200, 0)),
    ObjectClass("Unclassified", (128, 128, 128)),
)
NAMES = ("Area µm^2", "Circularity")


def make_store(folder: Path, bounds: BoxL0 | None = None, slide_id: str = "s1") -> SlideStore:
    info = SlideInfo(
        slide_id=slide_id,
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
    return SlideStore.create_or_open(store_path(folder, slide_id), info, created_by="test")


def octagons(centroid_l0: NDArray[np.float64], radius_px: float) -> NDArray[np.object_]:
    angle = np.arange(8) * np.pi / 4
    ring = np.rint(radius_px * np.stack([np.cos(angle), np.sin(angle)], axis=1) * 4) / 4
    return shapely.polygons(np.rint(centroid_l0 * 4)[:, None] / 4 + ring)


def make_table(
    shapes: Any, centroid_l0: NDArray[np.float64], layer: str = "nuclei", parent_layer: str | None = None
) -> ObjectTable:
    n = len(shapes)
    measurements = np.stack([np.arange(n) + 0.5, np.where(np.arange(n) % 3 == 1, np.nan, 0.25)], axis=1)
    return ObjectTable(
        classes=CLASSES,
        measurement_names=NAMES,
        centroid_l0=centroid_l0,
        class_id=(np.arange(n) % 3).astype(np.uint8),
        class_probability=np.where(np.arange(n) % 2 == 0, 0.5, np.nan).astype(np.float32),
        measurements=measurements.astype(np.float32),
        outlines=outlines_from_shapes(shapes),
        id=stable_ids("s1", layer, range(n)),
        parent=np.arange(n) if parent_layer else np.full(n, -1),
        parent_layer=parent_layer,
    )


def spread(n: int, seed: int = 0) -> NDArray[np.float64]:
    xy = np.random.default_rng(seed).uniform(100, 30_000, (n, 2))
    return xy[np.lexsort((xy[:, 0], xy[:, 1]))]


@pytest.fixture
def store(tmp_path: Path) -> SlideStore:
    """60 nuclei and their cells."""
    made = make_store(tmp_path / "results")
    xy = spread(60)
    made.write_objects("nuclei", [make_table(octagons(xy, 8), xy)], about={"inputs": {"seed": 0}})
    cells = make_table(octagons(xy, 14), xy, "cells", "nuclei")
    made.write_objects("cells", [cells], about={"inputs": {"seed": 1}})
    return made


def refuse(token: str) -> None:
    raise AssertionError(f"{token} in the file")


def strict(path: Path) -> list[dict[str, Any]]:
    """Features of a file that breaks none of the rules that a plain reader can see."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.name.endswith(".gz") else raw).decode("utf-8")
    assert "null" not in text
    document = json.loads(text, parse_constant=refuse)
    assert document.keys() == {"type", "features"}
    features: list[dict[str, Any]] = document["features"]
    assert len(text.splitlines()) == len(features) + 2
    ids = [each["id"] for each in features]
    assert ids == [str(uuid.UUID(id)) for id in ids]
    assert len(set(ids)) == len(ids)
    for each in features:
        properties = each["properties"]
        assert properties["objectType"] in {"annotation", "detection", "cell", "tile"}
        assert properties.keys() <= {"objectType", "classification", "measurements"}
        assert len(properties["classification"]["color"]) == 3 if "classification" in properties else True
        assert all(type(value) in (int, float) for value in properties.get("measurements", {}).values())
        assert shapely.geometry.shape(each["geometry"]).is_valid
        for ring in rings(each["geometry"]):
            assert ring[0] == ring[-1]
            assert len(ring) >= 4
            assert all(4 * value == int(4 * value) for position in ring for value in position)
    return features


def rings(geometry: dict[str, Any]) -> Iterator[list[list[float]]]:
    if geometry["type"] == "Polygon":
        yield from geometry["coordinates"]
    elif geometry["type"] == "MultiPolygon":
        for part in geometry["coordinates"]:
            yield from part


def test_nuclei_are_detections_with_class_colour_and_measurements(store: SlideStore, tmp_path: Path) -> None:
    made = export_layer(store, "nuclei", tmp_path / "q")
    assert [file.path.name for file in made.files] == ["s1.nuclei.geojson"]
    features = strict(made.files[0].path)
    table = store.objects("nuclei").read()
    assert [each["id"] for each in features] == id_texts(table.id)
    assert [each["id"] for each in features] == [str(uuid.UUID(bytes=row.tobytes())) for row in table.id]
    first, second, third = (each["properties"] for each in features[:3])
    assert first == {
        "objectType": "detection",
        "classification": {"name": "Epithelial", "color": [200, 0, 0]},
        "measurements": {"Class probability": 0.5, "Area µm^2": 0.5, "Circularity": 0.25},
    }
    assert second["classification"] == {"names": ["Tumor", "Positive"], "color": [10, 200, 0]}
    assert second["measurements"] == {"Area µm^2": 1.5}
    assert "classification" not in third
    for each, shape in zip(features, outlines_to_shapes(table.outlines), strict=True):
        assert shapely.geometry.shape(each["geometry"]).equals(shape)


def test_cells_bear_their_nuclei_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_BATCH_ROWS", 7)
    store = make_store(tmp_path)
    xy = spread(60)
    nuclei = make_table(octagons(xy, 8), xy)
    store.write_objects("nuclei", [nuclei], about={"inputs": {}})
    shuffled = np.random.default_rng(3).permutation(60)
    cells = make_table(octagons(xy[shuffled], 14), xy[shuffled], "cells", "nuclei")
    cells.parent[:] = np.where(np.arange(60) % 5 == 0, -1, shuffled)
    store.write_objects("cells", [cells], about={"inputs": {}})
    made = export_layer(store, "cells", tmp_path / "q")
    features = strict(made.files[0].path)
    inner = outlines_to_shapes(nuclei.outlines)
    for row, each in enumerate(features):
        assert each["properties"]["objectType"] == "cell"
        assert ("nucleusGeometry" in each) == (row % 5 != 0)
        if row % 5:
            nucleus = shapely.geometry.shape(each["nucleusGeometry"])
            assert nucleus.equals(inner[shuffled[row]])
            assert shapely.covers(shapely.geometry.shape(each["geometry"]), nucleus)


def test_rows_are_read_in_the_order_asked_for(store: SlideStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_BATCH_ROWS", 7)
    array = store.objects("nuclei")
    rows = np.array([59, 0, 13, 14, 0, 58, 30])
    assert (RowReader(array).ids(rows) == array.column("id")[rows]).all()
    assert shapely.equals(RowReader(array).shapes(rows), outlines_to_shapes(array.read().outlines)[rows]).all()
    for bad in (60, -1):
        with pytest.raises(StoreError, match="was replaced after the one that refers to it"):
            RowReader(array).ids(np.array([0, bad]))


@pytest.mark.parametrize(
    ("layer", "stated", "kind"),
    [
        ("nuclei", None, "detection"),
        ("glands", None, "annotation"),
        ("lumina", None, "annotation"),
        ("tissue_types", None, "annotation"),
        ("my-own", None, "detection"),
        ("my-own", "annotation", "annotation"),
        ("nuclei", "nonsense", "detection"),
    ],
)
def test_layers_become_what_qupath_can_bear(tmp_path: Path, layer: str, stated: str | None, kind: str) -> None:
    store = make_store(tmp_path)
    about = {"inputs": {}} if stated is None else {"inputs": {}, "object_type": stated}
    xy = spread(3)
    store.write_objects(layer, [make_table(octagons(xy, 9), xy)], about=about)
    assert object_type_of(store.objects(layer)) == kind
    made = export_layer(store, layer, tmp_path / "q")
    assert {each["properties"]["objectType"] for each in strict(made.files[0].path)} == {kind}


def test_the_frame_begins_at_the_scanned_part_and_the_sidecar_says_so(tmp_path: Path) -> None:
    store = make_store(tmp_path, BoxL0(1000, 2000, 30_000, 30_000))
    pixel = shapely.box(1500, 2600, 1501, 2601)
    store.write_objects("nuclei", [make_table([pixel], np.array([[1500.5, 2600.5]]))], about={"inputs": {"a": 1}})
    made = export_layer(store, "nuclei", tmp_path / "q")
    (only,) = strict(made.files[0].path)
    assert sorted(map(tuple, only["geometry"]["coordinates"][0][:4])) == [
        (500, 600),
        (500, 601),
        (501, 600),
        (501, 601),
    ]
    about = json.loads(made.manifest.read_text(encoding="utf-8"))
    assert about["offset_l0"] == [1000, 2000]
    assert about["slide"]["id"] == "s1"
    assert about["slide"]["fingerprint"] == "abc"
    assert about["files"] == [{"name": "s1.nuclei.geojson", "kind": "polygons", "objects": 1, "dropped": 0}]
    assert about["created_by"].startswith("pathopipe ")
    points = export_layer(store, "nuclei", tmp_path / "q", points=True)
    assert strict(points.files[0].path)[0]["geometry"] == {"type": "Point", "coordinates": [500.5, 600.5]}


def test_the_same_store_gives_the_same_bytes(store: SlideStore, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        export_layer(store, "cells", tmp_path / folder, compress=True)
    for name in ("s1.cells.geojson.gz", "s1.cells.export.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_one_class_alone(store: SlideStore, tmp_path: Path) -> None:
    whole = export_layer(store, "nuclei", tmp_path)
    made = export_layer(store, "nuclei", tmp_path, classes=["Tumor: Positive"])
    assert [file.path.name for file in made.files] == ["s1.nuclei.tumor-positive.geojson"]
    assert len(strict(whole.files[0].path)) == 60
    features = strict(made.files[0].path)
    assert [each["id"] for each in features] == id_texts(store.objects("nuclei").column("id")[1::3])
    assert made.objects == 20
    with pytest.raises(UsageError, match="no class 'Epitelial'; did you mean 'Epithelial'"):
        export_layer(store, "nuclei", tmp_path, classes=["Epitelial"])


def test_points_take_little_and_never_share_ids_with_outlines(store: SlideStore, tmp_path: Path) -> None:
    outlines = strict(export_layer(store, "nuclei", tmp_path).files[0].path)
    made = export_layer(store, "nuclei", tmp_path, points=True)
    assert [file.path.name for file in made.files] == ["s1.nuclei-points.geojson"]
    points = strict(made.files[0].path)
    assert not {each["id"] for each in outlines} & {each["id"] for each in points}
    assert {each["geometry"]["type"] for each in points} == {"Point"}
    assert {each["properties"]["objectType"] for each in points} == {"detection"}
    assert not any("measurements" in each["properties"] for each in points)
    # Both belong to the same objects, so both stay and both are vouched for.
    assert (tmp_path / "s1.nuclei.geojson").exists()
    about = json.loads(made.manifest.read_text(encoding="utf-8"))
    assert {entry["kind"] for entry in about["files"]} == {"polygons", "points"}


@pytest.mark.parametrize(("layer", "limit", "n_parts"), [("nuclei", 20, 3), ("nuclei", 25, 3), ("cells", 40, 3)])
def test_a_layer_beyond_the_limit_is_split_into_bands(
    store: SlideStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: str, limit: int, n_parts: int
) -> None:
    monkeypatch.setattr(exporting, "_MAX_POLYGONS", limit)
    made = export_layer(store, layer, tmp_path, compress=True)
    parts = [file for file in made.files if file.kind == "polygons"]
    assert [file.path.name for file in parts] == [
        f"s1.{layer}-{k}of{n_parts}.geojson.gz" for k in range(1, n_parts + 1)
    ]
    assert [file.path.name for file in made.files if file.kind == "points"] == [f"s1.{layer}-points.geojson.gz"]
    assert made.split
    assert made.objects == 60
    found = [strict(file.path) for file in parts]
    assert [each["id"] for part in found for each in part] == id_texts(store.objects(layer).column("id"))
    polygons_each = 2 if layer == "cells" else 1
    assert all(polygons_each * len(part) <= limit for part in found)
    middles = [[shapely.geometry.shape(each["geometry"]).centroid.y for each in part] for part in found]
    assert all(max(upper) < min(lower) + 1 for upper, lower in pairwise(middles))


def test_a_layer_is_split_by_its_size_too(store: SlideStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_MAX_BYTES", 10_000)
    made = export_layer(store, "nuclei", tmp_path)
    parts = [file for file in made.files if file.kind == "polygons"]
    assert len(parts) > 1
    assert all(file.path.stat().st_size <= 10_000 for file in parts)
    assert sum(file.objects for file in parts) == 60


@given(n=st.integers(1, 70), limit=st.integers(1, 70), batch=st.integers(1, 70))
def test_cuts_lose_no_row_and_keep_the_limit(n: int, limit: int, batch: int) -> None:
    job = object.__new__(exporting._Job)
    job.array = _Rows(n)  # type: ignore[assignment]
    job.slide = {"dims_l0": [9, 9]}
    job.measured, job.wanted, job.nuclei = (), None, None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "_MAX_POLYGONS", limit)
        patch.setattr(exporting, "_BATCH_ROWS", batch)
        cuts = job.plan("polygons").cuts
    assert cuts[0] == 0
    assert cuts[-1] == n
    sizes = np.diff(cuts)
    assert (sizes > 0).all()
    assert sizes.max() <= limit
    assert len(sizes) == -(-n // limit)


class _Rows:
    """As much of a layer of squares as a plan asks for."""

    classes = ()

    def __init__(self, n: int) -> None:
        self._n = n

    def __len__(self) -> int:
        return self._n

    def column(self, name: str, rows: slice) -> NDArray[np.int64]:
        step = 5 if name == "ring_offsets" else 1
        return (np.arange(self._n + 1) * step)[rows]

    def read(self, rows: slice) -> ObjectTable:
        return make_table([shapely.box(0, 0, 5, 5)], np.zeros((1, 2)))


def test_files_of_an_earlier_split_do_not_stay(
    store: SlideStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [tmp_path / name for name in ("s1.nuclei.mine.geojson", "s1.cells.geojson", "s10.nuclei-1of2.geojson")]
    for other in others:
        other.write_text("mine")
    for limit, expected in ((10, 6), (20, 3), (100, 1)):
        monkeypatch.setattr(exporting, "_MAX_POLYGONS", limit)
        made = export_layer(store, "nuclei", tmp_path)
        polygons = [path.name for path in tmp_path.glob("s1.nuclei*.geojson") if path not in others]
        assert len([name for name in polygons if "points" not in name]) == expected
        listed = {entry["name"] for entry in json.loads(made.manifest.read_text())["files"]}
        assert set(polygons) == listed
    assert all(other.read_text() == "mine" for other in others)


def test_points_of_replaced_objects_do_not_stay(store: SlideStore, tmp_path: Path) -> None:
    export_layer(store, "nuclei", tmp_path, points=True)
    xy = spread(5, seed=9)
    store.write_objects("nuclei", [make_table(octagons(xy, 8), xy)], about={"inputs": {"seed": 2}})
    made = export_layer(store, "nuclei", tmp_path)
    assert [path.name for path in made.removed] == ["s1.nuclei-points.geojson"]
    assert sorted(path.name for path in tmp_path.glob("*.geojson")) == ["s1.nuclei.geojson"]


def test_objects_without_an_outline_are_dropped_and_named(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    xy = spread(4)
    shapes = octagons(xy, 8)
    shapes[2] = shapely.box(5, 5, 5.5, 5.5)
    table = make_table(shapes, xy)
    store.write_objects("nuclei", [table], about={"inputs": {}})
    made = export_layer(store, "nuclei", tmp_path / "q")
    assert (made.objects, made.dropped, made.dropped_ids) == (3, 1, (id_texts(table.id)[2],))
    assert json.loads(made.manifest.read_text())["dropped_ids"] == id_texts(table.id)[2:3]
    assert len(strict(made.files[0].path)) == 3


def test_detections_bear_thirty_measurements_and_annotations_all(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    xy = spread(2)
    names = tuple(f"m{k}" for k in range(40))
    wide = make_table(octagons(xy, 9), xy)
    wide = ObjectTable(
        **{
            **{name: getattr(wide, name) for name in ObjectTable.__slots__},
            "measurement_names": names,
            "measurements": np.ones((2, 40), np.float32),
        }
    )
    for layer in ("nuclei", "glands"):
        store.write_objects(layer, [wide], about={"inputs": {}})
    detections = export_layer(store, "nuclei", tmp_path)
    assert len(strict(detections.files[0].path)[0]["properties"]["measurements"]) == 30
    assert detections.left_out == names[29:]
    glands = export_layer(store, "glands", tmp_path)
    assert len(strict(glands.files[0].path)[0]["properties"]["measurements"]) == 41
    assert glands.left_out == ()


def test_a_layer_without_objects_is_a_file_without_features(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.write_objects("nuclei", [make_table([], np.empty((0, 2)))], about={"inputs": {}})
    made = export_layer(store, "nuclei", tmp_path / "q")
    assert [file.objects for file in made.files] == [0]
    assert strict(made.files[0].path) == []


def test_all_layers_at_once(store: SlideStore, tmp_path: Path) -> None:
    assert [path.name for path in export_layers(store, tmp_path)] == ["s1.cells.geojson", "s1.nuclei.geojson"]
    assert [path.name for path in export_layers(store, tmp_path, layers=["nuclei"])] == ["s1.nuclei.geojson"]
    with pytest.raises(StoreError, match="objects/glands is not there"):
        export_layers(store, tmp_path, layers=["glands"])


@settings(max_examples=200)
@given(st.lists(st.tuples(st.floats(width=32), st.floats()), min_size=1, max_size=5))
def test_batches_and_single_features_are_written_alike(values: list[tuple[float, float]]) -> None:
    one, other = np.array(values).T
    n = len(values)
    given_ = {
        "geometries": [shapely.box(k, 0, k + 1, 1) for k in range(n)],
        "object_type": "detection",
        "ids": id_texts(stable_ids("s", "l", range(n))),
        "classifications": [("A: B", (1, 2, 3)), None, ("100 %", (1, 2, 3)), None, None][:n],
        "measurements": {"Nuclei %s µm": one, 'quoted "%"': other},
    }
    (batch,) = feature_batches(**given_)
    together = [json.loads(line, parse_constant=refuse)["properties"] for line in batch._encode(1).lines]
    assert together == [each["properties"] for each in polygon_features(**given_) if each is not None]


def test_geopandas_reads_the_same_areas(store: SlideStore, tmp_path: Path) -> None:
    made = export_layer(store, "nuclei", tmp_path)
    frame = geopandas.read_file(made.files[0].path).set_crs(None, allow_override=True)
    area = shapely.area(outlines_to_shapes(store.objects("nuclei").read().outlines))
    assert len(frame) == 60
    assert frame.geometry.area.sum() == pytest.approx(area.sum(), rel=1e-3)


@settings(max_examples=4)
@given(seed=st.integers(0, 10**6), offset=st.tuples(st.floats(0, 400_000), st.floats(0, 400_000)))
def test_whatever_the_polygons_what_is_written_stays_valid_in_single_precision(
    tmp_path_factory: pytest.TempPathFactory, seed: int, offset: tuple[float, float]
) -> None:
    folder = tmp_path_factory.mktemp("law")
    store = make_store(folder)
    rng = np.random.default_rng(seed)
    shapes = [shapely.polygons(rng.uniform(0, 60, (rng.integers(3, 13), 2)) + offset) for _ in range(100)]
    store.write_objects("nuclei", [make_table(shapes, np.tile(offset, (100, 1)))], about={"inputs": {}})
    made = export_layer(store, "nuclei", folder / "q")
    assert made.objects > 80
    for each in strict(made.files[0].path):
        written = shapely.geometry.shape(each["geometry"])
        held = shapely.transform(written, lambda xy: xy.astype(np.float32).astype(np.float64))
        for shape in (held, shapely.transform(held, lambda xy: np.round(xy, 2))):
            assert shape.is_valid
            assert shape.area == written.area


def test_a_full_disk_leaves_no_file_and_says_so(store: SlideStore, tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from pathopipe.store import SlideStore; from pathopipe.export.objects import export_layer\n"
        "from pathopipe.errors import StoreWriteError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "try: export_layer(SlideStore.open(sys.argv[1]), 'nuclei', Path(sys.argv[2]))\n"
        "except StoreWriteError as error: print(error); sys.exit(7)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, store.path, tmp_path / "q"], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, "can't be written" in ended.stdout) == (7, True), ended.stderr
    assert list((tmp_path / "q").iterdir()) == []
    assert issubclass(StoreWriteError, OSError)


def test_a_kill_leaves_no_file_that_is_not_whole(store: SlideStore, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from pathopipe.export import objects; from pathopipe.store import ObjectArray, SlideStore\n"
        "objects._BATCH_ROWS, objects._MAX_POLYGONS = 10, 30\n"
        "read = ObjectArray.read\n"
        "def read_or_die(self, rows):\n"
        "    if rows.start == 40: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return read(self, rows)\n"
        "ObjectArray.read = read_or_die\n"
        "objects.export_layer(SlideStore.open(sys.argv[1]), 'nuclei', Path(sys.argv[2]))\n"
    )
    export_layer(store, "nuclei", tmp_path / "q")
    ended = subprocess.run([sys.executable, "-c", code, store.path, tmp_path / "q"], check=False)
    assert ended.returncode == -signal.SIGKILL
    # The first of two parts was finished; nothing of the earlier export stands beside it, and no sidecar vouches.
    visible = [path.name for path in (tmp_path / "q").iterdir() if not path.name.startswith(".")]
    assert visible == ["s1.nuclei-1of2.geojson"]
    assert len(strict(tmp_path / "q" / visible[0])) == 30
    made = export_layer(store, "nuclei", tmp_path / "q")
    assert sorted(path.name for path in (tmp_path / "q").glob("*.geojson")) == [file.path.name for file in made.files]


def test_tiles_bear_measurements(tmp_path: Path) -> None:
    xy = np.array([[1000, 2000], [1512, 2000], [1000, 2512]])
    path = tmp_path / "attention.geojson"
    values = {"Attention": np.array([0.25, np.nan, 0.75]), "Tumor probability": np.array([0.5, 0.5, 1.0])}
    report = write_tiles(path, "s1", "attention", xy, (512, 512), values, offset_l0=(1000, 1000))
    assert report.written == 3
    features = strict(path)
    assert {each["properties"]["objectType"] for each in features} == {"tile"}
    assert [each["properties"]["measurements"] for each in features] == [
        {"Attention": 0.25, "Tumor probability": 0.5},
        {"Tumor probability": 0.5},
        {"Attention": 0.75, "Tumor probability": 1},
    ]
    assert shapely.geometry.shape(features[1]["geometry"]).bounds == (512, 1000, 1024, 1512)
    assert [each["id"] for each in features] == id_texts(stable_ids("s1", "attention", range(3)))
    with pytest.raises(UsageError, match="2 values for 3"):
        write_tiles(path, "s1", "attention", xy, (512, 512), {"Attention": [1, 2]})


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_objects(tmp_path: Path) -> None:
    store = make_store(tmp_path)

    def tables() -> Iterator[ObjectTable]:
        xy = spread(300_000)
        for start in range(0, len(xy), 20_000):
            some = xy[start : start + 20_000]
            table = make_table(octagons(some, 8), some)
            table.id[:] = stable_ids("s1", "nuclei", range(start, start + len(some)))
            yield table

    store.write_objects("nuclei", tables(), about={"inputs": {}})
    code = (
        "import sys; from pathlib import Path\n"
        "from pathopipe.store import SlideStore; from pathopipe.export.objects import export_layer\n"
        "export_layer(SlideStore.open(sys.argv[1]), 'nuclei', Path(sys.argv[2]))\n"
        # Not ru_maxrss: it begins with what the parent had when it forked.
        "status = Path('/proc/self/status').read_text()\n"
        "print(status.split('VmHWM:')[1].split()[0])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, store.path, tmp_path / "q"], capture_output=True, text=True, check=True
    )
    assert int(ended.stdout) < 300 * 1024
    assert len(list((tmp_path / "q").glob("s1.nuclei-*of2.geojson.gz"))) == 2
