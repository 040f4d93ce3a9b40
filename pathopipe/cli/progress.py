"""What a run says while it works: a bar on a terminal, plain lines elsewhere, always on stderr."""

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from pathopipe.pipeline import SlideOutcome

__all__ = ["BarProgress", "RunProgress", "WindowProgress", "describe_outcome", "format_table"]


class BarProgress:
    """A bar on a terminal while it is entered, none elsewhere."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._bar = _start_bar(self._what)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tell(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)


class RunProgress(BarProgress):
    """Tells of slides and tiles as they are done."""

    def __init__(self, n_slides: int) -> None:
        super().__init__("tiles")
        self._n_slides = n_slides
        self._n_ended = 0
        self._tasks: dict[str, TaskID] = {}

    def on_tiles(self, slide_id: str, done: int, total: int) -> None:
        """Tiles of one slide are done."""
        if self._bar is None:
            return
        if slide_id not in self._tasks:
            self._tasks[slide_id] = self._bar.add_task(slide_id, total=total)
        self._bar.update(self._tasks[slide_id], completed=done)

    def on_slide(self, outcome: "SlideOutcome") -> None:
        """One slide has ended."""
        self._n_ended += 1
        if self._bar is not None and outcome.slide_id in self._tasks:
            self._bar.remove_task(self._tasks.pop(outcome.slide_id))
        self.tell(f"[{self._n_ended}/{self._n_slides}] {describe_outcome(outcome)}")


class WindowProgress(BarProgress):
    """Tells of the windows of one slide: a bar on a terminal, a line every half minute elsewhere."""

    _EVERY_S = 30.0

    def __init__(self, slide_id: str) -> None:
        super().__init__("windows")
        self._slide_id = slide_id
        self._task: TaskID | None = None
        self._told = time.monotonic()

    def on_windows(self, done: int, total: int) -> None:
        """Some windows are done."""
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(self._slide_id, total=total)
            self._bar.update(self._task, completed=done)
        elif time.monotonic() - self._told >= self._EVERY_S:
            self._told = time.monotonic()
            self.tell(f"{self._slide_id}: {done} of {total} windows")


def _start_bar(what: str) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(what))
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    bar.start()
    return bar


def describe_outcome(outcome: "SlideOutcome") -> str:
    """One line: what became of a slide, how long it took, and where the time went."""
    if outcome.status == "failed":
        return f"{outcome.slide_id}: FAILED after {outcome.seconds:.1f} s: {outcome.reason}"
    bad = f" ({outcome.bad_tiles} bad)" if outcome.bad_tiles else ""
    parts = [
        f"{outcome.slide_id}: {'done' if outcome.did else 'was done already'} in {outcome.seconds:.1f} s",
        f"{outcome.tissue_mm2:.2f} mm2 tissue",
        f"{outcome.tiles} tiles{bad}",
    ]
    if outcome.report.tiles:
        spent = {"prepare": outcome.prepare_s, **outcome.report.seconds()}
        parts.append(", ".join(f"{name} {value:.1f} s" for name, value in spent.items()))
        parts.append(f"embedding limited by {outcome.report.limited_by()}")
    if outcome.flags:
        parts.append("flags: " + ", ".join(outcome.flags))
    parts += [f"note: {problem}" for problem in outcome.problems]
    return " · ".join(parts)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text columns, aligned, two blanks apart."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )
