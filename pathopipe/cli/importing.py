"""``pathopipe import``: what was corrected or computed elsewhere, into stores or into training labels."""

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from pathopipe.embeddings.importing import ImportedSlide
    from pathopipe.layouts import FeatureFile
    from pathopipe.records import SlideRef
    from pathopipe.segmentation.importing import LabelReport

__all__ = ["app"]

_Number = TypeVar("_Number", int, float)

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Bring in what was corrected or computed elsewhere."
)


class FrameName(StrEnum):
    """Where coordinates begin."""

    QUPATH = "qupath"
    SCAN = "scan"


class Unit(StrEnum):
    """What coordinates are in."""

    PX = "px"
    UM = "um"


@app.callback()
def _import() -> None:
    pass


@app.command("geojson")
def geojson(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", help=".geojson or .geojson.gz; all files of a layer that was split.")
    ],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The --out folder of a run.")] = None,
    slide_id: Annotated[str | None, typer.Option("--slide-id", metavar="ID", help="Whose objects these are.")] = None,
    layer: Annotated[str | None, typer.Option("--layer", metavar="NAME", help="Layer to write.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a layer of that name.")] = False,
    frame: Annotated[
        FrameName, typer.Option(help="Where coordinates begin: at QuPath's corner, or at that of the whole scan.")
    ] = FrameName.QUPATH,
    classes: Annotated[
        str | None, typer.Option("--classes", metavar="A,B", help="The only classes that may occur, in this order.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", metavar="FILE", help="Write a label image: .png, .tif or .npy.")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="WxH", help="Size of the label image in pixels.")
    ] = None,
    origin: Annotated[
        str | None,
        typer.Option("--origin", metavar="X,Y", help="Its top-left corner in the file's pixels. Default: 0,0."),
    ] = None,
    downsample: Annotated[
        float | None, typer.Option("--downsample", metavar="F", help="Side of its pixels in the file's. Default: 1.")
    ] = None,
    nuclei: Annotated[bool, typer.Option("--nuclei", help="Draw the nuclei of cells into the label image.")] = False,
) -> None:
    """Bring objects that were corrected in QuPath into the store of their slide, or make training labels of them.

    \b
    Examples:
      pathopipe import geojson slide.nuclei.geojson --out results --slide-id slide --layer nuclei --replace
      pathopipe import geojson slide.nuclei-*of3.geojson.gz --out results --slide-id slide --layer nuclei.checked
      pathopipe import geojson cells.geojson --out results --slide-id slide --layer cells
      pathopipe import geojson tile.geojson --labels tile.png --size 1024x1024 --origin 20480,8192

    Ids, classes with colours and measurements are kept. Cells with nuclei make the layers cells and nuclei.
    A label image numbers the objects from 1; <stem>.classes.csv beside it names their classes.
    """
    from pathopipe.errors import UsageError
    from pathopipe.segmentation.importing import check_labels, import_objects, open_store, read_corrected, write_labels

    for path in paths:
        if not path.is_file():
            raise UsageError(f"{path}: no such file; check the path")
    wanted = [name.strip() for name in classes.split(",") if name.strip()] if classes is not None else []
    if classes is not None and not wanted:
        raise UsageError("--classes: no name in it; give names separated by commas")
    if labels is not None:
        for option, value in (("--out", out), ("--slide-id", slide_id), ("--layer", layer), ("--replace", replace)):
            if value:
                raise UsageError(f"--labels and {option} don't go together; import into a store and make labels apart")
        if size is None:
            raise UsageError("--labels needs --size WxH, the size of the image in pixels, such as --size 1024x1024")
        size_px = _pair(size, "x", "--size", int)
        origin_l0 = _pair(origin, ",", "--origin", float) if origin is not None else (0.0, 0.0)
        scale = 1.0 if downsample is None else downsample
        check_labels(labels, size_px, scale)
        corrected = read_corrected(paths, slide_id=paths[0].name.partition(".")[0], layer="labels", classes=wanted)
        _print_notes(corrected.notes)
        report = write_labels(labels, corrected, size_px, origin_l0=origin_l0, downsample=scale, nuclei=nuclei)
        _tell_labels(report)
        return
    if size is not None or origin is not None or downsample is not None or nuclei:
        raise UsageError(
            "--size, --origin, --downsample and --nuclei are for label images; name one with --labels FILE"
        )
    if out is None or slide_id is None or layer is None:
        raise UsageError(
            "say where to: --out DIR --slide-id ID --layer NAME for a store, --labels FILE for a label image"
        )
    store = open_store(out, slide_id)
    made = import_objects(store, paths, layer, replace_layer=replace, classes=wanted, frame=frame.value)
    _print_notes(made.notes)
    for name, n_objects in made.objects.items():
        instead = f", in place of {made.replaced[name]}" if name in made.replaced else ""
        print(f"{slide_id}: layer {name}: {n_objects} objects imported{instead}")
    print("classes: " + ", ".join(f"{name} {n_objects}" for name, n_objects in made.classes.items()))


