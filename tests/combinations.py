"""A registry in SQLite or PostgreSQL with a store in a folder or a bucket: the four combinations.

PYTEST_DONT_REWRITE: a plugin of the tests that use it, and imported by them before pytest does.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from postgres_server import PostgresServer
from servers import BUCKET, Server

import ckpt

_SECONDS = 0.05

_REFERRED = "SELECT packs.key, packs.size FROM packs WHERE id IN (SELECT pack FROM refs)"
_DANGLING = "SELECT refs.pack FROM refs LEFT JOIN packs ON packs.id = refs.pack WHERE key IS NULL"
_PINNED = """
    SELECT claims.pack FROM claims JOIN pushes ON pushes.id = claims.push
    WHERE pushes.state <> 'open'
"""


class LockedError(Exception):
    """Somebody else has what a statement needs."""


@dataclass(frozen=True)
class Combination:
    """The two addresses of a repository."""

    registry: str
    store: str

    def open(self) -> ckpt.Repository:
        return ckpt.open(registry=self.registry, store=self.store)

    def run(self, statement: str) -> list[tuple[Any, ...]]:
        """Run one statement behind the registry's back; does not wait for others.

        Raises:
            LockedError: it would have to.
        """
        if "://" not in self.registry:
            return self._run_sqlite(statement)
        try:
            with psycopg.connect(self.registry, autocommit=True) as connection:
                connection.execute(f"SET lock_timeout = {int(_SECONDS * 1000)}".encode())
                cursor = connection.execute(statement.encode())
                return [] if cursor.description is None else cursor.fetchall()
        except psycopg.errors.LockNotAvailable as error:
            raise LockedError from error

    def _run_sqlite(self, statement: str) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(self.registry, timeout=_SECONDS, isolation_level=None)
        with closing(connection):
            try:
                return connection.execute(statement).fetchall()
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                raise LockedError from error

    def check_books(self, repo: ckpt.Repository) -> None:
        """No reference dangles, no claim outlives its push, and the store has what is referred
        to; call it when nobody is at work."""
        assert self.run(_DANGLING) == []
        assert self.run(_PINNED) == []
        assert {*self.run(_REFERRED)} <= {*self.packs(repo)}
        if "://" not in self.registry:
            assert self.run("PRAGMA integrity_check") == [("ok",)]
            assert self.run("PRAGMA foreign_key_check") == []

    def check_nothing_else_is_stored(self, repo: ckpt.Repository) -> None:
        """After a collection of all: exactly the packs that a version refers to."""
        self.check_books(repo)
        assert sorted(self.packs(repo)) == sorted(self.run(_REFERRED))
        if "://" not in self.store:
            assert os.listdir(Path(self.store) / ".tmp") == []

    @staticmethod
    def packs(repo: ckpt.Repository) -> list[tuple[str, int]]:
        """Key and size of every pack in the store."""
        return [(info.key, info.size) for info in repo._store.list("packs/")]


Make = Callable[[], AbstractContextManager[Combination]]


@pytest.fixture(
    params=["sqlite-local", "sqlite-s3", "postgresql-local", "postgresql-s3"],
)
def combination(request: pytest.FixtureRequest) -> str:
    """The name of each of the four."""
    return str(request.param)


@pytest.fixture
def make(
    combination: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Make:
    """Makes empty repositories of a combination, each gone when its context ends."""
    engine, _, store = combination.partition("-")
    if store == "s3":
        server: Server = request.getfixturevalue("seaweedfs")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    @contextmanager
    def make_one() -> Iterator[Combination]:
        name = f"test_{secrets.token_hex(8)}"
        folder = tmp_path / name
        folder.mkdir()
        place = f"s3://{BUCKET}/combinations/{name}" if store == "s3" else str(folder / "store")
        if engine == "sqlite":
            yield Combination(str(folder / "registry.db"), place)
        else:
            postgres: PostgresServer = request.getfixturevalue("postgres")
            postgres.run(f"CREATE DATABASE {name}")
            yield Combination(postgres.url(name), place)
            postgres.run(f"DROP DATABASE {name} WITH (FORCE)")
        shutil.rmtree(folder)

    return make_one
