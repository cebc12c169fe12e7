"""registry rebuild: the store is read, a new epoch opened, and the registry made anew from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ckpt.core.digests import digest_of
from ckpt.core.documents import canonical, decode_document
from ckpt.core.effects import perform
from ckpt.core.errors import (
    AccessError,
    CkptError,
    ConflictError,
    IntegrityError,
    SpaceError,
    StorageError,
    from_os_error,
)
from ckpt.core.printable import escape, few
from ckpt.core.records import FinishedPack, KnownCopy, Pack, PackState
from ckpt.registry.fence import Fence, rebuilt_meanwhile
from ckpt.registry.rebuild import StoreContents, StoredVersion, check_numbers
from ckpt.registry.registry import Registry
from ckpt.registry.sqlite import alone, copy_database
from ckpt.service.config import (
    Location,
    complete,
    no_repository,
    prepare,
    registry_missing,
    store_missing,
)
from ckpt.service.counted import counted, read_counting
from ckpt.service.stored_facts import has_versions, read_event, read_version_file
from ckpt.storage.identity import read_identity
from ckpt.storage.packs import PACK_KEY, pack_key, read_pack
from ckpt.storage.store import ObjectInfo, Store

T = TypeVar("T")

# What reading an object that has other bytes than it should ends with.
_DAMAGED = (IntegrityError, msgspec.MsgspecError, RecursionError, ValueError)


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What a rebuild found.

    Attributes:
        versions: how many there are.
        damaged: versions whose bytes are not all there; kept, for the rest of them.
        unreadable: packs in the store that are damaged, with the reason; left alone.
        kept: where the old registry is now, if there was one.
    """

    epoch: int
    versions: int
    damaged: tuple[str, ...]
    unreadable: tuple[str, ...]
    kept: str | None


def rebuild_registry(location: Location, store: Store, *, lost: bool = False) -> Rebuilt:
    """Make the registry anew from the store alone; the old one is kept beside it.

    Args:
        lost: the registry that was at this address is lost for good. Without that, a database
            that has no tables is taken for the wrong one.

    Raises:
        NotFoundError: ``no-repository``.
        StorageError: ``registry-missing``, for such a database.
        IntegrityError: ``copy-damaged``, ``copy-missing``: the store lacks what was acknowledged.
            ``foreign-store``, ``number-twice``, ``epoch-damaged``.
        StorageError, AccessError, SpaceError: it is safe to run this again.

    Until the new epoch is in the store, which is the last act but the commit, the old registry is
    as it was after an error; later it takes no more writes.
    """
    identity = read_identity(store)
    if identity is None:
        raise store_missing(location) if location.exists else no_repository(location)
    place = location.registry_place
    if isinstance(place, str) and not Registry.is_at(place) and has_versions(store) and not lost:
        raise registry_missing(location)
    Registry.check_may_replace(place)
    # Asked first: what is acknowledged or removed meanwhile, the store then has as well.
    copied = _copied(store, Registry.known(place, identity))
    reader = _Reader(store)
    contents = reader.contents()
    _check_complete(store, contents, copied)
    check_numbers(contents)
    # First the old registry is cut off, then the store is listed: nothing is acknowledged between.
    closed = Registry.fence(place, identity)
    contents, damaged, kept = _replace(place, identity, store, reader, closed)
    if not location.exists:
        prepare(location)
        complete(location)
    removed = contents.removed
    count = sum(version.facts["push"] not in removed for version in contents.versions)
    unreadable = tuple(f"{key}: {reason}" for key, reason in reader.unreadable.items())
    return Rebuilt(contents.epoch, count, tuple(damaged), unreadable, kept)


@dataclass(slots=True)
class _Epoch:
    """The new epoch, which is written at the very end: only the commit of the new registry comes
    later, so that what fails before leaves the old one in use."""

    store: Store
    contents: StoreContents
    is_begun: bool = False

    def open(self) -> None:
        """Write it, unless another rebuild has written one."""
        expected = self.contents.epoch - (not self.is_begun)  # a transaction may run again
        if read_counting(self.store).epoch != expected:
            raise rebuilt_meanwhile()
        self.is_begun = True
        _write_epoch(self.store, self.contents)

    def is_surely_unwritten(self, error: BaseException) -> bool:
        """Whether after this error no write may be carried out yet, as one without an answer may."""
        if not self.is_begun:
            return True
        if isinstance(error, AccessError | SpaceError):
            with suppress(CkptError):
                return self.store.size(_epoch_key(self.contents)) is None
        return False


