"""How this process deals with memory that it has freed."""

import contextlib
import ctypes

__all__ = ["keep_freed_memory"]

# Numbers of options of mallopt(3), and where glibc's own adjustment of them ends.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD_BYTES = 32 * 2**20


def keep_freed_memory() -> None:
    """Let the C library use freed memory again instead of giving it back to the system at once.

    Images come and go by the megabyte, and pages that are asked for anew are cleared anew. Dask starts its workers so
    that they give everything back: a slide took a third more processor time there. Threads give back what lies at the
    end of their heaps: finding objects took a tenth more. What is kept is bounded by what was in use at once.
    """
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 16 * _MMAP_THRESHOLD_BYTES)
