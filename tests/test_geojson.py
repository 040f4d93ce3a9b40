"""The GeoJSON codec: what we write is what QuPath reads; what people hand us is read."""

import contextlib
import copy
import errno
import gzip
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import shapely.affinity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapely.geometry import (
    GeometryCollection,
    LineString,
    MultiLineString,
    MultiPoint,
    MultiPolygon,
    Point,
    Polygon,
    box,
    shape,
)

from pathopipe import geojson
from pathopipe.errors import GeoJSONError, StoreWriteError, UsageError
from pathopipe.geojson import (
    feature,
    feature_batches,
    polygon_features,
    read_features,
    stable_id,
    write_features,
)

SHARED = Path(__file__).parents[1].parent / "shared/data/geojson"
TUMOR = ("Tumor", (200, 0, 0))

# One of each kind as QuPath reads them without loss; the writer gives these very lines back.
EXAMPLES = [
    '{"type":"Feature","id":"5f0c6a52-3f0b-5d0e-9a51-6c1f7a0b1e01","geometry":{"type":"Polygon","coordinates":[[[120,80],[940.5,96.25],[960,700],[131.75,688.5],[120,80]],[[400,300],[400,380],[480.25,380],[480.25,300],[400,300]]]},"properties":{"objectType":"annotation","name":"Tissue 1","classification":{"name":"Tissue","color":[0,160,80]},"isLocked":true,"measurements":{"Area mm^2":0.0313},"metadata":{"pathopipe.run":"c0ffee12"}}}',  # noqa: E501
    '{"type":"Feature","id":"5f0c6a52-3f0b-5d0e-9a51-6c1f7a0b1e02","geometry":{"type":"MultiPolygon","coordinates":[[[[1000,100],[1100,100],[1100,190.5],[1000,100]]],[[[1200,100],[1300,110],[1250,240.25],[1200,100]]]]},"properties":{"objectType":"annotation","classification":{"name":"Stroma","color":[150,200,150]}}}',
    '{"type":"Feature","id":"5f0c6a52-3f0b-5d0e-9a51-6c1f7a0b1e03","geometry":{"type":"Polygon","coordinates":[[[512,256],[768,256],[768,512],[512,512],[512,256]]]},"properties":{"objectType":"tile","measurements":{"Attention":0.8125,"Tumor probability":0.93}}}',  # noqa: E501
    '{"type":"Feature","id":"5f0c6a52-3f0b-5d0e-9a51-6c1f7a0b1e04","geometry":{"type":"Polygon","coordinates":[[[600,300],[611.25,297.5],[618,306.75],[612.5,317],[601.75,313.5],[600,300]]]},"properties":{"objectType":"detection","classification":{"name":"Lymphocyte","color":[70,90,220]},"measurements":{"Area µm^2":16.4,"Detection probability":0.88}}}',  # noqa: E501
    '{"type":"Feature","id":"5f0c6a52-3f0b-5d0e-9a51-6c1f7a0b1e05","geometry":{"type":"Polygon","coordinates":[[[700,400],[730,398],[738.5,420.25],[721,441],[699.25,428.5],[700,400]]]},"nucleusGeometry":{"type":"Polygon","coordinates":[[[710,408],[722.5,407.25],[726,419],[716.75,427.5],[708.5,419.25],[710,408]]]},"properties":{"objectType":"cell","classification":{"names":["Tumor","Positive"],"color":[200,40,40]},"measurements":{"Nucleus: Area µm^2":17.2,"Cell: Area µm^2":71.9}}}',  # noqa: E501
    '{"type":"Feature","id":"5f0c6a52-3f0b-5d0e-9a51-6c1f7a0b1e06","geometry":{"type":"Point","coordinates":[650.5,350.5]},"properties":{"objectType":"detection","classification":{"name":"Mitosis","color":[255,200,0]}}}',
]


def no_constant(token: str) -> Any:
    raise AssertionError(f"{token} in the file")


def strict(path: Path) -> list[dict[str, Any]]:
    """Features of a file that is one strict JSON document without null; every rule that text alone shows holds."""
    raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    document = json.loads(raw.decode("utf-8"), parse_constant=no_constant)
    assert document.keys() == {"type", "features"}
    assert document["type"] == "FeatureCollection"
    assert raw.count(b"\n") == len(document["features"]) + 2
    assert_no_null(document)
    for each in document["features"]:
        assert str(uuid.UUID(each["id"])) == each["id"]
        assert each["properties"]["objectType"] in ("annotation", "detection", "cell", "tile")
        if "classification" in each["properties"]:
            assert len(each["properties"]["classification"]["color"]) == 3
        assert_survives_quantization(each["geometry"])
    ids = [each["id"] for each in document["features"]]
    assert len(set(ids)) == len(ids)
    features: list[dict[str, Any]] = document["features"]
    return features


def assert_no_null(value: Any) -> None:
    assert value is not None
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        assert_no_null(inner)


def assert_survives_quantization(geometry: dict[str, Any]) -> None:
    """A geometry is what rules 7 to 10 ask for, and stays so as QuPath holds it: single precision, hundredths."""
    kind = geometry["type"]
    assert kind in ("Polygon", "MultiPolygon", "Point", "MultiPoint", "LineString")
    given = shape(geometry)
    xy = shapely.get_coordinates(given)
    assert (xy * 4 == np.rint(xy * 4)).all()
    held = np.rint(xy.astype(np.float32).astype(np.float64) * 100) / 100
    assert (held == xy).all()
    assert shapely.set_coordinates(given, held).is_valid, geometry
    if kind not in ("Polygon", "MultiPolygon"):
        return
    parts = [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]
    assert kind == "Polygon" or len(parts) > 1
    assert (shapely.area(shapely.get_parts(given)) >= 1).all()
    for ring in (ring for part in parts for ring in part):
        assert len(ring) >= 4
        assert ring[0] == ring[-1]
        assert set(map(len, ring)) == {2}


def simple(number: int = 0, **changes: Any) -> dict[str, Any]:
    """A detection that breaks no rule, but for the changes."""
    made = feature(box(0, 0, 10, 10), object_type="detection", id=stable_id("s", "nuclei", number))
    assert made is not None
    return {**made, **changes}


def annotated(**properties: Any) -> dict[str, Any]:
    return simple(properties={"objectType": "annotation", **properties})


def shaped(kind: str, coordinates: Any, **more: Any) -> dict[str, Any]:
    return simple(geometry={"type": kind, "coordinates": coordinates, **more})


# --- making ---------------------------------------------------------------------------------------------------------

offsets = st.tuples(st.floats(0, 400_000), st.floats(0, 400_000))


@st.composite
def rings(draw: st.DrawFn, side: float) -> list[tuple[float, float]]:
    number = st.one_of(st.floats(-side, side), st.integers(-int(side), int(side)).map(float))
    ring = draw(st.lists(st.tuples(number, number), min_size=3, max_size=12))
    return [*ring, ring[0]]


