"""``pathopipe export``: objects and embeddings of a store for QuPath, GIS, single-cell and MIL programs."""

import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pathopipe.cli.options import Location, parse_place

if TYPE_CHECKING:
    from pathopipe.export.features import FeatureExport
    from pathopipe.export.objects import LayerExport
    from pathopipe.layouts import Layout
    from pathopipe.store import SlideStore

__all__ = ["app"]

_MANY_ANNOTATIONS = 5_000

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Write what a store holds for other programs.")

_Where = Annotated[
    Location,
    typer.Argument(parser=parse_place, metavar="STORE|DIR|URL", help="A .zarr store, or the --out folder of a run."),
]
_Target = Annotated[
    Location,
    typer.Option("--out", parser=parse_place, metavar="PATH|URL", help="A folder; a file where one layer is written."),
]
_Layers = Annotated[
    list[str] | None, typer.Option("--layer", metavar="NAME", help="Which objects; may be repeated. Default: all.")
]


_Encoder = Annotated[
    str | None, typer.Option("--encoder", metavar="NAME", help="Which embeddings. Default: those that there are.")
]
_Grid = Annotated[
    str | None, typer.Option("--grid", metavar="NAME", help="On which grid. Default: the one that there is.")
]
_EmbeddingEncoder = Annotated[
    str | None, typer.Option("--encoder", metavar="NAME", help="Write embeddings of this encoder, not objects.")
]
_EmbeddingGrid = Annotated[
    str | None, typer.Option("--grid", metavar="NAME", help="Write embeddings on this grid, not objects.")
]


class Hdf5Layout(StrEnum):
    """Whose folders and names."""

    CLAM = "clam"
    TRIDENT = "trident"
    STAMP = "stamp"


class PtLayout(StrEnum):
    """Whose folders and names."""

    CLAM = "clam"
    TRIDENT = "trident"


@app.callback()
def _export() -> None:
    pass


@app.command("geojson")
def geojson(
    where: _Where,
    out: _Target,
    layer: _Layers = None,
    class_name: Annotated[
        list[str] | None, typer.Option("--class", metavar="NAME", help="Only objects of this class; may be repeated.")
    ] = None,
    points: Annotated[
        bool, typer.Option("--points", help="Write centroids as points, to <slide_id>.<layer>-points.geojson.")
    ] = False,
    compress: Annotated[
        bool | None, typer.Option("--gzip/--no-gzip", help="Write .geojson.gz. Default: from 20 MB on.")
    ] = None,
) -> None:
    """Write objects as GeoJSON for QuPath, one layer of a slide a file.

    \b
    Examples:
      pathopipe export geojson results --out qupath
      pathopipe export geojson results/slides/slide.zarr --layer nuclei --out nuclei.geojson
      pathopipe export geojson results --layer nuclei --class Lymphocyte --out qupath
      pathopipe export geojson results --layer nuclei --points --out qupath

    Nuclei become detections, cells cells with their nuclei, glands, lumina and tissue types annotations, at any number.
    Above 250,000 polygons or about 200 MB a layer is split into numbered files and a file of points is written beside
    them. Drag one file at a time onto the slide in QuPath. <slide_id>.<layer>.export.json says where they came from.
    """
    from pathopipe.errors import UsageError
    from pathopipe.export.objects import export_layer

    stores = _open_stores(where)
    jobs = _choose(stores, layer, where)
    classes = class_name or []
    if classes:
        jobs = _with_classes(jobs, classes)
    folder, stem = out, None
    lowered = out.name.lower()
    if lowered.endswith((".geojson", ".geojson.gz")) and not out.is_dir():
        if len(jobs) != 1:
            raise UsageError(
                f"--out {out}: one file, but {len(jobs)} layers of {len(stores)} slides; give a folder, or choose one "
                "with --layer"
            )
        packed = lowered.endswith(".gz")
        if compress is not None and compress != packed:
            raise UsageError(
                f"--out {out}: its ending and {'--gzip' if compress else '--no-gzip'} contradict each other"
            )
        folder, stem, compress = out.parent, out.name[: lowered.rindex(".geojson")], packed
    elif lowered.endswith((".json", ".gz", ".zip")) and not out.is_dir():
        raise UsageError(f"--out {out}: QuPath reads .geojson and .geojson.gz; choose one of these, or a folder")

    def write(store: "SlideStore", name: str) -> None:
        _tell(export_layer(store, name, folder, stem=stem, classes=classes, points=points, compress=compress))

    _each(jobs, write)