def _replace(
    place: Path | str, identity: str, store: Store, reader: _Reader, closed: Fence
) -> tuple[StoreContents, list[str], str | None]:
    """What the store holds now, and what :func:`_make` made of it. Where that fails and surely no
    epoch was written, the old registry is given back; else nothing that it acknowledged from now
    on would count, and it stays closed."""
    epoch = None
    try:
        epoch = _Epoch(store, reader.contents())
        return epoch.contents, *_make(place, identity, epoch, closed)
    except BaseException as error:
        if epoch is None or epoch.is_surely_unwritten(error):
            with suppress(CkptError):
                Registry.reopen(place, closed)
        elif isinstance(error, CkptError) and not isinstance(error, ConflictError):
            said = "nobody can write until `ckpt registry rebuild` has ended well: run it again"
            error.hint = f"{error.hint}; {said}" if error.hint else said
        raise


def _copied(store: Store, known: Mapping[str, KnownCopy]) -> dict[str, KnownCopy]:
    """What of a registry may have been acknowledged: what it has noted to be in the store, and
    what is there. The last acts of a process are noted by the next one; without a copy none of
    them was acknowledged (j), unless the copy is gone since, which nobody can tell."""
    return {
        one: copy for one, copy in known.items() if copy.noted or store.size(copy.key) is not None
    }


def _check_complete(store: Store, contents: StoreContents, copied: Mapping[str, KnownCopy]) -> None:
    """Refuse to replace a registry that knows more than counts in its store."""
    known = {version.facts["push"] for version in contents.versions} | contents.removed
    known |= {event["id"] for event in contents.events}
    missing = [copy for one, copy in copied.items() if one not in known]
    there = sorted(copy.said for copy in missing if store.size(copy.key) is not None)
    newest = contents.epoch - 1
    if there:
        raise IntegrityError(
            "copy-missing",
            f"epochs/{newest}.json in the store leaves out what the registry knows: {few(there)}",
            hint="a rebuild elsewhere did not see it; copy the files of these from older folders "
            f"of documents/ and events/ into documents/{newest}/ and events/{newest}/, and run "
            "this again",
        )
    if missing:
        raise IntegrityError(
            "copy-missing",
            f"the store lacks what the registry knows: {few(sorted(copy.said for copy in missing))}",
            hint="run `ckpt fsck --repair`, which writes it again, or move the registry away",
        )


def _make(
    place: Path | str, identity: str, epoch: _Epoch, closed: Fence
) -> tuple[list[str], str | None]:
    """The new registry in the place of the old one; returns the damaged versions, and where the
    old one is."""
    make = partial(Registry.rebuild, place, identity, epoch.contents, closed, epoch.open)
    if isinstance(place, str):
        damaged, schema = make()
        return damaged, schema and f"in the schema {schema} of the same database"
    try:
        with alone(place):
            Registry.check_left(place, closed)
            kept = _free_name(place, epoch.contents.epoch) if place.exists() else None
            copy = kept and _keep(place, kept)
            try:
                # In the same file, so that whoever has it open goes on with the new one.
                damaged, _ = make()
            except BaseException as error:
                if copy is not None and epoch.is_surely_unwritten(error):
                    copy.unlink()  # the old one is in use again
                raise
        return damaged, None if kept is None else str(kept)
    except OSError as error:
        raise from_os_error(error, f"rebuilding {place}") from error


