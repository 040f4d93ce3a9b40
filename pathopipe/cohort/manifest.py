"""The manifest of a cohort: which slides there are, checked as a whole before any work starts."""

import errno
import itertools
import logging
import os
import re
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final

from pathopipe.cohort.table import quote, read_table, refuse
from pathopipe.errors import UsageError
from pathopipe.records import SlideRef
from pathopipe.remote import RemotePath, location

__all__ = ["check_refs", "check_slide_id", "double_ids", "id_problem", "read_manifest"]

logger = logging.getLogger("pathopipe")

_NEEDED: Final = ("slide_id", "path")
_SHOWN_PROBLEMS: Final = 10
# A store is named <slide_id>.zarr, and parts of it add to that; file systems end names at 255 bytes.
_MAX_ID_BYTES: Final = 200
_MPP_RANGE: Final = (0.05, 50.0)
# A local disk answers in some 10 us, a network file system in 1 ms or more.
_TIMED_LOOKS: Final = 64
_SLOW_LOOK_S: Final = 0.0002
_LOOKS_AT_ONCE: Final = 32
# An object has neither device nor inode; its URL says which it is.
_THERE: Final = os.stat_result((0,) * 10)
_ADVICE: Final = "use letters, digits, '.', '_' or '-'"
_PLAIN_ID: Final = re.compile(r"[A-Za-z0-9_-]([A-Za-z0-9 _-]|\.(?!\.)){0,198}(?<![. ])")
_RESERVED: Final = re.compile(r"(con|prn|aux|nul|com[1-9¹²³]|lpt[1-9¹²³])(\..*)?", re.IGNORECASE)
# Control, surrogate, invisible formatting, line and paragraph separators.
_UNSEEN: Final = frozenset(("Cc", "Cs", "Cf", "Zl", "Zp"))


def read_manifest(path: Path, *, allow_missing: bool = False, check_files: bool = True) -> list[SlideRef]:
    """Read and check a manifest: a CSV table with the columns ``slide_id`` and ``path``.

    UTF-8 (with or without byte-order mark) or UTF-16 with its mark; commas, semicolons or tabs, whichever the header
    uses; blank rows are passed over. Two rows that name the same file are logged as a warning, not refused: one slide
    may be wanted under two ids, with two resolutions for example.

    Args:
        path: The table. Paths in it are relative to its folder, or URLs. ``mpp`` (um/px, 0.05 to 50) may be there,
            with a decimal comma where commas do not part the columns; an empty cell is no statement. All further
            columns are kept as text.
        allow_missing: Take slides whose file is not there; they fail later, alone.
        check_files: Look whether the files are there and are different ones; False where someone has, and the
            file system is slow.

    Returns:
        The slides in the order of the table, ids in Unicode's composed form (NFC).

    Raises:
        UsageError: The table can't be read, or anything in it is wrong; one error lists every problem with its row,
            counted as a spreadsheet does.
    """
    table = read_table(path, needed=_NEEDED, kind="manifest")
    problems: list[str] = []
    rows = list(table.full_rows(problems))
    folder = str(path.parent)
    written = [values["path"].strip() for _, values in rows]
    places = [text if "://" in text else os.path.join(folder, text) for text in written]  # noqa: PTH118 (100,000 of them)
    found = _look_at(places) if check_files else itertools.repeat(None)
    refs: list[SlideRef] = []
    numbers: list[int] = []
    stated: dict[object, int] = {}
    shared: list[str] = []
    for (number, values), place, status in zip(rows, places, found, strict=False):
        slide_id, file, mpp_text = values.pop("slide_id"), values.pop("path").strip(), values.pop("mpp", "").strip()
        fault = id_problem(slide_id)
        if fault:
            problems.append(f"row {number}: {fault}")
        mpp, mpp_problem = _parse_mpp(mpp_text, decimal_comma=table.delimiter != ",")
        if mpp_problem:
            problems.append(f"row {number}: {mpp_problem}")
        file_problem = _file_problem(place, file, status, allow_missing=allow_missing)
        if file_problem:
            problems.append(f"row {number}: {file_problem}")
        elif status is not None:
            # The file itself, through links and other spellings.
            identity: object = os.path.normpath(place)
            if "://" in place:
                identity = place
            elif not isinstance(status, OSError):
                identity = (status.st_dev, status.st_ino)
            if identity in stated:
                shared.append(f"rows {stated[identity]} and {number}: {quote(file)}")
            else:
                stated[identity] = number
        refs.append(
            SlideRef(
                slide_id=unicodedata.normalize("NFC", slide_id),
                path=location(place) if "://" in place and not file_problem else Path(place),
                mpp=mpp,
                columns={name: value.strip() for name, value in values.items()},
            )
        )
        numbers.append(number)
    problems.sort(key=lambda problem: int(problem.removeprefix("row ").partition(":")[0]))
    for first, second, text in double_ids([ref.slide_id for ref in refs], case_matters=False):
        problems.append(f"rows {numbers[first]} and {numbers[second]}: {text}; give every slide an id of its own")
    if problems:
        refuse(path.name, problems)
    if not refs:
        raise UsageError(f"{path.name}: no slide below the header; write one row a slide")
    if shared:
        more = f" and {len(shared) - _SHOWN_PROBLEMS} more" if len(shared) > _SHOWN_PROBLEMS else ""
        logger.warning("%s: one file under several ids (%s%s)", path.name, "; ".join(shared[:_SHOWN_PROBLEMS]), more)
    return refs


