"""``pathopipe metadata``: fields of a catalogue predicted from slides, reports and tables, and doubtful records."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathopipe.cli.options import ConfigFile, Json, Out

if TYPE_CHECKING:
    from pathopipe.metadata.cases import MetadataCohort
    from pathopipe.metadata.evaluate import Evaluation, View
    from pathopipe.metadata.leakage import Leak
    from pathopipe.metadata.predict import MetadataEnsemble
    from pathopipe.metadata.review import Contradiction, TopTile

__all__ = ["app", "predict", "review", "train"]

app = typer.Typer(
    name="metadata",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Fields of a catalogue from slides, reports and tables: train, predict, review.""",
    short_help="Fields of a catalogue: predicted, and reviewed for errors.",
)

_Manifest = Annotated[
    Path, typer.Option("--manifest", metavar="CSV", help="slide_id, patient_id, and the columns of the catalogue.")
]
_Features = Annotated[
    Path | None, typer.Option("--features", metavar="DIR", help="Stores, or feature files of other programs.")
]
_Reports = Annotated[
    Path | None,
    typer.Option("--reports", metavar="PATH", help="CSV with slide_id or patient_id and text, or folder of .txt."),
]
_Model = Annotated[Path, typer.Option("--model", metavar="DIR", help="The --out folder of 'metadata train'.")]
_Encoder = Annotated[str | None, typer.Option("--encoder", help="Of the features, where there are several.")]
_Grid = Annotated[str | None, typer.Option("--grid", help="Of stores, where there are several.")]
_Device = Annotated[str, typer.Option("--device", help="cpu, cuda or auto.")]
_SHOWN_LEAKS = 5
_SHOWN_ROWS = 20


@app.command("train", short_help="Train models over patient-grouped folds; resumes.")
def train(
    manifest: _Manifest,
    tasks: Annotated[
        Path, typer.Option("--tasks", metavar="YAML", help="The fields; configs/metadata_tasks.yaml is a template.")
    ],
    out: Out,
    features: _Features = None,
    reports: _Reports = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="COLUMN,..", help="Columns to learn from; none: no table.  [default: all that may be]"),
    ] = None,
    encoder: _Encoder = None,
    grid: _Grid = None,
    leave_sites_out: Annotated[
        bool, typer.Option("--leave-sites-out", help="Test on sites that were not trained on.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of folds, weights and samples.")] = 0,
    config: ConfigFile = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="metadata.KEY=VALUE", help="One setting of training; may be repeated."),
    ] = None,
    device: _Device = "auto",
    as_json: Json = False,
) -> None:
    """Train one model of all fields over folds that keep patients whole, and say how good it is; run again to go on.

    \b
    Examples:
      pathopipe metadata train --manifest catalogue.csv --tasks fields.yaml --features results --out model
      pathopipe metadata train --manifest catalogue.csv --tasks fields.yaml --reports reports.csv --out model
      pathopipe metadata train --manifest catalogue.csv --tasks fields.yaml --features results --reports texts
          --columns age,sex --leave-sites-out --set metadata.folds=10 --out model

    Each of image, report and table may be missing, for single slides or for all. What states a field is kept from the
    model, and before any result a probe names words and columns that give one away. Single-task models of one modality
    are trained beside, and the gain over them is told. Written into --out: config.json, folds.csv, a folder a fold,
    oof.csv with a prediction of every slide by a model that has not seen its patient, figures.csv and evaluation.json.
    """
    from pathopipe.cluster import check_writable
    from pathopipe.metadata.cases import check_tasks, read_cohort
    from pathopipe.metadata.evaluate import evaluate, evaluation_json, write_evaluation
    from pathopipe.metadata.leakage import probe
    from pathopipe.metadata.settings import load_metadata_config
    from pathopipe.metadata.tasks import read_tasks
    from pathopipe.metadata.train import train as train_folds
    from pathopipe.mil.fit import choose_device

    _log_notes()
    asked = list(settings or ())
    if leave_sites_out:
        asked.append("metadata.leave_sites_out=true")
    recipe = load_metadata_config(config, asked)
    chosen_device = choose_device(device)
    wanted = None if columns is None else () if columns.strip() == "none" else _names(columns)
    cohort = read_cohort(
        manifest,
        read_tasks(tasks),
        features=features,
        encoder=encoder,
        grid=grid,
        reports=reports,
        table_columns=wanted,
    )
    for note in cohort.notes:
        _say(f"note: {note}")
    check_tasks(cohort)
    check_writable(out)
    _say(_describe(cohort))
    leaks = probe(cohort, seed=seed)
    if not as_json:
        _print_leaks(leaks)
    oof = train_folds(cohort, recipe, out, seed=seed, device=chosen_device, on_line=_say)
    evaluation = evaluate(oof, draws=recipe.draws, seed=seed)
    write_evaluation(out, evaluation)
    if as_json:
        print(json.dumps({"probe": [_leak_json(leak) for leak in leaks], **evaluation_json(evaluation)}))
        return
    _print_evaluation(evaluation)
    print(f"figures: {out / 'figures.csv'}; predictions out of fold: {out / 'oof.csv'}")


