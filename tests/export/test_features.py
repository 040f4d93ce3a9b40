"""Embeddings as files of other programs: what h5py, torch, pyarrow and anndata read is what the store holds."""

import json
import resource
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pathopipe.errors import StoreError, StoreWriteError, UsageError
from pathopipe.export.features import choose_embeddings, export_hdf5, export_pt, known_embeddings, read_good_tiles
from pathopipe.export.tables import export_anndata_embeddings, export_parquet_embeddings
from pathopipe.layouts.write import nominal_magnification, stream_hdf5
from pathopipe.records import Level, SlideInfo, TileGrid
from pathopipe.store import SlideStore, store_path

GRID = "256px-0.5um"
MPP = (0.2485, 0.2485)
BAD = (3, 17, 64)


def make_store(
    out: Path,
    slide_id: str = "s.1",
    *,
    n: int = 150,
    features: int = 5,
    dtype: str = "float32",
    encoders: tuple[str, ...] = ("enc",),
    bad: tuple[int, ...] = BAD,
    chunk_rows: int = 64,
) -> SlideStore:
    """A slide of 60,000 x 40,000 px with tiles of 512 px read from level 1."""
    info = SlideInfo(
        slide_id=slide_id,
        path=Path("a.svs"),
        reader="array",
        vendor="generic",
        dims_l0=(60_000, 40_000),
        levels=(Level(60_000, 40_000, 1.0, 1.0), Level(30_000, 20_000, 2.0, 2.0)),
        size_bytes=10,
        fingerprint="abc",
        mpp=MPP,
    )
    store = SlideStore.create_or_open(store_path(out, slide_id), info, created_by="test")
    column = np.arange(n, dtype=np.int64)
    grid = TileGrid(
        name=GRID,
        side_px=256,
        mpp=0.5,
        achieved_mpp=(0.497, 0.497),
        overlap_px=0,
        side_l0=(512, 512),
        stride_l0=(512.0, 512.0),
        level=1,
        read_px=(256, 256),
        resample="none",
        xy_l0=np.stack([column % 100 * 512, column // 100 * 512], axis=1),
        tissue_fraction=np.linspace(0.5, 1, n, dtype=np.float32),
    )
    store.write_grid(grid, {"a": 1})
    for number, encoder in enumerate(encoders):
        rows = store.create_embeddings(
            GRID,
            encoder,
            rows=n,
            features=features,
            dtype=dtype,
            chunk_rows=chunk_rows,
            about={"inputs": {"encoder": {"name": encoder}}, "license": "MIT"},
        )
        values, status = expected_values(n, features, dtype) + number, np.ones(n, np.uint8)
        for row in bad:
            if row < n:
                values[row], status[row] = np.nan, 3
        for chunk in range(rows.n_chunks):
            place = rows.chunk_slice(chunk)
            rows.write_chunk(chunk, values[place], status[place])
        rows.finish(bad_tiles=len(bad))
    return store


def expected_values(n: int, features: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(7).standard_normal((n, features)).astype(dtype)


GOOD = np.delete(np.arange(150), BAD)
VALUES = expected_values(150, 5)[GOOD]
XY = np.stack([GOOD % 100 * 512, GOOD // 100 * 512], axis=1)


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def attributes(item: Any) -> dict[str, Any]:
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in item.attrs.items()}


# --- layouts -----------------------------------------------------------------------------------------------------


def test_clam(tmp_path: Path) -> None:
    made = export_hdf5(tmp_path / "x", make_store(tmp_path), GRID, "enc", "clam")
    assert (made.tiles, made.left_out) == (147, 3)
    assert files_in(tmp_path / "x") == ["h5_files/s.1.h5", "patches/s.1.h5"]
    with h5py.File(tmp_path / "x" / "h5_files" / "s.1.h5") as file:
        assert sorted(file) == ["coords", "features"]
        assert (file["features"].dtype, file["coords"].dtype) == (np.float32, np.int64)
        assert np.array_equal(file["features"][()], VALUES)
        assert np.array_equal(file["coords"][()], XY)
    with h5py.File(tmp_path / "x" / "patches" / "s.1.h5") as file:
        assert sorted(file) == ["coords"]
        assert np.array_equal(file["coords"][()], XY)
        assert attributes(file["coords"]) == {
            "patch_size": 256,
            "patch_level": 1,
            "downsample": [2.0, 2.0],
            "downsampled_level_dim": [30_000, 20_000],
            "level_dim": [30_000, 20_000],
            "name": "s.1",
            "save_path": "",
        }


def test_clam_states_level_0_where_a_level_would_be_inexact(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    grid = store.read_grid(GRID)
    store.write_grid(replace(grid, side_l0=(513, 513)), {"a": 1})
    export_hdf5(tmp_path / "x", store, GRID, "enc", "clam")
    with h5py.File(tmp_path / "x" / "patches" / "s.1.h5") as file:
        stated = attributes(file["coords"])
    assert (stated["patch_size"], stated["patch_level"], stated["downsample"]) == (513, 0, [1.0, 1.0])
    assert stated["level_dim"] == [60_000, 40_000]


def test_trident(tmp_path: Path) -> None:
    export_hdf5(tmp_path / "x", make_store(tmp_path, dtype="float16"), GRID, "enc", "trident")
    assert files_in(tmp_path / "x") == ["features_enc/s.1.h5", "patches/s.1_patches.h5"]
    of_coords = {
        "patch_size": 256,
        "patch_size_level0": 512,
        "level0_magnification": 40,
        "target_magnification": 20,
        "overlap": 0,
        "level0_width": 60_000,
        "level0_height": 40_000,
        "name": "s.1",
        "savetodir": "",
    }
    with h5py.File(tmp_path / "x" / "features_enc" / "s.1.h5") as file:
        assert (file["features"].dtype, file["coords"].dtype) == (np.float32, np.int64)
        assert np.array_equal(file["features"][()], expected_values(150, 5, "float16")[GOOD].astype(np.float32))
        assert np.array_equal(file["coords"][()], XY)
        assert attributes(file["features"]) == {"name": "s.1", "savetodir": "", "encoder": "enc"}
        assert attributes(file["coords"]) == of_coords
    with h5py.File(tmp_path / "x" / "patches" / "s.1_patches.h5") as file:
        assert sorted(file) == ["coords"]
        assert np.array_equal(file["coords"][()], XY)
        assert attributes(file["coords"]) == of_coords


def test_stamp(tmp_path: Path) -> None:
    made = export_hdf5(tmp_path / "x", make_store(tmp_path), GRID, "enc", "stamp")
    (name,) = files_in(tmp_path / "x")
    folder, _, file_name = name.partition("/")
    assert (folder.partition("-")[0], file_name) == ("enc", "s.1.h5")
    with h5py.File(made.files[0]) as file:
        assert sorted(file) == ["coords", "feats"]
        assert (file["feats"].dtype, file["coords"].dtype) == (np.float16, np.float32)
        assert np.array_equal(file["feats"][()], VALUES.astype(np.float16))
        assert np.abs(file["coords"][()] - XY * MPP[0]).max() <= XY.max() * MPP[0] * 2**-24
        stated = attributes(file)
        assert stated.pop("code_hash") == folder.partition("-")[2]
        assert stated.pop("tile_size_um") == pytest.approx(512 * 0.2485)
        assert stated == {
            "unit": "um",
            "tile_size_px": 256,
            "extractor": "enc",
            "feat_type": "tile",
            "stamp_version": "2.0.0",
        }


def test_the_hash_of_stamp_tells_recipes_apart(tmp_path: Path) -> None:
    store = make_store(tmp_path, encoders=("a", "b"))
    one, other = (read_good_tiles(store, GRID, name).tiles.recipe for name in "ab")
    assert one != other
    assert one == read_good_tiles(make_store(tmp_path / "again", "t", encoders=("a",)), GRID, "a").tiles.recipe


@pytest.mark.parametrize("layout", ["clam", "trident"])
def test_pt(tmp_path: Path, layout: Any) -> None:
    made = export_pt(tmp_path / "x", make_store(tmp_path), GRID, "enc", layout)
    expected = {
        "clam": ["patches/s.1.h5", "pt_files/s.1.pt"],
        "trident": ["features_enc/s.1.pt", "patches/s.1_patches.h5"],
    }
    assert files_in(tmp_path / "x") == expected[layout]
    for mapped in (False, True):
        tensor = torch.load(made.files[0], weights_only=True, mmap=mapped)
        assert (tensor.dtype, tuple(tensor.shape), tensor.is_contiguous()) == (torch.float32, (147, 5), True)
        assert np.array_equal(tensor.numpy(), VALUES)
        assert tensor.data_ptr() % 64 == 0
    with h5py.File(made.files[1]) as file:
        assert np.array_equal(file["coords"][()], XY)


def test_pt_is_not_of_stamp(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"stamp reads no \.pt files; write HDF5, or choose clam or trident"):
        export_pt(tmp_path / "x", make_store(tmp_path), GRID, "enc", "stamp")


@pytest.mark.parametrize(
    ("mpp", "magnification"),
    [(0.125, 80), (0.25, 40), (0.2265, 40), (0.4990, 20), (0.55, 20), (1.0, 10), (2.0, 5), (0.35, 28.57), (4, 2.5)],
)
def test_magnification_is_nominal(mpp: float, magnification: float) -> None:
    assert nominal_magnification(mpp) == magnification
    assert isinstance(nominal_magnification(mpp), int) == (magnification == int(magnification))


# --- tables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_parquet(tmp_path: Path, dtype: str) -> None:
    store = make_store(tmp_path, dtype=dtype)
    made = export_parquet_embeddings(tmp_path / "t.parquet", store, GRID, "enc")
    assert (made.tiles, made.left_out) == (147, 3)
    table = pq.read_table(tmp_path / "t.parquet")
    kind = {"float16": "halffloat", "float32": "float"}[dtype]
    assert str(table.schema.field("features").type) == f"fixed_size_list<element: {kind}>[5]"
    stored = np.stack(table["features"].to_numpy())
    assert np.array_equal(stored, expected_values(150, 5, dtype)[GOOD])
    assert table["row"].to_pylist() == GOOD.tolist()
    assert np.array_equal(np.stack([table["x_l0"], table["y_l0"]], axis=1), XY)
    assert set(table["side_l0"].to_pylist()) == {512}
    assert set(table["mpp"].to_pylist()) == {0.497}
    assert set(table["slide_id"].to_pylist()) == {"s.1"}
    assert np.array_equal(table["tissue_fraction"], np.linspace(0.5, 1, 150, dtype=np.float32)[GOOD])
    about = json.loads(table.schema.metadata[b"pathopipe"])
    assert about["recipe"]["encoder"] == {"name": "enc"}
    assert (about["tiles"], about["left_out"], about["grid"]["achieved_mpp"]) == (147, 3, [0.497, 0.497])


def test_cellularity_goes_with_the_tiles(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    share = np.linspace(0, 0.3, 150, dtype=np.float32)
    store.write_grid(replace(store.read_grid(GRID), cellularity=share), {"a": 1})
    export_parquet_embeddings(tmp_path / "t.parquet", store, GRID, "enc")
    assert np.array_equal(pq.read_table(tmp_path / "t.parquet")["cellularity"], share[GOOD])


def test_anndata(tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata")
    store = make_store(tmp_path, dtype="float16")
    export_anndata_embeddings(tmp_path / "t.h5ad", store, GRID, "enc")
    read = anndata.read_h5ad(tmp_path / "t.h5ad")
    assert (read.shape, read.X.dtype) == ((147, 5), np.float32)
    assert np.array_equal(read.X, expected_values(150, 5, "float16")[GOOD].astype(np.float32))
    assert read.obs_names.tolist() == [f"s.1:{row}" for row in GOOD]
    assert read.obs["x_l0"].tolist() == XY[:, 0].tolist()
    assert read.obs["y_l0"].tolist() == XY[:, 1].tolist()
    assert set(read.obs["slide_id"]) == {"s.1"}
    assert read.obs["tissue_fraction"].iloc[0] == 0.5
    assert np.array_equal(read.obsm["spatial_l0"], XY + 256)
    assert np.allclose(read.obsm["spatial"], (XY + 256) * 0.2485, rtol=1e-12)
    assert read.var_names.tolist() == [f"enc_{number}" for number in range(5)]
    assert json.loads(read.uns["pathopipe"]["about"])["recipe"]["license"] == "MIT"
    backed = anndata.read_h5ad(tmp_path / "t.h5ad", backed="r")
    assert np.array_equal(backed.X[10:20], read.X[10:20])
    backed.file.close()


# --- every kind of file ------------------------------------------------------------------------------------------

Export = Callable[[Path, SlideStore], Any]
KINDS: dict[str, Export] = {
    "clam": lambda out, store: export_hdf5(out, store, GRID, "enc", "clam"),
    "trident": lambda out, store: export_hdf5(out, store, GRID, "enc", "trident"),
    "stamp": lambda out, store: export_hdf5(out, store, GRID, "enc", "stamp"),
    "pt": lambda out, store: export_pt(out, store, GRID, "enc", "clam"),
    "parquet": lambda out, store: export_parquet_embeddings(out / "t.parquet", store, GRID, "enc"),
    "anndata": lambda out, store: export_anndata_embeddings(out / "t.h5ad", store, GRID, "enc"),
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


@every_kind
def test_the_same_bytes_twice_and_no_place_of_this_machine(kind: str, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for name in "ab":
        KINDS[kind](tmp_path / name, store)
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")
    for name in files_in(tmp_path / "a"):
        written = (tmp_path / "a" / name).read_bytes()
        assert written == (tmp_path / "b" / name).read_bytes(), name
        assert str(tmp_path).encode() not in written


@every_kind
def test_a_missing_chunk_is_told_and_nothing_written(kind: str, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    (store.path / "embeddings" / GRID / "enc" / "values" / "c" / "1" / "0").unlink()
    with pytest.raises(StoreError, match=r"s\.1: enc on 256px-0\.5um lacks 1 of 3 chunks; run the same command"):
        KINDS[kind](tmp_path / "x", store)
    assert files_in(tmp_path / "x") == []


@every_kind
def test_a_damaged_chunk_leaves_no_half_file(kind: str, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    chunk = store.path / "embeddings" / GRID / "enc" / "values" / "c" / "2" / "0"
    flipped = bytearray(chunk.read_bytes())
    flipped[9] ^= 1
    chunk.write_bytes(flipped)
    with pytest.raises(StoreError, match=r"chunk 2 of the embeddings can't be read"):
        KINDS[kind](tmp_path / "x", store)
    # Coordinates alone may be there; they are whole.
    assert [name for name in files_in(tmp_path / "x") if not name.startswith("patches/")] == []


@every_kind
def test_a_kill_leaves_the_file_of_before(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path)
    KINDS[kind](tmp_path / "x", store)
    before = {name: (tmp_path / "x" / name).read_bytes() for name in files_in(tmp_path / "x")}
    whole = read_good_tiles(store, GRID, "enc").tiles.blocks

    def killed() -> Iterator[np.ndarray]:
        yield next(whole())
        raise KeyboardInterrupt

    monkeypatch.setattr("pathopipe.export.features._blocks", lambda *_: killed)
    with pytest.raises(KeyboardInterrupt):
        KINDS[kind](tmp_path / "x", store)
    assert {name: (tmp_path / "x" / name).read_bytes() for name in files_in(tmp_path / "x")} == before


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """Let no file grow beyond some bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda n_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@every_kind
def test_a_full_disk_is_one_line(kind: str, tmp_path: Path, small_disk: Callable[[int], None]) -> None:
    store = make_store(tmp_path, n=3000, features=64, chunk_rows=500, bad=())
    small_disk(100_000)
    with pytest.raises(StoreWriteError, match=r"can't be written \(File too large\)"):
        KINDS[kind](tmp_path / "x", store)
    assert [name for name in files_in(tmp_path / "x") if not name.startswith("patches/")] == []


@every_kind
def test_memory_does_not_grow_with_the_slide(kind: str, tmp_path: Path) -> None:
    store = make_store(tmp_path, n=8000, features=512, chunk_rows=250, bad=())  # 16 MB, half a megabyte a chunk
    KINDS[kind](tmp_path / "warm", make_store(tmp_path, "warm"))
    tracemalloc.start()
    try:
        KINDS[kind](tmp_path / "x", store)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6e6


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("clam", []),
        ("stamp", []),
        ("pt", []),
        ("trident", ["features_enc/s.1.h5", "patches/s.1_patches.h5"]),
        ("parquet", ["t.parquet"]),
        ("anndata", ["t.h5ad"]),
    ],
)
def test_a_slide_without_tiles(kind: str, files: list[str], tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "x", make_store(tmp_path, n=0))
    assert files_in(tmp_path / "x") == files
    if kind == "trident":
        with h5py.File(tmp_path / "x" / files[0]) as file:
            assert (file["features"].shape, file["features"].dtype) == ((0,), np.float32)
            assert (file["coords"].shape, file["coords"].attrs["patch_size_level0"]) == ((0, 2), 512)
    if kind == "parquet":
        assert pq.read_table(tmp_path / "x" / "t.parquet").num_rows == 0


def test_an_empty_slide_of_trident_as_a_tensor(tmp_path: Path) -> None:
    made = export_pt(tmp_path / "x", make_store(tmp_path, n=0), GRID, "enc", "trident")
    tensor = torch.load(made.files[0], weights_only=True)
    assert (tuple(tensor.shape), tensor.dtype) == ((0,), torch.float32)


# --- what is refused ---------------------------------------------------------------------------------------------


def test_numbers_too_large_for_float16(tmp_path: Path) -> None:
    store = make_store(tmp_path, bad=())
    rows = store.embeddings(GRID, "enc")
    values = rows.read_values(slice(64, 128))
    values[5, 2] = 1e5
    rows.write_chunk(1, values, np.ones(64, np.uint8))
    with pytest.raises(StoreError, match=r"row 69 of enc holds 100000, too large for float16; export in a layout of"):
        export_hdf5(tmp_path / "x", store, GRID, "enc", "stamp")
    assert files_in(tmp_path / "x") == []
    assert export_hdf5(tmp_path / "x", store, GRID, "enc", "clam").tiles == 150


def test_the_choice_of_embeddings(tmp_path: Path) -> None:
    store = make_store(tmp_path, encoders=("uni", "conch"))
    known = known_embeddings(store)
    assert known == [(GRID, "conch"), (GRID, "uni")]
    assert choose_embeddings(known, encoder="uni") == (GRID, "uni")
    assert choose_embeddings([(GRID, "uni")]) == (GRID, "uni")
    two_grids = [*known, ("224px-1um", "uni")]
    assert choose_embeddings(two_grids, encoder="conch") == (GRID, "conch")
    assert choose_embeddings(two_grids, grid="224px-1um") == ("224px-1um", "uni")
    for arguments, message in (
        ({}, r"several encoders \(conch, uni\); choose one with --encoder"),
        ({"encoder": "uni"}, r"several grids \(224px-1um, 256px-0.5um\); choose one with --grid"),
        ({"encoder": "uni2"}, r"--encoder uni2: no such encoder; did you mean 'uni'"),
        ({"grid": "224px-2um"}, r"--grid 224px-2um: no such grid; did you mean '224px-1um'"),
        ({"encoder": "conch", "grid": "224px-1um"}, r"no embeddings of conch on 224px-1um; there are: uni on 224px"),
    ):
        with pytest.raises(UsageError, match=message):
            choose_embeddings(two_grids, **arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no embeddings here; compute some"):
        choose_embeddings([])
    with pytest.raises(StoreError, match=r"no embeddings of gigapath on .*there are: conch on 256px-0.5um, uni on"):
        read_good_tiles(store, GRID, "gigapath")


def test_streamed_rows_are_counted(tmp_path: Path) -> None:
    with (tmp_path / "a.h5").open("wb") as target, pytest.raises(ValueError, match="3 rows came for 4"):
        stream_hdf5(target, "features", (4, 2), np.float32, [np.zeros((3, 2))], lambda file: None)
