"""Each part of the rule broken by itself, the promise that breaks, and after how many steps.

Two numbers: our steps, and those of the models by which the rule was first examined, 0 where they
had no such variant. Ours are mostly fewer, since we begin with what the run needs in place of an
empty store; and we count where a PUT begins, or what a sweep looks at, as a step of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from protocol.explore import Model
from protocol.layout import Actor, Rule, Setting
from protocol.loss import LossRule, LossSetting
from protocol.rebuild import Rebuild
from protocol.restore import Restore
from protocol.settings import CHAIN, DELTA, PLAIN
from protocol.sharing import Sharing


class Variant(NamedTuple):
    """A broken rule, and the shortest run to a violation."""

    name: str
    model: Model
    promise: str
    steps: int
    reference: int


def _shared(
    name: str, steps: tuple[int, int], setting: Setting, promise: str = "bytes", **broken: Any
) -> Variant:
    watched = replace(setting, promises=frozenset({promise}), rule=Rule(**broken))
    return Variant(name, Sharing(watched), promise, *steps)


def _lost(
    name: str, steps: tuple[int, int], setting: LossSetting, promise: str = "bytes", **broken: Any
) -> Variant:
    watched = replace(setting, promises=frozenset({promise}), rule=LossRule(**broken))
    model = Restore(watched) if setting.backups else Rebuild(watched)
    return Variant(name, model, promise, *steps)


_NOTHING = Setting(packs=(), versions=())
_TWO = replace(_NOTHING, actors=(Actor(early=True), Actor()))
_EARLY = replace(_NOTHING, actors=(Actor(early=True),))
_DEDUP = Setting()
_DELTA = Setting(DELTA, actors=(Actor(need=2, delta=True),))
_HIT = Setting(DELTA, packs=(1, 4), versions=((1, 1), (2, 3)), actors=(Actor(need=2),))
_DEEP = replace(_HIT, entries=CHAIN, actors=(Actor(need=4, delta=True),))
_OWN_REPACK = Setting(PLAIN, packs=(3,), actors=(Actor(kind="repack"),))
_REPACK = replace(_OWN_REPACK, actors=(Actor(kind="repack"), Actor(need=2)))
_BASE_REPACK = replace(_OWN_REPACK, entries=DELTA, packs=(5,), versions=((2, 1),))
_TWO_REPACKS = Setting(
    packs=(1, 1),
    versions=((1, 3),),
    actors=(Actor(kind="repack"), Actor(kind="repack", source=1)),
    split_switch=True,
)
_REPAIR = Setting(
    packs=(1, 1), versions=((1, 1), (1, 2)), actors=(Actor(kind="repair"),), loses=1, fsck=True
)

SHARING = [
    _shared(
        "refs without bases, new difference",
        (8, 11),
        _DELTA,
        refs="direct",
        commit_checks_digests=False,
    ),
    _shared(
        "refs without bases, hit on a difference",
        (5, 5),
        _HIT,
        refs="direct",
        commit_checks_digests=False,
    ),
    _shared("refs one base deep", (8, 17), _DEEP, refs="one", commit_checks_digests=False),
    _shared(
        "base unclaimed, no re-check",
        (13, 16),
        _DELTA,
        claims_bases=False,
        commit_checks_rows=False,
    ),
    _shared(
        "push state ignored",
        (10, 9),
        _NOTHING,
        commit_checks_push=False,
        commit_checks_rows=False,
    ),
    _shared("push state ignored, rows re-checked", (10, 9), _NOTHING, commit_checks_push=False),
    _shared(
        "commit checks and inserts in two transactions", (11, 10), _NOTHING, commit_at_once=False
    ),
    _shared(
        "neither claims nor re-check", (10, 16), _DEDUP, claims=False, commit_checks_rows=False
    ),
    _shared(
        "gc ignores claims, no re-check",
        (10, 10),
        _DEDUP,
        gc_reads_claims=False,
        commit_checks_rows=False,
    ),
    _shared(
        "gc ignores refs and claims", (4, 9), _DEDUP, gc_reads_claims=False, gc_reads_refs=False
    ),
    _shared("gc on an old snapshot, straight from live", (10, 16), _DEDUP, gc_snapshot="old-live"),
    _shared("bytes deleted while only condemned", (9, 15), _DEDUP, deletes_condemned=True),
    _shared(
        "rescue without lock, no re-check",
        (11, 18),
        _DEDUP,
        rescue="unlocked",
        commit_checks_rows=False,
    ),
    _shared("rescue by upsert", (11, 18), _DEDUP, rescue="upsert"),
    _shared("no size check on a lost pack", (6, 13), replace(_DEDUP, loses=1), checks_size=False),
    _shared(
        "broken packs claimed, no size check",
        (6, 6),
        replace(_DEDUP, loses=1, fsck=True),
        checks_size=False,
        claims_broken=True,
    ),
    _shared("row before bytes, no size check", (8, 10), _TWO, bytes_first=False, checks_size=False),
    _shared(
        "claims dropped before the state, no re-check",
        (11, 11),
        _DEDUP,
        abort_at_once=False,
        commit_checks_rows=False,
    ),
    _shared(
        "own early row unclaimed, no re-check",
        (11, 10),
        _EARLY,
        claims_own=False,
        commit_checks_rows=False,
    ),
    _shared("claim of a push that is not open", (4, 8), _DEDUP, "claims", claims_need_open=False),
    _shared(
        "abort removes the owner's rows",
        (14, 14),
        _TWO,
        abort_removes="rows",
        commit_checks_rows=False,
    ),
    _shared("abort removes rows that others claim", (10, 14), _TWO, "kept", abort_removes="rows"),
    _shared("abort deletes bytes", (13, 13), _TWO, abort_removes="bytes"),
    _shared("sweep ignores the row", (15, 15), _TWO, sweep="row-ignored"),
    _shared("sweep beside an open push", (9, 8), _NOTHING, sweep="open-ignored"),
    _shared("sweep looks for the row first", (10, 9), _NOTHING, sweep="row-first"),
    _shared(
        "listed keys adopted", (11, 14), replace(_NOTHING, actors=(Actor(), Actor())), adopts=True
    ),
    _shared("reopened", (11, 10), _NOTHING, reopens=True),
    _shared("registered after an abort", (15, 15), _TWO, registers_open=False),
    _shared(
        "a retry writes the same key", (11, 10), replace(_NOTHING, actors=(Actor(), Actor(key=0)))
    ),
    _shared("live set of the start", (11, 10), _REPACK, repack_live_set="start"),
    _shared(
        "claims moved with the refs",
        (11, 10),
        _REPACK,
        repack_kills="claims-moved",
        commit_checks_digests=False,
    ),
    _shared(
        "claims forgotten by a repack: refused",
        (9, 7),
        _REPACK,
        "kept",
        repack_kills="claims-forgotten",
    ),
    _shared(
        "claims forgotten by a repack, no re-check",
        (13, 12),
        _REPACK,
        repack_kills="claims-forgotten",
        commit_checks_rows=False,
    ),
    _shared("bases not copied", (6, 5), _BASE_REPACK, repack_live_set="without-bases"),
    _shared("repack ignores its push state", (10, 9), _OWN_REPACK, repack_checks_push=False),
    _shared(
        "reliance on another pack, two switches at once",
        (14, 10),
        _TWO_REPACKS,
        repack_live_set="relying",
    ),
    _shared(
        "repair without claim and re-check",
        (10, 16),
        _REPAIR,
        repair_claims=False,
        repair_checks=False,
    ),
    _shared(
        "reader takes any row",
        (1, 5),
        Setting(DELTA, packs=(1, 4, 2), versions=((2, 4),), actors=(), readers=(0,)),
        "reader",
        reader="any-row",
    ),
    _shared(
        "reader keeps its first plan",
        (8, 11),
        replace(_OWN_REPACK, readers=(0,)),
        "reader",
        reader="first-plan",
    ),
]

_ONE = LossSetting(pushes=1)
_ONE_TWICE = LossSetting(pushes=1, losses=2)
_VERSION = LossSetting(pushes=1, done=1)
_VERSION_TWICE = replace(_VERSION, losses=2)
_BESIDE = LossSetting(done=1)
_BESIDE_TWICE = LossSetting(done=1, losses=2)
_ABORTS: dict[str, Any] = {"document": "abort-event"}
_LATE: dict[str, dict[str, Any]] = {
    kind: {"late_counts": frozenset({kind})} for kind in ("document", "rm", "dead")
}

LOSSES = [
    _lost("document before the commit", (10, 11), _ONE, document="before"),
    _lost("documents of aborted pushes deleted", (10, 11), _ONE, document="before-deleted"),
    _lost("push acknowledged before the copy", (6, 4), _ONE, "lost", push_acknowledged="committed"),
    _lost(
        "rm acknowledged before the copy", (3, 2), _VERSION, "returned", rm_acknowledged="committed"
    ),
    _lost(
        "same content answered before the copy",
        (6, 4),
        LossSetting(same=True),
        "lost",
        same_acknowledged="committed",
    ),
    _lost("acknowledged on the store's reply", (8, 7), _ONE, "lost", push_acknowledged="replied"),
    _lost("DELETE before the events", (4, 3), _VERSION, delete="dead"),
    _lost("DELETE on the store's reply", (9, 9), _BESIDE, delete="replied"),
    _lost("no dead events", (4, 6), _VERSION, dead_events="none"),
    _lost("no dead events for swept keys", (9, 6), LossSetting(), dead_events="removed"),
    _lost("dead before rm", (5, 4), _VERSION, dead_waits="nothing"),
    _lost("rm events not read", (5, 4), _VERSION, "returned", reads_rm=False),
    _lost(
        "rm event pruned with its document",
        (13, 8),
        replace(_ONE, second_document=True),
        "returned",
        keeps_rm=False,
    ),
    _lost("no epoch: late dead", (12, 11), _BESIDE_TWICE, **_LATE["dead"]),
    _lost("no epoch: late document", (11, 12), _ONE_TWICE, **_LATE["document"]),
    _lost("no epoch: late rm", (5, 4), _VERSION_TWICE, "lost", **_LATE["rm"]),
    _lost(
        "event of two epochs ago counted",
        (11, 13),
        replace(_VERSION_TWICE, listing="events first"),
        "lost",
        older_counts=True,
    ),
    _lost("a collector of the lost registry lives on", (3, 3), _VERSION, cut_off="collectors"),
    _lost("a push of the lost registry lives on", (6, 0), _ONE, "lost", cut_off="pushes"),
    _lost(
        "a collector deletes documents without asking again",
        (4, 0),
        _VERSION_TWICE,
        "lost",
        cut_off="documents",
    ),
    _lost("numbers reused", (7, 7), replace(_BESIDE, losses=0), "number", numbers="newest"),
    _lost("rm by number", (10, 8), _BESIDE, "lost", numbers="newest", rm_by="number"),
    _lost("abort events not waited for", (10, 11), _ONE, **_ABORTS, dead_waits="nothing"),
    _lost("late abort events counted", (11, 8), _ONE_TWICE, "lost", **_ABORTS, **_LATE["rm"]),
    _lost(
        "abort events, late documents counted", (10, 12), _ONE_TWICE, **_ABORTS, **_LATE["document"]
    ),
]

_BACKUP = LossSetting(losses=0, backups=True)
_BACK: dict[str, Any] = {"restore": "back"}
RESTORES = [
    _lost(
        "backup put back, no check",
        (13, 14),
        _BACKUP,
        "lost",
        **_BACK,
        gc_tripwire="none",
        push_tripwire=False,
    ),
    _lost(
        "gc compares a sequence only",
        (13, 14),
        _BACKUP,
        "lost",
        **_BACK,
        gc_tripwire="seq",
        push_tripwire=False,
    ),
    _lost("pushes checked only", (13, 14), _BACKUP, "lost", **_BACK, gc_tripwire="none"),
    _lost(
        "gc checked only: a number twice", (16, 14), _BACKUP, "number", **_BACK, push_tripwire=False
    ),
    _lost(
        "a push shares a dying pack",
        (15, 12),
        replace(_BACKUP, done=1),
        **_BACK,
        push_tripwire=False,
    ),
    _lost("tripwires without a new epoch", (14, 13), replace(_BACKUP, done=1, losses=1), **_BACK),
    _lost(
        "a backup of an earlier epoch adds what it knows",
        (16, 0),
        LossSetting(backups=True),
        "number",
        older_backup_adds=True,
    ),
]