@app.command("predict", short_help="Fields of every slide, as CSV and JSON Lines.")
def predict(
    model: _Model,
    manifest: _Manifest,
    out: Out,
    features: _Features = None,
    reports: _Reports = None,
    encoder: _Encoder = None,
    grid: _Grid = None,
    device: _Device = "auto",
    as_json: Json = False,
) -> None:
    """Predict the fields of every slide from whatever there is of it.

    \b
    Examples:
      pathopipe metadata predict --model model --manifest new.csv --features results --out predicted
      pathopipe metadata predict --model model --manifest new.csv --reports reports.csv --out predicted

    Writes predictions.csv and predictions.jsonl: slide, task, value, code, probability, whether the model abstains,
    model, modalities. Where it abstains, fewer predictions would be right than the precision asked for in training. A
    patient of the training is predicted by the models that have not learnt from it.
    """
    from dataclasses import asdict

    from pathopipe.cli.progress import format_table
    from pathopipe.cluster import check_writable
    from pathopipe.metadata.predict import load_ensemble, write_csv, write_json_lines
    from pathopipe.metadata.predict import predict as predict_cohort
    from pathopipe.metadata.review import check_patients
    from pathopipe.mil.fit import choose_device

    _log_notes()
    chosen_device = choose_device(device)
    ensemble = load_ensemble(model, device=chosen_device)
    cohort = _cohort_for(ensemble, manifest, features, reports, encoder, grid)
    check_patients(model, cohort)
    check_writable(out)
    predictions = predict_cohort(model, cohort, device=chosen_device)
    write_csv(out / "predictions.csv", predictions)
    write_json_lines(out / "predictions.jsonl", predictions)
    if as_json:
        print(json.dumps([asdict(one) for one in predictions], ensure_ascii=False))
        return
    rows = []
    for task in ensemble.tasks:
        own = [one for one in predictions if one.task == task.name]
        nothing = sum(1 for one in own if not one.value and not one.probability)
        given = sum(1 for one in own if not one.abstained)
        rows.append([task.name, str(len(own)), str(given), str(len(own) - given - nothing), str(nothing)])
    print(format_table(("task", "slides", "given", "abstained", "nothing to go by"), rows))
    print(f"{len(cohort)} slides by {ensemble.model_id}; table: {out / 'predictions.csv'}, also predictions.jsonl")


