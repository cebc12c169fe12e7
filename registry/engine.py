"""Connections and transactions: pragmas, locking, retries, and database errors made typed."""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, CursorResult, Engine, Executable, Row, create_engine, event, text
from sqlalchemy.exc import DBAPIError

from ckpt.core.effects import perform
from ckpt.core.errors import (
    AccessError,
    CkptError,
    IntegrityError,
    SpaceError,
    StorageError,
    UsageError,
)

T = TypeVar("T")

_WAIT_SECONDS = 30
_ATTEMPTS = 8
# Until 3.51.3, two connections that write and checkpoint a WAL at once could corrupt it; these
# two branches have the fix as well (sqlite.org, "WAL-reset bug").
_WAL_SAFE = (3, 51, 3)
_WAL_SAFE_BRANCHES = ((3, 44, 6), (3, 50, 7))
_NETWORK_FILESYSTEMS = ("nfs", "cifs", "smb", "fuse", "9p", "afs", "lustre", "gpfs", "ceph")

Parameters = Mapping[str, Any] | Sequence[Mapping[str, Any]]


class Transaction:
    """One transaction; every statement of it goes through the seam of ``core.effects``."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def run(self, statement: Executable, values: Parameters | None = None) -> CursorResult[Any]:
        """Execute one statement; ``values`` is a mapping, or a sequence of them."""
        result: CursorResult[Any] = perform(
            "sql", self.connection.execute, statement, values or None
        )
        return result

    def rows(self, statement: Executable, values: Parameters | None = None) -> Sequence[Row[Any]]:
        """All rows of a query."""
        return self.run(statement, values).all()

    def row(self, statement: Executable, values: Parameters | None = None) -> Row[Any] | None:
        """The first row of a query, or None."""
        return self.run(statement, values).first()

    def now(self) -> int:
        """Microseconds since 1970, by the database's clock."""
        if self.connection.dialect.name == "sqlite":
            query = "SELECT CAST((julianday('now') - 2440587.5) * 86400000000.0 AS INTEGER)"
        else:
            query = "SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)"
        return int(self.run(text(query)).scalar_one())


