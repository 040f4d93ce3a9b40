"""The tree of errors: each says what, where, what was found, and what to do."""

__all__ = [
    "EncoderError",
    "GeoJSONError",
    "MissingResolutionError",
    "PathopipeError",
    "SlideError",
    "SlideOpenError",
    "StoreBusyError",
    "StoreChangedError",
    "StoreError",
    "StoreWriteError",
    "TileReadError",
    "TooManyBadTilesError",
    "UsageError",
]


class PathopipeError(Exception):
    """Base of every error that pathopipe raises on purpose.

    One positional message and keywords with defaults, so that an error crosses process borders unharmed.
    """

    def __init__(self, message: str, *, slide_id: str | None = None) -> None:
        super().__init__(message)
        self.slide_id = slide_id


class UsageError(PathopipeError, ValueError):
    """An option, a config key, a manifest or an argument is wrong; found before any work starts (exit code 2)."""


class SlideError(PathopipeError):
    """Something is wrong with one slide; other slides go on."""


class SlideOpenError(SlideError, OSError):
    """No reader opens this file."""


class MissingResolutionError(SlideError, ValueError):
    """The slide does not state its micrometres per pixel, or states contradicting ones."""


class TileReadError(SlideError, OSError):
    """One region of a slide can't be read: a corrupt or missing block."""


class TooManyBadTilesError(SlideError):
    """More tiles of a slide were quarantined than the config allows."""


class StoreError(PathopipeError):
    """A store is missing, damaged or of another version."""


class StoreBusyError(StoreError):
    """Another process is writing the same part of a store."""


class StoreChangedError(StoreError):
    """A stage was computed from other inputs than the present ones."""


class StoreWriteError(StoreError, OSError):
    """The output can't be written: disk full, no permission."""


class EncoderError(UsageError):
    """An encoder can't be built, or its weights don't fit."""


class GeoJSONError(PathopipeError, ValueError):
    """A GeoJSON file can't be read, or a geometry can't be written."""
