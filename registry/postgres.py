"""PostgreSQL: addresses without secrets, timeouts, snapshots, and what its errors mean."""

from __future__ import annotations

import math
import select
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from sqlalchemy import URL, Connection, Dialect, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection, ExceptionContext
from sqlalchemy.exc import ArgumentError, DBAPIError, InvalidatePoolError
from sqlalchemy.pool import ConnectionPoolEntry

from ckpt.core.effects import perform
from ckpt.core.errors import (
    LOST_HINT,
    AccessError,
    CkptError,
    IntegrityError,
    SpaceError,
    StorageError,
    UsageError,
)
from ckpt.registry.engine import Database, registry_busy, value_invalid

_SCHEMES = ("postgresql+psycopg", "postgresql", "postgres")
_LOCK_SECONDS = 30
_STATEMENT_SECONDS = 600
_REST_SECONDS = 1.0
# A server that is silent must be noticed; what the URL says goes before these.
_CONNECTING: Mapping[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
    "client_encoding": "utf8",
    "application_name": "ckpt",
    "prepare_threshold": None,  # until it is known who answers
}
# After so many calls, as psycopg does by itself, a statement is planned no more each time.
_PREPARED_AFTER = 5

# A lock takes no snapshot: what waits for the end of a rebuild sees the new tables full.
_READING = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; LOCK TABLE meta IN ACCESS SHARE MODE"

# By SQLSTATE: a serialization failure, a deadlock, and a lock that was not given in time.
_CONFLICTS = ("40001", "40P01")
_LOCKED = "55P03"
# A row that another transaction inserted or deleted meanwhile; the next attempt sees it.
_RACES = ("23503", "23505")
# What was prepared gives other types now: somebody migrated the registry.
_STALE_PLAN = "0A000"
_NO_TABLE = ("42P01", "42703")
_NOT_PERMITTED = ("42501", "25006")
_CORRUPT = ("XX001", "XX002")
# A refusal to connect has no SQLSTATE in psycopg, only the server's words.
_LOGIN_WORDS = ("authentication failed", "no password supplied", "no pg_hba.conf entry")
_FULL_WORDS = ("too many connections", "too many clients", "remaining connection slots")
_DENIED_WORDS = ("permission denied for database", "is not permitted to log in")


class PostgresDatabase(Database):
    """A registry on a PostgreSQL server; writers are READ COMMITTED, with row locks."""

    read_options: ClassVar[Mapping[str, Any]] = {
        "isolation_level": "AUTOCOMMIT",  # its begin is sent here, with a lock
        "ckpt_reads": True,
    }
    ask_options: ClassVar[Mapping[str, Any]] = {"isolation_level": "AUTOCOMMIT"}
    missing_hint = LOST_HINT

    def note_loss(self, *_: object) -> None:
        """Count a connection that was lost."""
        self.losses += 1

    def is_passing(self, error: DBAPIError) -> bool:
        return _state(error) in (*_CONFLICTS, _LOCKED, *_RACES, _STALE_PLAN)

    def typed_error(self, error: DBAPIError, reason: str) -> CkptError:
        state, name = _state(error), self.name
        if state is None:
            return self._without_state(error, reason)
        if state in (*_CONFLICTS, _LOCKED):
            return registry_busy(name, reason)
        if state in _NO_TABLE:
            return StorageError(
                "schema-older",
                f"the registry {name} lacks tables that this ckpt needs ({reason})",
                hint="run `ckpt db upgrade`",
            )
        if state in _NOT_PERMITTED:
            return self._not_permitted(reason)
        if state.startswith("28"):
            return self._login_refused(reason)
        if state == "53100":
            return SpaceError(
                "no-space",
                f"no room left for the registry {name} ({reason})",
                hint="free some space on the database server and run again",
            )
        if state == "53300":
            return self._full(reason)
        if state.startswith(("08", "57P")):
            return self._unreachable(reason)
        if state.startswith("22"):
            return value_invalid(reason)
        if state.startswith("23"):
            return IntegrityError(
                "registry-rule", f"the registry {name} refused a change ({reason})"
            )
        if state in _CORRUPT:
            return StorageError(
                "registry-corrupt",
                f"the registry {name} is damaged ({reason})",
                hint="run `ckpt registry rebuild`, which reads the store",
            )
        return StorageError("registry", f"the registry {name} failed ({reason})", hint="run again")

    def _without_state(self, error: DBAPIError, reason: str) -> CkptError:
        """The error for what psycopg or libpq said, and not a statement's answer."""
        from psycopg import DataError, OperationalError

        if isinstance(error.orig, DataError):
            return value_invalid(reason)
        if any(words in reason for words in _LOGIN_WORDS):
            return self._login_refused(reason)
        if any(words in reason for words in _DENIED_WORDS):
            return self._not_permitted(reason)
        if any(words in reason for words in _FULL_WORDS):
            return self._full(reason)
        if "FATAL" in reason and "does not exist" in reason:
            return StorageError(
                "registry-missing",
                f"there is no registry {self.name} ({reason})",
                hint="check its address, or have the database and the user created",
            )
        if isinstance(error.orig, OperationalError):
            return self._unreachable(reason)
        return StorageError(
            "registry", f"the registry {self.name} failed ({reason})", hint="run again"
        )

    def _unreachable(self, reason: str) -> StorageError:
        return StorageError(
            "registry-unreachable",
            f"the registry {self.name} cannot be reached ({reason})",
            hint="check its address and that the server runs, and run again",
        )

    def _full(self, reason: str) -> StorageError:
        return StorageError(
            "registry-unreachable",
            f"the registry {self.name} takes no more connections ({reason})",
            hint="run again when others have ended; raise max_connections, or put a pooler before it",
        )

    def _login_refused(self, reason: str) -> AccessError:
        return AccessError(
            "login-refused",
            f"the registry {self.name} refused the login ({reason})",
            hint="check the user and the password, in the address, PGPASSWORD or ~/.pgpass",
        )

    def _not_permitted(self, reason: str) -> AccessError:
        return AccessError(
            "permission",
            f"the registry {self.name} does not permit this ({reason})",
            hint="have the user granted USAGE on its schema, SELECT, INSERT, UPDATE and DELETE on all "
            "tables and USAGE on all sequences there; a server that is a standby takes no writes",
        )