class Database:
    """An engine with the transactions that ckpt uses; nothing else opens connections."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """A consistent snapshot; nothing is written."""
        with self._typed(), self.engine.connect() as connection:
            yield Transaction(connection)

    def write(self, act: Callable[[Transaction], T]) -> T:
        """Run ``act`` in one transaction and commit it, again when the database says busy.

        ``act`` may run more than once and must do nothing but work on its transaction. When the
        outcome of a commit is unknown the error says so, and nothing is repeated.
        """
        for attempt in range(_ATTEMPTS):
            with self._typed():
                try:
                    return self._once(act)
                except DBAPIError as error:
                    if attempt == _ATTEMPTS - 1 or not _is_busy(error):
                        raise
            time.sleep(random.uniform(0, 0.05 * 2**attempt))
        raise AssertionError("unreachable")

    def _once(self, act: Callable[[Transaction], T]) -> T:
        with self.engine.connect() as connection:
            writing = connection.execution_options(ckpt_writes=True)
            with writing.begin() as transaction:
                result = act(Transaction(writing))
                perform("sql.commit", transaction.commit)
            return result

    @contextmanager
    def _typed(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise _from_database_error(error, self.name) from error

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def open_sqlite(path: Path, *, create: bool) -> Database:
    """The database in the file ``path``.

    Raises:
        StorageError: ``registry-filesystem`` on a network filesystem, ``registry-missing``.
    """
    _check_filesystem(path)
    if not create and not path.exists():
        raise StorageError(
            "registry-missing",
            f"the registry {path} is missing",
            hint="put its backup back, or run `ckpt registry rebuild`, which reads the store",
        )
    mode = "rwc" if create else "rw"
    url = f"sqlite:///file:{_quoted(path)}?mode={mode}&uri=true"
    engine = create_engine(url, connect_args={"timeout": _WAIT_SECONDS, "isolation_level": None})
    event.listen(engine, "connect", _set_pragmas)
    event.listen(engine, "begin", _begin)
    return Database(engine, str(path))


def _quoted(path: Path) -> str:
    return str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _set_pragmas(connection: sqlite3.Connection, _: object) -> None:
    wal = wal_is_safe(sqlite3.sqlite_version_info)
    mode = "wal" if wal else "delete"
    answer = connection.execute(f"PRAGMA journal_mode={mode}").fetchone()[0]
    if answer != mode:
        raise StorageError("registry-journal", f"SQLite keeps journal mode {answer}, not {mode}")
    # EXTRA also syncs the folder when a rollback journal is removed; a WAL needs FULL.
    for pragma in (
        f"synchronous={'full' if wal else 'extra'}",
        "foreign_keys=on",
        "trusted_schema=off",
        "cell_size_check=on",
        "mmap_size=0",
    ):
        connection.execute(f"PRAGMA {pragma}")


def wal_is_safe(version: tuple[int, ...]) -> bool:
    """Whether this SQLite version may use a write-ahead log with several writers."""
    return version >= _WAL_SAFE or any(
        version[:2] == branch[:2] and version >= branch for branch in _WAL_SAFE_BRANCHES
    )


def _begin(connection: Connection) -> None:
    # A writer takes the lock before it reads, so that it never has to give up half-way.
    writes = connection.get_execution_options().get("ckpt_writes", False)
    perform("sql.begin", connection.exec_driver_sql, "BEGIN IMMEDIATE" if writes else "BEGIN")


def _check_filesystem(path: Path) -> None:
    kind = _filesystem_of(path)
    if kind.startswith(_NETWORK_FILESYSTEMS):
        raise StorageError(
            "registry-filesystem",
            f"{path} is on {kind}, where SQLite's locks are not safe",
            hint="keep the registry on a local disk, or use PostgreSQL",
        )


def _filesystem_of(path: Path) -> str:
    """The type of the filesystem that holds ``path``; empty where the system does not say."""
    mounts = Path("/proc/self/mountinfo")
    if not mounts.exists():
        return ""
    target = os.path.realpath(path)
    best, kind = "", ""
    for line in mounts.read_text(errors="replace").splitlines():
        fields, _, rest = line.partition(" - ")
        mount = fields.split(" ")[4].encode().decode("unicode_escape")
        inside = target == mount or target.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, rest.split(" ")[0]
    return kind


def _is_busy(error: DBAPIError) -> bool:
    code = getattr(error.orig, "sqlstate", None)
    if code is not None:
        return code in ("40001", "40P01")
    return isinstance(error.orig, sqlite3.OperationalError) and "locked" in str(error.orig)


def _from_database_error(error: DBAPIError, name: str) -> CkptError:
    reason = str(error.orig)
    if "database or disk is full" in reason:
        return SpaceError(
            "no-space",
            f"no room left for the registry {name}",
            hint="free some space and run again",
        )
    if "readonly" in reason or "permission denied" in reason:
        return AccessError(
            "permission", f"not permitted to write the registry {name}", hint="check its mode"
        )
    if "unable to open" in reason:
        return AccessError(
            "permission", f"the registry {name} cannot be opened", hint="check its path and mode"
        )
    if any(sign in reason for sign in ("malformed", "not a database", "no such table")):
        return StorageError(
            "registry-corrupt",
            f"the registry {name} is damaged ({reason})",
            hint="run `ckpt registry rebuild`, which reads the store",
        )
    if "FOREIGN KEY" in reason.upper():
        return IntegrityError("registry-rule", f"the registry {name} refused a change ({reason})")
    if isinstance(error.orig, (OverflowError, TypeError)):
        return UsageError("value-invalid", f"the registry cannot hold a value ({reason})")
    return StorageError("registry", f"the registry {name} failed ({reason})", hint="run again")


def batches(values: Sequence[T], size: int = 500) -> Iterator[Sequence[T]]:
    """``values`` in pieces that fit into one ``IN (…)``."""
    return (values[at : at + size] for at in range(0, len(values), size))