@app.command("features")
def features(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", help=".h5, .pt or .npz files, or folders of CLAM, TRIDENT, STAMP.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the stores; made where it is missing.")],
    slides: Annotated[
        Path | None, typer.Option("--slides", metavar="FOLDER", help="The slides that the features are of.")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", metavar="CSV", help="The slides as a table: slide_id, path, mpp.")
    ] = None,
    slide: Annotated[Path | None, typer.Option("--slide", metavar="FILE", help="The slide of a single file.")] = None,
    encoder: Annotated[
        str | None, typer.Option("--encoder", metavar="NAME", help="What made them; chooses among several folders.")
    ] = None,
    grid: Annotated[
        str | None, typer.Option("--grid", metavar="NAME", help="Name of the grid. Default: after the tiles' size.")
    ] = None,
    mpp: Annotated[
        float | None,
        typer.Option("--mpp", min=0.05, max=50, help="Micrometres per level-0 pixel; needed without the slides."),
    ] = None,
    tile_px: Annotated[
        int | None, typer.Option("--tile-px", min=1, help="Side of a tile in pixels, as the encoder got it.")
    ] = None,
    tile_um: Annotated[float | None, typer.Option("--tile-um", help="Side of a tile in micrometres.")] = None,
    unit: Annotated[Unit | None, typer.Option("--unit", help="Of coordinates, where a file states none.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace other features of that name.")] = False,
) -> None:
    """Bring features that CLAM, TRIDENT, STAMP or others computed into stores, for mil, export and heatmaps.

    \b
    Examples:
      pathopipe import features trident/20x_256px/features_uni_v1 --slides slides --out results
      pathopipe import features clam --manifest cohort.csv --encoder uni --tile-px 256 --out results
      pathopipe import features slide.h5 --slide slide.svs --out results
      pathopipe import features stamp/ctranspath-ab12cd --mpp 0.25 --out results

    Slides are found by their id, which is the name of the feature file. Only their headers are read. Without slides
    state --mpp; what files say of their tiles is taken from them and from CLAM's or TRIDENT's patches folder.
    Rows with numbers that are not finite are quarantined.
    """
    from pathopipe.embeddings.importing import FeatureImport, encoder_name, import_features
    from pathopipe.errors import PathopipeError, StoreWriteError, UsageError

    if sum(given is not None for given in (slides, manifest, slide)) > 1:
        raise UsageError("--slides, --manifest and --slide say the same thing; give one of them")
    if tile_um is not None and not 0 < tile_um < 1e6:
        raise UsageError(f"--tile-um {tile_um:g}: give micrometres above 0")
    files = _feature_files(paths, encoder)
    if slide is not None and len(files) > 1:
        raise UsageError(f"--slide is the file of one slide, but there are {len(files)}; give --slides or --manifest")
    refs = _slide_refs(slides, manifest, slide, files)
    wanted = FeatureImport(
        encoder=encoder,
        grid=grid,
        unit=unit.value if unit is not None else None,
        tile_px=tile_px,
        tile_um=tile_um,
        replace=replace,
        features=_only_width([(file, encoder_name(file, FeatureImport(encoder=encoder))) for file in files.values()]),
    )
    failed = 0
    for slide_id, file in files.items():
        ref = refs.get(slide_id)
        try:
            if refs and ref is None:
                where = slides or manifest
                raise UsageError(f"{slide_id}: no slide of that name in {where}; rename it, or leave out {file.path}")
            made = import_features(
                file,
                out,
                wanted,
                slide=ref.path if ref is not None else None,
                mpp=mpp if mpp is not None or ref is None else ref.mpp,
                mpp_source="config" if mpp is not None else "manifest",
            )
        except PathopipeError as error:
            if len(files) == 1 or isinstance(error, StoreWriteError):
                raise
            print(f"failed: {slide_id}: {error}", file=sys.stderr)
            failed += 1
            continue
        _tell_import(made)
    if failed:
        print(f"{failed} of {len(files)} slides failed", file=sys.stderr)
        raise typer.Exit(1)


