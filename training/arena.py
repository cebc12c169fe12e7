"""Memory that a trainer and its writer share: a state is copied here, and the loop goes on."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy

from ckpt.core.tensors import TensorBytes, chunk_spans

_PAGE = 4096

_Task = tuple[TensorBytes, int, int, int]  # source, its place, and a span of it


class Arena:
    """One anonymous file in memory, mapped by both sides and used again for every save. It is
    gone when both have ended, however they end."""

    def __init__(self, handle: int | None = None) -> None:
        self.handle = _make() if handle is None else handle
        self._map: mmap.mmap | None = None

    def room(self, nbytes: int) -> memoryview:
        """The first ``nbytes`` of the arena, which grows when it has fewer."""
        size = max(_PAGE, -(-nbytes // _PAGE) * _PAGE)
        if self._map is None or len(self._map) < size:
            if os.fstat(self.handle).st_size < size:
                os.ftruncate(self.handle, size)
            self._map = mmap.mmap(self.handle, size)
        return memoryview(self._map)[:nbytes]

    def copy(self, sources: Sequence[TensorBytes]) -> list[int]:
        """Copy all sources into the arena; returns where each one begins."""
        places, end = [], 0
        for source in sources:
            places.append(end)
            end += -(-source.nbytes // _PAGE) * _PAGE
        room = numpy.frombuffer(self.room(end), numpy.uint8)
        tasks = [
            (source, place, *span)
            for source, place in zip(sources, places, strict=True)
            for span in chunk_spans(source.nbytes)
        ]

        def copy(mine: Sequence[_Task]) -> None:
            for source, place, offset, length in mine:
                data = numpy.frombuffer(source.read(offset, length), numpy.uint8)
                numpy.copyto(room[place + offset : place + offset + length], data)

        # One hand-over for half of the bytes: one for each tensor would take longer than its copy.
        halves = _halved(tasks)
        with ThreadPoolExecutor(1, thread_name_prefix="ckpt-stage") as pool:
            other = pool.submit(copy, halves[1])
            copy(halves[0])
            other.result()
        return places

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


def _halved(tasks: Sequence[_Task]) -> tuple[list[_Task], list[_Task]]:
    """The same tasks in two lists of about as many bytes."""
    halves: tuple[list[_Task], list[_Task]] = ([], [])
    ahead = 0  # bytes that the first has more
    for task in sorted(tasks, key=lambda task: -task[3]):
        halves[ahead > 0].append(task)
        ahead += -task[3] if ahead > 0 else task[3]
    return halves


def _make() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("ckpt-arena")
    with tempfile.TemporaryFile() as file:  # it has no name; the descriptor is all there is
        return os.dup(file.fileno())
