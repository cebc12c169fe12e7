"""What ``push_promises`` and ``collection_promises`` share: a repository, and ways to disturb it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from crash_driver import MODEL, file_of
from sqlalchemy import Select, Update
from sqlalchemy.dialects import postgresql

import ckpt
from ckpt.core.effects import observed
from ckpt.service.config import locate
from ckpt.service.rebuild import rebuild_registry
from ckpt.storage.local import LocalStore

BASE = ("a", "b", "c")
MIXED = ("a", "b", "new")
PUSH = "c" * 32  # a push that is made by hand

Act = Callable[[], object]


class StoppedError(BaseException):
    """The process does nothing any more."""


@contextmanager
def repository(folder: Path) -> Iterator[ckpt.Repository]:
    """A repository with a version that stays, and ``m@1``."""
    with ckpt.open(folder) as repo:
        push(repo, "kept", model="kept")
        push(repo, *BASE)
        yield repo


def push(repo: ckpt.Repository, *names: str, model: str = MODEL, step: int = 1) -> ckpt.Version:
    file = repo.location.root / "pushed.safetensors"
    file.write_bytes(file_of(*names))
    return repo.push_file(file, model, step=step)


def assert_pulls(repo: ckpt.Repository, version: str | ckpt.Version, *names: str) -> None:
    file = repo.location.root / "pulled.safetensors"
    repo.pull_file(version, file, force=True)
    assert file.read_bytes() == file_of(*names)


@contextmanager
def by_hand(repo: ckpt.Repository) -> Iterator[sqlite3.Connection]:
    """The registry's own file, to do what no act of ours does."""
    with closing(sqlite3.connect(repo.location.registry, isolation_level=None)) as connection:
        yield connection


def pack_of(repo: ckpt.Repository, reference: str = f"{MODEL}@1") -> str:
    (pack,) = repo._registry.books.read_plan(repo.get(reference).push)[0]
    return pack


def path_of(repo: ckpt.Repository, pack: str) -> Path:
    (path,) = repo.location.store.glob(f"packs/*/{pack}.safetensors")
    path.chmod(0o600)
    return path


@contextmanager
def before_next(kind: str, act: Act) -> Iterator[None]:
    """Do something once, before the next effect of this kind."""
    waiting = [kind]

    def hook(found: str, effect: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if found in waiting:
            waiting.remove(found)
            act()
        return effect(*args)

    with observed(hook):
        yield
    assert not waiting, f"there was no {kind}"


@contextmanager
def small_packs() -> Iterator[None]:
    """Each tensor gets a pack of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckpt.storage.packs.PACK_BYTES", 4096)
        yield


def flip(path: Path) -> None:
    """Change one bit of what a pack holds."""
    body = bytearray(path.read_bytes())
    body[5000] ^= 1
    path.chmod(0o600)
    path.write_bytes(body)


def rebuilt(folder: Path) -> None:
    location = locate(folder)
    rebuild_registry(location, LocalStore(location.store))


def statements(act: Act) -> list[Any]:
    """What is asked of the registry meanwhile."""
    asked: list[Any] = []

    def hook(kind: str, effect: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        asked.extend(args[:1] if kind == "sql" else ())
        return effect(*args)

    with observed(hook):
        act()
    return asked


def text_of(statement: Any) -> str:
    """A statement as PostgreSQL would get it, locks and all."""
    if not isinstance(statement, Select | Update):
        return ""
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    return " ".join(str(statement.compile(dialect=dialect)).split())
