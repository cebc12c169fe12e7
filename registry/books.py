"""The store's books: pushes, claims, packs and chunks, by the rule of ``docs/safety.md``.

The letters (a) to (k) in this file are those of the rule. Locks are taken in the order push,
model, packs ascending, versions ascending; on SQLite a writing transaction holds everything.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence
from typing import Any

from sqlalchemy import Row, bindparam, delete, insert, select, update

from ckpt.core.documents import canonical
from ckpt.core.errors import ConflictError
from ckpt.core.records import Chunk, FinishedPack, Pack, PackState, PushState
from ckpt.registry.engine import Clock, Database, Transaction, batches, repeated
from ckpt.registry.epochs import check_not_closed
from ckpt.registry.tables import chunks, claims, events, meta, packs, pushes, refs, versions

LEASE_SECONDS = 3600

# What is asked at every call is made once: to build a statement takes as long as to run it.
_STATE = select(pushes.c.state).where(pushes.c.id == bindparam("of"))
_STATE_IN_EPOCH = _STATE.where(pushes.c.epoch == select(meta.c.epoch).scalar_subquery())
_EPOCH_NOW = select(meta.c.epoch, Clock().label("now"))
_THEIRS = (
    select(refs.c.pack)
    .join(versions, versions.c.id == refs.c.version)
    .where(versions.c.push == bindparam("of"))
)
_PACKS_OF = select(packs).where(packs.c.id.in_(_THEIRS))
_CHUNKS_OF = select(chunks).where(chunks.c.pack.in_(_THEIRS))


class Books:
    """What the registry knows about the bytes in the store."""

    def __init__(self, database: Database, before_write: Callable[[Transaction], None]) -> None:
        self._database = database
        self._before_write = before_write

    def open_push(self, push: str, kind: str, wanted: Collection[str] = ()) -> list[Pack]:
        """Begin a push and, in the same transaction, claim the packs that it wants (T1, T2).

        Returns the packs that it may rely on; a wanted one that is gone or broken is left out.
        """

        def act(transaction: Transaction) -> None:
            self._before_write(transaction)
            found = transaction.run(_EPOCH_NOW).one()
            check_not_closed(found.epoch)
            expires = found.now + LEASE_SECONDS * 1_000_000
            row = {"id": push, "kind": kind, "state": PushState.OPEN.value}
            transaction.run(insert(pushes), {**row, "expires_at": expires, "epoch": found.epoch})

        if not wanted:
            self._database.write(act)
            return []
        return self._claim(push, wanted, act)

    def claim(self, push: str, wanted: Collection[str]) -> list[Pack]:
        """Claim packs for an open push (T2); returns those that it may rely on."""
        return self._claim(push, wanted, lambda transaction: None)

    def _claim(
        self, push: str, wanted: Collection[str], before: Callable[[Transaction], None]
    ) -> list[Pack]:
        """(c): push row, then pack rows ascending; a condemned one needs the exclusive lock,
        which is never reached by an upgrade but by a transaction of its own."""

        def act(transaction: Transaction, exclusive: bool) -> list[Pack] | None:
            before(transaction)
            require_open(transaction, push, shared=True)
            found = lock_packs(transaction, wanted, exclusive=exclusive)
            condemned = [pack.id for pack in found if pack.state is PackState.CONDEMNED]
            if condemned and not exclusive:
                # Nothing was written unless ``before`` did: then this transaction starts again.
                raise _NeedsExclusiveError
            for some in batches(condemned):
                live = update(packs).where(packs.c.id.in_(some))
                transaction.run(live.values(state=PackState.LIVE.value))
            good = [pack for pack in found if pack.state is not PackState.BROKEN]
            self._note_claims(transaction, push, [pack.id for pack in good])
            return good

        try:
            claimed = self._database.write(lambda transaction: act(transaction, exclusive=False))
        except _NeedsExclusiveError:
            claimed = self._database.write(lambda transaction: act(transaction, exclusive=True))
        return claimed or []

    @staticmethod
    def _note_claims(transaction: Transaction, push: str, found: Sequence[str]) -> None:
        mine = select(claims.c.pack).where(claims.c.push == push)
        known = {row.pack for row in transaction.rows(mine)}
        fresh = [{"push": push, "pack": pack} for pack in found if pack not in known]
        if fresh:
            transaction.run(insert(claims), fresh)

    def register(self, push: str, finished: FinishedPack) -> None:
        """Insert the rows of a pack whose bytes are durable, with a claim on it (T3, (b))."""

        def act(transaction: Transaction) -> None:
            require_open(transaction, push, shared=True)
            insert_pack(transaction, finished)
            transaction.run(insert(claims), {"push": push, "pack": finished.pack.id})

        self._database.write(act)

    def renew(self, push: str) -> None:
        """Extend the lease of an open push; ConflictError ``push-expired`` when it is not open."""

        def act(transaction: Transaction) -> None:
            expires = transaction.now() + LEASE_SECONDS * 1_000_000
            mine = update(pushes).where(pushes.c.id == push, pushes.c.state == PushState.OPEN.value)
            if transaction.run(mine.values(expires_at=expires)).rowcount == 0:
                raise push_expired(push)

        self._database.write(act)

    def abort(self, push: str) -> None:
        """End an open push without a version (T5, (g)); touches only its row and its claims."""

        def act(transaction: Transaction) -> None:
            row = transaction.row(
                select(pushes.c.state).where(pushes.c.id == push).with_for_update()
            )
            if row is not None and row.state == PushState.OPEN.value:
                mine = update(pushes).where(pushes.c.id == push)
                transaction.run(mine.values(state=PushState.ABORTED.value))
                transaction.run(delete(claims).where(claims.c.push == push))

        self._database.write(act)

    def is_over(self, push: str) -> bool | None:
        """Whether a push is not open any more; None when this registry never heard of it."""
        row = self._database.ask(_STATE, {"of": push})
        return None if row is None else row.state != PushState.OPEN.value

    def note_alarm(self, pack: Pack, size: int | None) -> None:
        """Write into the history that the store does not have a pack as it should."""

        def act(transaction: Transaction) -> None:
            said = {"pack": pack.id, "expected": pack.size, "found": size}
            row = {
                "id": secrets.token_hex(16),
                "kind": "alarm",
                "epoch": transaction.run(select(meta.c.epoch)).scalar_one(),
                "created_at": transaction.now(),
                "author": "",
                "body": canonical(said),
                "copied": True,
            }
            transaction.run(insert(events), row)

        self._database.write(act)

    def is_acknowledgeable(self, push: str) -> bool:
        """(j): whether the push is committed and the registry is still of the same epoch."""
        row = self._database.ask(_STATE_IN_EPOCH, {"of": push})
        return row is not None and row.state == PushState.COMMITTED.value

    @repeated
    def find_chunks(self, digests: Collection[str]) -> dict[str, list[Chunk]]:
        """Where these chunks may lie, packs known as broken left out: a hint, before a claim."""
        found: dict[str, list[Chunk]] = {}
        with self._database.read() as transaction:
            for some in batches(sorted(set(digests))):
                query = (
                    select(chunks)
                    .join(packs, packs.c.id == chunks.c.pack)
                    .where(chunks.c.digest.in_(some), packs.c.state != PackState.BROKEN.value)
                    .order_by(chunks.c.digest, chunks.c.pack)
                )
                for row in transaction.rows(query):
                    found.setdefault(row.digest, []).append(as_chunk(row))
        return found

    @repeated
    def read_plan(self, push: str) -> tuple[dict[str, Pack], dict[str, list[Chunk]]]:
        """One snapshot for a reader of the version that ``push`` made: its packs by id, and the
        chunks in them by digest: as they are before differences, in broken packs last."""
        with self._database.read() as transaction:
            rows = transaction.rows(_PACKS_OF, {"of": push})
            known = {row.id: as_pack(row) for row in rows}
            found: dict[str, list[Chunk]] = {}
            for row in transaction.rows(_CHUNKS_OF, {"of": push}):
                if row.pack in known:
                    found.setdefault(row.digest, []).append(as_chunk(row))
        for places in found.values():
            places.sort(key=lambda chunk: _order(chunk, known[chunk.pack]))
        return known, found


def _order(chunk: Chunk, pack: Pack) -> tuple[bool, bool, str]:
    return pack.state is PackState.BROKEN, chunk.base is not None, pack.id


class _NeedsExclusiveError(Exception):
    """A wanted pack is condemned: claim again with the exclusive lock."""


def require_open(transaction: Transaction, push: str, *, shared: bool) -> None:
    """Lock the row of a push and check that it is open; else ConflictError ``push-expired``."""
    row = transaction.row(_STATE.with_for_update(read=shared), {"of": push})
    if row is None or row.state != PushState.OPEN.value:
        raise push_expired(push)


def lock_packs(
    transaction: Transaction, wanted: Collection[str], *, exclusive: bool = False
) -> list[Pack]:
    """Lock the rows of these packs, ascending by id; absent ones are left out."""
    found: list[Pack] = []
    for some in batches(sorted(set(wanted))):
        query = select(packs).where(packs.c.id.in_(some)).order_by(packs.c.id)
        rows = transaction.rows(query.with_for_update(read=not exclusive))
        found.extend(as_pack(row) for row in rows)
    return found


def insert_pack(transaction: Transaction, finished: FinishedPack) -> None:
    """Insert the rows of a pack and of its chunks, together and once (b)."""
    pack = finished.pack
    row = {"id": pack.id, "key": pack.key, "size": pack.size, "push": pack.push}
    row |= {"header": pack.header, "state": pack.state.value}
    transaction.run(insert(packs), row)
    rows = [
        {
            "digest": chunk.digest,
            "pack": pack.id,
            "offset": chunk.offset,
            "length": chunk.length,
            "raw_length": chunk.raw_length,
            "codec": chunk.codec,
            "base": chunk.base,
        }
        for chunk in finished.chunks
    ]
    for some in batches(rows):
        transaction.run(insert(chunks), some)


def push_expired(push: str) -> ConflictError:
    """The error of a push that is not open any more."""
    return ConflictError(
        "push-expired",
        f"the push {push} is not open any more, nothing was committed",
        hint="run it again; what it had stored is used again",
    )


def as_pack(row: Row[Any]) -> Pack:
    """The record of a pack's row."""
    return Pack(row.id, row.key, row.size, row.push, PackState(row.state), row.header)


def as_chunk(row: Row[Any]) -> Chunk:
    """The record of a chunk's row."""
    return Chunk(row.digest, row.pack, row.offset, row.length, row.raw_length, row.codec, row.base)
