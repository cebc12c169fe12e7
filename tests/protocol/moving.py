"""The steps of a repack (T7) and of a repair (T8, ``Repairs.switch``), rule (h)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from protocol import layout as of
from protocol.explore import Step, bits, changed

if TYPE_CHECKING:
    from protocol.sharing import Sharing


def steps(model: Sharing, state: bytes, number: int) -> Iterator[Step]:
    """What a repack or a repair may do next."""
    at = model.actors[number]
    kind = model.setting.actors[number].kind
    act = (_REPACK if kind == "repack" else _REPAIR).get(state[at])
    if act is not None:
        yield from act(model, state, number, at)


def _open_repack(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    """T1, with a claim on the source."""
    source = 1 << model.setting.actors[number].source
    if not model.rule.repack_claims:
        yield f"T1 {number}", changed(state, (at, of.LOOK), (at + of.ROW, of.OPEN))
    elif (state[of.LIVE] | state[of.CONDEMNED]) & source & ~state[of.LOCKED]:
        yield (
            f"T1 {number}",
            changed(
                state,
                (at, of.LOOK),
                (at + of.ROW, of.OPEN),
                (at + of.CLAIMS, source),
                (of.LIVE, state[of.LIVE] | source),
                (of.CONDEMNED, state[of.CONDEMNED] & ~source),
            ),
        )


def _live_set(model: Sharing, state: bytes, number: int, version: int) -> int:
    """The entries of the source that a version needs, as a chunk or as a base at any depth."""
    source = model.setting.actors[number].source
    place = model.refs + version
    wanted = model.needs[version]
    rule = model.rule.repack_live_set
    there = model.contents(state, state[place])
    before = -1
    while wanted != before and rule != "without-bases":
        before = wanted
        for bit in bits(there):
            digest, base = model.setting.entries[bit]
            if base is not None and wanted >> digest & 1:
                wanted |= 1 << base
    if rule == "relying":
        wanted &= ~model.readable[model.contents(state, state[place] & ~(1 << source))]
    found = 0
    for bit in bits(state[of.CONTENTS + source]):
        if wanted >> model.setting.entries[bit][0] & 1:
            found |= 1 << bit
    return found


def _users(model: Sharing, state: bytes, number: int) -> list[int]:
    source = model.setting.actors[number].source
    return [version for version, place in enumerate(model.versions) if state[place] >> source & 1]


def _look_repack(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    """What must be in the new pack, without locks; whatever is lost cannot be copied."""
    if not state[of.PRESENT] >> model.setting.actors[number].source & 1:
        return
    found = 0
    for version in _users(model, state, number):
        found |= _live_set(model, state, number, version)
    choices = {found, _decoded(model, found)} if model.setting.decodes else {found}
    if not found and model.rule.repack_live_set != "relying":
        return
    own = of.CONTENTS + model.own[number]
    for contents in sorted(choices):
        yield f"look {number}", changed(state, (at, of.WRITE), (own, contents))


def _decoded(model: Sharing, entries: int) -> int:
    """The same digests, all raw."""
    found = 0
    for bit in bits(entries):
        found |= model.raw.get(model.setting.entries[bit][0], 1 << bit)
    return found


def _write(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    bit = 1 << model.own[number]
    yield f"PUT {number} begins", changed(state, (at, of.PUT), (of.FLYING, state[of.FLYING] | bit))


def _put(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    if state[of.PRESENT] >> model.own[number] & 1:
        yield f"HEAD {number} own", changed(state, (at, of.COMMIT))


def _switchable(model: Sharing, state: bytes, number: int) -> int:
    """The versions whose needs of the source are all in the new pack."""
    new = state[of.CONTENTS + model.own[number]]
    if model.rule.repack_live_set == "start":
        return sum(1 << version for version in _users(model, state, number))
    found = 0
    for version in _users(model, state, number):
        needs = model.mentioned[_live_set(model, state, number, version)]
        if not needs & ~model.mentioned[new]:
            found |= 1 << version
    return found


def _commit_repack(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    """T7: push row, then the source, then the live sets anew."""
    source = 1 << model.setting.actors[number].source
    if source & state[of.LOCKED]:
        return
    if model.rule.repack_checks_push and state[at + of.ROW] != of.OPEN:
        yield f"T7 {number} expired", changed(state, (at, of.END))
        return
    versions = _switchable(model, state, number)
    if model.setting.split_switch:
        locked = (of.LOCKED, state[of.LOCKED] | source)
        yield (
            f"T7 {number} locks",
            changed(state, (at, of.SWITCH), (at + of.AVOID, versions), locked),
        )
    else:
        yield f"T7 {number}", _switched(model, state, number, at, versions)


def _switch(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    """The later statement of a T7 that was split."""
    yield f"T7 {number} switches", _switched(model, state, number, at, state[at + of.AVOID])


def _switched(model: Sharing, state: bytes, number: int, at: int, versions: int) -> bytes:
    source, new = 1 << model.setting.actors[number].source, 1 << model.own[number]
    changes = [(at, of.END), (at + of.ROW, of.COMMITTED), (at + of.CLAIMS, 0), (at + of.AVOID, 0)]
    for version in bits(versions):
        place = model.refs + version
        if state[place] & source:
            changes.append((place, state[place] & ~source | new))
    changes += [
        (of.LIVE, state[of.LIVE] | new),
        (of.LOCKED, state[of.LOCKED] & ~source),
    ]
    after = changed(state, *changes)
    if model.rule.repack_kills == "no" or _users(model, after, number):
        return after
    return changed(after, *_killed(model, after, number, source, new))


def _killed(
    model: Sharing, state: bytes, number: int, source: int, new: int
) -> list[tuple[int, int]]:
    """The source dies with the switch, whatever claims it: against rule (e)."""
    changes = [
        (of.LIVE, state[of.LIVE] & ~source),
        (of.CONDEMNED, state[of.CONDEMNED] & ~source),
        (of.DEAD, state[of.DEAD] | source),
    ]
    for other, at in enumerate(model.actors):
        if other != number and state[at + of.CLAIMS] & source:
            if model.rule.repack_kills == "claims-moved":
                moved = state[at + of.CLAIMS] & ~source | new
                changes += [(at + of.CLAIMS, moved), (at + of.PLAN, moved)]
            elif "kept" not in model.setting.promises:
                changes.append((at + of.CLAIMS, state[at + of.CLAIMS] & ~source))
    return changes


def _open_repair(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    """T1, when fsck has found the pack broken."""
    if state[of.BROKEN] >> model.setting.actors[number].source & 1:
        yield f"T1 {number}", changed(state, (at, of.LOOK), (at + of.ROW, of.OPEN))


def _look_repair(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    """``Repairs.substitutes``: packs that have what the version needs from the broken one."""
    actor = model.setting.actors[number]
    refs = state[model.refs + actor.version]
    rows = (state[of.LIVE] | state[of.CONDEMNED]) & ~state[at + of.AVOID]
    if not refs >> actor.source & 1:
        return
    for plan, _ in model.plans(
        state, model.needs[actor.version], rows | refs & ~(1 << actor.source), None
    ):
        others = plan & ~refs
        if others and not plan >> actor.source & 1:
            step = of.CLAIM if model.rule.repair_claims else of.COMMIT
            yield f"look {number}", changed(state, (at, step), (at + of.PLAN, others))


def _claim_repair(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    """T2, rule (c)."""
    plan = state[at + of.PLAN]
    if state[at + of.ROW] != of.OPEN:
        yield f"T2 {number} expired", changed(state, (at, of.END))
    elif plan & ~(state[of.LIVE] | state[of.CONDEMNED]):
        yield f"T2 {number} gone", changed(state, (at, of.LOOK), (at + of.PLAN, 0))
    else:
        live, condemned = state[of.LIVE] | plan, state[of.CONDEMNED] & ~plan
        claims = (at + of.CLAIMS, state[at + of.CLAIMS] | plan)
        changes = (at, of.CHECK), (of.LIVE, live), (of.CONDEMNED, condemned), claims
        yield f"T2 {number}", changed(state, *changes)


def _check_repair(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    missing = state[at + of.PLAN] & ~state[of.PRESENT]
    if missing:
        avoid = (at + of.AVOID, state[at + of.AVOID] | missing)
        yield f"HEAD {number} missing", changed(state, (at, of.LOOK), avoid, (at + of.PLAN, 0))
    else:
        yield f"HEAD {number}", changed(state, (at, of.COMMIT))


def _commit_repair(model: Sharing, state: bytes, number: int, at: int) -> Iterator[Step]:
    """T8: push row, both pack rows, the version decodable; then the references."""
    actor = model.setting.actors[number]
    place, plan = model.refs + actor.version, state[at + of.PLAN]
    if state[at + of.ROW] != of.OPEN or (plan | 1 << actor.source) & state[of.LOCKED]:
        return
    ended = [(at, of.END), (at + of.ROW, of.COMMITTED), (at + of.CLAIMS, 0)]
    refs = state[place]
    after = refs & ~(1 << actor.source) | plan
    fine = not plan & ~state[of.LIVE] or not model.rule.repair_checks
    decodable = not model.needs[actor.version] & ~model.readable[model.contents(state, after)]
    if refs >> actor.source & 1 and fine and decodable:
        there = model.readable[model.contents(state, after & state[of.PRESENT])]
        healed = not model.needs[actor.version] & ~there or not model.rule.repair_checks
        damaged = state[of.DAMAGED] & ~(healed << actor.version)
        ended += [(place, after), (of.DAMAGED, damaged)]
    yield f"T8 {number}", changed(state, *ended)


_REPACK = {
    of.NEW: _open_repack,
    of.LOOK: _look_repack,
    of.WRITE: _write,
    of.PUT: _put,
    of.COMMIT: _commit_repack,
    of.SWITCH: _switch,
}
_REPAIR = {
    of.NEW: _open_repair,
    of.LOOK: _look_repair,
    of.CLAIM: _claim_repair,
    of.CHECK: _check_repair,
    of.COMMIT: _commit_repair,
}
