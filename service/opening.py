"""Opening a repository: found, checked, and made when there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckpt.core.errors import StorageError, UsageError
from ckpt.registry.registry import Registry
from ckpt.service.config import Location, complete, local_path, locate, no_repository, prepare
from ckpt.service.repository import PathLike, Repository
from ckpt.storage.identity import ensure_identity, read_identity
from ckpt.storage.local import LocalStore


def open_repository(
    repo: PathLike | None = None,
    *,
    registry: str | None = None,
    store: str | None = None,
    create: bool = True,
) -> Repository:
    """Open a repository; the public name is ``ckpt.open``.

    Args:
        repo: a folder: itself if it is a repository, else its ``.ckpt/``. By default
            ``CKPT_REPO``, else the nearest ``.ckpt/`` upwards, else the user's own.
        registry, store: in place of ``repo``, the file of the one and the folder of the other.
        create: make the repository when there is none.

    Raises:
        NotFoundError: ``no-repository`` when there is none and ``create`` is false.
        StorageError: ``registry-missing``, ``registry-corrupt``, ``schema-newer``.
        IntegrityError: ``foreign-store``, ``store-format``.
    """
    if registry is not None or store is not None:
        if repo is not None or registry is None or store is None:
            raise UsageError(
                "usage", "a repository is one folder, or a registry and a store", hint="give both"
            )
        return _open_parts(registry, store, create)
    location = locate(repo)
    identity = read_identity(LocalStore(location.store))
    if location.exists:
        if identity is None:
            raise StorageError(
                "store-missing",
                f"the store {location.store} is missing",
                hint="put it back, or correct config.toml",
            )
        return Repository(location, Registry.open(location.registry, identity))
    if not create:
        raise no_repository(location)
    prepare(location)
    opened = Registry.create(location.registry, ensure_identity(LocalStore(location.store)))
    complete(location)
    return Repository(replace(location, exists=True), opened)


def _open_parts(registry: str, store: str, create: bool) -> Repository:
    """Open a registry and a store that lie in different places."""
    database = local_path(registry.removeprefix("sqlite:///"), "registry")
    folder = local_path(store, "store")
    location = Location(folder, database, folder, exists=database.exists())
    identity = read_identity(LocalStore(folder))
    if location.exists and identity is not None:
        return Repository(location, Registry.open(database, identity))
    if not create:
        raise no_repository(location)
    opened = Registry.create(database, ensure_identity(LocalStore(folder)))
    return Repository(replace(location, exists=True), opened)


def upgrade_registry(repo: PathLike | None = None) -> Path:
    """Bring the schema of a repository's registry up to date; returns where it is."""
    location = locate(repo)
    identity = read_identity(LocalStore(location.store))
    if not location.exists or identity is None:
        raise no_repository(location)
    Registry.upgrade(location.registry, identity)
    return location.registry
