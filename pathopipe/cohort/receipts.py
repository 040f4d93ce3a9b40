"""Receipts: one small file a slide and stage that says how the stage ended; a workflow waits for these, not folders.

``OUT/done/<stage>/<slide_id>.json`` is whole or absent. A failed slide has a receipt, too: that it failed is a result.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from pathopipe.errors import StoreError, StoreWriteError, UsageError
from pathopipe.files import durable_file
from pathopipe.remote import RemotePath

__all__ = [
    "Receipt",
    "ReceiptPlace",
    "Status",
    "begun_before",
    "read_receipt",
    "read_receipts",
    "receipt_place",
    "write_receipt",
]

Status = Literal["ok", "failed", "passed-over"]
"""``passed-over``: not tried, because an earlier stage of the slide failed."""

_FOLDER: Final = "done"
_BEGUN: Final = ".begun"


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """How one stage of one slide ended."""

    slide_id: str
    stage: str
    status: Status
    reason: str = ""
    """Why it failed or was passed over; empty where all is well."""
    inputs: str = ""
    """Hash of what the stage's results were computed from."""
    seconds: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What came of it: tissue in mm2, number of tiles, of objects; JSON values."""


@dataclass(frozen=True, slots=True)
class ReceiptPlace:
    """What the path of a receipt says."""

    out: Path
    stage: str
    slide_id: str


def receipt_place(path: Path) -> ReceiptPlace:
    """Take the path of a receipt apart.

    Raises:
        UsageError: It is not ``OUT/done/STAGE/SLIDE_ID.json``.
    """
    if path.suffix != ".json" or path.parent.parent.name != _FOLDER:
        raise UsageError(f"--receipt {path}: a receipt is OUT/{_FOLDER}/STAGE/SLIDE_ID.json")
    return ReceiptPlace(path.parents[2], path.parent.name, path.name.removesuffix(".json"))


def write_receipt(path: Path, receipt: Receipt) -> None:
    """Write a receipt, whole or not at all.

    Raises:
        StoreWriteError: The folder can't be written.
    """
    with durable_file(path) as file:
        file.write(json.dumps(asdict(receipt), ensure_ascii=False, indent=1, sort_keys=True).encode() + b"\n")


def read_receipt(path: Path) -> Receipt:
    """Read a receipt.

    Raises:
        StoreError: It can't be read, or is no receipt.
    """
    try:
        receipt = Receipt(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{path}: not a readable receipt ({error}); delete it, and run the workflow again") from None
    if receipt.status not in get_args(Status):
        raise StoreError(f"{path}: unknown status {receipt.status!r}; delete it, and run the workflow again")
    return receipt


def read_receipts(out: Path) -> Iterator[tuple[Path, Receipt]]:
    """All receipts of a folder with their paths: stages by name, then slides by id.

    Raises:
        StoreError: One of them can't be read.
    """
    for folder in sorted(path for path in (out / _FOLDER).glob("*") if path.is_dir()):
        # Hidden files are receipts that are being written, and marks of what has begun.
        for path in sorted(path for path in folder.glob("*.json") if not path.name.startswith(".")):
            yield path, read_receipt(path)


@contextlib.contextmanager
def begun_before(path: Path) -> Iterator[int]:
    """Keep count of how often the work behind a receipt has begun and was killed before it could say how it ended.

    Out of memory and out of time leave no message behind, only the mark that this writes at the start and takes away
    at the end, whatever exception the end is.

    Yields:
        How many tries were killed so far.

    Raises:
        StoreWriteError: The folder can't be written.
    """
    mark = path.parent / f".{path.name}{_BEGUN}"
    try:
        killed = int(mark.read_text())
    except (OSError, ValueError):
        killed = 0
    try:
        if isinstance(mark, RemotePath):
            mark.write_text(str(killed + 1))
        else:
            mark.parent.mkdir(parents=True, exist_ok=True)
            temporary = mark.with_name(f"{mark.name}.{os.getpid()}")
            temporary.write_text(str(killed + 1))
            temporary.replace(mark)
    except OSError as error:
        raise StoreWriteError(
            f"{mark.parent}: can't be written ({error.strerror}); free space or choose another --out"
        ) from error
    try:
        yield killed
    finally:
        mark.unlink(missing_ok=True)
