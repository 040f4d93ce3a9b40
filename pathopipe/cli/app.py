"""The ``pathopipe`` program: its commands, how errors become one line, and the exit codes."""

import errno
import io
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import typer

import pathopipe
from pathopipe.cli import (
    cohort,
    demo,
    doctor,
    encoders,
    export,
    importing,
    info,
    metadata,
    mil,
    report,
    run,
    segment,
    segmenter,
    stages,
    synth,
    verify,
)
from pathopipe.cli.options import refuse_urls
from pathopipe.cli.receipts import recorded, recorded_app
from pathopipe.errors import PathopipeError, UsageError

__all__ = ["app", "main"]

EXIT_FAILED = 1
EXIT_WRONG_USE = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="pathopipe",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="""Whole-slide pathology: slides in; tissue, tiles, embeddings, objects and predictions out.

    \b
    Start here:
      pathopipe demo                          draw a slide and run everything on it
      pathopipe run SLIDE.svs --out results   embeddings of a slide, a folder or a manifest
      pathopipe segment SLIDE.svs --out results   its nuclei, for QuPath
    """,
)
app.command("demo", short_help="Draw a slide and run everything on it.")(demo.demo)
app.command("run", short_help="Tissue, tiles and embeddings of slides; resumes.")(run.run)
app.command("info", short_help="What a slide says of itself.")(info.info)
app.command("tissue", short_help="One stage: find the tissue of a slide.")(stages.tissue)
app.command("tiles", short_help="One stage: lay the tile grid over the tissue.")(stages.tiles)
app.command("embed", short_help="One stage: embed the tiles.")(stages.embed)
app.command("segment", short_help="Objects of a slide: nuclei, glands, cells, tissue types; for QuPath.")(
    recorded(segment.segment)
)
app.command("verify", short_help="Read every array; exit 0 if all is sound.")(recorded(verify.verify))
app.command("report", short_help="One HTML page of an output folder.")(report.report)
app.command("synth", short_help="Draw an H&E slide with known truth.")(synth.synth)
app.command("doctor", short_help="What this machine has, and what is missing.")(doctor.doctor)
app.add_typer(cohort.app, name="cohort")
app.add_typer(encoders.app, name="encoders")
app.add_typer(recorded_app(export.app), name="export")
app.add_typer(importing.app, name="import")
app.add_typer(metadata.app, name="metadata")
app.add_typer(mil.app, name="mil")
app.add_typer(segmenter.app, name="segmenter")
refuse_urls(app)


class _Interrupted(BaseException):
    """SIGINT or SIGTERM; no library catches it by mistake."""


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    # A second signal must not break into the tidying up after the first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Interrupted


@app.callback(invoke_without_command=True)
def _top(version: bool = typer.Option(False, "--version", help="Show the version and exit.", is_eager=True)) -> None:
    if version:
        print(f"pathopipe {pathopipe.__version__}")
        raise typer.Exit


def main() -> None:
    """Run the program; an error that pathopipe knows is one line and an exit code, a bug keeps its traceback."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal can't show ends nothing
    try:
        app()
        sys.stdout.flush()
    except PathopipeError as error:
        print(f"pathopipe: {str(error).strip()}".replace("\n", "\n  "), file=sys.stderr)
        sys.exit(EXIT_WRONG_USE if isinstance(error, UsageError) else EXIT_FAILED)
    except _Interrupted:
        how = "run again without --fresh to go on" if "--fresh" in sys.argv else "the same command goes on from there"
        print(f"pathopipe: interrupted; what was finished is kept, {how}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output has gone; the interpreter would complain once more when it flushes.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
        sys.exit(EXIT_FAILED)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print("pathopipe: the output of this command can't be written, the disk is full", file=sys.stderr)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
        sys.exit(EXIT_FAILED)