@st.composite
def polygons(draw: st.DrawFn) -> Any:
    """Any polygon: crossing itself, with holes outside or across, in overlapping parts, tiny or flat."""
    side = draw(st.sampled_from([0.3, 2.0, 10.0, 60.0, 3000.0]))
    parts = [
        Polygon(draw(rings(side)), [draw(rings(side)) for _ in range(draw(st.integers(0, 2)))])
        for _ in range(draw(st.integers(1, 3)))
    ]
    return parts[0] if len(parts) == 1 else MultiPolygon(parts)


def moved(geometry: Any, offset: tuple[float, float]) -> Any:
    return shapely.transform(geometry, lambda xy: xy + offset)


@settings(max_examples=100, deadline=None)
@given(geometry=polygons(), offset=offsets)
def test_any_polygon_at_any_offset_is_written_valid(geometry: Any, offset: tuple[float, float]) -> None:
    made = feature(moved(geometry, offset), object_type="detection", id=stable_id("s", "nuclei", 0))
    if made is not None:
        assert_survives_quantization(made["geometry"])
        assert geojson._encode([made])


@settings(max_examples=30, deadline=None)
@given(geometry=polygons(), offset=offsets)
def test_little_is_lost(geometry: Any, offset: tuple[float, float]) -> None:
    fixed = moved(shapely.make_valid(geometry), offset)
    made = feature(moved(geometry, offset), object_type="annotation", id=stable_id("s", "tissue", 0))
    kept = 0.0 if made is None else shape(made["geometry"]).area
    # No vertex moves by more than half a grid step in x and y; a part below 1 px2 may go.
    n_parts = shapely.get_num_coordinates(fixed)
    assert abs(kept - fixed.area) <= 0.4 * fixed.length + 1.1 * n_parts + 1


@settings(max_examples=30, deadline=None)
@given(cell=polygons(), nucleus=polygons(), offset=offsets)
def test_a_nucleus_stays_inside_its_cell(cell: Any, nucleus: Any, offset: tuple[float, float]) -> None:
    made = feature(
        moved(cell, offset), object_type="cell", id=stable_id("s", "cells", 0), nucleus_geometry=moved(nucleus, offset)
    )
    if made is not None and "nucleusGeometry" in made:
        assert_survives_quantization(made["nucleusGeometry"])
        assert shape(made["geometry"]).covers(shape(made["nucleusGeometry"]))
        assert geojson._encode([made])


def test_a_nucleus_that_pokes_out_is_cut_back() -> None:
    made = feature(
        box(0, 0, 20, 20), object_type="cell", id=stable_id("s", "cells", 0), nucleus_geometry=box(5, 5, 30, 15)
    )
    assert made is not None
    assert 140 < shape(made["nucleusGeometry"]).area <= 150
    outside = feature(
        box(0, 0, 20, 20), object_type="cell", id=stable_id("s", "cells", 0), nucleus_geometry=box(40, 5, 50, 15)
    )
    assert outside is not None
    assert "nucleusGeometry" not in outside


@pytest.mark.parametrize("degrees", range(0, 90, 7))
def test_a_nucleus_is_cut_back_at_a_slanting_edge_too(degrees: int) -> None:
    cell = shapely.affinity.rotate(box(0, 0, 20, 20), degrees, origin=(3.3, 4.7))
    nucleus = shapely.affinity.rotate(Point(18, 10).buffer(5), degrees, origin=(3.3, 4.7))
    made = feature(cell, object_type="cell", id=stable_id("s", "cells", 0), nucleus_geometry=nucleus)
    assert made is not None
    kept = shape(made["nucleusGeometry"])
    inside = cell.intersection(nucleus).area
    assert inside - 8 < kept.area < inside
    assert shape(made["geometry"]).covers(kept)


@settings(max_examples=30, deadline=None)
@given(
    geometries=st.lists(
        st.one_of(polygons(), st.none(), st.just(Point(3.3, 4.4)), st.just(LineString([(0, 0), (5, 5.1)]))), max_size=8
    ),
    offset=offsets,
)
def test_many_at_once_are_the_same_as_one_by_one(geometries: list[Any], offset: tuple[float, float]) -> None:
    ids = [stable_id("s", "nuclei", number) for number in range(len(geometries))]
    areas = np.array([np.nan if number == 1 else number / 7 for number in range(len(geometries))])
    names = [None if number % 2 else f"n{number}" for number in range(len(geometries))]
    classes = [None if number % 3 else ("Tumor: Positive", (1, 2, 3)) for number in range(len(geometries))]
    singles = [
        feature(
            geometry,
            object_type="detection",
            id=id,
            name=name,
            classification=classification,
            measurements={"Area µm^2": area},
            offset_l0=offset,
        )
        for geometry, id, name, classification, area in zip(geometries, ids, names, classes, areas, strict=True)
    ]
    many = polygon_features(
        geometries,
        object_type="detection",
        ids=ids,
        names=names,
        classifications=classes,
        measurements={"Area µm^2": areas},
        offset_l0=offset,
    )
    assert list(many) == singles


