"""Objects and embeddings of a store as tables for other programs: Parquet, and AnnData where it is installed."""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

import pathopipe
from pathopipe.errors import UsageError
from pathopipe.export.features import FeatureExport, GoodTiles, read_good_tiles
from pathopipe.export.objects import RowReader, id_texts
from pathopipe.files import durable_file
from pathopipe.geometry import outlines_to_shapes
from pathopipe.layouts import stream_hdf5
from pathopipe.records import ObjectTable
from pathopipe.store import ObjectArray, SlideStore, digest

if TYPE_CHECKING:
    import anndata

__all__ = [
    "TableExport",
    "export_anndata",
    "export_anndata_embeddings",
    "export_parquet",
    "export_parquet_embeddings",
]

_BATCH_ROWS: Final = 16_384
_BOX: Final = ("xmin", "ymin", "xmax", "ymax")
_FIXED: Final = (
    ("slide_id", pa.dictionary(pa.int32(), pa.string())),
    ("id", pa.string()),
    ("class", pa.dictionary(pa.int32(), pa.string())),
    ("class_probability", pa.float32()),
    ("centroid_x_l0", pa.float64()),
    ("centroid_y_l0", pa.float64()),
    ("parent_id", pa.string()),
    ("geometry", pa.binary()),
    ("bbox", pa.struct([(name, pa.float32()) for name in _BOX])),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TableExport:
    """One table that was written."""

    path: Path
    layer: str
    objects: int


# ---------------------------------------------------------------------------------------------------------------------
# GeoParquet
# ---------------------------------------------------------------------------------------------------------------------


def export_parquet(path: Path, stores: Sequence[SlideStore], layer: str) -> TableExport:
    """Write a layer of one slide or several as GeoParquet 1.1, a batch of rows at a time.

    Outlines are in level-0 pixels of each slide's whole scan, without a coordinate system. Columns: slide_id, id,
    class, class_probability, centroid_x_l0, centroid_y_l0, parent_id, geometry (WKB), bbox, and every measurement that
    any of the slides has; null where there is none. A measurement that bears the name of another column is called
    ``measurement <name>``.

    Args:
        path: A ``.parquet`` file; one of that name is replaced.
        stores: The slides, one at least; each has the layer.
        layer: Which objects.

    Raises:
        StoreError: A slide has no such layer.
        StoreWriteError: The disk is full, or the folder can't be written.
    """
    arrays = [store.objects(layer) for store in stores]
    names = tuple(dict.fromkeys(name for array in arrays for name in array.measurement_names))
    columns = [(f"measurement {name}" if name in dict(_FIXED) else name, pa.float32()) for name in names]
    schema = pa.schema([*_FIXED, *columns], metadata={"pathopipe": json.dumps(_describe(stores, arrays))})
    bounds = np.array([np.inf, np.inf, -np.inf, -np.inf])
    kinds: set[str] = set()
    n_objects = 0
    with durable_file(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for store, array in zip(stores, arrays, strict=True):
            reader = _parents(store, array)
            for table in array.batches(_BATCH_ROWS):
                shapes = outlines_to_shapes(table.outlines)
                boxes = shapely.bounds(shapes)
                bounds[:2] = np.minimum(bounds[:2], boxes[:, :2].min(axis=0))
                bounds[2:] = np.maximum(bounds[2:], boxes[:, 2:].max(axis=0))
                kinds |= {
                    "Polygon" if kind == 3 else "MultiPolygon" for kind in set(shapely.get_type_id(shapes).tolist())
                }
                writer.write_batch(_rows(schema, str(store.slide["id"]), table, names, shapes, boxes, reader))
                n_objects += len(table)
        geometry: dict[str, Any] = {
            "encoding": "WKB",
            "geometry_types": sorted(kinds, reverse=True),
            "crs": None,
            "covering": {"bbox": {name: ["bbox", name] for name in _BOX}},
        }
        if n_objects:
            geometry["bbox"] = bounds.tolist()
        about = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": geometry}}
        writer.add_key_value_metadata({"geo": json.dumps(about)})
    return TableExport(path=path, layer=layer, objects=n_objects)


def _describe(stores: Sequence[SlideStore], arrays: Sequence[ObjectArray]) -> dict[str, Any]:
    slides = []
    for store, array in zip(stores, arrays, strict=True):
        slide = store.slide
        kept = {key: slide[key] for key in ("id", "fingerprint", "dims_l0", "bounds_l0", "mpp")}
        slides.append({**kept, "inputs": digest(array.attributes["inputs"]), "objects": len(array)})
    return {
        "created_by": f"pathopipe {pathopipe.__version__}",
        "frame": "level-0 pixels of the whole scan, x right, y down",
        "layer": arrays[0].layer,
        "parent_layer": arrays[0].parent_layer,
        "colours": {each.name: list(each.color) for array in reversed(arrays) for each in array.classes},
        "slides": slides,
    }


def _parents(store: SlideStore, array: ObjectArray) -> RowReader | None:
    return RowReader(store.objects(array.parent_layer)) if array.parent_layer is not None else None


def _parent_ids(parent: NDArray[np.int64], reader: RowReader | None) -> list[str | None]:
    ids: list[str | None] = [None] * len(parent)
    if reader is not None:
        rows = np.flatnonzero(parent >= 0)
        for row, id in zip(rows.tolist(), id_texts(reader.ids(parent[rows])), strict=True):
            ids[row] = id
    return ids


def _rows(
    schema: pa.Schema,
    slide_id: str,
    table: ObjectTable,
    names: tuple[str, ...],
    shapes: NDArray[np.object_],
    boxes: NDArray[np.float64],
    reader: RowReader | None,
) -> pa.RecordBatch:
    n = len(table)
    classes = pa.array([each.name for each in table.classes], pa.string())
    # Single precision rounds to nearest, so the box is let out by a step to cover the shape.
    low = np.nextafter(boxes[:, :2].astype(np.float32), np.float32(-np.inf))
    high = np.nextafter(boxes[:, 2:].astype(np.float32), np.float32(np.inf))
    own = {name: column for column, name in enumerate(table.measurement_names)}
    measured = [
        _numbers(table.measurements[:, own[name]]) if name in own else pa.nulls(n, pa.float32()) for name in names
    ]
    return pa.record_batch(
        [
            pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), [slide_id]),
            pa.array(id_texts(table.id), pa.string()),
            pa.DictionaryArray.from_arrays(table.class_id.astype(np.int32), classes),
            _numbers(table.class_probability),
            pa.array(table.centroid_l0[:, 0]),
            pa.array(table.centroid_l0[:, 1]),
            pa.array(_parent_ids(table.parent, reader), pa.string()),
            pa.array(shapely.to_wkb(shapes), pa.binary()),
            pa.StructArray.from_arrays(
                [pa.array(side) for side in (*low.T, *high.T)], fields=list(schema.field("bbox").type)
            ),
            *measured,
        ],
        schema=schema,
    )


