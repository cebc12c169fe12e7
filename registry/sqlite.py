"""SQLite: pragmas, locking, the filesystem that it lies on, and what its errors mean."""

from __future__ import annotations

import fcntl
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, ClassVar

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.exc import DBAPIError

from ckpt.core.effects import perform
from ckpt.core.errors import AccessError, CkptError, IntegrityError, SpaceError, StorageError
from ckpt.registry.engine import Database, registry_busy

_WAIT_SECONDS = 30
# Until 3.51.3, two connections that write and checkpoint a WAL at once could corrupt it; these
# two branches have the fix as well (sqlite.org, "WAL-reset bug").
_WAL_SAFE = (3, 51, 3)
_WAL_SAFE_BRANCHES = ((3, 44, 6), (3, 50, 7))
_NETWORK_FILESYSTEMS = ("nfs", "cifs", "smb", "fuse", "9p", "afs", "lustre", "gpfs", "ceph")
_MOUNTS = Path("/proc/self/mountinfo")
_ESCAPE = re.compile(r"\\([0-7]{3})")  # of blanks and backslashes in the names there


class SqliteDatabase(Database):
    """A registry in a file."""

    ask_options: ClassVar[Mapping[str, Any]] = {"ckpt_asks": True}
    missing_hint = "run `ckpt registry rebuild`, which reads the store"

    def is_passing(self, error: DBAPIError) -> bool:
        return isinstance(error.orig, sqlite3.OperationalError) and "locked" in str(error.orig)

    def typed_error(self, error: DBAPIError, reason: str) -> CkptError:
        name = self.name
        if self.is_passing(error):
            return registry_busy(name, reason)
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
                "permission",
                f"the registry {name} cannot be opened",
                hint="check its path and mode",
            )
        if any(sign in reason for sign in ("malformed", "not a database", "no such table")):
            return StorageError(
                "registry-corrupt",
                f"the registry {name} is damaged ({reason})",
                hint="run `ckpt registry rebuild`, which reads the store",
            )
        if "FOREIGN KEY" in reason.upper():
            return IntegrityError(
                "registry-rule", f"the registry {name} refused a change ({reason})"
            )
        return StorageError("registry", f"the registry {name} failed ({reason})", hint="run again")


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
            hint=SqliteDatabase.missing_hint,
        )
    mode = "rwc" if create else "rw"
    url = f"sqlite:///file:{_quoted(path)}?mode={mode}&uri=true"
    engine = create_engine(url, connect_args={"timeout": _WAIT_SECONDS, "isolation_level": None})
    event.listen(engine, "connect", _set_pragmas)
    event.listen(engine, "begin", _begin)
    return SqliteDatabase(engine, str(path))


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep out whoever else would replace the database in a file, for which it is waited. The lock
    is the folder's: a file that is no database has none, and to close one loses SQLite's."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        perform("flock", fcntl.flock, folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def copy_database(path: Path, destination: Path) -> None:
    """Copy the database in a file, as it is at one moment, durably.

    Raises:
        StorageError: ``registry-corrupt`` when it cannot be read as one.
    """
    source = f"file:{_quoted(path)}?mode=ro"
    try:
        with (
            closing(sqlite3.connect(source, uri=True, timeout=_WAIT_SECONDS)) as one,
            closing(sqlite3.connect(destination)) as other,
        ):
            perform("sql.backup", one.backup, other)
    except BaseException as error:
        destination.unlink(missing_ok=True)
        if not isinstance(error, sqlite3.DatabaseError):
            raise
        # A disk that fails or is full, or a lock, says nothing of what is in the file.
        passing = isinstance(error, sqlite3.OperationalError)
        raise StorageError(
            "registry" if passing else "registry-corrupt",
            f"the registry {path} cannot be copied ({error})",
            hint="run again" if passing else None,
        ) from error


def _quoted(path: Path) -> str:
    return str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def _set_pragmas(connection: sqlite3.Connection, _: object) -> None:
    mode = journal_mode(sqlite3.sqlite_version_info)
    answer = connection.execute(f"PRAGMA journal_mode={mode}").fetchone()[0]
    if answer != mode:
        raise StorageError("registry-journal", f"SQLite keeps journal mode {answer}, not {mode}")
    for pragma in (
        "synchronous=full",  # EXTRA would add the sync of a folder that a journal was removed from
        "foreign_keys=on",
        "trusted_schema=off",
        "cell_size_check=on",
        "mmap_size=0",
    ):
        connection.execute(f"PRAGMA {pragma}")


def journal_mode(version: tuple[int, ...]) -> str:
    """A write-ahead log where this SQLite version may use one with several writers; else a
    rollback journal that is emptied and not removed (docs/decisions/014)."""
    safe = version >= _WAL_SAFE or any(
        version[:2] == branch[:2] and version >= branch for branch in _WAL_SAFE_BRANCHES
    )
    return "wal" if safe else "truncate"


def _begin(connection: Connection) -> None:
    options = connection.get_execution_options()
    if options.get("ckpt_asks", False):
        return
    # A writer takes the lock before it reads, so that it never has to give up half-way.
    writes = options.get("ckpt_writes", False)
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
    if not _MOUNTS.exists():
        return ""
    target = os.path.realpath(path)
    best, kind = "", ""
    for line in os.fsdecode(_MOUNTS.read_bytes()).removesuffix("\n").split("\n"):
        fields, _, rest = line.partition(" - ")
        mount = _ESCAPE.sub(lambda found: chr(int(found[1], 8)), fields.split(" ")[4])
        inside = target == mount or target.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, rest.split(" ")[0]
    return kind
