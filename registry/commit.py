"""The commit of a push: one transaction that makes its version, or nothing (rule (d))."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import cache
from itertools import chain
from typing import Any

from sqlalchemy import Select, Table, bindparam, delete, insert, select, update

from ckpt.core.digests import digest_of
from ckpt.core.documents import Document, canonical, split_document
from ckpt.core.errors import ConflictError, IntegrityError
from ckpt.core.json_numbers import json_numbers
from ckpt.core.printable import escape
from ckpt.core.records import Environment, FinishedPack, PackState, PushFacts, PushState
from ckpt.registry.bodies import compress
from ckpt.registry.books import insert_pack, lock_packs, require_open
from ckpt.registry.engine import Clock, Transaction, batches
from ckpt.registry.epochs import check_not_closed
from ckpt.registry.needs import document_chunks, places_in, unreadable
from ckpt.registry.resolving import MODEL
from ckpt.registry.tables import (
    aliases,
    claims,
    class_uses,
    documents,
    environments,
    events,
    labels,
    meta,
    metrics,
    model_classes,
    models,
    pushes,
    refs,
    runs,
    structures,
    versions,
)
from ckpt.registry.version_rows import of_model

# What is asked at every call is made once: to build a statement takes as long as to run it.
_LOCK_MODEL = MODEL.with_for_update()
_COUNT = (
    update(meta)
    .values(next_counter=meta.c.next_counter + 1)
    .returning(meta.c.epoch, meta.c.next_counter, Clock().label("now"))
)
_RUN = select(runs.c.id).where(runs.c.model == bindparam("of"), runs.c.name == bindparam("named"))
_NEWEST = select(versions.c.number).order_by(versions.c.number.desc()).limit(1)
_NEWEST_OF_RUN = _NEWEST.where(versions.c.run == bindparam("of"))
_NEWEST_OF_MODEL = _NEWEST.where(versions.c.model == bindparam("of"))


def commit_push(
    transaction: Transaction,
    push: str,
    facts: PushFacts,
    document: Document,
    environment: Environment,
    finished: Sequence[FinishedPack],
    needed: Collection[str],
    new_bytes: int,
) -> None:
    """Make the version of ``push`` (T4).

    Args:
        finished: packs of the push that have no rows yet.
        needed: ids of all packs that the version refers to.

    Raises:
        ConflictError: ``push-expired``, or ``pack-gone`` when a pack is not there and live.
        IntegrityError: ``undecodable`` when a digest cannot be read from these packs alone.
    """
    require_open(transaction, push, shared=False)
    model = lock_model(transaction, facts.model)
    for pack in finished:
        insert_pack(transaction, pack)
    _check_packs(transaction, needed, finished)
    _check_decodable(transaction, document, needed, finished)

    run = run_id(transaction, model.id, facts.run)
    parent = facts.parent or _parent(transaction, model, run)
    insert_document(transaction, facts.document_digest, document)
    insert_missing(
        transaction, environments, "digest", environment.digest, body=canonical(environment.body)
    )
    # Everybody waits for the counter, and an act that drops a document takes it after that.
    epoch, counter, now = next_counter(transaction)
    said = _facts_body(facts, push, model, parent, epoch, counter, now, new_bytes, needed)
    row = {
        "model": model.id,
        "number": model.next_number,
        "push": push,
        "run": run,
        "digest": facts.digest,
        "document": facts.document_digest,
        "environment": environment.digest,
        "state": document.state,
        "step": facts.step,
        "parent": parent,
        "message": facts.message,
        "author": facts.author,
        "created_at": now,
        "nbytes": facts.nbytes,
        "new_bytes": new_bytes,
        "structure_digest": facts.structure,
        "proof": facts.proof and facts.proof.kind,
        "proof_reason": facts.proof and facts.proof.reason,
        "sequence": model.next_event,
        "epoch": epoch,
        "counter": counter,
        "facts": canonical(said),
        "copied": False,
    }
    version = transaction.run(insert(versions).returning(versions.c.id), row).scalar_one()
    transaction.run(
        update(models).where(models.c.id == model.id),
        {
            "next_number": model.next_number + 1,
            "next_event": model.next_event + 1,
            "version_count": model.version_count + 1,
        },
    )
    if needed:
        transaction.run(insert(refs), [{"version": version, "pack": p} for p in sorted(needed)])
    note_classes(transaction, version, document)
    set_metrics(transaction, model.id, version, facts.metrics)
    set_labels(transaction, version, facts.labels)
    for alias in facts.aliases:
        set_alias(transaction, model.id, alias, version)
    _insert_audit(transaction, push, epoch, model, now, facts.author)
    transaction.run(delete(claims).where(claims.c.push == push))
    transaction.run(
        update(pushes).where(pushes.c.id == push),
        {"state": PushState.COMMITTED.value, "version": version, "epoch": epoch},
    )


def lock_model(transaction: Transaction, name: str) -> Any:
    """The locked row of the model, made when there is none.

    Raises:
        ConflictError: ``name-clash`` when another model has this name but for the case.
    """
    row = transaction.row(_LOCK_MODEL, of_model(name))
    if row is None:
        fresh = {"name": name, "folded": name.lower(), "next_number": 1, "next_event": 1}
        transaction.insert_absent(models, fresh)
        row = transaction.row(_LOCK_MODEL, of_model(name))
    assert row is not None
    if row.name != name:
        raise name_clash(name, row.name)
    return row


def name_clash(name: str, taken: str) -> ConflictError:
    """The error for a model name that differs from another only in case."""
    return ConflictError(
        "name-clash",
        f'the model "{escape(name)}" would differ from "{escape(taken)}" only in case',
        hint=f'use "{escape(taken)}" or another name',
    )


def next_counter(transaction: Transaction) -> tuple[int, int, int]:
    """``(epoch, counter, now)`` for one more document or event in the store; ``now`` as
    :meth:`Transaction.now`."""
    row = transaction.row(_COUNT)
    assert row is not None
    check_not_closed(row.epoch)
    return row.epoch, row.next_counter - 1, row.now


def set_metrics(transaction: Transaction, model: int, version: int, values: Any) -> None:
    """Set metrics of a version; one that is not finite has no value, so it never compares."""
    if not values:
        return
    rows = [
        {
            "version": version,
            "model": model,
            "name": name,
            # SQLite has no negative zero, and both databases must answer the same.
            "value": value + 0.0 if math.isfinite(value) else None,
            "special": None if math.isfinite(value) else str(value),
        }
        for name, value in values.items()
    ]
    transaction.put(metrics, rows)


def set_labels(transaction: Transaction, version: int, values: Any) -> None:
    """Set labels of a version."""
    if not values:
        return
    rows = [{"version": version, "name": name, "value": text} for name, text in values.items()]
    transaction.put(labels, rows)


def set_alias(transaction: Transaction, model: int, alias: str, version: int) -> None:
    """Make ``alias`` name this version, whatever it named before."""
    transaction.put(aliases, {"model": model, "name": alias, "version": version})


def insert_missing(
    transaction: Transaction, table: Table, column: str, digest: str, **values: object
) -> None:
    """Insert a row that is named by a digest, unless it is there, and keep it there until the
    transaction ends: another one may be removing what no version needs."""
    while not _held(transaction, table, column, digest):
        if transaction.insert_absent(table, {column: digest, **values}):
            return


def _held(transaction: Transaction, table: Table, column: str, digest: str) -> bool:
    """Whether the row is there; if so, a lock keeps it until the transaction ends."""
    return transaction.row(_holding(table, column), {"named": digest}) is not None


@cache
def _holding(table: Table, column: str) -> Select[Any]:
    query = select(table.c[column]).where(table.c[column] == bindparam("named"))
    return query.with_for_update(read=True, key_share=True)


def _check_packs(
    transaction: Transaction, needed: Collection[str], finished: Sequence[FinishedPack]
) -> None:
    # The rows that this transaction inserted are there, and nobody else sees them before it ends.
    own = {one.pack.id for one in finished if one.pack.state is PackState.LIVE}
    found = lock_packs(transaction, set(needed) - own)
    live = {pack.id for pack in found if pack.state is PackState.LIVE}
    gone = sorted(set(needed) - own - live)
    if gone:
        raise ConflictError(
            "pack-gone", f"the pack {gone[0]} is not there any more", hint="run the push again"
        )


def _check_decodable(
    transaction: Transaction,
    document: Document,
    needed: Collection[str],
    finished: Sequence[FinishedPack],
) -> None:
    """Every digest of the document can be read from exactly these packs."""
    own = {one.pack.id: one.chunks for one in finished if one.pack.id in needed}
    others = places_in(transaction, set(needed) - own.keys())
    lost = unreadable(document_chunks(document), chain(*own.values(), others))
    if lost:
        raise IntegrityError(
            "undecodable",
            f"chunk {min(lost)} cannot be read from the packs of this push",
            hint="run the push again",
        )


def run_id(transaction: Transaction, model: int, name: str) -> int:
    """The run's row, made when there is none; the lock on the model's row keeps others out."""
    row = transaction.row(_RUN, {"of": model, "named": name})
    if row is None:
        fresh = insert(runs).returning(runs.c.id)
        return int(transaction.run(fresh, {"model": model, "name": name}).scalar_one())
    return int(row.id)


def _parent(transaction: Transaction, model: Any, run: int) -> str | None:
    """The run's previous version, else the newest of the model."""
    for query, of in ((_NEWEST_OF_RUN, run), (_NEWEST_OF_MODEL, model.id)):
        row = transaction.row(query, {"of": of})
        if row is not None:
            return f"{model.name}@{row.number}"
    return None


