"""registry rebuild: the store is read, a new epoch opened, and the registry made anew from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ckpt.core.digests import digest_of
from ckpt.core.documents import canonical, decode_document
from ckpt.core.effects import perform
from ckpt.core.errors import IntegrityError, StorageError, from_os_error
from ckpt.core.records import FinishedPack, Pack
from ckpt.registry.rebuild import StoreContents, StoredVersion
from ckpt.registry.registry import Registry
from ckpt.registry.sqlite import copy_database
from ckpt.service.config import Location, no_repository
from ckpt.service.stored_facts import read_event, read_version_file
from ckpt.storage.identity import read_identity
from ckpt.storage.packs import read_pack
from ckpt.storage.store import ObjectInfo, Store


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What a rebuild found.

    Attributes:
        versions: how many there are.
        damaged: versions whose bytes are not all there; kept, for the rest of them.
        unreadable: keys in the store that say nothing valid, with the reason; left alone.
        kept: where the old registry is now, if there was one.
    """

    epoch: int
    versions: int
    damaged: tuple[str, ...]
    unreadable: tuple[str, ...]
    kept: str | None


def rebuild_registry(location: Location, store: Store) -> Rebuilt:
    """Make the registry anew from the store alone; the old one is kept beside it.

    Raises:
        NotFoundError: ``no-repository``; StorageError, AccessError, SpaceError: the old registry
            is still in its place, and it is safe to run this again.
    """
    identity = read_identity(store)
    if identity is None:
        raise no_repository(location)
    unreadable: list[str] = []
    epoch, before = _epochs(store)
    # First the old registry is cut off, then the store is listed: nothing is acknowledged between.
    Registry.fence(location.registry_place, identity)
    contents = _read(store, epoch, before, unreadable)
    _write_epoch(store, contents)
    damaged, kept = _make(location.registry_place, identity, contents)
    ended = {event["push"] for event in contents.events if event["kind"] in ("rm", "prune")}
    count = sum(version.facts["push"] not in ended for version in contents.versions)
    return Rebuilt(contents.epoch, count, tuple(damaged), tuple(unreadable), kept)


def _make(
    place: Path | str, identity: str, contents: StoreContents
) -> tuple[list[str], str | None]:
    """The new registry in the place of the old one; returns the damaged versions, and where the
    old one is."""
    if isinstance(place, str):
        schema = f"ckpt_before_epoch_{contents.epoch}"
        damaged, replaced = Registry.rebuild(place, identity, contents, schema)
        return damaged, f"in the schema {schema} of the same database" if replaced else None
    kept = place.with_name(f"{place.name}.before-epoch-{contents.epoch}")
    try:
        existed = place.exists()
        if existed:
            _keep(place, kept)
        # In the same file, so that whoever has it open goes on with the new one.
        damaged, _ = Registry.rebuild(place, identity, contents, "")
        return damaged, str(kept) if existed else None
    except OSError as error:
        raise from_os_error(error, f"rebuilding {place}") from error


def _epochs(store: Store) -> tuple[int, dict[str, Any]]:
    """The newest epoch and what its file counts of earlier ones."""
    newest, key = 1, None
    for info in store.list("epochs/"):
        number = info.key.removeprefix("epochs/").removesuffix(".json")
        if number.isdigit() and int(number) > newest:
            newest, key = int(number), info.key
    if key is None:
        return 1, {"documents": [], "events": []}
    try:
        counted = msgspec.json.decode(store.get(key))
        return newest, {name: list(counted[name]) for name in ("documents", "events")}
    except (msgspec.MsgspecError, KeyError, TypeError) as error:
        raise IntegrityError(
            "epoch-damaged", f"{key} cannot be read: {error}", hint="restore it from a backup"
        ) from None


def _read(store: Store, epoch: int, before: dict[str, Any], unreadable: list[str]) -> StoreContents:
    versions = [
        version
        for info in _counted(store, "documents/", epoch, set(before["documents"]))
        if (version := _tried(info, lambda info: _read_version(store, info), unreadable))
    ]
    events = [
        event
        for info in _counted(store, "events/", epoch, set(before["events"]))
        if (event := _tried(info, lambda info: _read_event(store, info), unreadable))
    ]
    listed = list(store.list("packs/"))
    dead = {event["key"] for event in events if event["kind"] == "dead"}
    packs = [
        finished
        for info in listed
        if info.key not in dead
        and (finished := _tried(info, lambda info: _read_finished(store, info), unreadable))
    ]
    keys = frozenset(info.key for info in listed)
    return StoreContents(epoch + 1, versions, events, packs, keys)


def _counted(store: Store, place: str, epoch: int, named: set[str]) -> Iterator[ObjectInfo]:
    """(k): what lies in the newest epoch, and of earlier ones what its file names."""
    for info in store.list(place):
        number, _, name = info.key.removeprefix(place).partition("/")
        identity = name.rpartition("-")[2].removesuffix(".json")
        if number == str(epoch) or identity in named:
            yield info


def _tried(info: ObjectInfo, read: Callable[[ObjectInfo], Any], unreadable: list[str]) -> Any:
    """What it says; of a disk or server that fails nothing follows, so that the rebuild ends: what
    it leaves out is out for ever."""
    try:
        return read(info)
    except (IntegrityError, msgspec.MsgspecError, RecursionError, ValueError) as error:
        unreadable.append(f"{info.key}: {error}")
        return None


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


def _write_epoch(store: Store, contents: StoreContents) -> None:
    body = {
        "format": 1,
        "epoch": contents.epoch,
        "documents": sorted(version.facts["push"] for version in contents.versions),
        "events": sorted(event["id"] for event in contents.events),
    }
    store.put(f"epochs/{contents.epoch}.json", canonical(body))


def _keep(place: Path, kept: Path) -> None:
    """Copy the old registry; one that is no database any more is moved, with what SQLite left
    beside it."""
    try:
        copy_database(place, kept)
        return
    except StorageError as error:
        if error.code != "registry-corrupt":
            raise
    for end in ("", "-wal", "-shm", "-journal"):
        old = place.with_name(place.name + end)
        if old.exists():
            perform("rename", os.rename, old, kept.with_name(kept.name + end))
