"""Connections and transactions on either database: snapshots, retries, and errors made typed."""

from __future__ import annotations

import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

from sqlalchemy import BigInteger, Connection, CursorResult, Engine, Executable, Row, Table, select
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from ckpt.core.effects import perform
from ckpt.core.errors import CkptError, StorageError, UsageError
from ckpt.core.printable import escape

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql, sqlite

P = ParamSpec("P")
T = TypeVar("T")

_ATTEMPTS = 8
_LOSSES = 2  # of connections, in one call

Parameters = Mapping[str, Any] | Sequence[Mapping[str, Any]]


class Clock(FunctionElement[int]):
    """Microseconds since 1970, by the database's clock, in any statement."""

    type = BigInteger()
    inherit_cache = True


@compiles(Clock)
def _clock(*_: Any, **__: Any) -> str:
    return "CAST((julianday('now') - 2440587.5) * 86400000000.0 AS INTEGER)"


@compiles(Clock, "postgresql")
def _clock_of_postgresql(*_: Any, **__: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)"


_NOW = select(Clock())


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

    def insert_absent(self, table: Table, values: Parameters) -> int:
        """Insert rows, but none whose key is taken; one that another transaction is inserting is
        waited for. Returns how many were inserted, when one was given."""
        return self.run(_insert_absent(table, self.connection.dialect.name), values).rowcount

    def put(self, table: Table, values: Parameters) -> None:
        """Insert rows with all their columns; one whose key is taken is changed instead."""
        self.run(_insert_or_change(table, self.connection.dialect.name), values)

    def now(self) -> int:
        """Microseconds since 1970, by the database's clock."""
        return int(self.run(_NOW).scalar_one())


# Made once: to build a statement takes as long as to run it.
@cache
def _insert_absent(table: Table, dialect: str) -> Executable:
    return _insert(table, dialect).on_conflict_do_nothing()


@cache
def _insert_or_change(table: Table, dialect: str) -> Executable:
    new = _insert(table, dialect)
    changed = {one.name: new.excluded[one.name] for one in table.c if not one.primary_key}
    return new.on_conflict_do_update(index_elements=table.primary_key.columns, set_=changed)


def _insert(table: Table, dialect: str) -> sqlite.Insert | postgresql.Insert:
    if dialect == "sqlite":
        from sqlalchemy.dialects import sqlite

        return sqlite.insert(table)
    from sqlalchemy.dialects import postgresql

    return postgresql.insert(table)


def repeated(look: Callable[P, T]) -> Callable[P, T]:
    """A function that only reads, called again when its connection was lost."""

    @wraps(look)
    def look_again(*args: P.args, **named: P.kwargs) -> T:
        for losses in range(_LOSSES):
            try:
                return look(*args, **named)
            except StorageError as error:
                if not getattr(error.__cause__, "connection_invalidated", False):
                    raise
            _rest(losses)
        return look(*args, **named)

    return look_again


