"""Memory that a thread uses again for each chunk: fresh pages cost more than what is done in them.

Measured: a chunk of 2.4 MB is encoded in 3.3 ms instead of 6.1 ms.
"""

from __future__ import annotations

import contextlib
import mmap
import threading

_HUGE = 2 << 20


class _Rooms(threading.local):
    def __init__(self) -> None:
        self.by_use: dict[str, memoryview] = {}


_rooms = _Rooms()


def scratch(use: str, nbytes: int) -> memoryview:
    """``nbytes`` of any content, this thread's until it asks for the same ``use`` again; they
    are given back when the thread ends."""
    room = _rooms.by_use.get(use)
    if room is None or len(room) < nbytes:
        _rooms.by_use.pop(use, None)
        room = _rooms.by_use[use] = memoryview(_pages(nbytes))
    return room[:nbytes]


def _pages(nbytes: int) -> mmap.mmap:
    unit = _HUGE if nbytes >= _HUGE else mmap.PAGESIZE
    size = max(1, -(-nbytes // unit)) * unit
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if unit == _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