@app.command("review", short_help="Records that contradict their prediction, with evidence.")
def review(
    model: _Model,
    manifest: _Manifest,
    out: Out,
    features: _Features = None,
    reports: _Reports = None,
    encoder: _Encoder = None,
    grid: _Grid = None,
    most: Annotated[int, typer.Option("--most", min=1, help="Contradictions with evidence, on the page.")] = 100,
    wrong_share: Annotated[
        float, typer.Option("--wrong-share", help="Share of records taken to be wrong beforehand.")
    ] = 0.05,
    device: _Device = "auto",
    as_json: Json = False,
) -> None:
    """List the records that contradict their prediction, the surest to be wrong first, with evidence.

    \b
    Examples:
      pathopipe metadata review --model model --manifest catalogue.csv --features results --out review
      pathopipe metadata review --model model --manifest catalogue.csv --reports reports.csv --out review --most 30

    Writes review.csv with all of them and review.html with the first: the tiles that count most (as pictures where the
    manifest has the slides' path), words of the report, nearest slides of other patients. Records of the training are
    judged by the models of the fold that kept their patient back; nothing is judged by a model that has seen it.
    """
    from dataclasses import asdict

    import numpy as np

    from pathopipe.cli.progress import format_table
    from pathopipe.cluster import check_writable
    from pathopipe.metadata.predict import load_ensemble
    from pathopipe.metadata.review import check_patients, explain, rank_cohort, with_records, write_review
    from pathopipe.mil.fit import choose_device
    from pathopipe.report.metadata import PageHead, write_review_page

    _log_notes()
    ensemble = load_ensemble(model, device=choose_device(device))
    cohort = _cohort_for(ensemble, manifest, features, reports, encoder, grid)
    cohort = with_records(cohort, manifest, ensemble.tasks)
    check_patients(model, cohort)
    check_writable(out)
    found = rank_cohort(ensemble, cohort, wrong_share=wrong_share)
    first = found[:most]
    evidence = explain(first, ensemble, cohort)
    top = {one.row: shown.tiles for one, shown in zip(first, evidence, strict=True) if shown.tiles}
    write_review(out / "review.csv", found, evidence)
    records = {task.name: int(np.isfinite(cohort.truth[task.name]).any(axis=1).sum()) for task in ensemble.tasks}
    head = PageHead(
        source=manifest.name,
        model_id=ensemble.model_id,
        n_slides=len(cohort),
        records=records,
        notes=cohort.notes,
    )
    write_review_page(out / "review.html", head, found, evidence, _pictures(manifest, cohort, top))
    if as_json:
        print(json.dumps([{**asdict(one), **asdict(shown)} for one, shown in zip(first, evidence, strict=True)]))
        return
    if found:
        print(format_table(("rank", "slide", "task", "recorded", "predicted", "wrong"), _review_table(found)))
    if len(found) > _SHOWN_ROWS:
        print(f"... and {len(found) - _SHOWN_ROWS} more")
    print(
        f"{len(found)} of {sum(records.values())} records contradict their prediction; "
        f"table: {out / 'review.csv'}, page: {out / 'review.html'}"
    )


# --- reading -----------------------------------------------------------------------------------------------------


def _log_notes() -> None:
    import logging

    logging.basicConfig(format="note: %(message)s", level=logging.WARNING, stream=sys.stderr)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _describe(cohort: "MetadataCohort") -> str:
    import numpy as np

    having = {name: sum(name in case.modalities for case in cohort.cases) for name in ("image", "text", "table")}
    of = ", ".join(f"{count} with {name}" for name, count in having.items() if count)
    tasks = ", ".join(
        f"{task.name} {int(np.isfinite(cohort.truth[task.name]).any(axis=1).sum())}" for task in cohort.tasks
    )
    return f"{len(cohort)} slides of {len(set(cohort.patients))} patients ({of}); records: {tasks}"


def _cohort_for(
    ensemble: "MetadataEnsemble",
    manifest: Path,
    features: Path | None,
    reports: Path | None,
    encoder: str | None,
    grid: str | None,
) -> "MetadataCohort":
    """The slides as the models of a training take them; what of these is not given is told."""
    from pathopipe.metadata.cases import read_cohort

    cards = [model.card for model in ensemble.models]
    card = cards[0]
    takes = {name for one in cards for name in one.shape.modalities}
    for name, given, option in (("image", features, "--features"), ("text", reports, "--reports")):
        if name in takes and given is None:
            _say(f"note: the model takes {option}, which is not given; it goes by the rest")
        if name not in takes and given is not None:
            _say(f"note: the model was trained without {option}, which is passed over")
    columns = tuple(dict.fromkeys(name for one in cards for name in one.table_columns))
    cohort = read_cohort(
        manifest,
        ensemble.tasks,
        features=features if "image" in takes else None,
        encoder=encoder or card.encoder or None,
        grid=grid or card.grid or None,
        reports=reports if "text" in takes else None,
        table_columns=columns,
        labels=False,
    )
    for note in cohort.notes:
        _say(f"note: {note}")
    return cohort


