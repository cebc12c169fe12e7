"""What versions cost: which bytes each one holds alone, shares, or would free."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import select

from ckpt.core.records import Usage
from ckpt.registry.engine import Database
from ckpt.registry.tables import models, packs, refs, versions


class Usages:
    """Sums over the packs that versions refer to."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def versions(self) -> list[Usage]:
        """Every version with the bytes of its packs: those that only it refers to, and those that
        it shares."""
        query = (
            select(models.c.name, versions.c.number, versions.c.push, refs.c.pack, packs.c.size)
            .join(versions, versions.c.id == refs.c.version)
            .join(models, models.c.id == versions.c.model)
            .join(packs, packs.c.id == refs.c.pack)
            .order_by(models.c.name, versions.c.number)
        )
        with self._database.read() as transaction:
            rows = transaction.rows(query)
        users: dict[str, int] = {}
        for row in rows:
            users[row.pack] = users.get(row.pack, 0) + 1
        sums: dict[tuple[str, int, str], list[int]] = {}
        for row in rows:
            held = sums.setdefault((row.name, row.number, row.push), [0, 0])
            held[users[row.pack] > 1] += row.size
        return [
            Usage(f"{name}@{number}", push, unique, shared)
            for (name, number, push), (unique, shared) in sums.items()
        ]

    def freed_by(self, pushes: Collection[str]) -> int:
        """The bytes that go when exactly the versions of these pushes go."""
        query = select(refs.c.pack, packs.c.size, versions.c.push)
        query = query.join(versions, versions.c.id == refs.c.version)
        query = query.join(packs, packs.c.id == refs.c.pack)
        with self._database.read() as transaction:
            rows = transaction.rows(query)
        kept = {row.pack for row in rows if row.push not in pushes}
        return sum({row.pack: row.size for row in rows if row.pack not in kept}.values())
