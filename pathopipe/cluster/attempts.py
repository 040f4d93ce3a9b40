"""Does some work for slide after slide in this process, whatever becomes of each."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pathopipe.cluster.outcomes import reason_of
from pathopipe.errors import StoreBusyError
from pathopipe.records import SlideRef

__all__ = ["Attempt", "attempt_each"]

_ASKS_AGAIN_S = 2.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Attempt(Generic[T]):
    """How the work for one slide ended."""

    ref: SlideRef
    result: T | None
    """What came of it; None where it failed."""
    reason: str
    """Why it failed; empty where it did not."""
    seconds: float


def attempt_each(
    refs: Sequence[SlideRef],
    out: Path,
    work: Callable[[SlideRef], T],
    on_note: Callable[[str], None] = lambda note: None,
) -> Iterator[Attempt[T]]:
    """Yield how the work for each slide ended, as it ends; a slide that fails does not stop the others.

    A slide that another process is writing is put off until the others are done, and then waited for.

    Args:
        refs: The slides.
        out: The output folder; the traceback of an error that is a bug goes to its ``logs``.
        work: What to do with a slide.
        on_note: Told, once a slide, that another process is writing it.

    Raises:
        StoreWriteError: The output folder no longer takes any file. What was finished is kept.
    """
    waiting = deque(refs)
    busy: dict[str, SlideRef] = {}
    told: set[str] = set()
    while waiting or busy:
        if not waiting:
            time.sleep(_ASKS_AGAIN_S)
            waiting.extend(busy.values())
            busy.clear()
        ref = waiting.popleft()
        started = time.perf_counter()
        try:
            attempt = Attempt(ref, work(ref), "", time.perf_counter() - started)
        except StoreBusyError as error:
            busy[ref.slide_id] = ref
            if ref.slide_id not in told:
                told.add(ref.slide_id)
                on_note(f"put off: {str(error).removesuffix('; wait for it, then run again')}")
            continue
        except Exception as error:  # whatever is wrong with one slide, the cohort goes on
            attempt = Attempt(ref, None, reason_of(ref, out, error), time.perf_counter() - started)
        yield attempt
