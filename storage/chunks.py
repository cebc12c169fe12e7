"""One chunk out of the packs that have it, in whatever form it is stored; always checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckpt.core.digests import digest_of
from ckpt.core.errors import IntegrityError
from ckpt.core.records import Chunk, FinishedPack, Pack
from ckpt.storage.scratch import scratch
from ckpt.storage.store import Store

_FSCK = "run `ckpt fsck --read-data`"


@dataclass(frozen=True, slots=True)
class Places:
    """Where chunks lie: packs by id, and the rows of each digest, those to try first in front."""

    packs: Mapping[str, Pack]
    rows: Mapping[str, Sequence[Chunk]]

    @classmethod
    def of(cls, known: Iterable[FinishedPack]) -> Places:
        """The places in these packs; a chunk as it is before one that needs a base."""
        packs: dict[str, Pack] = {}
        rows: dict[str, list[Chunk]] = {}
        for finished in known:
            packs[finished.pack.id] = finished.pack
            for chunk in finished.chunks:
                rows.setdefault(chunk.digest, []).append(chunk)
        for places in rows.values():
            places.sort(key=lambda chunk: chunk.base is not None)
        return cls(packs, rows)


def read_chunk(store: Store, places: Places, digest: str, target: memoryview) -> None:
    """Fill ``target``, which has the chunk's raw length, from the first place that has it whole.

    Raises:
        IntegrityError: ``object-missing``, ``object-short``, ``object-corrupt``,
            ``pack-damaged``; that of the last place.
    """
    _read_any(store, places, digest, places.rows.get(digest, ()), target)


def read_place(store: Store, places: Places, place: Chunk, target: memoryview) -> None:
    """Like :func:`read_chunk`, from one place; ``places`` are for the base of a difference."""
    key = places.packs[place.pack].key
    if place.codec is None:
        store.read_into(key, place.offset, target)
    else:
        _decode(store, places, place, target)
    found = digest_of(target)
    if found != place.digest:
        raise IntegrityError(
            "object-corrupt",
            f"{key} holds other bytes: expected {place.digest}, got {found}",
            hint=_FSCK,
        )


def _read_any(
    store: Store, places: Places, digest: str, rows: Sequence[Chunk], target: memoryview
) -> None:
    problem = IntegrityError("object-missing", f"no pack has chunk {digest}", hint=_FSCK)
    for place in rows:
        if place.raw_length != len(target):
            continue
        try:
            read_place(store, places, place, target)
            return
        except IntegrityError as error:
            problem = error
    raise problem


def _decode(store: Store, places: Places, place: Chunk, target: memoryview) -> None:
    from ckpt.storage.codecs import decode, needs_base

    assert place.codec is not None
    key = places.packs[place.pack].key
    if place.length > place.raw_length or needs_base(place.codec) != (place.base is not None):
        raise IntegrityError("pack-damaged", f"{key} has a chunk that cannot be one", hint=_FSCK)
    base = None
    if place.base is not None:
        # A base is never itself a difference, so this goes no deeper.
        base = target
        rows = [row for row in places.rows.get(place.base, ()) if row.base is None]
        _read_any(store, places, place.base, rows, base)
    body = target[: place.length] if base is None else scratch("body", place.length)
    store.read_into(key, place.offset, body)
    decode(place.codec, body, base, target)
