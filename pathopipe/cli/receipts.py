"""Options for commands that a workflow calls: ``--receipt`` and its kin. A failed slide becomes a result on file."""

import contextlib
import functools
import inspect
import io
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from pathopipe.cohort.receipts import Receipt, ReceiptPlace, Status
    from pathopipe.store import SlideStore

__all__ = ["recorded", "recorded_app"]

_OPTIONS: dict[str, tuple[Any, Any]] = {
    "receipt": (
        Annotated[
            Path | None,
            typer.Option(
                metavar="FILE",
                help="Say here how the slide ended, OUT/done/STAGE/SLIDE_ID.json; a slide that fails is written down, "
                "and the exit code is 0.",
            ),
        ],
        None,
    ),
    "after": (
        Annotated[
            list[Path] | None,
            typer.Option(
                metavar="FILE", help="With --receipt: pass the slide over where this receipt says that it failed."
            ),
        ],
        None,
    ),
    "check": (
        Annotated[bool, typer.Option("--check", help="With --receipt: read back what was stored, as verify does.")],
        False,
    ),
    "give_up_after": (
        Annotated[
            int,
            typer.Option(
                metavar="N", min=1, help="With --receipt: the slide has failed when it was killed this often."
            ),
        ],
        3,
    ),
}

_LONGEST_REASON = 1000
# The groups of a store that a stage writes.
_GROUPS = {"tissue": "tissue", "tiles": "tiles", "embed": "embeddings", "segment": "objects"}


def recorded(command: Callable[..., None]) -> Callable[..., None]:
    """The same command with the options of a workflow.

    With ``--receipt`` whatever is wrong with the slide ends in the receipt and not in an exit code. Wrong options, a
    disk that is full, a store that another process is writing and too little memory are not the slide's fault: they
    end the command as ever, without a receipt, so that the workflow tries again or stops.
    """

    @functools.wraps(command)
    def with_receipt(
        *, receipt: Path | None, after: list[Path] | None, check: bool, give_up_after: int, **arguments: Any
    ) -> None:
        if receipt is None:
            if after or check:
                raise typer.BadParameter("--after and --check go with --receipt")
            command(**arguments)
            return
        slide = arguments.get("slide")
        if "slides" in arguments:
            slide, *others = arguments["slides"]
            if others:
                raise typer.BadParameter("--receipt tells of one slide; give one")

        def work() -> None:
            from pathopipe.errors import SlideOpenError

            if slide is not None and not slide.exists():
                raise SlideOpenError(f"{slide}: no such file; correct the manifest, or bring the file back")
            command(**arguments)

        _record(work, receipt, after or [], check, give_up_after)

    signature = inspect.signature(command)
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in _OPTIONS.items()
    ]
    given = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in signature.parameters.values()]
    with_receipt.__signature__ = signature.replace(parameters=[*given, *extra])  # type: ignore[attr-defined]
    return with_receipt


def recorded_app(app: typer.Typer) -> typer.Typer:
    """The same group of commands, all with the options of a workflow."""
    for command in app.registered_commands:
        if command.callback is not None:
            command.callback = recorded(command.callback)
    return app


def _record(work: Callable[[], None], path: Path, after: list[Path], check: bool, give_up_after: int) -> None:
    """Do some work and write down how it ended."""
    from pathopipe.cohort.receipts import Receipt, begun_before, read_receipt, receipt_place, write_receipt

    place = receipt_place(path)
    started = time.perf_counter()
    facts: dict[str, Any] = {}
    inputs = ""
    with begun_before(path) as killed:
        earlier = [each for each in map(read_receipt, after) if each.status != "ok"]
        status: Status = "ok"
        reason = ""
        if earlier:
            status, reason = "passed-over", _first_cause(earlier)
        elif killed >= give_up_after:
            status = "failed"
            reason = (
                f"{place.slide_id}: killed {killed} times in the middle, out of memory or of time; give this stage "
                "more of them, or leave the slide out"
            )
        else:
            reason = _attempt(work, place)
            if not reason:
                inputs, facts, reason = _look(place, check)
            status = "failed" if reason else "ok"
        write_receipt(
            path,
            Receipt(
                slide_id=place.slide_id,
                stage=place.stage,
                status=status,
                reason=reason,
                inputs=inputs,
                seconds=round(time.perf_counter() - started, 2),
                facts=facts,
            ),
        )
    if reason:
        print(f"{status}: {reason}\nwritten down in {path}", file=sys.stderr)


