"""Collecting what no version needs: leases ended, packs condemned and removed, keys made dead.

The letters are those of the rule in ``docs/safety.md``. Each step is safe by itself, with any
number of collectors and pushes at work; no clock decides more than when.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from sqlalchemy import ColumnElement, delete, exists, insert, select, true, update

from ckpt.core.records import DeadKey, Pack, PackState, PushState, Unneeded
from ckpt.registry.bodies import read_json
from ckpt.registry.books import as_pack
from ckpt.registry.changes import note_event
from ckpt.registry.engine import Database, Transaction, batches, repeated
from ckpt.registry.tables import (
    CLOSED,
    claims,
    dead_keys,
    events,
    meta,
    packs,
    pushes,
    refs,
    versions,
)

_ENDINGS = ("rm", "prune")


def _needed() -> ColumnElement[bool]:
    """A version refers to the pack, or a push claims it."""
    referred = exists().where(refs.c.pack == packs.c.id)
    return referred | exists().where(claims.c.pack == packs.c.id)


def _will_be_needed(now: int) -> ColumnElement[bool]:
    """The same, once the pushes whose lease has ended are aborted."""
    referred = exists().where(refs.c.pack == packs.c.id)
    claiming = pushes.alias("claiming")
    claimed = exists().where(claims.c.pack == packs.c.id, claims.c.push == claiming.c.id)
    return referred | claimed.where(claiming.c.expires_at >= now)


class Collector:
    """The registry's part of a collection."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def expire(self) -> int:
        """Abort the open pushes whose lease has ended (T5, (g)); returns how many."""

        def act(transaction: Transaction) -> int:
            over = pushes.c.expires_at < transaction.now()
            query = select(pushes.c.id).where(pushes.c.state == PushState.OPEN.value, over)
            ended = [row.id for row in transaction.rows(query.with_for_update(skip_locked=True))]
            for some in batches(ended):
                mine = update(pushes).where(pushes.c.id.in_(some))
                transaction.run(mine.values(state=PushState.ABORTED.value))
                transaction.run(delete(claims).where(claims.c.push.in_(some)))
            return len(ended)

        return self._database.write(act)

    @repeated
    def unneeded(self, *, lapsed: bool = False) -> list[Unneeded]:
        """Packs that no version refers to and no push claims, as they are now; with ``lapsed`` as
        they will be when :meth:`expire` was called.

        One is ``explained`` when its push was aborted, its version was removed by an act, or
        its version is still there and needs it no more.
        """
        made = exists().where(versions.c.push == packs.c.push)
        committed = (pushes.c.state == PushState.COMMITTED.value) & (pushes.c.kind == "push")
        query = (
            select(packs, made.label("made"), committed.label("committed"))
            .join(pushes, pushes.c.id == packs.c.push)
            .order_by(packs.c.id)
        )
        with self._database.read() as transaction:
            needed = _will_be_needed(transaction.now()) if lapsed else _needed()
            rows = transaction.rows(query.where(~needed))
            # Only a version that was made and is gone can have been removed by an act.
            asked = any(row.committed and not row.made for row in rows)
            ended = _ended(transaction) if asked else set()
        return [
            Unneeded(
                as_pack(row),
                row.condemned_at,
                explained=bool(row.made or not row.committed or row.push in ended),
            )
            for row in rows
        ]

    def condemn(self, found: Iterable[Pack]) -> None:
        """Condemn packs that are live and, in a later statement, needed by nobody."""
        for some in batches(sorted(pack.id for pack in found)):
            self._database.write(partial(self._condemn, some))

    @staticmethod
    def _condemn(some: Sequence[str], transaction: Transaction) -> None:
        live = packs.c.id.in_(some) & (packs.c.state == PackState.LIVE.value)
        query = select(packs.c.id).where(live).order_by(packs.c.id)
        locked = [row.id for row in transaction.rows(query.with_for_update(skip_locked=True))]
        doomed = update(packs).where(packs.c.id.in_(locked), ~_needed())
        values = {"state": PackState.CONDEMNED.value, "condemned_at": transaction.now()}
        transaction.run(doomed.values(**values))

    def remove(self, grace: int, author: str) -> list[Pack]:
        """Remove the rows of packs that were condemned ``grace`` microseconds ago, or are broken,
        and that nobody needs (e); returns them. Their keys are dead then."""
        # Without a grace no time counts: the clock may have run ahead when it was condemned.
        ripe = packs.c.condemned_at <= self.now() - grace if grace else true()
        doomed = (packs.c.state == PackState.CONDEMNED.value) & ripe
        broken = packs.c.state == PackState.BROKEN.value
        with self._database.read() as transaction:
            query = select(packs.c.id).where(doomed | broken, ~_needed()).order_by(packs.c.id)
            found = [row.id for row in transaction.rows(query)]
        gone: list[Pack] = []
        for some in batches(found, 100):
            gone += self._database.write(partial(self._remove, some, author))
        return gone

    @repeated
    def now(self) -> int:
        """Microseconds since 1970, by the database's clock."""
        with self._database.read() as transaction:
            return transaction.now()

    @staticmethod
    def _remove(some: Sequence[str], author: str, transaction: Transaction) -> list[Pack]:
        ending = packs.c.state.in_((PackState.CONDEMNED.value, PackState.BROKEN.value))
        query = select(packs.c.id).where(packs.c.id.in_(some), ending).order_by(packs.c.id)
        locked = [row.id for row in transaction.rows(query.with_for_update(skip_locked=True))]
        # (e): in a later statement than the lock.
        free = select(packs).where(packs.c.id.in_(locked), ~_needed()).order_by(packs.c.id)
        gone = [as_pack(row) for row in transaction.rows(free)]
        for pack in gone:
            event = note_event(transaction, "dead", author, key=pack.key)
            transaction.run(insert(dead_keys), {"key": pack.key, "event": event})
            transaction.run(delete(packs).where(packs.c.id == pack.id))
        return gone

    def sweep(self, keys: Iterable[str], author: str) -> tuple[list[str], list[str]]:
        """(f): make dead the listed pack keys without a row whose push is not open; returns them,
        and those of pushes that the registry never heard of, which are left alone."""
        dead: list[str] = []
        unknown: list[str] = []
        for some in batches(sorted(keys), 100):
            one, other = self._database.write(partial(self._sweep, some, author))
            dead += one
            unknown += other
        return dead, unknown

    @staticmethod
    def _sweep(
        some: Sequence[str], author: str, transaction: Transaction
    ) -> tuple[list[str], list[str]]:
        creators = {key: _creator(key) for key in some}
        query = select(pushes).where(pushes.c.id.in_(sorted(set(creators.values()))))
        states = {row.id: row.state for row in transaction.rows(query.with_for_update(read=True))}
        over = [key for key in some if states.get(creators[key], "open") != PushState.OPEN.value]
        # (f): in a later statement than the push's state.
        rows = transaction.rows(select(packs.c.key).where(packs.c.key.in_(over)))
        known = {row.key for row in rows}
        done = transaction.rows(select(dead_keys.c.key).where(dead_keys.c.key.in_(over)))
        known |= {row.key for row in done}
        dead = [key for key in over if key not in known]
        for key in dead:
            event = note_event(transaction, "dead", author, key=key)
            transaction.run(insert(dead_keys), {"key": key, "event": event})
        return dead, [key for key in some if creators[key] not in states]

    @repeated
    def orphans(self, keys: Iterable[str]) -> tuple[list[str], list[str]]:
        """What :meth:`sweep` would find after :meth:`expire`; nothing is changed."""
        with self._database.read() as transaction:
            now = transaction.now()
            creators = transaction.rows(select(pushes))
            known = {row.key for row in transaction.rows(select(packs.c.key))}
            known |= {row.key for row in transaction.rows(select(dead_keys.c.key))}
        left = sorted(set(keys) - known)
        opened = PushState.OPEN.value
        is_over = {row.id: row.state != opened or row.expires_at < now for row in creators}
        over = [key for key in left if is_over.get(_creator(key), False)]
        return over, [key for key in left if _creator(key) not in is_over]

    @repeated
    def dead(self) -> list[DeadKey]:
        """All dead keys, in the order of their events."""
        query = select(dead_keys).join(events, events.c.id == dead_keys.c.event)
        with self._database.read() as transaction:
            epoch = transaction.run(select(meta.c.epoch)).scalar_one()
            rows = transaction.rows(query.order_by(events.c.counter))
        if epoch == CLOSED:
            return []
        return [DeadKey(row.key, row.event, epoch) for row in rows]

    @repeated
    def may_delete(self, dead: DeadKey) -> bool:
        """(i), asked anew: whether the key is still dead, in the same epoch."""
        epoch = select(meta.c.epoch).scalar_subquery()
        same = (dead_keys.c.key == dead.key) & (epoch == dead.epoch)
        with self._database.read() as transaction:
            return transaction.row(select(dead_keys.c.key).where(same)) is not None

    @repeated
    def may_forget(self, push: str, epoch: int) -> bool:
        """Whether the document of a version that an act removed may go: the version is not there,
        in the same epoch as when that was found out."""
        there = select(versions.c.id).where(versions.c.push == push)
        with self._database.read() as transaction:
            same = transaction.run(select(meta.c.epoch)).scalar_one() == epoch != CLOSED
            return same and transaction.row(there) is None

    def forget(self, gone: Sequence[DeadKey]) -> None:
        """Drop the dead keys that the store has no more; their events stay for ever."""

        def act(transaction: Transaction) -> None:
            for some in batches([dead.key for dead in gone]):
                transaction.run(delete(dead_keys).where(dead_keys.c.key.in_(some)))

        if gone:
            self._database.write(act)

    @repeated
    def known(self) -> tuple[set[str], set[str], set[str]]:
        """What the registry knows of the store's copies: pushes of versions, pushes of versions
        that were removed by an act, and events."""
        with self._database.read() as transaction:
            there = set(transaction.run(select(versions.c.push)).scalars())
            # What has no counter has no copy.
            copied = select(events.c.id).where(events.c.counter.is_not(None))
            return there, _ended(transaction), set(transaction.run(copied).scalars())


def _ended(transaction: Transaction) -> set[str]:
    """The pushes whose versions were removed by an act."""
    query = select(events.c.body).where(events.c.kind.in_(_ENDINGS))
    return {event_field(row.body, "push") for row in transaction.rows(query)}


def event_field(body: bytes, name: str) -> str:
    """A text field of an event's body."""
    return str(read_json(body).get(name, ""))


def _creator(key: str) -> str:
    """The push that a pack's key names (rule (a))."""
    return key.rpartition("/")[2].partition("-")[0]
