"""Names that users type: look-ups that answer an unknown name with the nearest known ones."""

import difflib
from collections.abc import Iterable

__all__ = ["nearest"]

_MOST_SHOWN = 40


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence part for an error: ``did you mean 'a'?``, or the known names where nothing is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return "known: " + ", ".join(names[:_MOST_SHOWN]) + more
