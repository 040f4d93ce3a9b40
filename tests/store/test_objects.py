"""Layers of objects and predictions: what goes in comes out, in pieces too; whole or absent; damage is found."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from shapely.geometry import MultiPolygon, Polygon, box

from pathopipe.errors import StoreChangedError, StoreError
from pathopipe.geometry import (
    Outlines,
    join_outlines,
    outlines_from_shapes,
    outlines_to_shapes,
    take_outlines,
)
from pathopipe.records import ObjectClass, ObjectTable
from pathopipe.slide.array import ArraySlide
from pathopipe.store import SlideStore
from pathopipe.store import objects as objects_module

CLASSES = (ObjectClass("Nucleus", (1, 2, 3)), ObjectClass("Tumor: Positive", (200, 0, 0)))


def table_of(first: int, n: int) -> ObjectTable:
    rows = np.arange(first, first + n)
    shapes = []
    for row in rows.tolist():
        x, y = float(row % 40 * 20), float(row // 40 * 20)
        shape = Polygon(box(x, y, x + 9, y + 9).exterior, [box(x + 2, y + 2, x + 4, y + 4).exterior])
        shapes.append(MultiPolygon([shape, box(x + 12, y, x + 14, y + 3)]) if row % 5 == 0 else shape)
    return ObjectTable(
        classes=CLASSES,
        measurement_names=("Area µm^2", "Circularity"),
        centroid_l0=np.stack([rows % 40 * 20.0, rows // 40 * 20.0], axis=1),
        class_id=(rows % 2).astype(np.uint8),
        class_probability=np.where(rows % 3, 0.25, np.nan).astype(np.float32),
        measurements=np.stack([rows, rows * 0.5], axis=1).astype(np.float32),
        outlines=outlines_from_shapes(shapes),
        id=np.stack([rows % 256] * 16, axis=1).astype(np.uint8),
        parent=rows - 1,
        parent_layer="glands",
    )


def same(one: ObjectTable, other: ObjectTable) -> bool:
    for name in ("centroid_l0", "class_id", "class_probability", "measurements", "id", "parent"):
        if not np.array_equal(getattr(one, name), getattr(other, name), equal_nan=name != "id"):
            return False
    return (
        all(np.array_equal(a, b) for a, b in zip(one.outlines, other.outlines, strict=True))
        and one.classes == other.classes
        and one.parent_layer == other.parent_layer
    )


@pytest.fixture
def store(out: Path) -> SlideStore:
    slide = ArraySlide(np.zeros((10, 10, 3), np.uint8), mpp=0.5, slide_id="s")
    return SlideStore.create_or_open(out / "s.zarr", slide.info, created_by="test")


@pytest.mark.parametrize("sizes", [(100,), (1, 0, 60, 39), (0,)])
def test_what_goes_in_comes_out(store: SlideStore, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects_module, "_CHUNK_ROWS", 16)
    monkeypatch.setattr(objects_module, "_CHUNK_VERTICES", 64)
    starts = np.cumsum([0, *sizes])
    tables = (table_of(int(first), n) for first, n in zip(starts, sizes, strict=False))
    assert store.write_objects("nuclei", tables, about={"inputs": {"a": 1}, "mpp": [0.5, 0.5]}) == sum(sizes)
    array = store.objects("nuclei")
    assert same(array.read(), table_of(0, sum(sizes)))
    assert len(array) == sum(sizes)
    assert array.classes == CLASSES
    assert array.measurement_names == ("Area µm^2", "Circularity")
    assert array.attributes["mpp"] == [0.5, 0.5]
    assert store.layers() == ["nuclei"]
    assert store.inputs("objects/nuclei") == {"a": 1}
    assert not [problem for problem in store.problems() if problem.where.startswith("objects")]


def test_rows_are_read_in_pieces(store: SlideStore) -> None:
    store.write_objects("nuclei", [table_of(0, 100)], about={"inputs": {}})
    array = store.objects("nuclei")
    for start, stop in [(0, 1), (7, 31), (95, 100), (40, 40), (90, 400)]:
        assert same(array.read(slice(start, stop)), table_of(start, min(stop, 100) - start))
    assert [len(batch) for batch in array.batches(30)] == [30, 30, 30, 10]
    with pytest.raises(ValueError, match="consecutive"):
        array.read(slice(0, 10, 2))


def test_a_plain_zarr_reader_finds_everything(store: SlideStore) -> None:
    store.write_objects("nuclei", [table_of(0, 10)], about={"inputs": {}})
    group = zarr.open_group(store.path, mode="r")["objects/nuclei"]
    assert group["centroid_l0"].shape == (10, 2)
    assert group["vertices_l0"].dtype == np.float32
    assert group.attrs["measurement_names"] == ["Area µm^2", "Circularity"]
    ring = group["ring_offsets"][:2]
    assert group["vertices_l0"][ring[0] : ring[1]].shape == (5, 2)


def test_a_layer_that_fails_while_it_is_written_leaves_the_old_one_or_none(
    store: SlideStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects_module, "_CHUNK_ROWS", 4)  # some of it is written

    def torn() -> Iterator[ObjectTable]:
        yield table_of(0, 5)
        raise RuntimeError("torn")

    with pytest.raises(RuntimeError, match="torn"):
        store.write_objects("nuclei", torn(), about={"inputs": {}})
    assert store.layers() == []
    with pytest.raises(StoreError, match="objects/nuclei is not there; 'pathopipe segment'"):
        store.objects("nuclei")
    assert any(p.where == "objects/nuclei" and "not finished" in p.what for p in store.problems())
    store.write_objects("nuclei", [table_of(0, 7)], about={"inputs": {}})
    with pytest.raises(RuntimeError, match="torn"):
        store.write_objects("nuclei", torn(), about={"inputs": {}})
    assert len(store.objects("nuclei")) == 7
    store.write_objects("nuclei", [table_of(0, 9)], about={"inputs": {}})
    assert len(store.objects("nuclei")) == 9
    assert store.layers() == ["nuclei"]


def test_a_kill_while_a_layer_is_replaced_leaves_no_mixture(store: SlideStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    store.write_objects("nuclei", [table_of(0, 7)], about={"inputs": {}})
    with monkeypatch.context() as patch:
        patch.setattr(objects_module, "move_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            store.write_objects("nuclei", [table_of(0, 9)], about={"inputs": {}})
    assert "nuclei" not in store.layers()
    store.write_objects("nuclei", [table_of(0, 9)], about={"inputs": {}})
    assert store.children("objects") == ["nuclei"]
    assert same(store.objects("nuclei").read(), table_of(0, 9))


@pytest.mark.parametrize("column", ["centroid_l0", "class_id", "vertices_l0"])
def test_a_missing_chunk_is_not_read_as_zeros(store: SlideStore, column: str) -> None:
    store.write_objects("nuclei", [table_of(0, 50)], about={"inputs": {}})
    (chunk,) = [path for path in (store.path / "objects" / "nuclei" / column / "c").rglob("*") if path.is_file()]
    chunk.unlink()
    with pytest.raises(StoreError, match=f"{column} lacks 1 chunks.*segment --fresh"):
        store.objects("nuclei")


def test_parts_outlive_a_second_begin_and_go_with_other_regions_or_inputs(store: SlideStore) -> None:
    store.begin_objects("nuclei", {"model": 1}, regions="a")
    store.parts("nuclei").write("0-0", {"x": np.arange(3)})
    store.begin_objects("nuclei", {"model": 1}, regions="a")
    assert store.parts("nuclei").done() == {"0-0"}
    assert store.parts("nuclei").read("0-0")["x"].tolist() == [0, 1, 2]
    assert list(store.parts("nuclei").read("0-0", ["x"])) == ["x"]
    with pytest.raises(StoreChangedError, match=r"model was 1, now 2.*segment --fresh"):
        store.begin_objects("nuclei", {"model": 2}, regions="a")
    store.begin_objects("nuclei", {"model": 1}, regions="b")
    assert store.parts("nuclei").done() == set()
    assert store.layers() == []


@pytest.mark.parametrize("column", ["centroid_l0", "vertices_l0", "id", "ring_offsets"])
def test_a_flipped_bit_is_found(store: SlideStore, column: str) -> None:
    store.write_objects("nuclei", [table_of(0, 50)], about={"inputs": {}})
    (chunk,) = [path for path in (store.path / "objects" / "nuclei" / column / "c").rglob("*") if path.is_file()]
    raw = bytearray(chunk.read_bytes())
    raw[len(raw) // 2] ^= 4
    chunk.write_bytes(raw)
    found = [problem for problem in store.problems() if problem.where.startswith("objects")]
    assert [problem.where for problem in found] == [f"objects/nuclei/{column}"]
    with pytest.raises(StoreError, match="can't be read"):
        store.objects("nuclei").read()


def test_contradicting_arrays_are_found(store: SlideStore) -> None:
    short = replace(table_of(0, 50), parent=np.arange(49))
    store.write_objects("nuclei", [short], about={"inputs": {}})
    assert [p.where for p in store.problems() if p.where.startswith("objects")] == ["objects/nuclei/parent"]


def test_predictions_come_back(store: SlideStore) -> None:
    attention = np.array([[0.25], [np.nan], [0.75]], np.float32)
    about = {"classes": ["a", "b"], "encoder": "handcrafted"}
    store.write_predictions("m", np.array([1.5, -2], np.float32), attention, grid="256px-0.5um", about=about)
    read = store.predictions("m")
    assert read.logits.tolist() == [1.5, -2]
    assert np.array_equal(read.attention, attention, equal_nan=True)
    assert (read.grid, read.about["classes"]) == ("256px-0.5um", ["a", "b"])
    assert store.prediction_models() == ["m"]
    store.write_predictions("m", np.zeros(1, np.float32), None, grid="g", about={})
    assert store.predictions("m").attention is None
    with pytest.raises(StoreError, match="predictions/none is not there"):
        store.predictions("none")


@given(picks=st.lists(st.integers(0, 19), max_size=30))
def test_outlines_can_be_taken_and_joined(picks: list[int]) -> None:
    outlines = table_of(0, 20).outlines
    shapes = outlines_to_shapes(outlines)
    rows = np.asarray(picks, np.int64)
    taken = take_outlines(outlines, rows)
    assert [shape.wkb for shape in outlines_to_shapes(taken)] == [shapes[row].wkb for row in picks]
    joined = join_outlines([taken, Outlines.empty(), outlines])
    assert [shape.wkb for shape in outlines_to_shapes(joined)] == [
        *(shapes[row].wkb for row in picks),
        *(shape.wkb for shape in shapes),
    ]
