"""Large reads bring into the page cache what it lacks by 2 MiB instead of by 4 KiB or little more:
what is in it so is mapped in no time (measured in docs/decisions/018).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap

from ckpt.core.pages import HUGE, READ_IN, USE_HUGE, advise, are_cached


def read_ahead(handle: int, start: int, length: int) -> None:
    """Have the page cache hold a range of a file, as far as the system takes such advice. What is
    wrong with the file, an ordinary read tells."""
    if length < HUGE:
        return
    first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with contextlib.suppress(OSError, ValueError):
        pages = mmap.mmap(handle, start + length - first, access=mmap.ACCESS_COPY, offset=first)
        begin = _address(memoryview(pages))
        end = begin + len(pages)
        if not are_cached(begin, end):
            for advice in (USE_HUGE, READ_IN):
                advise(begin, end, advice)


def read_in(memory: memoryview) -> None:
    """Read what lies in a mapped file at once, instead of page by page as each is touched."""
    if len(memory) >= HUGE:
        begin = _address(memory)
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        advise(first, begin + len(memory), READ_IN)


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
