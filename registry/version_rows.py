"""Rows of versions: the statements that read them, and the frozen records made of them."""

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
    literal,
    null,
    select,
    union_all,
)

from ckpt.core.errors import IntegrityError
from ckpt.core.records import Proof, Version
from ckpt.registry.engine import Transaction, batches
from ckpt.registry.tables import aliases, labels, metrics, models, runs, versions

# All of a version but the facts, which only its document needs.
VERSIONS = (
    select(
        *(one for one in versions.c if one is not versions.c.facts),
        models.c.name.label("model_name"),
        runs.c.name.label("run_name"),
    )
    .join(models, models.c.id == versions.c.model)
    .join(runs, runs.c.id == versions.c.run)
)
# What is asked at every call is made once: to build a statement takes as long as to run it.
_named_model = models.alias("named_model")
MODEL_ID = (
    select(_named_model.c.id)
    .where(_named_model.c.folded == bindparam("folded_name"))
    .scalar_subquery()
)
OF_MODEL = versions.c.model == MODEL_ID
NEWEST_FIRST = VERSIONS.where(OF_MODEL).order_by(versions.c.number.desc())
NEWEST_ONE = NEWEST_FIRST.limit(1)


def of_model(name: str) -> dict[str, Any]:
    """The values of a statement with ``OF_MODEL``; case is ignored."""
    return {"folded_name": name.lower()}


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


def records_of(transaction: Transaction, rows: Sequence[Row[Any]]) -> list[Version]:
    """The versions of these rows, with all that is said of them."""
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