def _first_cause(earlier: "list[Receipt]") -> str:
    first = earlier[0]
    return first.reason if first.status == "passed-over" else f"{first.stage} failed: {first.reason}"


def _attempt(work: Callable[[], None], place: "ReceiptPlace") -> str:
    """Why the work failed; empty where it did not."""
    from pathopipe.errors import PathopipeError, StoreBusyError, StoreWriteError, UsageError
    from pathopipe.files import durable_file

    said: list[str] = []
    try:
        out, err = _Listening(sys.stdout, said), _Listening(sys.stderr, said)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            work()
    except (UsageError, typer.BadParameter, StoreBusyError, StoreWriteError, MemoryError):
        raise
    except typer.Exit as end:
        told = " ".join("".join(said).split())[:_LONGEST_REASON]
        return f"{place.slide_id}: {place.stage} ended with exit code {end.exit_code}: {told}" if end.exit_code else ""
    except PathopipeError as error:
        return " ".join(str(error).split())
    except Exception as error:  # whatever is wrong with one slide, the cohort goes on
        log = place.out / "logs" / f"{place.slide_id}.{place.stage}.txt"
        with durable_file(log) as file:
            file.write("".join(traceback.format_exception(error)).encode())
        reason = f"{place.slide_id}: unexpected {type(error).__name__} ({error}); the traceback is in {log}"
        return " ".join(reason.split())
    return ""


class _Listening(io.TextIOBase):
    """Writes on, and keeps what was written."""

    def __init__(self, stream: TextIO, said: list[str]) -> None:
        self._stream = stream
        self._said = said

    def write(self, text: str) -> int:
        self._said.append(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()


def _look(place: "ReceiptPlace", check: bool) -> tuple[str, dict[str, Any], str]:
    """What the store holds of the stage: hash of its inputs, facts, and what is wrong with it."""
    from pathopipe.store import SlideStore, digest, store_path

    path = store_path(place.out, place.slide_id)
    if place.stage not in _GROUPS or not path.exists():
        return "", {}, ""
    store = SlideStore.open(path)
    if check:
        problems = [each for each in store.problems() if each.where.split("/")[0] == _GROUPS[place.stage]]
        if problems:
            first = f"{problems[0].where}: {problems[0].what}"
            more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
            return "", {}, f"{place.slide_id}: what was stored reads back damaged ({first}{more})"
    finished = _finished(store, place.stage)
    return digest({group: about["inputs"] for group, about in finished.items()}), _facts(store), ""


def _finished(store: "SlideStore", stage: str) -> dict[str, dict[str, Any]]:
    """Attributes of the groups of a stage that are done."""
    grids = store.grids()
    groups = {
        "tissue": ["tissue"],
        "tiles": [f"tiles/{grid}" for grid in grids],
        "embed": [f"embeddings/{grid}/{encoder}" for grid in grids for encoder in store.encoders(grid)],
        "segment": [f"objects/{layer}" for layer in store.layers()],
    }
    found = {group: store.attributes(group) for group in groups[stage]}
    return {group: about for group, about in found.items() if "inputs" in about and about.get("complete", True)}


def _facts(store: "SlideStore") -> dict[str, Any]:
    """What there is of the slide by now."""
    facts: dict[str, Any] = {"mpp": " x ".join(f"{mpp:g}" for mpp in dict.fromkeys(store.slide["mpp"]))}
    for about in _finished(store, "tissue").values():
        facts["tissue_mm2"] = round(sum(about["areas_mm2"]), 3)
        facts["flags"] = about["flags"]
    facts["tiles"] = {grid: len(store.read_grid(grid)) for grid in store.grids()}
    embedded = _finished(store, "embed")
    facts["bad_tiles"] = {group.partition("/")[2]: about.get("bad_tiles", 0) for group, about in embedded.items()}
    facts["objects"] = {layer: len(store.objects(layer)) for layer in store.layers()}
    return facts
