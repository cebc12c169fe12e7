"""Reading the registry: versions, models and what lies around them, as frozen records."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row, bindparam, func, select

from ckpt.core.comparisons import Comparison
from ckpt.core.digests import digest_of
from ckpt.core.documents import Document, encode_document, join_document
from ckpt.core.errors import IntegrityError
from ckpt.core.records import ClassUse, Environment, Event, Model, Version
from ckpt.core.references import Reference
from ckpt.registry.bodies import decompress, read_json
from ckpt.registry.engine import Database, Transaction, batches, repeated
from ckpt.registry.resolving import (
    MODEL,
    require_model,
    required_model,
    resolve,
    version_missing,
)
from ckpt.registry.search import search
from ckpt.registry.tables import (
    class_uses,
    documents,
    environments,
    events,
    model_classes,
    models,
    packs,
    policies,
    structures,
    versions,
)
from ckpt.registry.version_rows import (
    NEWEST_FIRST,
    NEWEST_ONE,
    OF_MODEL,
    VERSIONS,
    of_model,
    records_of,
)

# What is asked at every call is made once: to build a statement takes as long as to run it.
_BY_PUSH = VERSIONS.where(versions.c.push == bindparam("made_by"))
_NEWEST_DIGEST = (
    select(versions.c.digest).where(OF_MODEL).order_by(versions.c.number.desc()).limit(1)
)
_PAGE = NEWEST_FIRST.limit(bindparam("most"))
_NEXT_PAGE = _PAGE.where(versions.c.number < bindparam("below"))
_OF_DIGEST = NEWEST_FIRST.where(versions.c.digest == bindparam("whole"))
_DOCUMENT = (
    select(documents.c.body, structures.c.body.label("structure"), versions.c.facts)
    .join(structures, structures.c.digest == documents.c.structure)
    .join(versions, versions.c.document == documents.c.digest)
    .where(versions.c.push == bindparam("made_by"))
)


class Queries:
    """Questions to the registry; each is one snapshot."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @repeated
    def get(self, reference: Reference) -> Version:
        """The version that a reference means.

        Raises:
            NotFoundError: ``model-missing``, ``version-missing``, ``alias-missing``.
            UsageError: ``ambiguous`` when a digest prefix begins several digests.
        """
        with self._database.read() as transaction:
            return records_of(transaction, [resolve(transaction, reference)])[0]

    @repeated
    def by_push(self, push: str) -> Version | None:
        """The version that a push made, or None."""
        with self._database.read() as transaction:
            row = transaction.row(_BY_PUSH, {"made_by": push})
            return None if row is None else records_of(transaction, [row])[0]

    @repeated
    def newest(self, model: str) -> Version | None:
        """The newest version of a model, or None when it has none."""
        with self._database.read() as transaction:
            row = transaction.row(NEWEST_ONE, of_model(model))
            return None if row is None else records_of(transaction, [row])[0]

    def newest_digest(self, model: str) -> str | None:
        """The digest of a model's newest version, or None when it has none."""
        row = self._database.ask(_NEWEST_DIGEST, of_model(model))
        return None if row is None else str(row.digest)

    @repeated
    def of_digest(self, model: str, digest: str) -> list[Version]:
        """The versions of a model with this digest, newest first; none without the model."""
        with self._database.read() as transaction:
            rows = transaction.rows(_OF_DIGEST, of_model(model) | {"whole": digest})
            return records_of(transaction, rows)

    @repeated
    def log(self, model: str, before: int | None = None, limit: int = 100) -> list[Version]:
        """Versions of a model, newest first, from below number ``before``; at most ``limit``."""
        with self._database.read() as transaction:
            query, values = _PAGE, of_model(model) | {"most": limit}
            if before is not None:
                query, values["below"] = _NEXT_PAGE, before
            rows = transaction.rows(query, values)
            if not rows:
                required_model(transaction, model)
            return records_of(transaction, rows)

    @repeated
    def since(self, model: str, number: int, limit: int = 100) -> list[Version]:
        """Versions of a model above ``number``, oldest first; at most ``limit``."""
        with self._database.read() as transaction:
            query = VERSIONS.where(OF_MODEL, versions.c.number > number)
            query = query.order_by(versions.c.number).limit(limit)
            rows = transaction.rows(query, of_model(model))
            if not rows:
                required_model(transaction, model)
            return records_of(transaction, rows)

    @repeated
    def find(
        self,
        model: str,
        where: Sequence[Comparison] = (),
        order_by: str | None = None,
        limit: int = 100,
    ) -> list[Version]:
        """Versions of a model that every comparison matches, at most ``limit``; newest first, or
        by a metric or ``step``, descending after a ``-``. See :mod:`ckpt.registry.search`."""
        with self._database.read() as transaction:
            found = required_model(transaction, model)
            query = search(transaction, VERSIONS, found, where, order_by)
            return records_of(transaction, transaction.rows(query.limit(limit)))

    @repeated
    def models(self, limit: int | None = None) -> list[Model]:
        """Models by name, each with the number of its versions and the newest one; at most
        ``limit``."""
        mine = versions.c.model == models.c.id
        newest = select(versions.c.id).where(mine).order_by(versions.c.number.desc()).limit(1)
        query = select(
            models.c.name, models.c.version_count, newest.scalar_subquery().label("newest")
        )
        ordered = query.order_by(models.c.folded).limit(limit)
        by_name: dict[str, Version] = {}
        with self._database.read() as transaction:
            listed = transaction.rows(ordered)
            for some in batches([row.newest for row in listed if row.newest is not None]):
                rows = transaction.rows(VERSIONS.where(versions.c.id.in_(some)))
                by_name |= {version.model: version for version in records_of(transaction, rows)}
        return [
            Model(name=row.name, versions=row.version_count, newest=by_name.get(row.name))
            for row in listed
        ]

    @repeated
    def proven(self, structure: str) -> Version | None:
        """The newest version of this structure whose rebuilding was proven, or None."""
        same = versions.c.structure_digest == structure
        newest = [
            select(func.max(versions.c.id)).where(same, versions.c.proof == kind).scalar_subquery()
            for kind in ("fresh", "in-process")
        ]
        query = VERSIONS.where(versions.c.id.in_(newest)).order_by(versions.c.id.desc())
        with self._database.read() as transaction:
            row = transaction.row(query.limit(1))
            return None if row is None else records_of(transaction, [row])[0]

    @repeated
    def classes(self, model: str | None = None) -> list[ClassUse]:
        """Every class that versions name, by reference and then by its first use."""
        query = (
            select(model_classes, models.c.name.label("model_name"), versions.c.number)
            .join(class_uses, class_uses.c.model_class == model_classes.c.digest)
            .join(versions, versions.c.id == class_uses.c.version)
            .join(models, models.c.id == versions.c.model)
            .order_by(model_classes.c.reference, versions.c.id)
        )
        with self._database.read() as transaction:
            if model is not None:
                query = query.where(models.c.name == require_model(transaction, model))
            rows = transaction.rows(query)
        grouped: dict[str, list[Row[Any]]] = {}
        for row in rows:
            grouped.setdefault(row.digest, []).append(row)
        return [
            ClassUse(
                reference=uses[0].reference,
                package=uses[0].package,
                version=uses[0].version,
                source_digest=uses[0].source_digest,
                versions=tuple(f"{use.model_name}@{use.number}" for use in uses),
            )
            for uses in grouped.values()
        ]

    def policy(self, model: str) -> tuple[str, ...]:
        """The rules that were saved for pruning a model."""
        query = select(policies.c.body).join(models, models.c.id == policies.c.model)
        row = self._database.ask(query.where(models.c.folded == model.lower()))
        return () if row is None else tuple(read_json(row.body.encode()))

    @repeated
    def events(self, since: int, limit: int) -> list[Event]:
        """What happened from ``since`` (microseconds since 1970) on, newest first."""
        query = (
            select(events, models.c.name)
            .outerjoin(models, models.c.id == events.c.model)
            .where(events.c.created_at >= since)
            .order_by(events.c.created_at.desc(), events.c.id)
            .limit(limit)
        )
        with self._database.read() as transaction:
            rows = transaction.rows(query)
            said = [_said(read_json(row.body)) for row in rows]
            known = _references(transaction, {one["push"] for one in said if "push" in one})
        return [
            Event(
                id=row.id,
                kind=row.kind,
                model=row.name,
                author=row.author,
                time=datetime.fromtimestamp(row.created_at / 1e6, UTC),
                said=one | ({"version": known[one["push"]]} if one.get("push") in known else {}),
            )
            for row, one in zip(rows, said, strict=True)
        ]

    def stored_bytes(self) -> int:
        """Bytes of all packs."""
        row = self._database.ask(select(func.coalesce(func.sum(packs.c.size), 0)))
        assert row is not None
        return int(row[0])

    def taken_name(self, model: str) -> str | None:
        """The model that has this name when case is ignored, or None."""
        row = self._database.ask(MODEL, of_model(model))
        return None if row is None else str(row.name)

    def document(self, version: Version) -> Document:
        """The document of a version; NotFoundError when the version was deleted meanwhile."""
        row = self._database.ask(_DOCUMENT, {"made_by": version.push})
        if row is None:
            raise version_missing(version.reference)
        found = join_document(decompress(row.structure), decompress(row.body))
        if digest_of(encode_document(found)) != read_json(row.facts).get("document_digest"):
            raise IntegrityError(
                "document-damaged",
                f"the registry's document of {version.reference} is not the one that was pushed",
                hint="run `ckpt registry rebuild`, which reads the store",
            )
        return found

    def environment(self, version: Version) -> Environment:
        """What the version was pushed on."""
        query = select(environments).where(environments.c.digest == version.environment)
        row = self._database.ask(query)
        if row is None:
            raise version_missing(version.reference)
        return Environment(row.digest, read_json(row.body))


def _references(transaction: Transaction, pushes: Collection[str]) -> dict[str, str]:
    """Of those pushes whose versions are there, the references."""
    query = select(versions.c.push, models.c.name, versions.c.number).join(
        models, models.c.id == versions.c.model
    )
    return {
        row.push: f"{row.name}@{row.number}"
        for some in batches(sorted(pushes))
        for row in transaction.rows(query.where(versions.c.push.in_(some)))
    }


_EVERYWHERE = ("format", "id", "epoch", "counter", "kind", "author", "time", "model", "sequence")


def _said(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in _EVERYWHERE}