@app.command("parquet")
def parquet(
    where: _Where,
    out: _Target,
    layer: _Layers = None,
    merge: Annotated[bool, typer.Option("--merge", help="One file a layer for all slides.")] = False,
    encoder: _EmbeddingEncoder = None,
    grid: _EmbeddingGrid = None,
) -> None:
    """Write objects as GeoParquet: outlines, classes, measurements, for geopandas, DuckDB, QGIS. Or embeddings.

    \b
    Examples:
      pathopipe export parquet results --out tables
      pathopipe export parquet results --merge --layer nuclei --out cohort.parquet
      pathopipe export parquet results/slides/slide.zarr --layer nuclei --out nuclei.parquet
      pathopipe export parquet results --encoder handcrafted --out tables

    Coordinates are level-0 pixels of the whole scan. With --encoder or --grid, or where there are no objects, a row is
    a tile and holds its embedding: <slide_id>.<encoder>.parquet. Quarantined tiles are left out.
    """
    from pathopipe.errors import UsageError
    from pathopipe.export.tables import export_parquet, export_parquet_embeddings

    if _wants_embeddings(where, layer, encoder, grid):
        if merge:
            raise UsageError("--merge is for objects; embeddings are one file a slide")
        _export_embeddings(where, out, ".parquet", encoder, grid, export_parquet_embeddings)
        return
    stores = _open_stores(where)
    jobs = _choose(stores, layer, where)
    n_files = len({name for _, name in jobs}) if merge else len(jobs)
    single = _single_file(out, ".parquet", n_files)

    def write(store: "SlideStore", name: str) -> None:
        # A merged file is written once, with the first of its slides.
        of = [each for each, theirs in jobs if theirs == name] if merge else [store]
        if store.path == of[0].path:
            key = f"{name}.parquet" if merge else f"{store.path.stem}.{name}.parquet"
            made = export_parquet(out if single else out / key, of, name)
            slides = f" of {len(of)} slides" if len(of) > 1 else ""
            print(f"{made.path}: {made.objects} objects of {name}{slides}")

    _each(jobs, write)


@app.command("anndata")
def anndata(
    where: _Where,
    out: _Target,
    layer: _Layers = None,
    encoder: _EmbeddingEncoder = None,
    grid: _EmbeddingGrid = None,
) -> None:
    """Write objects as AnnData (.h5ad): measurements as X, classes in obs, centroids in obsm. Or embeddings.

    \b
    Examples:
      pathopipe export anndata results --layer nuclei --out h5ad
      pathopipe export anndata results/slides/slide.zarr --layer nuclei --out nuclei.h5ad
      pathopipe export anndata results --encoder handcrafted --out h5ad

    With --encoder or --grid, or where there are no objects, a row is a tile, X its embedding and obsm['spatial'] its
    centre: <slide_id>.<encoder>.h5ad. Quarantined tiles are left out.
    Needs the package anndata: pip install 'pathopipe[anndata]'.
    """
    from pathopipe.export.tables import export_anndata, export_anndata_embeddings

    if _wants_embeddings(where, layer, encoder, grid):
        _export_embeddings(where, out, ".h5ad", encoder, grid, export_anndata_embeddings)
        return
    jobs = _choose(_open_stores(where), layer, where)
    single = _single_file(out, ".h5ad", len(jobs))

    def write(store: "SlideStore", name: str) -> None:
        made = export_anndata(out if single else out / f"{store.path.stem}.{name}.h5ad", store, name)
        print(f"{made.path}: {made.objects} objects of {name}")

    _each(jobs, write)


@app.command("h5")
def h5(
    where: _Where,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder; theirs go into it.")],
    layout: Annotated[Hdf5Layout, typer.Option("--layout", help="Whose folders, names and units.")],
    encoder: _Encoder = None,
    grid: _Grid = None,
) -> None:
    """Write embeddings as HDF5 for other MIL code, in the layout of CLAM, TRIDENT or STAMP.

    \b
    Examples:
      pathopipe export h5 results --layout clam --out clam
      pathopipe export h5 results --layout trident --encoder virchow2 --out trident
      pathopipe export h5 results/slides/slide.zarr --layout stamp --out stamp

    clam: h5_files/<id>.h5 and patches/<id>.h5, float32, level-0 pixels.
    trident: features_<encoder>/<id>.h5 and patches/<id>_patches.h5, float32, level-0 pixels.
    stamp: <encoder>-<hash>/<id>.h5, float16, micrometres.
    Rows keep the order of the store; quarantined tiles are left out, and how many is said.
    """
    from pathopipe.export.features import export_hdf5

    _check_folder(out)
    chosen: Layout = layout.value
    grid, encoder, paths = _choose_embeddings(where, encoder, grid)
    _each_slide(paths, lambda store: _tell_features(export_hdf5(out, store, grid, encoder, chosen)))


