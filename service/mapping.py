"""Tensors used where their bytes lie in a pack, instead of in memory of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ckpt.core.records import Chunk
from ckpt.storage.chunks import Places
from ckpt.storage.store import Store

# Kernels give other last bits on memory that begins elsewhere, and no element is larger.
_ALIGNED = 16


class Mappings:
    """The packs of a plan as memory, each mapped once and only when it is asked for."""

    def __init__(self, store: Store, places: Places) -> None:
        self._store = store
        self._places = places
        self._mapped: dict[str, memoryview | None] = {}
        self._taken: set[tuple[str, int]] = set()

    def offer(self, chunks: Sequence[str], adopt: Callable[[memoryview], bool]) -> bool:
        """Have ``adopt`` take a tensor whose chunks lie behind each other in one pack, as they
        are, and say whether it did. What one tensor took no other gets: each may be changed."""
        run = self._run(chunks)
        if not run or run[0].offset % _ALIGNED:
            return False
        taken = {(row.pack, row.offset) for row in run}
        memory = self._map(run[0].pack)
        begin, end = run[0].offset, _end(run[-1])
        if memory is None or end > len(memory) or not self._taken.isdisjoint(taken):
            return False
        self._taken |= taken
        return adopt(memory[begin:end])

    def _run(self, chunks: Sequence[str]) -> list[Chunk]:
        """The places of the chunks, if each begins where the one before ends; else none."""
        run: list[Chunk] = []
        for digest in chunks:
            found = [
                row
                for row in self._places.rows.get(digest, ())
                if row.codec is None
                and (not run or (row.pack, row.offset) == (run[-1].pack, _end(run[-1])))
            ]
            if not found:
                return []
            run.append(found[0])
        return run

    def _map(self, pack: str) -> memoryview | None:
        if pack not in self._mapped:
            self._mapped[pack] = self._store.map(self._places.packs[pack].key)
        return self._mapped[pack]


def _end(chunk: Chunk) -> int:
    return chunk.offset + chunk.length
