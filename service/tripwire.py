"""Nothing is written through a registry that is older than its store: an old copy, put back."""

from __future__ import annotations

from ckpt.core.errors import ConflictError
from ckpt.registry.copies import document_key, event_key
from ckpt.registry.epochs import check_not_closed
from ckpt.registry.registry import Registry
from ckpt.storage.store import Store


def check_newest(store: Store, registry: Registry) -> None:
    """Refuse when the store has documents, events or epochs that the registry has not come to.
    Asked once for each opening; a tripwire, not a proof (``docs/safety.md``).

    Raises:
        ConflictError: ``registry-old``, ``registry-closed``.
    """
    if registry.is_newest:
        return
    epoch, counter = registry.copies.position()
    check_not_closed(epoch)
    places = (("documents/", document_key), ("events/", event_key))
    listed = [
        info.key.removeprefix(f"{place}{epoch}/").partition("-")[0]
        for place, key in places
        for info in store.list(f"{place}{epoch}/", after=key(epoch, counter, ""))
    ]
    epochs = [info.key.removeprefix("epochs/").partition(".")[0] for info in store.list("epochs/")]
    # Asked again after the lists: what others commit meanwhile is known by now.
    epoch, counter = registry.copies.position()
    newer = [one for one in listed if one.isdigit() and int(one) >= counter]
    newer += [one for one in epochs if one.isdigit() and int(one) > epoch]
    if newer:
        raise ConflictError(
            "registry-old",
            f"the store {store.name} knows of {len(newer)} "
            "more than the registry, which is an older copy",
            hint="run `ckpt registry rebuild`, which brings both together",
        )
    registry.is_newest = True
