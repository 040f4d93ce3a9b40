"""``pathopipe mil``: trains slide classifiers from bags of tiles, with honest numbers."""

import sys
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pathopipe.cli import mil_results
from pathopipe.cli.options import ConfigFile, EncoderNames, Location, Out, parse_place

if TYPE_CHECKING:
    from pathopipe.mil.ranking import Ranking
    from pathopipe.mil.train import Cohort, TrainRequest

__all__ = ["app", "train"]

app = typer.Typer(
    name="mil",
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Slide classifiers from bags of tiles: train, evaluate, predict, heatmap.""",
    short_help="Slide classifiers from bags of tiles.",
)

_CONFOUNDS = "site,scanner,batch"


class BagOf(StrEnum):
    """What a bag is."""

    SLIDE = "slide"
    PATIENT = "patient"


class Device(StrEnum):
    """Where networks are trained."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


@app.command("train", short_help="Train models over patient-grouped folds; resumes.")
def train(
    manifest: Annotated[Path, typer.Option(metavar="CSV", help="Slides and labels: slide_id, patient_id, labels.")],
    features: Annotated[
        Location,
        typer.Option(parser=parse_place, metavar="DIR|URL", help="Stores, or feature files of other programs."),
    ],
    target: Annotated[str, typer.Option(metavar="COLUMN,..", help="Label columns; time:event for survival.")],
    out: Out,
    kind: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="auto, binary, multiclass, multilabel, ordinal, regression, survival_cox or survival_discrete; "
            "one for all targets or one each.",
        ),
    ] = "auto",
    head: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="mean, max, abmil, clam_sb, clam_mb, dsmil, transmil, additive; logistic is always trained beside.",
        ),
    ] = "abmil",
    encoder: EncoderNames = None,
    grid: Annotated[str | None, typer.Option(help="Tile grid, where stores have several.")] = None,
    folds: Annotated[int, typer.Option(min=2, help="Test folds; a split column of the manifest goes before.")] = 5,
    by: Annotated[BagOf, typer.Option(help="One bag a slide, or all slides of a patient in one.")] = BagOf.SLIDE,
    leave_sites_out: Annotated[
        bool, typer.Option("--leave-sites-out", help="Test on sites that were not trained on.")
    ] = False,
    covariates: Annotated[
        str | None, typer.Option(metavar="COLUMN,..", help="Columns given to the model beside the tiles.")
    ] = None,
    confounds: Annotated[
        str,
        typer.Option(
            metavar="COLUMN,..", help="Columns of which the confound report says how well features tell them."
        ),
    ] = _CONFOUNDS,
    seed: Annotated[int, typer.Option(min=0, help="Of folds, weights and samples.")] = 0,
    config: ConfigFile = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="mil.KEY=VALUE", help="One setting of training; may be given several times."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Dask processes that share the models to train.")] = 1,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Dask scheduler whose workers train instead; they must see the same files."
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Threads to keep busy, by all --workers.  [default: all usable cores]"),
    ] = None,
    device: Annotated[Device, typer.Option(help="Where networks are trained.")] = Device.AUTO,
) -> None:
    """Train models over folds that keep patients whole, and say how good they are; run again to go on.

    \b
    Examples:
      pathopipe mil train --manifest labels.csv --features results --target tumour --out model
      pathopipe mil train --manifest labels.csv --features results --target grade --kind ordinal --out model
          --head abmil,clam_sb,mean --workers 4 --set "mil.classes.grade=[low, mid, high]"
      pathopipe mil train --manifest labels.csv --features results --target days:died --by patient --out model
      pathopipe mil train --manifest labels.csv --features results --target msi --covariates age,sex --out model

    Before any result a report says how well site, scanner and batch can be told from the features. Written into --out:
    config.json, splits.csv, confounds.json, a folder ENCODER/HEAD/foldK with model.safetensors, model.json, history.csv
    and predictions.csv for each model, results.csv and results.json.
    """
    import logging

    from pathopipe.cluster import check_writable, spread_calls, usable_cores
    from pathopipe.mil.fit import choose_device
    from pathopipe.mil.ranking import rank_models, write_results
    from pathopipe.mil.settings import load_mil_config
    from pathopipe.mil.train import TrainRequest, check_output, one_by_one, open_cohorts, train_all

    logging.basicConfig(format="note: %(message)s", level=logging.WARNING, stream=sys.stderr)
    request = TrainRequest(
        manifest=manifest,
        features=features,
        target=target,
        out=out,
        kind=kind,
        heads=_names(head),
        encoders=_names(encoder or ""),
        grid=grid,
        folds=folds,
        by=by.value,
        whole_sites=leave_sites_out,
        seed=seed,
        covariates=_names(covariates or ""),
        settings=load_mil_config(config, settings or ()),
        device=choose_device(device.value),
        threads=max(1, (threads or usable_cores()) // workers),
    )
    cohorts, notes = open_cohorts(request)
    for note in notes:
        _say(f"note: {note}")
    check_writable(out)
    check_output(request, cohorts)
    _say(_describe_cohort(cohorts[0]))
    _report_confounds(request, cohorts, _names(confounds), is_default=confounds == _CONFOUNDS)
    over_dask = partial(spread_calls, workers=workers, scheduler=scheduler)
    jobs = train_all(request, cohorts, _say, over_dask if workers > 1 or scheduler is not None else one_by_one)
    ranking = rank_models(request, cohorts, jobs)
    write_results(out, ranking)
    _print_ranking(ranking)
    print(f"results: {out / 'results.csv'}")


app.command("evaluate", short_help="Figures, intervals and plots of trained models.")(mil_results.evaluate)
app.command("predict", short_help="Logits and attention of slides, into their stores.")(mil_results.predict)
app.command("heatmap", short_help="What a model looked at, as pictures and GeoJSON.")(mil_results.heatmap)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _describe_cohort(cohort: "Cohort") -> str:
    tiles = sum(bag.n_tiles for bag in cohort.bags)
    parts = [f"{len(cohort.bags)} bags of {len(set(cohort.patients))} patients, {tiles} tiles"]
    for spec in cohort.specs:
        if spec.kind == "binary":
            parts.append(f"{spec.name}: binary, positive is {spec.classes[1]}")
        else:
            parts.append(f"{spec.name}: {spec.kind}" + (f" ({', '.join(spec.classes)})" if spec.classes else ""))
    return "; ".join(parts)


def _report_confounds(
    request: "TrainRequest", cohorts: Sequence["Cohort"], names: Sequence[str], *, is_default: bool
) -> None:
    import json

    from pathopipe.files import durable_file
    from pathopipe.mil.confounds import confound_report
    from pathopipe.mil.ranking import size_line

    found = {}
    for cohort in cohorts:
        known = {"site", *cohort.table.columns}
        # The usual names are looked for; names that were asked for must be there.
        chosen = [name for name in names if name in known or not is_default]
        columns = {name: cohort.table.column(name) for name in chosen}
        columns = {name: cells for name, cells in columns.items() if any(cells)}
        report = confound_report(cohort.bags, cohort.strata, columns, folds=cohort.folds, seed=request.seed)
        print(f"confounds, {cohort.encoder}:")
        for line in (*report.lines(), size_line(cohort)):
            print(f"  {line}")
        found[cohort.encoder] = report.to_json()
    with durable_file(request.out / "confounds.json") as file:
        file.write(json.dumps(found, indent=1).encode())
    sys.stdout.flush()


def _print_ranking(ranking: "Ranking") -> None:
    from pathopipe.cli.progress import format_table
    from pathopipe.mil.evaluate import TITLES

    for target in ranking.targets:
        tables = target.tables
        first = next(iter(tables.values()))
        names = list(dict.fromkeys(figure.name for figure in first.figures if not figure.label and not figure.site))[:5]
        header = ["model", *(TITLES[name] for name in names), "patients"]
        rows = [
            [model, *(table.find(name).text() for name in names), str(table.n_patients)]
            for model, table in tables.items()
        ]
        print(f"\n{target.target}, test folds together (95 % interval over patients):")
        print(format_table(header, rows))
        for line in target.lines():
            print(line)
