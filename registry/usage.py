"""What versions cost: which bytes each one holds alone, shares, or would free."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import case, func, select

from ckpt.core.records import Usage
from ckpt.registry.engine import Database, batches, repeated
from ckpt.registry.tables import models, packs, refs, versions


class Usages:
    """Sums over the packs that versions refer to."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @repeated
    def versions(self) -> list[Usage]:
        """Every version with the bytes of its packs: those that only it refers to, and those that
        it shares."""
        users = select(refs.c.pack, func.count().label("users")).group_by(refs.c.pack).subquery()
        held = (
            select(
                refs.c.version,
                func.sum(case((users.c.users == 1, packs.c.size), else_=0)).label("unique"),
                func.sum(case((users.c.users > 1, packs.c.size), else_=0)).label("shared"),
            )
            .join(packs, packs.c.id == refs.c.pack)
            .join(users, users.c.pack == refs.c.pack)
            .group_by(refs.c.version)
            .subquery()
        )
        query = (
            select(models.c.name, versions.c.number, versions.c.push, held.c.unique, held.c.shared)
            .join(versions, versions.c.model == models.c.id)
            .join(held, held.c.version == versions.c.id)
            .order_by(models.c.name, versions.c.number)
        )
        with self._database.read() as transaction:
            rows = transaction.rows(query)
        return [
            Usage(f"{row.name}@{row.number}", row.push, int(row.unique), int(row.shared))
            for row in rows
        ]

    @repeated
    def freed_by(self, pushes: Collection[str]) -> int:
        """The bytes that go when exactly the versions of these pushes go."""
        going: dict[int, set[str]] = {}
        with self._database.read() as transaction:
            for some in batches(sorted(set(pushes))):
                mine = select(refs).join(versions).where(versions.c.push.in_(some))
                for row in transaction.rows(mine):
                    going.setdefault(row.version, set()).add(row.pack)
            freed = 0
            for some in batches(sorted(set().union(*going.values()))):
                users = select(refs).where(refs.c.pack.in_(some))
                kept = {row.pack for row in transaction.rows(users) if row.version not in going}
                sizes = select(func.sum(packs.c.size)).where(packs.c.id.in_(set(some) - kept))
                freed += int(transaction.run(sizes).scalar_one() or 0)
        return freed
