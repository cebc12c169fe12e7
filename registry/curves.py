"""Reading one metric of a model's versions, without anything else that a version has."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, select

from ckpt.core.errors import NotFoundError
from ckpt.core.records import Curve, Point
from ckpt.registry.bodies import read_json
from ckpt.registry.engine import Database, Transaction, repeated
from ckpt.registry.resolving import require_model
from ckpt.registry.tables import aliases, metrics, models, policies, runs, versions
from ckpt.registry.version_rows import special

_SHOWN = 20


class Curves:
    """Metrics over the versions of a model; each answer is one snapshot."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @repeated
    def read(
        self, model: str, metric: str, before: int | None = None, limit: int | None = None
    ) -> Curve:
        """A metric of the versions that have it: of the ``limit`` newest of these, below number
        ``before``.

        Raises:
            NotFoundError: ``model-missing``; ``metric-missing`` when no version has it, naming
                those that there are.
        """
        with self._database.read() as transaction:
            name = require_model(transaction, model)
            known = select(models.c.id).where(models.c.name == name).scalar_subquery()
            mine = versions.c.model == known
            points = _points(transaction, mine, metric, before, limit)
            if not points:
                raise _metric_missing(transaction, name, metric, mine)
            held = _aliases(transaction, mine)
            rules = transaction.row(
                select(policies.c.body).join(models).where(models.c.name == name)
            )
        kept = () if rules is None else tuple(read_json(rules.body.encode()))
        return Curve(name, metric, tuple(reversed(points)), held, kept)


def _points(
    transaction: Transaction,
    mine: ColumnElement[bool],
    metric: str,
    before: int | None,
    limit: int | None,
) -> list[Point]:
    """Newest first."""
    below = [] if before is None else [versions.c.number < before]
    query = (
        select(versions.c.number, versions.c.step, runs.c.name, metrics.c.value, metrics.c.special)
        .join(metrics, (metrics.c.version == versions.c.id) & (metrics.c.name == metric))
        .join(runs, runs.c.id == versions.c.run)
        .where(mine, *below)
        .order_by(versions.c.number.desc())
        .limit(limit)
    )
    return [
        Point(
            row.number,
            row.step,
            row.name,
            row.value if row.special is None else special(row.special),
        )
        for row in transaction.rows(query)
    ]


def _aliases(transaction: Transaction, mine: ColumnElement[bool]) -> dict[int, tuple[str, ...]]:
    query = select(aliases.c.name, versions.c.number).join(
        versions, versions.c.id == aliases.c.version
    )
    held: dict[int, list[str]] = {}
    for row in transaction.rows(query.where(mine).order_by(aliases.c.name)):
        held.setdefault(row.number, []).append(row.name)
    return {number: tuple(names) for number, names in held.items()}


def _metric_missing(
    transaction: Transaction, model: str, metric: str, mine: ColumnElement[Any]
) -> NotFoundError:
    query = select(metrics.c.name).distinct().join(versions, versions.c.id == metrics.c.version)
    rows = transaction.rows(query.where(mine).order_by(metrics.c.name).limit(_SHOWN + 1))
    names = [row.name for row in rows]
    shown = ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
    return NotFoundError(
        "metric-missing",
        f'no version of {model} has a metric "{metric}"',
        hint=f"there are: {shown}" if names else "none of its versions has any metric",
    )
