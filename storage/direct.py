"""Large writes past the page cache: a copy of them there would cost more than the write, and push
out what others have in it (measured in docs/decisions/016).
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from pathlib import Path

from ckpt.core.effects import perform
from ckpt.storage.scratch import scratch

# What a disk's own blocks divide; and no page of the cache has bytes that are written past it.
BLOCK = max(4096, mmap.PAGESIZE)
_LEAST = 1 << 20
_PIECE = 8 << 20  # written at once: as fast as more, in less memory
_FLAG = getattr(os, "O_DIRECT", None)


class DirectFile:
    """A file that another handle writes through the page cache."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None
        self._refused = _FLAG is None
        self._lock = threading.Lock()

    def write(self, offset: int, view: memoryview) -> int:
        """Write as much of ``view`` as are whole blocks from its beginning on, ``offset`` being
        where a block begins; returns how many bytes that were: none where it is little, or where
        the filesystem has no way past the cache."""
        length, done = len(view) // BLOCK * BLOCK, 0
        if length < _LEAST or (handle := self._opened()) is None:
            return 0
        while done < length:
            room = scratch("direct", _PIECE)[: length - done]  # the disk's own alignment is kept
            room[:] = view[done : done + len(room)]
            count = self._write(handle, room, offset + done)
            done += count
            if count < len(room):
                break
        return done

    def _write(self, handle: int, room: memoryview, offset: int) -> int:
        try:
            return perform("write", os.pwrite, handle, room, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._refused = True
            return 0

    def _opened(self) -> int | None:
        with self._lock:
            if self._handle is None and not self._refused:
                flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | (_FLAG or 0)
                try:
                    self._handle = perform("open", os.open, self._path, flags)
                except OSError:  # what is wrong beside that, the other handle tells
                    self._refused = True
            return None if self._refused else self._handle

    def close(self) -> None:
        """Let go of the file; what was written is not yet durable."""
        handle, self._handle = self._handle, None
        if handle is not None:
            perform("close", os.close, handle)
