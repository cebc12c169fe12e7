"""What the system is asked and told of pages of memory; where it is not Linux, nothing."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from typing import Any

HUGE = 2 << 20  # bytes of a huge page
USE_HUGE, READ_IN = 14, 22  # MADV_HUGEPAGE, MADV_POPULATE_READ


def advise(start: int, end: int, advice: int) -> None:
    """Give advice on the pages from one address to another, the first one a page's beginning; a
    system that does not take it goes on as it would. Other threads run meanwhile."""
    if end > start and (system := _system()) is not None:
        system.madvise(start, end - start, advice)


def are_cached(start: int, end: int) -> bool:
    """Whether the file's page at ``start`` and that before ``end`` are in the page cache, as far as
    the system tells."""
    system = _system()
    if system is None:
        return True
    found = ctypes.create_string_buffer(1)
    places = (start, (end - 1) // mmap.PAGESIZE * mmap.PAGESIZE)
    return all(system.mincore(place, 1, found) or found.raw != b"\0" for place in places)


@functools.cache
def _system() -> Any:
    """Linux's C library, or None; elsewhere the numbers mean something else. Not ``mmap.madvise``,
    which keeps all other threads waiting while the disk reads."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    library.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    return library
