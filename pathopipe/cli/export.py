"""``pathopipe export``: objects of a store for QuPath, GIS and single-cell programs."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pathopipe.export.objects import LayerExport
    from pathopipe.store import SlideStore

__all__ = ["app"]

_MANY_ANNOTATIONS = 5_000

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Write what a store holds for other programs.")

_Where = Annotated[Path, typer.Argument(metavar="STORE|DIR", help="A .zarr store, or the --out folder of a run.")]
_Target = Annotated[Path, typer.Option("--out", metavar="PATH", help="A folder; a file where one layer is written.")]
_Layers = Annotated[
    list[str] | None, typer.Option("--layer", metavar="NAME", help="Which objects; may be repeated. Default: all.")
]


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
) -> None:
    """Write objects as GeoParquet: outlines, classes, measurements, for geopandas, DuckDB, QGIS.

    \b
    Examples:
      pathopipe export parquet results --out tables
      pathopipe export parquet results --merge --layer nuclei --out cohort.parquet
      pathopipe export parquet results/slides/slide.zarr --layer nuclei --out nuclei.parquet

    Coordinates are level-0 pixels of the whole scan.
    """
    from pathopipe.export.tables import export_parquet

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
def anndata(where: _Where, out: _Target, layer: _Layers = None) -> None:
    """Write objects as AnnData (.h5ad): measurements as X, classes in obs, centroids in obsm.

    \b
    Examples:
      pathopipe export anndata results --layer nuclei --out h5ad
      pathopipe export anndata results/slides/slide.zarr --layer nuclei --out nuclei.h5ad

    Needs the package anndata: pip install 'pathopipe[anndata]'.
    """
    from pathopipe.export.tables import export_anndata

    jobs = _choose(_open_stores(where), layer, where)
    single = _single_file(out, ".h5ad", len(jobs))

    def write(store: "SlideStore", name: str) -> None:
        made = export_anndata(out if single else out / f"{store.path.stem}.{name}.h5ad", store, name)
        print(f"{made.path}: {made.objects} objects of {name}")

    _each(jobs, write)


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


def _open_stores(where: Path) -> list["SlideStore"]:
    from pathopipe.errors import UsageError
    from pathopipe.store import SlideStore

    paths = [where] if where.suffix == ".zarr" else sorted((where / "slides").glob("*.zarr"))
    if not paths or not paths[0].exists():
        raise UsageError(
            f"{where}: no store here; give a .zarr store, or the --out folder of 'pathopipe run' or 'segment'"
        )
    return [SlideStore.open(path) for path in paths]


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
