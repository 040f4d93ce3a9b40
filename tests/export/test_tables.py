"""Objects as tables: what geopandas, pyarrow and anndata read is what the store holds."""

import json
import subprocess
import sys
import uuid
import warnings
from pathlib import Path

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely

from pathopipe.errors import StoreError, UsageError
from pathopipe.export import tables
from pathopipe.export.tables import export_anndata, export_parquet
from pathopipe.geojson import stable_ids
from pathopipe.geometry import BoxL0, outlines_from_shapes, outlines_to_shapes
from pathopipe.records import Level, ObjectClass, ObjectTable, SlideInfo
from pathopipe.store import SlideStore, store_path

CLASSES = (ObjectClass("Epithelial", (200, 0, 0)), ObjectClass("Lymphocyte", (70, 90, 220)))


def make_store(folder: Path, slide_id: str = "s1", mpp: tuple[float, float] | None = (0.25, 0.5)) -> SlideStore:
    info = SlideInfo(
        slide_id=slide_id,
        path=Path("s1.svs"),
        reader="array",
        vendor="generic",
        dims_l0=(50_000, 40_000),
        levels=(Level(50_000, 40_000, 1.0, 1.0),),
        size_bytes=10,
        fingerprint="abc",
        mpp=mpp,
        bounds_l0=BoxL0(100, 200, 40_000, 30_000),
    )
    return SlideStore.create_or_open(store_path(folder, slide_id), info, created_by="test")


def make_table(
    n: int, layer: str = "nuclei", names: tuple[str, ...] = ("Area µm^2",), parent_layer: str | None = None
) -> ObjectTable:
    x = np.arange(n) * 50.0 + 200_000.3
    shapes = shapely.box(x, 10, x + 20, 30)
    if n > 2:
        shapes[2] = shapely.MultiPolygon([shapely.box(0, 0, 5, 5), shapely.box(10, 0, 15, 5)])
    return ObjectTable(
        classes=CLASSES,
        measurement_names=names,
        centroid_l0=np.stack([x + 10, np.full(n, 20.0)], axis=1),
        class_id=(np.arange(n) % 2).astype(np.uint8),
        class_probability=np.where(np.arange(n) % 2 == 0, 0.5, np.nan).astype(np.float32),
        measurements=np.where(np.arange(n)[:, None] == 1, np.nan, np.arange(n)[:, None] + np.arange(len(names))).astype(
            np.float32
        ),
        outlines=outlines_from_shapes(shapes),
        id=stable_ids("s1", layer, range(n)),
        parent=np.arange(n) - 1 if parent_layer else np.full(n, -1),
        parent_layer=parent_layer,
    )


@pytest.fixture
def store(tmp_path: Path) -> SlideStore:
    made = make_store(tmp_path / "results")
    made.write_objects("nuclei", [make_table(30)], about={"inputs": {"a": 1}})
    made.write_objects("cells", [make_table(30, "cells", parent_layer="nuclei")], about={"inputs": {"a": 2}})
    return made


def texts(ids: np.ndarray) -> list[str]:
    return [str(uuid.UUID(bytes=row.tobytes())) for row in ids]