class _Reader:
    """Reads a store, as often as asked, each of its objects once: none of them ever changes."""

    def __init__(self, store: Store) -> None:
        self.unreadable: dict[str, str] = {}
        self._store = store
        self._read: dict[str, Any] = {}

    def contents(self) -> StoreContents:
        """What the store holds now.

        Raises:
            IntegrityError: ``copy-damaged`` for a document or an event, without which a version,
                a removal or a name would be gone for good.
        """
        store = self._store
        counting = read_counting(store)
        versions = list(self._all(counted(store, "documents/", counting), _read_version))
        events = list(self._all(counted(store, "events/", counting), _read_event))
        listed = {info.key: info for info in store.list("packs/")}
        dead = {event["key"] for event in events if event["kind"] == "dead"}
        packs = [
            finished
            for info in listed.values()
            if info.key not in dead and (finished := self._pack(info)) is not None
        ]
        named = {pack for version in versions for pack in version.facts["packs"]}
        lost = {
            pack: _lost_pack(pack, listed.get(pack_key(pack)))
            for pack in named - {finished.pack.id for finished in packs}
            if pack_key(pack) not in dead
        }
        return StoreContents(counting.epoch + 1, versions, events, packs, frozenset(listed), lost)

    def _all(
        self, listed: Iterable[ObjectInfo], read: Callable[[Store, ObjectInfo], T]
    ) -> Iterator[T]:
        for info in listed:
            if info.key in self._read:
                yield self._read[info.key]
                continue
            try:
                found = self._read[info.key] = read(self._store, info)
            except _DAMAGED as error:
                if self._store.size(info.key) is None:  # its version was removed meanwhile
                    continue
                raise IntegrityError(
                    "copy-damaged",
                    f"{info.key} in the store is damaged: {escape(str(error), 200)}",
                    hint="run `ckpt fsck --repair` if the registry is whole, restore the file from "
                    "a backup, or, to go on without what it says, move it away",
                ) from None
            yield found

    def _pack(self, info: ObjectInfo) -> FinishedPack | None:
        """A pack, or None where it is damaged. Of a disk or server that fails nothing follows, so
        that the rebuild ends: what it leaves out is out for ever."""
        if info.key not in self._read and PACK_KEY.fullmatch(info.key) is None:
            self.unreadable[info.key] = "no pack has such a name"
            self._read[info.key] = None
        elif info.key not in self._read:
            try:
                self._read[info.key] = _read_finished(self._store, info)
            except _DAMAGED as error:
                self.unreadable[info.key] = str(error)
                self._read[info.key] = None
        found: FinishedPack | None = self._read[info.key]
        return found


def _read_version(store: Store, info: ObjectInfo) -> StoredVersion:
    facts = read_version_file(store.get(info.key))
    body = canonical(facts.pop("document"))
    environment = facts.pop("environment")
    if digest_of(body) != facts["document_digest"]:
        raise ValueError("its document has another digest")
    if not info.key.endswith(f"-{facts['push']}.json"):
        raise ValueError("it is of another push than its name")
    return StoredVersion(facts, decode_document(body), environment)


def _read_event(store: Store, info: ObjectInfo) -> dict[str, Any]:
    event = read_event(store.get(info.key))
    if not info.key.endswith(f"-{event['id']}.json"):
        raise ValueError("it is of another event than its name")
    return event


def _read_finished(store: Store, info: ObjectInfo) -> FinishedPack:
    name = info.key.rpartition("/")[2].removesuffix(".safetensors")
    return read_pack(store, Pack(name, info.key, info.size, name.partition("-")[0]))


def _lost_pack(pack: str, info: ObjectInfo | None) -> Pack:
    """A pack of which nothing is known but its name, and its size if it is there."""
    size = 0 if info is None else info.size
    return Pack(pack, pack_key(pack), size, pack.partition("-")[0], state=PackState.BROKEN)


def _write_epoch(store: Store, contents: StoreContents) -> None:
    body = {
        "format": 1,
        "epoch": contents.epoch,
        "documents": sorted(version.facts["push"] for version in contents.versions),
        "events": sorted(event["id"] for event in contents.events),
    }
    store.put(_epoch_key(contents), canonical(body))


def _epoch_key(contents: StoreContents) -> str:
    return f"epochs/{contents.epoch}.json"


def _free_name(place: Path, epoch: int) -> Path:
    """Where nothing of an old registry lies yet."""
    name = f"{place.name}.before-epoch-{epoch}"
    ends = chain([""], (f"_{number}" for number in count(2)))
    return next(kept for end in ends if not (kept := place.with_name(f"{name}{end}")).exists())


def _keep(place: Path, kept: Path) -> Path | None:
    """Copy the old registry, and return the copy; one that is no database any more is moved, with
    what SQLite left beside it."""
    try:
        copy_database(place, kept)
        return kept
    except StorageError as error:
        if error.code != "registry-corrupt":
            raise
    for end in ("", "-wal", "-shm", "-journal"):
        old = place.with_name(place.name + end)
        if old.exists():
            perform("rename", os.rename, old, kept.with_name(kept.name + end))
    return None