@app.command("pt")
def pt(
    where: _Where,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A folder; theirs go into it.")],
    layout: Annotated[PtLayout, typer.Option("--layout", help="Whose folders and names.")] = PtLayout.CLAM,
    encoder: _Encoder = None,
    grid: _Grid = None,
) -> None:
    """Write embeddings as tensors (.pt) for other MIL code: one float32 tensor (tiles, numbers) a slide.

    \b
    Examples:
      pathopipe export pt results --out clam
      pathopipe export pt results --layout trident --encoder virchow2 --out trident

    clam: pt_files/<id>.pt and patches/<id>.h5. trident: features_<encoder>/<id>.pt and patches/<id>_patches.h5.
    Rows keep the order of the store; quarantined tiles are left out, and how many is said.
    """
    from pathopipe.export.features import export_pt

    _check_folder(out)
    chosen: Layout = layout.value
    grid, encoder, paths = _choose_embeddings(where, encoder, grid)
    _each_slide(paths, lambda store: _tell_features(export_pt(out, store, grid, encoder, chosen)))


def _check_folder(out: Path) -> None:
    from pathopipe.errors import UsageError

    if out.is_file() or (not out.is_dir() and out.suffix.lower() in (".h5", ".hdf5", ".pt")):
        raise UsageError(f"--out {out}: give a folder; files are named by slide id, in the folders of the layout")


def _wants_embeddings(where: Path, layers: Sequence[str] | None, encoder: str | None, grid: str | None) -> bool:
    """Whether the tables are to be of embeddings: where they are named, or there is nothing else."""
    from pathopipe.errors import UsageError

    if encoder is not None or grid is not None:
        if layers:
            raise UsageError("--layer is for objects, --encoder and --grid for embeddings; export them one by one")
        return True
    if layers:
        return False
    stores = _open_stores(where)
    return not any(store.layers() for store in stores) and any(
        store.encoders(name) for store in stores for name in store.grids()
    )


def _export_embeddings(
    where: Path,
    out: Path,
    suffix: str,
    encoder: str | None,
    grid: str | None,
    export: Callable[[Path, "SlideStore", str, str], "FeatureExport"],
) -> None:
    """Write a table a slide."""
    grid, encoder, paths = _choose_embeddings(where, encoder, grid)
    single = _single_file(out, suffix, len(paths))

    def write(store: "SlideStore") -> None:
        path = out if single else out / f"{store.path.stem}.{encoder}{suffix}"
        _tell_features(export(path, store, grid, encoder))

    _each_slide(paths, write)


def _choose_embeddings(where: Path, encoder: str | None, grid: str | None) -> tuple[str, str, list[Path]]:
    """Grid, encoder and stores; a store that can't be opened fails later, alone."""
    from pathopipe.errors import StoreError, UsageError
    from pathopipe.export.features import choose_embeddings, known_embeddings
    from pathopipe.store import SlideStore

    paths = _store_paths(where)
    known: dict[tuple[str, str], None] = {}
    for path in paths:
        try:
            known |= dict.fromkeys(known_embeddings(SlideStore.open(path)))
        except StoreError:
            if len(paths) == 1:
                raise
    try:
        return *choose_embeddings(list(known), encoder=encoder, grid=grid), paths
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None


def _each_slide(paths: Sequence[Path], write: Callable[["SlideStore"], None]) -> None:
    """Write every slide; one that fails is named and the others go on, but for a disk that is full."""
    from pathopipe.errors import StoreError, StoreWriteError
    from pathopipe.store import SlideStore

    failed = False
    for path in paths:
        try:
            write(SlideStore.open(path))
        except StoreError as error:
            if len(paths) == 1 or isinstance(error, StoreWriteError):
                raise
            print(f"failed: {path.stem}: {error}", file=sys.stderr)
            failed = True
    if failed:
        raise typer.Exit(1)


def _tell_features(made: "FeatureExport") -> None:
    if made.files:
        print(f"{made.files[0]}: {made.tiles} tiles of {made.encoder} on {made.grid}")
    else:
        print(f"note: {made.slide_id}: no tiles; this layout has no file for it", file=sys.stderr)
    if made.left_out:
        tiles = "tile" if made.left_out == 1 else "tiles"
        print(f"note: {made.slide_id}: {made.left_out} quarantined {tiles} left out", file=sys.stderr)


