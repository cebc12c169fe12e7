"""What a push relies on in the store: packs that it has claimed, and bases that it can read."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import pytest

from ckpt.core.digests import digest_of
from ckpt.core.errors import IntegrityError
from ckpt.core.records import Chunk, Pack
from ckpt.registry.books import Books
from ckpt.service.sharing import Sharing
from ckpt.storage.chunks import Places, read_chunk
from ckpt.storage.memory import MemoryStore

RAW, BASE = bytes(range(64)), bytes(64)


class _Books:
    """Chunks that the registry knows by themselves."""

    def __init__(self, known: dict[str, list[Chunk]]) -> None:
        self._known = known

    def find_chunks(self, digests: Collection[str]) -> dict[str, list[Chunk]]:
        return {one: self._known[one] for one in digests if one in self._known}


def stored(store: MemoryStore, name: str, body: bytes) -> Pack:
    with store.create(f"packs/{name}") as upload:
        upload.write(0, body)
        upload.publish(len(body))
    return Pack(name, f"packs/{name}", len(body), "0" * 32)


def test_what_is_shared_and_a_base_at_once_is_a_base_where_it_lies_as_it_is() -> None:
    store = MemoryStore()
    packs = {name: stored(store, name, RAW) for name in ("raw", "difference", "base")}
    both, base = digest_of(RAW), digest_of(BASE)
    whole = Chunk(both, "raw", 0, 64, 64)
    difference = Chunk(both, "difference", 0, 32, 64, "planes-difference-f32", base)
    known = {both: [whole], base: [Chunk(base, "base", 0, 64, 64)]}
    sharing = Sharing(store, cast(Books, _Books(known)))

    def claim(wanted: set[str]) -> Sequence[Pack]:
        return [packs[name] for name in packs]  # others of the push need all three

    settled = sharing.settle({both: [difference, whole]}, {both}, claim)
    assert settled[both] == {"difference", "base"}
    assert sharing.base_pack(both) == "raw"
    assert sharing.base_places().rows[both] == [whole]


@pytest.mark.parametrize(
    "place",
    [
        Chunk("", "pack", 0, 64, 32),
        Chunk("", "pack", 0, 32, 32),
        Chunk("", "pack", 0, 96, 64, "planes-alone-u8"),
        Chunk("", "pack", 0, 64, 64, "planes-difference-u8"),
        Chunk("", "pack", 0, 64, 64, "planes-alone-u8", "f" * 64),
    ],
    ids=["longer", "shorter", "longer than raw", "no base", "a base too many"],
)
def test_a_place_that_cannot_be_one_is_not_read(place: Chunk) -> None:
    store = MemoryStore()
    pack = stored(store, "pack", RAW + RAW)
    digest = digest_of(RAW)
    wrong = Chunk(digest, *[getattr(place, name) for name in ("pack", "offset", "length",
                  "raw_length", "codec", "base")])  # fmt: skip
    target = memoryview(bytearray(64))
    with pytest.raises(IntegrityError) as caught:
        read_chunk(store, Places({"pack": pack}, {digest: [wrong]}), digest, target)
    assert caught.value.code in ("object-missing", "pack-damaged")
    assert bytes(target) == bytes(64)
    right = Chunk(digest, "pack", 0, 64, 64)
    read_chunk(store, Places({"pack": pack}, {digest: [wrong, right]}), digest, target)
    assert bytes(target) == RAW


def test_a_base_that_is_itself_a_difference_is_none() -> None:
    store = MemoryStore()
    pack = stored(store, "pack", RAW)
    digest, base = digest_of(RAW), digest_of(BASE)
    rows = {
        digest: [Chunk(digest, "pack", 0, 64, 64, "planes-difference-u8", base)],
        base: [Chunk(base, "pack", 0, 64, 64, "planes-difference-u8", digest)],
    }
    with pytest.raises(IntegrityError) as caught:
        read_chunk(store, Places({"pack": pack}, rows), digest, memoryview(bytearray(64)))
    assert caught.value.code == "object-missing"
