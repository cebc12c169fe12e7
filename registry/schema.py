"""The schema number of a registry: read at every open, changed only by migrations."""

from __future__ import annotations

import re

from sqlalchemy import Connection, insert, inspect, select, text

from ckpt.core.effects import perform
from ckpt.core.errors import IntegrityError, StorageError
from ckpt.core.printable import escape
from ckpt.registry.engine import Database, Transaction, repeated
from ckpt.registry.tables import meta

SCHEMA = "0002"
_OURS = re.compile(r"[0-9]{4}")
_APART = (
    "check its address; give ckpt a database of its own, or a schema: ?options=-csearch_path=NAME"
)

# The advisory lock of migrations, held until their transaction ends: any number, but always this.
_MIGRATING = int.from_bytes(b"ckpt db")


def schema_number(transaction: Transaction) -> str | None:
    """The number of the last migration that ran, or None in an empty database."""
    row = transaction.row(text("SELECT version_num FROM alembic_version"))
    return None if row is None else str(row[0])


@repeated
def check_schema(database: Database, store: str) -> None:
    """Refuse a registry of another schema, or one that belongs to another store.

    Raises:
        StorageError: ``registry-missing``, ``schema-newer``, ``schema-older``,
            ``registry-corrupt``.
        IntegrityError: ``foreign-store``.
    """
    try:
        with database.read() as transaction:
            number = schema_number(transaction)
            if number != SCHEMA:
                raise _other_schema(database.name, number)
            row = transaction.row(select(meta.c.store))
    except StorageError as error:
        if error.code == "schema-older":  # also where there is nothing at all
            check_made(database)
        raise
    if row is None or row[0] != store:
        raise IntegrityError(
            "foreign-store",
            f"the registry {database.name} belongs to another store",
            hint="check the paths in config.toml",
        )


def check_made(database: Database) -> None:
    """Refuse a database without tables, or with those of another program.

    Raises:
        StorageError: ``registry-missing``, ``schema-unknown``.
    """
    if not is_made(database):
        raise StorageError(
            "registry-missing",
            f"the registry {database.name} has no tables",
            hint=database.missing_hint,
        )
    with database.asking() as transaction:
        number = schema_number(transaction)
    with database.asking() as transaction:
        if not inspect(transaction.connection).has_table(meta.name):
            raise _unknown_schema(database.name, number)


def is_made(database: Database) -> bool:
    """Whether there are tables."""
    with database.asking() as transaction:
        return has_tables(transaction)


def is_older(database: Database) -> bool:
    """Whether the tables are of an older ckpt, which may be at work in them."""
    try:
        with database.asking() as transaction:
            number = schema_number(transaction)
    except StorageError:
        return False
    return number is not None and bool(_OURS.fullmatch(number)) and number < SCHEMA


def migrate(database: Database, store: str) -> None:
    """Bring the schema up to date and, the first time, note the store that it belongs to.

    Everything happens in one transaction that locks first, so that any number of processes may
    do this at once. Only this file imports Alembic.
    """

    def act(transaction: Transaction) -> None:
        lock_schema(transaction)
        number = schema_number(transaction) if has_tables(transaction) else None
        if number is not None and (number > SCHEMA or not _OURS.fullmatch(number)):
            raise _other_schema(database.name, number)
        if number != SCHEMA:
            make_tables(transaction, store)

    database.write(act)


def lock_schema(transaction: Transaction) -> None:
    """Keep out whoever else would change the schema, until the transaction ends."""
    if transaction.connection.dialect.name == "postgresql":
        # SQLite's writers exclude each other anyway. A migration may take its time.
        alone = "SELECT set_config('statement_timeout', '0', true), pg_advisory_xact_lock(:key)"
        transaction.run(text(alone), {"key": _MIGRATING})


def make_tables(transaction: Transaction, store: str) -> None:
    """Make or upgrade the tables; new ones belong to the store with this id."""
    fresh = not has_tables(transaction)
    perform("sql.migrate", _upgrade, transaction.connection)
    if fresh:
        values = {"id": 1, "store": store, "epoch": 1, "next_counter": 1}
        transaction.run(insert(meta), values)


def has_tables(transaction: Transaction) -> bool:
    """Whether a migration ever ran."""
    return inspect(transaction.connection).has_table("alembic_version")


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", "ckpt:migrations")
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:  # it names a revision that was never one of ours
        raise StorageError(
            "schema-unknown", f"the registry cannot be upgraded: {error}", hint=_APART
        ) from error


def _unknown_schema(name: str, number: str | None) -> StorageError:
    return StorageError(
        "schema-unknown",
        f"the database of the registry {name} has tables of another program (its schema is "
        f"{escape(str(number), 40)})",
        hint=_APART,
    )


def _other_schema(name: str, number: str | None) -> StorageError:
    if number is not None and not _OURS.fullmatch(number):
        return _unknown_schema(name, number)
    if number is not None and number > SCHEMA:
        return StorageError(
            "schema-newer",
            f"the registry {name} has schema {number}, this ckpt knows {SCHEMA}",
            hint="run `pip install -U ckpt-registry`",
        )
    return StorageError(
        "schema-older",
        f"the registry {name} has schema {number or 'none'}, this ckpt needs {SCHEMA}",
        hint="run `ckpt db upgrade`",
    )