class Database(ABC):
    """An engine with the transactions that ckpt uses; nothing else opens connections.

    ``name`` is how messages call the database, without any secret. ``losses`` counts connections
    that were lost: afterwards another server may answer, which is behind. Then ``confirm`` is
    called before anything is written.
    """

    read_options: ClassVar[Mapping[str, Any]] = {}
    ask_options: ClassVar[Mapping[str, Any]]
    missing_hint: ClassVar[str]  # what to do where there is no registry

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name
        self.losses = self._confirmed = 0
        self.confirm: Callable[[], object] = lambda: None
        self._is_closed = False
        self._process = os.getpid()

    @abstractmethod
    def is_passing(self, error: DBAPIError) -> bool:
        """Whether the transaction was surely rolled back, and may succeed when it runs again."""

    @abstractmethod
    def typed_error(self, error: DBAPIError, reason: str) -> CkptError:
        """The error of ckpt for one of the driver; ``reason`` is its message on one line."""

    @contextmanager
    def read(self) -> Iterator[Transaction]:
        """A consistent snapshot; nothing is written."""
        with self._typed(), self._connect() as connection:
            yield Transaction(connection.execution_options(**self.read_options))
            connection.commit()  # after a rollback psycopg forgets what it has prepared

    @repeated
    def ask(self, statement: Executable, values: Parameters | None = None) -> Row[Any] | None:
        """The first row of one query, or None."""
        with self.asking() as transaction:
            return transaction.row(statement, values)

    @repeated
    def ask_all(
        self, statement: Executable, values: Parameters | None = None
    ) -> Sequence[Row[Any]]:
        """All rows of one query."""
        with self.asking() as transaction:
            return transaction.rows(statement, values)

    @contextmanager
    def asking(self) -> Iterator[Transaction]:
        """For one statement, which is a snapshot without a transaction, whose begin and end would
        be two or three more ways to a server and back."""
        with self._typed(), self._connect() as connection:
            yield Transaction(connection.execution_options(**self.ask_options))

    def write(self, act: Callable[[Transaction], T]) -> T:
        """Run ``act`` in one transaction and commit it, again when the database says busy, or the
        connection was lost before the commit was sent.

        ``act`` may run more than once and must do nothing but work on its transaction. Where the
        outcome of a commit is unknown nothing is repeated: who needs to know it asks.
        """
        losses = 0
        for attempt in range(_ATTEMPTS):
            commits: list[None] = []
            with self._typed():
                try:
                    return self._once(act, commits)
                except DBAPIError as error:
                    is_lost = error.connection_invalidated and not commits
                    losses += is_lost
                    if losses > _LOSSES or not (is_lost or self.is_passing(error)):
                        raise
                    if attempt == _ATTEMPTS - 1:
                        raise
            _rest(attempt)
        raise AssertionError("unreachable")

    def _once(self, act: Callable[[Transaction], T], commits: list[None]) -> T:
        """One try; ``commits`` has an element as soon as the commit may be sent."""
        with self._connect_to_write() as connection:
            writing = connection.execution_options(ckpt_writes=True)
            with writing.begin() as transaction:
                result = act(Transaction(writing))
                commits.append(None)
                perform("sql.commit", transaction.commit)
            return result

    @contextmanager
    def _typed(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise self.typed_error(error, escape(" ".join(str(error.orig).split()))) from error
        except PoolTimeoutError as error:  # as many threads as it has connections wait for a lock
            raise registry_busy(self.name, "every connection is in use") from error
        except (OverflowError, UnicodeEncodeError) as error:
            raise value_invalid(str(error)) from error

    def close(self) -> None:
        """Close all connections; none is made afterwards."""
        self._is_closed = True
        self.engine.dispose()

    def _connect_to_write(self) -> Connection:
        while True:
            connection = self._connect()
            if self.losses == self._confirmed:
                return connection
            connection.close()  # so that what is asked has no need of another
            losses = self.losses
            self.confirm()
            self._confirmed = losses

    def _connect(self) -> Connection:
        if self._is_closed:
            raise UsageError(
                "repository-closed",
                f"the repository of the registry {self.name} is closed",
                hint="use it within its `with`, or open it again",
            )
        if self._process != os.getpid():  # forked: the open connections are the other process's
            self.engine.dispose(close=False)
            self._process = os.getpid()
        try:
            return self.engine.connect()
        except InvalidRequestError as error:  # each that was made was lost before it was used
            raise StorageError(
                "registry-unreachable",
                f"connections to the registry {self.name} do not last ({error})",
                hint="check the server and what is between, and run again",
            ) from error


def _rest(number: int) -> None:
    time.sleep(random.uniform(0, 0.05 * 2**number))


def value_invalid(reason: str) -> UsageError:
    """The error for a value that a database cannot hold."""
    return UsageError("value-invalid", f"the registry cannot hold a value ({reason})")


def registry_busy(name: str, reason: str) -> StorageError:
    """The error for a lock that others held until the last attempt was over."""
    return StorageError(
        "registry-busy",
        f"others kept the registry {name} locked ({reason})",
        hint="run again when they are done",
    )


def batches(values: Sequence[T], size: int = 500) -> Iterator[Sequence[T]]:
    """``values`` in pieces that fit into one ``IN (…)``."""
    return (values[at : at + size] for at in range(0, len(values), size))