def open_postgres(url: str) -> PostgresDatabase:
    """The database at ``url``, ``postgresql://user:password@host:port/database``; connects later.

    Raises:
        UsageError: ``uri-refused``, ``driver-missing``.
    """
    address = _parsed(url)
    given = {name: value for name, value in _CONNECTING.items() if name not in address.query}
    try:
        engine = create_engine(
            address,
            connect_args=given,
            isolation_level="READ COMMITTED",
            hide_parameters=True,
        )
    except ImportError as error:
        raise UsageError(
            "driver-missing",
            f"a registry on PostgreSQL needs psycopg ({error})",
            hint='run `pip install "ckpt-registry[postgres]"`',
        ) from error
    event.listen(engine, "connect", _prepare_where_direct)
    event.listen(engine, "handle_error", _forget_stale_plans)
    event.listen(engine, "begin", _begin)
    event.listen(engine, "checkin", _note_rest)
    event.listen(engine, "checkout", partial(_replace_dead, engine.dialect))
    database = PostgresDatabase(engine, _shown(address))
    event.listen(engine, "invalidate", database.note_loss)
    return database


def _parsed(url: str) -> URL:
    try:
        address = make_url(url)
    except (ArgumentError, ValueError):
        # What was refused may hold a password, so neither it nor the reason is shown.
        address = None
    if address is None or address.drivername not in _SCHEMES:
        raise UsageError(
            "uri-refused",
            "the address of the registry is not one of PostgreSQL",
            hint="write postgresql://user:password@host:port/database, "
            "with %-escapes for signs such as @ and / in the password",
        )
    return address.set(drivername=_SCHEMES[0])


def _shown(address: URL) -> str:
    """The address without the password and whatever else may be secret."""
    kept = {name: address.query[name] for name in ("host", "port") if name in address.query}
    shown = URL.create(
        address.drivername,
        username=address.username,
        host=address.host,
        port=address.port,
        database=address.database,
        query=kept,
    )
    return shown.render_as_string()


def _prepare_where_direct(connection: Any, _: object) -> None:
    """Have statements prepared where the process that answers is the one that was connected to: a
    pooler between lends a connection's statements to others, and loses them."""
    connection.autocommit = True
    (answers,) = connection.execute("SELECT pg_backend_pid()").fetchone()
    connection.autocommit = False
    if answers == connection.info.backend_pid:
        connection.prepare_threshold = _PREPARED_AFTER


def _forget_stale_plans(context: ExceptionContext) -> None:
    """Have all connected anew after a migration, so that the next attempt is planned anew."""
    if getattr(context.original_exception, "sqlstate", None) == _STALE_PLAN:
        context.is_disconnect = True


def _note_rest(_: object, record: ConnectionPoolEntry) -> None:
    record.info["rests_since"] = time.monotonic()


def _replace_dead(
    dialect: Dialect, connection: DBAPIConnection, record: ConnectionPoolEntry, _: object
) -> None:
    """Have all connected anew when a connection was ended while it rested, which its server says
    unasked, and a router between does not. To ask each time, as a pool can, would be one more way
    to the server and back."""
    rests = time.monotonic() - record.info.get("rests_since", math.inf)
    if rests < _REST_SECONDS and not _was_told(connection):
        return
    try:
        dialect.do_ping(connection)
    except dialect.loaded_dbapi.Error as error:
        raise InvalidatePoolError from error


def _was_told(connection: DBAPIConnection) -> bool:
    """Whether the server sent something that nobody read yet."""
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    return bool(waiting.poll(0))


def _begin(connection: Connection) -> None:
    """Settings of a writing transaction, made in it, because a pooler drops those of a session."""
    options = connection.get_execution_options()
    if options.get("ckpt_reads", False):
        perform("sql.begin", connection.exec_driver_sql, _READING)
    if not options.get("ckpt_writes", False):
        return
    statement = (
        f"SELECT set_config('lock_timeout', '{int(_LOCK_SECONDS * 1000)}', true),"
        f" set_config('statement_timeout', '{int(_STATEMENT_SECONDS * 1000)}', true),"
        " current_setting('fsync'), current_setting('synchronous_commit')"
    )
    row = perform("sql.begin", connection.exec_driver_sql, statement).one()
    if "off" in row[2:]:
        raise StorageError(
            "registry-settings",
            "PostgreSQL runs with fsync or synchronous_commit off, so commits may be lost",
            hint="switch both on for the registry's database",
        )


def _state(error: DBAPIError) -> str | None:
    """The SQLSTATE of a statement's error, None when the server gave none."""
    found: str | None = getattr(error.orig, "sqlstate", None)
    return found
