"""Packs: safetensors files that are written while their tensors are still being hashed.

The layout is ``docs/format.md`` section 3. Header space is reserved at its upper bound and
written last, so that data goes straight to its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckpt.core.digests import digest_of
from ckpt.core.dtypes import ITEM_SIZES, PACK_CODES
from ckpt.core.errors import IntegrityError
from ckpt.core.printable import is_printable
from ckpt.core.records import Chunk, FinishedPack, Pack
from ckpt.core.tensors import CHUNK_BYTES, TensorBytes, chunk_spans
from ckpt.storage.header import Entry, header_length, parse_header, takes_shape
from ckpt.storage.store import Store

PACK_BYTES = 512 << 20
HEADER_BYTES = 8 << 20
PACK_KEY = re.compile(r"packs/(?P<two>[0-9a-f]{2})/(?P=two)[0-9a-f]{30}-[0-9]+\.safetensors")

_PAGE = 4096
_PAD = 64
_METADATA = "__metadata__"
# More than the longest digests, digits, quotes and commas of one chunk with an entry of its own.
_CHUNK_COST = 420
_DIMENSION_COST = 21


def pack_key(pack: str) -> str:
    """The key of the pack with this id."""
    return f"packs/{pack[:2]}/{pack}.safetensors"


def header_cost(source: TensorBytes) -> int:
    """An upper bound of what ``source`` adds to a header, typed or in chunks."""
    shape = _DIMENSION_COST * (len(source.shape) + 1)
    return shape + chunk_cost(source.name) * max(1, len(chunk_spans(source.nbytes)))


def chunk_cost(name: str) -> int:
    """An upper bound of what one chunk of the tensor ``name`` adds to a header."""
    quoted = json.dumps(name)
    return len(json.dumps(quoted)) + len(quoted) + _CHUNK_COST


@dataclass(slots=True)
class _Written:
    """One entry of the header in the making; ``offset`` counts from the first byte of data, and
    those of its chunks from the first byte of the entry."""

    name: str
    code: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    chunks: list[Chunk] = field(default_factory=list)


class PackWriter:
    """One pack in the making. Places are given out at once; bytes may be written in any order
    and from several threads. Leaving the context without ``finish`` leaves nothing behind."""

    def __init__(self, store: Store, push: str, number: int, header_room: int) -> None:
        self.id = f"{push}-{number}"
        self._store = store
        self._push = push
        room = min(header_room, HEADER_BYTES) + 200
        self._data_start = -(-(8 + room) // _PAGE) * _PAGE
        self._room = self._data_start - 8 - 200
        self._used = 0
        self._end = 0
        self._entries: list[_Written] = []
        self._names = {_METADATA}
        self.upload = store.create(pack_key(self.id))

    def fits(self, cost: int) -> bool:
        """Whether the pack takes one more entry that may cost so much of the header."""
        return self._end < PACK_BYTES and self._used + cost <= self._room

    def add_tensor(self, source: TensorBytes, digests: Sequence[str]) -> int:
        """Give ``source`` a typed entry; returns where in the file its bytes go."""
        self._used += header_cost(source)
        if source.dtype in PACK_CODES:
            code, shape = PACK_CODES[source.dtype], source.shape
        else:
            code, shape = "U8", (*source.shape, ITEM_SIZES[source.dtype])
        if not takes_shape(code, shape):
            code, shape = "U8", (source.nbytes,)
        spans = chunk_spans(source.nbytes)
        chunks = [
            Chunk(digest, self.id, at, length, length)
            for digest, (at, length) in zip(digests, spans, strict=True)
        ]
        return self._append(source.name, code, shape, source.nbytes, chunks)

    def add_chunk(
        self,
        name: str,
        digest: str,
        length: int,
        *,
        raw_length: int | None = None,
        codec: str | None = None,
        base: str | None = None,
    ) -> int:
        """Give one chunk the entry ``name``, ``length`` bytes as they are stored; returns where
        they go."""
        self._used += chunk_cost(name)
        padded = -(-length // _PAD) * _PAD
        raw = length if raw_length is None else raw_length
        chunk = Chunk(digest, self.id, 0, length, raw, codec, base)
        place = self._append(name, "U8", (padded,), padded, [chunk])
        if padded > length:
            self.upload.write(place + length, bytes(padded - length))
        return place

    def add_entry(self, entry: Entry, chunks: Sequence[Chunk]) -> int:
        """Give an entry of another pack the same place in this one; ``chunks`` count from its
        first byte. Returns where its bytes go."""
        self._used += chunk_cost(entry.name) * max(1, len(chunks))
        mine = [replace(chunk, pack=self.id) for chunk in chunks]
        return self._append(entry.name, entry.code, entry.shape, entry.nbytes, mine)

    def _append(
        self,
        name: str,
        code: str,
        shape: tuple[int, ...],
        nbytes: int,
        chunks: list[Chunk],
    ) -> int:
        entry = _Written(self._free_name(name), code, shape, self._end, nbytes, chunks)
        self._entries.append(entry)
        self._end += nbytes
        return self._data_start + entry.offset

    def _free_name(self, name: str) -> str:
        """``name``, or another where a header cannot carry it."""
        if not name or not is_printable(name) or name in self._names:
            name = f"tensor-{len(self._entries)}"
        while name in self._names:
            name += "-"
        self._names.add(name)
        return name

    def finish(self) -> FinishedPack:
        """Write the header, publish the file, and say what is in it."""
        header = self._header()
        self.upload.write(0, header)
        size = self._data_start + self._end
        self.upload.publish(size)
        chunks = {
            chunk.digest: replace(chunk, offset=self._data_start + entry.offset + chunk.offset)
            for entry in reversed(self._entries)
            for chunk in reversed(entry.chunks)
        }
        pack = Pack(self.id, pack_key(self.id), size, self._push, header=digest_of(header))
        return FinishedPack(pack, tuple(chunks.values()))

    def _header(self) -> bytes:
        entries = {entry.name: [_row(chunk) for chunk in entry.chunks] for entry in self._entries}
        description = {"chunks": entries, "push": self._push}
        header: dict[str, object] = {
            _METADATA: {"ckpt": _compact(description), "format": "pt"},
        }
        for entry in self._entries:
            header[entry.name] = {
                "dtype": entry.code,
                "shape": entry.shape,
                "data_offsets": [entry.offset, entry.offset + entry.nbytes],
            }
        text = _compact(header).encode()
        room = self._data_start - 8
        if len(text) > room:
            raise AssertionError(f"a pack header of {len(text)} bytes has room for {room}")
        return room.to_bytes(8, "little") + text.ljust(room)


def read_pack(store: Store, pack: Pack) -> FinishedPack:
    """The chunks that the header of a pack in the store names, each at its first place.

    Raises:
        IntegrityError: the object is missing, cut, or its header is damaged.
    """
    digest, places = read_places(store, pack)
    first = {chunk.digest: chunk for chunk in reversed(places)}
    return FinishedPack(replace(pack, header=digest), tuple(first.values()))


def read_places(store: Store, pack: Pack) -> tuple[str, list[Chunk]]:
    """The digest of everything before a pack's data, and every place that the header names; one
    chunk may be at several."""
    digest, entries = read_entries(store, pack)
    return digest, [chunk for _, chunks in entries for chunk in chunks]


def read_entries(store: Store, pack: Pack) -> tuple[str, list[tuple[Entry, list[Chunk]]]]:
    """The digest of everything before a pack's data, and its entries in the order of their data,
    with their chunks; offsets count from the first byte of the file."""
    first = bytearray(8)
    store.read_into(pack.key, 0, memoryview(first))
    length = header_length(bytes(first), pack.size)
    text = bytearray(length)
    store.read_into(pack.key, 8, memoryview(text))
    header = parse_header(bytes(text), pack.size)
    entries = {entry.name: entry for entry in header.entries}
    try:
        described = json.loads(header.metadata["ckpt"])["chunks"]
        found = [
            (
                entries[name],
                [_described(pack, entries[name], header.data_start, row) for row in rows],
            )
            for name, rows in described.items()
        ]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise IntegrityError(
            "pack-damaged", f"{pack.key} does not describe its chunks: {error!r}"
        ) from None
    return digest_of(bytes(first) + bytes(text)), found


def _row(chunk: Chunk) -> list[object]:
    """A chunk as the header has it."""
    row: list[object] = [chunk.digest, chunk.offset, chunk.length, chunk.raw_length]
    return row if chunk.codec is None else [*row, chunk.codec, chunk.base]


def _described(pack: Pack, entry: Entry, data_start: int, row: Sequence[object]) -> Chunk:
    digest, at, length, raw_length, codec, base = (*row, None, None)[:6]
    if not isinstance(digest, str) or len(digest) != 64:
        raise ValueError("not a digest")
    if not isinstance(at, int) or not isinstance(length, int) or not isinstance(raw_length, int):
        raise TypeError("not a range")
    if not 0 <= at <= at + length <= entry.nbytes:
        raise ValueError("a chunk outside its entry")
    if not 0 <= length <= raw_length <= CHUNK_BYTES:
        raise ValueError("a chunk of no valid length")
    start = data_start + entry.start + at
    return Chunk(
        digest,
        pack.id,
        start,
        length,
        raw_length,
        None if codec is None else str(codec),
        None if base is None else str(base),
    )


def _compact(value: Mapping[str, object]) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
