"""Imports of features: the rows and places of a file are those of the store; what is not stated is asked for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pathopipe.cohort import LabelTable
from pathopipe.embeddings.importing import FeatureImport, ImportedSlide, _step, import_features
from pathopipe.errors import PathopipeError, StoreChangedError, StoreWriteError, UsageError
from pathopipe.export.features import export_hdf5, export_pt
from pathopipe.layouts import open_features
from pathopipe.mil.bags import find_features, open_bags
from pathopipe.mil.heatmap import tile_raster
from pathopipe.records import Level, SlideInfo, TileGrid
from pathopipe.store import SlideStore, store_path

GRID = "256px-0.5um"
VALUES = np.random.default_rng(3).standard_normal((130, 6)).astype(np.float32)
XY = np.stack([np.arange(130) % 20 * 512, np.arange(130) // 20 * 512], axis=1)


def put_trident(folder: Path, slide_id: str = "s", **changes: Any) -> Path:
    """Features of 130 tiles of 512 level-0 px on a slide of 11,000 x 9,000 px."""
    path = folder / "features_enc" / f"{slide_id}.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    stated = {
        "patch_size": 256,
        "patch_size_level0": 512,
        "target_magnification": 20,
        "level0_width": 11_000,
        "level0_height": 9_000,
    }
    with h5py.File(path, "w") as file:
        file["features"] = changes.pop("values", VALUES)
        file["coords"] = changes.pop("xy", XY)
        file["features"].attrs["encoder"] = changes.pop("encoder", "enc")
        stated.update(changes)
        file["coords"].attrs.update({name: value for name, value in stated.items() if value is not None})
    return path


def bring(
    path: Path, out: Path, *, mpp: float | None = 0.25, slide: Path | None = None, **wanted: Any
) -> ImportedSlide:
    return import_features(open_features(path, beside=True), out, FeatureImport(**wanted), mpp=mpp, slide=slide)


def stored(out: Path, slide_id: str = "s", grid: str = GRID, encoder: str = "enc") -> tuple[Any, Any, Any]:
    store = SlideStore.open(store_path(out, slide_id))
    rows = store.embeddings(grid, encoder)
    return store.read_grid(grid), rows.read_values(), rows.read_status()


def sound(out: Path, slide_id: str = "s") -> bool:
    return list(SlideStore.open(store_path(out, slide_id)).problems()) == []


def refused(path: Path, out: Path, message: str, **arguments: Any) -> None:
    with pytest.raises(PathopipeError, match=message):
        bring(path, out, **arguments)


# --- there and back ----------------------------------------------------------------------------------------------


def own_store(out: Path, *, dtype: str = "float32", stride: float = 512.0, overlap_px: int = 0) -> SlideStore:
    info = SlideInfo(
        slide_id="s",
        path=Path("s.svs"),
        reader="array",
        vendor="generic",
        dims_l0=(160_000, 40_000),
        levels=(Level(160_000, 40_000, 1.0, 1.0),),
        size_bytes=10,
        fingerprint="abc",
        mpp=(0.2485, 0.2485),
    )
    store = SlideStore.create_or_open(store_path(out, "s"), info, created_by="test")
    column = np.arange(2100)
    index = np.stack([column % 300 + 3, column // 300 + 1], axis=1)
    grid = TileGrid(
        name="g",
        side_px=256,
        mpp=0.5,
        achieved_mpp=(0.497, 0.497),
        overlap_px=overlap_px,
        side_l0=(512, 512),
        stride_l0=(stride, stride),
        level=0,
        read_px=(512, 512),
        resample="area",
        xy_l0=np.floor(index * stride).astype(np.int64),
        tissue_fraction=np.ones(2100, np.float32),
    )
    store.write_grid(grid, {"a": 1})
    about = {"inputs": {"encoder": {"name": "enc"}}}
    rows = store.create_embeddings("g", "enc", rows=2100, features=6, dtype=dtype, chunk_rows=1000, about=about)
    values = np.random.default_rng(5).standard_normal((2100, 6)).astype(dtype)
    status = np.ones(2100, np.uint8)
    values[[7, 1500]], status[[7, 1500]] = np.nan, 3
    for chunk in range(rows.n_chunks):
        rows.write_chunk(chunk, values[rows.chunk_slice(chunk)], status[rows.chunk_slice(chunk)])
    rows.finish(bad_tiles=2)
    return store


@pytest.mark.parametrize(
    ("layout", "dtype", "stride"),
    [
        ("clam", "float32", 512.0),
        ("clam", "float16", 497.3),
        ("trident", "float32", 497.3),
        ("trident", "float16", 448.0),
        ("stamp", "float32", 497.3),
        ("stamp", "float16", 512.0),
        ("clam.pt", "float32", 448.0),
        ("trident.pt", "float16", 512.0),
    ],
)
def test_there_and_back(tmp_path: Path, layout: Any, dtype: str, stride: float) -> None:
    store = own_store(tmp_path / "own", dtype=dtype, stride=stride)
    if layout.endswith(".pt"):
        made = export_pt(tmp_path / "x", store, "g", "enc", layout.removesuffix(".pt"))
    else:
        made = export_hdf5(tmp_path / "x", store, "g", "enc", layout)
    # CLAM states pixels as they were read at a level, not as the encoder got them.
    tile_px = 256 if layout.startswith("clam") else None
    report = bring(made.files[0], tmp_path / "back", mpp=0.2485, encoder="enc", tile_px=tile_px)
    assert (report.tiles, report.features, report.bad_tiles, report.grid) == (2098, 6, 0, GRID)
    good = np.delete(np.arange(2100), [7, 1500])
    grid, values, status = stored(tmp_path / "back")
    own = store.read_grid("g")
    assert np.array_equal(grid.xy_l0, own.xy_l0[good])
    assert (grid.side_l0, grid.side_px, grid.mpp) == ((512, 512), 256, 0.5)
    assert grid.achieved_mpp == pytest.approx((0.497, 0.497))
    assert (status == 1).all()
    before = store.embeddings("g", "enc").read_values()[good]
    if layout == "stamp":
        assert values.dtype == np.float16
        assert np.abs(values - before).max() <= np.abs(before).max() * 2**-11
    else:
        assert values.dtype == np.float32
        assert np.array_equal(values, before.astype(np.float32))
    assert sound(tmp_path / "back")
    # A map puts every tile into the cell that it had.
    again = tile_raster(grid, (160_000, 40_000), np.arange(2098, dtype=np.float32))
    there = tile_raster(replace(own, xy_l0=own.xy_l0[good]), (160_000, 40_000), np.arange(2098, dtype=np.float32))
    assert again.cell_l0 == there.cell_l0
    assert np.array_equal(again.values, there.values, equal_nan=True)


def test_overlap_is_kept(tmp_path: Path) -> None:
    made = export_hdf5(tmp_path / "x", own_store(tmp_path, stride=384.0, overlap_px=64), "g", "enc", "trident")
    report = bring(made.files[0], tmp_path / "back", mpp=0.2485)
    assert report.grid == "256px-0.5um-o64"
    grid, _, _ = stored(tmp_path / "back", grid=report.grid)
    assert (grid.overlap_px, grid.stride_l0) == (64, (384.0, 384.0))


def test_onto_the_tiles_that_are_there(tmp_path: Path) -> None:
    store = own_store(tmp_path)
    rows = store.embeddings("g", "enc")
    full = np.nan_to_num(rows.read_values())
    for chunk in range(rows.n_chunks):
        place = rows.chunk_slice(chunk)
        rows.write_chunk(chunk, full[place], np.ones(place.stop - place.start, np.uint8))
    made = export_hdf5(tmp_path / "x", store, "g", "enc", "trident")
    before = (store.path / "tiles" / "g" / "zarr.json").read_bytes()
    bring(made.files[0], tmp_path, mpp=None, encoder="other", grid="g")
    assert (store.path / "tiles" / "g" / "zarr.json").read_bytes() == before
    assert store.encoders("g") == ["enc", "other"]
    assert np.array_equal(store.embeddings("g", "other").read_values(), full)
    refused(
        made.files[0], tmp_path, "holds enc on g already, computed by 'pathopipe run'; --replace", mpp=None, grid="g"
    )


@given(
    stride=st.floats(3, 3000),
    picked=st.lists(st.integers(0, 300), min_size=1, max_size=60),
    more=st.integers(0, 20),
)
def test_the_step_puts_tiles_where_they_are(stride: float, picked: list[int], more: int) -> None:
    starts = np.floor(np.array(picked) * stride).astype(np.int64)
    side = max(1, int(stride)) + more
    step = _step(starts, side)
    # Exact, or a fraction of a tile.
    cells = np.ceil(starts / step - 1e-9)
    assert (np.floor(cells * step) == starts).all() or step == max(1.0, side / 8)
    assert step <= side + 2
    assert np.abs(cells * step - starts).max() < max(step, side / 8 + 1)


def test_a_regular_step_is_found_and_an_irregular_one_is_an_eighth() -> None:
    assert _step(np.arange(5, 90) * 512, 512) == 512.0
    assert _step(np.array([51200]), 512) == 512.0
    assert _step(np.array([0, 0]), 512) == 512.0
    floats = np.floor(np.arange(3, 200) * 1030.181).astype(np.int64)
    assert _step(floats, 1030) == pytest.approx(1030.181, abs=2e-3)
    assert _step(np.array([17, 529, 1041, 1100, 1612]), 512) == 64.0


# --- what goes into the store ------------------------------------------------------------------------------------


def test_without_the_slide(tmp_path: Path) -> None:
    report = bring(put_trident(tmp_path), tmp_path / "out")
    assert (report.slide_id, report.encoder, report.grid, report.unchanged) == ("s", "enc", GRID, False)
    store = SlideStore.open(store_path(tmp_path / "out", "s"))
    assert (store.slide["dims_l0"], store.slide["mpp"], store.slide["fingerprint"]) == ([11_000, 9_000], [0.25] * 2, "")
    assert store.slide["problems"] == ["made from imported features; the slide's file was not at hand"]
    assert store.inputs(f"embeddings/{GRID}/enc")["imported"]["file"] == "s.h5"  # type: ignore[index]
    assert str(tmp_path) not in str(store.attributes("")) + str(store.attributes(f"embeddings/{GRID}/enc"))
    grid, _, _ = stored(tmp_path / "out")
    assert np.isnan(grid.tissue_fraction).all()
    assert sound(tmp_path / "out")


def test_the_size_is_the_reach_where_nothing_says_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    bring(put_trident(tmp_path, level0_width=None, level0_height=None), out)
    store = SlideStore.open(store_path(out, "s"))
    assert store.slide["dims_l0"] == [20 * 512, 7 * 512]
    assert "it is as far as the imported tiles reach" in store.slide["problems"][1]
    further = put_trident(tmp_path / "b", xy=XY * 2, encoder="far", level0_width=None, level0_height=None)
    refused(further, out, r"10240 x 3584 px \(the reach of the tiles that were imported first\)")


def test_with_the_slide(tmp_path: Path, drawn_slide: Path) -> None:
    path = put_trident(tmp_path, xy=XY % 1024, level0_width=None, level0_height=None)
    bring(path, tmp_path / "out", mpp=None, slide=drawn_slide, tile_px=512)
    store = SlideStore.open(store_path(tmp_path / "out", "s"))
    assert (store.slide["dims_l0"], store.slide["mpp"]) == ([2400, 1800], [0.5, 0.5])
    assert len(store.slide["fingerprint"]) > 8
    grid, _, _ = stored(tmp_path / "out", grid="512px-0.5um")
    assert (grid.read_px, grid.resample) == ((512, 512), "none")
    wrong = put_trident(tmp_path / "wrong", xy=XY % 1024)
    refused(
        wrong, tmp_path / "o2", "made from a slide of 11000 x 9000 px, but .* has 2400 x 1800 px", slide=drawn_slide
    )
    outside = put_trident(tmp_path / "far", level0_width=None, level0_height=None)
    message = r"110 of 130 tiles lie outside the slide's 2400 x 1800 px, the first at \(2560, 0\)"
    refused(outside, tmp_path / "o3", message, slide=drawn_slide, mpp=None, tile_px=512)
    assert not (tmp_path / "o3").exists()


def test_a_store_without_its_slide_stays_so(tmp_path: Path, drawn_slide: Path) -> None:
    bring(put_trident(tmp_path), tmp_path / "out")
    path = put_trident(tmp_path / "b", xy=XY % 1024, level0_width=None, level0_height=None, encoder="b")
    refused(path, tmp_path / "out", "made from features alone, without the slide's file", slide=drawn_slide)


def test_again_is_nothing_to_do(tmp_path: Path) -> None:
    path = put_trident(tmp_path)
    bring(path, tmp_path / "out")
    store = store_path(tmp_path / "out", "s")
    before = {file: file.stat().st_mtime_ns for file in store.rglob("*") if file.is_file()}
    renamed = path.rename(path.with_name("t.h5")).rename(path)
    report = import_features(open_features(renamed), tmp_path / "out", FeatureImport())
    assert report.unchanged
    assert {file: file.stat().st_mtime_ns for file in store.rglob("*") if file.is_file()} == before


def test_other_features_are_refused_or_replace(tmp_path: Path) -> None:
    out = tmp_path / "out"
    bring(put_trident(tmp_path), out)
    other = put_trident(tmp_path / "b", values=VALUES + 1)
    refused(other, out, r"holds enc on 256px-0.5um already, imported from another file \(s.h5\); --replace puts")
    assert np.array_equal(stored(out)[1], VALUES)
    bring(other, out, replace=True)
    assert np.array_equal(stored(out)[1], VALUES + 1)
    fewer = put_trident(tmp_path / "c", values=VALUES[:40], xy=XY[:40])
    refused(fewer, out, r"the grid 256px-0.5um is there with other tiles \(130, not 40 of this file\); --replace puts")
    bring(fewer, out, replace=True)
    assert len(stored(out)[0]) == len(stored(out)[1]) == 40
    assert sound(out)


def test_other_tiles_are_refused_where_another_encoder_stands_on_them(tmp_path: Path) -> None:
    out = tmp_path / "out"
    bring(put_trident(tmp_path), out)
    bring(put_trident(tmp_path / "b", encoder="b"), out)
    fewer = put_trident(tmp_path / "c", values=VALUES[:40], xy=XY[:40])
    refused(fewer, out, "40 of this file, on which b stands.*choose another name with --grid", replace=True)
    bring(fewer, out, grid="fewer")
    assert len(stored(out, grid="fewer")[0]) == 40
    assert sorted(SlideStore.open(store_path(out, "s")).encoders(GRID)) == ["b", "enc"]


def test_replaced_features_make_predictions_stale(tmp_path: Path) -> None:
    out = tmp_path / "out"
    bring(put_trident(tmp_path), out)
    store = SlideStore.open(store_path(out, "s"))
    store.write_predictions("m", np.zeros(1, np.float32), None, grid=GRID, about={"inputs": {}})
    report = bring(put_trident(tmp_path / "b", values=VALUES + 1), out, replace=True)
    assert report.notes == ("predictions of m were made from what was replaced; predict again",)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_quarantined(tmp_path: Path, value: float) -> None:
    values = VALUES.copy()
    values[[2, 90], 3] = value
    report = bring(put_trident(tmp_path, values=values), tmp_path / "out")
    assert report.bad_tiles == 2
    _, kept, status = stored(tmp_path / "out")
    assert np.flatnonzero(status == 3).tolist() == [2, 90]
    assert np.isnan(kept[[2, 90]]).all()
    assert np.array_equal(kept[status == 1], np.delete(VALUES, [2, 90], axis=0))
    assert sound(tmp_path / "out")


def test_numbers_beyond_float32_are_overflow(tmp_path: Path) -> None:
    values = VALUES.astype(np.float64)
    values[5, 0] = 1e300
    bring(put_trident(tmp_path, values=values), tmp_path / "out")
    assert np.flatnonzero(stored(tmp_path / "out")[2] == 4).tolist() == [5]


def test_tiles_at_one_place_are_kept_and_told(tmp_path: Path) -> None:
    xy = XY.copy()
    xy[50] = xy[51]
    report = bring(put_trident(tmp_path, xy=xy), tmp_path / "out")
    assert report.notes == ("1 of 130 tiles lie exactly on another one; they are kept, and count twice",)
    assert np.array_equal(stored(tmp_path / "out")[0].xy_l0, xy)


def test_an_empty_slide(tmp_path: Path) -> None:
    path = put_trident(tmp_path, values=np.zeros((0,), np.float32), xy=np.zeros((0, 2), np.int64))
    refused(path, tmp_path / "out", "an empty slide, whose number of features is not stated; import it together")
    report = bring(path, tmp_path / "out", features=6)
    assert (report.tiles, report.features) == (0, 6)
    assert stored(tmp_path / "out")[1].shape == (0, 6)
    assert sound(tmp_path / "out")


def test_many_chunks(tmp_path: Path) -> None:
    n = 2500
    values = np.random.default_rng(0).standard_normal((n, 3)).astype(np.float16)
    xy = np.stack([np.arange(n) % 20 * 512, np.arange(n) // 20 * 64], axis=1)
    bring(put_trident(tmp_path, values=values, xy=xy), tmp_path / "out")
    _, kept, _ = stored(tmp_path / "out")
    assert kept.dtype == np.float16
    assert np.array_equal(kept, values)


def test_a_kill_is_mended_by_the_same_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put_trident(tmp_path)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("pathopipe.store.embeddings.EmbeddingArray.finish", killed)
        with pytest.raises(KeyboardInterrupt):
            bring(path, tmp_path / "out")
    assert not sound(tmp_path / "out")
    assert not bring(path, tmp_path / "out").unchanged
    assert np.array_equal(stored(tmp_path / "out")[1], VALUES)
    assert sound(tmp_path / "out")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = put_trident(tmp_path)
    monkeypatch.setattr("pathopipe.files.os.fsync", full)
    with pytest.raises(StoreWriteError, match="No space left on device"):
        bring(path, tmp_path / "out")


# --- mil reads them ----------------------------------------------------------------------------------------------


def test_mil_reads_them(tmp_path: Path) -> None:
    values = VALUES.copy()
    values[4] = np.nan
    bring(put_trident(tmp_path, "a", values=values), tmp_path / "out")
    bring(put_trident(tmp_path, "b"), tmp_path / "out", mpp=0.2485)
    assert sorted(find_features(tmp_path / "out")) == ["a", "b"]
    bags = open_bags(tmp_path / "out", LabelTable.of_slides(["a", "b"]))
    assert [(bag.n_tiles, bag.features, bag.encoder) for bag in bags] == [(129, 6, "enc"), (130, 6, "enc")]
    assert bags[0].encoder_id == bags[1].encoder_id
    assert np.array_equal(bags[0].read(), np.delete(VALUES, 4, axis=0))
    (places,) = bags[0].places()
    assert np.array_equal(places.xy_l0, np.delete(XY, 4, axis=0))  # type: ignore[arg-type]
    assert places.side_l0 == (512, 512)


# --- what has to be stated ---------------------------------------------------------------------------------------


def put_h5(path: Path, **arrays: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
    return path


def test_what_clam_does_not_state_is_asked_for(tmp_path: Path) -> None:
    path, out = put_h5(tmp_path / "h5_files" / "s.h5", features=VALUES, coords=XY), tmp_path / "out"
    refused(path, out, "doesn't say which encoder made it; name it with --encoder")
    refused(path, out, "micrometres per pixel of slide s are not known; give the slides", mpp=None, encoder="enc")
    refused(path, out, "neither it nor a patches folder beside its own says how wide its tiles are", encoder="enc")
    refused(path, out, "doesn't say how many pixels wide its tiles are", encoder="enc", tile_um=128)
    assert not out.exists()
    report = bring(path, out, encoder="enc", tile_um=128, tile_px=224)
    grid, _, _ = stored(out, grid=report.grid)
    assert (grid.side_l0, grid.side_px, report.grid) == ((512, 512), 224, "224px-0.571429um")


def test_clam_with_its_patches(tmp_path: Path) -> None:
    path = put_h5(tmp_path / "h5_files" / "s.h5", features=VALUES, coords=XY)
    with h5py.File(put_h5(tmp_path / "patches" / "s.h5", coords=XY), "r+") as file:
        file["coords"].attrs.update({"patch_size": 256, "patch_level": 1, "downsample": [2.0, 2.0]})
    report = bring(path, tmp_path / "out", mpp=0.2485, encoder="enc")
    assert report.grid == GRID  # 0.497 serves 0.5
    refused(path, tmp_path / "o2", "its tiles are 128 um wide at 0.25 um/px, not 64", encoder="enc", tile_um=64)
    assert bring(path, tmp_path / "o3", mpp=0.3, encoder="enc").grid == "256px-0.6um"


def test_a_tensor_needs_coordinates(tmp_path: Path) -> None:
    path = tmp_path / "pt_files" / "s.pt"
    path.parent.mkdir()
    torch.save(torch.from_numpy(VALUES), path)
    settings: dict[str, Any] = {"encoder": "enc", "tile_um": 128, "tile_px": 256}
    refused(path, tmp_path / "out", r"holds no coordinates; CLAM's are in h5_files/s\.h5 or patches/s\.h5", **settings)
    put_h5(tmp_path / "patches" / "s.h5", coords=XY)
    bring(path, tmp_path / "out", **settings)
    grid, values, _ = stored(tmp_path / "out")
    assert np.array_equal(grid.xy_l0, XY)
    assert np.array_equal(values, VALUES)


def test_the_unit_of_coordinates(tmp_path: Path) -> None:
    path = put_h5(tmp_path / "s.h5", feats=VALUES, coords=XY.astype(np.float32) * 0.25)
    settings: dict[str, Any] = {"encoder": "enc", "tile_um": 128, "tile_px": 256}
    refused(path, tmp_path / "out", "doesn't say whether its coordinates are pixels or micrometres", **settings)
    bring(path, tmp_path / "out", unit="um", **settings)
    assert np.array_equal(stored(tmp_path / "out")[0].xy_l0, XY)
    halves = put_h5(tmp_path / "b" / "s.h5", feats=VALUES, coords=XY + 0.5)
    refused(
        halves, tmp_path / "o2", r"not whole numbers can't be level-0 pixels; are they micro", unit="px", **settings
    )
    refused(put_trident(tmp_path), tmp_path / "o2", "its coordinates are level-0 pixels; leave out --unit", unit="um")


def test_contradictions(tmp_path: Path) -> None:
    path, out = put_trident(tmp_path), tmp_path / "out"
    refused(path, out, "its tiles have 1 um/px, but it states 20x, about 0.5 um/px; correct --mpp", mpp=0.5)
    refused(path, out, "the config states 99 um/px, which is outside 0.05 to 50", mpp=99.0)
    refused(
        put_trident(tmp_path / "b", xy=XY - 600), out, r"26 of 130 tiles lie outside .* the first at \(-600, -600\)"
    )
    nan = put_h5(tmp_path / "c" / "features_enc" / "s.h5", features=VALUES, xy_l0=np.where(XY == 512, np.nan, XY))
    refused(nan, out, "the coordinates of row 1 are not finite", tile_um=128, tile_px=256)
    refused(put_trident(tmp_path / "d", encoder="My Encoder"), out, "encoder 'my encoder' can't be a name in a store")
    refused(path, out, "6 numbers a tile, but the encoder handcrafted gives 198", encoder="handcrafted")
    refused(path, out, "--grid A/b: use small letters", grid="A/b")
    short = put_trident(tmp_path / "e", xy=XY[:-1])
    refused(short, out, r"'coords' has the shape \(129, 2\) beside 130 rows")
    assert not out.exists()
    bring(path, out)
    with pytest.raises(StoreChangedError, match=r"made at 0\.25 um/px, not at 0\.5; leave out --mpp"):
        bring(put_trident(tmp_path / "f", encoder="b"), out, mpp=0.5)


def test_code_in_a_tensor_is_refused(tmp_path: Path) -> None:
    torch.save({"features": torch.from_numpy(VALUES), "what": Path("x")}, tmp_path / "s.pt")
    with pytest.raises(UsageError, match="Python objects, which could run code"):
        bring(tmp_path / "s.pt", tmp_path / "out", encoder="enc")


@pytest.mark.shared_data
def test_a_real_bag(tmp_path: Path, shared_data: Path) -> None:
    path = shared_data / "mil" / "tcga_bags" / "TCGA-AD-6964-01Z-00-DX1.h5"
    bring(path, tmp_path, encoder="ctp", unit="px", tile_um=128, tile_px=224)
    grid, values, status = stored(tmp_path, path.stem, "224px-0.571429um", "ctp")
    with h5py.File(path) as file:
        assert np.array_equal(values, file["feats"][()])
        assert np.array_equal(grid.xy_l0, file["coords"][()])
    assert (grid.stride_l0, (status == 1).all()) == ((512.0, 512.0), True)
    assert sound(tmp_path, path.stem)