def _facts_body(
    facts: PushFacts,
    push: str,
    model: Any,
    parent: str | None,
    epoch: int,
    counter: int,
    now: int,
    new_bytes: int,
    needed: Collection[str],
) -> dict[str, object]:
    """The version's file in the store, without document and environment (format section 4)."""
    return {
        "format": 1,
        "epoch": epoch,
        "counter": counter,
        "push": push,
        "model": facts.model,
        "number": model.next_number,
        "sequence": model.next_event,
        "digest": facts.digest,
        "document_digest": facts.document_digest,
        "parent": parent,
        "run": facts.run,
        "step": facts.step,
        "metrics": json_numbers(facts.metrics),
        "labels": dict(facts.labels),
        "aliases": list(facts.aliases),
        "message": facts.message,
        "author": facts.author,
        "time": now,
        "nbytes": facts.nbytes,
        "new_bytes": new_bytes,
        "packs": sorted(needed),
        "proof": facts.proof and [facts.proof.kind, facts.proof.reason],
    }


def insert_document(transaction: Transaction, digest: str, document: Document) -> None:
    """Insert a document and the structure that it shares with others, unless they are there."""
    if _held(transaction, documents, "digest", digest):
        return
    structure, body = split_document(document)
    name = digest_of(structure)
    insert_missing(transaction, structures, "digest", name, body=compress(structure))
    rest = {"structure": name, "body": compress(body)}
    if not transaction.insert_absent(documents, {"digest": digest, **rest}):
        insert_missing(transaction, documents, "digest", digest, **rest)


