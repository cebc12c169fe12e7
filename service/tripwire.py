"""Nothing is written through a registry that is older than its store: an old copy, put back."""

from __future__ import annotations

from ckpt.core.errors import ConflictError
from ckpt.registry.copies import document_key, event_key
from ckpt.registry.epochs import check_not_closed
from ckpt.registry.registry import Registry
from ckpt.service.counted import COPY, EPOCH
from ckpt.storage.store import Store

# So many of the last numbers are looked at: who writes through an old copy soon has as many.
_LAST = 100


def check_newest(store: Store, registry: Registry) -> None:
    """Refuse when the store has documents, events or epochs that the registry has not come to, or
    others than it gave the last numbers to. Asked once for each opening, and again when a
    connection was lost; a tripwire, not a proof (``docs/safety.md``).

    Raises:
        ConflictError: ``registry-old``, ``registry-closed``.
    """
    if registry.is_newest:
        return
    losses = registry.losses
    epoch, counter = registry.copies.position()
    check_not_closed(epoch)
    listed = _last_copies(store, epoch, max(counter - _LAST, 0))
    epochs = [found[1] for info in store.list("epochs/") if (found := EPOCH.fullmatch(info.key))]
    last = [one for one, number in listed.items() if number < counter]
    # Asked again after the lists: what others commit meanwhile is known by now.
    epoch, counter, known = registry.copies.position_and_known(last)
    newer = [one for one, number in listed.items() if number >= counter]
    newer += [one for one in last if one not in known]
    newer += [one for one in epochs if int(one) > epoch]
    if newer:
        raise ConflictError(
            "registry-old",
            f"the store {store.name} knows of {len(newer)} "
            "more than the registry, which is an older copy",
            hint="run `ckpt registry rebuild`, which brings both together",
        )
    registry.note_newest(losses)


def _last_copies(store: Store, epoch: int, counter: int) -> dict[str, int]:
    """The counters of the documents and events of an epoch from ``counter`` on, by their ids."""
    found = {}
    for place, key in (("documents/", document_key), ("events/", event_key)):
        for info in store.list(f"{place}{epoch}/", after=key(epoch, counter, "")):
            copy = COPY.fullmatch(info.key)
            if copy is not None:
                found[copy["id"]] = int(copy["counter"])
    return found
