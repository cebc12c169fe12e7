"""What counts of a store's documents and events (k): those of the newest epoch, and of earlier ones
what its file names. Copies that land late and other people's objects do not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from ckpt.core.errors import IntegrityError
from ckpt.storage.store import ObjectInfo, Store

COPY = re.compile(
    r"(documents|events)/(?P<epoch>[0-9]+)/(?P<counter>[0-9]+)-(?P<id>[0-9a-f]{32})\.json"
)
EPOCH = re.compile(r"epochs/([0-9]+)\.json")


@dataclass(frozen=True, slots=True)
class Counting:
    """The newest epoch of a store, and the ids that its file names."""

    epoch: int
    named: frozenset[str]

    def counts(self, info: ObjectInfo) -> bool:
        """Whether this object below ``documents/`` or ``events/`` is a copy that counts."""
        copy = COPY.fullmatch(info.key)
        return copy is not None and (copy["epoch"] == str(self.epoch) or copy["id"] in self.named)


def read_counting(store: Store) -> Counting:
    """What the file of the newest epoch says.

    Raises:
        IntegrityError: ``epoch-damaged``.
    """
    found = [match for info in store.list("epochs/") if (match := EPOCH.fullmatch(info.key))]
    newest = max(found, key=lambda match: int(match[1]), default=None)
    if newest is None or int(newest[1]) <= 1:
        return Counting(1, frozenset())
    try:
        said = msgspec.json.decode(store.get(newest[0]))
        named = frozenset([*said["documents"], *said["events"]])
    except (msgspec.MsgspecError, KeyError, TypeError) as error:
        raise IntegrityError(
            "epoch-damaged", f"{newest[0]} cannot be read: {error}", hint="restore it from a backup"
        ) from None
    return Counting(int(newest[1]), named)


def counted(store: Store, place: str, counting: Counting) -> Iterator[ObjectInfo]:
    """What counts below ``place``."""
    return (info for info in store.list(place) if counting.counts(info))


def id_of(key: str) -> str | None:
    """The push or event that the key of a copy names; None of what is no copy."""
    copy = COPY.fullmatch(key)
    return None if copy is None else copy["id"]