def _numbers(values: NDArray[np.float32]) -> pa.Array:
    return pa.array(values, pa.float32(), mask=np.isnan(values))


# ---------------------------------------------------------------------------------------------------------------------
# AnnData
# ---------------------------------------------------------------------------------------------------------------------


def export_anndata(path: Path, store: SlideStore, layer: str) -> TableExport:
    """Write a layer of one slide as AnnData: an object a row, a measurement a column.

    ``X`` is float32, NaN where an object lacks a measurement. ``obs`` has class, class_probability, slide_id and
    parent_id, and the objects' ids as its index; ``obsm['spatial']`` the centroids in micrometres and
    ``obsm['spatial_l0']`` in level-0 pixels of the whole scan; ``uns`` the colours (``class_colors``, as scanpy wants
    them), mpp and where the objects came from. Held in memory: some 300 bytes an object.

    Args:
        path: A ``.h5ad`` file; one of that name is replaced.
        store: The slide.
        layer: Which objects.

    Raises:
        UsageError: The anndata package is not installed, or the slide's mpp is unknown.
        StoreError: The slide has no such layer.
        StoreWriteError: The disk is full, or the folder can't be written.
    """
    anndata = _import_anndata()
    made = _as_anndata(anndata, store, layer)
    # In memory first: the HDF5 library ends the process where the disk is full.
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        anndata.io.write_elem(file, "/", made, dataset_kwargs={"compression": "gzip"})
    with durable_file(path) as target:
        target.write(image.getbuffer())
    return TableExport(path=path, layer=layer, objects=made.n_obs)


def _import_anndata() -> Any:
    try:
        import anndata
    except ImportError:
        raise UsageError(
            "the package anndata is not installed; install it with: pip install 'pathopipe[anndata]'"
        ) from None
    return anndata


