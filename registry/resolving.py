"""References resolved: which row of a version is meant, and what is said when there is none."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, bindparam, select

from ckpt.core.errors import NotFoundError, UsageError
from ckpt.core.names import NEWEST
from ckpt.core.references import Reference, parse_reference
from ckpt.registry.engine import Transaction
from ckpt.registry.tables import aliases, models, versions
from ckpt.registry.version_rows import (
    MODEL_ID,
    NEWEST_FIRST,
    NEWEST_ONE,
    OF_MODEL,
    VERSIONS,
    of_model,
)

_NUMBERED = VERSIONS.where(OF_MODEL, versions.c.number == bindparam("numbered"))
_NAMED = VERSIONS.where(
    versions.c.id
    == select(aliases.c.version)
    .where(aliases.c.model == MODEL_ID, aliases.c.name == bindparam("named"))
    .scalar_subquery()
)
_WITH_DIGEST = NEWEST_FIRST.where(versions.c.digest == bindparam("whole")).limit(1)
MODEL = select(models).where(models.c.folded == bindparam("folded_name"))


def resolve(transaction: Transaction, reference: Reference) -> Row[Any]:
    """The row of the version that a reference means."""
    row = _first(transaction, reference)
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
    return str(required_model(transaction, name).name)


def required_model(transaction: Transaction, name: str) -> Row[Any]:
    """The row of a model; NotFoundError ``model-missing`` when there is none."""
    row = transaction.row(MODEL, of_model(name))
    if row is None:
        raise model_missing(name)
    return row


def model_missing(name: str) -> NotFoundError:
    """The error for a model that is not there."""
    return NotFoundError(
        "model-missing", f'there is no model "{name}"', hint="run `ckpt ls` to see all"
    )


def _first(transaction: Transaction, reference: Reference) -> Row[Any]:
    """The version before any step back."""
    values = of_model(reference.model)
    query = NEWEST_ONE
    if reference.number is not None:
        query, values["numbered"] = _NUMBERED, reference.number
    elif reference.alias is not None:
        query, values["named"] = _NAMED, reference.alias
    elif reference.digest is not None:
        values["whole"] = _whole_digest(transaction, reference)
        query = _WITH_DIGEST
    row = transaction.row(query, values)
    if row is None:
        required_model(transaction, reference.model)
        raise _not_there(reference)
    return row


def _whole_digest(transaction: Transaction, reference: Reference) -> str | None:
    """The one digest of the model's versions that a prefix begins, or None."""
    prefix = reference.digest or ""
    # In every collation "g" comes after the digits of a digest, and a text after what begins it.
    begun = (versions.c.digest >= prefix) & (versions.c.digest < f"{prefix}g")
    query, named = select(versions.c.digest).where(OF_MODEL, begun), of_model(reference.model)
    first = transaction.row(query.order_by(versions.c.digest).limit(1), named)
    last = transaction.row(query.order_by(versions.c.digest.desc()).limit(1), named)
    if first is None or last is None or first.digest == last.digest:
        return first and str(first.digest)
    digests = [row.digest for row in transaction.rows(query.distinct(), named)]
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
    return version_missing(str(reference))


def version_missing(reference: str) -> NotFoundError:
    """The error for a version that is not there."""
    model = reference.partition("@")[0]
    return NotFoundError(
        "version-missing", f"there is no version {reference}", hint=f"run `ckpt log {model}`"
    )