def check_refs(refs: Sequence[SlideRef], *, where: str) -> None:
    """Make sure that slides can be told apart and outputs can bear their ids, on any file system.

    Args:
        refs: The slides, from a folder for example.
        where: What the message begins with: the folder or the table.

    Raises:
        UsageError: Ids are unsafe or double, also but for how accents are encoded; all are listed. Names of files that
            differ only in case are let pass: the file system that holds them tells them apart.
    """
    problems = []
    for ref in refs:
        problem = id_problem(ref.slide_id)
        if problem:
            problems.append(f"{ref.path.name}: {problem}")
    for first, second, text in double_ids([ref.slide_id for ref in refs], case_matters=True):
        files = f"{refs[first].path} and {refs[second].path}"
        problems.append(f"{files}: {text}; rename one, or give a manifest with an id for each")
    if problems:
        refuse(where, problems)


def check_slide_id(slide_id: str) -> None:
    """Make sure that an id can name folders and files on any system.

    Letters and digits of any script, spaces inside, ``.``, ``_``, ``-`` and most other signs are fine.

    Raises:
        UsageError: It is empty or longer than 200 bytes of UTF-8, holds path separators, ``..``, control or invisible
            characters or what Windows refuses, begins with a dot or a space, or ends with one.
    """
    problem = id_problem(slide_id)
    if problem:
        raise UsageError(problem)


# --- ids ---------------------------------------------------------------------------------------------------------


def id_problem(slide_id: str) -> str | None:
    """What is wrong with an id, and what to do; None where nothing is."""
    if _PLAIN_ID.fullmatch(slide_id) and not _RESERVED.fullmatch(slide_id):
        return None
    if not slide_id.strip():
        return f"slide_id is empty; {_ADVICE}"
    fault = _id_fault(unicodedata.normalize("NFC", slide_id))
    return None if fault is None else f"slide_id {quote(slide_id)} {fault}"


def _id_fault(slide_id: str) -> str | None:
    unseen = next((letter for letter in slide_id if unicodedata.category(letter) in _UNSEEN), None)
    if unseen is not None:
        return f"holds the invisible character U+{ord(unseen):04X}; {_ADVICE}"
    if "/" in slide_id or "\\" in slide_id:
        return f"holds a path separator; {_ADVICE}"
    refused = next((letter for letter in slide_id if letter in '<>:"|?*'), None)
    if refused is not None:
        return f"holds {refused!r}, which Windows refuses in file names; {_ADVICE}"
    if slide_id.startswith("."):
        return "begins with a dot, which hides files; begin with a letter or a digit"
    if ".." in slide_id:
        return "holds '..', which means the folder above; use single dots"
    if slide_id != slide_id.strip():
        return "begins or ends with a space; take it away"
    if slide_id.endswith("."):
        return "ends with a dot, which Windows drops from file names; take it away"
    if _RESERVED.fullmatch(slide_id):
        return "is a name that Windows keeps for itself; choose another"
    n_bytes = len(slide_id.encode("utf-8"))
    if n_bytes > _MAX_ID_BYTES:
        return f"is {n_bytes} bytes long; use at most {_MAX_ID_BYTES}"
    return None


