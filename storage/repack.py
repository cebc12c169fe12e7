"""A pack written anew with those of its chunks that are needed, their bytes unchanged."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from ckpt.core.errors import IntegrityError
from ckpt.core.records import Chunk, FinishedPack, Pack
from ckpt.core.tensors import CHUNK_BYTES
from ckpt.storage.chunks import Places, read_place
from ckpt.storage.header import Entry
from ckpt.storage.packs import PackWriter, chunk_cost, read_entries
from ckpt.storage.store import Store


def write_again(
    store: Store, old: Pack, needed: Collection[str], push: str, places: Places
) -> FinishedPack:
    """Write the pack of ``push`` that has the ``needed`` chunks of ``old``. An entry whose chunks
    are all needed stays as it is; of another, each needed chunk gets an entry of its own.
    ``places`` have the bases of the differences, so that all can be checked.

    Raises:
        IntegrityError: ``old`` is missing or damaged; nothing is left of the new pack.
    """
    _, entries = read_entries(store, old)
    whole, parts = _choose(entries, set(needed))
    room = sum(chunk_cost(entry.name) * len(chunks) for entry, chunks in [*whole, *parts])
    writer = PackWriter(store, push, 0, room)
    with writer.upload:
        for entry, chunks in whole:
            start = chunks[0].offset
            mine = [replace(chunk, offset=chunk.offset - start) for chunk in chunks]
            place = writer.add_entry(entry, mine)
            for chunk in mine:
                stored = replace(chunk, offset=chunk.offset + start)
                writer.upload.write(place + chunk.offset, _read(store, places, old, stored))
            end = mine[-1].offset + mine[-1].length
            writer.upload.write(place + end, bytes(entry.nbytes - end))
        for entry, chunks in parts:
            for number, chunk in enumerate(chunks):
                place = writer.add_chunk(
                    f"{entry.name}#{number}",
                    chunk.digest,
                    chunk.length,
                    raw_length=chunk.raw_length,
                    codec=chunk.codec,
                    base=chunk.base,
                )
                writer.upload.write(place, _read(store, places, old, chunk))
        return writer.finish()


_Entries = list[tuple[Entry, list[Chunk]]]


def _choose(
    entries: Sequence[tuple[Entry, list[Chunk]]], left: set[str]
) -> tuple[_Entries, _Entries]:
    """Entries to keep whole, and those of which some chunks are needed; each chunk once."""
    whole: _Entries = []
    parts: _Entries = []
    for entry, chunks in entries:
        mine = [chunk for chunk in chunks if chunk.digest in left]
        if not mine:
            continue
        (whole if len(mine) == len(chunks) else parts).append((entry, mine))
        left -= {chunk.digest for chunk in mine}
    return whole, parts


def _read(store: Store, places: Places, pack: Pack, chunk: Chunk) -> memoryview:
    """The stored bytes of a chunk, of which the raw ones were checked."""
    if max(chunk.length, chunk.raw_length) > CHUNK_BYTES:
        raise IntegrityError("pack-damaged", f"{pack.key} names a chunk of {chunk.length} bytes")
    raw = memoryview(bytearray(chunk.raw_length))
    read_place(store, places, chunk, raw)
    if chunk.codec is None:
        return raw
    body = memoryview(bytearray(chunk.length))
    store.read_into(pack.key, chunk.offset, body)
    return body
