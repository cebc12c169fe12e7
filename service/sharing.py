"""What a push shares with the store: packs chosen, claimed, and their sizes checked (rule (c))."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from ckpt.core.records import Chunk, Pack
from ckpt.registry.books import Books
from ckpt.storage.chunks import Places
from ckpt.storage.store import Store

# Claims packs, and returns those that it got.
Claim = Callable[[set[str]], Sequence[Pack]]
# The packs that a chunk can be read from together: its own, and that of its base.
_Way = frozenset[str]


class Sharing:
    """The packs that one push has claimed."""

    def __init__(self, store: Store, books: Books) -> None:
        self._store = store
        self._books = books
        self._usable: dict[str, Pack] = {}
        self._refused: set[str] = set()
        self._bases: dict[str, list[Chunk]] = {}

    def settle(
        self, hits: Mapping[str, Sequence[Chunk]], bases: Collection[str], claim: Claim
    ) -> dict[str, set[str]]:
        """Claim packs that have these chunks, and the bases of differences to be written.

        Returns the packs to rely on for each hit that can be; the others are to be written.
        """
        far = {row.base for rows in hits.values() for row in rows if row.base is not None}
        found = self._books.find_chunks(far | set(bases)) if far or bases else {}
        alone = {
            digest: [row for row in rows if row.base is None] for digest, rows in found.items()
        }
        ways = {
            digest: [way for row in rows for way in _ways(row, alone)]
            for digest, rows in hits.items()
        }
        wanted = {base: [frozenset({row.pack}) for row in alone.get(base, ())] for base in bases}
        settled = self._settled({**wanted, **ways}, claim)
        for base in bases:
            # Not by how it was settled: a hit may be a base, too, and come as a difference.
            rows = [row for row in alone.get(base, ()) if row.pack in self._usable]
            if rows:
                self._bases[base] = rows
        return {digest: set(settled[digest]) for digest in hits.keys() & settled.keys()}

    def base_pack(self, base: str) -> str | None:
        """The claimed pack that has this base, or None."""
        return self._bases[base][0].pack if base in self._bases else None

    def base_places(self) -> Places:
        """Where the claimed bases lie."""
        return Places(self._usable, self._bases)

    def _settled(self, ways: dict[str, list[_Way]], claim: Claim) -> dict[str, _Way]:
        """For each chunk a way whose packs are all claimed and whole, if there is one."""
        settled: dict[str, _Way] = {}
        while ways:
            for digest, open_ways in list(ways.items()):
                ready = next((way for way in open_ways if way <= self._usable.keys()), None)
                if ready is not None:
                    settled[digest] = ready
                    del ways[digest]
                    continue
                ways[digest] = [way for way in open_ways if not way & self._refused]
                if not ways[digest]:
                    del ways[digest]
            self._try(_fewest_packs(ways.values()) - self._usable.keys(), claim)
        return settled

    def _try(self, wanted: set[str], claim: Claim) -> None:
        """Claim packs, then check that the store still has them whole."""
        if not wanted:
            return
        for pack in claim(wanted):
            size = self._store.size(pack.key)
            if size == pack.size:
                self._usable[pack.id] = pack
            else:
                self._books.note_alarm(pack, size)
        self._refused |= wanted - self._usable.keys()


def _ways(row: Chunk, alone: Mapping[str, Sequence[Chunk]]) -> list[_Way]:
    if row.base is None:
        return [frozenset({row.pack})]
    return [frozenset({row.pack, base.pack}) for base in alone.get(row.base, ())]


def _fewest_packs(choices: Iterable[Sequence[_Way]]) -> set[str]:
    """A small set of packs that has a way for every chunk."""
    options = list(choices)
    uses = Counter(pack for ways in options for way in ways for pack in way)
    chosen: set[str] = set()
    for ways in options:
        chosen |= max(ways, key=lambda way: (-len(way), sum(uses[one] for one in way), sorted(way)))
    return chosen
