"""Memory that a trainer and its writer share: a state is copied here, and the loop goes on."""

from __future__ import annotations

import mmap
import os
import tempfile

PAGE = 4096


class Arena:
    """One anonymous file in memory, mapped by both sides and used again for every save. It is
    gone when both have ended, however they end."""

    def __init__(self, handle: int | None = None) -> None:
        self.handle = _make() if handle is None else handle
        self._map: mmap.mmap | None = None

    def room(self, nbytes: int) -> memoryview:
        """The first ``nbytes`` of the arena, which grows when it has fewer."""
        size = max(PAGE, -(-nbytes // PAGE) * PAGE)
        if self._map is None or len(self._map) < size:
            if os.fstat(self.handle).st_size < size:
                os.ftruncate(self.handle, size)
            self._map = mmap.mmap(self.handle, size)
        return memoryview(self._map)[:nbytes]

    def whole(self) -> memoryview:
        """All that is mapped."""
        assert self._map is not None
        return memoryview(self._map)

    def close(self) -> None:
        """Let go of the memory on this side."""
        self._map = None
        os.close(self.handle)


class ArenaTensor:
    """One tensor that was copied into an arena."""

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], data: memoryview) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = shape
        self.nbytes = len(data)
        self._data = data

    def read(self, offset: int, length: int) -> memoryview:
        return self._data[offset : offset + length]


def _make() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("ckpt-arena")
    with tempfile.TemporaryFile() as file:  # it has no name; the descriptor is all there is
        return os.dup(file.fileno())
