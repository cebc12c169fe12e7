"""What a registry is made from: the version files and the events of a store, checked.

A file that lacks something would end a rebuild half-way, so it is found before the first row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from ckpt.storage.store import Store

# As wide as the columns that take it.
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Metrics = dict[str, float | Literal["nan", "inf", "-inf"]]


def has_versions(store: Store) -> bool:
    """Whether anything was ever acknowledged there."""
    return any(store.list("documents/")) or any(store.list("events/"))


class _Version(msgspec.Struct):
    document: dict[str, Any]
    environment: dict[str, Any]
    epoch: _Number
    counter: _Number
    push: str
    model: str
    number: _Number
    sequence: _Number
    digest: str
    document_digest: str
    parent: str | None
    run: str
    step: _Number | None
    metrics: _Metrics
    labels: dict[str, str]
    aliases: list[str]
    message: str | None
    author: str
    time: _Number
    nbytes: _Number
    new_bytes: _Number
    packs: list[str]
    proof: tuple[str, str | None] | None = None


class _Event(msgspec.Struct):
    id: str
    kind: str
    epoch: _Number
    counter: _Number
    author: str
    time: _Number


class _Act(_Event):
    """What was done to a model."""

    model: str
    sequence: _Number


class _Ending(_Act):
    push: str


class _Naming(_Act):
    push: str
    alias: str


class _Labelling(_Act):
    push: str
    metrics: _Metrics
    labels: dict[str, str]
    removed: list[str] = []


class _Policy(_Act):
    policy: list[str]


class _Death(_Event):
    key: str


_KINDS: Mapping[str, type[_Event]] = {
    "rm": _Ending,
    "prune": _Ending,
    "tag": _Naming,
    "untag": _Naming,
    "label": _Labelling,
    "policy": _Policy,
    "dead": _Death,
}


def read_version_file(body: bytes) -> dict[str, Any]:
    """What a version file says.

    Raises:
        msgspec.MsgspecError, RecursionError, ValueError: it is none.
    """
    return _checked(body, _Version)


def read_event(body: bytes) -> dict[str, Any]:
    """What an event says.

    Raises:
        msgspec.MsgspecError, RecursionError, ValueError: it is none.
    """
    event = _checked(body, _Event)
    msgspec.convert(event, _KINDS.get(event["kind"], _Act if "model" in event else _Event))
    return event


def _checked(body: bytes, kind: type[msgspec.Struct]) -> dict[str, Any]:
    said = msgspec.json.decode(body, type=dict[str, Any])
    msgspec.convert(said, kind)
    return said
