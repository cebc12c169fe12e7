"""Repacking: which packs are mostly dead, and versions moved to new ones (rule (h))."""

from __future__ import annotations

from sqlalchemy import delete, exists, insert, select, update

from ckpt.core.records import FinishedPack, Pack, PackState, PushState
from ckpt.registry.books import as_pack, insert_pack, lock_packs, require_open
from ckpt.registry.engine import Database, Transaction, repeated
from ckpt.registry.needs import chunks_of_version, places_in, with_bases
from ckpt.registry.tables import claims, packs, pushes, refs, versions


class Repacks:
    """What a repack reads of the books, and its change in them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @repeated
    def sparse(self, share: float) -> list[tuple[Pack, set[str]]]:
        """Live packs of which the versions that refer to them need less than ``share`` of the
        bytes, with the digests that they need.

        Looked at are only packs whose own version is gone: while it is there it needs them whole.
        """
        made = exists().where(versions.c.push == packs.c.push)
        referred = exists().where(refs.c.pack == packs.c.id)
        live = packs.c.state == PackState.LIVE.value
        query = select(packs).where(live, referred, ~made).order_by(packs.c.id)
        found = []
        with self._database.read() as transaction:
            for row in transaction.rows(query):
                pack = as_pack(row)
                needed = set().union(*_needs_of(transaction, pack.id).values())
                places = places_in(transaction, [pack.id])
                size = sum(one.length for one in places if one.digest in needed)
                # Not of its size: a small one is mostly header, also when it is written again.
                if needed and size < share * sum(one.length for one in places):
                    found.append((pack, needed))
        return found

    def switch(self, repack: str, finished: FinishedPack, old: str) -> int:
        """T7, (h): insert the new pack, and under locks make every version that finds in it all
        that it needs of the old one refer to it instead; returns how many. Ends the repack.

        The old pack is not touched: what still refers to it keeps it, and gc ends it.

        Raises:
            ConflictError: ``push-expired``, and nothing is changed.
        """

        def act(transaction: Transaction) -> int:
            require_open(transaction, repack, shared=False)
            # The lock first, then what is needed: a push that shares the old pack may have
            # committed since the bytes were chosen.
            locked = lock_packs(transaction, [old], exclusive=True)
            insert_pack(transaction, finished)
            known = {chunk.digest for chunk in finished.chunks}
            moved = [
                version
                for version, needed in _needs_of(transaction, old).items()
                if locked and needed <= known
            ]
            for version in moved:
                mine = refs.c.version == version
                transaction.run(delete(refs).where(mine, refs.c.pack == old))
                transaction.run(insert(refs), {"version": version, "pack": finished.pack.id})
            transaction.run(delete(claims).where(claims.c.push == repack))
            ended = update(pushes).where(pushes.c.id == repack)
            transaction.run(ended.values(state=PushState.COMMITTED.value))
            return len(moved)

        return self._database.write(act)


def _needs_of(transaction: Transaction, pack: str) -> dict[int, set[str]]:
    """For every version that refers to a pack, the digests in it that the version names, or that
    a difference in any of its packs counts from; whether or not another pack has them too."""
    query = select(versions.c.id, versions.c.push).join(refs, refs.c.version == versions.c.id)
    rows = transaction.rows(query.where(refs.c.pack == pack).order_by(versions.c.id))
    held = {chunk.digest for chunk in places_in(transaction, [pack])}
    found = {}
    for row in rows:
        mine = transaction.rows(select(refs.c.pack).where(refs.c.version == row.id))
        places = places_in(transaction, [other.pack for other in mine])
        found[row.id] = held & with_bases(chunks_of_version(transaction, row.push), places)
    return found