def _feature_files(paths: list[Path], encoder: str | None) -> dict[str, "FeatureFile"]:
    """The feature files by slide id, looked at."""
    from pathopipe.cohort import check_slide_id
    from pathopipe.errors import UsageError
    from pathopipe.layouts import open_features
    from pathopipe.mil.bags import find_features

    found: dict[str, FeatureFile] = {}
    for path in paths:
        below = find_features(path, encoder=encoder).values() if path.is_dir() else [path]
        for each in below:
            if each.suffix == ".zarr":
                raise UsageError(f"{path}: holds stores of pathopipe, which need no import; give features of others")
            file = open_features(each, beside=True)
            check_slide_id(file.slide_id)
            if file.slide_id in found:
                raise UsageError(f"{found[file.slide_id].path} and {each}: one slide id twice; import one of them")
            found[file.slide_id] = file
    return found


def _slide_refs(
    slides: Path | None, manifest: Path | None, slide: Path | None, files: dict[str, "FeatureFile"]
) -> dict[str, "SlideRef"]:
    from pathopipe.cohort import read_manifest
    from pathopipe.errors import UsageError
    from pathopipe.records import SlideRef
    from pathopipe.slide.find import find_slides

    if slide is not None:
        return {slide_id: SlideRef(slide_id, slide) for slide_id in files}
    if slides is None and manifest is None:
        return {}
    refs: dict[str, SlideRef] = {}
    for ref in find_slides(slides) if slides is not None else read_manifest(manifest) if manifest is not None else []:
        if ref.slide_id in files and ref.slide_id in refs:
            raise UsageError(
                f"{refs[ref.slide_id].path} and {ref.path}: one slide id twice; name the right one in a --manifest"
            )
        refs[ref.slide_id] = ref
    if not refs:
        raise UsageError(f"{slides}: no slides here; check the folder")
    return refs


def _only_width(named: list[tuple["FeatureFile", str]]) -> int | None:
    """How many features all the files of an encoder have; None where none says."""
    from pathopipe.errors import UsageError

    widths: dict[int, FeatureFile] = {}
    for file, _ in named:
        if file.n_rows:
            widths.setdefault(file.features, file)
    if len(widths) > 1 and len({name for _, name in named}) == 1:
        listed = ", ".join(f"{width} in {file.path.name}" for width, file in sorted(widths.items()))
        raise UsageError(f"files of one encoder differ in their number of features ({listed}); import them apart")
    return next(iter(widths), None)


def _tell_import(made: "ImportedSlide") -> None:
    there = "already there" if made.unchanged else "imported"
    print(f"{made.slide_id}: {made.tiles} tiles of {made.encoder} ({made.features} numbers) on {made.grid} {there}")
    for note in made.notes:
        print(f"note: {made.slide_id}: {note}", file=sys.stderr)
    if made.bad_tiles and not made.unchanged:
        rows = "row holds" if made.bad_tiles == 1 else "rows hold"
        print(
            f"note: {made.slide_id}: {made.bad_tiles} {rows} numbers that can't be stored, and are quarantined",
            file=sys.stderr,
        )


def _print_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _tell_labels(report: "LabelReport") -> None:
    print(f"{report.image}: {report.objects} objects; classes in {report.table}")
    if report.unseen:
        print(
            f"note: {report.unseen} objects cover no pixel of the image: outside it, too small or hidden",
            file=sys.stderr,
        )
    if report.contested_px:
        print(f"note: {report.contested_px} pixels lie in more than one object; the first has them", file=sys.stderr)


def _pair(text: str, separator: str, option: str, number: Callable[[str], _Number]) -> tuple[_Number, _Number]:
    from pathopipe.errors import UsageError

    try:
        first, second = (number(part) for part in text.lower().split(separator))
        if not (abs(first) < 1e9 and abs(second) < 1e9):  # NaN too
            raise ValueError
    except ValueError:
        raise UsageError(f"{option} {text}: give two numbers with {separator!r} between them") from None
    return first, second
