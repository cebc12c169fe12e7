"""How a rebuild closes an old registry (k), and sees that no other rebuild went on with it."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import inspect, select, text, update

from ckpt.core.errors import ConflictError
from ckpt.registry.engine import Database, Transaction
from ckpt.registry.tables import CLOSED, meta

_POSITION = select(meta.c.epoch, meta.c.next_counter)

Position = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Fence:
    """The epoch and counter of an old registry before a rebuild closed it, and as it left them;
    None where it has none that can be read."""

    before: Position | None
    left: Position | None


def fence(database: Database) -> Fence:
    """Close the old registry (k): nothing is committed, acknowledged or deleted from it any more,
    by whoever has it open. The counter goes on, so that each closing is another."""

    def act(transaction: Transaction) -> Fence:
        closing = update(meta).values(epoch=CLOSED, next_counter=meta.c.next_counter + 1)
        before = transaction.rows(_POSITION.with_for_update())[0]
        left = transaction.rows(closing.returning(meta.c.epoch, meta.c.next_counter))[0]
        return Fence((before.epoch, before.next_counter), (left.epoch, left.next_counter))

    return database.write(act)


def reopen(database: Database, closed: Fence) -> None:
    """Give the old registry back what ``closed`` took, unless another rebuild closed it too."""

    def act(transaction: Transaction) -> None:
        if closed.before is not None and closed.left is not None:
            mine = (meta.c.epoch == CLOSED) & (meta.c.next_counter == closed.left[1])
            transaction.run(update(meta).where(mine).values(epoch=closed.before[0]))

    database.write(act)


def rebuilt_meanwhile() -> ConflictError:
    """The error for a rebuild that another one overtook."""
    return ConflictError(
        "rebuilt-meanwhile",
        "somebody else rebuilt the registry, or began to, after this rebuild had begun",
        hint="look with `ckpt doctor`, and run again if it is still needed",
    )


def check_left(closed: Fence, found: Position | None) -> None:
    """Refuse to replace a registry that is not as this rebuild left it: another one has made it
    anew, or has closed it as well.

    Raises:
        ConflictError: ``rebuilt-meanwhile``.
    """
    if found is not None and found != closed.left:
        raise rebuilt_meanwhile()


def locked_position(transaction: Transaction) -> Position | None:
    """The epoch and counter of the old registry, which nobody closes until it is replaced."""
    connection = transaction.connection
    if not inspect(connection).has_table(meta.name):
        return None
    if connection.dialect.name == "postgresql":  # SQLite has one writer anyway
        transaction.run(text("LOCK TABLE meta IN ACCESS EXCLUSIVE MODE"))
    row = transaction.row(_POSITION)
    return None if row is None else (row.epoch, row.next_counter)