def _as_anndata(anndata: Any, store: SlideStore, layer: str) -> "anndata.AnnData":
    import pandas as pd

    array = store.objects(layer)
    slide = store.slide
    if slide["mpp"] is None:
        raise UsageError(f"{slide['id']}: the store knows no micrometres per pixel; run it again with --mpp")
    columns = {
        name: array.column(name) for name in ("centroid_l0", "class_id", "class_probability", "measurements", "parent")
    }
    names = [each.name for each in array.classes]
    n = len(array)
    obs = pd.DataFrame(
        {
            "class": pd.Categorical.from_codes(columns["class_id"].astype(np.int16), names),
            "class_probability": columns["class_probability"],
            "slide_id": pd.Categorical.from_codes(np.zeros(n, np.int8), [str(slide["id"])]),
            "parent_id": np.array([*_all_parent_ids(store, array, columns["parent"])], object),
        },
        index=pd.Index(id_texts(array.column("id")), name="id"),
    )
    return anndata.AnnData(
        X=columns["measurements"],
        obs=obs,
        var=pd.DataFrame(index=pd.Index(array.measurement_names)),
        obsm={
            "spatial": columns["centroid_l0"] * np.asarray(slide["mpp"]),
            "spatial_l0": columns["centroid_l0"],
        },
        uns={
            "class_colors": np.array([f"#{r:02x}{g:02x}{b:02x}" for r, g, b in (each.color for each in array.classes)]),
            "mpp": np.asarray(slide["mpp"]),
            "pathopipe": {
                "created_by": f"pathopipe {pathopipe.__version__}",
                "layer": layer,
                "fingerprint": slide["fingerprint"],
                "inputs": digest(array.attributes["inputs"]),
            },
        },
    )


def _all_parent_ids(store: SlideStore, array: ObjectArray, parent: NDArray[np.int64]) -> Iterator[str]:
    reader = _parents(store, array)
    for start in range(0, len(parent), _BATCH_ROWS):
        yield from (id or "" for id in _parent_ids(parent[start : start + _BATCH_ROWS], reader))


# ---------------------------------------------------------------------------------------------------------------------
# Embeddings
# ---------------------------------------------------------------------------------------------------------------------


def export_parquet_embeddings(path: Path, store: SlideStore, grid: str, encoder: str) -> FeatureExport:
    """Write the embeddings of one slide as Parquet, a row a good tile in the order of the store, a chunk at a time.

    Columns: slide_id, row (in the store), x_l0, y_l0 (top-left corner in level-0 pixels), side_l0 (width in level-0
    pixels), mpp (micrometres per tile pixel), tissue_fraction (null where not known), cellularity where tiles were
    chosen by it, and features: a list of fixed length, float16 or float32 as stored. The schema's metadata says how
    they were made.

    Args:
        path: A ``.parquet`` file; one of that name is replaced.
        store: The slide.
        grid: Its grid.
        encoder: Which embeddings.

    Raises:
        StoreError: The embeddings are not complete, or damaged.
        StoreWriteError: The disk is full, or the folder can't be written.
    """
    good = read_good_tiles(store, grid, encoder)
    tiles, numbers = good.tiles, pa.from_numpy_dtype(np.dtype(good.dtype))
    shares = _shares(good)
    schema = pa.schema(
        [
            ("slide_id", pa.dictionary(pa.int32(), pa.string())),
            ("row", pa.int64()),
            ("x_l0", pa.int64()),
            ("y_l0", pa.int64()),
            ("side_l0", pa.int64()),
            ("mpp", pa.float64()),
            *((name, pa.float32()) for name in shares),
            ("features", pa.list_(numbers, tiles.features)),
        ],
        metadata={"pathopipe": json.dumps(_describe_embeddings(store, good))},
    )
    start = 0
    # Numbers of embeddings hardly repeat: a dictionary of them, or bounds of each, only cost room.
    plain = [name for name in schema.names if name != "features"]
    with (
        durable_file(path) as file,
        pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=plain, write_statistics=plain) as writer,
    ):
        for block in tiles.blocks():
            rows = slice(start, start + len(block))
            n, start = len(block), start + len(block)
            writer.write_batch(
                pa.record_batch(
                    [
                        pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), [tiles.slide_id]),
                        pa.array(good.rows[rows], pa.int64()),
                        pa.array(tiles.grid.xy_l0[rows, 0]),
                        pa.array(tiles.grid.xy_l0[rows, 1]),
                        pa.array(np.full(n, tiles.grid.side_l0[0], np.int64)),
                        pa.array(np.full(n, tiles.grid.achieved_mpp[0])),
                        *(_numbers(share[rows]) for share in shares.values()),
                        pa.FixedSizeListArray.from_arrays(pa.array(block.ravel(), numbers), tiles.features),
                    ],
                    schema=schema,
                )
            )
    return _embedding_report(path, good)


