"""What the store must hold of the registry: documents and events that wait for their copy."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import (
    LargeBinary,
    Row,
    bindparam,
    cast,
    false,
    null,
    select,
    true,
    union_all,
    update,
)

from ckpt.core.documents import canonical, join_document
from ckpt.core.records import KnownCopy, StoreCopy
from ckpt.registry.bodies import decompress, read_json
from ckpt.registry.engine import Database, Transaction, batches, repeated
from ckpt.registry.tables import (
    documents,
    environments,
    events,
    meta,
    models,
    structures,
    versions,
)


class Copies:
    """Documents and events on their way into the store.

    A copy is noted as done with the next transaction that writes anyway; until then it is at
    worst made again, and finds its own bytes.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._documents: set[str] = set()  # copied, by the push of each, but not noted as done
        self._events: set[str] = set()

    def pending(self) -> list[StoreCopy]:
        """All copies that are not known to be in the store, in the order of their counters."""
        rows = sorted(self._database.ask_all(_UNCOPIED), key=lambda row: row.counter)
        uncopied = {row.id for row in rows}  # the others are written down by now
        self._documents &= uncopied
        self._events &= uncopied
        left = (row for row in rows if row.id not in self._documents | self._events)
        return [_document_copy(row) if row.is_document else _event_copy(row) for row in left]

    def document(self, push: str) -> StoreCopy | None:
        """The copy of one version's document, done or not; None when the version is gone."""
        row = self._database.ask(_VERSIONS.where(versions.c.push == push))
        return None if row is None else _document_copy(row)

    @repeated
    def all(self) -> list[StoreCopy]:
        """Everything that the store must hold."""
        with self._database.read() as transaction:
            found = [_document_copy(row) for row in transaction.rows(_VERSIONS)]
            found += [_event_copy(row) for row in transaction.rows(_EVENTS)]
        return found

    @repeated
    def known(self) -> dict[str, KnownCopy]:
        """Everything that was committed, by id: references of versions, kinds of acts."""
        with self._database.read() as transaction:
            pushed = {row.id: row for row in transaction.rows(_KNOWN_VERSIONS)}
            done = {row.id: row for row in transaction.rows(_KNOWN_EVENTS)}
        found = {
            one: KnownCopy(
                f"{row.name}@{row.number}", document_key(row.epoch, row.counter, one), row.copied
            )
            for one, row in pushed.items()
        }
        return found | {
            one: KnownCopy(f"a {row.kind}", event_key(row.epoch, row.counter, one), row.copied)
            for one, row in done.items()
        }

    @repeated
    def wanted(self, copies: Collection[StoreCopy]) -> set[str]:
        """The ids of those whose version or event is still there."""
        found: set[str] = set()
        with self._database.read() as transaction:
            for some in batches([copy.id for copy in copies]):
                version = select(versions.c.push).where(versions.c.push.in_(some))
                copied = events.c.counter.is_not(None)  # what a push is in the history has no copy
                event = select(events.c.id).where(events.c.id.in_(some), copied)
                found |= {row[0] for query in (version, event) for row in transaction.rows(query)}
        return found

    def position_and_known(self, some: Collection[str]) -> tuple[int, int, set[str]]:
        """The same, and which of ``some`` pushes and events are in the history."""
        rows = self._database.ask_all(_POSITION_AND_KNOWN, {"some": list(some)})
        return rows[0].epoch, rows[0].next_counter, {row.id for row in rows if row.id is not None}

    def position(self) -> tuple[int, int]:
        """The epoch, and the counter that the next document or event will have."""
        row = self._database.ask(_POSITION)
        assert row is not None
        return row.epoch, row.next_counter

    def note(self, copy: StoreCopy) -> None:
        """Remember that ``copy`` is in the store."""
        (self._documents if copy.is_document else self._events).add(copy.id)

    def is_copied(self, event: str) -> bool:
        """Whether an event is in the store, and so every earlier one: they are copied in order."""
        if event in self._events:
            return True
        row = self._database.ask(select(events.c.copied).where(events.c.id == event))
        return row is not None and bool(row.copied)

    def flush(self, transaction: Transaction) -> None:
        """Write down what was noted, in a transaction that writes anyway; first in it, events
        before versions, so that nobody waits for one of them who holds the other."""
        self.flush_events(transaction)
        for some in batches(sorted(self._documents)):
            transaction.run(update(versions).where(versions.c.push.in_(some)).values(copied=True))

    def flush_events(self, transaction: Transaction) -> None:
        """The same of events alone: an act on a model comes to its versions later."""
        for some in batches(sorted(self._events)):
            transaction.run(_NOTE_EVENTS, {"some": some})

    def close(self) -> None:
        """Write down what was noted, in a transaction of its own."""
        if self._documents or self._events:
            self._database.write(self.flush)
            self._documents.clear()
            self._events.clear()

    def event_stands(self, event: str) -> bool:
        """(j): whether the event's row is there and the registry is of the same epoch."""
        return self._database.ask(_STANDING, {"of": event}) is not None


