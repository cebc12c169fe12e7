"""The settings in which the rule is explored completely, and parts of it that are safe to break."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from protocol.explore import Model
from protocol.layout import Actor, Rule, Setting
from protocol.loss import LossRule, LossSetting
from protocol.rebuild import Rebuild
from protocol.restore import Restore
from protocol.sharing import Sharing

BYTES = frozenset({"bytes"})
UNREFERENCED = frozenset({"bytes", "rows"})

# What a pack may contain: two digests; the second also as a difference against the first; a third
# as a difference against the second.
PLAIN = ((0, None), (1, None))
DELTA = (*PLAIN, (1, 0))
CHAIN = (*DELTA, (2, None), (2, 1))

_DELTA_PUSH = Actor(need=2, delta=True)
_REPACK, _REPACK_NEXT = Actor(kind="repack", source=0), Actor(kind="repack", source=1)
_STORED_DELTA = Setting(CHAIN, packs=(1, 4), versions=((1, 1), (2, 3)), actors=())
_TWO_TENSORS = Setting(PLAIN, packs=(3,), actors=(_REPACK, Actor(need=2)), readers=(0,))
_NOTHING = Setting(DELTA, packs=(), versions=(), actors=(Actor(early=True), Actor(), _DELTA_PUSH))
_BOTH = Setting(packs=(1, 1), versions=((1, 3),), actors=(_REPACK, _REPACK_NEXT))
_LOST = Setting(loses=1, fsck=True, actors=(Actor(), Actor(kind="repair")))

_SHARING = {
    "fresh, dedup and difference push": _NOTHING,
    "disk loses a pack, late second PUT, forgotten dead keys": Setting(
        DELTA, actors=(Actor(early=True), _DELTA_PUSH), loses=1, second_put=True, forgets=True
    ),
    "base of a base": replace(_STORED_DELTA, actors=(Actor(need=4, delta=True), Actor(need=2))),
    "hit on a stored difference": replace(_STORED_DELTA, actors=(Actor(need=2),)),
    "repack beside a dedup push and a reader": _TWO_TENSORS,
    "the switch in two statements": replace(_TWO_TENSORS, split_switch=True),
    "repack of two versions": replace(
        _TWO_TENSORS, versions=((1, 1), (2, 1)), actors=(_REPACK, Actor(need=3))
    ),
    "repack beside a dedup and a difference push": Setting(
        DELTA, actors=(_REPACK, Actor(), _DELTA_PUSH)
    ),
    "repack of a repacked pack, reader": replace(_TWO_TENSORS, actors=(_REPACK, _REPACK_NEXT)),
    "two repackers, chunk in both packs": _BOTH,
    "two repackers, in two statements": replace(_BOTH, split_switch=True),
    "repackers, a digest raw and as a difference": Setting(
        DELTA,
        packs=(1, 4, 2),
        versions=((2, 7),),
        actors=(_REPACK_NEXT, Actor(kind="repack", source=2)),
        decodes=True,
    ),
    "lost pack, re-push, repair": _LOST,
    "lost pack, false alarms": replace(_LOST, doubts=1),
    "lost base of a difference": replace(
        _LOST,
        entries=DELTA,
        packs=(1, 4),
        versions=((1, 1), (2, 3)),
        doubts=1,
        actors=(Actor(), Actor(kind="repair", version=1)),
    ),
}
_ABORT_EVENTS = LossRule(document="abort-event")
_LOSSES = {
    "a push, one loss": LossSetting(pushes=1),
    "a push, two losses": LossSetting(pushes=1, losses=2),
    "a push beside a version, two losses": LossSetting(done=1, losses=2),
    "a push beside a version, same content": LossSetting(done=1, same=True),
    "a push beside a version, listing in steps": LossSetting(
        done=1, losses=2, listing="documents first"
    ),
    "abort events, a push, two losses": LossSetting(pushes=1, losses=2, rule=_ABORT_EVENTS),
    "a backup, a push": LossSetting(pushes=1, losses=1, backups=True),
}
_SHARING_LARGE = {
    "two repackers of one pack, push, reader": replace(
        _TWO_TENSORS, actors=(_REPACK, _REPACK, Actor(need=2))
    ),
    "the same, late second PUT, forgotten dead keys": replace(
        _NOTHING, second_put=True, forgets=True
    ),
    "base and difference repacked, new two-step difference": replace(
        _STORED_DELTA, actors=(_REPACK, _REPACK_NEXT, Actor(need=4, delta=True))
    ),
    "the same, in two statements": replace(
        _STORED_DELTA,
        actors=(_REPACK, _REPACK_NEXT, Actor(need=4, delta=True)),
        split_switch=True,
    ),
    "four pushes": replace(_NOTHING, actors=(*_NOTHING.actors, Actor(need=2))),
    "repack beside pushes, in two statements, reader": replace(
        _TWO_TENSORS,
        entries=DELTA,
        actors=(_REPACK, Actor(need=1), _DELTA_PUSH),
        split_switch=True,
    ),
}
_LOSSES_LARGE = {
    "two pushes, one loss": LossSetting(),
    "a push beside a version, two mirrors": LossSetting(done=1, second_document=True),
    "a push beside a version, events listed first": LossSetting(
        done=1, losses=2, listing="events first"
    ),
    "a dead event waits for all events": LossSetting(
        done=1, losses=2, rule=LossRule(dead_waits="all")
    ),
    "a backup, a push beside a version": LossSetting(done=1, losses=0, backups=True),
    "two pushes, two losses": LossSetting(losses=2),
    "two pushes, a dead event waits for all events": LossSetting(
        losses=2, rule=LossRule(dead_waits="all")
    ),
    "two pushes, listing in steps": LossSetting(listing="documents first"),
    "two pushes, two losses, listing in steps": LossSetting(losses=2, listing="documents first"),
    "two pushes, two mirrors": LossSetting(second_document=True),
    "two pushes, abort events": LossSetting(rule=_ABORT_EVENTS),
    "a backup, two pushes": LossSetting(losses=0, backups=True),
    "a backup, a push beside a version, one loss": LossSetting(done=1, backups=True),
}


def _models(sharing: Mapping[str, Setting], losses: Mapping[str, LossSetting]) -> dict[str, Model]:
    found: dict[str, Model] = {name: Sharing(setting) for name, setting in sharing.items()}
    for name, setting in losses.items():
        found[name] = Restore(setting) if setting.backups else Rebuild(setting)
    return found


SMALL = _models(_SHARING, _LOSSES)
LARGE = _models(_SHARING_LARGE, _LOSSES_LARGE)


def _broken(setting: Setting, promises: frozenset[str], rule: Rule) -> Model:
    return Sharing(replace(setting, rule=rule, promises=promises))


_DEDUP = Setting(DELTA, actors=(Actor(), _DELTA_PUSH))
_EARLY = Setting(packs=(), versions=(), actors=(Actor(early=True), Actor()))
# A promise that is not named here is the one that the missing part was to keep.
SAFE_ALONE = {
    "no claims": _broken(_DEDUP, UNREFERENCED, Rule(claims=False)),
    "base packs unclaimed": _broken(_DEDUP, UNREFERENCED, Rule(claims_bases=False)),
    "gc ignores claims": _broken(_DEDUP, UNREFERENCED, Rule(gc_reads_claims=False)),
    "repack ignores claims": _broken(
        _TWO_TENSORS, UNREFERENCED, Rule(repack_kills="claims-forgotten")
    ),
    "rescue without lock": _broken(_DEDUP, UNREFERENCED, Rule(rescue="unlocked")),
    "claims dropped early": _broken(_DEDUP, UNREFERENCED, Rule(abort_at_once=False)),
    "own early row unclaimed": _broken(_EARLY, UNREFERENCED, Rule(claims_own=False)),
    "no row re-check": _broken(_DEDUP, UNREFERENCED, Rule(commit_checks_rows=False)),
    "old snapshot, only condemned rows removed": _broken(
        _DEDUP, UNREFERENCED, Rule(gc_snapshot="old")
    ),
    "row before bytes, size checked": _broken(_EARLY, UNREFERENCED, Rule(bytes_first=False)),
    "repack without a claim on its source": _broken(
        _TWO_TENSORS, UNREFERENCED, Rule(repack_claims=False)
    ),
}
WALKS: dict[str, Model] = {
    "sharing": Sharing(
        Setting(
            DELTA,
            packs=(3, 4),
            versions=((3, 1), (1, 1), (2, 3), (2, 3)),
            actors=(
                Actor(early=True),
                Actor(need=2),
                _DELTA_PUSH,
                _REPACK,
                Actor(kind="repack", source=5),
                Actor(kind="repair", version=1),
            ),
            readers=(0, 1, 2),
            loses=1,
            fsck=True,
            second_put=True,
            forgets=True,
        )
    ),
    "losses": Rebuild(
        LossSetting(pushes=4, losses=3, listing="documents first", second_document=True)
    ),
}
