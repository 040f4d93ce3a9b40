"""``pathopipe segmenter``: how good a segmentation is."""

import csv
import io
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pathopipe.cli import segmenter_train
from pathopipe.cli.options import Device, Json
from pathopipe.cli.progress import format_table

if TYPE_CHECKING:
    from pathopipe.segmentation.score import EvaluateConfig, ImageScore, Pairing

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Segmentation models: how good they are.")

_T = TypeVar("_T")
_SHOWN = 10
_HEADERS = {
    "dice": "Dice",
    "aji": "AJI",
    "aji_plus": "AJI+",
    "dq": "DQ",
    "sq": "SQ",
    "pq": "PQ",
    "f1_distance": "F1 {radius} um",
    "glas_f1": "GlaS F1",
    "object_dice": "object Dice",
    "object_hausdorff": "Hausdorff {unit}",
}


class Protocol(StrEnum):
    """How images are put together."""

    BOTH = "both"
    PER_IMAGE = "per-image"
    POOLED = "pooled"


class Side(StrEnum):
    """Which files."""

    TRUTH = "truth"
    PREDICTED = "predicted"
    BOTH = "both"


class Finder(StrEnum):
    """What finds objects on images."""

    NETWORK = "network"
    CLASSICAL = "classical"


class Task(StrEnum):
    """Which objects."""

    NUCLEI = "nuclei"
    GLANDS = "glands"
    LUMINA = "lumina"


app.command("train")(segmenter_train.train)


@app.callback()
def _segmenter() -> None:
    pass