def note_classes(transaction: Transaction, version: int, document: Document) -> None:
    """Write down which classes the version names."""
    named = {digest_of(canonical(one)): one for one in document.classes}
    if not named:
        return
    known: set[str] = set()
    for some in batches(sorted(named)):
        query = select(model_classes.c.digest).where(model_classes.c.digest.in_(some))
        known |= {row.digest for row in transaction.rows(query)}
    # Sorted, so that two pushes with the same classes wait for each other in one order.
    fresh = [
        {
            "digest": digest,
            "reference": one.reference,
            "package": one.package,
            "version": one.version,
            "source_digest": one.source_digest,
        }
        for digest, one in sorted(named.items())
        if digest not in known
    ]
    if fresh:
        transaction.insert_absent(model_classes, fresh)
    uses = [{"version": version, "model_class": digest} for digest in named]
    transaction.run(insert(class_uses), uses)


def _insert_audit(
    transaction: Transaction, push: str, epoch: int, model: Any, now: int, author: str
) -> None:
    """The push in the history; its copy in the store is the document."""
    row = {
        "id": push,
        "kind": "push",
        "epoch": epoch,
        "model": model.id,
        "model_seq": model.next_event,
        "created_at": now,
        "author": author,
        "body": canonical({"number": model.next_number}),
        "copied": True,
    }
    transaction.run(insert(events), row)
