"""Who saves under the name of a run now, by a lease: one job at a time; and what it goes on from."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import bindparam, select, update

from ckpt.core.documents import canonical
from ckpt.core.errors import ConflictError
from ckpt.core.printable import escape
from ckpt.registry.bodies import read_json
from ckpt.registry.commit import lock_model, run_id
from ckpt.registry.engine import Database, Transaction
from ckpt.registry.tables import models, runs, versions

_SPARED = select(runs.c.spared).where(
    runs.c.held_until > bindparam("moment"), runs.c.spared.is_not(None)
)


class Runs:
    """The leases of runs. They keep two jobs from mixing their versions, and rules from what a job
    goes on from; no byte rests on them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def hold(
        self, model: str, name: str, holder: str, seconds: float, spared: Collection[str] = ()
    ) -> None:
        """Take the run for ``holder``, or keep it, for so long from now; until then no rule removes
        the versions of the pushes ``spared``, whichever model they are of.

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
            if spared:  # a prune that has one of them sees this lease, or is over before it
                theirs = select(versions.c.id).where(versions.c.push.in_(spared))
                transaction.rows(theirs.with_for_update(read=True))
            values = {
                "holder": holder,
                "held_until": now + int(seconds * 1e6),
                "spared": canonical(sorted(spared)).decode() if spared else None,
            }
            transaction.run(update(runs).where(mine).values(**values))

        self._database.write(act)

    def release(self, model: str, name: str, holder: str) -> None:
        """Give the run up, if ``holder`` has it."""
        known = select(models.c.id).where(models.c.name == model)
        mine = runs.c.model.in_(known) & (runs.c.name == name) & (runs.c.holder == holder)
        freed = update(runs).where(mine).values(holder=None, held_until=None, spared=None)
        self._database.write(lambda transaction: transaction.run(freed) and None)

    def spared(self) -> set[str]:
        """The pushes of the versions that live runs go on from."""
        with self._database.read() as transaction:
            return spared_pushes(transaction)


def spared_pushes(transaction: Transaction) -> set[str]:
    """The pushes of the versions that live runs go on from, by the registry's clock."""
    rows = transaction.rows(_SPARED, {"moment": transaction.now()})
    return {push for row in rows for push in read_json(row.spared.encode())}
