"""fsck: whether the store has what the registry says, byte for byte if asked; and repair."""

from __future__ import annotations

import logging
import random
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from ckpt.core.errors import AccessError, CkptError, IntegrityError, SpaceError
from ckpt.core.records import Chunk, FinishedPack, Pack, PackState, StoreCopy, Version
from ckpt.registry.registry import Registry
from ckpt.service.acknowledge import copy_pending
from ckpt.service.tripwire import check_newest
from ckpt.storage.chunks import Places, read_chunk, read_place
from ckpt.storage.packs import read_places
from ckpt.storage.store import Store

_log = logging.getLogger(__name__)

_MARKED_AT_ONCE = 100


@dataclass(slots=True)
class Checked:
    """What fsck found.

    Attributes:
        packs: how many were looked at, and ``chunks`` how many chunks were read and hashed.
        broken: packs that are missing or wrong, with the reason; versions that need one are
            ``damaged``. One that none needs is no harm: gc removes it.
        healed: packs that were broken and are whole.
        copies: documents and events that are missing or wrong in the store, and ``rewritten``
            those that were, and are there again.
        repaired: versions that were moved to whole packs.
        unmarked: why something that was found could not be written down, if so.
    """

    packs: int = 0
    chunks: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    healed: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    unmarked: CkptError | None = None

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong any more."""
        return not self.damaged and not self.copies and self.unmarked is None

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """What cannot be written, to a repository that others own or a full disk, must not hold
        back the report."""
        try:
            yield
        except (AccessError, SpaceError) as error:
            self.unmarked = error


def check(
    store: Store, registry: Registry, read_data: float = 0.0, *, repair: bool = False
) -> Checked:
    """Compare the store with the registry. A bad pack becomes broken, so that the next push of
    its content writes it again; one that is whole again becomes live. No pack is deleted.

    Args:
        read_data: the share of the packs whose every chunk is read and hashed, from 0 to 1.
        repair: write missing documents and events again, and move versions from broken packs to
            whole ones that have the same chunks.

    Raises:
        ConflictError: ``registry-old``, ``registry-closed``, with ``repair``.
    """
    if repair:
        check_newest(store, registry)
    found = Checked()
    known, incomplete = registry.repairs.look()
    _check_packs(store, registry, known, read_data, found)
    if repair:
        with found.guarded():
            _repair(store, registry, found, incomplete)
    incomplete = [one for one in incomplete if registry.repairs.is_incomplete(one[0])]
    _check_copies(store, registry, found, repair=repair)
    _name_damaged(registry, found, incomplete)
    return found


def _check_packs(
    store: Store,
    registry: Registry,
    known: Sequence[FinishedPack],
    read_data: float,
    found: Checked,
) -> None:
    """Look at every pack, and mark those of which something else was known."""
    places = Places.of(known)
    wrong: list[str] = []
    for finished in known:
        found.packs += 1
        hashed = read_data >= 1 or random.random() < read_data
        reason = _fault(store, places, finished, found, hashed=hashed)
        _log.debug("checked %s: %s", finished.pack.key, reason or "nothing is wrong")
        was = finished.pack.state is PackState.BROKEN
        if reason is not None:
            found.broken[finished.pack.id] = reason
            wrong.append(finished.pack.id)
        elif was and hashed:
            with found.guarded():
                registry.repairs.mark([finished.pack.id], broken=False)
                found.healed.append(finished.pack.id)
        elif was:
            found.broken[finished.pack.id] = "it was found wrong before; --read-data looks again"
        # A transaction takes longer than to see that a pack is missing, and less than to read one.
        if hashed or len(wrong) == _MARKED_AT_ONCE:
            _mark_broken(registry, wrong, found)
    _mark_broken(registry, wrong, found)


def _mark_broken(registry: Registry, wrong: list[str], found: Checked) -> None:
    """Write down what was found wrong since the last time."""
    if wrong:
        with found.guarded():
            registry.repairs.mark(wrong, broken=True)
    wrong.clear()


def _name_damaged(
    registry: Registry, found: Checked, incomplete: Sequence[tuple[str, str]]
) -> None:
    damaged = dict.fromkeys(reference for _, reference in incomplete)
    for pack, needing in registry.repairs.users(found.broken).items():
        damaged |= dict.fromkeys(reference for _, reference in needing)
        if not needing:
            found.broken[pack] += "; no version needs it, gc removes it"
    found.damaged = [*damaged]


def mark_damaged(store: Store, registry: Registry, version: Version) -> None:
    """Look at every byte of the packs of a version that could not be read, so that nothing that
    is pushed from now on relies on what is wrong."""
    needed, _ = registry.books.read_plan(version.push)
    known = registry.repairs.packs()
    places = Places.of(known)
    for finished in known:
        if finished.pack.id not in needed:
            continue
        if _fault(store, places, finished, Checked(), hashed=True) is not None:
            registry.repairs.mark([finished.pack.id], broken=True)


def _fault(
    store: Store, places: Places, finished: FinishedPack, found: Checked, *, hashed: bool
) -> str | None:
    """What is wrong with a pack, or None."""
    pack = finished.pack
    if not pack.header:
        return "it was missing or damaged at a rebuild; another one looks again"
    size = store.size(pack.key)
    if size is None:
        return "it is missing"
    if size != pack.size:
        return f"it has {size} bytes, not {pack.size}"
    try:
        header, named = read_places(store, pack)
        if header != pack.header:
            return "its header has other bytes"
        # A digest that comes twice has one row: of its first place.
        first = {place.digest: place for place in reversed(named)}
        if first != {chunk.digest: chunk for chunk in finished.chunks}:
            return "the registry has other chunks than its header; a registry rebuild reads that"
        return _data_fault(store, places, pack, named, found) if hashed else None
    except IntegrityError as error:
        return error.message


def _data_fault(
    store: Store, places: Places, pack: Pack, named: Sequence[Chunk], found: Checked
) -> str | None:
    """What is wrong with the data of a pack: every byte of it is a chunk's, or padding."""
    end = None
    for place in sorted(named, key=lambda place: place.offset):
        if end is not None and any(_read(store, pack, end, place.offset - end)):
            return f"the padding before chunk {place.digest} has other bytes"
        if place.base is None or _has_base(store, places, place):
            read_place(store, places, place, memoryview(bytearray(place.raw_length)))
        found.chunks += 1
        end = place.offset + place.length
    if end is not None and any(_read(store, pack, end, pack.size - end)):
        return "the padding at its end has other bytes"
    return None


