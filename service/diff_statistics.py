"""The tensors of two versions whose values changed, read side by side in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckpt.core.documents import Tensor
from ckpt.core.dtypes import ITEM_SIZES
from ckpt.core.records import Version
from ckpt.core.tensors import CHUNK_BYTES
from ckpt.loader.statistics import NUMBERS, Sums
from ckpt.registry.registry import Registry
from ckpt.service.diff import Diff, Run, TensorDifference, stored_nbytes, stored_runs
from ckpt.service.fetch import Wanted, fetch
from ckpt.storage.store import Store

if TYPE_CHECKING:
    from ckpt.service.upload import Progress

_Chunk = tuple[str, int]  # digest and length

# What is held at once: a chunk of either version, or many small ones.
_BATCH_BYTES = 2 * CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class _Slice:
    """Bytes of one chunk; ``side`` is 0 for the first version and 1 for the second."""

    side: int
    name: str
    chunk: _Chunk
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is added to the sums of a tensor at once: the same elements of both, or some of one."""

    sums: Sums
    slices: tuple[_Slice, ...]


class _Room:
    """Memory for one chunk."""

    def __init__(self, nbytes: int) -> None:
        self.memory = memoryview(bytearray(nbytes))

    def write(self, offset: int, data: memoryview) -> None:
        self.memory[offset : offset + len(data)] = data

    def view(self, offset: int, length: int) -> memoryview | None:
        return self.memory[offset : offset + length]


def with_statistics(
    store: Store, registry: Registry, found: Diff, progress: Progress | None
) -> tuple[TensorDifference, ...]:
    """The tensors of a comparison, those with changed values with their statistics."""
    sums = {tensor.name: _sums(tensor) for tensor in found.tensors if _is_measurable(tensor)}
    changed = [tensor for tensor in found.tensors if tensor.name in sums]
    total = sum(_nbytes(tensor) for tensor in changed)
    pieces = (piece for tensor in changed for piece in _pieces(tensor, sums[tensor.name]))
    rooms: dict[_Chunk, _Room] = {}
    done = 0
    for batch in _batches(pieces):
        _read(store, registry, (found.before, found.after), batch, rooms)
        for piece in batch:
            _add(piece, rooms)
            done += sum(one.stop - one.start for one in piece.slices)
        if progress is not None:
            progress(done, total)
    return tuple(
        replace(tensor, statistics=sums[tensor.name].finish()) if tensor.name in sums else tensor
        for tensor in found.tensors
    )


def _is_measurable(tensor: TensorDifference) -> bool:
    """Whether the values changed, and are numbers of its dtype on both sides."""
    entries = [entry for entry in (tensor.before, tensor.after) if entry is not None]
    return "values" in tensor.what and all(
        entry.has_bytes and entry.dtype in NUMBERS and entry.kind != "region" and not entry.details
        for entry in entries
    )


def _sums(tensor: TensorDifference) -> Sums:
    before, after = _both(tensor)
    paired = before.shape == after.shape and before.stored_shape == after.stored_shape
    paired &= _boxes(before) == _boxes(after)
    elements = stored_nbytes(after) // ITEM_SIZES[after.dtype]
    return Sums((before.dtype, after.dtype), paired, elements)


def _boxes(entry: Tensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(part.offset, part.shape) for part in entry.parts]


def _both(tensor: TensorDifference) -> tuple[Tensor, Tensor]:
    assert tensor.before is not None
    assert tensor.after is not None
    return tensor.before, tensor.after


def _nbytes(tensor: TensorDifference) -> int:
    return sum(map(stored_nbytes, _both(tensor)))


def _pieces(tensor: TensorDifference, sums: Sums) -> Iterator[_Piece]:
    """A tensor in pieces that lie in one chunk of each version."""
    entries = _both(tensor)
    if not sums.paired:
        for side, entry in enumerate(entries):
            for run in stored_runs(entry):
                for first in range(0, run.nbytes, CHUNK_BYTES):
                    yield _Piece(sums, (_slice(side, entry, run, first, CHUNK_BYTES),))
        return
    sizes = [ITEM_SIZES[entry.dtype] for entry in entries]
    # Item sizes are powers of two, so that no such run of elements crosses a chunk's end.
    step = CHUNK_BYTES // max(sizes)
    for runs in zip(*map(stored_runs, entries), strict=True):
        sides = list(enumerate(zip(entries, runs, sizes, strict=True)))
        for first in range(0, runs[0].nbytes // sizes[0], step):
            yield _Piece(
                sums,
                tuple(
                    _slice(side, entry, run, first * size, step * size)
                    for side, (entry, run, size) in sides
                ),
            )


def _slice(side: int, entry: Tensor, run: Run, first: int, length: int) -> _Slice:
    number, start = divmod(first, CHUNK_BYTES)
    whole = min(CHUNK_BYTES, run.nbytes - number * CHUNK_BYTES)
    stop = min(start + length, whole)
    return _Slice(side, entry.name, (run.chunks[number], whole), start, stop)


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces gathered so that their chunks fit the memory."""
    batch: list[_Piece] = []
    held: set[_Chunk] = set()
    room = 0
    for piece in pieces:
        more = {one.chunk for one in piece.slices}
        if sum(length for _, length in more - held) > room:
            if batch:
                yield batch
            batch, held, room = [], set(), _BATCH_BYTES
        batch.append(piece)
        room -= sum(length for _, length in more - held)
        held |= more
    if batch:
        yield batch


def _read(
    store: Store,
    registry: Registry,
    versions: tuple[Version, Version],
    batch: Iterable[_Piece],
    rooms: dict[_Chunk, _Room],
) -> None:
    """Change ``rooms`` from the chunks of the batch before to those of this one, checked; one
    that both batches or both versions have is read once."""
    needed = {one.chunk: one for piece in batch for one in piece.slices}
    for chunk in rooms.keys() - needed.keys():
        del rooms[chunk]
    for side, version in enumerate(versions):
        wanted = []
        for one in needed.values():
            if one.side == side and one.chunk not in rooms:
                digest, length = one.chunk
                rooms[one.chunk] = room = _Room(length)
                wanted.append(Wanted(one.name, length, (digest,), room))
        if wanted:
            fetch(store, registry, version, wanted)


def _add(piece: _Piece, rooms: Mapping[_Chunk, _Room]) -> None:
    parts = [rooms[one.chunk].memory[one.start : one.stop] for one in piece.slices]
    if len(parts) == 2:
        piece.sums.add_pair(*parts)
    else:
        piece.sums.add(piece.slices[0].side, parts[0])
