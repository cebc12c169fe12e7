"""References resolved: which row of a version is meant, and what is said when there is none."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, bindparam, select

from ckpt.core.errors import NotFoundError, UsageError
from ckpt.core.names import NEWEST
from ckpt.core.references import Reference, parse_reference
from ckpt.registry.engine import Transaction
from ckpt.registry.tables import aliases, models, versions
from ckpt.registry.version_rows import NEWEST_FIRST, NEWEST_ONE, VERSIONS

_NUMBERED = VERSIONS.where(
    versions.c.model == bindparam("of"), versions.c.number == bindparam("numbered")
)
_NAMED = VERSIONS.where(
    versions.c.id
    == select(aliases.c.version)
    .where(aliases.c.model == bindparam("of"), aliases.c.name == bindparam("named"))
    .scalar_subquery()
)
_WITH_DIGEST = NEWEST_FIRST.where(versions.c.digest == bindparam("whole")).limit(1)
_MODEL = select(models).where(models.c.folded == bindparam("folded_name"))


def resolve(transaction: Transaction, reference: Reference) -> Row[Any]:
    """The row of the version that a reference means."""
    row = _first(transaction, required_model(transaction, reference.model), reference)
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
    row = find_model(transaction, name)
    if row is None:
        raise NotFoundError(
            "model-missing", f'there is no model "{name}"', hint="run `ckpt ls` to see all"
        )
    return row


def find_model(transaction: Transaction, name: str) -> Row[Any] | None:
    """The row of the model that has this name when case is ignored, or None."""
    return transaction.row(_MODEL, {"folded_name": name.lower()})


def _first(transaction: Transaction, model: Row[Any], reference: Reference) -> Row[Any]:
    """The version before any step back."""
    values: dict[str, Any] = {"of": model.id}
    query = NEWEST_ONE
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
    return version_missing(str(reference))


def version_missing(reference: str) -> NotFoundError:
    """The error for a version that is not there."""
    model = reference.partition("@")[0]
    return NotFoundError(
        "version-missing", f"there is no version {reference}", hint=f"run `ckpt log {model}`"
    )