def _pictures(
    manifest: Path, cohort: "MetadataCohort", top: Mapping[int, Sequence["TopTile"]]
) -> dict[int, list[bytes]]:
    """Pictures of top tiles, by row, of slides whose file the manifest names; what can't be drawn is told."""
    from pathopipe.cohort import read_labels
    from pathopipe.errors import PathopipeError
    from pathopipe.report.metadata import read_tiles
    from pathopipe.slide.open import open_slide
    from pathopipe.store import SlideStore

    table = read_labels(manifest)
    if "path" not in table.columns:
        return {}
    files = dict(zip(table.slide_ids, table.columns["path"], strict=True))
    pictures = {}
    for row, tiles in top.items():
        case = cohort.cases[row]
        file = manifest.parent / files[case.slide_id]
        if not files[case.slide_id] or not file.exists():
            continue
        try:
            slide = open_slide(file, slide_id=case.slide_id)
        except PathopipeError as error:
            _say(f"note: no pictures of {case.slide_id}: {error}")
            continue
        try:
            place = case.bag.sources[0].places() if case.bag is not None else None
            made_from = SlideStore.open(place.path) if place is not None and place.grid and place.path else None
            if made_from is not None and made_from.slide["fingerprint"] != slide.info.fingerprint:
                _say(f"note: no pictures of {case.slide_id}: {file.name} is not the slide its store was made from")
                continue
            pictures[row] = read_tiles(slide, tiles)
        finally:
            slide.close()
    return pictures


# --- telling -----------------------------------------------------------------------------------------------------


def _print_leaks(leaks: Sequence["Leak"]) -> None:
    print("probe, words and columns that give a field away alone:")
    if not leaks:
        print("  none found")
    for task in dict.fromkeys(leak.task for leak in leaks):
        own = [leak for leak in leaks if leak.task == task]
        for leak in own[:_SHOWN_LEAKS]:
            print(f"  {leak.line()}")
        if len(own) > _SHOWN_LEAKS:
            print(
                f"  ... and {len(own) - _SHOWN_LEAKS} more of {task}: " + ", ".join(x.what for x in own[_SHOWN_LEAKS:])
            )
    sys.stdout.flush()


def _leak_json(leak: "Leak") -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(leak)


def _print_evaluation(evaluation: "Evaluation") -> None:
    from pathopipe.cli.progress import format_table
    from pathopipe.metadata.evaluate import ALL, MULTITASK

    single = {one.view for one in evaluation.figures if one.view[0] == MULTITASK and one.view[1] != ALL}
    # Where there is one source only, it is all there is.
    passed_over = single if len(single) == 1 else set()
    rows = []
    for one in evaluation.figures:
        if one.view in passed_over:
            continue
        if one.table is None:
            rows.append([one.task, _view(one.view), "none", "", "", "", "", one.why])
            continue
        known = {figure.name: figure for figure in one.table.figures if not figure.label and not figure.site}
        shown = [known[name].text() if name in known else "" for name in ("auroc", "auprc", "balanced_accuracy", "ece")]
        if "spearman" in known:
            shown[0] = f"Spearman {known['spearman'].text()}"
        given = "" if not one.classes else f"{one.n_given} of {one.n_slides}"
        right = "" if one.given_right is None else f"{one.given_right:.3f}"
        rows.append([one.task, _view(one.view), *shown, given, right, str(one.n_patients)])
    header = ("task", "model", "AUROC", "AUPRC", "balanced accuracy", "ECE", "given", "right", "patients")
    print("\nout of fold, 95 % intervals over patients:")
    print(format_table(header, [[*row, *[""] * (len(header) - len(row))] for row in rows]))
    for gain in evaluation.gains:
        if gain.view in passed_over:
            continue
        what = f"{_view(gain.view)} over {_view(gain.over)}, {gain.task or 'mean of the tasks'}"
        if gain.difference is None:
            print(f"gain of {what}: none, {gain.note}")
            continue
        interval = "" if gain.low is None or gain.high is None else f" ({gain.low:+.3f} to {gain.high:+.3f})"
        print(
            f"gain of {what}: AUROC {gain.value:.3f} against {gain.baseline:.3f}, {gain.difference:+.3f}{interval}, "
            f"{gain.n_patients} patients"
        )
    for note in evaluation.notes:
        print(f"  {note}")


def _view(view: "View") -> str:
    return f"{view[0]}, {view[1]}"


def _review_table(found: Sequence["Contradiction"]) -> list[list[str]]:
    return [
        [
            str(number),
            one.slide_id,
            one.task,
            one.recorded or "none",
            one.predicted or "none",
            f"{one.surety:.3f}",
        ]
        for number, one in enumerate(found[:_SHOWN_ROWS], 1)
    ]