@app.command("evaluate")
def evaluate(
    truth: Annotated[Path | None, typer.Option(help="True objects: a file or a folder.")] = None,
    predicted: Annotated[Path | None, typer.Option(help="Found objects: a file or a folder.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Instead of --predicted: pictures to find the objects on; needs --mpp.")
    ] = None,
    model: Annotated[
        Finder | None, typer.Option(help="What finds them. Default: what 'pathopipe segment' uses.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights of a network to score; the shipped ones without.")
    ] = None,
    device: Device = None,
    task: Annotated[Task | None, typer.Option(help="What is to be found on the pictures.  [default: nuclei]")] = None,
    protocol: Annotated[
        Protocol | None, typer.Option(help="Means over images, all objects together, or both.  [default: both]")
    ] = None,
    mpp: Annotated[float | None, typer.Option(help="Micrometres per pixel of the label images.")] = None,
    radius_um: Annotated[
        float | None,
        typer.Option("--radius-um", help="A centroid this near to the true one is a detection.  [default: 3]"),
    ] = None,
    glands: Annotated[
        bool | None, typer.Option("--glands/--no-glands", help="Add the figures of the GlaS contest.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(metavar="A,B|all", help="Score these classes of GeoJSON objects one by one.")
    ] = None,
    components: Annotated[Side | None, typer.Option(help="This side is a mask: number its connected regions.")] = None,
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Size in pixels where both sides are GeoJSON.")
    ] = None,
    truth_suffix: Annotated[
        str | None, typer.Option(help="What the stems of truth files end in beyond the image's name.")
    ] = None,
    predicted_suffix: Annotated[str | None, typer.Option(help="The same of predicted files.")] = None,
    group: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Table whose first column names the images.")
    ] = None,
    group_by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of that table; figures for each of its values too.")
    ] = None,
    allow_missing: Annotated[
        bool | None,
        typer.Option(
            "--allow-missing/--no-allow-missing", help="Pass over files without a partner instead of stopping."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.csv", help="Write one row an image.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with these options as keys (group_by: ...); options win.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score found objects against true ones: Dice, AJI, DQ, SQ, PQ, F1, the GlaS figures; see docs/metrics.md.

    \b
    Examples:
      pathopipe segmenter evaluate --truth labels/ --predicted found/
      pathopipe segmenter evaluate --truth labels/ --predicted found/ --mpp 0.25 --group index.csv --group-by stain
      pathopipe segmenter evaluate --truth labels/ --images images/ --model classical --mpp 0.25 --out scores.csv
      pathopipe segmenter evaluate --truth masks/ --images images/ --weights mine.safetensors --task glands --mpp 0.5
      pathopipe segmenter evaluate --truth true.geojson --predicted found.geojson --size 1024x768 --classes all
      pathopipe segmenter evaluate --truth masks/ --predicted found/ --components truth --glands
      pathopipe segmenter evaluate --config evaluate.yaml --json

    Label images are PNG, TIFF or .npy: 0 is background, every object has a number. GeoJSON is drawn at the size of the
    other side; its coordinates are pixels. Files of folders are paired by their stems.
    Exit code: 0 all scored, 1 some image failed, 2 wrong use.
    """
    from pathopipe.errors import UsageError
    from pathopipe.segmentation.score import evaluate_config, pair_files, read_groups

    options = {
        "truth": truth,
        "predicted": predicted,
        "images": images,
        "model": model,
        "weights": weights,
        "device": device,
        "task": task,
        "protocol": protocol,
        "mpp": mpp,
        "radius_um": radius_um,
        "glands": glands,
        "classes": classes,
        "components": components,
        "size": size,
        "truth_suffix": truth_suffix,
        "predicted_suffix": predicted_suffix,
        "group": group,
        "group_by": group_by,
        "allow_missing": allow_missing,
        "out": out,
    }
    plain = {name: value.value if isinstance(value, StrEnum) else value for name, value in options.items()}
    settings = evaluate_config(config, plain)
    if settings.out is not None and settings.out.is_dir():
        raise UsageError(
            f"{settings.out}: is a folder; name a file for the rows, {settings.out / 'scores.csv'} for example"
        )
    pairing = pair_files(settings)
    group_of = read_groups(settings, [pair.name for pair in pairing.pairs])
    scores, failed = _score(pairing, settings, group_of)
    if not scores:
        for name, reason in failed.items():
            print(f"failed: {name}: {reason}", file=sys.stderr)
        raise typer.Exit(1)
    report = _report(scores, failed, pairing, settings)
    if settings.out is not None:
        _write_rows(settings.out, scores, failed, group_of, settings)
    print(json.dumps(_without_nan(report), indent=2) if as_json else _describe(report, settings))
    if settings.out is not None and not as_json:
        print(f"one row an image: {settings.out}")
    if failed:
        raise typer.Exit(1)


def _score(
    pairing: "Pairing", settings: "EvaluateConfig", group_of: Mapping[str, str]
) -> tuple[list["ImageScore"], dict[str, str]]:
    """Score image by image; one that fails stops no other, but an only one is an error."""
    from pathopipe.errors import PathopipeError
    from pathopipe.segmentation.score import open_finder, score_pair

    find = open_finder(settings) if settings.images is not None else None
    scores: list[ImageScore] = []
    failed: dict[str, str] = {}
    for pair in _tell(pairing.pairs):
        try:
            scores.append(score_pair(pair, settings, group=group_of[pair.name], find=find))
        except PathopipeError as error:
            if len(pairing.pairs) == 1:
                raise
            failed[pair.name] = str(error)
    return scores, failed


def _tell(items: Sequence[_T]) -> Iterator[_T]:
    """Hand on items and say on stderr how many are done."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, "scoring", console=Console(stderr=True), transient=True)
        return
    step = max(1, len(items) // 10)
    for number, item in enumerate(items, 1):
        yield item
        if len(items) > 1 and (number % step == 0 or number == len(items)):
            print(f"[{number}/{len(items)}] images", file=sys.stderr, flush=True)


def _report(
    scores: Sequence["ImageScore"], failed: Mapping[str, str], pairing: "Pairing", settings: "EvaluateConfig"
) -> dict[str, Any]:
    from pathopipe.segmentation.score import class_figures, multi_class_figures

    groups = sorted({score.group for score in scores} - {""})
    report: dict[str, Any] = {
        "settings": settings.model_dump(mode="json", exclude_none=True),
        "n_images": len(scores),
        "failed": dict(failed),
        "without_partner": {
            "truth": [path.name for path in pairing.truth_only],
            "predicted": [path.name for path in pairing.other_only],
        },
        "all": _summary(scores, settings),
        "groups": {name: _summary([s for s in scores if s.group == name], settings) for name in groups},
        "notes": [*_unseen_classes(scores, settings), *_gather_notes(scores)],
    }
    if settings.classes:
        report["classes"] = class_figures(scores)
        over = {name: {"mean": mean, "n": n} for name, (mean, n) in multi_class_figures(scores).items()}
        kept = {"per-image": ("mpq", "bpq"), "pooled": ("mpq_plus", "r2")}.get(settings.protocol, tuple(over))
        report["over_classes"] = {name: over[name] for name in kept}
    report["images"] = [_image_row(score) for score in scores]
    return report


def _summary(scores: Sequence["ImageScore"], settings: "EvaluateConfig") -> dict[str, Any]:
    from pathopipe.segmentation.metrics import Tally, count_r2
    from pathopipe.segmentation.score import figures, mean_figures

    total = sum((score.tally for score in scores), Tally())
    summary: dict[str, Any] = {
        "n_images": len(scores),
        "n_truth": total.n_truth,
        "n_predicted": total.n_predicted,
    }
    if settings.protocol != "pooled":
        summary["per_image"] = {name: {"mean": mean, "n": n} for name, (mean, n) in mean_figures(scores).items()}
    if settings.protocol != "per-image":
        counts = [[[getattr(score.tally, side)] for score in scores] for side in ("n_truth", "n_predicted")]
        summary["pooled"] = {**figures(total, settings.mpp), "count_r2": float(count_r2(*counts)[0])}
    return summary


def _unseen_classes(scores: Sequence["ImageScore"], settings: "EvaluateConfig") -> list[str]:
    from pathopipe.registry import nearest

    seen = {name for score in scores for name in score.classes_seen}
    unseen = [name for name in settings.classes if name != "all" and name not in seen]
    return [
        f"class '{name}': no object has it; {nearest(name, seen) if seen else 'none has a class'}" for name in unseen
    ]


def _gather_notes(scores: Sequence["ImageScore"]) -> list[str]:
    """What is odd about the files, each thing once."""
    files_of: dict[str, list[str]] = {}
    for score in scores:
        for file, what in score.notes:
            files = files_of.setdefault(what, [])
            if file not in files:
                files.append(file)
    notes = []
    for what, files in files_of.items():
        others = f" and {_many(len(files) - 1, 'more file')}" if len(files) > 1 else ""
        notes.append(f"{files[0]}{others}: {what}")
    return notes


def _image_row(score: "ImageScore") -> dict[str, Any]:
    from pathopipe.segmentation.score import figures

    row: dict[str, Any] = {
        "image": score.name,
        "group": score.group,
        "n_truth": score.tally.n_truth,
        "n_predicted": score.tally.n_predicted,
        **figures(score.tally, score.mpp),
    }
    for name, each in score.classes.items():
        row[f"pq: {name}"] = each.panoptic.pq
    return row


def _write_rows(
    path: Path,
    scores: Sequence["ImageScore"],
    failed: Mapping[str, str],
    group_of: Mapping[str, str],
    settings: "EvaluateConfig",
) -> None:
    from pathopipe.files import durable_file
    from pathopipe.report.summary import escape_cell

    rows = {score.name: {"status": "done", **_image_row(score)} for score in scores}
    for name, reason in failed.items():
        rows[name] = {"image": name, "group": group_of[name], "status": "failed", "reason": reason}
    shown = _shown(settings)
    columns = ["image", "group", "status", "reason", "n_truth", "n_predicted", "precision", "recall", *shown]
    columns += sorted({column for row in rows.values() for column in row if column.startswith("pq: ")})
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(escape_cell(column) for column in columns)
    for _, row in sorted(rows.items()):
        writer.writerow(_cell(row.get(column, "")) for column in columns)
    with durable_file(path) as file:
        file.write(text.getvalue().encode())


def _cell(value: object) -> str:
    from pathopipe.report.summary import escape_cell

    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return escape_cell(value) if isinstance(value, str) else str(value)


def _shown(settings: "EvaluateConfig") -> list[str]:
    """The figures that were counted, in the order of the table."""
    left_out = set() if settings.mpp is not None else {"f1_distance"}
    if not settings.glands:
        left_out |= {"glas_f1", "object_dice", "object_hausdorff"}
    return [name for name in _HEADERS if name not in left_out]


def _describe(report: Mapping[str, Any], settings: "EvaluateConfig") -> str:
    """The report as text."""
    groups = {**report["groups"], "all": report["all"]}
    total = report["all"]
    parts = [f"{_many(total['n_images'], 'image')}: {total['n_truth']} true objects, {total['n_predicted']} found"]
    unit = "px" if settings.mpp is None else "um"
    shown = _shown(settings)
    headers = [_HEADERS[name].format(radius=f"{settings.radius_um:g}", unit=unit) for name in shown]
    if settings.protocol != "pooled":
        parts.append(
            "\nmean over images\n"
            + format_table(
                ("group", "images", *headers),
                [
                    (name, str(each["n_images"]), *(_number(each["per_image"][key]["mean"], key) for key in shown))
                    for name, each in groups.items()
                ],
            )
        )
        left_out = [
            f"{header} {total['n_images'] - total['per_image'][key]['n']}"
            for key, header in zip(shown, headers, strict=True)
            if total["per_image"][key]["n"] < total["n_images"]
        ]
        if left_out:
            parts.append(f"not defined on some images, which are left out there: {', '.join(left_out)}")
    if settings.protocol != "per-image":
        parts.append(
            "\npooled: the objects of all images together\n"
            + format_table(
                ("group", "truth", "found", *headers, "count R2"),
                [
                    (
                        name,
                        str(each["n_truth"]),
                        str(each["n_predicted"]),
                        *(_number(each["pooled"][key], key) for key in (*shown, "count_r2")),
                    )
                    for name, each in groups.items()
                ],
            )
        )
    if "classes" in report:
        parts.append(_describe_classes(report, settings))
    return "\n".join([*parts, *_describe_faults(report)])


def _describe_classes(report: Mapping[str, Any], settings: "EvaluateConfig") -> str:
    keys = ["dq", "sq", "pq", "pq_mean", *(["f1_type"] if settings.mpp is not None else []), "count_r2"]
    names = {"pq_mean": "PQ by image", "f1_type": "F1 of class", "count_r2": "count R2"}
    rows = [
        (
            name,
            *(str(each[key]) for key in ("n_truth", "n_predicted", "n_images")),
            *(_number(each[key], key) for key in keys),
        )
        for name, each in report["classes"].items()
    ]
    header = ("class", "truth", "found", "images", *(names.get(key, key.upper()) for key in keys))
    titles = {
        "mpq": "mPQ (PanNuke: by image, classes absent from the truth left out)",
        "bpq": "bPQ (PanNuke: all classes as one)",
        "mpq_plus": "mPQ+ (CoNIC: pooled)",
        "r2": "multi-class R2 of counts (CoNIC)",
    }
    means = [f"{titles[name]}: {_number(each['mean'], name)}" for name, each in report["over_classes"].items()]
    return "\n".join(["\nby class, pooled\n" + format_table(header, rows), *means])


def _describe_faults(report: Mapping[str, Any]) -> Iterator[str]:
    for side, names in report["without_partner"].items():
        if names:
            yield f"without a partner, passed over ({side}): {_some(names, ', ')}"
    if report["notes"]:
        yield _some([f"note: {note}" for note in report["notes"]], "\n")
    for name, reason in report["failed"].items():
        yield f"failed: {name}: {reason}"


def _some(texts: Sequence[str], between: str) -> str:
    more = [f"and {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
    return between.join([*texts[:_SHOWN], *more])


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _number(value: float, key: str) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if key == "object_hausdorff" else f"{value:.3f}"


def _without_nan(value: Any) -> Any:
    """The same with null for NaN, which strict JSON lacks."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
