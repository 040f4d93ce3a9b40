"""``pathopipe run``: slides, folders or a manifest through all stages."""

import contextlib
import os
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pathopipe.cli.options import (
    ConfigFile,
    Device,
    EncoderNames,
    OutPlace,
    Settings,
    SlidePlaces,
    read_config,
)
from pathopipe.cli.progress import RunProgress, format_table
from pathopipe.remote import RemotePath

if TYPE_CHECKING:
    from pathopipe.cluster import Place
    from pathopipe.config import Config
    from pathopipe.pipeline import RunPlan, SlideOutcome
    from pathopipe.records import SlideRef

__all__ = ["run", "run_and_tell"]

_MANIFEST_SUFFIXES = {".csv", ".tsv", ".txt"}
_LONGEST_TABLE = 60
# So that a report of a cohort that is under way, or was killed, knows what became of its slides.
_SUMMARY_EVERY_S = 30.0
_SUMMARY_HELD_S = 30.0


class BatchSystem(StrEnum):
    """Where jobs can be asked for."""

    SLURM = "slurm"


class FreshStage(StrEnum):
    """Stages that can be forgotten."""

    TISSUE = "tissue"
    TILES = "tiles"
    EMBED = "embed"


def run(
    slides: SlidePlaces,
    out: OutPlace,
    encoder: EncoderNames = None,
    device: Device = None,
    config: ConfigFile = None,
    settings: Settings = None,
    workers: Annotated[
        str, typer.Option(metavar="N|auto", help="Processes on this machine; auto: by cores, memory and GPUs.")
    ] = "1",
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS|FILE", help="A Dask scheduler that runs already, whose workers do the work."),
    ] = None,
    cluster: Annotated[
        BatchSystem | None, typer.Option(help="Start workers as batch jobs; what to ask for: config section cluster.")
    ] = None,
    fresh: Annotated[
        FreshStage | None, typer.Option(help="Forget this stage and what depends on it, and compute it anew.")
    ] = None,
    retry_bad: Annotated[bool, typer.Option("--retry-bad", help="Compute chunks with bad tiles again.")] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Record missing slide files as failed instead of stopping.")
    ] = False,
) -> None:
    """Find tissue, cut tiles and embed them, for one slide or thousands; run again to go on where it stopped.

    \b
    Examples:
      pathopipe run slide.svs --out results
      pathopipe run slides/ --out results --workers auto
      pathopipe run cohort.csv --out results --cluster slurm --set cluster.queue=short --set cluster.workers=20
      pathopipe run cohort.csv --out results --scheduler tcp://node1:8786
      pathopipe run cohort.csv --out results --encoder uni2-h,virchow2 --device cuda
      pathopipe run slide.tif --out results --set slide.mpp=0.25 --set tiles.side_px=512
      pathopipe run slides/ --out results --fresh tiles --set tiles.min_tissue=0.5

    Tiles are cut as each encoder's authors did ("pathopipe encoders show NAME"), unless tiles.side_px or tiles.mpp say
    otherwise; encoders that want the same tiles share what is read.
    A manifest is a CSV with the columns slide_id and path, and if wanted mpp, patient_id and labels.
    Several runs may share one output folder: each slide is written by one of them at a time.
    Exit code: 0 all done, 1 some slide failed, 2 wrong use, 130 interrupted.
    """
    from pathopipe.pipeline import RunPlan

    of_cluster = [text for text in settings or () if text.strip().startswith("cluster.")]
    of_stages = [text for text in settings or () if text not in of_cluster]
    settled = read_config(config, of_stages, encoder=encoder, device=device)
    place, cores = _place(workers, scheduler, cluster, settled, config, of_cluster)
    refs = gather(slides, allow_missing=allow_missing)
    plan = RunPlan(
        out=out,
        config=settled,
        fresh=fresh.value if fresh else None,
        retry_bad=retry_bad,
        threads=max(1, cores // place.workers),
    )
    outcomes = run_and_tell(refs, plan, place=place)
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(1)


def _place(
    workers: str,
    scheduler: str | None,
    cluster: BatchSystem | None,
    config: "Config",
    config_file: Path | None,
    settings: Sequence[str],
) -> tuple["Place", int]:
    """Where to compute, and the cores of this machine."""
    from pathopipe.cluster import Place, auto_workers, find_gpus, load_cluster_settings, machine_limits
    from pathopipe.errors import UsageError

    given = [name for name, value in (("--scheduler", scheduler), ("--cluster", cluster)) if value is not None]
    given += ["--workers"] if workers != "1" else []
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other; give one of them")
    if settings and cluster is None:
        raise UsageError(f"--set {settings[0]}: settings of a cluster are used with --cluster slurm")
    limits = machine_limits(os.environ)
    if scheduler is not None:
        return Place(scheduler=scheduler), limits.cores
    if cluster is not None:
        return Place(slurm=load_cluster_settings(config_file, settings)), limits.cores
    if workers != "auto" and (not workers.isdecimal() or int(workers) < 1):
        raise UsageError(f"--workers {workers}: give a number from 1, or auto")
    if workers == "1":
        return Place(), limits.cores
    gpus = find_gpus(os.environ, config)
    if workers == "auto":
        number = auto_workers(limits, config, gpus)
        on_gpus = f", {len(gpus)} GPU{'s' * (len(gpus) > 1)}" if gpus else ""
        print(
            f"note: {number} worker{'s' * (number > 1)} for {limits.cores} cores, "
            f"{limits.memory_bytes / 2**30:.1f} GiB of memory{on_gpus}",
            file=sys.stderr,
        )
    else:
        number = int(workers)
        if gpus and number > len(gpus):
            print(
                f"note: {number} workers share {len(gpus)} GPU{'s' * (len(gpus) > 1)}; one a GPU is usual, which is "
                "what --workers auto gives",
                file=sys.stderr,
            )
    return Place(workers=number, gpus=gpus), limits.cores


def run_and_tell(
    refs: Sequence["SlideRef"], plan: "RunPlan", workers: int = 1, place: "Place | None" = None
) -> list["SlideOutcome"]:
    """Run slides with progress on stderr; print and keep the summary."""
    from pathopipe.cluster import run_cohort
    from pathopipe.report.summary import update_summary

    outcomes: list[SlideOutcome] = []
    written = 0
    told = time.monotonic()

    def ended(outcome: "SlideOutcome") -> None:
        outcomes.append(outcome)
        progress.on_slide(outcome)
        if time.monotonic() - told > _SUMMARY_EVERY_S:
            write_summary()

    def write_summary() -> None:
        nonlocal written, told
        # What was refused has changed nothing, so what is known of the slide stays.
        rows = [_summary_row(outcome) for outcome in outcomes[written:] if not outcome.refused]
        if rows:
            with _summary_held(plan.out):
                update_summary(plan.out / "summary.csv", rows)
        written, told = len(outcomes), time.monotonic()

    try:
        with RunProgress(len(refs)) as progress:
            run_cohort(
                refs,
                plan,
                workers=workers,
                place=place,
                on_slide=ended,
                on_tiles=progress.on_tiles,
                on_note=lambda note: print(f"note: {note}", file=sys.stderr, flush=True),
            )
    finally:
        write_summary()
    _print_summary(outcomes, plan.out)
    return outcomes


@contextlib.contextmanager
def _summary_held(out: Path) -> Iterator[None]:
    """Keep other runs from the summary while it is read, added to and written."""
    from pathopipe.errors import StoreBusyError
    from pathopipe.store.claims import one_writer

    deadline = time.monotonic() + _SUMMARY_HELD_S
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(one_writer(out / ".summary.lock", "the summary"))
                break
            except StoreBusyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield


def gather(paths: Sequence[Path], *, allow_missing: bool) -> list["SlideRef"]:
    """The slides that the arguments name, checked before any work starts.

    Raises:
        UsageError: Something is missing, unsafe or there twice.
    """
    from pathopipe.cohort import check_refs, read_manifest
    from pathopipe.errors import UsageError
    from pathopipe.records import SlideRef
    from pathopipe.slide.find import find_slides

    refs: list[SlideRef] = []
    for path in paths:
        if path.suffix.lower() in _MANIFEST_SUFFIXES:
            refs += read_manifest(path, allow_missing=allow_missing)
        elif isinstance(path, RemotePath) and not allow_missing and not path.is_file():
            raise UsageError(f"{path}: no such object; check the URL; slides of a whole folder go into a manifest")
        elif path.is_dir():
            found = find_slides(path)
            if not found:
                raise UsageError(f"{path}: no slide in this folder; give a slide file, or a manifest that names them")
            refs += found
        elif path.exists() or allow_missing:
            refs.append(SlideRef(unicodedata.normalize("NFC", path.stem), path))
        else:
            raise UsageError(f"{path}: no such file; check the path, or use --allow-missing to record it as failed")
    check_refs(refs, where=", ".join(map(str, paths)))
    return refs


def _summary_row(outcome: "SlideOutcome") -> dict[str, object]:
    return {
        "slide_id": outcome.slide_id,
        "status": outcome.status,
        "reason": outcome.reason,
        "tissue_mm2": outcome.tissue_mm2,
        "tiles": outcome.tiles,
        "bad_tiles": outcome.bad_tiles,
        "mpp": outcome.mpp,
        "flags": " ".join(outcome.flags),
        "seconds": f"{outcome.seconds:.1f}",
    }


def _print_summary(outcomes: Sequence["SlideOutcome"], out: Path) -> None:
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    shown = outcomes if len(outcomes) <= _LONGEST_TABLE else failed
    if shown:
        header = ("slide", "status", "tissue mm2", "tiles", "bad", "um/px", "seconds", "flags")
        rows = [
            (
                outcome.slide_id,
                outcome.status,
                f"{outcome.tissue_mm2:.2f}",
                str(outcome.tiles),
                str(outcome.bad_tiles),
                outcome.mpp,
                f"{outcome.seconds:.1f}",
                " ".join(outcome.flags),
            )
            for outcome in shown
        ]
        print(format_table(header, rows))
    tiles = sum(outcome.tiles for outcome in outcomes)
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} slides done, {tiles} tiles; results in {out}")
    for outcome in failed:
        print(f"failed: {outcome.reason}")
