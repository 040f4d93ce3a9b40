"""``pathopipe export`` and ``pathopipe import`` as a user types them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pytest
import shapely

from pathopipe.geojson import stable_ids
from pathopipe.geometry import outlines_from_shapes
from pathopipe.records import Level, ObjectClass, ObjectTable, SlideInfo, TileGrid
from pathopipe.store import SlideStore, store_path

Cli = Callable[..., Any]


def add_slide(out: Path, slide_id: str, layers: dict[str, int]) -> SlideStore:
    info = SlideInfo(
        slide_id=slide_id,
        path=Path("a.svs"),
        reader="array",
        vendor="generic",
        dims_l0=(5000, 4000),
        levels=(Level(5000, 4000, 1.0, 1.0),),
        size_bytes=10,
        fingerprint="abc",
        mpp=(0.25, 0.25),
    )
    store = SlideStore.create_or_open(store_path(out, slide_id), info, created_by="test")
    for layer, n in layers.items():
        x = np.arange(n) * 20.0
        table = ObjectTable(
            classes=(ObjectClass("Epithelial", (200, 0, 0)), ObjectClass("Lymphocyte", (70, 90, 220))),
            measurement_names=("Area µm^2",),
            centroid_l0=np.stack([x + 5, np.full(n, 15.0)], axis=1),
            class_id=(np.arange(n) % 2).astype(np.uint8),
            class_probability=np.full(n, 0.5, np.float32),
            measurements=np.full((n, 1), 6.25, np.float32),
            outlines=outlines_from_shapes(shapely.box(x, 10, x + 10, 20)),
            id=stable_ids(slide_id, layer, range(n)),
            parent=np.full(n, -1),
        )
        store.write_objects(layer, [table], about={"inputs": {"a": 1}})
    return store


@pytest.fixture
def results(tmp_path: Path) -> Path:
    add_slide(tmp_path / "results", "s1", {"nuclei": 12, "glands": 3})
    add_slide(tmp_path / "results", "s2", {"nuclei": 8})
    return tmp_path / "results"


def count(path: Path) -> int:
    return len(json.loads(path.read_text(encoding="utf-8"))["features"])


def test_export_of_a_folder_is_a_file_a_layer_and_slide(cli: Cli, results: Path, tmp_path: Path) -> None:
    ended = cli("export", "geojson", results, "--out", tmp_path / "q")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines() == [
        f"{tmp_path / 'q' / 's1.glands.geojson'}: 3 annotations of glands",
        f"{tmp_path / 'q' / 's1.nuclei.geojson'}: 12 detections of nuclei",
        f"{tmp_path / 'q' / 's2.nuclei.geojson'}: 8 detections of nuclei",
    ]
    assert count(tmp_path / "q" / "s1.nuclei.geojson") == 12
    assert (tmp_path / "q" / "s1.nuclei.export.json").exists()


def test_export_of_one_store_into_one_file(cli: Cli, results: Path, tmp_path: Path) -> None:
    store = results / "slides" / "s1.zarr"
    target = tmp_path / "lymphocytes.geojson"
    ended = cli("export", "geojson", store, "--layer", "nuclei", "--class", "Lymphocyte", "--out", target)
    assert ended.code == 0, ended.err
    assert count(target) == 6
    assert (tmp_path / "lymphocytes.export.json").exists()
    packed = cli("export", "geojson", store, "--layer", "nuclei", "--out", tmp_path / "a.geojson.gz")
    assert packed.code == 0
    assert (tmp_path / "a.geojson.gz").read_bytes()[:2] == b"\x1f\x8b"
    points = cli("export", "geojson", store, "--layer", "nuclei", "--points", "--gzip", "--out", tmp_path / "q")
    assert points.out == f"{tmp_path / 'q' / 's1.nuclei-points.geojson.gz'}: 12 points of nuclei\n"


def test_a_split_is_told(cli: Cli, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathopipe.export.objects._MAX_POLYGONS", 5)
    store = results / "slides" / "s1.zarr"
    ended = cli("export", "geojson", store, "--layer", "nuclei", "--out", tmp_path)
    assert "nuclei has 12 objects, more than QuPath takes at once: 3 files" in ended.out
    monkeypatch.setattr("pathopipe.export.objects._MAX_POLYGONS", 250_000)
    again = cli("export", "geojson", store, "--layer", "nuclei", "--out", tmp_path)
    assert f"removed: {tmp_path / 's1.nuclei-1of3.geojson'} (of an earlier export)" in again.out
    left = sorted(path.name for path in tmp_path.glob("s1.nuclei*.geojson"))
    assert left == ["s1.nuclei-points.geojson", "s1.nuclei.geojson"]  # the points are of the same objects


def test_a_slide_without_the_layer_is_named_and_the_others_go_on(cli: Cli, results: Path, tmp_path: Path) -> None:
    ended = cli("export", "geojson", results, "--layer", "glands", "--out", tmp_path / "q")
    assert ended.code == 0
    assert "note: s2: no glands; passed over" in ended.err
    (results / "slides" / "s1.zarr" / "objects" / "glands" / "id" / "zarr.json").unlink()
    broken = cli("export", "geojson", results, "--out", tmp_path / "q2")
    assert broken.code == 1
    assert "failed: s1: glands: s1: objects/glands/id is missing" in broken.err
    assert "s2.nuclei.geojson: 8 detections" in broken.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RESULTS", "--out", "OUT", "--layer", "nucleii"], "did you mean 'nuclei'? There are: glands, nuclei"),
        (["RESULTS", "--out", "OUT", "--class", "Lymphocite"], "did you mean 'Lymphocyte'"),
        (["RESULTS", "--out", "OUT/a.geojson"], "one file, but 3 layers of 2 slides"),
        (["RESULTS/slides/s2.zarr", "--out", "OUT/a.json"], "QuPath reads .geojson and .geojson.gz"),
        (["RESULTS/slides/s2.zarr", "--out", "OUT/a.geojson", "--gzip"], "contradict each other"),
        (["OUT", "--out", "OUT"], "no store here"),
        (["RESULTS"], "Missing option '--out'"),
    ],
)
def test_wrong_use_of_export_is_told(
    cli: Cli, results: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    filled = [each.replace("RESULTS", str(results)).replace("OUT", str(tmp_path / "new")) for each in arguments]
    ended = cli("export", "geojson", *filled)
    assert ended.code == 2
    assert message in ended.err
    assert not (tmp_path / "new").exists()


def test_a_folder_without_objects_says_how_to_find_some(cli: Cli, tmp_path: Path) -> None:
    add_slide(tmp_path / "results", "s1", {})
    ended = cli("export", "geojson", tmp_path / "results", "--out", tmp_path / "q")
    assert (ended.code, "pathopipe segment SLIDE --out DIR" in ended.err) == (2, True)


def test_many_annotations_are_told(cli: Cli, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathopipe.cli.export._MANY_ANNOTATIONS", 2)
    ended = cli("export", "geojson", results, "--out", tmp_path / "q")
    assert ended.err == (
        "note: s1: 3 objects of glands stay annotations; don't let QuPath resolve their hierarchy, which takes minutes "
        "from some ten thousand on\n"
    )


def test_parquet_of_slides_apart_and_together(cli: Cli, results: Path, tmp_path: Path) -> None:
    apart = cli("export", "parquet", results, "--layer", "nuclei", "--out", tmp_path / "t")
    assert apart.code == 0, apart.err
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["s1.nuclei.parquet", "s2.nuclei.parquet"]
    cohort = tmp_path / "cohort.parquet"
    together = cli("export", "parquet", results, "--layer", "nuclei", "--merge", "--out", cohort)
    assert together.out == f"{cohort}: 20 objects of nuclei of 2 slides\n"
    assert geopandas.read_parquet(cohort)["slide_id"].tolist() == ["s1"] * 12 + ["s2"] * 8
    wrong = cli("export", "parquet", results, "--merge", "--out", cohort)
    assert (wrong.code, "one file, but there are 2 to write" in wrong.err) == (2, True)


def test_anndata_of_a_layer(cli: Cli, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("anndata")
    ended = cli("export", "anndata", results, "--layer", "nuclei", "--out", tmp_path / "h")
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in (tmp_path / "h").iterdir()) == ["s1.nuclei.h5ad", "s2.nuclei.h5ad"]
    monkeypatch.setitem(sys.modules, "anndata", None)
    without = cli("export", "anndata", results, "--out", tmp_path / "h")
    assert (without.code, "pip install 'pathopipe[anndata]'" in without.err) == (2, True)


def add_embeddings(
    store: SlideStore, *, encoder: str = "enc", grid: str = "256px-0.5um", n: int = 30, bad: int = 0
) -> None:
    column = np.arange(n)
    tiles = TileGrid(
        name=grid,
        side_px=256,
        mpp=0.5,
        achieved_mpp=(0.5, 0.5),
        overlap_px=0,
        side_l0=(512, 512),
        stride_l0=(512.0, 512.0),
        level=0,
        read_px=(512, 512),
        resample="area",
        xy_l0=np.stack([column % 8 * 512, column // 8 * 512], axis=1),
        tissue_fraction=np.ones(n, np.float32),
    )
    if grid not in store.grids():
        store.write_grid(tiles, {"a": 1})
    about = {"inputs": {"encoder": {"name": encoder}}}
    rows = store.create_embeddings(grid, encoder, rows=n, features=4, dtype="float32", chunk_rows=20, about=about)
    values, status = np.ones((n, 4), np.float32), np.ones(n, np.uint8)
    values[:bad], status[:bad] = np.nan, 2
    for chunk in range(rows.n_chunks):
        rows.write_chunk(chunk, values[rows.chunk_slice(chunk)], status[rows.chunk_slice(chunk)])
    rows.finish(bad_tiles=bad)


@pytest.fixture
def embedded(tmp_path: Path) -> Path:
    for name, bad in (("a", 0), ("b", 2)):
        add_embeddings(add_slide(tmp_path / "results", name, {}), bad=bad)
    return tmp_path / "results"


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        (["h5", "--layout", "clam"], "h5_files/a.h5"),
        (["h5", "--layout", "trident"], "features_enc/a.h5"),
        (["h5", "--layout", "stamp"], None),
        (["pt"], "pt_files/a.pt"),
        (["pt", "--layout", "trident"], "features_enc/a.pt"),
    ],
)
def test_features_for_other_mil_code(
    cli: Cli, embedded: Path, tmp_path: Path, arguments: list[str], first: str | None
) -> None:
    ended = cli("export", arguments[0], embedded, "--out", tmp_path / "x", *arguments[1:])
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert [line.partition(": ")[2] for line in lines] == [
        "30 tiles of enc on 256px-0.5um",
        "28 tiles of enc on 256px-0.5um",
    ]
    assert all(Path(line.partition(": ")[0]).is_file() for line in lines)
    assert first is None or lines[0].startswith(f"{tmp_path / 'x' / first}: ")
    assert ended.err == "note: b: 2 quarantined tiles left out\n"


def test_embeddings_as_tables(cli: Cli, embedded: Path, tmp_path: Path) -> None:
    # They are the only thing there, so they need not be named.
    ended = cli("export", "parquet", embedded, "--out", tmp_path / "t")
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["a.enc.parquet", "b.enc.parquet"]
    store = SlideStore.open(store_path(embedded, "a"))
    named = add_slide(tmp_path / "both", "a", {"nuclei": 5})
    add_embeddings(named)
    assert cli("export", "parquet", named.path, "--out", tmp_path / "o").out.endswith("5 objects of nuclei\n")
    one = cli("export", "parquet", named.path, "--encoder", "enc", "--out", tmp_path / "one.parquet")
    assert one.out == f"{tmp_path / 'one.parquet'}: 30 tiles of enc on 256px-0.5um\n"
    assert pd.read_parquet(tmp_path / "one.parquet").shape == (30, 8)
    merged = cli("export", "parquet", store.path, "--merge", "--encoder", "enc", "--out", tmp_path / "m.parquet")
    assert (merged.code, "--merge is for objects" in merged.err) == (2, True)
    both = cli("export", "parquet", named.path, "--encoder", "enc", "--layer", "nuclei", "--out", tmp_path / "m")
    assert (both.code, "export them one by one" in both.err) == (2, True)


def test_embeddings_as_anndata(cli: Cli, embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("anndata")
    ended = cli("export", "anndata", embedded, "--grid", "256px-0.5um", "--out", tmp_path / "h")
    assert ended.code == 0, ended.err
    assert sorted(path.name for path in (tmp_path / "h").iterdir()) == ["a.enc.h5ad", "b.enc.h5ad"]
    monkeypatch.setitem(sys.modules, "anndata", None)
    without = cli("export", "anndata", embedded, "--out", tmp_path / "h")
    assert (without.code, "pip install 'pathopipe[anndata]'" in without.err) == (2, True)


def test_a_slide_that_fails_is_named_and_the_others_go_on(cli: Cli, embedded: Path, tmp_path: Path) -> None:
    add_slide(embedded, "aa", {})
    (store_path(embedded, "a") / "embeddings" / "256px-0.5um" / "enc" / "values" / "c" / "1" / "0").unlink()
    (store_path(embedded, "broken")).mkdir()
    ended = cli("export", "h5", embedded, "--layout", "clam", "--out", tmp_path / "x")
    assert ended.code == 1
    assert "failed: a: a: enc on 256px-0.5um lacks 1 of 2 chunks; run the same command as before again" in ended.err
    assert "failed: aa: aa: no embeddings of enc on 256px-0.5um (there are: none)" in ended.err
    assert "failed: broken: " in ended.err
    assert ended.out == f"{tmp_path / 'x' / 'h5_files' / 'b.h5'}: 28 tiles of enc on 256px-0.5um\n"
    alone = cli("export", "h5", store_path(embedded, "a"), "--layout", "clam", "--out", tmp_path / "y")
    assert (alone.code, "lacks 1 of 2 chunks" in alone.err, (tmp_path / "y").exists()) == (1, True, False)


def test_an_empty_slide_is_told(cli: Cli, tmp_path: Path) -> None:
    add_embeddings(add_slide(tmp_path / "results", "a", {}), n=0)
    ended = cli("export", "h5", tmp_path / "results", "--layout", "stamp", "--out", tmp_path / "x")
    assert (ended.code, ended.out) == (0, "")
    assert ended.err == "note: a: no tiles; this layout has no file for it\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["h5", "RESULTS", "--out", "OUT"], "Missing option '--layout'"),
        (["h5", "RESULTS", "--out", "OUT", "--layout", "clamp"], "'clamp' is not one of 'clam', 'trident', 'stamp'"),
        (["pt", "RESULTS", "--out", "OUT", "--layout", "stamp"], "'stamp' is not one of 'clam', 'trident'"),
        (["h5", "RESULTS", "--out", "OUT.h5", "--layout", "clam"], "give a folder; files are named by slide id"),
        (["pt", "RESULTS", "--out", "OUT"], "embeddings of several encoders (enc, other); choose one with --encoder"),
        (["parquet", "RESULTS", "--out", "OUT", "--encoder", "ens"], "--encoder ens: no such encoder; did you mean"),
        (["anndata", "RESULTS", "--out", "OUT.h5ad", "--encoder", "enc"], "one file, but there are 2 to write"),
        (["pt", "OUT", "--out", "OUT"], "no store here"),
    ],
)
def test_wrong_use_of_feature_exports_is_told(
    cli: Cli, embedded: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    add_embeddings(SlideStore.open(store_path(embedded, "b")), encoder="other")
    filled = [each.replace("RESULTS", str(embedded)).replace("OUT", str(tmp_path / "new")) for each in arguments]
    ended = cli("export", *filled)
    assert (ended.code, message in " ".join(ended.err.split())) == (2, True), ended.err
    assert not (tmp_path / "new").exists()


def test_a_folder_without_embeddings_says_how_to_compute_some(cli: Cli, results: Path, tmp_path: Path) -> None:
    ended = cli("export", "h5", results, "--layout", "clam", "--out", tmp_path / "x")
    assert (ended.code, "compute some with 'pathopipe run SLIDE --out DIR'" in ended.err) == (2, True)


def test_correct_and_import_back(cli: Cli, results: Path, tmp_path: Path) -> None:
    cli("export", "geojson", results, "--layer", "nuclei", "--out", tmp_path / "q")
    path = tmp_path / "q" / "s1.nuclei.geojson"
    document = json.loads(path.read_text(encoding="utf-8"))
    del document["features"][0]
    document["features"][0]["properties"]["classification"] = {"name": "Tumor", "color": [9, 9, 9]}
    path.write_text(json.dumps(document), encoding="utf-8")
    to = ("--out", results, "--slide-id", "s1", "--layer", "nuclei")
    refused = cli("import", "geojson", path, *to)
    assert (refused.code, "--replace puts the imported ones in their place" in refused.err) == (2, True)
    ended = cli("import", "geojson", path, *to, "--replace")
    assert ended.code == 0, ended.err
    assert ended.out == (
        "s1: layer nuclei: 11 objects imported, in place of 12\nclasses: Epithelial 5, Lymphocyte 5, Tumor 1\n"
    )
    array = SlideStore.open(results / "slides" / "s1.zarr").objects("nuclei")
    assert np.array_equal(array.column("id"), stable_ids("s1", "nuclei", range(1, 12)))
    elsewhere = cli("import", "geojson", path, "--out", results, "--slide-id", "s3", "--layer", "nuclei")
    assert (elsewhere.code, "slide 's3' has no store" in elsewhere.err) == (2, True)
    assert f"pathopipe tissue SLIDE --slide-id s3 --out {results}" in elsewhere.err
    limited = cli("import", "geojson", path, *to, "--replace", "--classes", "Epithelial,Lymphocytes")
    assert limited.code == 2
    assert "'Tumor'" in limited.err


def test_labels_for_training(cli: Cli, results: Path, tmp_path: Path) -> None:
    cli("export", "geojson", results, "--layer", "nuclei", "--out", tmp_path)
    path = tmp_path / "s1.nuclei.geojson"
    ended = cli("import", "geojson", path, "--labels", tmp_path / "a.npy", "--size", "30x8", "--origin", "20,10")
    assert ended.code == 0, ended.err
    assert ended.out == f"{tmp_path / 'a.npy'}: 2 objects; classes in {tmp_path / 'a.classes.csv'}\n"
    assert ended.err == "note: 10 objects cover no pixel of the image: outside it, too small or hidden\n"
    labels = np.load(tmp_path / "a.npy")
    assert labels.shape == (8, 30)
    assert labels[0].tolist() == [1] * 10 + [0] * 10 + [2] * 10
    coarse = cli("import", "geojson", path, "--labels", tmp_path / "b.tif", "--size", "100x8", "--downsample", "5")
    assert (coarse.code, "12 objects" in coarse.out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.geojson", "--labels", "a.png", "--size", "9x9"], "no such file"),
        (["FILE"], "say where to: --out DIR --slide-id ID --layer NAME"),
        (["FILE", "--out", "OUT", "--slide-id", "s1"], "say where to"),
        (["FILE", "--labels", "a.png"], "--labels needs --size WxH"),
        (["FILE", "--labels", "a.png", "--size", "9"], "--size 9: give two numbers with 'x' between them"),
        (["FILE", "--labels", "a.png", "--size", "9x9", "--origin", "nan,1"], "--origin nan,1: give two numbers"),
        (["FILE", "--labels", "a.png", "--size", "9x9", "--layer", "x"], "--labels and --layer don't go together"),
        (["FILE", "--size", "9x9"], "are for label images"),
        (["FILE", "--classes", ",", "--labels", "a.png", "--size", "9x9"], "--classes: no name in it"),
    ],
)
def test_wrong_use_of_import_is_told(cli: Cli, tmp_path: Path, arguments: list[str], message: str) -> None:
    path = tmp_path / "file.geojson"
    path.write_text('{"type":"Point","coordinates":[1,2]}')
    filled = [each.replace("FILE", str(path)).replace("OUT", str(tmp_path)) for each in arguments]
    ended = cli("import", "geojson", *filled)
    assert (ended.code, message in ended.err) == (2, True), ended.err
    assert [each.name for each in tmp_path.iterdir()] == ["file.geojson"]


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, pathopipe.cli.export, pathopipe.cli.importing; "
        "sys.exit(any(m in sys.modules for m in ('zarr', 'shapely', 'pyarrow', 'h5py', 'scipy', 'anndata')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
