"""Reading the registry: references resolved, versions and models listed, as frozen records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Float,
    Row,
    Select,
    Table,
    Text,
    bindparam,
    cast,
    func,
    literal,
    null,
    select,
    union_all,
)

from ckpt.core.comparisons import Comparison
from ckpt.core.digests import digest_of
from ckpt.core.documents import Document, encode_document, join_document
from ckpt.core.errors import IntegrityError, NotFoundError, UsageError
from ckpt.core.names import NEWEST
from ckpt.core.records import ClassUse, Environment, Event, Model, Proof, Version
from ckpt.core.references import Reference, parse_reference
from ckpt.registry.bodies import decompress, read_json
from ckpt.registry.engine import Database, Transaction, batches
from ckpt.registry.search import search
from ckpt.registry.tables import (
    aliases,
    class_uses,
    documents,
    environments,
    events,
    labels,
    metrics,
    model_classes,
    models,
    packs,
    policies,
    runs,
    structures,
    versions,
)

# All of a version but the facts, which only its document needs.
_VERSIONS = (
    select(
        *(one for one in versions.c if one is not versions.c.facts),
        models.c.name.label("model_name"),
        runs.c.name.label("run_name"),
    )
    .join(models, models.c.id == versions.c.model)
    .join(runs, runs.c.id == versions.c.run)
)
# What is asked at every call is made once: to build a statement takes as long as to run it.
_BY_PUSH = _VERSIONS.where(versions.c.push == bindparam("made_by"))
_NEWEST_FIRST = _VERSIONS.where(versions.c.model == bindparam("of")).order_by(
    versions.c.number.desc()
)
_NEWEST = _NEWEST_FIRST.limit(1)
_NUMBERED = _VERSIONS.where(
    versions.c.model == bindparam("of"), versions.c.number == bindparam("numbered")
)
_NAMED = _VERSIONS.where(
    versions.c.id
    == select(aliases.c.version)
    .where(aliases.c.model == bindparam("of"), aliases.c.name == bindparam("named"))
    .scalar_subquery()
)
_WITH_DIGEST = _NEWEST_FIRST.where(versions.c.digest == bindparam("whole")).limit(1)
_DOCUMENT = (
    select(documents.c.body, structures.c.body.label("structure"), versions.c.facts)
    .join(structures, structures.c.digest == documents.c.structure)
    .join(versions, versions.c.document == documents.c.digest)
    .where(versions.c.push == bindparam("made_by"))
)
_MODEL = select(models).where(models.c.folded == bindparam("folded_name"))


class Queries:
    """Questions to the registry; each is one snapshot."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, reference: Reference) -> Version:
        """The version that a reference means.

        Raises:
            NotFoundError: ``model-missing``, ``version-missing``, ``alias-missing``.
            UsageError: ``ambiguous`` when a digest prefix begins several digests.
        """
        with self._database.read() as transaction:
            return _records(transaction, [resolve(transaction, reference)])[0]

    def by_push(self, push: str) -> Version | None:
        """The version that a push made, or None."""
        with self._database.read() as transaction:
            row = transaction.row(_BY_PUSH, {"made_by": push})
            return None if row is None else _records(transaction, [row])[0]

    def newest(self, model: str) -> Version | None:
        """The newest version of a model, or None when it has none."""
        with self._database.read() as transaction:
            found = _model(transaction, model)
            row = found and transaction.row(_NEWEST, {"of": found.id})
            return None if row is None else _records(transaction, [row])[0]

    def newest_digest(self, model: str) -> str | None:
        """The digest of a model's newest version, or None when it has none."""
        with self._database.read() as transaction:
            found = _model(transaction, model)
            query = select(versions.c.digest).order_by(versions.c.number.desc()).limit(1)
            row = found and transaction.row(query.where(versions.c.model == found.id))
            return None if row is None else str(row.digest)

    def log(self, model: str, before: int | None = None, limit: int = 100) -> list[Version]:
        """Versions of a model, newest first, from below number ``before``; at most ``limit``."""
        with self._database.read() as transaction:
            query = _NEWEST_FIRST.limit(limit)
            if before is not None:
                query = query.where(versions.c.number < before)
            rows = transaction.rows(query, {"of": _required(transaction, model).id})
            return _records(transaction, rows)

    def since(self, model: str, number: int, limit: int = 100) -> list[Version]:
        """Versions of a model above ``number``, oldest first; at most ``limit``."""
        with self._database.read() as transaction:
            mine = versions.c.model == _required(transaction, model).id
            query = _VERSIONS.where(mine, versions.c.number > number)
            rows = transaction.rows(query.order_by(versions.c.number).limit(limit))
            return _records(transaction, rows)

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
            found = _required(transaction, model)
            query = search(transaction, _VERSIONS, found, where, order_by)
            return _records(transaction, transaction.rows(query.limit(limit)))

    def models(self, after: str = "", limit: int | None = None) -> list[Model]:
        """Models by name, each with the number of its versions and the newest one; a page of them
        begins after the name of the one before."""
        mine = versions.c.model == models.c.id
        newest = select(versions.c.id).where(mine).order_by(versions.c.number.desc()).limit(1)
        query = select(
            models.c.name, models.c.version_count, newest.scalar_subquery().label("newest")
        )
        query = query.where(models.c.folded > after.lower()).order_by(models.c.folded).limit(limit)
        by_name: dict[str, Version] = {}
        with self._database.read() as transaction:
            listed = transaction.rows(query)
            for some in batches([row.newest for row in listed if row.newest is not None]):
                rows = transaction.rows(_VERSIONS.where(versions.c.id.in_(some)))
                by_name |= {version.model: version for version in _records(transaction, rows)}
        return [
            Model(name=row.name, versions=row.version_count, newest=by_name.get(row.name))
            for row in listed
        ]

    def proven(self, structure: str) -> Version | None:
        """The newest version of this structure whose rebuilding was proven, or None."""
        same = versions.c.structure_digest == structure
        newest = [
            select(func.max(versions.c.id)).where(same, versions.c.proof == kind).scalar_subquery()
            for kind in ("fresh", "in-process")
        ]
        query = _VERSIONS.where(versions.c.id.in_(newest)).order_by(versions.c.id.desc())
        with self._database.read() as transaction:
            row = transaction.row(query.limit(1))
            return None if row is None else _records(transaction, [row])[0]

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
        with self._database.read() as transaction:
            row = transaction.row(query.where(models.c.folded == model.lower()))
        return () if row is None else tuple(read_json(row.body.encode()))

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
        return [
            Event(
                id=row.id,
                kind=row.kind,
                model=row.name,
                author=row.author,
                time=datetime.fromtimestamp(row.created_at / 1e6, UTC),
                said=_said(read_json(row.body)),
            )
            for row in rows
        ]

    def stored_bytes(self) -> int:
        """Bytes of all packs."""
        with self._database.read() as transaction:
            return int(
                transaction.run(select(func.coalesce(func.sum(packs.c.size), 0))).scalar_one()
            )

    def taken_name(self, model: str) -> str | None:
        """The model that has this name when case is ignored, or None."""
        with self._database.read() as transaction:
            query = select(models.c.name).where(models.c.folded == model.lower())
            row = transaction.row(query)
        return None if row is None else str(row.name)

    def document(self, version: Version) -> Document:
        """The document of a version; NotFoundError when the version was deleted meanwhile."""
        with self._database.read() as transaction:
            row = transaction.row(_DOCUMENT, {"made_by": version.push})
        if row is None:
            raise _version_missing(version.reference)
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
        with self._database.read() as transaction:
            row = transaction.row(query)
        if row is None:
            raise _version_missing(version.reference)
        return Environment(row.digest, read_json(row.body))


