"""Words of a cohort page: reasons without places and file names, grouped by what they have in common."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ReasonGroup", "count_text", "group_reasons", "hide_places"]

_SUFFIXES = (
    "svs|svslide|ndpi|ndpis|tiff?|mrxs|scn|vms|vmu|bif|dcm|czi|isyntax|qptiff|zarr|zvi|lif|jpe?g|jp2|png|bmp|json|csv"
    "|ya?ml|h5|pt|npz|geojson"
)
# What ends the name of a file in a sentence; a blank does not, for names of people have blanks.
_NAME = r"[^\s:;,()\[\]'\"][^:;,()\[\]'\"\n]*?"
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://[^\s:;,()\[\]'\"]+(?::\d+)?[^\s:;,()\[\]'\"]*", re.IGNORECASE)
_FOLDER = re.compile(
    rf"(?<![\w.>])(?:~|\.\.?|[A-Za-z]:)?(?:/|\\\\?)(?=[\w.~-])(?:{_NAME}\.(?:{_SUFFIXES})\b|[^\s:;,()\[\]'\"]+)",
    re.IGNORECASE,
)
_FILE = re.compile(rf"{_NAME}\.(?:{_SUFFIXES})\b", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w-])[-+]?\d+(?:[.,]\d+)*(?![\w-])")


def count_text(n: int, noun: str) -> str:
    """A count with its noun: ``1 slide``, ``2 slides``."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def hide_places(text: str, *, folder: Path, slide_id: str = "") -> str:
    """A message without folders, addresses and names of files, which may name people.

    What lies in ``folder`` is named relative to it; a file that bears the slide's own id keeps its name.

    Args:
        text: The message.
        folder: The output folder that is told of.
        slide_id: Of the slide that the message is about.
    """
    for known in sorted({str(folder), str(folder.absolute()), str(folder.resolve())}, key=len, reverse=True):
        if len(known) > 1:
            text = text.replace(f"{known}/", "")
    if not slide_id:
        return _hide(text, "")
    own = re.compile(rf"((?:slides|thumbnails|geojson|done/[a-z]+)/{re.escape(slide_id)}\.[\w.-]*(?:/[\w.-]+)*)")
    # Every second part is a place in the folder, which says no more than the id.
    parts = own.split(text)
    return "".join(part if number % 2 else _hide(part, slide_id) for number, part in enumerate(parts))


def _hide(text: str, slide_id: str) -> str:
    def last_name(found: re.Match[str]) -> str:
        name = re.split(r"[/\\]", found[0])[-1]
        return name if _is_own(name, slide_id) else "[path]"

    text = _FOLDER.sub(last_name, _ADDRESS.sub("[address]", text))
    return _FILE.sub(lambda found: found[0] if _is_own(found[0], slide_id) else "[file]", text)


def _is_own(name: str, slide_id: str) -> bool:
    return name == "summary.csv" or (
        bool(slide_id) and re.fullmatch(rf"{re.escape(slide_id)}\.[\w.]+", name) is not None
    )


@dataclass(frozen=True, slots=True)
class ReasonGroup:
    """Slides that failed alike."""

    reason: str
    """Of the first of them, without its id."""
    slide_ids: tuple[str, ...]


def group_reasons(reasons: Iterable[tuple[str, str]]) -> list[ReasonGroup]:
    """Put reasons together that differ in slide id and numbers alone; the most frequent first.

    Args:
        reasons: Slide id and reason.
    """
    groups: dict[str, tuple[str, list[str]]] = {}
    for slide_id, reason in reasons:
        bare = re.sub(rf"(?<![\w.-]){re.escape(slide_id)}(?![\w-])", "ID", reason) if slide_id else reason
        shown = bare.removeprefix("ID: ").replace("ID", "this slide")
        groups.setdefault(_NUMBER.sub("#", bare), (shown, []))[1].append(slide_id)
    found = [ReasonGroup(shown, tuple(sorted(ids))) for shown, ids in groups.values()]
    return sorted(found, key=lambda group: (-len(group.slide_ids), group.reason))