def test_geoparquet_is_what_the_store_holds(store: SlideStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_BATCH_ROWS", 7)
    made = export_parquet(tmp_path / "t" / "cells.parquet", [store], "cells")
    assert made.objects == 30
    frame = geopandas.read_parquet(made.path)
    table = store.objects("cells").read()
    assert frame.crs is None
    assert shapely.equals_exact(frame.geometry.to_numpy(), outlines_to_shapes(table.outlines)).all()
    assert frame["id"].tolist() == texts(table.id)
    assert frame["class"].tolist() == [CLASSES[k].name for k in table.class_id]
    assert np.allclose(frame["class_probability"], table.class_probability, equal_nan=True)
    assert np.array_equal(frame[["centroid_x_l0", "centroid_y_l0"]], table.centroid_l0)
    assert np.allclose(frame["Area µm^2"], table.measurements[:, 0], equal_nan=True)
    assert set(frame["slide_id"]) == {"s1"}
    nuclei = texts(store.objects("nuclei").column("id"))
    assert frame["parent_id"].tolist() == [None, *nuclei[:29]]


def test_the_header_is_geoparquet_1_1(store: SlideStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_BATCH_ROWS", 7)
    path = export_parquet(tmp_path / "a.parquet", [store], "nuclei").path
    file = pq.ParquetFile(path)
    assert file.num_row_groups == 5
    header = json.loads(file.metadata.metadata[b"geo"])
    assert header["version"] == "1.1.0"
    column = header["columns"][header["primary_column"]]
    shapes = outlines_to_shapes(store.objects("nuclei").read().outlines)
    assert column["encoding"] == "WKB"
    assert set(column["geometry_types"]) == {"Polygon", "MultiPolygon"}
    assert column["crs"] is None
    assert column["bbox"] == list(shapely.total_bounds(shapes))
    assert column["covering"]["bbox"]["xmin"] == ["bbox", "xmin"]
    about = json.loads(file.metadata.metadata[b"pathopipe"])
    assert about["slides"][0]["id"] == "s1"
    assert about["slides"][0]["bounds_l0"] == [100, 200, 40_000, 30_000]
    assert about["colours"]["Lymphocyte"] == [70, 90, 220]
    boxes = file.read(["bbox"]).column("bbox").to_pylist()
    for box, shape in zip(boxes, shapes, strict=True):
        assert box["xmin"] <= shape.bounds[0] <= box["xmin"] + 0.1
        assert box["ymax"] >= shape.bounds[3] >= box["ymax"] - 0.1
    near = geopandas.read_parquet(path, bbox=(200_100, 0, 200_160, 100))
    assert near["id"].tolist() == texts(store.objects("nuclei").column("id")[3:4])


def test_slides_in_one_file_have_all_measurements(store: SlideStore, tmp_path: Path) -> None:
    other = make_store(tmp_path / "results", "s2")
    more = make_table(4, names=("class", "Area µm^2"))
    other.write_objects("nuclei", [more], about={"inputs": {"a": 3}})
    path = export_parquet(tmp_path / "all.parquet", [store, other], "nuclei").path
    frame = geopandas.read_parquet(path)
    assert frame["slide_id"].tolist() == ["s1"] * 30 + ["s2"] * 4
    assert frame["measurement class"].isna().sum() == 31
    assert np.allclose(frame["Area µm^2"][30:], more.measurements[:, 1], equal_nan=True)
    assert set(frame["class"]) == {"Epithelial", "Lymphocyte"}
    assert (path.read_bytes()) == export_parquet(tmp_path / "b.parquet", [store, other], "nuclei").path.read_bytes()


def test_a_layer_without_objects_is_a_table_without_rows(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.write_objects("nuclei", [make_table(0)], about={"inputs": {}})
    frame = geopandas.read_parquet(export_parquet(tmp_path / "a.parquet", [store], "nuclei").path)
    assert len(frame) == 0
    assert "Area µm^2" in frame
    anndata = pytest.importorskip("anndata")
    assert anndata.read_h5ad(export_anndata(tmp_path / "a.h5ad", store, "nuclei").path).shape == (0, 1)


def test_anndata_is_what_the_store_holds(store: SlideStore, tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata")
    made = export_anndata(tmp_path / "h" / "cells.h5ad", store, "cells")
    assert made.objects == 30
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library's own
        read = anndata.read_h5ad(made.path)
    table = store.objects("cells").read()
    assert read.X.dtype == np.float32
    assert np.allclose(read.X, table.measurements, equal_nan=True)
    assert list(read.var_names) == ["Area µm^2"]
    assert list(read.obs_names) == texts(table.id)
    assert read.obs["class"].tolist() == [CLASSES[k].name for k in table.class_id]
    assert list(read.obs["class"].cat.categories) == ["Epithelial", "Lymphocyte"]
    assert read.uns["class_colors"].tolist() == ["#c80000", "#465adc"]
    assert read.obs["slide_id"].tolist() == ["s1"] * 30
    assert read.obs["parent_id"].tolist() == ["", *texts(store.objects("nuclei").column("id"))[:29]]
    assert np.allclose(read.obs["class_probability"], table.class_probability, equal_nan=True)
    assert np.allclose(read.obsm["spatial"], table.centroid_l0 * [0.25, 0.5])
    assert np.array_equal(read.obsm["spatial_l0"], table.centroid_l0)
    assert read.uns["mpp"].tolist() == [0.25, 0.5]
    assert read.uns["pathopipe"]["layer"] == "cells"
    assert [path.name for path in made.path.parent.iterdir()] == ["cells.h5ad"]


def test_without_anndata_the_message_names_the_command(
    store: SlideStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "anndata", None)
    with pytest.raises(UsageError, match=r"pip install 'pathopipe\[anndata\]'"):
        export_anndata(tmp_path / "a.h5ad", store, "nuclei")


def test_what_is_not_there_is_refused(store: SlideStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="objects/glands is not there"):
        export_parquet(tmp_path / "a.parquet", [store], "glands")
    pytest.importorskip("anndata")
    unknown = make_store(tmp_path / "other", mpp=None)
    unknown.write_objects("nuclei", [make_table(3)], about={"inputs": {}})
    with pytest.raises(UsageError, match="no micrometres per pixel"):
        export_anndata(tmp_path / "a.h5ad", unknown, "nuclei")
    assert not list(tmp_path.glob("a.*"))


@pytest.mark.parametrize("call", ["export_parquet(path, [store], 'nuclei')", "export_anndata(path, store, 'nuclei')"])
def test_a_full_disk_leaves_no_file_and_says_so(store: SlideStore, tmp_path: Path, call: str) -> None:
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from pathopipe.store import SlideStore; from pathopipe.export.tables import *\n"
        "from pathopipe.errors import StoreWriteError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "store, path = SlideStore.open(sys.argv[1]), Path(sys.argv[2]) / 'out'\n"
        f"try: {call}\n"
        "except StoreWriteError as error: print(error); sys.exit(7)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, store.path, tmp_path / "q"], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, "can't be written" in ended.stdout) == (7, True), ended.stderr
    assert list((tmp_path / "q").iterdir()) == []