_EVERYWHERE = ("format", "id", "epoch", "counter", "kind", "author", "time", "model", "sequence")


def _said(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in _EVERYWHERE}


def resolve(transaction: Transaction, reference: Reference) -> Row[Any]:
    """The row of the version that a reference means."""
    row = _first(transaction, _required(transaction, reference.model), reference)
    for _ in range(reference.back):
        if row.parent is None:
            raise NotFoundError(
                "version-missing",
                f"{row.model_name}@{row.number} has no parent",
                hint=f"run `ckpt log {row.model_name}`",
            )
        row = resolve(transaction, parse_reference(row.parent))
    return row


def require_model(transaction: Transaction, name: str) -> str:
    """The model's name as it is spelled; NotFoundError ``model-missing`` when there is none."""
    return str(_required(transaction, name).name)


def _required(transaction: Transaction, name: str) -> Row[Any]:
    row = _model(transaction, name)
    if row is None:
        raise NotFoundError(
            "model-missing", f'there is no model "{name}"', hint="run `ckpt ls` to see all"
        )
    return row


def _model(transaction: Transaction, name: str) -> Row[Any] | None:
    return transaction.row(_MODEL, {"folded_name": name.lower()})


def _first(transaction: Transaction, model: Row[Any], reference: Reference) -> Row[Any]:
    """The version before any step back."""
    values: dict[str, Any] = {"of": model.id}
    query = _NEWEST
    if reference.number is not None:
        query, values["numbered"] = _NUMBERED, reference.number
    elif reference.alias is not None:
        query, values["named"] = _NAMED, reference.alias
    elif reference.digest is not None:
        values["whole"] = _whole_digest(transaction, model.id, reference)
        query = _WITH_DIGEST
    row = transaction.row(query, values)
    if row is None:
        raise _not_there(reference)
    return row