def _has_base(store: Store, places: Places, place: Chunk) -> bool:
    """Whether the base of a difference can be read; if not, it is its own pack that is broken."""
    assert place.base is not None
    try:
        read_chunk(store, places, place.base, memoryview(bytearray(place.raw_length)))
    except IntegrityError:
        return False
    return True


def _read(store: Store, pack: Pack, offset: int, length: int) -> bytearray:
    body = bytearray(length)
    if length:
        store.read_into(pack.key, offset, memoryview(body))
    return body


def _repair(
    store: Store, registry: Registry, found: Checked, incomplete: Sequence[tuple[str, str]]
) -> None:
    """Move every version that needs a broken pack, or refers to too few, to others that have the
    same chunks."""
    for lost, needing in registry.repairs.users(found.broken).items():
        for push, reference in needing:
            if _moved(store, registry, push, lost):
                found.repaired.append(reference)
    for push, reference in incomplete:
        if registry.repairs.is_incomplete(push) and _moved(store, registry, push, None):
            found.repaired.append(reference)


def _moved(store: Store, registry: Registry, push: str, lost: str | None) -> bool:
    others = registry.repairs.substitutes(push, lost)
    if others is None:
        return False
    repair = secrets.token_hex(16)
    claimed = registry.books.open_push(repair, "repair", {pack.id for pack in others})
    # (c): a claim, then the size.
    whole = {pack.id for pack in claimed if store.size(pack.key) == pack.size}
    if whole != {pack.id for pack in others}:
        registry.books.abort(repair)
        return False
    return registry.repairs.switch(repair, push, lost, whole)


def _check_copies(store: Store, registry: Registry, found: Checked, *, repair: bool) -> None:
    """Every document and event that should be in the store is, with exactly its bytes."""
    with found.guarded():
        copy_pending(store, registry)
    for copy in _due(store, registry):
        found.copies.append(copy.key)
        if repair:
            with found.guarded():
                store.delete(copy.key)  # damaged, or not there: the registry has what it must say
                store.put(copy.key, copy.body)
                found.rewritten.append(found.copies.pop())


def _due(store: Store, registry: Registry) -> list[StoreCopy]:
    """Every copy that is not whole and should be: its version was not removed meanwhile, so that a
    collection took it, and it is not on its way, of a push that committed meanwhile."""
    wrong = [copy for copy in registry.copies.all() if not _is_whole(store, copy)]
    pending = {copy.id for copy in registry.copies.pending()} if wrong else set()
    wanted = registry.copies.wanted(wrong)
    return [
        copy
        for copy in wrong
        if copy.id in wanted
        and not (copy.id in pending and store.size(copy.key) is None)
        and not _is_whole(store, copy)  # it was on its way when it was looked at
    ]


def _is_whole(store: Store, copy: StoreCopy) -> bool:
    try:
        return store.size(copy.key) == len(copy.body) and store.get(copy.key) == copy.body
    except IntegrityError:
        return False
