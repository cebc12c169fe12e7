"""Acts on committed versions: tag, untag, label, rm; each leaves an event in the same transaction."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import Row, bindparam, delete, insert, select, update

from ckpt.core.documents import canonical
from ckpt.core.errors import ConflictError, NotFoundError
from ckpt.core.json_numbers import json_numbers
from ckpt.core.printable import escape
from ckpt.core.records import Version
from ckpt.core.references import Reference
from ckpt.registry.commit import (
    next_counter,
    set_alias,
    set_labels,
    set_metrics,
)
from ckpt.registry.engine import Database, Transaction
from ckpt.registry.resolving import model_missing, resolve
from ckpt.registry.runs import spared_pushes
from ckpt.registry.tables import (
    aliases,
    documents,
    events,
    labels,
    metrics,
    models,
    policies,
    refs,
    structures,
    versions,
)
from ckpt.registry.version_rows import of_model, records_of

T = TypeVar("T")

_NEXT_EVENT = (
    update(models)
    .where(models.c.folded == bindparam("folded_name"))
    .values(next_event=models.c.next_event + 1)
    .returning(models, (models.c.next_event - 1).label("place"))
)


class Changes:
    """Acts that change what is said of a version, or end it. Each returns the event's id, to be
    acknowledged only after its copy is in the store (rule (j)); some also the version after it."""

    def __init__(self, database: Database, before_write: Callable[[Transaction], None]) -> None:
        self._database = database
        self._before_write = before_write

    def _write(self, act: Callable[[Transaction], T]) -> T:
        def noted(transaction: Transaction) -> T:
            self._before_write(transaction)
            return act(transaction)

        return self._database.write(noted)

    def tag(
        self, reference: Reference, alias: str, expect: Reference | None, author: str
    ) -> tuple[str, Version]:
        """Make ``alias`` name a version; with ``expect``, only if it names that one now.

        Raises:
            ConflictError: ``alias-moved`` when the alias names another version than expected.
        """

        def act(transaction: Transaction) -> tuple[str, Version]:
            row, model = _locked(transaction, reference)
            if expect is not None:
                self._check_expected(transaction, model.id, alias, expect)
            set_alias(transaction, model.id, alias, row.id)
            event = note_event(transaction, "tag", author, model, alias=alias, push=row.push)
            return event, records_of(transaction, [row])[0]

        return self._write(act)

    @staticmethod
    def _check_expected(
        transaction: Transaction, model: int, alias: str, expect: Reference
    ) -> None:
        expected = resolve(transaction, expect)
        same = (aliases.c.model == model) & (aliases.c.name == alias)
        query = select(versions.c.number, versions.c.id).join(aliases).where(same)
        now = transaction.row(query)
        if now is None or now.id != expected.id:
            names = "nothing" if now is None else f"@{now.number}"
            raise ConflictError(
                "alias-moved",
                f'the alias "{alias}" names {names}, not {expect}',
                hint="look again and decide anew",
            )

    def untag(self, reference: Reference, author: str) -> str:
        """Remove the alias of a reference ``model:alias``."""

        def act(transaction: Transaction) -> str:
            row, model = _locked(transaction, reference)
            same = (aliases.c.model == model.id) & (aliases.c.name == reference.alias)
            transaction.run(delete(aliases).where(same))
            return note_event(
                transaction, "untag", author, model, alias=reference.alias, push=row.push
            )

        return self._write(act)

    def annotate(
        self,
        reference: Reference,
        metric_values: Mapping[str, float],
        label_values: Mapping[str, str],
        removed: Sequence[str],
        author: str,
    ) -> tuple[str, Version]:
        """Set metrics and labels of a version, and remove labels or metrics by key.

        Raises:
            NotFoundError: ``label-missing`` when one to remove is not there.
        """

        def act(transaction: Transaction) -> tuple[str, Version]:
            row, model = _locked(transaction, reference)
            self._remove_said(transaction, f"{model.name}@{row.number}", row.id, removed)
            set_metrics(transaction, model.id, row.id, metric_values)
            set_labels(transaction, row.id, label_values)
            said = {
                "labels": dict(label_values),
                "metrics": json_numbers(metric_values),
                "removed": list(removed),
            }
            event = note_event(transaction, "label", author, model, push=row.push, **said)
            return event, records_of(transaction, [row])[0]

        return self._write(act)

    @staticmethod
    def _remove_said(
        transaction: Transaction, reference: str, version: int, removed: Sequence[str]
    ) -> None:
        found: set[str] = set()
        for table in (labels, metrics) if removed else ():
            gone = table.c.name.in_(removed) & (table.c.version == version)
            found |= {row.name for row in transaction.rows(select(table.c.name).where(gone))}
            transaction.run(delete(table).where(gone))
        missing = sorted(set(removed) - found)
        if missing:
            raise NotFoundError(
                "label-missing",
                f'{reference} has no label or metric "{escape(missing[0])}"',
                hint=f"run `ckpt show {reference}`",
            )

    def save_policy(self, model: str, rules: Sequence[str], author: str) -> str:
        """Keep the rules by which a model is pruned."""

        def act(transaction: Transaction) -> str:
            row = _locked_model(transaction, model)
            body = {"model": row.id, "body": canonical(list(rules)).decode()}
            transaction.put(policies, body)
            return note_event(transaction, "policy", author, row, policy=list(rules))

        return self._write(act)

    def remove(self, push: str, author: str, kind: str = "rm") -> str:
        """End the version that ``push`` made (T6); its bytes go with a later collection.

        Raises:
            ConflictError: ``aliased`` while an alias names it; ``run-live`` for a ``prune`` while
                a live run goes on from it.
            NotFoundError: ``version-missing`` when it is gone already.
        """

        def act(transaction: Transaction) -> str:
            query = select(versions, models.c.name).join(models).where(versions.c.push == push)
            found = transaction.row(query)
            if found is None:
                raise NotFoundError("version-missing", "the version was removed meanwhile")
            model = _locked_model(transaction, found.name)
            row = transaction.row(select(versions).where(versions.c.push == push).with_for_update())
            if row is None:
                raise NotFoundError("version-missing", "the version was removed meanwhile")
            self._refuse_aliased(transaction, row, model)
            if kind == "prune" and push in spared_pushes(transaction):
                raise ConflictError(
                    "run-live", f"a live run goes on from {model.name}@{row.number}"
                )
            transaction.run(delete(refs).where(refs.c.version == row.id))
            transaction.run(delete(versions).where(versions.c.id == row.id))
            fewer = {"version_count": models.c.version_count - 1}
            transaction.run(update(models).where(models.c.id == model.id).values(fewer))
            self._drop_document(transaction, row.document)
            return note_event(transaction, kind, author, model, push=push, number=row.number)

        return self._write(act)

    @staticmethod
    def _refuse_aliased(transaction: Transaction, row: Row[Any], model: Row[Any]) -> None:
        named = transaction.rows(select(aliases.c.name).where(aliases.c.version == row.id))
        if named:
            raise aliased(f"{model.name}@{row.number}", f"{model.name}:{named[0].name}")

    @staticmethod
    def _drop_document(transaction: Transaction, digest: str) -> None:
        """Drop the document, and then its structure, unless another version has it. Each is locked
        before anybody is asked: of two that drop their version at once, the later one sees it."""
        same = documents.c.digest == digest
        found = transaction.row(select(documents.c.structure).where(same).with_for_update())
        assert found is not None
        query = select(versions.c.id).where(versions.c.document == digest).limit(1)
        if transaction.row(query) is not None:
            return
        transaction.run(delete(documents).where(same))
        shared = structures.c.digest == found.structure
        transaction.run(select(structures.c.digest).where(shared).with_for_update())
        others = select(documents.c.digest).where(documents.c.structure == found.structure)
        if transaction.row(others.limit(1)) is None:
            transaction.run(delete(structures).where(shared))


def _locked(transaction: Transaction, reference: Reference) -> tuple[Row[Any], Row[Any]]:
    """``(version, model)`` with the model's row locked, so that acts on it have an order."""
    name = reference.model
    if reference.back:  # what a version was made from may be of another model
        name = resolve(transaction, reference).model_name
    model = _locked_model(transaction, name)
    return resolve(transaction, reference), model