def test_batches_are_written_like_single_features(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    discs = [Point(x, y).buffer(r, quad_segs=5) for x, y, r in rng.uniform(-5, 4000, (1300, 3)) / (1, 1, 300)]
    shapes = [*discs, None, discs[0].difference(discs[0].buffer(-2)), MultiPolygon([box(0, 0, 2, 2), box(5, 5, 9, 9)])]
    nuclei = [None if each is None or number % 2 else each.buffer(-1) for number, each in enumerate(shapes)]
    given = {
        "object_type": "cell",
        "ids": [stable_id("s", "cells", number) for number in range(len(shapes))],
        "classifications": [TUMOR if number % 2 else None for number in range(len(shapes))],
        "measurements": {"Area µm^2": [0.0 if each is None else each.area for each in shapes]},
        "nucleus_geometries": nuclei,
    }
    from_batches = write_features(tmp_path / "a.geojson", feature_batches(shapes, **given))
    from_singles = write_features(tmp_path / "b.geojson", polygon_features(shapes, **given))
    assert from_batches == from_singles
    assert from_batches.written + from_batches.dropped == len(shapes)
    assert from_batches.dropped >= 1
    assert (tmp_path / "a.geojson").read_bytes() == (tmp_path / "b.geojson").read_bytes()
    assert len(strict(tmp_path / "a.geojson")) == from_batches.written

    mixed = [simple(-1), *feature_batches(shapes, **given), None, simple(-2)]
    report = write_features(tmp_path / "c.geojson", mixed)
    assert (report.written, report.dropped) == (from_batches.written + 2, from_batches.dropped + 1)
    assert strict(tmp_path / "c.geojson")[1:-1] == strict(tmp_path / "a.geojson")


def test_batches_are_refused_as_single_features_are() -> None:
    one = {"object_type": "detection", "ids": [stable_id("s", "l", 0)]}
    with pytest.raises(UsageError, match="names: 2 values for 1 geometries"):
        list(feature_batches([Point(1, 1)], **one, names=["a", "b"]))
    with pytest.raises(GeoJSONError, match="rule 16: 31 measurements"):
        list(feature_batches([Point(1, 1)], **one, measurements={f"m{k}": [1.0] for k in range(31)}))
    with pytest.raises(GeoJSONError, match="rule 15"):
        list(feature_batches([Point(1, 1)], **one, classifications=[("Tumor*", (1, 2, 3))]))
    with pytest.raises(GeoJSONError, match="rule 14"):
        list(feature_batches([box(0, 0, 9, 9)], **one, nucleus_geometries=[box(1, 1, 5, 5)]))
    with pytest.raises(GeoJSONError, match="feature 1 .*rule 12"):
        list(feature_batches([Point(1, 1)], object_type="detection", ids=["1"]))
    with pytest.raises(GeoJSONError, match="rule 10: a MultiLineString"):
        list(feature_batches([MultiLineString([[(0, 0), (1, 1)]])], **one))


def test_a_pixel_is_the_unit_square(tmp_path: Path) -> None:
    made = feature(box(7, 3, 8, 4), object_type="annotation", id=stable_id("s", "tissue", 0))
    write_features(tmp_path / "a.geojson", [made])
    (read,) = read_features(tmp_path / "a.geojson")
    assert read.geometry.equals(box(7, 3, 8, 4))


def test_bounds_are_subtracted(tmp_path: Path) -> None:
    made = feature(
        box(100_010, 50_020, 100_030, 50_050),
        object_type="cell",
        id=stable_id("s", "cells", 0),
        nucleus_geometry=box(100_015, 50_025, 100_020, 50_040),
        offset_l0=(100_000, 50_000),
    )
    write_features(tmp_path / "a.geojson", [made])
    (read,) = read_features(tmp_path / "a.geojson")
    assert read.geometry.equals(box(10, 20, 30, 50))
    assert read.nucleus_geometry is not None
    assert read.nucleus_geometry.equals(box(15, 25, 20, 40))


@pytest.mark.parametrize(
    "geometry",
    [
        None,
        Polygon(),
        MultiPolygon(),
        GeometryCollection(),
        GeometryCollection([Point(1, 1)]),
        Point(),
        Point(float("nan"), 1),
        Point(1, float("inf")),
        Point(5e6, 0),
        Polygon([(0, 0), (5, 0), (float("inf"), 5), (0, 0)]),
        box(0, 0, 0.8, 1),
        box(0, 0, 100, 0.1),
        Polygon([(0, 0), (5, 5), (9, 9), (0, 0)]),
        MultiPolygon([box(0, 0, 0.5, 0.5), box(4, 4, 4.5, 4.5)]),
        LineString([(0, 0), (0.1, 0)]),
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_none(geometry: Any) -> None:
    assert feature(geometry, object_type="annotation", id=stable_id("s", "l", 0)) is None


@pytest.mark.parametrize(
    ("geometry", "kind", "coordinates"),
    [
        (Point(1.1, 2.4, 9.0), "Point", [1.0, 2.5]),
        (MultiPoint([(1, 2)]), "Point", [1.0, 2.0]),
        (MultiPoint([(1, 2), (1, 2)]), "MultiPoint", [[1.0, 2.0], [1.0, 2.0]]),
        (LineString([(0, 0), (0.1, 0), (4, 0)]), "LineString", [[0.0, 0.0], [4.0, 0.0]]),
        (MultiPolygon([Polygon([(0, 0), (4, 0), (0, 4)])]), "Polygon", [[[0, 0], [4, 0], [0, 4], [0, 0]]]),
        (Polygon([(0, 0), (4, 0), (4, 0.1), (0, 4)]), "Polygon", [[[0, 0], [4, 0], [0, 4], [0, 0]]]),
    ],
    ids=str,
)
def test_geometry_kinds(geometry: Any, kind: str, coordinates: Any) -> None:
    made = feature(geometry, object_type="annotation", id=stable_id("s", "l", 0))
    assert made is not None
    assert made["geometry"]["type"] == kind
    if kind == "Polygon":
        assert shape(made["geometry"]).normalize().equals_exact(Polygon(*coordinates).normalize(), 0)
    else:
        assert made["geometry"]["coordinates"] == coordinates


def test_a_bow_tie_keeps_both_wings_and_overlapping_parts_become_one() -> None:
    bow = feature(Polygon([(0, 0), (10, 10), (10, 0), (0, 10)]), object_type="annotation", id=stable_id("s", "l", 0))
    assert bow is not None
    assert bow["geometry"]["type"] == "MultiPolygon"
    assert shape(bow["geometry"]).area == 50
    two = MultiPolygon([box(0, 0, 10, 10), box(5, 0, 20, 10)])
    joined = feature(two, object_type="annotation", id=stable_id("s", "l", 0))
    assert joined is not None
    assert shape(joined["geometry"]).area == 200


def test_properties_are_left_out_when_empty_and_rounded_to_single_precision() -> None:
    made = feature(
        Point(1, 1),
        object_type="annotation",
        id=stable_id("s", "l", 0),
        name="",
        measurements={
            "Area µm^2": np.float32(0.88),
            "Count": np.int64(7),
            "NaN": float("nan"),
            "Infinite": float("-inf"),
            "Too large": 1e39,
            "Missing": None,  # type: ignore[dict-item]
            "Flag": True,
            "Text": "1",  # type: ignore[dict-item]
        },
        metadata={},
    )
    assert made is not None
    assert made["properties"] == {"objectType": "annotation", "measurements": {"Area µm^2": 0.88, "Count": 7}}
    bare = feature(Point(1, 1), object_type="tile", id=stable_id("s", "l", 0), measurements={"x": float("nan")})
    assert bare is not None
    assert bare["properties"] == {"objectType": "tile"}


def test_a_subclass_is_written_as_names() -> None:
    made = feature(
        Point(1, 1), object_type="detection", id=stable_id("s", "l", 0), classification=("Tumor: Positive", (1, 2, 3))
    )
    assert made is not None
    assert made["properties"]["classification"] == {"names": ["Tumor", "Positive"], "color": [1, 2, 3]}


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [
        (12, {"id": "17"}),
        (13, {"object_type": "Detection"}),
        (14, {"nucleus_geometry": Point(1, 1)}),
        (15, {"classification": ("", (1, 2, 3))}),
        (15, {"classification": ("Tumor:", (1, 2, 3))}),
        (15, {"classification": ("Tumor", (1, 2, 256))}),
        (15, {"classification": ("Tumor", (1, 2.5, 3))}),
        (16, {"measurements": {"": 1.0}}),
        (16, {"measurements": {"box": [1.0, 2.0]}}),
        (16, {"measurements": {f"m{number}": 1.0 for number in range(31)}}),
        (17, {"color": (1, 2)}),
        (17, {"name": 5}),
        (18, {"locked": True}),
        (19, {"metadata": {"run": "c0ffee"}}),
    ],
)
def test_wrong_arguments_are_refused_at_once(rule: int, wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"object_type": "detection", "id": stable_id("s", "l", 0), **wrong}
    with pytest.raises(GeoJSONError, match=f"breaks rule {rule}: "):
        feature(Point(1, 1), **arguments)


def test_ids_are_uuids_that_do_not_change() -> None:
    assert stable_id("slide", "nuclei", 7) == stable_id("slide", "nuclei", 7)
    # Pinned: ids in files that users have must stay theirs in later versions.
    assert stable_id("slide", "nuclei", 7) == "91a05000-9953-5763-af50-172a4ed22cb0"
    assert uuid.UUID(stable_id("slide", "nuclei", 7)).version == 5
    made = {
        stable_id(slide, layer, number)
        for slide in ("a", "a1", "ä")
        for layer in ("nuclei", "1nuclei")
        for number in range(20)
    }
    assert len(made) == 120


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.geojson", "a.geojson.gz", "A.GeoJSON", "ä b.geojson"])
def test_examples_come_out_as_they_are(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    report = write_features(path, (json.loads(line) for line in EXAMPLES))
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if name.endswith("gz") else raw).decode("utf-8")
    assert text.splitlines() == [
        '{"type":"FeatureCollection","features":[',
        *(f"{line}," for line in EXAMPLES[:-1]),
        EXAMPLES[-1],
        "]}",
    ]
    assert (report.written, report.dropped) == (6, 0)
    assert len(strict(path)) == 6
    assert [each.name for each in tmp_path.iterdir()] == [name]


def test_numbers_are_written_exactly(tmp_path: Path) -> None:
    numbers = [0.0, 0.25, -0.25, 0.5, -0.75, 9999.75, 10_000.0, -10_000.25, 10_009.0, 131_072.25, 4_194_304.0, -4e6, 70]
    points = [[x, y] for x in numbers for y in numbers]
    write_features(tmp_path / "a.geojson", [shaped("MultiPoint", points)])
    assert strict(tmp_path / "a.geojson")[0]["geometry"]["coordinates"] == points
    text = (tmp_path / "a.geojson").read_text()
    assert "[0,0],[0,0.25],[0,-0.25],[0,0.5],[0,-0.75],[0,9999.75],[0,10000],[0,-10000.25],[0,10009]" in text
    assert "-0," not in text


def test_a_minus_zero_is_zero(tmp_path: Path) -> None:
    write_features(tmp_path / "a.geojson", [shaped("Point", [-0.0, 1])])
    assert "[0,1]" in (tmp_path / "a.geojson").read_text()


def test_two_runs_make_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(path: Path) -> bytes:
        write_features(path, (simple(number) for number in range(50)))
        return path.read_bytes()

    first = run(tmp_path / "a.geojson.gz")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert run(tmp_path / "b.geojson.gz") == first
    assert run(tmp_path / "a.geojson") == run(tmp_path / "b.geojson")


def test_count_and_area_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    discs = [Point(x, y).buffer(r, quad_segs=6) for x, y, r in rng.uniform(5, 300_000, (1500, 3)) / (1, 1, 20_000)]
    ids = [stable_id("s", "nuclei", number) for number in range(len(discs))]
    made = list(polygon_features(discs, object_type="detection", ids=ids, measurements={"n": np.arange(1500)}))
    report = write_features(tmp_path / "a.geojson.gz", made)
    read = list(read_features(tmp_path / "a.geojson.gz"))
    assert len(read) == report.written == 1500 - report.dropped
    assert report.dropped == sum(each is None for each in made)
    area = sum(disc.area for disc, each in zip(discs, made, strict=True) if each is not None)
    assert sum(each.geometry.area for each in read) == pytest.approx(area, rel=1e-3)
    assert sum(shape(each["geometry"]).area for each in strict(tmp_path / "a.geojson.gz")) == pytest.approx(area, 1e-3)
    assert [each.id for each in read] == [id for id, each in zip(ids, made, strict=True) if each is not None]
    numbers = [number for number, each in enumerate(made) if each is not None]
    assert [each.measurements for each in read] == [{"n": float(number)} for number in numbers]


def test_no_objects_make_an_empty_collection(tmp_path: Path) -> None:
    assert write_features(tmp_path / "a.geojson", []).written == 0
    assert strict(tmp_path / "a.geojson") == []
    report = write_features(tmp_path / "a.geojson", [None, None])
    assert (report.written, report.dropped) == (0, 2)


@pytest.mark.parametrize("name", ["a.json", "a.gz", "a.zip", "a.geojson.zip", "geojson", "a.geojsonl"])
def test_other_endings_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="'.geojson' and '.geojson.gz' only"):
        write_features(tmp_path / name, [])
    assert list(tmp_path.iterdir()) == []


SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
BROKEN: list[tuple[int, Any]] = [
    (1, [1]),
    (1, "feature"),
    (1, simple(type="feature")),
    (7, shaped("Point", [0.1, 0])),
    (7, shaped("Point", [4_194_304.25, 0])),
    (7, shaped("Point", [10**400, 0])),
    (8, shaped("Polygon", [SQUARE[:-1]])),
    (8, shaped("Polygon", [[[0, 0], [5, 5], [0, 0]]])),
    (8, shaped("Polygon", [[]])),
    (8, shaped("Polygon", [[[0, 0, 1], [10, 0, 1], [10, 10, 1], [0, 0, 1]]])),
    (8, shaped("Polygon", [[[0, 0], [10, 0], [float("nan"), 10], [0, 0]]])),
    (8, shaped("Point", [float("inf"), 0])),
    (8, shaped("Point", ["1", 0])),
    (8, shaped("Point", [True, 0])),
    (8, shaped("Point", [None, 0])),
    (8, shaped("MultiPoint", [1, 2])),
    (8, shaped("Polygon", SQUARE)),
    (9, shaped("Polygon", [[[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]])),
    (9, shaped("Polygon", [SQUARE, [[20, 20], [25, 20], [25, 25], [20, 20]]])),
    (9, shaped("Polygon", [SQUARE, [[1, 1], [5, 1], [5, 5], [1, 1]], [[2, 1], [6, 1], [6, 5], [2, 1]]])),
    (9, shaped("Polygon", [[[0, 0], [0.5, 0], [0.5, 0.5], [0, 0]]])),
    (9, shaped("MultiPolygon", [[SQUARE], [[[5, 5], [15, 5], [15, 15], [5, 5]]]])),
    (9, shaped("MultiPolygon", [[SQUARE], [[[20, 20], [21, 20], [20, 21], [20, 20]]]])),
    (10, simple(geometry=None)),
    (10, {key: value for key, value in simple().items() if key != "geometry"}),
    (10, simple(geometry=[1, 2])),
    (10, shaped("GeometryCollection", [1])),
    (10, shaped("MultiLineString", [[[0, 0], [5, 5]]])),
    (10, shaped("Polygon", [])),
    (10, shaped("MultiPolygon", [[SQUARE]])),
    (10, shaped("MultiPolygon", [[SQUARE], []])),
    (10, shaped("MultiPoint", [])),
    (10, shaped("LineString", [[1, 1], [1, 1]])),
    (10, shaped("LineString", [[1, 1]])),
    (11, shaped("Point", [1, 1], plane=None)),
    (11, shaped("Point", [1, 1], plane={"c": -1, "z": 2})),
    (11, shaped("Point", [1, 1], plane={"c": -1, "z": 2.0, "t": 0})),
    (12, simple(id=None)),
    (12, simple(id="17")),
    (12, simple(id=17)),
    (12, simple(id=stable_id("s", "l", 1).upper())),
    (12, simple(id=stable_id("s", "l", 1) + "\n")),
    (13, simple(properties={})),
    (13, simple(properties=None)),
    (13, simple(properties={"objectType": "nucleus"})),
    (13, simple(properties={"objectType": ["tile"]})),
    (13, simple(objectType="detection", properties={})),
    (14, simple(nucleusGeometry={"type": "Point", "coordinates": [1, 1]})),
    (14, simple(nucleusGeometry=None, properties={"objectType": "cell"})),
    (14, simple(nucleusGeometry=shaped("Polygon", [[[1, 1], [11, 1], [5, 5], [1, 1]]])["geometry"])),
    (15, annotated(classification=None)),
    (15, annotated(classification="Tumor")),
    (15, annotated(classification={"name": "Tumor"})),
    (15, annotated(classification={"name": "Tumor", "color": "#ff0000"})),
    (15, annotated(classification={"name": "Tumor", "color": [1, 2, 3, 4]})),
    (15, annotated(classification={"name": "Tumor", "color": [1, 2, 3.0]})),
    (15, annotated(classification={"name": "Tumor", "color": [1, 2, True]})),
    (15, annotated(classification={"name": "", "color": [1, 2, 3]})),
    (15, annotated(classification={"name": " ", "color": [1, 2, 3]})),
    (15, annotated(classification={"name": "a\nb", "color": [1, 2, 3]})),
    (15, annotated(classification={"name": "a: b", "color": [1, 2, 3]})),
    (15, annotated(classification={"name": "Ignore*", "color": [1, 2, 3]})),
    (15, annotated(classification={"name": "\ud800", "color": [1, 2, 3]})),
    (15, annotated(classification={"names": [], "color": [1, 2, 3]})),
    (15, annotated(classification={"names": "ab", "color": [1, 2, 3]})),
    (15, annotated(classification={"name": "a", "names": ["a"], "color": [1, 2, 3]})),
    (16, annotated(measurements=None)),
    (16, annotated(measurements=[{"name": "a", "value": 1}])),
    (16, annotated(measurements={"a": float("nan")})),
    (16, annotated(measurements={"a": float("inf")})),
    (16, annotated(measurements={"a": 1e39})),
    (16, annotated(measurements={"a": None})),
    (16, annotated(measurements={"a": True})),
    (16, annotated(measurements={"a": "1"})),
    (16, annotated(measurements={1: 1.0})),
    (16, simple(properties={"objectType": "tile", "measurements": {f"m{k}": k for k in range(31)}})),
    (17, annotated(name=None)),
    (17, annotated(color=None)),
    (17, annotated(color=[1, 2])),
    (17, annotated(color=[1, 2, -1])),
    (18, annotated(isLocked=False)),
    (18, simple(properties={"objectType": "detection", "isLocked": True})),
    (19, annotated(metadata={"a": 1})),
    (19, annotated(metadata="a")),
    (19, simple(properties={"objectType": "cell", "metadata": {"a": "b"}})),
    (20, annotated(area=5)),
    (20, simple(childObjects=[])),
    (20, simple(bbox=[0, 0, 1, 1])),
    (20, shaped("Point", [1, 1], isEllipse=True)),
    (21, annotated(name="")),
    (21, annotated(measurements={})),
    (21, annotated(metadata={})),
]
# A nucleus is looked at only on a cell.
BROKEN = [
    (rule, {**made, "properties": {"objectType": "cell"}})
    if rule == 14 and (made["nucleusGeometry"] or {}).get("type") == "Polygon"
    else (rule, made)
    for rule, made in BROKEN
]


@pytest.mark.parametrize(("rule", "broken"), BROKEN, ids=[f"{rule}-{n}" for n, (rule, _) in enumerate(BROKEN)])
def test_a_feature_made_by_hand_that_breaks_a_rule_is_refused(tmp_path: Path, rule: int, broken: Any) -> None:
    made = [simple(100), None, simple(101), broken, simple(102)]
    with pytest.raises(GeoJSONError, match=rf"^a\.geojson: feature 4 .*breaks rule {rule}: .+; .+") as caught:
        write_features(tmp_path / "a.geojson", made)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_rules_that_hold_by_hand(tmp_path: Path) -> None:
    made = shaped("Polygon", [SQUARE], plane={"c": -1, "z": 2, "t": 0})
    made["properties"] = {
        "objectType": "annotation",
        "name": 'quoted "name" \u2028 µ \n line',
        "color": (1, 2, 3),
        "measurements": {f"m{number}": number for number in range(31)},
        "isLocked": True,
    }
    touching = [[SQUARE], [[[10, 10], [20, 10], [20, 20], [10, 10]]]]
    write_features(tmp_path / "a.geojson", [made, {**shaped("MultiPolygon", touching), "id": stable_id("s", "l", 1)}])
    first, second = strict(tmp_path / "a.geojson")
    assert first["properties"] == {**made["properties"], "color": [1, 2, 3]}
    assert first["geometry"]["plane"] == {"c": -1, "z": 2, "t": 0}
    assert second["geometry"]["coordinates"] == touching


@pytest.mark.parametrize("apart", [0, 1, 1500])
def test_doubled_ids_are_refused(tmp_path: Path, apart: int) -> None:
    between = [simple(number) for number in range(apart)]
    with pytest.raises(GeoJSONError, match=rf"features 2 and {apart + 3} break rule 12: both bear the id [0-9a-f-]+;"):
        write_features(tmp_path / "a.geojson", [None, simple(-5), *between, simple(-5)])
    assert list(tmp_path.iterdir()) == []


def test_a_large_layer_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(geojson, "_MANY_POLYGONS", 5)
    write_features(tmp_path / "a.geojson", [simple(number) for number in range(5)])
    assert not caplog.records
    write_features(tmp_path / "a.geojson", [simple(number) for number in range(6)])
    assert "split the layer" in caplog.text


def test_memory_does_not_grow_with_the_features(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        tracemalloc.start()
        made = (
            batch
            for start in range(0, count, 500)
            for batch in polygon_features(
                [box(0, 0, 5, 5)] * 500,
                object_type="detection",
                ids=[stable_id("s", "l", start + k) for k in range(500)],
            )
        )
        write_features(tmp_path / "a.geojson", made)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    assert peak(6_000) < 1.25 * peak(1_500)


SIMPLE = simple()


def fails_while_iterating(error: BaseException) -> Iterator[dict[str, Any]]:
    for number in range(1500):
        yield {**SIMPLE, "id": stable_id("s", "l", number)}
    raise error


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "slide can't be read"), KeyboardInterrupt(), ValueError("x")])
@pytest.mark.parametrize("name", ["a.geojson", "a.geojson.gz"])
def test_an_error_among_the_features_leaves_the_old_file(tmp_path: Path, error: BaseException, name: str) -> None:
    path = tmp_path / name
    write_features(path, [simple()])
    before = path.read_bytes()
    with pytest.raises(type(error)) as caught:
        write_features(path, fails_while_iterating(error))
    assert caught.value is error
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


