"""The model of sharing: pushes, collectors, repacks, repairs and readers of one store.

A transaction that locks first is one step, others are split at each statement. A crash is an
actor of which no step is taken any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from itertools import product
from operator import or_

from protocol import collecting, moving, pushing, reading
from protocol import layout as of
from protocol.explore import Step, bits
from protocol.layout import Setting


class Sharing:
    """The model in one setting."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.rule = setting.rule
        old, pushes = len(setting.packs), 0
        self.own: list[int] = []
        self.made: list[int] = []
        for actor in setting.actors:
            fresh = max([old, *(key + 1 for key in self.own)])
            writes = actor.kind != "repair"
            self.own.append(fresh if actor.key is None and writes else actor.key or 0)
            self.made.append(len(setting.versions) + pushes)
            pushes += actor.kind == "push"
        self.packs = max([old, *(key + 1 for key in self.own)])
        self.needs = [need for need, _ in setting.versions]
        self.needs += [actor.need for actor in setting.actors if actor.kind == "push"]
        self.refs = of.CONTENTS + self.packs
        self.actors = [
            self.refs + len(self.needs) + 5 * number for number in range(len(setting.actors))
        ]
        self.readers = [
            self.refs + len(self.needs) + 5 * len(self.actors) + 4 * number
            for number in range(len(setting.readers))
        ]
        self.versions = range(self.refs, self.refs + len(self.needs))
        self.creators = {
            key: number
            for number, key in reversed(list(enumerate(self.own)))
            if setting.actors[number].kind != "repair"
        }
        self.raw = {digest: 1 << bit for bit, (digest, base) in self._entries() if base is None}
        self.delta = {digest: bit for bit, (digest, base) in self._entries() if base is not None}
        self.readable = [self._readable(mask) for mask in range(1 << len(setting.entries))]
        self.mentioned = [
            reduce(or_, (1 << setting.entries[bit][0] for bit in bits(mask)), 0)
            for mask in range(1 << len(setting.entries))
        ]
        self._plans: dict[tuple[object, ...], list[tuple[int, int]]] = {}

    def _entries(self) -> Iterator[tuple[int, tuple[int, int | None]]]:
        return iter(enumerate(self.setting.entries))

    def _readable(self, mask: int) -> int:
        """The digests that can be decoded from these entries alone."""
        found, before = 0, -1
        while found != before:
            before = found
            for bit in bits(mask):
                digest, base = self.setting.entries[bit]
                if base is None or found >> base & 1:
                    found |= 1 << digest
        return found

    def begin(self) -> bytes:
        state = bytearray(
            self.refs + len(self.needs) + 5 * len(self.actors) + 4 * len(self.readers)
        )
        for pack, contents in enumerate(self.setting.packs):
            state[of.LIVE] |= 1 << pack
            state[of.PRESENT] |= 1 << pack
            state[of.CONTENTS + pack] = contents
        for version, (_, refs) in enumerate(self.setting.versions):
            state[self.refs + version] = refs
        return bytes(state)

    def steps(self, state: bytes) -> Iterator[Step]:
        for number, actor in enumerate(self.setting.actors):
            if actor.kind == "push":
                yield from pushing.steps(self, state, number)
            else:
                yield from moving.steps(self, state, number)
            yield from pushing.ends(self, state, number)
        for number in range(len(self.readers)):
            yield from reading.steps(self, state, number)
        yield from collecting.steps(self, state)

    def contents(self, state: bytes, packs: int) -> int:
        """The entries of these packs together."""
        found = 0
        for pack in bits(packs):
            found |= state[of.CONTENTS + pack]
        return found

    def plans(
        self, state: bytes, need: int, usable: int, delta: bool | None
    ) -> list[tuple[int, int]]:
        """Closed choices of packs for these digests, and the entries left to write; with ``delta``
        None nothing can be written."""
        rows = tuple(
            state[of.CONTENTS + pack] if usable >> pack & 1 else 0 for pack in range(self.packs)
        )
        key = (need, rows, delta)
        found = self._plans.get(key)
        if found is None:
            each = [self._choices(digest, rows, delta) for digest in bits(need)]
            chosen = {
                (reduce(or_, (packs for packs, _ in one)), reduce(or_, (new for _, new in one)))
                for one in product(*each)
            }
            found = self._plans[key] = sorted(chosen)
        return found

    def _choices(
        self, digest: int, rows: tuple[int, ...], delta: bool | None
    ) -> list[tuple[int, int]]:
        known = self.closures(digest, rows)
        if known or delta is None:
            return [(packs, 0) for packs in known]
        if delta and digest in self.delta:
            base = self.setting.entries[self.delta[digest]][1]
            assert base is not None
            bases = self.closures(base, rows)
            if bases:
                return [(packs, 1 << self.delta[digest]) for packs in bases]
        return [(0, self.raw[digest])]

    def closures(self, digest: int, rows: tuple[int, ...]) -> list[int]:
        """Sets of packs from which a digest can be decoded, one for each choice of rows."""
        found = []
        for pack, contents in enumerate(rows):
            if contents & self.raw.get(digest, 0):
                found.append(1 << pack)
            elif digest in self.delta and contents >> self.delta[digest] & 1:
                base = self.setting.entries[self.delta[digest]][1]
                assert base is not None
                found += [1 << pack | packs for packs in self.closures(base, rows)]
        return found

    def needed(self, state: bytes) -> int:
        """Packs that a version refers to or a push claims, as the collector sees it."""
        found = 0
        if self.rule.gc_reads_refs:
            for place in self.versions:
                found |= state[place]
        if self.rule.gc_reads_claims:
            for place in self.actors:
                found |= state[place + of.CLAIMS]
        return found

    def violation(self, state: bytes) -> str | None:
        """Section 4 of the protocol: what holds in every state."""
        promises = self.setting.promises
        rows = state[of.LIVE] | state[of.CONDEMNED] | state[of.BROKEN]
        for version, place in enumerate(self.versions):
            refs = state[place]
            if refs and "bytes" in promises and not state[of.DAMAGED] >> version & 1:
                there = self.contents(state, refs & state[of.PRESENT])
                if self.needs[version] & ~self.readable[there]:
                    return "bytes"
            if "rows" in promises and refs & (~rows | state[of.DEAD]):
                return "rows"
        for place in self.actors:
            claims = state[place + of.CLAIMS]
            if claims and state[place + of.ROW] != of.OPEN:
                if "claims" in promises:
                    return "claims"
            elif "kept" in promises and claims & ~rows:
                return "kept"
        if "reader" in promises:
            for place in self.readers:
                if state[place + of.PLACE] == of.FAILED:
                    return "reader"
        return None
