"""What new chunks may be stored as differences to: the same places of an earlier version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from ckpt.core.errors import IntegrityError, NotFoundError, UsageError
from ckpt.core.printable import escape
from ckpt.core.records import Chunk, Version
from ckpt.core.tensors import TensorBytes, chunk_spans
from ckpt.registry.registry import Registry
from ckpt.storage.chunks import Places, read_chunk
from ckpt.storage.scratch import scratch
from ckpt.storage.store import Store

if TYPE_CHECKING:
    from ckpt.storage.codecs import Encoded

Compress = Literal["auto", "max", "none"]
COMPRESS: tuple[Compress, ...] = ("auto", "max", "none")

# What a smaller tensor could save, its description in the pack would cost.
ENCODED_BYTES = 4096

# Of the source with this number, the digest of the base of each chunk.
Bases = Mapping[int, Sequence[str | None]]
# Chunks in this process's memory, by digest: bases that no store has to be asked for.
Kept = Mapping[str, memoryview]


def check_compress(value: str) -> Compress:
    """``value`` as one of the three; UsageError ``compress-invalid``."""
    for known in COMPRESS:
        if value == known:
            return known
    raise UsageError(
        "compress-invalid",
        f'"{escape(str(value), 40)}" is no way to compress',
        hint=f"write {', '.join(COMPRESS)}",
    )


def find_bases(
    store: Store,
    registry: Registry,
    model: str,
    sources: Sequence[TensorBytes],
    compress: Compress,
    kept: Kept,
) -> Bases:
    """The chunks at the same places of the model's newest version, where that has a tensor of the
    same name and dtype in as many chunks. With ``auto`` only where reading them is cheap: on this machine.

    A base is never itself a difference: of a chunk that is one, its own base is the base.
    """
    if compress == "none" or all(source.nbytes < ENCODED_BYTES for source in sources):
        return {}
    reads = compress == "max" or store.is_near
    newest = registry.queries.newest(model) if reads or kept else None
    if newest is None:
        return {}
    try:
        entries = registry.queries.document(newest).tensors
    except NotFoundError:  # removed meanwhile
        return {}
    known = {(entry.name, entry.dtype): entry for entry in entries}
    wanted: dict[int, tuple[str, ...]] = {}
    for index, source in enumerate(sources):
        entry = known.get((source.name, source.dtype))
        if entry is not None and len(entry.chunks) == len(chunk_spans(source.nbytes)):
            wanted[index] = entry.chunks
    rows = registry.books.find_chunks({one for digests in wanted.values() for one in digests})
    return {
        index: [
            base_of(rows.get(digest, ()), digest, None if reads else kept) for digest in digests
        ]
        for index, digests in wanted.items()
    }


def keep_bases(
    registry: Registry,
    version: Version,
    sources: Sequence[TensorBytes | None],
    kept: dict[str, memoryview],
) -> None:
    """Bring ``kept`` to what the next version may be differences to, after this one was pushed
    from ``sources``, one for each of its entries; never more than one state's bytes.

    Raises:
        NotFoundError: the version was removed meanwhile.
    """
    entries = registry.queries.document(version).tensors
    rows = registry.books.find_chunks({digest for entry in entries for digest in entry.chunks})
    wanted: dict[str, tuple[TensorBytes, tuple[int, int]] | None] = {}
    for entry, source in zip(entries, sources, strict=True):
        if source is None:
            continue
        for digest, span in zip(entry.chunks, chunk_spans(source.nbytes), strict=True):
            base = base_of(rows.get(digest, ()), digest)
            if base is not None:
                wanted[base] = (source, span) if base == digest else wanted.get(base)
    for digest in kept.keys() - wanted.keys():
        del kept[digest]  # first, so that two states never lie side by side
    for digest, place in wanted.items():
        if place is not None and digest not in kept:
            source, span = place
            kept[digest] = memoryview(bytes(source.read(*span)))


def base_of(rows: Iterable[Chunk], digest: str, among: Kept | None = None) -> str | None:
    """The chunk itself where some pack has it as it is, else what it is a difference to; with
    ``among``, only if it is one of these."""
    bases = [row.base for row in rows]
    if not bases:
        return None
    found = digest if None in bases else bases[0]
    return found if among is None or found in among else None


def encode_chunk(
    store: Store,
    places: Places,
    raw: memoryview,
    dtype: str,
    base: str | None,
    compress: Compress,
    kept: Kept,
) -> Encoded | None:
    """A chunk in its shortest form that pays, None where that is as it is. A base that cannot be
    read whole is not relied on."""
    from ckpt.storage.codecs import encode

    reference, room = None, scratch("chunk", len(raw))
    if base is not None and base in kept:
        reference = kept[base] if len(kept[base]) == len(raw) else None
    elif base is not None and _length(places, base) == len(raw):
        # fsck tells what is wrong with it; here the chunk is written without it.
        with suppress(IntegrityError):
            read_chunk(store, places, base, room)
            reference = room
    return encode(raw, dtype, reference, room, effort="max" if compress == "max" else "auto")


def _length(places: Places, digest: str) -> int:
    return places.rows[digest][0].raw_length
