"""The steps of a push (T1 to T5), as in ``registry/books.py`` and ``registry/commit.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from protocol import layout as of
from protocol.explore import Step, bits, changed

if TYPE_CHECKING:
    from protocol.sharing import Sharing


def steps(model: Sharing, state: bytes, number: int) -> Iterator[Step]:
    """What a push may do next."""
    at = model.actors[number]
    act = _STEPS.get(state[at])
    if act is not None:
        yield from act(model, state, number, at)


def _open(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    """T1, ``Books.open_push``."""
    yield f"T1 {number}", changed(state, (at, of.LOOK), (at + of.ROW, of.OPEN))


def _look(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    """``Books.find_chunks``: a hint, without locks."""
    rows = state[of.LIVE] | state[of.CONDEMNED] * model.rule.claims
    usable = (rows | state[of.BROKEN] * model.rule.claims_broken) & ~state[at + of.AVOID]
    actor, own = model.setting.actors[number], model.own[number]
    for plan, written in model.plans(state, actor.need, usable, actor.delta):
        step = of.CLAIM if plan else _writing(model, actor.early)
        contents = written or state[of.CONTENTS + own] * (model.own.count(own) > 1)
        changes = (at, step), (at + of.PLAN, plan), (of.CONTENTS + own, contents)
        yield f"look {number} {plan:b}", changed(state, *changes)
    if model.rule.adopts:
        yield from _adopt(model, state, number, at)


def _adopt(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    rows = state[of.LIVE] | state[of.CONDEMNED] | state[of.BROKEN]
    listed = state[of.PRESENT] & ~rows & ~(1 << model.own[number])
    need = model.setting.actors[number].need
    for plan, _ in model.plans(state, need, listed, None):
        yield f"adopt {number}", changed(state, (at, of.COMMIT), (at + of.PLAN, plan))


def _writing(model: Sharing, early: bool) -> int:
    return of.WRITE if model.rule.bytes_first or not early else of.EARLY


def _claim(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    """T2, ``Books.claim``, rule (c)."""
    rule, plan = model.rule, state[at + of.PLAN]
    if plan & state[of.LOCKED]:
        return
    if rule.claims_need_open and state[at + of.ROW] != of.OPEN:
        yield f"T2 {number} expired", changed(state, (at, of.END))
        return
    wanted = plan if rule.claims_bases else _direct(model, state, number, plan)
    good = state[of.LIVE] | state[of.CONDEMNED] | state[of.BROKEN] * rule.claims_broken
    if rule.claims and wanted & ~good:
        yield f"T2 {number} gone", changed(state, (at, of.LOOK), (at + of.PLAN, 0))
    elif rule.rescue != "locked":
        yield f"T2 {number} reads", changed(state, (at, of.RESCUE))
    elif not rule.claims:
        yield f"T2 {number} nothing", changed(state, (at, of.CHECK))
    else:
        yield f"T2 {number}", _rescued(state, at, wanted, wanted)


def _rescue(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    """The second half of a claim whose rows were read without a lock."""
    wanted = state[at + of.PLAN]
    if state[at + of.ROW] != of.OPEN:
        yield f"T2 {number} expired", changed(state, (at, of.END))
        return
    rows = state[of.LIVE] | state[of.CONDEMNED]
    live = wanted if model.rule.rescue == "upsert" else wanted & rows
    yield f"T2 {number} writes", _rescued(state, at, wanted, live)


def _rescued(state: bytes, at: int, wanted: int, live: int) -> bytes:
    live &= ~state[of.BROKEN]
    return changed(
        state,
        (of.LIVE, state[of.LIVE] | live),
        (of.CONDEMNED, state[of.CONDEMNED] & ~live),
        (at + of.CLAIMS, state[at + of.CLAIMS] | wanted),
        (at, of.CHECK),
    )


def _check(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    """``Upload._claim``: the sizes of what was claimed."""
    missing = state[at + of.PLAN] & ~state[of.PRESENT]
    if missing and model.rule.checks_size:
        changes = (at, of.LOOK), (at + of.AVOID, state[at + of.AVOID] | missing), (at + of.PLAN, 0)
        yield f"HEAD {number} missing", changed(state, *changes)
        return
    early = model.setting.actors[number].early
    new = state[of.CONTENTS + model.own[number]]
    yield f"HEAD {number}", changed(state, (at, _writing(model, early) if new else of.COMMIT))


def _early(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    """The row before the bytes: against rule (b)."""
    if state[at + of.ROW] == of.OPEN:
        yield f"T3 {number} before bytes", _registered(model, state, number, at, of.WRITE)


def _write(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    """The PUT begins, whether or not the push is still open."""
    bit = 1 << model.own[number]
    yield f"PUT {number} begins", changed(state, (at, of.PUT), (of.FLYING, state[of.FLYING] | bit))


def _put(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    """HEAD of the own pack."""
    bit = 1 << model.own[number]
    if state[of.PRESENT] & bit:
        early = model.setting.actors[number].early and model.rule.bytes_first
        yield f"HEAD {number} own", changed(state, (at, of.REGISTER if early else of.COMMIT))


def _register(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    """T3, ``Books.register``, rule (b)."""
    if model.rule.registers_open and state[at + of.ROW] != of.OPEN:
        yield f"T3 {number} expired", changed(state, (at, of.END))
    else:
        yield f"T3 {number}", _registered(model, state, number, at, of.COMMIT)


def _registered(model: Sharing, state: bytes, number: int, at: int, step: int) -> bytes:
    bit = 1 << model.own[number]
    claim = bit if model.rule.claims_own and state[at + of.ROW] == of.OPEN else 0
    changes = (of.LIVE, state[of.LIVE] | bit), (at + of.CLAIMS, state[at + of.CLAIMS] | claim)
    return changed(state, (at, step), *changes)


def _commit(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    """T4, ``commit_push``, rule (d)."""
    if (state[at + of.PLAN] | 1 << model.own[number]) & state[of.LOCKED]:
        return
    if model.rule.commit_checks_push and state[at + of.ROW] != of.OPEN:
        yield f"T4 {number} expired", changed(state, (at, of.END))
    elif _refused(model, state, number, at):
        yield f"T4 {number} refused", changed(state, (at, of.END))
    elif model.rule.commit_at_once:
        yield f"T4 {number}", _committed(model, state, number, at)
    else:
        yield f"T4 {number} checks", changed(state, (at, of.INSERT))


def _insert(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    """The second half of a commit in two transactions."""
    yield f"T4 {number} inserts", _committed(model, state, number, at)


def _used(model: Sharing, state: bytes, number: int, at: int) -> tuple[int, int]:
    """``(packs, inserted)``: all packs of the push, and those that get their row in the commit."""
    own = 1 << model.own[number]
    packs = state[at + of.PLAN]
    inserted = 0
    if state[of.CONTENTS + model.own[number]]:
        packs |= own
        inserted = 0 if model.setting.actors[number].early else own
    if model.rule.adopts:
        rows = state[of.LIVE] | state[of.CONDEMNED] | state[of.BROKEN]
        inserted |= state[at + of.PLAN] & ~rows
    return packs, inserted


def _refused(model: Sharing, state: bytes, number: int, at: int) -> bool:
    packs, inserted = _used(model, state, number, at)
    need = model.setting.actors[number].need
    rows = state[of.LIVE] | state[of.CONDEMNED] | state[of.BROKEN]
    if model.rule.commit_checks_rows and packs & ~(state[of.LIVE] | inserted):
        return True
    if not model.rule.commit_checks_digests:
        return False
    # Chunk rows are those of packs with a row; without the check of rows, what was planned.
    there = packs & (rows | inserted) if model.rule.commit_checks_rows else packs
    return bool(need & ~model.readable[model.contents(state, there)])


def _committed(model: Sharing, state: bytes, number: int, at: int) -> bytes:
    packs, inserted = _used(model, state, number, at)
    refs = packs
    if model.rule.refs != "closed":
        refs = _direct(model, state, number, packs)
        if model.rule.refs == "one":
            refs |= _holders(model, state, packs, _bases(model, state, number, refs))
    return changed(
        state,
        (of.LIVE, state[of.LIVE] | inserted),
        (model.refs + model.made[number], refs),
        (at, of.END),
        (at + of.ROW, of.COMMITTED),
        (at + of.CLAIMS, 0),
    )


def _direct(model: Sharing, state: bytes, number: int, packs: int) -> int:
    """Those of the packs that have a digest of the push itself."""
    return _holders(model, state, packs, model.setting.actors[number].need)


def _holders(model: Sharing, state: bytes, packs: int, digests: int) -> int:
    found = 0
    for pack in bits(packs):
        if model.mentioned[state[of.CONTENTS + pack]] & digests:
            found |= 1 << pack
    return found


def _bases(model: Sharing, state: bytes, number: int, packs: int) -> int:
    found = 0
    need = model.setting.actors[number].need
    for bit in bits(model.contents(state, packs)):
        digest, base = model.setting.entries[bit]
        if base is not None and need >> digest & 1:
            found |= 1 << base
    return found


def ends(model: Sharing, state: bytes, number: int) -> Iterator[Step]:
    """T5, rule (g): ``Books.abort`` and ``Collector.expire``, in any state."""
    rule, at = model.rule, model.actors[number]
    row = state[at + of.ROW]
    if row == of.ABORTED and rule.reopens:
        yield f"reopen {number}", changed(state, (at + of.ROW, of.OPEN))
    if row != of.OPEN or state[at] == of.SWITCH:
        return
    if not rule.abort_at_once and state[at + of.CLAIMS]:
        yield f"T5 {number} drops claims", changed(state, (at + of.CLAIMS, 0))
        return
    changes = [(at + of.ROW, of.ABORTED), (at + of.CLAIMS, 0)]
    own = 1 << model.own[number]
    written = bool(state[of.CONTENTS + model.own[number]])
    if rule.abort_removes == "rows" and state[of.LIVE] & own:
        changes += [(of.LIVE, state[of.LIVE] & ~own), (of.DEAD, state[of.DEAD] | own)]
    if rule.abort_removes == "bytes" and written:
        changes += [(of.SENT, state[of.SENT] | own)]
    yield f"T5 {number}", changed(state, *changes)


_STEPS = {
    of.NEW: _open,
    of.LOOK: _look,
    of.CLAIM: _claim,
    of.RESCUE: _rescue,
    of.CHECK: _check,
    of.EARLY: _early,
    of.WRITE: _write,
    of.PUT: _put,
    of.REGISTER: _register,
    of.COMMIT: _commit,
    of.INSERT: _insert,
}