def export_anndata_embeddings(path: Path, store: SlideStore, grid: str, encoder: str) -> FeatureExport:
    """Write the embeddings of one slide as AnnData: a good tile a row, in the order of the store; X a chunk at a time.

    ``X`` is float32. ``obs`` has slide_id, x_l0 and y_l0 (top-left corner in level-0 pixels), tissue_fraction (NaN
    where not known) and cellularity where tiles were chosen by it; its index is ``<slide_id>:<row in the store>``.
    ``obsm['spatial']`` holds the tiles' centres in micrometres and ``obsm['spatial_l0']`` in level-0 pixels of the
    whole scan, as for objects; ``uns['pathopipe']`` how the numbers were made.

    Args:
        path: A ``.h5ad`` file; one of that name is replaced.
        store: The slide.
        grid: Its grid.
        encoder: Which embeddings.

    Raises:
        UsageError: The anndata package is not installed.
        StoreError: The embeddings are not complete, or damaged.
        StoreWriteError: The disk is full, or the folder can't be written.
    """
    anndata = _import_anndata()
    good = read_good_tiles(store, grid, encoder)
    tiles, shape = good.tiles, (len(good.rows), good.tiles.features)
    made = _embeddings_as_anndata(anndata, store, good)

    def describe(file: h5py.File) -> None:
        anndata.io.write_elem(file, "rest", made, dataset_kwargs={"compression": "gzip"})
        for name in list(file["rest"]):
            if name != "X":
                file.move(f"rest/{name}", name)
        file.attrs.update(file["rest"].attrs)
        del file["rest"]
        file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})

    with durable_file(path) as target:
        stream_hdf5(target, "X", shape, np.float32, tiles.blocks(), describe)
    return _embedding_report(path, good)


def _embeddings_as_anndata(anndata: Any, store: SlideStore, good: GoodTiles) -> "anndata.AnnData":
    """All but X."""
    import pandas as pd

    tiles = good.tiles
    n, xy_l0 = len(good.rows), tiles.grid.xy_l0
    centre_l0 = xy_l0 + np.asarray(tiles.grid.side_l0) / 2
    names = good.recipe.get("feature_names") or [f"{tiles.encoder}_{number}" for number in range(tiles.features)]
    obs = pd.DataFrame(
        {
            "slide_id": pd.Categorical.from_codes(np.zeros(n, np.int8), [tiles.slide_id]),
            "x_l0": xy_l0[:, 0],
            "y_l0": xy_l0[:, 1],
            **_shares(good),
        },
        index=pd.Index([f"{tiles.slide_id}:{row}" for row in good.rows.tolist()], name="tile", dtype=object),
    )
    return anndata.AnnData(
        obs=obs,
        var=pd.DataFrame(index=pd.Index(names, dtype=object)),
        obsm={"spatial": centre_l0 * np.asarray(tiles.mpp_l0), "spatial_l0": centre_l0},
        uns={
            "mpp": np.asarray(tiles.mpp_l0),
            "pathopipe": {
                "encoder": tiles.encoder,
                "grid": tiles.grid.name,
                # As text: AnnData has no place for null, nor for lists of lists.
                "about": json.dumps(_describe_embeddings(store, good)),
            },
        },
    )


def _shares(good: GoodTiles) -> dict[str, NDArray[np.float32]]:
    grid = good.tiles.grid
    shares = {"tissue_fraction": grid.tissue_fraction}
    return shares if grid.cellularity is None else {**shares, "cellularity": grid.cellularity}


def _describe_embeddings(store: SlideStore, good: GoodTiles) -> dict[str, Any]:
    grid, slide = good.tiles.grid, store.slide
    return {
        "created_by": f"pathopipe {pathopipe.__version__}",
        "frame": "level-0 pixels of the whole scan, x right, y down",
        "slide": {key: slide[key] for key in ("id", "fingerprint", "dims_l0", "bounds_l0", "mpp")},
        "grid": {
            "name": grid.name,
            "side_px": grid.side_px,
            "mpp": grid.mpp,
            "achieved_mpp": list(grid.achieved_mpp),
            "side_l0": list(grid.side_l0),
            "overlap_px": grid.overlap_px,
        },
        "recipe": good.recipe,
        "tiles": len(good.rows),
        "left_out": good.left_out,
    }


def _embedding_report(path: Path, good: GoodTiles) -> FeatureExport:
    return FeatureExport(
        slide_id=good.tiles.slide_id,
        encoder=good.tiles.encoder,
        grid=good.tiles.grid.name,
        files=(path,),
        tiles=len(good.rows),
        left_out=good.left_out,
    )
