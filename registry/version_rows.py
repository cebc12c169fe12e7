"""Rows of versions: the statements that read them, and the frozen records made of them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    ColumnElement,
    CompoundSelect,
    Float,
    Row,
    Select,
    Table,
    Text,
    any_,
    bindparam,
    cast,
    func,
    literal,
    null,
    select,
    union_all,
)

from ckpt.core.errors import IntegrityError
from ckpt.core.records import Proof, Version
from ckpt.registry.engine import Transaction
from ckpt.registry.tables import aliases, labels, metrics, models, runs, versions

# What a record of a version is made of, in the order in which ``_record`` takes it.
VERSIONS = (
    select(
        versions.c.id,
        models.c.name.label("model_name"),
        versions.c.number,
        versions.c.digest,
        versions.c.document,
        versions.c.state,
        versions.c.push,
        versions.c.created_at,
        versions.c.nbytes,
        versions.c.new_bytes,
        versions.c.step,
        runs.c.name.label("run_name"),
        versions.c.parent,
        versions.c.message,
        versions.c.author,
        versions.c.environment,
        versions.c.proof,
        versions.c.proof_reason,
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


_ALIAS, _LABEL, _METRIC = range(3)


@cache
def _said(dialect: str) -> CompoundSelect[Any]:
    """``(kind, version, name, text, number)`` of all that is said of some versions: one question,
    since each costs a way to the server and back. The versions are one value, an array, so that
    the statement is the same for any number of them: it is made, and prepared, once."""

    def said(
        kind: int, table: Table, text: ColumnElement[Any], number: ColumnElement[Any]
    ) -> Select[Any]:
        some: Any
        if dialect == "sqlite":
            given = func.json_each(bindparam("some", type_=JSON)).table_valued("value")
            some = table.c.version.in_(select(given.c.value))
        else:
            some = table.c.version == any_(bindparam("some", type_=ARRAY(BigInteger)))
        columns = table.c.version, table.c.name, text.label("text"), number.label("number")
        return select(literal(kind).label("kind"), *columns).where(some)

    return union_all(
        said(_ALIAS, aliases, cast(null(), Text), cast(null(), Float)),
        said(_LABEL, labels, labels.c.value, cast(null(), Float)),
        said(_METRIC, metrics, metrics.c.special, metrics.c.value),
    )


_NAME = operator.itemgetter(2)
# Aliases, labels and metrics, each by name.
_About = tuple[list[str], dict[str, str], dict[str, float]]


def records_of(transaction: Transaction, rows: Sequence[Row[Any]]) -> list[Version]:
    """The versions of these rows, with all that is said of them."""
    # By position: of many rows, looking each value up by its name would be most of the time.
    about: dict[int, _About] = {row[0]: ([], {}, {}) for row in rows}
    statement = _said(transaction.connection.dialect.name)
    said: Sequence[Any] = transaction.rows(statement, {"some": [*about]})
    for kind, version, name, text, number in sorted(said, key=_NAME):
        named, labelled, measured = about[version]
        if kind == _ALIAS:
            named.append(name)
        elif kind == _LABEL:
            labelled[name] = text
        else:
            measured[name] = number if text is None else special(text)
    return [_record(row, about[row[0]]) for row in rows]


def _record(row: Sequence[Any], about: _About) -> Version:
    _, model, number, digest, document, state, push, created_at, *more = row
    nbytes, new_bytes, step, run, parent, message, author, environment, proof, reason = more
    named, labelled, measured = about
    return Version(
        model=model,
        number=number,
        digest=digest,
        document_digest=document,
        state=state,
        push=push,
        created_at=datetime.fromtimestamp(created_at / 1e6, UTC),
        nbytes=nbytes,
        new_bytes=new_bytes,
        step=step,
        run=run,
        parent=parent,
        metrics=measured,
        labels=labelled,
        aliases=tuple(named),
        message=message,
        author=author,
        environment=environment,
        proof=None if proof is None else Proof(proof, reason),
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
