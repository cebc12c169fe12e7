"""Rule (j): nothing is acknowledged before its copy is in the store and the registry, asked
again, still has it."""

from __future__ import annotations

import logging

from ckpt.core.errors import CkptError, ConflictError
from ckpt.core.records import Version
from ckpt.registry.registry import Registry
from ckpt.storage.store import Store

_log = logging.getLogger(__name__)


def copy_pending(store: Store, registry: Registry) -> None:
    """Bring every document and event that waits into the store, also those of others."""
    for copy in registry.copies.pending():
        try:
            store.put(copy.key, copy.body)
        except CkptError:
            if registry.copies.wanted([copy]):
                raise
            continue  # its version was removed, and a collection took what was just written
        registry.copies.note(copy)
        _log.debug("wrote %s", copy.key)


def acknowledge_push(store: Store, registry: Registry, push: str) -> Version:
    """The version of ``push``, returned only when it may be told to somebody.

    Raises:
        ConflictError: ``registry-changed`` when the registry was lost or rebuilt meanwhile.
    """
    copy_pending(store, registry)
    version = registry.queries.by_push(push) if registry.books.is_acknowledgeable(push) else None
    if version is None:
        raise _changed()
    return version


def acknowledge_event(store: Store, registry: Registry, event: str) -> None:
    """Return only when the act of ``event`` may be told to somebody."""
    copy_pending(store, registry)
    if not registry.copies.event_stands(event):
        raise _changed()


def _changed() -> ConflictError:
    return ConflictError(
        "registry-changed",
        "the registry was rebuilt or the version removed while this was written",
        hint="look with `ckpt log` and run again",
    )
