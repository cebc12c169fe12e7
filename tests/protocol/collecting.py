"""The steps of collectors, of the store and of ``rm``, as in ``registry/collect.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from protocol import layout as of
from protocol.explore import Step, bits, changed

if TYPE_CHECKING:
    from protocol.sharing import Sharing


def steps(model: Sharing, state: bytes) -> Iterator[Step]:
    """What may happen to the store and its books beside the actors; any number of collectors."""
    yield from _remove_versions(model, state)
    yield from _condemn_and_remove(model, state)
    yield from _sweep(model, state)
    yield from _send_deletes(model, state)
    yield from _land(model, state)
    if model.setting.loses:
        yield from _lose(model, state)
    if model.setting.fsck:
        yield from _mark(model, state)


def _remove_versions(model: Sharing, state: bytes) -> Iterator[Step]:
    """T6, ``Changes.remove``."""
    for version, place in enumerate(model.versions):
        if state[place]:
            damaged = state[of.DAMAGED] & ~(1 << version)
            yield f"rm {version}", changed(state, (place, 0), (of.DAMAGED, damaged))


def _condemn_and_remove(model: Sharing, state: bytes) -> Iterator[Step]:
    """``Collector.condemn`` and ``Collector.remove``, rule (e)."""
    free = ~(model.needed(state) | state[of.LOCKED])
    for pack in bits(state[of.LIVE] & free):
        live, condemned = state[of.LIVE] ^ 1 << pack, state[of.CONDEMNED] | 1 << pack
        yield f"gc condemns {pack}", changed(state, (of.LIVE, live), (of.CONDEMNED, condemned))
    ending = state[of.CONDEMNED] | state[of.BROKEN]
    if model.rule.gc_snapshot == "fresh":
        for pack in bits(ending & free):
            yield f"gc removes {pack}", _removed(state, pack)
        return
    if model.rule.gc_snapshot == "old-live":
        ending |= state[of.LIVE]
    for pack in bits(ending & free & ~state[of.SEEN]):
        yield f"gc looks at {pack}", changed(state, (of.SEEN, state[of.SEEN] | 1 << pack))
    for pack in bits(ending & state[of.SEEN]):
        yield f"gc removes {pack}", _removed(state, pack)


def _removed(state: bytes, pack: int) -> bytes:
    other = ~(1 << pack)
    return changed(
        state,
        (of.LIVE, state[of.LIVE] & other),
        (of.CONDEMNED, state[of.CONDEMNED] & other),
        (of.BROKEN, state[of.BROKEN] & other),
        (of.SEEN, state[of.SEEN] & other),
        (of.DEAD, state[of.DEAD] | 1 << pack),
    )


def _sweep(model: Sharing, state: bytes) -> Iterator[Step]:
    """``Collector.sweep``, rule (f)."""
    rule = model.rule.sweep
    rows = state[of.LIVE] | state[of.CONDEMNED] | state[of.BROKEN]
    for pack in bits(state[of.PRESENT] & ~state[of.DEAD]):
        creator = model.creators.get(pack)
        row = of.COMMITTED if creator is None else state[model.actors[creator] + of.ROW]
        over = row in (of.COMMITTED, of.ABORTED) or (row == of.OPEN and rule == "open-ignored")
        rowless = not rows >> pack & 1
        bit = 1 << pack
        if rule == "row-first":
            if rowless and not state[of.SEEN] & bit:
                yield f"sweep looks at {pack}", changed(state, (of.SEEN, state[of.SEEN] | bit))
            if over and state[of.SEEN] & bit:
                yield f"sweep {pack}", _swept(state, bit)
        elif over and (rowless or (rule == "row-ignored" and row == of.ABORTED)):
            yield f"sweep {pack}", _swept(state, bit)


def _swept(state: bytes, bit: int) -> bytes:
    return changed(state, (of.SEEN, state[of.SEEN] & ~bit), (of.DEAD, state[of.DEAD] | bit))


def _send_deletes(model: Sharing, state: bytes) -> Iterator[Step]:
    """Rule (i); what must be in the store before is in the model of losses."""
    doomed = state[of.DEAD]
    if model.rule.deletes_condemned:
        doomed |= state[of.CONDEMNED]
    for pack in bits(doomed & ~state[of.SENT]):
        yield f"DELETE {pack} sent", changed(state, (of.SENT, state[of.SENT] | 1 << pack))
    if model.setting.forgets:
        for pack in bits(state[of.DEAD] & ~state[of.PRESENT]):
            dead = state[of.DEAD] ^ 1 << pack
            yield f"gc forgets {pack}", changed(state, (of.DEAD, dead))


def _land(model: Sharing, state: bytes) -> Iterator[Step]:
    """What was sent may arrive at any time; a DELETE any number of times, a PUT even twice."""
    for pack in bits(state[of.SENT] & state[of.PRESENT]):
        there = state[of.PRESENT] ^ 1 << pack
        yield f"DELETE {pack} lands", changed(state, (of.PRESENT, there))
    for pack in bits(state[of.FLYING]):
        there, flying = state[of.PRESENT] | 1 << pack, state[of.FLYING] ^ 1 << pack
        due = state[of.DUE] | (1 << pack if model.setting.second_put else 0)
        changes = (of.PRESENT, there), (of.FLYING, flying), (of.DUE, due)
        yield f"PUT {pack} lands", changed(state, *changes)
    for pack in bits(state[of.DUE]):
        there, due = state[of.PRESENT] | 1 << pack, state[of.DUE] ^ 1 << pack
        yield f"PUT {pack} again", changed(state, (of.PRESENT, there), (of.DUE, due))


def _lose(model: Sharing, state: bytes) -> Iterator[Step]:
    """The disk loses a pack that no open push claims; its versions are damaged then."""
    claimed = 0
    for place in model.actors:
        claimed |= state[place + of.CLAIMS]
    for pack in bits(model.setting.loses & state[of.PRESENT] & ~claimed & ~state[of.LOST]):
        damaged = state[of.DAMAGED]
        for version, place in enumerate(model.versions):
            if state[place] >> pack & 1:
                damaged |= 1 << version
        there, lost = state[of.PRESENT] ^ 1 << pack, state[of.LOST] | 1 << pack
        changes = (of.PRESENT, there), (of.LOST, lost), (of.DAMAGED, damaged)
        yield f"disk loses {pack}", changed(state, *changes)


def _mark(model: Sharing, state: bytes) -> Iterator[Step]:
    """``Repairs.mark``: a pack is broken, or was found whole again."""
    rows = state[of.LIVE] | state[of.CONDEMNED]
    free = ~state[of.LOCKED]
    for pack in bits(rows & free & (~state[of.PRESENT] | model.setting.doubts)):
        other = ~(1 << pack)
        changes = (of.LIVE, state[of.LIVE] & other), (of.CONDEMNED, state[of.CONDEMNED] & other)
        broken = (of.BROKEN, state[of.BROKEN] | 1 << pack)
        yield f"fsck breaks {pack}", changed(state, *changes, broken)
    for pack in bits(state[of.BROKEN] & free & state[of.PRESENT]):
        whole, live = state[of.BROKEN] ^ 1 << pack, state[of.LIVE] | 1 << pack
        yield f"fsck heals {pack}", changed(state, (of.BROKEN, whole), (of.LIVE, live))
