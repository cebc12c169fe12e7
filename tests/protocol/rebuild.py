"""The model of losses: the registry is lost in any state and made anew from the store.

Letters are those of the rule. What was under way when the registry was lost may arrive at any
time later.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from protocol import loss as of
from protocol.explore import Step, bits, changed
from protocol.loss import LossSetting


class Rebuild:
    """The model in one setting."""

    def __init__(self, setting: LossSetting) -> None:
        self.setting = setting
        self.rule = setting.rule
        self.pushes = range(setting.pushes)
        count = setting.pushes
        self.push, self.refs, self.claims, self.waits, self.number, self.step = (
            of.FIXED + array * count for array in range(6)
        )
        self.registry = (*range(of.NEXT + 1), *range(self.push, self.number))
        self.length = of.FIXED + 6 * count
        # What is late counts nowhere by the rule, and is followed only where that is broken.
        self.late = bool(self.rule.late_counts) or self.rule.older_counts
        self.late |= "replied" in (self.rule.push_acknowledged, self.rule.delete)

    def begin(self) -> bytes:
        state = bytearray(self.length)
        state[of.NEXT] = 1
        state[of.LOSSES] = self.setting.losses
        for push in range(self.setting.done):
            bit = 1 << push
            state[of.ROWS] |= bit
            state[self.push + push] = of.COMMITTED
            state[self.refs + push] = bit
            state[self.number + push] = state[of.NEXT]
            state[self.step + push] = of.END
            state[of.NEXT] += 1
            for place in (of.PRESENT, of.DOCS, of.ACKED):
                state[place] |= bit
        return bytes(state)

    def put(
        self, state: bytes, *changes: tuple[int, int], stored: dict[int, int] | None = None
    ) -> bytes:
        """The state with changes; ``stored`` are those of fixed places."""
        return changed(state, *changes, *(stored or {}).items())

    def versions(self, state: bytes) -> int:
        """The versions that there are, a mask."""
        return sum(1 << push for push in self.pushes if state[self.refs + push])

    def steps(self, state: bytes) -> Iterator[Step]:
        yield from self._land(state)
        if state[of.PHASE] != of.RUNNING:
            yield from self._list(state)
            return
        for push in self.pushes:
            yield from self._push(state, push)
            yield from self._version(state, push)
        yield from self._copy(state)
        yield from self._collect(state)
        yield from self._outlive(state)
        if state[of.LOSSES]:
            yield from self._lose(state)

    def may_push(self, state: bytes) -> bool:
        """Whether a push goes on, as far as a restored backup can be seen."""
        return True

    def may_collect(self, state: bytes) -> bool:
        """Whether a collector goes on."""
        return True

    def _push(self, state: bytes, push: int) -> Iterator[Step]:
        """T1 to T5; a claim is made of one pack, or one is written."""
        step, row = state[self.step + push], state[self.push + push]
        if step == of.START:
            yield from self._begin_push(state, push)
        if row != of.OPEN:
            return
        yield f"T5 {push}", self._aborted(state, push)
        if step == of.CHOOSE:
            for pack in bits(state[of.ROWS] if self.may_push(state) else 0):
                claimed = (self.claims + push, 1 << pack), (self.step + push, of.CLAIMED)
                yield f"T2 {push} {pack}", self.put(state, *claimed)
            flying = {of.FLYING: state[of.FLYING] | 1 << push}
            after = self.put(state, (self.step + push, of.PUT), stored=flying)
            yield f"PUT {push} begins", after
        elif step == of.CLAIMED or (step == of.PUT and state[of.PRESENT] >> push & 1):
            yield from self._commit(state, push)

    def _begin_push(self, state: bytes, push: int) -> Iterator[Step]:
        opened = [(self.push + push, of.OPEN), (self.step + push, of.CHOOSE)]
        if self.rule.document == "abort-event":  # the number is reserved
            opened += [(self.number + push, state[of.NEXT]), (of.NEXT, state[of.NEXT] + 1)]
        yield f"T1 {push}", self.put(state, *opened)
        if self.setting.same:
            told = self.versions(state)
            if self.rule.same_acknowledged == "asked":
                told &= state[of.DOCS]
            for version in bits(told):
                acked = {of.ACKED: state[of.ACKED] | 1 << version}
                after = self.put(state, (self.step + push, of.END), stored=acked)
                yield f"same content {push} {version}", after

    def _aborted(self, state: bytes, push: int) -> bytes:
        changes = [(self.push + push, of.ABORTED), (self.claims + push, 0)]
        changes.append((self.step + push, of.END))
        stored = {}
        if self.rule.document == "abort-event":
            changes.append((of.RMS, state[of.RMS] | 1 << push))
        if self.rule.document == "before-deleted":
            stored[of.DOCS] = state[of.DOCS] & ~(1 << push)
        return self.put(state, *changes, stored=stored)

    def _commit(self, state: bytes, push: int) -> Iterator[Step]:
        """T4, rule (d)."""
        packs = state[self.claims + push] or 1 << push
        known = state[of.ROWS] | (0 if state[self.claims + push] else 1 << push)
        documented = self.rule.document == "after" or state[of.DOCS] >> push & 1
        if packs & ~known or not documented or not self.may_push(state):
            return
        number, following = state[of.NEXT], state[of.NEXT] + 1
        if self.rule.numbers == "newest":
            existing = [state[self.number + other] for other in bits(self.versions(state))]
            number = max(existing, default=0) + 1
        if self.rule.document == "abort-event":
            number, following = state[self.number + push], state[of.NEXT]
        after = self.put(
            state,
            (of.ROWS, known),
            (of.NEXT, following),
            (self.push + push, of.COMMITTED),
            (self.refs + push, packs),
            (self.claims + push, 0),
            (self.number + push, number),
            (self.step + push, of.END),
        )
        yield f"T4 {push}", after

    def _version(self, state: bytes, version: int) -> Iterator[Step]:
        """Acknowledgements, rule (j), and T6."""
        bit = 1 << version
        acked, rm_acked = state[of.ACKED], state[of.RM_ACKED]
        if state[self.refs + version]:
            told = state[of.DOCS] & bit or self.rule.push_acknowledged == "committed"
            if told and not acked & bit:
                yield f"ack {version}", self.put(state, stored={of.ACKED: acked | bit})
            yield f"T6 {version}", self._removed(state, version)
        if state[of.RMS] & bit and state[self.push + version] == of.COMMITTED:
            told = state[of.RM_STORED] & bit or self.rule.rm_acknowledged == "committed"
            if told and not rm_acked & bit:
                yield f"ack rm {version}", self.put(state, stored={of.RM_ACKED: rm_acked | bit})

    def _removed(self, state: bytes, version: int) -> bytes:
        bit = 1 << version
        changes = (self.refs + version, 0), (of.RMS, state[of.RMS] | bit)
        return self.put(state, *changes, stored={of.BEGUN: state[of.BEGUN] | bit})

    def _copy(self, state: bytes) -> Iterator[Step]:
        """``copy_pending``: documents in any order, dead events after the events before them."""
        documents = self.versions(state)
        if self.rule.document != "after":
            documents = self._written(state)
        dead = state[of.DEADS] if self.rule.dead_events != "none" else 0
        missing = state[of.RMS] & ~state[of.RM_STORED]
        for key in bits(dead):
            waits = state[self.waits + key] if self.rule.dead_waits == "earlier" else state[of.RMS]
            if missing & waits and self.rule.dead_waits != "nothing":
                dead &= ~(1 << key)
        for waiting, (stored, flying, _, name) in zip(
            (documents, state[of.RMS], dead), of.KINDS, strict=True
        ):
            now = state[flying]
            for one in bits(waiting & ~state[stored] & ~now):
                yield f"copy {name} {one}", self.put(state, stored={flying: now | 1 << one})

    def _written(self, state: bytes) -> int:
        """The pushes whose bytes are durable, for a document before the commit."""
        found = self.versions(state)
        for push in self.pushes:
            durable = state[of.PRESENT] >> push & 1 or state[self.claims + push]
            if state[self.push + push] == of.OPEN and durable:
                found |= 1 << push
        return found

    def _collect(self, state: bytes) -> Iterator[Step]:
        """Rules (e), (f) and (i)."""
        if not self.may_collect(state):
            return
        needed = 0
        for push in self.pushes:
            needed |= state[self.refs + push] | state[self.claims + push]
        for key in bits(state[of.ROWS] & ~needed):
            yield f"gc removes {key}", self._died(state, key, event=True)
        for key in bits(state[of.PRESENT] & ~state[of.ROWS] & ~state[of.DEADS]):
            if state[self.push + key] in (of.COMMITTED, of.ABORTED):
                yield f"sweep {key}", self._died(state, key, event=self.rule.dead_events == "all")
        ready = state[of.DEADS]
        if self.rule.dead_events != "none" and self.rule.delete != "dead":
            ready &= state[of.DEAD_STORED]
        sent = state[of.SENT]
        for key in bits(ready & ~sent):
            yield f"DELETE {key} sent", self.put(state, stored={of.SENT: sent | 1 << key})
        for version in bits(state[of.RM_STORED] & state[of.DOCS]):
            stored = {of.DOCS: state[of.DOCS] ^ 1 << version}
            if not self.rule.keeps_rm:
                stored[of.RM_STORED] = state[of.RM_STORED] ^ 1 << version
            yield f"gc deletes document {version}", self.put(state, stored=stored)

    def _died(self, state: bytes, key: int, *, event: bool) -> bytes:
        waits = state[of.RMS] & ~state[of.RM_STORED]
        rows, deads = state[of.ROWS] & ~(1 << key), state[of.DEADS] | 1 << key
        after = self.put(state, (of.ROWS, rows), (of.DEADS, deads), (self.waits + key, waits))
        if event:
            return after
        # Nothing will say so in the store: DELETE may be sent at once.
        return self.put(after, stored={of.SENT: after[of.SENT] | 1 << key})

    def _land(self, state: bytes) -> Iterator[Step]:
        """What is under way arrives; what is late counts only where the rule is broken."""
        for pack in bits(state[of.SENT] & state[of.PRESENT]):
            there = {of.PRESENT: state[of.PRESENT] ^ 1 << pack}
            yield f"DELETE {pack} lands", self.put(state, stored=there)
        for pack in bits(state[of.FLYING]):
            there = {
                of.PRESENT: state[of.PRESENT] | 1 << pack,
                of.FLYING: state[of.FLYING] ^ 1 << pack,
            }
            yield f"PUT {pack} lands", self.put(state, stored=there)
        for stored, flying, late, name in of.KINDS:
            there_now, now, old = (state[place] for place in (stored, flying, late))
            for one in bits(now):
                after = {stored: there_now | 1 << one, flying: now ^ 1 << one}
                if name == "document" and self.setting.second_document:
                    after[of.DUE] = state[of.DUE] | 1 << one
                yield f"{name} {one} lands", self.put(state, stored=after)
            for one in bits(old):
                after = {late: old ^ 1 << one}
                listing = state[of.PHASE] != of.RUNNING
                if name in self.rule.late_counts or (self.rule.older_counts and listing):
                    after[stored] = there_now | 1 << one
                yield f"{name} {one} lands late", self.put(state, stored=after)
        for one in bits(state[of.DUE]):
            again = {
                of.DOCS: state[of.DOCS] | 1 << one,
                of.DUE: state[of.DUE] ^ 1 << one,
            }
            yield f"document {one} lands again", self.put(state, stored=again)

    def _lose(self, state: bytes) -> Iterator[Step]:
        """The registry is gone, and its processes with it."""
        old = state[of.OLD_PUSHES], state[of.OLD_KEYS]
        stored = {of.LOSSES: state[of.LOSSES] - 1, of.PHASE: of.LOST}
        if self.rule.cut_off == "pushes":
            stored[of.OLD_PUSHES] = old[0] | self.versions(state)
        if self.rule.push_acknowledged == "replied":
            stored[of.OLD_PUSHES] = old[0] | self.versions(state) & state[of.DOCS_FLYING]
        if self.rule.delete == "replied":
            stored[of.OLD_KEYS] = old[1] | state[of.DEADS] & state[of.DEAD_FLYING]
        if self.rule.cut_off == "collectors":
            needed = 0
            for push in self.pushes:
                needed |= state[self.refs + push] | state[self.claims + push]
            stored[of.OLD_KEYS] = old[1] | state[of.DEADS] | state[of.ROWS] & ~needed
        if self.rule.cut_off == "documents":
            stored[of.OLD_KEYS] = old[1] | state[of.RMS] & ~state[of.RM_STORED]
        gone = [(place, 0) for place in self.registry]
        gone += [(self.step + push, of.END) for push in self.pushes if state[self.step + push]]
        lost = self.put(state, *gone, stored=stored)
        if self.setting.listing == "at once":
            for after in self._rebuilt(self._listed(lost, of.KINDS), 0):
                yield "loss", after
        else:
            yield "loss", lost

    def _list(self, state: bytes) -> Iterator[Step]:
        """Rule (k): the store is listed in three steps, and then the registry is made."""
        phase = state[of.PHASE]
        parts = [of.KINDS[:1], of.KINDS[1:]]
        if self.setting.listing == "events first":
            parts.reverse()
        if phase < of.LISTED_TWO:
            after = self._listed(state, parts[phase - 1])
            yield "list", self.put(after, stored={of.PHASE: phase + 1})
        else:
            for after in self._rebuilt(state, 0):
                yield "rebuild", after

    def _listed(self, state: bytes, kinds: tuple[tuple[int, int, int, str], ...]) -> bytes:
        got = {of.DOCS: of.GOT_DOCS, of.RM_STORED: of.GOT_RMS, of.DEAD_STORED: of.GOT_DEADS}
        return self.put(state, stored={got[stored]: state[stored] for stored, _, _, _ in kinds})

    def _rebuilt(self, state: bytes, added: int) -> Iterator[bytes]:
        """One registry for each choice of packs; ``added`` are versions that a backup knows."""
        docs, rms, deads = (state[place] for place in (of.GOT_DOCS, of.GOT_RMS, of.GOT_DEADS))
        packs = state[of.PRESENT] & ~deads
        removed = rms if self.rule.reads_rm else 0
        if self.rule.rm_by == "number":
            numbers = {state[self.number + version] for version in bits(rms)}
            removed = sum(1 << push for push in self.pushes if state[self.number + push] in numbers)
        versions = (docs | (added if packs else 0)) & ~removed
        counted = [state[self.number + version] for version in bits(docs | rms | added)]
        changes = [(of.ROWS, packs), (of.RMS, rms), (of.DEADS, deads)]
        if self.rule.numbers == "newest":
            counted = [state[self.number + version] for version in bits(versions)]
        changes.append((of.NEXT, max(counted, default=0) + 1))
        seen = state[of.PRESENT]
        for push in self.pushes:
            if (docs | rms | added) >> push & 1:
                changes.append((self.push + push, of.COMMITTED))
            elif seen >> push & 1:
                changes.append((self.push + push, of.ABORTED))
        stored = self._settled(state, docs, rms, deads)
        stored[of.BEGUN] = state[of.BEGUN] & ~versions
        if versions and not packs:
            stored[of.INCOMPLETE] = versions
        for choice in product(*(bits(packs) for _ in bits(versions))) if packs else [()]:
            refs = [
                (self.refs + version, 1 << pack)
                for version, pack in zip(bits(versions), choice, strict=False)
            ]
            yield self.put(state, *changes, *refs, stored=stored)

    def _settled(self, state: bytes, docs: int, rms: int, deads: int) -> dict[int, int]:
        """The new epoch: what was not counted never counts."""
        stored = {of.PHASE: of.RUNNING, of.GOT_DOCS: 0, of.GOT_RMS: 0, of.GOT_DEADS: 0}
        for (place, flying, late, name), counted in zip(of.KINDS, (docs, rms, deads), strict=True):
            there = state[place]
            stored[place] = there if name in self.rule.late_counts else counted
            stored[flying] = 0
            stored[late] = (state[late] | state[flying]) * self.late
        stored[of.DOCS_LATE] |= state[of.DUE] * self.late
        stored[of.DUE] = 0
        return stored

    def _outlive(self, state: bytes) -> Iterator[Step]:
        """Processes of a lost registry that go on, where the rule is broken."""
        pushes, keys = state[of.OLD_PUSHES], state[of.OLD_KEYS]
        replied = ~0
        if self.rule.push_acknowledged == "replied":
            replied = ~state[of.DOCS_LATE]
        for version in bits(pushes & replied):
            acked = {of.ACKED: state[of.ACKED] | 1 << version}
            acked[of.OLD_PUSHES] = pushes ^ 1 << version
            yield f"old ack {version}", self.put(state, stored=acked)
        if self.rule.delete == "replied":
            keys &= ~state[of.DEAD_LATE]
        if self.rule.cut_off == "documents":
            for version in bits(keys & state[of.DOCS]):
                left = {of.DOCS: state[of.DOCS] ^ 1 << version}
                yield f"old gc deletes document {version}", self.put(state, stored=left)
            return
        for key in bits(keys & ~state[of.SENT]):
            sent = {of.SENT: state[of.SENT] | 1 << key}
            yield f"old DELETE {key}", self.put(state, stored=sent)

    def violation(self, state: bytes) -> str | None:
        """What was acknowledged is there, what was removed is not, no number is given twice."""
        if state[of.PHASE] != of.RUNNING:
            return None
        return next((one for one in self.broken(state) if one in self.setting.promises), None)

    def broken(self, state: bytes) -> Iterator[str]:
        """The promises that do not hold while there is a registry."""
        there = state[of.PRESENT] & ~state[of.SENT]
        acked, versions = state[of.ACKED], self.versions(state)
        if state[of.INCOMPLETE] or any(state[self.refs + push] & ~there for push in self.pushes):
            yield "bytes"
        if acked & ~state[of.BEGUN] & ~versions:
            yield "lost"
        if state[of.RM_ACKED] & versions:
            yield "returned"
        numbers = [state[self.number + version] for version in bits(acked)]
        if len(set(numbers)) < len(numbers):
            yield "number"
