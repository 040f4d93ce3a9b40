"""Bags: the same numbers as the store or file holds, bad rows aside; batches that are padded, capped and repeatable."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pathopipe.cohort import LabelTable
from pathopipe.errors import StoreError, UsageError
from pathopipe.mil.bags import (
    Bag,
    BagLoader,
    array_bag,
    bag_means,
    find_features,
    image_folder_bag,
    open_bags,
    part_empty,
    read_images,
)
from pathopipe.mil.sources import StoreSource
from pathopipe.records import Level, SlideInfo, TileGrid
from pathopipe.store import SlideStore, store_path

GRID = "256px-0.5um"


def put_store(
    out: Path,
    slide_id: str,
    n: int,
    *,
    encoders: tuple[str, ...] = ("e",),
    bad: tuple[int, ...] = (),
    weights: str = "abc",
    features: int = 8,
    chunk_rows: int = 16,
    chunks: int | None = None,
    dtype: str = "float16",
    grid: str = GRID,
) -> NDArray[Any]:
    """A store with random embeddings, ``chunks`` of them written; returns all (n, features), NaN in bad rows."""
    info = SlideInfo(
        slide_id=slide_id,
        path=Path("x.svs"),
        reader="openslide",
        vendor="aperio",
        dims_l0=(9000, 9000),
        levels=(Level(9000, 9000, 1.0, 1.0),),
        size_bytes=1,
        fingerprint=slide_id,
        mpp=(0.5, 0.5),
    )
    store = SlideStore.create_or_open(store_path(out, slide_id), info, created_by="test")
    store.write_grid(
        TileGrid(
            name=grid,
            side_px=256,
            mpp=0.5,
            achieved_mpp=(0.5, 0.5),
            overlap_px=0,
            side_l0=(256, 255),
            stride_l0=(256.0, 255.0),
            level=0,
            read_px=(256, 255),
            resample="none",
            xy_l0=np.arange(2 * n, dtype=np.int64).reshape(n, 2),
            tissue_fraction=np.ones(n, np.float32),
        ),
        {"tissue": "x"},
    )
    values = np.random.default_rng([n, sum(slide_id.encode())]).standard_normal((n, features)).astype(dtype)
    values[list(bad)] = np.nan
    status = np.where(np.isin(np.arange(n), bad), 2, 1).astype(np.uint8)
    for encoder in encoders:
        identity = {"name": encoder, "weights_sha256": weights, "precision": "fp32"}
        array = store.create_embeddings(
            grid,
            encoder,
            rows=n,
            features=features,
            dtype=dtype,
            chunk_rows=chunk_rows,
            about={"inputs": {"encoder": identity}},
        )
        for chunk in range(array.n_chunks if chunks is None else chunks):
            array.write_chunk(chunk, values[array.chunk_slice(chunk)], status[array.chunk_slice(chunk)])
        if chunks is None:
            array.finish()
    return values


def put_h5(path: Path, values: NDArray[Any], *, encoder: str = "", **arrays: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = values
        if encoder:
            file["features"].attrs["encoder"] = encoder
        for name, array in arrays.items():
            file[name] = array


def opened(out: Path, *slide_ids: str, **options: Any) -> list[Bag]:
    return open_bags(out, LabelTable.of_slides(slide_ids), **options)


def random_bags(*sizes: int, features: int = 4) -> list[Bag]:
    rng = np.random.default_rng(sum(sizes))
    return [array_bag(f"b{n}", rng.standard_normal((size, features))) for n, size in enumerate(sizes)]


# --- stores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 50])
def test_a_store_reads_as_zarr_reads_it(tmp_path: Path, n: int, dtype: str) -> None:
    put_store(tmp_path, "s", n, dtype=dtype)
    (bag,) = opened(tmp_path, "s")
    plain = zarr.open_array(store_path(tmp_path, "s") / f"embeddings/{GRID}/e/values", mode="r")[:]
    assert (bag.n_tiles, bag.features, bag.left_out, bag.encoder) == (n, 8, 0, "e")
    assert isinstance(bag.sources[0], StoreSource)
    assert bag.sources[0].raw
    assert np.array_equal(bag.read(), np.asarray(plain).astype(np.float32))
    assert bag.read().dtype == np.float32


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.integers(0, 46), max_size=60))
def test_any_rows_in_any_order(tmp_path_factory: pytest.TempPathFactory, rows: list[int]) -> None:
    out = tmp_path_factory.getbasetemp() / "any-rows"
    if not out.exists():
        put_store(out, "s", 50, bad=(0, 17, 49))
    (bag,) = opened(out, "s")
    (place,) = bag.places()
    every = zarr.open_array(store_path(out, "s") / f"embeddings/{GRID}/e/values", mode="r")[:]
    assert np.array_equal(bag.read(np.asarray(rows, np.intp)), np.asarray(every)[place.rows[rows]].astype(np.float32))


def test_bad_tiles_are_left_out_and_places_say_where(tmp_path: Path) -> None:
    values = put_store(tmp_path, "s", 40, bad=(0, 16, 39))
    (bag,) = opened(tmp_path, "s")
    good = [row for row in range(40) if row not in (0, 16, 39)]
    assert (bag.n_tiles, bag.left_out) == (37, 3)
    assert np.array_equal(bag.read(), values[good].astype(np.float32))
    (place,) = bag.places()
    assert (place.slide_id, place.grid, place.side_l0, place.n_rows) == ("s", GRID, (256, 255), 40)
    assert place.rows.tolist() == good
    assert place.xy_l0 is not None
    assert place.xy_l0[:, 0].tolist() == [2 * row for row in good]


def test_a_store_in_another_encoding_is_read_all_the_same(tmp_path: Path) -> None:
    values = put_store(tmp_path, "s", 40)
    place = store_path(tmp_path, "s") / f"embeddings/{GRID}/e/values"
    zarr.create_array(str(place), data=values, chunks=(16, 8), overwrite=True)  # zstd
    (bag,) = opened(tmp_path, "s")
    assert isinstance(bag.sources[0], StoreSource)
    assert not bag.sources[0].raw
    rows = np.asarray([39, 0, 17])
    assert np.array_equal(bag.read(rows), values[rows].astype(np.float32))


def test_slides_of_a_patient_are_one_bag(tmp_path: Path) -> None:
    first, second, third = (put_store(tmp_path, name, n, bad=(1,)) for name, n in (("a", 20), ("b", 30), ("c", 5)))
    table = LabelTable(
        source="t",
        slide_ids=("a", "c", "b"),
        patient_ids=("p", "q", "p"),
        sites=("X", "Y", "X"),
        split=None,
        columns={},
    )
    p, q = open_bags(tmp_path, table, by="patient")
    assert [(bag.bag_id, bag.patient_id, bag.site, bag.n_tiles) for bag in (p, q)] == [
        ("p", "p", "X", 48),
        ("q", "q", "Y", 4),
    ]
    whole = np.concatenate([np.delete(first, 1, axis=0), np.delete(second, 1, axis=0)]).astype(np.float32)
    assert np.array_equal(p.read(), whole)
    rows = np.asarray([47, 0, 18, 19, 20, 19])
    assert np.array_equal(p.read(rows), whole[rows])
    assert [place.slide_id for place in p.places()] == ["a", "b"]
    assert np.array_equal(q.read(), np.delete(third, 1, axis=0).astype(np.float32))
    a, c, b = open_bags(tmp_path, table)
    assert [bag.bag_id for bag in (a, c, b)] == ["a", "c", "b"]
    assert b.patient_id == "p"


def test_what_is_not_complete_is_refused_or_taken_so_far(tmp_path: Path) -> None:
    values = put_store(tmp_path, "s", 50, chunks=2, bad=(3,))
    with pytest.raises(StoreError) as caught:
        opened(tmp_path, "s")
    assert "e on 256px-0.5um is not complete (2 of 4 chunks)" in str(caught.value)
    assert f"pathopipe run MANIFEST --out {tmp_path} --encoder e" in str(caught.value)
    (bag,) = opened(tmp_path, "s", allow_incomplete=True)
    assert bag.n_tiles == 31
    assert np.array_equal(bag.read(), np.delete(values[:32], 3, axis=0).astype(np.float32))


def test_a_damaged_chunk_is_named(tmp_path: Path) -> None:
    put_store(tmp_path, "s", 50)
    (bag,) = opened(tmp_path, "s")
    chunk = store_path(tmp_path, "s") / f"embeddings/{GRID}/e/values/c/1/0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-10])
    with pytest.raises(StoreError, match=r"c/1/0: 250 bytes long, 260 expected; delete it"):
        bag.read()
    bag.read(np.arange(16))
    chunk.write_bytes(b"\xff\xff" * 8 + whole[16:])
    with pytest.raises(StoreError, match="not finite in rows marked as good; 'pathopipe verify"):
        bag.read(np.asarray([16]))
    chunk.unlink()
    with pytest.raises(StoreError, match="can't be read \\(No such file or directory\\)"):
        bag.read()


def test_encoder_and_grid_are_chosen_where_there_are_several(tmp_path: Path) -> None:
    put_store(tmp_path, "s", 5, encoders=("uni", "conch"))
    with pytest.raises(UsageError, match="s: has the encoders conch, uni; choose one with --encoder"):
        opened(tmp_path, "s")
    assert opened(tmp_path, "s", encoder="uni")[0].encoder == "uni"
    with pytest.raises(UsageError, match="s: no encoder 'unni'; did you mean 'uni'"):
        opened(tmp_path, "s", encoder="unni")
    with pytest.raises(UsageError, match="no grid 'x'"):
        opened(tmp_path, "s", encoder="uni", grid="x")


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"features": 9}, r"widths of their features \(8: 2 \(a, c\); 9: 1 \(b\)\)"),
        ({"encoders": ("f",)}, r"encoders of their features \(e: 2 \(a, c\); f: 1 \(b\)\)"),
        ({"weights": "def"}, r"weights of the encoder of their features \(e@"),
        ({"grid": "512px-1um"}, r"grids of their features"),
    ],
)
def test_mixed_features_are_refused(tmp_path: Path, other: dict[str, Any], says: str) -> None:
    put_store(tmp_path, "a", 5)
    put_store(tmp_path, "b", 5, **other)
    put_store(tmp_path, "c", 5)
    with pytest.raises(UsageError, match=says):
        opened(tmp_path, "a", "b", "c")


def test_slides_without_features_are_named(tmp_path: Path) -> None:
    put_store(tmp_path, "a", 5)
    with pytest.raises(UsageError, match=r"no features of 4 of 5 slides \(b, c, d and 1 more\)"):
        opened(tmp_path, "a", "b", "c", "d", "e")


def test_weights_tell_encoders_apart(tmp_path: Path) -> None:
    put_store(tmp_path / "1", "a", 5)
    put_store(tmp_path / "2", "a", 5, weights="other")
    ids = [opened(tmp_path / n, "a")[0].encoder_id for n in ("1", "2", "1")]
    assert ids[0] == ids[2] != ids[1]
    assert ids[0].startswith("e@")


# --- feature files -----------------------------------------------------------------------------------------------


def test_files_lie_in_many_ways(tmp_path: Path) -> None:
    values = np.ones((3, 4), np.float32)
    put_h5(tmp_path / "flat" / "a.h5", values)
    np.savez(tmp_path / "flat" / "b.npz", features=values)
    torch.save(torch.ones(3, 4), tmp_path / "flat" / "a.pt")
    flat = find_features(tmp_path / "flat")
    assert {name: path.name for name, path in flat.items()} == {"a": "a.h5", "b": "b.npz"}

    put_h5(tmp_path / "clam" / "h5_files" / "a.h5", values)
    put_h5(tmp_path / "clam" / "patches" / "a.h5", values)
    (tmp_path / "clam" / "pt_files").mkdir()
    torch.save(torch.ones(3, 4), tmp_path / "clam" / "pt_files" / "a.pt")
    assert find_features(tmp_path / "clam") == {"a": tmp_path / "clam" / "h5_files" / "a.h5"}

    for folder in ("features_uni", "features_conch", "slide_features_titan"):
        put_h5(tmp_path / "trident" / folder / "a.h5", values, encoder=folder.removeprefix("features_"))
    put_h5(tmp_path / "trident" / "patches" / "a_patches.h5", values)
    assert find_features(tmp_path / "trident", encoder="uni")["a"].parent.name == "features_uni"
    with pytest.raises(
        UsageError, match=r"several folders \(features_conch, features_uni\); choose one with --encoder"
    ):
        find_features(tmp_path / "trident")
    with pytest.raises(UsageError, match="no folder of the encoder 'uny'; did you mean 'features_uni'"):
        find_features(tmp_path / "trident", encoder="uny")

    put_h5(tmp_path / "stamp" / "ctranspath-ab12" / "TCGA" / "deep" / "a.h5", values)
    assert set(find_features(tmp_path / "stamp", encoder="ctranspath")) == {"a"}

    put_store(tmp_path / "stores", "s", 5)
    assert set(find_features(tmp_path / "stores")) == set(find_features(tmp_path / "stores" / "slides")) == {"s"}


def test_folders_without_features(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no features here"):
        find_features(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        find_features(tmp_path / "none")
    put_h5(tmp_path / "x" / "1" / "a.h5", np.ones((3, 4)))
    put_h5(tmp_path / "x" / "2" / "a.h5", np.ones((3, 4)))
    with pytest.raises(UsageError, match="one slide id twice"):
        find_features(tmp_path / "x" / "..", encoder="x")


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".pt"])
def test_rows_that_are_not_finite_are_left_out(tmp_path: Path, suffix: str) -> None:
    values = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    values[2] = np.nan
    values[4, 1] = np.inf
    xy = np.arange(12).reshape(6, 2)
    if suffix == ".h5":
        put_h5(tmp_path / "a.h5", values, coords=xy)
    elif suffix == ".npz":
        np.savez(tmp_path / "a.npz", features=values, xy_l0=xy)
    else:
        torch.save({"features": torch.from_numpy(values), "xy_l0": torch.from_numpy(xy)}, tmp_path / "a.pt")
    (bag,) = opened(tmp_path, "a")
    assert (bag.n_tiles, bag.left_out) == (4, 2)
    assert np.array_equal(bag.read(), values[[0, 1, 3, 5]])
    assert np.array_equal(bag.read(np.asarray([3, 1])), values[[5, 1]])
    (place,) = bag.places()
    assert place.xy_l0 is not None
    assert np.array_equal(place.xy_l0, xy[[0, 1, 3, 5]])
    assert place.rows.tolist() == [0, 1, 3, 5]


def test_an_empty_slide_is_an_empty_bag(tmp_path: Path) -> None:
    put_h5(tmp_path / "a.h5", np.ones((3, 4)))
    put_h5(tmp_path / "b.h5", np.zeros(0))
    put_h5(tmp_path / "c.h5", np.full((2, 4), np.nan))
    bags = opened(tmp_path, "a", "b", "c")
    assert [bag.n_tiles for bag in bags] == [3, 0, 0]
    usable, empty = part_empty(bags)
    assert [bag.bag_id for bag in usable] == ["a"]
    assert [bag.bag_id for bag in empty] == ["b", "c"]
    with pytest.raises(UsageError, match=r"2 bags hold no tile \(b, c\); leave them out"):
        BagLoader(bags)
    # With other slides of the same patient it does no harm.
    table = LabelTable(
        source="t", slide_ids=("b", "a", "c"), patient_ids=("p",) * 3, sites=("",) * 3, split=None, columns={}
    )
    (bag,) = open_bags(tmp_path, table, by="patient")
    assert np.array_equal(bag.read(), np.ones((3, 4)))


def test_the_stated_encoder_must_be_the_wanted_one(tmp_path: Path) -> None:
    put_h5(tmp_path / "a.h5", np.ones((3, 4)), encoder="uni")
    with pytest.raises(UsageError, match="made with the encoder uni, not conch"):
        opened(tmp_path, "a", encoder="conch")
    assert opened(tmp_path, "a")[0].encoder == "uni"
    put_h5(tmp_path / "b.h5", np.ones((3, 4)), encoder="conch")
    with pytest.raises(UsageError, match="slides differ in the encoders"):
        opened(tmp_path, "a", "b")


@pytest.mark.shared_data
def test_real_bags(shared_data: Path) -> None:
    bags = opened(shared_data / "mil" / "tcga_bags", "TCGA-3X-AAVA-01Z-00-DX1", "TCGA-AD-6964-01Z-00-DX1")
    assert [(bag.n_tiles, bag.features) for bag in bags] == [(180, 512), (777, 512)]
    assert np.isfinite(bag_means(bags)).all()


# --- arrays and batches ------------------------------------------------------------------------------------------


def test_array_bags() -> None:
    bag = array_bag("b", np.asarray([[1.0, 2.0], [np.nan, 0.0], [3.0, 4.0]]), site="X", encoder="mine")
    assert (bag.patient_id, bag.site, bag.encoder, bag.n_tiles, bag.left_out) == ("b", "X", "mine", 2, 1)
    assert bag.read().tolist() == [[1, 2], [3, 4]]
    assert bag.places()[0].xy_l0 is None
    with pytest.raises(UsageError, match=r"shape \(3,\)"):
        array_bag("b", np.zeros(3))
    for row in (2, -1):
        with pytest.raises(IndexError, match="of 2 tiles"):
            bag.read(np.asarray([row]))


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 9])
def test_batches_hold_each_bag_once_padded(prefetch: int, batch_size: int) -> None:
    bags = random_bags(5, 1, 8, 3, 12, 7, 2)
    loader = BagLoader(bags, batch_size=batch_size, prefetch=prefetch)
    batches = list(loader.epoch())
    assert len(batches) == len(loader)
    assert np.concatenate([batch.bags for batch in batches]).tolist() == list(range(7))
    for batch in batches:
        assert batch.tiles.shape == (len(batch.bags), max(bags[n].n_tiles for n in batch.bags), 4)
        assert batch.tiles.dtype == np.float32
        for place, number in enumerate(batch.bags):
            assert np.array_equal(batch.tiles[place][batch.real[place]], bags[number].read())
            assert (batch.tiles[place][~batch.real[place]] == 0).all()
            assert batch.rows[place] is None


def test_samples_are_fresh_each_epoch_and_repeatable() -> None:
    bags = random_bags(50, 3, 40)
    loader = BagLoader(bags, cap=10, seed=4, batch_size=3)

    def rows(epoch: int, one: BagLoader = loader) -> list[list[int]]:
        (batch,) = one.epoch(epoch)
        assert batch.real.sum(axis=1).tolist() == [10, 3, 10]
        for place, chosen in enumerate(batch.rows):
            assert np.array_equal(batch.tiles[place][batch.real[place]], bags[place].read(chosen))
        return [[] if chosen is None else chosen.tolist() for chosen in batch.rows]

    first = rows(0)
    assert first[1] == []
    assert len(set(first[0])) == 10
    assert first[0] == sorted(first[0])
    assert rows(0) == first != rows(1)
    assert rows(0, BagLoader(bags, cap=10, seed=4, batch_size=3, prefetch=0)) == first
    assert rows(0, BagLoader(bags, cap=10, seed=5, batch_size=3)) != first
    # A bag's sample does not hang on the batch it is in.
    (alone,) = loader.epoch(0, [2])
    assert alone.rows[0] is not None
    assert alone.rows[0].tolist() == first[2]


def test_every_tile_is_sampled_alike() -> None:
    (bag,) = random_bags(20)
    loader = BagLoader([bag], cap=5)
    counts = np.zeros(20)
    for epoch in range(400):
        for batch in loader.epoch(epoch):
            counts[batch.rows[0]] += 1
    # 100 expected, standard deviation 8.7.
    assert 65 < counts.min() <= counts.max() < 135


def test_order_of_bags() -> None:
    bags = random_bags(*range(1, 21))

    def order(epoch: int, **options: Any) -> list[int]:
        loader = BagLoader(bags, batch_size=3, **options)
        return [int(n) for batch in loader.epoch(epoch, options.pop("indices", None)) for n in batch.bags]

    shuffled = order(1, shuffle=True)
    assert sorted(shuffled) == list(range(20))
    assert shuffled != list(range(20))
    assert order(1, shuffle=True) == shuffled != order(2, shuffle=True)
    chosen = [int(n) for batch in BagLoader(bags, batch_size=3).epoch(0, [7, 7, 1]) for n in batch.bags]
    assert chosen == [7, 7, 1]


def test_an_epoch_left_early_leaves_no_thread() -> None:
    bags = random_bags(*[5] * 30)
    before = threading.active_count()
    epoch = BagLoader(bags, prefetch=2).epoch()
    next(epoch)
    epoch.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_an_error_in_the_reader_reaches_the_consumer(tmp_path: Path) -> None:
    put_store(tmp_path, "a", 50)
    put_store(tmp_path, "b", 50)
    bags = opened(tmp_path, "a", "b")
    (store_path(tmp_path, "b") / f"embeddings/{GRID}/e/values/c/2/0").unlink()
    seen = []
    with pytest.raises(StoreError, match="can't be read"):
        for batch in BagLoader(bags).epoch():
            seen.append(batch)  # noqa: PERF402
    assert [batch.bags.tolist() for batch in seen] == [[0]]


class _Slow:
    """A source that takes 20 ms to read."""

    slide_id, path, encoder, encoder_id, grid, n_rows, n_tiles, features = "s", None, "", "", "", 1, 1, 2

    def __init__(self) -> None:
        self.reads = 0

    def read_into(self, out: NDArray[np.float32], rows: NDArray[np.intp] | None) -> None:
        self.reads += 1
        time.sleep(0.02)
        out[:] = 1


def test_reading_goes_on_while_the_consumer_works_and_is_bounded() -> None:
    source = _Slow()
    bags = [Bag(bag_id=str(n), patient_id=str(n), site="", sources=(source,)) for n in range(10)]  # type: ignore[arg-type]
    loader = BagLoader(bags, prefetch=2)
    for number, _ in enumerate(loader.epoch()):
        time.sleep(0.05)
        assert source.reads <= number + 3
    assert source.reads == 10
    assert loader.reading_s >= 0.19
    # Only the first batch is waited for: without reading ahead, it would be all of them.
    assert loader.waited_s < 0.7 * loader.reading_s
    assert 0 < loader.reading_share < 0.3
    waiting = BagLoader(bags, prefetch=0)
    for _ in waiting.epoch():
        pass
    assert waiting.reading_share > 0.8


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"cap": 0}, {"prefetch": -1}])
def test_odd_options(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="must be at least"):
        BagLoader(random_bags(3), **options)  # type: ignore[arg-type]


def test_loaders_refuse_mixed_and_no_bags() -> None:
    with pytest.raises(UsageError, match="no bags to read"):
        BagLoader([])
    with pytest.raises(UsageError, match="slides differ in the widths"):
        BagLoader([*random_bags(3), *random_bags(3, features=5)])


def test_bag_means() -> None:
    bags = random_bags(5, 30)
    means = bag_means(bags)
    assert np.allclose(means, [bag.read().mean(axis=0) for bag in bags], atol=1e-6)
    assert bag_means(bags, cap=3).shape == (2, 4)


# --- images without a slide --------------------------------------------------------------------------------------


def put_cells(folder: Path, n: int) -> None:
    folder.mkdir()
    for number in range(n):
        Image.new("RGB", (6, 4), (number, 10, 20)).save(folder / f"cell{number}.png")
    (folder / "notes.txt").write_text("not an image")


def test_images_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    put_cells(tmp_path / "p", 3)
    Image.new("L", (5, 5), 7).save(tmp_path / "p" / "a.jpg")
    images = list(read_images(tmp_path / "p"))
    assert [name for name, _ in images] == ["a.jpg", "cell0.png", "cell1.png", "cell2.png"]
    assert images[0][1].shape == (5, 5, 3)
    assert images[2][1][0, 0].tolist() == [1, 10, 20]
    (tmp_path / "p" / "cell1.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(UsageError, match=r"cell1\.png: can't be read as an image"):
        list(read_images(tmp_path / "p"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no image here"):
        list(read_images(tmp_path / "empty"))
    with pytest.raises(UsageError, match="no such folder"):
        list(read_images(tmp_path / "none"))


def test_a_folder_of_cells_is_a_bag(tmp_path: Path) -> None:
    put_cells(tmp_path / "p", 4)
    calls = []

    def compute(images: Iterator[tuple[str, NDArray[np.uint8]]]) -> NDArray[np.float32]:
        calls.append(1)
        return np.stack([rgb.mean(axis=(0, 1)) for _, rgb in images]).astype(np.float32)

    def bag(encoder: str = "mean-colour") -> Bag:
        return image_folder_bag(
            tmp_path / "p", compute, bag_id="p", encoder=encoder, cache=tmp_path / "cache" / "p.npz", site="X"
        )

    first = bag()
    assert first.read().tolist() == [[n, 10, 20] for n in range(4)]
    assert (first.bag_id, first.patient_id, first.site, first.encoder) == ("p", "p", "X", "mean-colour")
    assert np.array_equal(bag().read(), first.read())
    assert len(calls) == 1
    bag("other")
    assert len(calls) == 2
    (tmp_path / "p" / "cell0.png").unlink()
    assert bag("other").n_tiles == 3
    assert len(calls) == 3
    # The cache is a feature file like any other.
    (again,) = opened(tmp_path / "cache", "p")
    assert again.n_tiles == 3
    assert again.encoder == "other"
    with pytest.raises(UsageError, match=r"features of shape \(1, 3\) for 3 images"):
        image_folder_bag(
            tmp_path / "p", lambda _: np.zeros((1, 3)), bag_id="p", encoder="x", cache=tmp_path / "other.npz"
        )
