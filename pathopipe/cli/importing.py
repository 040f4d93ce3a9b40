"""``pathopipe import``: what was corrected elsewhere, back into stores or into training labels."""

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from pathopipe.segmentation.importing import LabelReport

__all__ = ["app"]

_Number = TypeVar("_Number", int, float)

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Bring back what was corrected elsewhere.")


class FrameName(StrEnum):
    """Where coordinates begin."""

    QUPATH = "qupath"
    SCAN = "scan"


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