def double_ids(slide_ids: Iterable[str], *, case_matters: bool) -> Iterator[tuple[int, int, str]]:
    """Pairs of places whose ids some file system can't tell apart, and how they relate."""
    seen: dict[str, tuple[int, str]] = {}
    for index, slide_id in enumerate(slide_ids):
        if not slide_id.strip():
            continue
        composed = unicodedata.normalize("NFC", slide_id)
        key = composed if case_matters else unicodedata.normalize("NFC", composed.casefold())
        first, other = seen.setdefault(key, (index, slide_id))
        if first == index:
            continue
        if other == slide_id:
            yield first, index, f"slide_id {quote(slide_id)} twice"
        elif unicodedata.normalize("NFC", other) == composed:
            yield first, index, f"slide_id {quote(slide_id)} twice, its accents encoded in two ways"
        else:
            yield (
                first,
                index,
                f"slide_ids {quote(other)} and {quote(slide_id)} differ only in case, "
                "which some file systems don't tell apart",
            )


# --- cells -------------------------------------------------------------------------------------------------------


def _parse_mpp(text: str, *, decimal_comma: bool) -> tuple[float | None, str | None]:
    """Micrometres per pixel and what is wrong with them; both None for an empty cell."""
    if not text:
        return None, None
    try:
        value = float(text.replace(",", ".") if decimal_comma else text)
    except ValueError:
        return None, f"mpp {quote(text)} is not a number; write micrometres per pixel, 0.25 for example, or nothing"
    low, high = _MPP_RANGE
    if not low <= value <= high:
        return (
            None,
            f"mpp {quote(text)} is not from {low:g} to {high:g} micrometres per pixel; correct it or write nothing",
        )
    return value, None


def _file_problem(place: str, text: str, status: os.stat_result | OSError | None, *, allow_missing: bool) -> str | None:
    """What is wrong with a path; None where nothing is."""
    if not text:
        return "path is empty; name the slide's file"
    if "\0" in text:
        return f"path {quote(text)} holds a null character; write the table anew"
    if isinstance(status, OSError) and not allow_missing:
        hint = "write '/' in place of '\\'" if "\\" in text else "correct the path, or pass --allow-missing"
        if "://" in place:
            return f"{quote(place, at_most=1000)} can't be found ({status.strerror or status}); {hint}"
        return f"file {quote(place, at_most=1000)} can't be found ({status.strerror or status}); {hint}"
    return None


def _look_at(places: Sequence[str]) -> list[os.stat_result | OSError]:
    """What the file system says of some paths, in order; several at once where it is slow to answer."""
    urls = [place for place in places if "://" in place]
    if urls:
        answers = dict(zip(urls, _ask(urls), strict=True))
        files = iter(_look_at([place for place in places if place not in answers]))
        return [answers[place] if place in answers else next(files) for place in places]
    first, rest = places[:_TIMED_LOOKS], places[_TIMED_LOOKS:]
    started = time.perf_counter()
    found = [_stat(place) for place in first]
    slow = time.perf_counter() - started > _SLOW_LOOK_S * len(first)
    if slow:
        with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
            return found + list(pool.map(_stat, rest))
    return found + [_stat(place) for place in rest]


def _ask(urls: Sequence[str]) -> list[os.stat_result | OSError]:
    """What servers say of some objects, in order; one that does not answer is asked once."""
    silent: dict[str, OSError] = {}

    def ask(server: str, url: str) -> os.stat_result | OSError:
        if server in silent:
            return silent[server]
        try:
            path = location(url)
            found = path.found(hasty=True) if isinstance(path, RemotePath) else path.stat()
        except UsageError as error:
            return OSError(str(error))
        except OSError as error:
            if error.errno == errno.EIO:
                silent[server] = error
            return error
        if isinstance(found, os.stat_result):
            return found
        return _THERE if found is not None else OSError(errno.ENOENT, "no such object")

    by_server: dict[str, list[str]] = {}
    for url in dict.fromkeys(urls):
        by_server.setdefault("/".join(url.split("/", 3)[:3]), []).append(url)
    answers: dict[str, os.stat_result | OSError] = {}
    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
        for server, of_server in by_server.items():
            answers[of_server[0]] = ask(server, of_server[0])
            answers.update(zip(of_server[1:], pool.map(partial(ask, server), of_server[1:]), strict=True))
    return [answers[url] for url in urls]


def _stat(place: str) -> os.stat_result | OSError:
    try:
        return os.stat(place)  # noqa: PTH116
    except OSError as error:
        return error
    except ValueError as error:  # a null character
        return OSError(str(error))