def _whole_digest(transaction: Transaction, model: int, reference: Reference) -> str | None:
    """The one digest of the model's versions that a prefix begins, or None."""
    prefix = reference.digest or ""
    # In every collation "g" comes after the digits of a digest, and a text after what begins it.
    begun = (versions.c.digest >= prefix) & (versions.c.digest < f"{prefix}g")
    query = select(versions.c.digest).where(versions.c.model == model, begun)
    first = transaction.row(query.order_by(versions.c.digest).limit(1))
    last = transaction.row(query.order_by(versions.c.digest.desc()).limit(1))
    if first is None or last is None or first.digest == last.digest:
        return first and str(first.digest)
    digests = [row.digest for row in transaction.rows(query.distinct())]
    shown = ", ".join(digest[:16] for digest in sorted(digests)[:4])
    raise UsageError(
        "ambiguous",
        f"{reference} has {len(digests)} matches: {shown}",
        hint="give more digits",
    )


def _not_there(reference: Reference) -> NotFoundError:
    if reference.alias is not None:
        return NotFoundError(
            "alias-missing",
            f'the model "{reference.model}" has no alias "{reference.alias}"',
            hint=f"run `ckpt log {reference.model}`, or use :{NEWEST}",
        )
    return _version_missing(str(reference))


def _version_missing(reference: str) -> NotFoundError:
    model = reference.partition("@")[0]
    return NotFoundError(
        "version-missing", f"there is no version {reference}", hint=f"run `ckpt log {model}`"
    )


def _said_in(table: Table, text: ColumnElement[Any], number: ColumnElement[Any]) -> Select[Any]:
    columns = table.c.version, table.c.name, text.label("text"), number.label("number")
    return select(literal(table.name).label("said_in"), *columns)


_ALL_SAID = union_all(
    _said_in(aliases, cast(null(), Text), cast(null(), Float)),
    _said_in(labels, labels.c.value, cast(null(), Float)),
    _said_in(metrics, metrics.c.special, metrics.c.value),
).subquery()
# ``(table, version, name, text, number)`` of all that is said of some versions, by name: one
# question, since each costs a way to the server and back.
_SAID = (
    select(_ALL_SAID)
    .where(_ALL_SAID.c.version.in_(bindparam("some", expanding=True)))
    .order_by(_ALL_SAID.c.name)
)


def _records(transaction: Transaction, rows: Sequence[Row[Any]]) -> list[Version]:
    ids = [row.id for row in rows]
    named: dict[int, list[str]] = {}
    labelled: dict[int, dict[str, str]] = {}
    measured: dict[int, dict[str, float]] = {}
    # By position: of many rows, looking each value up by its name would be most of the time.
    for some in batches(ids):
        said: Sequence[Any] = transaction.rows(_SAID, {"some": some})
        for table, version, name, text, number in said:
            if table == aliases.name:
                named.setdefault(version, []).append(name)
            elif table == labels.name:
                labelled.setdefault(version, {})[name] = text
            else:
                measured.setdefault(version, {})[name] = number if text is None else special(text)
    return [
        _record(row, measured.get(row.id, {}), labelled.get(row.id, {}), named.get(row.id, []))
        for row in rows
    ]


def _record(
    row: Row[Any],
    measured: Mapping[str, float],
    labelled: Mapping[str, str],
    named: Sequence[str],
) -> Version:
    return Version(
        model=row.model_name,
        number=row.number,
        digest=row.digest,
        document_digest=row.document,
        state=row.state,
        push=row.push,
        created_at=datetime.fromtimestamp(row.created_at / 1e6, UTC),
        nbytes=row.nbytes,
        new_bytes=row.new_bytes,
        step=row.step,
        run=row.run_name,
        parent=row.parent,
        metrics=measured,
        labels=labelled,
        aliases=tuple(named),
        message=row.message,
        author=row.author,
        environment=row.environment,
        proof=None if row.proof is None else Proof(row.proof, row.proof_reason),
    )


def special(text: str) -> float:
    """A metric that is no finite number."""
    if text not in ("nan", "inf", "-inf"):
        raise IntegrityError(
            "registry-damaged",
            f"a metric is {text!r}",
            hint="run `ckpt registry rebuild`, which reads the store",
        )
    return float(text)
