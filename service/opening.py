"""Opening a repository: found, checked, and made when there is none."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from ckpt.core.errors import StorageError, UsageError
from ckpt.registry.registry import Registry
from ckpt.service.config import (
    Location,
    complete,
    locate,
    no_repository,
    prepare,
    registry_missing,
    store_missing,
)
from ckpt.service.places import Place, as_place, open_store, probe_store, shown
from ckpt.service.repository import PathLike, Repository
from ckpt.service.stored_facts import has_versions
from ckpt.service.tripwire import check_newest
from ckpt.storage.identity import ensure_identity, read_identity
from ckpt.storage.store import Store

_log = logging.getLogger(__name__)


def open_repository(
    repo: PathLike | None = None,
    *,
    registry: PathLike | None = None,
    store: PathLike | None = None,
    create: bool = True,
) -> Repository:
    """Open a repository; the public name is ``ckpt.open``.

    Args:
        repo: a folder: itself if it is a repository, else its ``.ckpt/``. By default
            ``CKPT_REPO``, else the nearest ``.ckpt/`` upwards, else the user's own.
        registry, store: in place of ``repo``, the file or PostgreSQL address of the one, and the
            folder or ``s3://bucket/prefix`` of the other.
        create: make the repository when there is none.

    Raises:
        NotFoundError: ``no-repository`` when there is none and ``create`` is false.
        StorageError: ``registry-missing``, ``registry-corrupt``, ``registry-filesystem``,
            ``schema-newer``, ``schema-older``, ``store-missing``.
        IntegrityError: ``foreign-store``, ``store-format``.
    """
    if registry is not None or store is not None:
        if repo is not None or registry is None or store is None:
            raise UsageError(
                "usage", "a repository is one folder, or a registry and a store", hint="give both"
            )
        return _open_parts(_part(registry, "registry"), _part(store, "store"), create)
    location = locate(repo)
    if location.exists:
        return reopen(location)
    if not create:
        raise no_repository(location)
    return make_repository(location)


def make_repository(location: Location) -> Repository:
    """Make the repository that ``location`` describes; a store or registry that is there already
    is taken as it is."""
    options = probe_store(location.store_place, location.options)
    location = replace(location, options=options)
    prepare(location)
    with _store_of(location) as (store, keep):
        _check_not_lost(location, store)
        opened = Registry.create(location.registry_place, ensure_identity(store))
        try:
            check_newest(store, opened)
            complete(location)
        except BaseException:
            opened.close()
            raise
        keep()
        return Repository(replace(location, exists=True), opened, store)


def reopen(location: Location) -> Repository:
    """Open a repository that is there, and may be open elsewhere."""
    with _store_of(location) as (store, keep):
        identity = read_identity(store)
        if identity is None:
            raise store_missing(location)
        opened = Registry.open(location.registry_place, identity)
        keep()
        return Repository(location, opened, store)


@contextmanager
def _store_of(location: Location) -> Iterator[tuple[Store, Callable[[], object]]]:
    """The store, closed afterwards unless it was said to keep it: to connect takes a while."""
    _log.debug(
        "repository: registry %s, store %s",
        shown(location.registry_place),
        shown(location.store_place),
    )
    with ExitStack() as stack:
        store = open_store(location.store_place, location.options)
        stack.callback(store.close)
        yield store, stack.pop_all


def _part(given: PathLike, what: str) -> Place:
    place = as_place(os.fspath(given), what)
    if not isinstance(place, Path):
        return place
    return Path(os.path.abspath(place))  # the program may go elsewhere while it is open


def _open_parts(registry: Place, store: Place, create: bool) -> Repository:
    """Open a registry and a store that lie in different places."""
    exists = registry.exists() if isinstance(registry, Path) else True
    root = store if isinstance(store, Path) else registry if isinstance(registry, Path) else Path()
    location = Location(root, registry, store, exists=exists)
    with _store_of(location) as (opened, keep):
        identity = read_identity(opened)
        if identity is not None and exists:
            try:
                found = Registry.open(registry, identity)
            except StorageError as error:  # a database without tables is no repository yet
                if isinstance(registry, Path) or not create or error.code != "registry-missing":
                    raise
            else:
                keep()
                return Repository(location, found, opened)
        if not create:
            raise no_repository(location)
        _check_not_lost(location, opened)
        made = Registry.create(registry, ensure_identity(opened))
        keep()
        return Repository(replace(location, exists=True), made, opened)


def _check_not_lost(location: Location, store: Store) -> None:
    """Refuse an empty registry over a store that has versions."""
    place = location.registry_place
    # The store first: what somebody pushes meanwhile has a registry by then.
    if has_versions(store) and not Registry.is_at(place):
        raise registry_missing(location)


def upgrade_registry(repo: PathLike | None = None) -> str:
    """Bring the schema of a repository's registry up to date; returns where it is."""
    location = locate(repo)
    if not location.exists:
        raise no_repository(location)
    with _store_of(location) as (store, _):
        identity = read_identity(store)
    if identity is None:
        raise store_missing(location)
    Registry.upgrade(location.registry_place, identity)
    return shown(location.registry_place)