def _locked_model(transaction: Transaction, name: str) -> Row[Any]:
    """The row of a model, locked; ``place`` is the act's own in the order of its events."""
    row = transaction.row(_NEXT_EVENT, of_model(name))
    if row is None:
        raise model_missing(name)
    return row


def aliased(reference: str, alias: str) -> ConflictError:
    """The error for a version that is not removed while ``alias``, ``model:name``, names it."""
    return ConflictError(
        "aliased",
        f"{reference} is kept by the alias {alias}",
        hint=f"run `ckpt untag {alias}` first",
    )


def note_event(
    transaction: Transaction, kind: str, author: str, model: Row[Any] | None = None, **said: object
) -> str:
    """Write the event of an act, in the act's transaction; returns its id. An act on a model has
    a place in the model's order."""
    identity = secrets.token_hex(16)
    epoch, counter, now = next_counter(transaction)
    place = {} if model is None else {"model": model.name, "sequence": model.place}
    body = {
        "format": 1,
        "id": identity,
        "epoch": epoch,
        "counter": counter,
        "kind": kind,
        "author": author,
        "time": now,
        **place,
        **said,
    }
    row = {
        "id": identity,
        "kind": kind,
        "epoch": epoch,
        "counter": counter,
        "model": None if model is None else model.id,
        "model_seq": None if model is None else model.place,
        "created_at": now,
        "author": author,
        "body": canonical(body),
        "copied": False,
    }
    transaction.run(insert(events), row)
    return identity
