"""gc: free the bytes that no version needs (the order of steps is ``docs/safety.md``)."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from ckpt.core.errors import ConflictError
from ckpt.core.records import Pack, PackState, Unneeded
from ckpt.registry.registry import Registry
from ckpt.service.acknowledge import copy_pending
from ckpt.service.author import author
from ckpt.service.counted import counted, id_of, read_counting
from ckpt.service.repack import SHARE, write_sparse_again
from ckpt.storage.store import Store

_log = logging.getLogger(__name__)

GRACE_SECONDS = 7 * 86400
_MOST_UNEXPLAINED = 0.3
_CLOCK_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection did, or with ``dry_run`` would do.

    Attributes:
        freed: packs that are gone from the store, with their bytes.
        waiting: packs that nobody needs, and that wait for the end of the grace.
        orphans: keys without a row, of pushes that ended before they registered them.
        finished: keys that an earlier collection, which was stopped, had left to be deleted.
        unknown: keys of pushes that the registry never heard of; left alone.
        warnings: what a person should look at.
        repacked: packs of which little was needed, and that was written again; with ``dry_run``
            those that would be.
    """

    freed: tuple[Pack, ...]
    waiting: tuple[Pack, ...]
    orphans: tuple[str, ...]
    unknown: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    dry_run: bool = False
    repacked: tuple[Pack, ...] = ()
    orphan_bytes: int = 0
    finished: tuple[str, ...] = ()
    finished_bytes: int = 0

    @property
    def freed_bytes(self) -> int:
        """Bytes of ``freed``."""
        return sum(pack.size for pack in self.freed)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of ``waiting``."""
        return sum(pack.size for pack in self.waiting)


def collect(
    store: Store,
    registry: Registry,
    grace: float = GRACE_SECONDS,
    *,
    dry_run: bool = False,
    allow: Collection[str] = (),
    repack: bool = False,
) -> Collected:
    """Free what nobody needs, ``grace`` seconds after the first collection that saw so.

    Args:
        repack: first write those packs again of which less than half is needed.

    Raises:
        ConflictError: ``gc-refused``, naming the reason and what overrules it.
    """
    epoch, _ = registry.copies.position()
    listed = _Listed(store)
    ended = _check(registry, listed, allow)
    _check_share(registry, registry.collector.unneeded(), allow)
    warnings = _clock_warning(registry)
    if dry_run:
        sparse = [pack for pack, _ in registry.repacks.sparse(SHARE)] if repack else []
        return _foreseen(registry, listed, grace, warnings, sparse)
    registry.collector.expire()
    repacked, damaged = write_sparse_again(store, registry) if repack else ([], [])
    registry.collector.condemn(one.pack for one in registry.collector.unneeded())
    freed = registry.collector.remove(int(grace * 1e6), author())
    orphans, unknown = registry.collector.sweep(listed.packs, author())
    copy_pending(store, registry)
    earlier = listed.packs.keys() - {*orphans, *(pack.key for pack in freed)}
    finished = [key for key in _delete(store, registry) if key in earlier]
    _delete_documents(store, registry, listed, ended, epoch)
    store.discard_unfinished(registry.books.is_over)
    waiting = [one.pack for one in registry.collector.unneeded()]
    return Collected(
        tuple(freed),
        tuple(waiting),
        tuple(orphans),
        tuple(unknown),
        (*warnings, *damaged),
        repacked=tuple(repacked),
        orphan_bytes=listed.size(orphans),
        finished=tuple(finished),
        finished_bytes=listed.size(finished),
    )


@dataclass(slots=True)
class _Listed:
    """What the store holds, by kind."""

    store: Store
    packs: dict[str, int] = field(default_factory=dict)  # with their bytes
    documents: dict[str, str] = field(default_factory=dict)
    documents_that_count: set[str] = field(default_factory=set)
    events_that_count: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        # Copies before packs: a push that commits meanwhile is then known by its pack's rows.
        counting = read_counting(self.store)
        for info in self.store.list("documents/"):
            if (push := id_of(info.key)) is not None:
                self.documents[push] = info.key
                if counting.counts(info):
                    self.documents_that_count.add(push)
        events = counted(self.store, "events/", counting)
        self.events_that_count |= {str(id_of(info.key)) for info in events}
        self.packs = {info.key: info.size for info in self.store.list("packs/")}

    def size(self, keys: Iterable[str]) -> int:
        """Bytes of these packs."""
        return sum(self.packs[key] for key in keys)


def _check(registry: Registry, listed: _Listed, allow: Collection[str]) -> set[str]:
    """The tripwire: a store that knows more than the registry belongs to a newer one. Returns the
    pushes whose versions were removed by an act."""
    there, ended, events = registry.collector.known()
    unknown = sorted(listed.documents_that_count - there - ended)
    unknown += sorted(listed.events_that_count - events)
    if unknown and "unknown" not in allow:
        raise _refused(
            f"the store {listed.store.name} knows of {len(unknown)} more than the registry, which "
            "may be an older copy",
            "unknown",
        )
    if not there and listed.packs and not ended and "empty" not in allow:
        raise _refused("the registry has no versions, and the store has packs", "empty")
    return ended


def _check_share(registry: Registry, found: list[Unneeded], allow: Collection[str]) -> None:
    """Refuse when much would die without an act that says so."""
    dying = sum(one.pack.size for one in found if not one.explained)
    total = registry.queries.stored_bytes()
    if total and dying > _MOST_UNEXPLAINED * total and "much" not in allow:
        raise _refused(
            f"{dying} of {total} bytes would go although no version of theirs was removed", "much"
        )


def _refused(reason: str, override: str) -> ConflictError:
    return ConflictError(
        "gc-refused",
        reason,
        hint=f"look with `ckpt doctor`; if it is as it should be: --allow {override}",
    )


def _clock_warning(registry: Registry) -> tuple[str, ...]:
    """A clock that is wrong costs the grace, never a byte that is needed."""
    skew = abs(registry.collector.now() / 1e6 - time.time())
    if skew < _CLOCK_SECONDS:
        return ()
    return (f"the clocks of this machine and of the registry differ by {skew:.0f} s",)


def _foreseen(
    registry: Registry,
    listed: _Listed,
    grace: float,
    warnings: tuple[str, ...],
    sparse: list[Pack],
) -> Collected:
    latest = registry.collector.now() - int(grace * 1e6)
    ripe, waiting = [], []
    for one in registry.collector.unneeded(lapsed=True):
        is_over = grace == 0 or (one.condemned_at is not None and one.condemned_at <= latest)
        if is_over or one.pack.state is PackState.BROKEN:
            ripe.append(one.pack)
        else:
            waiting.append(one.pack)
    orphans, unknown = registry.collector.orphans(listed.packs)
    finished = [dead.key for dead in registry.collector.dead() if dead.key in listed.packs]
    return Collected(
        tuple(ripe),
        tuple(waiting),
        tuple(orphans),
        tuple(unknown),
        warnings,
        dry_run=True,
        repacked=tuple(sparse),
        orphan_bytes=listed.size(orphans),
        finished=tuple(finished),
        finished_bytes=listed.size(finished),
    )


def _delete(store: Store, registry: Registry) -> list[str]:
    """(i): each key whose ``dead`` event, and every earlier one, is in the store by now; returns
    them."""
    gone = []
    for dead in registry.collector.dead():
        if registry.copies.is_copied(dead.event) and registry.collector.may_delete(dead):
            store.delete(dead.key)
            _log.debug("deleted %s", dead.key)
            gone.append(dead)
    # One that is written late, by a push that died, is found by the next sweep.
    registry.collector.forget(gone)
    return [dead.key for dead in gone]


def _delete_documents(
    store: Store, registry: Registry, listed: _Listed, ended: set[str], epoch: int
) -> None:
    """The documents of versions whose removal was known before everything was copied, and so is
    in the store; the registry is asked again about each."""
    for push in sorted(listed.documents.keys() & ended):
        if registry.collector.may_forget(push, epoch):
            store.delete(listed.documents[push])
            _log.debug("deleted %s", listed.documents[push])


def gc_summary(collected: Collected) -> dict[str, Any]:
    """The stable JSON of a collection."""
    return {
        "dry_run": collected.dry_run,
        "freed_bytes": collected.freed_bytes,
        "freed": [pack.id for pack in collected.freed],
        "repacked": [pack.id for pack in collected.repacked],
        "waiting_bytes": collected.waiting_bytes,
        "waiting": [pack.id for pack in collected.waiting],
        "orphans": list(collected.orphans),
        "orphan_bytes": collected.orphan_bytes,
        "finished": list(collected.finished),
        "finished_bytes": collected.finished_bytes,
        "unknown": list(collected.unknown),
        "warnings": list(collected.warnings),
    }