def _each(jobs: Sequence[tuple["SlideStore", str]], write: Callable[["SlideStore", str], None]) -> None:
    """Write every layer of every slide; one that fails is named and the others go on, but for a disk that is full."""
    from pathopipe.errors import StoreError, StoreWriteError

    failed = False
    for store, name in jobs:
        try:
            write(store, name)
        except StoreError as error:
            if len(jobs) == 1 or isinstance(error, StoreWriteError):
                raise
            print(f"failed: {store.path.stem}: {name}: {error}", file=sys.stderr)
            failed = True
    if failed:
        raise typer.Exit(1)


def _store_paths(where: Path) -> list[Path]:
    from pathopipe.errors import UsageError

    paths = [where] if where.suffix == ".zarr" else sorted((where / "slides").glob("*.zarr"))
    if not paths or not paths[0].exists():
        raise UsageError(
            f"{where}: no store here; give a .zarr store, or the --out folder of 'pathopipe run' or 'segment'"
        )
    return paths


def _open_stores(where: Path) -> list["SlideStore"]:
    from pathopipe.store import SlideStore

    return [SlideStore.open(path) for path in _store_paths(where)]


def _choose(
    stores: Sequence["SlideStore"], layers: Sequence[str] | None, where: Path
) -> list[tuple["SlideStore", str]]:
    """Which layers of which slides; a slide that lacks one is named."""
    import difflib

    from pathopipe.errors import UsageError

    there = {store.path: store.layers() for store in stores}
    known = sorted({name for names in there.values() for name in names})
    if not known:
        raise UsageError(f"{where}: no objects here; find some with 'pathopipe segment SLIDE --out DIR'")
    for name in layers or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise UsageError(f"--layer {name}: no such layer; did you mean {near!r}? There are: {', '.join(known)}")
    jobs = []
    for store in stores:
        wanted = list(dict.fromkeys(layers)) if layers else there[store.path]
        jobs += [(store, name) for name in wanted if name in there[store.path]]
        missing = [name for name in wanted if name not in there[store.path]]
        if missing or not wanted:
            print(f"note: {store.path.stem}: no {', '.join(missing) or 'objects'}; passed over", file=sys.stderr)
    return jobs


def _with_classes(jobs: Sequence[tuple["SlideStore", str]], classes: Sequence[str]) -> list[tuple["SlideStore", str]]:
    """Those layers that have any of the classes; the names that they lack are told when it is none."""
    import difflib

    from pathopipe.errors import UsageError

    of_job = {(store.path, name): {each.name for each in store.objects(name).classes} for store, name in jobs}
    known = sorted(set().union(*of_job.values()))
    for name in classes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            hint = f"; did you mean {near[0]!r}? There are: {', '.join(known)}" if near else ""
            raise UsageError(f"--class {name}: no such class{hint}")
    return [(store, name) for store, name in jobs if of_job[store.path, name] & set(classes)]


def _single_file(out: Path, suffix: str, n_files: int) -> bool:
    """Whether ``out`` names a file."""
    from pathopipe.errors import UsageError

    if out.is_dir() or not out.suffix:
        return False
    if out.suffix.lower() != suffix:
        return False
    if n_files != 1:
        raise UsageError(
            f"--out {out}: one file, but there are {n_files} to write; give a folder, or choose with --layer"
        )
    return True


def _tell(made: "LayerExport") -> None:
    for path in made.removed:
        if path not in {file.path for file in made.files}:
            print(f"removed: {path} (of an earlier export)")
    if made.split:
        n_parts = sum(file.kind == "polygons" for file in made.files)
        print(
            f"{made.slide_id}: {made.layer} has {made.objects} objects, more than QuPath takes at once: {n_parts} "
            "files, each a band of the slide from the top, and a file of points"
        )
    for file in made.files:
        what = "points" if file.kind == "points" else f"{made.object_type}s"
        print(f"{file.path}: {file.objects} {what} of {made.layer}")
    if made.object_type == "annotation" and made.objects > _MANY_ANNOTATIONS:
        print(
            f"note: {made.slide_id}: {made.objects} objects of {made.layer} stay annotations; don't let QuPath resolve "
            "their hierarchy, which takes minutes from some ten thousand on",
            file=sys.stderr,
        )
    if made.dropped:
        more = ", ..." if made.dropped > 5 else ""
        print(
            f"note: {made.slide_id}: {made.dropped} objects of {made.layer} left out, nothing of their outline covers "
            f"1 px2: {', '.join(made.dropped_ids[:5])}{more}",
            file=sys.stderr,
        )
    if made.left_out:
        print(
            f"note: {made.slide_id}: measurements beyond QuPath's thirty left out of {made.layer}: "
            f"{', '.join(made.left_out)}",
            file=sys.stderr,
        )
