"""Finding the versions of a model by their metrics and steps, without reading the whole model.

One index leads, and what it gives is looked at row by row. It is that of a comparison which few
versions match, else that of the order, which ends with the limit; a condition of which the index
must not lead is written as a sum. The databases' own guesses would sort the whole model, or read
it, where their statistics are old or absent.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, func, literal, select

from ckpt.core.comparisons import Comparison
from ckpt.core.names import STEP
from ckpt.registry.engine import Transaction
from ckpt.registry.tables import metrics, versions

# So many versions are sorted at once. A comparison that more match meets one soon in any order.
FEW = 500

_COMPARED: Mapping[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    "=": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    ">": operator.gt,
}


def search(
    transaction: Transaction,
    query: Select[Any],
    model: Row[Any],
    where: Sequence[Comparison],
    order_by: str | None,
) -> Select[Any]:
    """``query``, which selects from the versions, narrowed to those of a model that every
    comparison matches, and ordered.

    Newest first, or by a metric or ``step``, those that lack it left out and equal ones by number;
    a ``-`` before the name turns all of that order round.
    """
    name = None if order_by is None else order_by.removeprefix("-")
    small = model.next_number <= FEW
    leading = None if small else _leading(transaction, model, where, name)
    if leading in (None, STEP):
        query = query.where(versions.c.model == model.id)
    else:
        query = query.join(metrics, metrics.c.version == versions.c.id)
        query = query.where(metrics.c.model == model.id, metrics.c.name == leading)
        query = query.where(metrics.c.value.is_not(None))
    for one in where:
        value = _value(one.name, leads=one.name == leading)
        query = query.where(_COMPARED[one.operator](value, one.value))
    if name is None:
        return query.order_by(versions.c.number.desc())
    value = _value(name, leads=name == leading)
    last = metrics.c.version if name == leading != STEP else versions.c.number
    order = [column.desc() if name != order_by else column.asc() for column in (value, last)]
    return query.where(value.is_not(None)).order_by(*order)


def _leading(
    transaction: Transaction, model: Row[Any], where: Sequence[Comparison], order: str | None
) -> str | None:
    """The name whose index leads; None is the number's."""
    for one in where:
        if one.operator == "!=":
            continue
        if one.name == STEP:
            query = select(literal(1)).where(versions.c.model == model.id)
            column: ColumnElement[Any] = versions.c.step
        else:
            mine = (metrics.c.model == model.id) & (metrics.c.name == one.name)
            query, column = select(literal(1)).where(mine), metrics.c.value
        found = query.where(_COMPARED[one.operator](column, one.value)).limit(FEW + 1).subquery()
        if transaction.run(select(func.count()).select_from(found)).scalar_one() <= FEW:
            return one.name
    return order


def _value(name: str, *, leads: bool) -> ColumnElement[Any]:
    if name == STEP:
        return versions.c.step if leads else versions.c.step + 0
    if leads:
        return metrics.c.value
    one = metrics.alias()
    mine = (one.c.version == versions.c.id) & (one.c.name == name)
    return select(one.c.value).where(mine).scalar_subquery()
