"""How a slide that can't be done is recorded, and whether the output folder takes files at all."""

import traceback
from pathlib import Path

from pathopipe.errors import PathopipeError, StoreBusyError, StoreChangedError, StoreWriteError, UsageError
from pathopipe.files import durable_file, remove_leftovers
from pathopipe.pipeline import RunPlan, SlideOutcome
from pathopipe.records import SlideRef
from pathopipe.remote import RemotePath, check_rights

__all__ = ["check_writable", "failed", "reason_of"]


def check_writable(out: Path) -> None:
    """Make sure that the output folder takes files.

    Raises:
        UsageError: It is a file; there is no such bucket, or its server can't keep two runs apart.
        StoreWriteError: It does not: no permission, read-only, or full; no answer.
    """
    if isinstance(out, RemotePath):
        try:
            check_rights(out)
        except OSError as error:
            raise StoreWriteError(
                f"{out}: the output folder can't be written ({error.strerror or error}); what was finished before is "
                "kept: mend that or choose another --out, then run the same command again"
            ) from None
        return
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: this is a file; name a folder")
    probe = out / ".write-test"
    try:
        with durable_file(probe) as file:
            file.write(bytes(64 * 1024))
        probe.unlink(missing_ok=True)  # another run may be trying the same
        remove_leftovers(out, deep=False)
    except OSError as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise StoreWriteError(
            f"{out}: the output folder can't be written ({cause.strerror}); what was finished before is kept: "
            "free space or choose another --out, then run the same command again"
        ) from None


def failed(ref: SlideRef, plan: RunPlan, error: Exception, seconds: float) -> SlideOutcome:
    """The outcome of a slide that an error ended; see :func:`reason_of`.

    Raises:
        StoreWriteError: The output folder takes no files any more.
    """
    return SlideOutcome(
        slide_id=ref.slide_id,
        status="failed",
        reason=reason_of(ref, plan.out, error),
        refused=isinstance(error, StoreChangedError | StoreBusyError),
        seconds=seconds,
    )


def reason_of(ref: SlideRef, out: Path, error: Exception) -> str:
    """What a user is told of an error that ended a slide; that of a bug is written to ``logs/<slide_id>.txt``, too.

    Raises:
        StoreWriteError: The output folder takes no files any more.
    """
    if isinstance(error, StoreWriteError):
        check_writable(out)  # a full disk fails every slide behind this one: say so once, now
    reason = str(error)
    if not isinstance(error, PathopipeError):
        log = out / "logs" / f"{ref.slide_id}.txt"
        with durable_file(log) as file:
            file.write("".join(traceback.format_exception(error)).encode())
        reason = f"{ref.slide_id}: unexpected {type(error).__name__} ({error}); the traceback is in {log}"
    return " ".join(reason.split())
