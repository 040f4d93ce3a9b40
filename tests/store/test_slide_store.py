"""The store: whole or absent, chunk by chunk, readable with plain zarr, and honest about damage."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from shapely.geometry import Polygon, box

from pathopipe.errors import StoreChangedError, StoreError
from pathopipe.files import remove_tree
from pathopipe.geometry import BoxL0
from pathopipe.records import Level, MppEvidence, SlideInfo, TileGrid, Tissue
from pathopipe.remote import RemotePath
from pathopipe.store import SCHEMA_VERSION, EmbeddingArray, SlideStore, digest, store_path

INFO = SlideInfo(
    slide_id="s1",
    path=Path("/somewhere/Jane Doe.svs"),
    reader="openslide",
    vendor="aperio",
    dims_l0=(1000, 800),
    levels=(Level(1000, 800, 1.0, 1.0, 240, 240),),
    size_bytes=1234,
    fingerprint="abc",
    mpp=(0.5, 0.25),
    mpp_evidence=(MppEvidence("manifest", 0.5, 0.25, True),),
    bounds_l0=BoxL0(1, 2, 3, 4),
)
TISSUE = Tissue(
    mask=np.arange(12, dtype=np.uint8).reshape(3, 4) % 2,
    mpp=(8.0, 8.0),
    polygons=(Polygon(box(0, 0, 100, 50).exterior.coords, [box(10, 10, 20, 20).exterior.coords]), box(200, 0, 300, 9)),
    areas_mm2=(1.5, 0.25),
    flags=("pen",),
    method="brightfield",
)
GRID = TileGrid(
    name="256px-0.5um",
    side_px=256,
    mpp=0.5,
    achieved_mpp=(0.499, 0.499),
    overlap_px=0,
    side_l0=(256, 512),
    stride_l0=(256.0, 512.0),
    level=0,
    read_px=(256, 512),
    resample="area",
    xy_l0=np.arange(20, dtype=np.int64).reshape(10, 2),
    tissue_fraction=np.linspace(0, 1, 10, dtype=np.float32),
)


@pytest.fixture
def store(out: Path) -> SlideStore:
    return SlideStore.create_or_open(store_path(out, "s1"), INFO, created_by="test")


@pytest.fixture
def full_store(store: SlideStore) -> SlideStore:
    store.write_tissue(TISSUE, {"version": 1})
    store.write_grid(GRID, {"tissue": "x"})
    rows = embeddings(store)
    for chunk in range(rows.n_chunks):
        fill(rows, chunk)
    rows.finish(bad_tiles=0)
    return store


def embeddings(store: SlideStore, chunk_rows: int = 4) -> EmbeddingArray:
    return store.create_embeddings(
        GRID.name, "e", rows=10, features=3, dtype="float16", chunk_rows=chunk_rows, about={"inputs": {"tiles": "t"}}
    )


def fill(rows: EmbeddingArray, chunk: int, value: float = 1.0) -> None:
    n = len(range(*rows.chunk_slice(chunk).indices(rows.rows)))
    rows.write_chunk(chunk, np.full((n, rows.features), value, np.float16), np.ones(n, np.uint8))


def test_what_goes_in_comes_out(full_store: SlideStore) -> None:
    store = SlideStore.open(full_store.path)
    tissue, grid = store.read_tissue(), store.read_grid(GRID.name)
    assert np.array_equal(tissue.mask, TISSUE.mask)
    assert all(a.equals(b) for a, b in zip(tissue.polygons, TISSUE.polygons, strict=True))
    assert (tissue.mpp, tissue.areas_mm2, tissue.flags, tissue.method) == (
        (8.0, 8.0),
        (1.5, 0.25),
        ("pen",),
        "brightfield",
    )
    for name in TileGrid.__slots__:
        assert np.array_equal(getattr(grid, name), getattr(GRID, name)), name
        assert type(getattr(grid, name)) is type(getattr(GRID, name)), name
    assert store.grids() == [GRID.name]
    assert store.encoders(GRID.name) == ["e"]
    assert (store.embeddings(GRID.name, "e").read_values() == 1).all()
    assert list(store.problems()) == []


def test_plain_zarr_reads_everything(full_store: SlideStore) -> None:
    where = full_store.zarr_store if isinstance(full_store.path, RemotePath) else full_store.path
    group = zarr.open_group(where, mode="r", zarr_format=3)
    about = group.attrs["pathopipe"]
    assert isinstance(about, dict)
    assert about["schema_version"] == SCHEMA_VERSION
    assert about["slide"]["mpp"] == [0.5, 0.25]
    assert sorted(group.group_keys()) == ["embeddings", "tiles", "tissue"]
    assert group["tiles/256px-0.5um/xy_l0"].dtype == np.int64
    values = group["embeddings/256px-0.5um/e/values"]
    assert (values.shape, values.dtype, values.chunks) == ((10, 3), np.float16, (4, 3))
    assert group["embeddings/256px-0.5um/e/status"].chunks == (4,)
    assert np.isnan(values.fill_value)
    assert "crc32c" in json.dumps(
        json.loads((full_store.path / "embeddings/256px-0.5um/e/values/zarr.json").read_text())
    )


def test_nothing_private_is_stored(full_store: SlideStore) -> None:
    for path in full_store.path.rglob("zarr.json"):
        assert "Jane" not in path.read_text()
        assert "somewhere" not in path.read_text()


def test_a_stage_without_its_attributes_is_absent(full_store: SlideStore) -> None:
    (full_store.path / "tissue" / "zarr.json").unlink()
    assert full_store.inputs("tissue") is None
    with pytest.raises(StoreError, match="tissue is not there"):
        full_store.read_tissue()
    assert [p.where for p in full_store.problems()] == ["tissue"]
    full_store.write_tissue(TISSUE, {"version": 1})
    assert list(full_store.problems()) == []


def test_other_inputs_are_refused_with_the_ways_out(full_store: SlideStore) -> None:
    assert full_store.require_inputs("tissue", "tissue", {"version": 1})
    with pytest.raises(
        StoreChangedError, match=r"tissue was made from other inputs \(version was 1, now 2\).*--fresh tissue.*--out"
    ):
        full_store.require_inputs("tissue", "tissue", {"version": 2})
    assert not full_store.require_inputs("tiles/other", "tiles", {})


def test_another_file_or_resolution_is_refused(store: SlideStore) -> None:
    from dataclasses import replace

    for change in ({"fingerprint": "other"}, {"mpp": (0.25, 0.25)}):
        with pytest.raises(StoreChangedError, match=r"--fresh tissue"):
            SlideStore.create_or_open(store.path, replace(INFO, **change), created_by="test")
    SlideStore.create_or_open(store.path, replace(INFO, path=Path("moved.svs")), created_by="later")


def test_a_newer_layout_is_refused(store: SlideStore) -> None:
    root = store.path / "zarr.json"
    root.write_text(root.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(StoreError, match="layout 99.*newer pathopipe"):
        SlideStore.open(store.path)


def test_no_store_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no pathopipe store here"):
        SlideStore.open(tmp_path / "absent.zarr")
    (tmp_path / "other.zarr").mkdir()
    with pytest.raises(StoreError, match="not a pathopipe store"):
        SlideStore.open(tmp_path / "other.zarr")


def test_a_chunk_is_done_when_its_values_are_there_whole(store: SlideStore) -> None:
    store.write_grid(GRID, {})
    rows = embeddings(store)
    assert (rows.n_chunks, rows.done_chunks()) == (3, [])
    fill(rows, 2)
    fill(rows, 0)
    assert rows.done_chunks() == [0, 2]
    values = store.path / "embeddings" / GRID.name / "e" / "values" / "c"
    data = (values / "2" / "0").read_bytes()
    (values / "2" / "0").write_bytes(data[:-1])
    assert rows.done_chunks() == [0]
    with pytest.raises(StoreError, match="lacks 2 of 3 chunks"):
        rows.finish()
    # Status alone does not count.
    (values / "0" / "0").unlink()
    assert rows.done_chunks() == []


def test_an_all_nan_chunk_is_there(store: SlideStore) -> None:
    rows = embeddings(store)
    rows.write_chunk(1, np.full((4, 3), np.nan, np.float16), np.full(4, 2, np.uint8))
    assert rows.done_chunks() == [1]
    assert rows.bad_chunks() == [1]


def test_no_tiles_is_a_result(store: SlideStore) -> None:
    rows = store.create_embeddings("g", "e", rows=0, features=3, dtype="float32", chunk_rows=256, about={"inputs": {}})
    rows.finish(bad_tiles=0)
    assert rows.read_values().shape == (0, 3)
    assert list(rows.problems(0)) == []


@pytest.mark.parametrize("part", ["values/c/1/0", "status/c/1"])
def test_a_flipped_bit_is_found(full_store: SlideStore, part: str) -> None:
    path = full_store.path / "embeddings" / GRID.name / "e" / part
    data = bytearray(path.read_bytes())
    data[2] ^= 1
    path.write_bytes(bytes(data))
    found = list(full_store.problems())
    assert [problem.where for problem in found] == [f"embeddings/{GRID.name}/e/{part.split('/')[0]}"]
    assert "fails its checksum; compute the chunks concerned with --retry-bad" in found[0].what
    assert full_store.embeddings(GRID.name, "e").bad_chunks() == [1]


@pytest.mark.parametrize("name", ["tissue/mask", "tiles/256px-0.5um/xy_l0"])
def test_a_flipped_bit_in_a_compressed_array_is_found(full_store: SlideStore, name: str) -> None:
    chunk = next(path for path in sorted((full_store.path / name / "c").rglob("*")) if path.is_file())
    data = bytearray(chunk.read_bytes())
    data[-8] ^= 1
    chunk.write_bytes(bytes(data))
    assert name in [problem.where for problem in full_store.problems()]


@pytest.mark.parametrize("name", ["tissue/mask", "tissue/vertices_l0", "tiles/256px-0.5um/xy_l0"])
def test_a_missing_chunk_is_not_read_as_zeros(full_store: SlideStore, name: str) -> None:
    remove_tree(full_store.path / name / "c")
    assert name in [problem.where for problem in full_store.problems()]
    with pytest.raises(StoreError, match=rf"{name} lacks 1 of 1 chunks; compute it anew with .pathopipe run --fresh t"):
        _ = full_store.read_tissue() if name.startswith("tissue") else full_store.read_grid(GRID.name)


def test_a_mask_of_nothing_but_zeros_is_whole(store: SlideStore) -> None:
    empty = Tissue(np.zeros((3, 4), np.uint8), (8.0, 8.0), (), (), ("no-tissue",), 0.25, "brightfield")
    store.write_tissue(empty, {})
    assert store.read_tissue().unreadable_share == 0.25
    assert not store.read_tissue().mask.any()


def test_what_is_not_there_is_not_complete(full_store: SlideStore) -> None:
    (full_store.path / "tiles" / GRID.name / "tissue_fraction" / "zarr.json").unlink()
    assert "is missing" in next(full_store.problems()).what
    (full_store.path / "embeddings" / GRID.name / "e" / "values" / "zarr.json").unlink()
    assert [problem.what[:10] for problem in full_store.problems()] == ["is missing", "is missing"]
    with pytest.raises(StoreError, match="--fresh embed"):
        full_store.embeddings(GRID.name, "e")
    (full_store.path / "embeddings" / GRID.name / "e" / "zarr.json").unlink()
    assert "not finished" in list(full_store.problems())[1].what
    remove_tree(full_store.path / "embeddings" / GRID.name)
    assert "none; 'pathopipe run'" in list(full_store.problems())[1].what


def test_missing_and_contradicting_chunks_are_found(full_store: SlideStore) -> None:
    rows = full_store.embeddings(GRID.name, "e")
    rows.write_chunk(0, np.full((4, 3), np.nan, np.float16), np.ones(4, np.uint8))
    assert "contradict" in next(full_store.problems()).what
    remove_tree(full_store.path / "embeddings" / GRID.name / "e" / "values" / "c" / "2")
    assert "lacks 1 of 3 chunks (2)" in next(full_store.problems()).what


def test_broken_metadata_is_one_clear_error(full_store: SlideStore) -> None:
    (full_store.path / "zarr.json").write_text("{ not json")
    with pytest.raises(StoreError, match="not valid JSON"):
        SlideStore.open(full_store.path)


def test_fresh_forgets_what_depends(full_store: SlideStore) -> None:
    full_store.clear_stage("embed", grid=GRID.name, encoders=("e",))
    assert full_store.encoders(GRID.name) == []
    assert full_store.grids() == [GRID.name]
    full_store.clear_stage("tiles", grid=GRID.name)
    assert full_store.grids() == []
    assert full_store.inputs("tissue") is not None
    full_store.clear_stage("tissue")
    assert not full_store.path.exists()


def test_digest_does_not_depend_on_order() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "golden").glob("v*.zarr")), ids=lambda path: path.name
)
def test_stores_of_every_version_are_read(path: Path) -> None:
    """Written by an earlier release; read for ever."""
    store = SlideStore.open(path)
    assert list(store.problems()) == []
    assert store.slide["id"] == "s1"
    assert store.read_tissue().areas_mm2 == (1.5, 0.25)
    assert len(store.read_grid("256px-0.5um")) == 10
    assert store.embeddings("256px-0.5um", "e").read_values()[9].tolist() == [1.0, 1.0, 1.0]
