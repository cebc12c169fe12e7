"""Who saves under the name of a run now: one job at a time, by a lease."""

from __future__ import annotations

from sqlalchemy import select, update

from ckpt.core.errors import ConflictError
from ckpt.core.printable import escape
from ckpt.registry.commit import lock_model, run_id
from ckpt.registry.engine import Database, Transaction
from ckpt.registry.tables import models, runs


class Runs:
    """The leases of runs. They keep two jobs from mixing their versions; no byte rests on them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def hold(self, model: str, name: str, holder: str, seconds: float) -> None:
        """Take the run for ``holder``, or keep it, for so long from now.

        Raises:
            ConflictError: ``run-live`` when another job holds it.
        """

        def act(transaction: Transaction) -> None:
            found = lock_model(transaction, model)
            run = run_id(transaction, found.id, name)
            mine = runs.c.id == run
            row = transaction.row(select(runs.c.holder, runs.c.held_until).where(mine))
            now = transaction.now()
            assert row is not None
            if row.holder not in (None, holder) and row.held_until > now:
                left = (row.held_until - now) // 1_000_000 + 1
                raise ConflictError(
                    "run-live",
                    f'the run "{escape(name)}" of {model} is live in another job',
                    hint=f"end that one, wait {left} s if its machine died, or give this one another name",
                )
            values = {"holder": holder, "held_until": now + int(seconds * 1e6)}
            transaction.run(update(runs).where(mine).values(**values))

        self._database.write(act)

    def release(self, model: str, name: str, holder: str) -> None:
        """Give the run up, if ``holder`` has it."""
        known = select(models.c.id).where(models.c.name == model)
        mine = runs.c.model.in_(known) & (runs.c.name == name) & (runs.c.holder == holder)
        freed = update(runs).where(mine).values(holder=None, held_until=None)
        self._database.write(lambda transaction: transaction.run(freed) and None)
