"""The ``FORMAT`` object: which format a store has, and its own id."""

from __future__ import annotations

import contextlib
import json
import uuid

from ckpt.core.errors import ConflictError, IntegrityError, StorageError
from ckpt.storage.store import Store

KEY = "FORMAT"
_FORMAT = 1


def read_identity(store: Store) -> str | None:
    """The store's id, or None when nothing was ever stored there.

    Raises:
        IntegrityError: ``store-format`` for a newer format, ``store-damaged``.
    """
    if store.size(KEY) is None:
        return None
    try:
        content = json.loads(store.get(KEY))
        found, identity = content["format"], str(uuid.UUID(content["store"]))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise IntegrityError(
            "store-damaged", f"{KEY} in {store.name} cannot be read", hint="restore it"
        ) from None
    if found != _FORMAT:
        raise IntegrityError(
            "store-format",
            f"{store.name} has format {found}, this ckpt reads {_FORMAT}",
            hint="run `pip install -U ckpt-registry`",
        )
    return identity


def ensure_identity(store: Store) -> str:
    """The store's id, given to it now if it has none; any number of processes may try at once."""
    known = read_identity(store)
    if known is not None:
        return known
    body = json.dumps({"format": _FORMAT, "store": str(uuid.uuid4())}, separators=(",", ":"))
    with contextlib.suppress(ConflictError):  # another process was first; its id holds
        store.put(KEY, body.encode())
    identity = read_identity(store)
    if identity is None:
        raise StorageError(
            "store-unfaithful",
            f"{KEY} in {store.name} is not there after it was written",
            hint="run it again; the server may not keep what S3 promises",
        )
    return identity
