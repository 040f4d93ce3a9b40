"""``pathopipe mil evaluate``, ``predict`` and ``heatmap``: figures, predictions and pictures of trained models."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathopipe.cli.options import Location, Out, parse_place
from pathopipe.cli.progress import format_table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pathopipe.cohort import LabelTable
    from pathopipe.mil.bags import Bag
    from pathopipe.mil.cases import Cases
    from pathopipe.mil.evaluate import Figure, FigureTable
    from pathopipe.mil.predict import Ensemble, Prediction

__all__ = ["evaluate", "heatmap", "predict"]

_Model = Annotated[
    Path, typer.Option("--model", help="The --out folder of 'mil train', one head in it, or the folder of one model.")
]
_Features = Annotated[
    Location,
    typer.Option("--features", parser=parse_place, metavar="DIR|URL", help="Folder of stores or feature files."),
]
_Manifest = Annotated[Path | None, typer.Option("--manifest", help="CSV with slide_id, patient_id, site, labels.")]
_Device = Annotated[str, typer.Option("--device", help="cpu, cuda or auto.")]
_AllowTraining = Annotated[
    bool, typer.Option("--allow-training", help="Score slides that every model has learnt from, too.")
]
_LONG_NOTE = 72


def evaluate(
    model: _Model,
    out: Out,
    manifest: _Manifest = None,
    features: Annotated[
        Path | None, typer.Option("--features", help="With --manifest: features of another cohort, predicted first.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Decide at this probability.  [default: each fold's validation; else 0.5]"),
    ] = None,
    draws: Annotated[int, typer.Option(min=0, help="Bootstrap samples of patients for the intervals.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    svg: Annotated[bool, typer.Option("--svg", help="Write plots as SVG, too.")] = False,
    faithfulness: Annotated[
        bool,
        typer.Option(
            "--faithfulness", help="With --features: how far AUROC falls without the top tiles of each slide."
        ),
    ] = False,
    device: _Device = "auto",
) -> None:
    """Figures with intervals over patients, and plots, from the test folds of a training or on another cohort.

    \b
    Examples:
      pathopipe mil evaluate --model training --out figures
      pathopipe mil evaluate --model training/handcrafted/abmil --out figures --threshold 0.5
      pathopipe mil evaluate --model training/handcrafted/abmil --manifest other.csv --features other --out external

    Writes figures.csv and figures.json, and plots for each model and target. Every figure says how many patients it
    rests on; one that can't be computed (a class is absent) is left empty, with the reason. Patients who were in the
    training are scored only by models that have not seen them.
    """
    from pathopipe.errors import UsageError
    from pathopipe.mil.predict import find_ensembles

    if (manifest is None) != (features is None):
        raise UsageError("--manifest and --features belong together: labels and features of another cohort")
    if faithfulness and features is None:
        raise UsageError("--faithfulness predicts anew; give --manifest and --features")
    records: list[dict[str, Any]] = []
    notes: dict[str, list[str]] = {}
    if manifest is not None and features is not None:
        name, cases, extra = _evaluate_cohort(
            model, manifest, features, out, threshold, device, faithfulness=faithfulness, seed=seed
        )
        work = [(name, target, one) for target, one in cases]
    else:
        extra = {}
        work = [
            (name, target, one)
            for name, places in find_ensembles(model).items()
            for target, one in _cases_of_training(places, threshold)
        ]
    for name, target, one in work:
        folder = out / "plots" / Path(name) / _file_name(target)
        table = _tell_figures(f"{name} · {target}", one, folder, draws=draws, seed=seed, svg=svg)
        records += [{"model": name, "target": target, **row} for row in table.rows()]
        notes[f"{name} {target}"] = list(table.notes)
    for line in extra.get("lines", []):
        print(line)
    _write_figures(out, records, notes, extra)
    print(f"figures: {out / 'figures.csv'}; plots: {out / 'plots'}")


def predict(
    model: _Model,
    features: _Features,
    out: Out,
    manifest: _Manifest = None,
    allow_training: _AllowTraining = False,
    store: Annotated[
        bool, typer.Option("--store/--no-store", help="Write logits and attention into the slides' stores.")
    ] = True,
    device: _Device = "auto",
) -> None:
    """Predict slides or patients; logits and attention go into the stores, a table into --out.

    \b
    Examples:
      pathopipe mil predict --model training --features results --out predictions
      pathopipe mil predict --model training/handcrafted/abmil --features results --manifest cohort.csv --out new

    All folds' models are averaged. A patient of the training cohort is scored only by the models of the folds in which
    it was a test patient; the column "seen" says so. Features of another encoder are refused.
    """
    from pathopipe.mil.predict import store_prediction
    from pathopipe.mil.scored import prediction_rows, write_rows

    ensemble = _load(model, device)
    table = _table(ensemble, features, manifest)
    predictions = []
    n_stored = 0
    for _, prediction, _ in _predict_all(ensemble, table, features, allow_training=allow_training):
        if store:
            n_stored += len(store_prediction(ensemble, prediction))
        # Attention of a whole cohort is not kept in memory.
        predictions.append(_without_tiles(prediction))
    rows = prediction_rows(predictions, ensemble, _truth(ensemble, table, predictions))
    write_rows(out / "predictions.csv", rows)
    shown = [name for spec in ensemble.targets for name in spec.prediction_names]
    head = ("slide or patient", "tiles", "seen", *shown)
    body = [
        (row["bag_id"], str(row["tiles"]), row["seen"], *(_short(row[name]) for name in shown)) for row in rows[:20]
    ]
    print(format_table(head, body))
    if len(rows) > len(body):
        print(f"... and {len(rows) - len(body)} more")
    seen = [one.seen for one in predictions]
    counted = ", ".join(f"{seen.count(kind)} {text}" for kind, text in _SEEN.items() if kind in seen)
    print(f"{len(rows)} predicted by {ensemble.name} ({counted}); table: {out / 'predictions.csv'}")
    if store:
        print(f"stored in {n_stored} stores under predictions/{ensemble.name}")


_SEEN: Mapping[str, str] = {
    "new": "new to the models",
    "test": "by the folds that had them in their test part",
    "val": "SEEN in validation",
    "train": "SEEN in training",
}


def heatmap(
    model: _Model,
    features: _Features,
    slide_id: Annotated[list[str], typer.Option("--slide-id", metavar="ID", help="Which slide; may be repeated.")],
    out: Out,
    manifest: _Manifest = None,
    slide: Annotated[
        Path | None, typer.Option("--slide", help="The slide's file, for the contact sheet; else the manifest's path.")
    ] = None,
    tiles: Annotated[int, typer.Option(min=1, max=24, help="Tiles at each end on the contact sheet.")] = 8,
    allow_training: _AllowTraining = False,
    device: _Device = "auto",
) -> None:
    """Show what a model looked at: maps over the slide, for QuPath and other viewers, from the store alone.

    \b
    Examples:
      pathopipe mil heatmap --model training --features results --slide-id slide7 --out maps
      pathopipe mil heatmap --model training --features results --slide-id slide7 --slide slide7.svs --out maps
      pathopipe mil heatmap --model training/handcrafted/clam_mb --features results --slide-id a --slide-id b --out maps

    Writes for each slide, into a folder of its own: maps as PNG over the thumbnail (attention by its rank among the
    slide's tiles), .tiles.geojson for QuPath with every value, .maps.ome.tiff with one pixel a tile, the same in
    colours, and .json with the prediction and how faithful the map is: how the prediction falls without the tiles that
    are marked highest, against as many at random. With the slide's file also the highest and lowest tiles.
    A slide of the training cohort is shown by a model that has not learnt from it.
    """
    from pathopipe.cli.mil_maps import draw_slide
    from pathopipe.errors import UsageError
    from pathopipe.mil.bags import find_features

    if slide is not None and len(slide_id) > 1:
        raise UsageError("--slide is the file of one slide; give one --slide-id, or a --manifest with paths")
    if slide is not None and not slide.exists():
        raise UsageError(f"{slide}: no such file; correct --slide, or leave it out (no contact sheet then)")
    ensemble = _load(model, device)
    known = find_features(features)
    table = _table(ensemble, features, manifest)
    for wanted in slide_id:
        if wanted not in table.slide_ids:
            from pathopipe.registry import nearest

            raise UsageError(f"no slide '{wanted}' in {manifest or features}; {nearest(wanted, table.slide_ids)}")
        if known[wanted].suffix != ".zarr":
            raise UsageError(f"{known[wanted]}: maps are drawn from a store; run 'pathopipe run' on this slide first")
    patients = {table.patient_ids[table.slide_ids.index(wanted)] for wanted in slide_id}
    of_bags = [
        row
        for row in range(len(table))
        if table.slide_ids[row] in slide_id or (ensemble.by == "patient" and table.patient_ids[row] in patients)
    ]
    table = table.take(of_bags)
    files = _slide_files(table, manifest, slide)
    for _, prediction, covariates in _predict_all(ensemble, table, features, allow_training=allow_training):
        for line in draw_slide(ensemble, prediction, covariates, slide_id, files, out, tiles):
            print(line)


# ---- figures


def _cases_of_training(places: Sequence[Path], threshold: float | None) -> Iterator[tuple[str, "Cases"]]:
    """Targets and their test cases over all folds of one head."""
    from pathopipe.mil.scored import cases_of_folds, read_scored, read_targets

    targets = read_targets(places[0])
    folds = [read_scored(place, targets) for place in places]
    for number, spec in enumerate(targets):
        yield spec.name, cases_of_folds(folds, targets, number, threshold=threshold)


def _evaluate_cohort(
    model: Path,
    manifest: Path,
    features: Path,
    out: Path,
    threshold: float | None,
    device: str,
    *,
    faithfulness: bool,
    seed: int,
) -> tuple[str, list[tuple[str, "Cases"]], dict[str, Any]]:
    """Predict a cohort with labels; its cases by target, and how faithful the maps are."""
    from pathopipe.mil.scored import cases_of_predictions, prediction_rows, write_rows

    ensemble = _load(model, device)
    table = _table(ensemble, features, manifest, labelled=True)
    predictions, removed = [], []
    for _, prediction, covariates in _predict_all(ensemble, table, features):
        if faithfulness:
            removed.append(_removed(ensemble, prediction, covariates, seed))
        predictions.append(_without_tiles(prediction))
    truth = _truth(ensemble, table, predictions)
    assert truth is not None
    write_rows(out / "predictions.csv", prediction_rows(predictions, ensemble, truth))
    cases = [
        (spec.name, cases_of_predictions(predictions, ensemble, truth, number, threshold=threshold))
        for number, spec in enumerate(ensemble.targets)
    ]
    return ensemble.name, cases, _faithfulness_of_cohort(ensemble, truth, removed) if faithfulness else {}


_REMOVED_SHARE = 0.1


def _removed(
    ensemble: "Ensemble", prediction: "Prediction", covariates: list["NDArray[np.float32] | None"], seed: int
) -> tuple[float, float, float] | None:
    """Probability of the positive class with all tiles, without the top ones, without as many at random."""
    from pathopipe.mil.predict import measure_faithfulness

    if ensemble.targets[0].kind != "binary":
        return None
    found = measure_faithfulness(ensemble, prediction, covariates, followed=1, shares=(_REMOVED_SHARE,), seed=seed)
    if found is None or not found.shares:
        return None
    return found.whole, found.without_top[0], found.without_random[0]


def _faithfulness_of_cohort(
    ensemble: "Ensemble", truth: "NDArray[np.float64]", removed: Sequence[tuple[float, float, float] | None]
) -> dict[str, Any]:
    import numpy as np

    from pathopipe.mil import weighted

    spec = ensemble.targets[0]
    rows = [at for at, one in enumerate(removed) if one is not None and np.isfinite(truth[at, 0])]
    positive = truth[rows, 0] == 1
    if not rows or positive.all() or not positive.any():
        reason = "the head marks no tiles, the target is not binary, or a class is absent"
        return {"lines": [f"faithfulness: not computed; {reason}"]}
    values = np.array([removed[at] for at in rows])
    whole, top, random = (
        float(weighted.auroc(positive, values[:, column])(np.ones((1, len(rows))))[0]) for column in range(3)
    )
    line = (
        f"faithfulness: AUROC of {spec.name} {whole:.3f}; without the top {_REMOVED_SHARE:.0%} of each bag's tiles "
        f"{top:.3f}, without as many at random {random:.3f} ({len(rows)} bags)"
    )
    record = {
        "share_removed": _REMOVED_SHARE,
        "auroc": whole,
        "auroc_without_top": top,
        "auroc_without_random": random,
        "bags": len(rows),
    }
    return {"lines": [line], "faithfulness": record}


def _tell_figures(title: str, cases: "Cases", folder: Path, *, draws: int, seed: int, svg: bool) -> "FigureTable":
    """Compute, print and plot."""
    from pathopipe.mil.evaluate import figures_of
    from pathopipe.report.mil_plots import write_plots

    table = figures_of(cases, seed=seed, draws=draws)
    print(f"\n{title}: {table.n_patients} patients, {table.n_bags} bags")
    print(
        format_table(
            ("figure", "value (95 % interval)", "n", "positive", "note"), list(map(_figure_row, table.figures))
        )
    )
    for note in table.notes:
        print(f"  {note}")
    write_plots(folder, table, cases, svg=svg)
    return table


def _figure_row(figure: "Figure") -> tuple[str, ...]:
    where = f" · site {figure.site}" if figure.site else ""
    positive = "" if figure.n_positive is None else str(figure.n_positive)
    note = figure.note if len(figure.note) <= _LONG_NOTE else f"{figure.note[: _LONG_NOTE - 1]}…"
    return figure.title + where, figure.text(), str(figure.n_rows), positive, note


def _write_figures(
    out: Path, records: list[dict[str, Any]], notes: Mapping[str, list[str]], extra: Mapping[str, Any]
) -> None:
    from pathopipe.files import durable_file
    from pathopipe.mil.scored import write_rows

    write_rows(out / "figures.csv", records)
    document = {"figures": records, "notes": notes, **{key: extra[key] for key in extra if key != "lines"}}
    with durable_file(out / "figures.json") as file:
        file.write(json.dumps(document, indent=1, allow_nan=False).encode())


# ---- predictions


def _load(model: Path, device: str) -> "Ensemble":
    from pathopipe.mil.fit import choose_device
    from pathopipe.mil.predict import load_ensemble

    return load_ensemble(model, device=choose_device(device))


def _table(ensemble: "Ensemble", features: Path, manifest: Path | None, *, labelled: bool = False) -> "LabelTable":
    """The slides: those of the manifest that have features, or all that have; what is left out is told."""
    from pathopipe.cohort import LabelTable, join_labels, read_labels
    from pathopipe.errors import UsageError
    from pathopipe.mil.bags import find_features

    encoder = ensemble.models[0].card.encoder or None
    available = find_features(features, encoder=encoder)
    if manifest is None:
        if ensemble.by == "patient":
            raise UsageError(
                "the model scores patients, not slides; give --manifest, which says whose slides are whose"
            )
        if any(model.card.covariates for model in ensemble.models):
            raise UsageError("the model takes covariates; give --manifest with their columns")
        return LabelTable.of_slides(sorted(available))
    columns = [column for spec in ensemble.targets for column in spec.columns] if labelled else []
    joined = join_labels(read_labels(manifest), available, targets=columns, where=str(features))
    for line in joined.lines():
        print(f"note: {line}", file=sys.stderr)
    return joined.table


def _predict_all(
    ensemble: "Ensemble", table: "LabelTable", features: Path, *, allow_training: bool = False
) -> Iterator[tuple["Bag", "Prediction", list["NDArray[np.float32] | None"]]]:
    """Predictions of all bags of a table, one at a time, with the covariates they were made with."""
    from pathopipe.mil.bags import open_bags, part_empty
    from pathopipe.mil.predict import predict_bag

    card = ensemble.models[0].card
    bags = open_bags(features, table, encoder=card.encoder or None, grid=card.grid or None, by=ensemble.by)
    ensemble.check_features(bags)
    usable, empty = part_empty(bags)
    if empty:
        names = ", ".join(bag.bag_id for bag in empty[:3]) + (", ..." if len(empty) > 3 else "")
        print(f"note: no tiles, so no prediction: {len(empty)} of {len(bags)} ({names})", file=sys.stderr)
    rows = table.by_patient([]) if ensemble.by == "patient" else table
    place = {name: row for row, name in enumerate(rows.slide_ids)}
    encoded = [model.encode_covariates(rows) for model in ensemble.models]
    for bag in usable:
        own = [None if values is None else values[place[bag.bag_id]] for values in encoded]
        yield bag, predict_bag(ensemble, bag, own, allow_training=allow_training), own


def _without_tiles(prediction: "Prediction") -> "Prediction":
    from dataclasses import replace

    return replace(prediction, attention=None, contributions=None)


def _truth(
    ensemble: "Ensemble", table: "LabelTable", predictions: Sequence["Prediction"]
) -> "NDArray[np.float64] | None":
    """Labels of the predicted bags; None where the table has no such columns."""
    from pathopipe.mil.targets import encode_targets

    columns = [column for spec in ensemble.targets for column in spec.columns]
    if any(column not in table.columns for column in columns):
        return None
    rows = table.by_patient(columns) if ensemble.by == "patient" else table
    place = {name: row for row, name in enumerate(rows.slide_ids)}
    return encode_targets(ensemble.targets, rows)[[place[one.bag.bag_id] for one in predictions]]


def _slide_files(table: "LabelTable", manifest: Path | None, slide: Path | None) -> dict[str, Path]:
    """Files of slides that are there, by id."""
    if slide is not None:
        return {table.slide_ids[0]: slide}
    if manifest is None or "path" not in table.columns:
        return {}
    files = {name: manifest.parent / text for name, text in zip(table.slide_ids, table.columns["path"], strict=True)}
    return {name: path for name, path in files.items() if path.exists()}


def _short(text: str) -> str:
    return f"{float(text):.3f}"


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in text)