class FullDisk:
    """A file that takes so many bytes and no more."""

    def __init__(self, file: Any, room: int) -> None:
        self._file = file
        self._room = room

    def write(self, data: bytes) -> int:
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written: int = self._file.write(data)
        return written

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.mark.parametrize("room", [0, 100, 10_000])
@pytest.mark.parametrize("name", ["a.geojson", "a.geojson.gz"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, name: str) -> None:
    real_open = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode: FullDisk(real_open(path, mode), room))
    with pytest.raises(StoreWriteError, match=r"No space left.*free space or choose another"):
        write_features(tmp_path / name, ({**SIMPLE, "id": stable_id("s", "l", k)} for k in range(3000)))
    assert list(tmp_path.iterdir()) == []


def test_a_refused_sync_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StoreWriteError, match="No space left"):
        write_features(tmp_path / "a.geojson", [simple()])
    assert list(tmp_path.iterdir()) == []


def run_python(code: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_kernel_refuses_more_bytes(tmp_path: Path) -> None:
    process = run_python(
        """
        import resource, sys
        from pathlib import Path
        from shapely.geometry import box
        from pathopipe.errors import StoreWriteError
        from pathopipe.geojson import feature, stable_id, write_features
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        made = (feature(box(0, 0, 9, 9), object_type="tile", id=stable_id("s", "l", k)) for k in range(3000))
        try:
            write_features(Path(sys.argv[1]), made)
        except StoreWriteError as error:
            sys.exit(f"refused: {error}")
        """,
        str(tmp_path / "a.geojson"),
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "refused: " in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there_before", [False, True])
def test_killed_while_writing(tmp_path: Path, there_before: bool) -> None:
    path = tmp_path / "a.geojson"
    if there_before:
        write_features(path, [simple()])
    before = path.read_bytes() if there_before else None
    process = run_python(
        """
        import sys, time
        from pathlib import Path
        from shapely.geometry import box
        from pathopipe.geojson import feature, stable_id, write_features
        def slow():
            for k in range(1_000_000):
                if k == 5000:
                    print("some of it is written", flush=True)
                if k > 5000:
                    time.sleep(0.01)
                yield feature(box(0, 0, 9, 9), object_type="tile", id=stable_id("s", "l", k))
        write_features(Path(sys.argv[1]), slow())
        """,
        str(path),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "some of it is written\n"
    (temporary,) = tmp_path.glob(".*.partial")
    assert temporary.stat().st_size > 10_000
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert (path.read_bytes() if path.exists() else None) == before


def test_the_last_step_is_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the process may die, the final name is absent or whole: it appears by one rename of a synced file."""
    steps: list[str] = []
    path = tmp_path / "a.geojson"
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        assert steps or not path.exists()
        steps.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")  # noqa: PTH112
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> Path:
        assert source.parent == target.parent
        assert len(strict(source)) == 2
        steps.append("rename")
        return real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_features(path, [simple(0), simple(1)])
    assert steps == ["file", "rename", "folder"]


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    write_features(tmp_path / "new" / "er" / "a.geojson", [simple()])
    assert len(strict(tmp_path / "new" / "er" / "a.geojson")) == 1


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a.geojson").mkdir()
    with pytest.raises(StoreWriteError, match="can't be written"):
        write_features(tmp_path / "a.geojson", [simple()])
    assert [each.name for each in tmp_path.iterdir()] == ["a.geojson"]


def test_others_may_read_the_file(tmp_path: Path) -> None:
    """The usual rights of a new file, not those of a private temporary one."""
    write_features(tmp_path / "a.geojson", [simple()])
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "a.geojson").stat().st_mode == (tmp_path / "plain").stat().st_mode


# --- reading --------------------------------------------------------------------------------------------------------


def put(tmp_path: Path, document: Any, name: str = "a.geojson") -> Path:
    path = tmp_path / name
    text = document if isinstance(document, str) else json.dumps(document)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def collection(*features: Any) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": list(features)}


def raw_feature(geometry: Any = None, **properties: Any) -> dict[str, Any]:
    given = {"type": "Polygon", "coordinates": [SQUARE]} if geometry is None else geometry
    return {"type": "Feature", "geometry": given, "properties": properties}


@pytest.mark.parametrize("name", ["a.geojson", "a.json", "a.geojson.gz", "a.gz", "a.txt"])
@pytest.mark.parametrize("byte_order_mark", ["", "\ufeff"])
@pytest.mark.parametrize("wrap", [lambda f: collection(f), lambda f: f, lambda f: [f], lambda f: f["geometry"]])
def test_wrappings(tmp_path: Path, name: str, byte_order_mark: str, wrap: Callable[[Any], Any]) -> None:
    text = byte_order_mark + json.dumps(wrap(raw_feature()), indent=1)
    (read,) = read_features(put(tmp_path, text, name))
    assert read.geometry.equals(box(0, 0, 10, 10))
    assert read.object_type == "annotation"


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    write_features(tmp_path / "a.geojson", map(json.loads, EXAMPLES))
    tissue, stroma, tile, nucleus, cell, mitosis = read_features(tmp_path / "a.geojson")
    assert (tissue.object_type, tissue.name, tissue.names, tissue.color) == (
        "annotation",
        "Tissue 1",
        ("Tissue",),
        (0, 160, 80),
    )
    assert tissue.id == "5f0c6a52-3f0b-5d0e-9a51-6c1f7a0b1e01"
    assert len(tissue.geometry.interiors) == 1
    assert stroma.geometry.geom_type == "MultiPolygon"
    assert tile.object_type == "tile"
    assert tile.measurements == {"Attention": 0.8125, "Tumor probability": 0.93}
    assert nucleus.names == ("Lymphocyte",)
    assert cell.names == ("Tumor", "Positive")
    assert cell.nucleus_geometry is not None
    assert cell.nucleus_geometry.within(cell.geometry)
    assert mitosis.geometry.equals(Point(650.5, 350.5))
    for each, line in zip((tissue, stroma, tile, nucleus, cell, mitosis), EXAMPLES, strict=True):
        assert each.geometry.equals(shape(json.loads(line)["geometry"]))


@pytest.mark.parametrize(
    ("raw", "object_type", "names", "color", "measurements"),
    [
        # 0.1 and 0.2: the type in place of the id, packed colours, measurements as a list
        (
            {
                "type": "Feature",
                "id": "PathCellObject",
                "geometry": {"type": "Polygon", "coordinates": [SQUARE]},
                "properties": {
                    "isLocked": False,
                    "measurements": [{"name": "Area", "value": 2.5}, {"name": "Lost", "value": None}, "?"],
                    "classification": {"name": "Tumor: Positive", "colorRGB": -3670016},
                },
            },
            "cell",
            ("Tumor", "Positive"),
            (200, 0, 0),
            {"Area": 2.5},
        ),
        # 0.3
        (
            {**raw_feature(object_type="tile", color=[1, 2, 3]), "id": "PathTileObject"},
            "tile",
            (),
            (1, 2, 3),
            {},
        ),
        (raw_feature(objectType="Detection", measurements={"a": 1, "b": None}), "detection", (), None, {"a": 1.0}),
        ({**raw_feature(), "objectType": "detection"}, "detection", (), None, {}),
        (raw_feature(objectType="tmaCore", classification=None, name=None, color=None), "annotation", (), None, {}),
        (raw_feature(classification="Stroma"), "annotation", ("Stroma",), None, {}),
        (
            raw_feature(classification={"name": "Stroma", "color": "#0A0b0c"}),
            "annotation",
            ("Stroma",),
            (10, 11, 12),
            {},
        ),
        (
            raw_feature(classification={"names": ["Tumor", "Positive"], "color": [1, 2, 3]}, color=[9, 9, 9]),
            "annotation",
            ("Tumor", "Positive"),
            (1, 2, 3),
            {},
        ),
        (
            raw_feature(measurements={"flag": True, "text": "1", "NaN": "NaN"}, color=[1, 2]),
            "annotation",
            (),
            None,
            {},
        ),
        ({**raw_feature(), "properties": None}, "annotation", (), None, {}),
        ({"geometry": {"type": "Polygon", "coordinates": [SQUARE]}}, "annotation", (), None, {}),
    ],
)
def test_variants_of_properties(
    tmp_path: Path, raw: Any, object_type: str, names: Any, color: Any, measurements: dict[str, float]
) -> None:
    (read,) = read_features(put(tmp_path, collection(raw)))
    assert (read.object_type, read.names, read.color, read.measurements) == (object_type, names, color, measurements)
    assert read.name is None
    assert read.id is None


def test_ids_and_not_finite_measurements(tmp_path: Path) -> None:
    text = json.dumps(collection(raw_feature(measurements={"a": float("nan"), "b": float("inf"), "c": 2})))
    assert "NaN" in text
    (read,) = read_features(put(tmp_path, text.replace('"type": "Feature"', '"id": 17, "type": "Feature"')))
    assert read.measurements == {"c": 2.0}
    assert read.id == "17"


@pytest.mark.parametrize(
    ("geometry", "expected"),
    [
        ({"type": "Point", "coordinates": [1.5, 2]}, Point(1.5, 2)),
        ({"type": "Point", "coordinates": [1.5, 2, 0]}, Point(1.5, 2)),
        ({"type": "MultiPoint", "coordinates": [[1, 2], [3, 4]]}, MultiPoint([(1, 2), (3, 4)])),
        ({"type": "LineString", "coordinates": [[1, 2], [3, 4]]}, LineString([(1, 2), (3, 4)])),
        ({"type": "MultiLineString", "coordinates": [[[1, 2], [3, 4]]]}, MultiLineString([[(1, 2), (3, 4)]])),
        ({"type": "Polygon", "coordinates": [[[x, y, 0] for x, y in SQUARE]]}, box(0, 0, 10, 10)),
        ({"type": "MultiPolygon", "coordinates": [[SQUARE]]}, MultiPolygon([box(0, 0, 10, 10)])),
        ({"type": "Polygon", "coordinates": [SQUARE], "isEllipse": True, "plane": None}, box(0, 0, 10, 10)),
    ],
)
def test_variants_of_geometry(tmp_path: Path, geometry: Any, expected: Any, caplog: pytest.LogCaptureFixture) -> None:
    (read,) = read_features(put(tmp_path, collection(raw_feature(geometry))))
    assert read.geometry.equals(expected)
    assert not caplog.records


def test_children_follow_their_parent(tmp_path: Path) -> None:
    parent = {**raw_feature(name="parent"), "childObjects": [raw_feature(name="child"), raw_feature(name="other")]}
    assert [each.name for each in read_features(put(tmp_path, [parent]))] == ["parent", "child", "other"]


def test_broken_polygons_are_repaired_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bow_tie = [[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]
    spike = [[0, 0], [10, 0], [10, 10], [10, 30], [10, 10], [0, 10], [0, 0]]
    flat = [[0, 0], [5, 5], [9, 9], [0, 0]]
    document = collection(
        raw_feature({"type": "Polygon", "coordinates": [bow_tie]}),
        raw_feature({"type": "Polygon", "coordinates": [spike]}),
        raw_feature({"type": "Polygon", "coordinates": [SQUARE[:-1]]}),
        raw_feature({"type": "Polygon", "coordinates": [SQUARE, [[1, 1], [2, 2]]]}),
        raw_feature({"type": "MultiPolygon", "coordinates": [[SQUARE], [[[1, 1], [2, 2]]]]}),
        raw_feature({"type": "Polygon", "coordinates": [flat]}),
        raw_feature({"type": "Polygon", "coordinates": [[[1, 1]]]}),
        {**raw_feature(), "geometry": None},
        raw_feature({"type": "Polygon", "coordinates": []}),
        None,
        raw_feature(),
    )
    read = list(read_features(put(tmp_path, document)))
    assert [each.geometry.area for each in read] == [50, 100, 100, 100, 100, 100]
    assert all(each.geometry.is_valid for each in read)
    assert {each.geometry.geom_type for each in read} == {"MultiPolygon", "Polygon"}
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("pathopipe", logging.WARNING)
    text = record.getMessage()
    assert "5 broken polygons repaired (feature 1, 2, 3, 4, 5)" in text
    assert "2 broken polygons passed over, nothing left to repair (feature 6, 7)" in text
    assert "3 features without geometry passed over (feature 8, 9, 10)" in text


def test_the_warning_stays_short(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    document = collection(*[raw_feature({"type": "Polygon", "coordinates": [SQUARE[:-1]]})] * 50)
    assert len(list(read_features(put(tmp_path, document)))) == 50
    assert "50 broken polygons repaired (feature 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...)" in caplog.text


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ("", "is empty"),
        (" \n\t", "is empty"),
        ("id,x,y\n1,2,3\n", "not GeoJSON: begins with 'i'"),
        ("<xml/>", "not GeoJSON: begins with '<'"),
        ("5", "not GeoJSON"),
        ("{}", "not GeoJSON"),
        ('{"type":"Topology"}', "'Topology'"),
        ("[]", "holds no features"),
        ("[null]", None),
        (collection(), "holds no features"),
        ('{"type":"FeatureCollection"}', "holds no features"),
        ('{"type":"FeatureCollection","features":null}', "holds no features"),
        ('{"type":"FeatureCollection","features":5}', "holds no features"),
        (json.dumps(collection(raw_feature())) + "{}", "text after the end"),
        (json.dumps(raw_feature()) + "\n" + json.dumps(raw_feature()), "text after the end"),
        (json.dumps([raw_feature()])[:-1] + ",]", "not JSON"),
        ('{"type":"FeatureCollection","features":[],}', "not JSON"),
        ('{5:"FeatureCollection"}', "not JSON"),
        ("[" * 100_000, "not GeoJSON"),
        ([5], "feature 1: not a feature: 5"),
        ([raw_feature(), {"a": 1}], "feature 2: not a feature"),
        ([raw_feature(), raw_feature([1, 2])], "feature 2: not a geometry"),
        ([raw_feature({"type": "Circle", "coordinates": []})], "unknown geometry type 'Circle'; known: Polygon"),
        ([raw_feature({"type": "GeometryCollection", "geometries": []})], "feature 1: a GeometryCollection"),
        ([raw_feature({"type": "Point", "coordinates": None})], "feature 1: Point with coordinates None"),
        ([raw_feature({"type": "Point"})], "feature 1: Point with coordinates None"),
        ([raw_feature({"type": "Point", "coordinates": [1]})], "not lists of numbers"),
        ([raw_feature({"type": "Point", "coordinates": [1, None]})], "not finite"),
        ([raw_feature({"type": "Point", "coordinates": [1, 10**400]})], "not lists of numbers"),
        ([raw_feature({"type": "Point", "coordinates": [1, {}]})], "not lists of numbers"),
        ([raw_feature({"type": "LineString", "coordinates": [[1, 2]]})], "a line of 1 positions"),
        ([raw_feature({"type": "Polygon", "coordinates": SQUARE})], "not lists of numbers"),
        ([raw_feature({"type": "Polygon", "coordinates": [5]})], "not lists of numbers"),
        ([raw_feature({"type": "MultiPolygon", "coordinates": [5]})], "a polygon with coordinates 5"),
        ([raw_feature({"type": "Polygon", "coordinates": [[[0, 0], [1, float("nan")], [1, 1], [0, 0]]]})], "finite"),
        ("[" + "9" * 5000 + "]", "not GeoJSON"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, document: Any, says: str | None) -> None:
    path = put(tmp_path, document)
    if says is None:
        assert list(read_features(path)) == []
        return
    with pytest.raises(GeoJSONError) as caught:
        list(read_features(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    path.write_bytes(b'{"type":"FeatureCollection","name":"\xff\xfe"')
    with pytest.raises(GeoJSONError, match="not UTF-8 text"):
        list(read_features(path))
    with pytest.raises(GeoJSONError, match=r"can't be read \(No such file"):
        list(read_features(tmp_path / "none.geojson"))
    with pytest.raises(GeoJSONError, match=r"can't be read \(Is a directory"):
        list(read_features(tmp_path))
    whole = gzip.compress(json.dumps([raw_feature()] * 50).encode())
    for length in (5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(GeoJSONError, match="cut off or damaged"):
            list(read_features(path))


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    whole = json.dumps(collection(raw_feature(name='a "quoted\\" name', n=-1.5e3), raw_feature(flag=True)))
    path = tmp_path / "a.geojson"
    for length in range(len(whole)):
        path.write_text(whole[:length])
        with pytest.raises(GeoJSONError):
            list(read_features(path))
    path.write_text(whole)
    assert len(list(read_features(path))) == 2


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_blocks_may_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(geojson, "_READ_CHARS", size)
    first = raw_feature(name='brackets ]} and \\"quotes" ä \u2028', measurements={"a": -1.25e-3, "b": 12345})
    document = {"n": 12345, "crs": {"a": [None, True]}, "type": "FeatureCollection", "features": [first] * 3, "z": 7}
    read = list(read_features(put(tmp_path, json.dumps(document, indent=2))))
    assert [each.name for each in read] == [first["properties"]["name"]] * 3
    assert read[2].measurements == {"a": -1.25e-3, "b": 12345.0}


def test_a_fault_is_named_after_the_features_before_it(tmp_path: Path) -> None:
    text = json.dumps(collection(*[raw_feature()] * 400)).replace('"Polygon"', "Polygon", 1)
    with pytest.raises(GeoJSONError, match="before the first feature"):
        list(read_features(put(tmp_path, text)))
    text = json.dumps(collection(*[raw_feature()] * 400))
    reader = read_features(put(tmp_path, text[: len(text) * 3 // 4]))
    with contextlib.suppress(GeoJSONError):
        got = [each for each, _ in zip(reader, range(250), strict=False)]
    assert len(got) == 250
    with pytest.raises(GeoJSONError, match="cut off, after feature [23]"):
        list(reader)


def test_reading_holds_no_more_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geojson, "_READ_CHARS", 2**18)
    path = put(tmp_path, json.dumps(collection(*[raw_feature(name="n" * 500)] * 4000)))
    assert path.stat().st_size > 2_500_000
    tracemalloc.start()
    count = sum(1 for _ in read_features(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4000
    assert peak < 9 * 2**18


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(geometries=st.lists(polygons(), min_size=1, max_size=5))
def test_anything_that_people_draw_can_be_written_again(tmp_path: Path, geometries: list[Any]) -> None:
    document = collection(*[raw_feature(shapely.geometry.mapping(geometry)) for geometry in geometries])
    with contextlib.suppress(GeoJSONError):
        read = list(read_features(put(tmp_path, document)))
        ids = [stable_id("s", "l", number) for number in range(len(read))]
        again = polygon_features([each.geometry for each in read], object_type="annotation", ids=ids)
        report = write_features(tmp_path / "b.geojson", again)
        assert report.written + report.dropped == len(read)
        assert len(strict(tmp_path / "b.geojson")) == report.written


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")
@pytest.mark.parametrize(
    ("name", "count", "kinds", "names"),
    [
        ("qupath05-annotations.geojson", 3, {"Polygon"}, {()}),
        ("qupath-single-feature-with-holes.geojson", 1, {"Polygon"}, {()}),
        ("tcga_tile.geojson", 4, {"Polygon"}, {()}),
        (
            "TCGA-V5-A7RE-11A-01-TS1.nulite-points.geojson",
            4,
            {"MultiPoint"},
            {("Neoplastic",), ("Inflammatory",), ("Connective",), ("Epithelial",)},
        ),
    ],
)
def test_real_files(tmp_path: Path, name: str, count: int, kinds: set[str], names: set[Any]) -> None:
    read = list(read_features(SHARED / name))
    assert len(read) == count
    assert {each.geometry.geom_type for each in read} == kinds
    assert {each.names for each in read} == names
    assert {each.object_type for each in read} == {"annotation"}
    assert all(each.geometry.is_valid for each in read)
    again = [
        feature(
            each.geometry,
            object_type=each.object_type,
            id=stable_id("s", "l", number),
            name=each.name,
            color=each.color,
            classification=(": ".join(each.names), each.color) if each.names and each.color else None,
        )
        for number, each in enumerate(read)
    ]
    write_features(tmp_path / "a.geojson", again)
    back = list(read_features(tmp_path / "a.geojson"))
    assert [each.name for each in back] == [each.name for each in read]
    assert [each.names for each in back] == [each.names for each in read]
    for old, new in zip(read, back, strict=True):
        assert new.geometry.area == pytest.approx(old.geometry.area, rel=1e-3)
        assert shapely.get_num_geometries(new.geometry) == shapely.get_num_geometries(old.geometry)


@pytest.mark.shared_data
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")
def test_real_holes_and_names() -> None:
    (holes,) = read_features(SHARED / "qupath-single-feature-with-holes.geojson")
    raw = json.loads((SHARED / "qupath-single-feature-with-holes.geojson").read_text())
    assert len(holes.geometry.interiors) == len(raw["geometry"]["coordinates"]) - 1 > 0
    named = [each.name for each in read_features(SHARED / "qupath05-annotations.geojson")]
    assert named == ["UT", "I", "I"]


def test_errors_cross_process_borders() -> None:
    assert str(copy.copy(GeoJSONError("a", slide_id="s"))) == "a"