def document_key(epoch: int, counter: int, push: str) -> str:
    """Where in the store the document of a push is copied to."""
    return f"documents/{epoch}/{counter:012d}-{push}.json"


def event_key(epoch: int, counter: int, event: str) -> str:
    """Where in the store an event is copied to."""
    return f"events/{epoch}/{counter:012d}-{event}.json"


_POSITION = select(meta.c.epoch, meta.c.next_counter)
_POSITION_AND_KNOWN = select(meta.c.epoch, meta.c.next_counter, events.c.id).select_from(
    meta.outerjoin(events, events.c.id.in_(bindparam("some", expanding=True)))
)
# What is asked at every call is made once: to build a statement takes as long as to run it.
_STANDING = select(events.c.id).where(
    events.c.id == bindparam("of"), events.c.epoch == select(meta.c.epoch).scalar_subquery()
)
_NOTE_EVENTS = (
    update(events).where(events.c.id.in_(bindparam("some", expanding=True))).values(copied=True)
)
_VERSIONS = (
    select(
        true().label("is_document"),
        versions.c.push.label("id"),
        versions.c.epoch,
        versions.c.counter,
        versions.c.facts.label("said"),
        documents.c.body.label("document"),
        structures.c.body.label("structure"),
        environments.c.body.label("environment"),
    )
    .join(documents, documents.c.digest == versions.c.document)
    .join(structures, structures.c.digest == documents.c.structure)
    .join(environments, environments.c.digest == versions.c.environment)
)
_EVENTS = select(
    false().label("is_document"),
    events.c.id,
    events.c.epoch,
    events.c.counter,
    events.c.body.label("said"),
    *(cast(null(), LargeBinary).label(name) for name in ("document", "structure", "environment")),
).where(events.c.counter.is_not(None))
_COPIED = ("epoch", "counter", "copied")
_KNOWN_VERSIONS = select(
    versions.c.push.label("id"),
    models.c.name,
    versions.c.number,
    *(versions.c[name] for name in _COPIED),
).join(models, models.c.id == versions.c.model)
_KNOWN_EVENTS = select(events.c.id, events.c.kind, *(events.c[name] for name in _COPIED)).where(
    events.c.counter.is_not(None)
)
# Of both at one moment: else a later one could be copied before an earlier one.
_UNCOPIED = union_all(
    _VERSIONS.where(versions.c.copied == false()), _EVENTS.where(events.c.copied == false())
)


def _document_copy(row: Row[Any]) -> StoreCopy:
    """Pure: the same row gives the same bytes in every process and release."""
    body = read_json(row.said) | {
        "document": join_document(decompress(row.structure), decompress(row.document)),
        "environment": read_json(row.environment),
    }
    key = document_key(row.epoch, row.counter, row.id)
    return StoreCopy(row.id, key, canonical(body), is_document=True)


def _event_copy(row: Row[Any]) -> StoreCopy:
    key = event_key(row.epoch, row.counter, row.id)
    return StoreCopy(row.id, key, row.said, is_document=False)
