"""Packs that are not as they should be: marked, healed, and versions moved to whole ones (h)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import delete, insert, select, true, update

from ckpt.core.records import Chunk, FinishedPack, Pack, PackState, PushState
from ckpt.registry.books import as_chunk, as_pack, lock_packs, require_open
from ckpt.registry.engine import Database, Transaction, batches, repeated
from ckpt.registry.needs import (
    chunks_of_documents,
    chunks_of_version,
    places_in,
    places_of_version,
    unreadable,
)
from ckpt.registry.tables import chunks, claims, models, packs, pushes, refs, versions

_NAMED = (
    select(versions.c.id, versions.c.push, versions.c.document, models.c.name, versions.c.number)
    .join(models, models.c.id == versions.c.model)
    .order_by(models.c.name, versions.c.number)
)


class Repairs:
    """What fsck reads of the books, and changes in them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @repeated
    def packs(self) -> list[FinishedPack]:
        """Every pack with its chunks."""
        with self._database.read() as transaction:
            return _packs(transaction)

    @repeated
    def look(self) -> tuple[list[FinishedPack], list[tuple[str, str]]]:
        """At one moment every pack with its chunks, and ``(push, reference)`` of every version that
        names chunks which no whole pack that it refers to has."""
        with self._database.read() as transaction:
            known = _packs(transaction)
            return known, _incomplete(transaction, known)

    @repeated
    def is_incomplete(self, push: str) -> bool:
        """Whether a version names chunks which no whole pack that it refers to has."""
        with self._database.read() as transaction:
            named = chunks_of_version(transaction, push)
            return bool(unreadable(named, places_of_version(transaction, push)))

    def mark(self, wanted: Collection[str], *, broken: bool) -> None:
        """Make packs broken, or live again when they were found whole; under their exclusive
        locks."""

        def act(transaction: Transaction) -> None:
            locked = lock_packs(transaction, wanted, exclusive=True)
            others = [pack.id for pack in locked if (pack.state is PackState.BROKEN) != broken]
            state = PackState.BROKEN if broken else PackState.LIVE
            for some in batches(others):
                mine = update(packs).where(packs.c.id.in_(some))
                transaction.run(mine.values(state=state.value))

        self._database.write(act)

    @repeated
    def users(self, wanted: Collection[str]) -> dict[str, list[tuple[str, str]]]:
        """By each of these packs ``(push, reference)`` of every version that refers to it."""
        query = (
            select(refs.c.pack, versions.c.push, models.c.name, versions.c.number)
            .join(versions, versions.c.id == refs.c.version)
            .join(models, models.c.id == versions.c.model)
            .order_by(models.c.name, versions.c.number)
        )
        found: dict[str, list[tuple[str, str]]] = {pack: [] for pack in wanted}
        with self._database.read() as transaction:
            for some in batches([*found]):
                for row in transaction.rows(query.where(refs.c.pack.in_(some))):
                    found[row.pack].append((row.push, f"{row.name}@{row.number}"))
        return found

    @repeated
    def substitutes(self, push: str, lost: str | None) -> list[Pack] | None:
        """Live packs that have what a version cannot read without a lost one, if there is one;
        None when some is nowhere."""
        with self._database.read() as transaction:
            kept = [one for one in places_of_version(transaction, push) if one.pack != lost]
            found: set[str] = set()
            for digest in unreadable(chunks_of_version(transaction, push), kept):
                # The chunk itself from elsewhere, or what a difference to it counts from.
                bases = {one.base for one in kept if one.digest == digest and one.base is not None}
                query = (
                    select(chunks.c.pack)
                    .join(packs, packs.c.id == chunks.c.pack)
                    .where(chunks.c.digest.in_({digest, *bases}), chunks.c.base.is_(None))
                    .where(packs.c.state != PackState.BROKEN.value)
                    .where(true() if lost is None else packs.c.id != lost)
                    .order_by(chunks.c.pack)
                )
                row = transaction.row(query)
                if row is None:
                    return None
                found.add(row.pack)
            rows = transaction.rows(select(packs).where(packs.c.id.in_(sorted(found))))
        return [as_pack(row) for row in rows]

    def switch(self, repair: str, push: str, lost: str | None, others: Collection[str]) -> bool:
        """T8, (h): under locks, make a version refer to other packs, in place of a lost one; says
        whether every digest can still be read, and changes nothing if not. Ends the repair."""

        def act(transaction: Transaction) -> bool:
            require_open(transaction, repair, shared=False)
            wanted = {*others} if lost is None else {lost, *others}
            locked = lock_packs(transaction, wanted, exclusive=True)
            live = {pack.id for pack in locked if pack.state is PackState.LIVE}
            version = transaction.row(select(versions.c.id).where(versions.c.push == push))
            places = [one for one in places_of_version(transaction, push) if one.pack != lost]
            places += places_in(transaction, others)
            fine = version is not None and set(others) <= live
            fine = fine and not unreadable(chunks_of_version(transaction, push), places)
            if fine and version is not None:
                self._move(transaction, version.id, lost, others)
            mine = update(pushes).where(pushes.c.id == repair)
            transaction.run(mine.values(state=PushState.ABORTED.value))
            transaction.run(delete(claims).where(claims.c.push == repair))
            return fine

        return self._database.write(act)

    @staticmethod
    def _move(
        transaction: Transaction, version: int, lost: str | None, others: Collection[str]
    ) -> None:
        mine = refs.c.version == version
        if lost is not None:
            transaction.run(delete(refs).where(mine, refs.c.pack == lost))
        there = {row.pack for row in transaction.rows(select(refs.c.pack).where(mine))}
        rows = [{"version": version, "pack": pack} for pack in sorted(set(others) - there)]
        if rows:
            transaction.run(insert(refs), rows)


def _packs(transaction: Transaction) -> list[FinishedPack]:
    known = [as_pack(row) for row in transaction.rows(select(packs).order_by(packs.c.id))]
    found: dict[str, list[Chunk]] = {}
    for row in transaction.rows(select(chunks)):
        found.setdefault(row.pack, []).append(as_chunk(row))
    return [FinishedPack(pack, tuple(found.get(pack.id, ()))) for pack in known]


def _incomplete(transaction: Transaction, known: Sequence[FinishedPack]) -> list[tuple[str, str]]:
    whole = {one.pack.id: one.chunks for one in known if one.pack.state is not PackState.BROKEN}
    alone = {
        pack: {chunk.digest for chunk in places if chunk.base is None}
        for pack, places in whole.items()
    }
    referred: dict[int, list[str]] = {}
    for row in transaction.rows(select(refs)):
        if row.pack in whole:
            referred.setdefault(row.version, []).append(row.pack)
    found = []
    for some in batches(transaction.rows(_NAMED), 200):
        named = chunks_of_documents(transaction, {version.document for version in some})
        for version in some:
            mine = referred.get(version.id, ())
            # Most lie there as they are: only for the rest are the bases looked at.
            left = named[version.document].difference(*(alone[pack] for pack in mine))
            if left and unreadable(left, [place for pack in mine for place in whole[pack]]):
                found.append((version.push, f"{version.name}@{version.number}"))
    return found
