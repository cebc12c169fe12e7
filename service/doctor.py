"""doctor: what a repository rests on, looked at one by one, and what to do about each."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ckpt.core.errors import CkptError
from ckpt.loader.environment import version_of
from ckpt.registry.epochs import check_not_closed
from ckpt.registry.registry import Registry
from ckpt.service.config import Location
from ckpt.service.counted import counted, id_of, read_counting
from ckpt.service.places import open_store, shown
from ckpt.storage.store import Store

_SKEW_SECONDS = 60
_PACKAGES = ("ckpt-registry", "torch", "safetensors", "sqlalchemy", "boto3", "psycopg")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: whether it is well, what was seen, and what to do."""

    name: str
    fine: bool
    seen: str
    todo: str = ""


def examine(location: Location, store: Store, registry: Registry) -> list[Finding]:
    """Look at everything; what is written to try the store is removed again."""
    found = [
        Finding("repository", True, str(location.root)),
        Finding("registry", True, shown(location.registry_place)),
        _versions(),
        *_guarded("store", lambda: _store(store)),
        *_guarded("clock", lambda: _clock(registry)),
        *_guarded("epoch", lambda: _epoch(registry)),
        *_guarded("copies", lambda: _copies(registry)),
        *_guarded("agreement", lambda: _agreement(store, registry)),
        *_guarded("packs", lambda: _packs(store, registry)),
    ]
    return found + _server(store)


def examine_unopened(location: Location, error: CkptError) -> list[Finding]:
    """Look at what is there of a repository that ``error`` keeps from being opened."""
    store = open_store(location.store_place, location.options)
    try:
        return [
            Finding("repository", True, str(location.root)),
            Finding("registry", True, shown(location.registry_place)),
            _versions(),
            Finding("opening", False, error.message, error.hint or ""),
            *_guarded("store", lambda: _store(store)),
            *_guarded("contents", lambda: _contents(store)),
            *_server(store),
        ]
    finally:
        store.close()


def _server(store: Any) -> list[Finding]:
    """What only a store on a server has; not asked by its class, which brings boto3 along."""
    if not hasattr(store, "probe_capabilities"):
        return []
    return [
        *_guarded("s3", lambda: _capabilities(store.probe_capabilities())),
        *_guarded("bucket", lambda: _bucket(store.keeps_deleted())),
    ]


def _guarded(name: str, look: Any) -> Iterator[Finding]:
    try:
        yield look()
    except CkptError as error:
        yield Finding(name, False, error.message, error.hint or "")


def _versions() -> Finding:
    known = [f"{name} {version}" for name in _PACKAGES if (version := version_of(name))]
    return Finding("versions", True, ", ".join(known))


def _store(store: Store) -> Finding:
    """Whether objects can be written, read and deleted."""
    key = f"doctor-{secrets.token_hex(16)}.json"
    store.put(key, b"{}")
    try:
        fine = store.get(key) == b"{}"
    finally:
        store.delete(key)
    return Finding("store", fine, store.name, "" if fine else "it gives other bytes than it got")


def _clock(registry: Registry) -> Finding:
    skew = registry.collector.now() / 1e6 - time.time()
    fine = abs(skew) < _SKEW_SECONDS
    todo = "" if fine else "set the clocks; nothing is lost by it, but times and graces are wrong"
    return Finding("clock", fine, f"{abs(skew):.1f} s from the registry's", todo)


def _epoch(registry: Registry) -> Finding:
    """Whether anything can be written, or a rebuild was stopped after it had closed the registry."""
    epoch, _ = registry.copies.position()
    check_not_closed(epoch)
    return Finding("epoch", True, str(epoch))


def _copies(registry: Registry) -> Finding:
    waiting = len(registry.copies.pending())
    todo = "" if not waiting else "nothing: any push, tag or gc sees to them"
    return Finding("copies", True, f"{waiting} not yet noted as in the store", todo)


def _agreement(store: Store, registry: Registry) -> Finding:
    """Whether the store knows anything that the registry does not."""
    there, ended, events = registry.collector.known()
    counting = read_counting(store)
    unknown = left = 0
    for place, known in (("documents/", there | ended), ("events/", events)):
        for info in store.list(place):
            is_known = id_of(info.key) in known
            unknown += counting.counts(info) and not is_known
            left += not counting.counts(info) and not is_known
    todo = "run `ckpt registry rebuild`: this registry is older than its store" if unknown else ""
    leftovers = f", and {left} that count for nothing" if left else ""
    seen = f"{unknown} in the store that it does not know{leftovers}"
    return Finding("agreement", not unknown, seen, todo)


def _contents(store: Store) -> Finding:
    """What a rebuild would find."""
    counting = read_counting(store)
    documents = sum(1 for _ in counted(store, "documents/", counting))
    acts = sum(1 for _ in counted(store, "events/", counting))
    seen = f"documents: {documents}, events: {acts}, epoch {counting.epoch}"
    return Finding("contents", True, seen)


def _bucket(keeps: bool | None) -> Finding:
    if not keeps:
        seen = "gives back what is deleted" if keeps is False else "may not be looked at"
        return Finding("bucket", True, seen)
    todo = "have a lifecycle rule of the bucket end noncurrent versions, or gc frees nothing"
    return Finding("bucket", False, "keeps what is deleted as a version", todo)


def _packs(store: Store, registry: Registry) -> Finding:
    wrong = [
        finished.pack.id
        for finished in registry.repairs.packs()
        if store.size(finished.pack.key) != finished.pack.size
    ]
    todo = "run `ckpt fsck --repair`" if wrong else ""
    return Finding("packs", not wrong, f"{len(wrong)} missing or of another size", todo)


def _capabilities(found: Any) -> Finding:
    from ckpt.storage.s3_probe import EVERYTHING

    lacks = [one for one in EVERYTHING.names if one not in found.names]
    seen = "everything" if not lacks else f"lacks {', '.join(lacks)}"
    todo = "use another server" if found.missing else ""
    return Finding("s3", not found.missing, seen, todo)
