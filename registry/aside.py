"""The tables of an old registry, taken away for new ones: who may, where they are kept, and who may
use the new ones."""

from __future__ import annotations

from itertools import chain, count

from sqlalchemy import text

from ckpt.core.errors import AccessError
from ckpt.registry.engine import Database, Transaction
from ckpt.registry.schema import has_tables
from ckpt.registry.tables import metadata

_TABLES = ("alembic_version", *(table.name for table in reversed(metadata.sorted_tables)))
_LONGEST = 30  # bytes of a schema's name that go into another; PostgreSQL cuts names at 63

_RIGHTS = text(
    "SELECT has_schema_privilege(current_schema(), 'CREATE') AS tables,"
    " has_database_privilege(current_database(), 'CREATE') AS schemas,"
    " (SELECT min(relname) FROM pg_class WHERE relname = ANY(:named) AND relkind = 'r'"
    " AND pg_table_is_visible(oid) AND NOT pg_has_role(relowner, 'USAGE')) AS foreign_table,"
    " EXISTS (SELECT FROM pg_class WHERE relname = 'alembic_version' AND relkind = 'r'"
    " AND pg_table_is_visible(oid)) AS made"
)
_TAKEN = text("SELECT nspname::text FROM pg_namespace WHERE starts_with(nspname::text, :name)")
# What the old tables and their sequences grant, as statements on the new ones.
_GRANTS = text(
    "SELECT format('GRANT %s ON %s %I TO %s%s', privilege_type,"
    " CASE relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, relname,"
    " CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END,"
    " CASE WHEN is_grantable AND grantee <> 0 THEN ' WITH GRANT OPTION' ELSE '' END)"
    " FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace, aclexplode(coalesce("
    "relacl, acldefault(CASE relkind WHEN 'S' THEN 's' ELSE 'r' END::\"char\", relowner)))"
    " WHERE nspname = :kept AND relkind IN ('r', 'S')"
    " AND grantee <> (SELECT oid FROM pg_roles WHERE rolname = current_user) ORDER BY 1"
)


def check_may_replace(database: Database) -> None:
    """Refuse, before anything is changed, a user who could not finish a rebuild.

    Raises:
        AccessError: ``permission``.
    """
    if database.engine.dialect.name == "sqlite":
        return
    with database.asking() as transaction:
        row = transaction.row(_RIGHTS, {"named": list(_TABLES)})
    assert row is not None
    lacks = "create tables there" if not row.tables else ""
    if row.made and not row.schemas:
        lacks = "create a schema in that database"
    if row.foreign_table is not None:
        lacks = f"move the table {row.foreign_table}, which another role owns"
    if lacks:
        raise AccessError(
            "permission",
            f"the registry {database.name} cannot be rebuilt by this user, who may not {lacks}",
            hint="have the owner of its tables run it, with CREATE granted on the database",
        )


def set_aside(transaction: Transaction, epoch: int) -> str | None:
    """Take the tables of an old registry away for those of ``epoch``: those on a server are moved
    as they are into a schema, whose name is returned, and a file was copied before."""
    if not has_tables(transaction):
        return None
    if transaction.connection.dialect.name == "sqlite":
        for table in _TABLES:
            transaction.run(text(f"DROP TABLE {table}"))
        return None
    kept = _free_name(transaction, epoch)
    quoted = transaction.connection.dialect.identifier_preparer.quote(kept)
    transaction.run(text(f"CREATE SCHEMA {quoted}"))
    for table in _TABLES:
        transaction.run(text(f"ALTER TABLE {table} SET SCHEMA {quoted}"))
    return kept


def grant_again(transaction: Transaction, kept: str) -> None:
    """Let whoever might use the tables in the schema ``kept`` use the new ones."""
    for (grant,) in transaction.rows(_GRANTS, {"kept": kept}):
        transaction.run(text(grant.replace(":", "\\:")))


def _free_name(transaction: Transaction, epoch: int) -> str:
    """A schema that is not there yet; registries in other schemas have others."""
    here = str(transaction.run(text("SELECT current_schema()")).scalar_one())
    short = here.encode()[:_LONGEST].decode(errors="ignore")
    name = f"ckpt_before_epoch_{epoch}_{short}"
    taken = {row[0] for row in transaction.rows(_TAKEN, {"name": name})}
    ends = chain([""], (f"_{number}" for number in count(2)))
    return next(f"{name}{end}" for end in ends if f"{name}{end}" not in taken)
