"""Frozen records that pass between the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec


class PackState(StrEnum):
    """Whether a pack may be relied on; only a live one may."""

    LIVE = "live"
    CONDEMNED = "condemned"
    BROKEN = "broken"


class PushState(StrEnum):
    """The life of a push; one that is not open never opens again."""

    OPEN = "open"
    COMMITTED = "committed"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class Chunk:
    """Where the bytes of a chunk lie: ``length`` stored bytes from ``offset`` of a pack's file.

    ``codec`` None means that they are the raw bytes; ``base`` is the digest of the chunk that
    an encoded difference refers to.
    """

    digest: str
    pack: str
    offset: int
    length: int
    raw_length: int
    codec: str | None = None
    base: str | None = None


@dataclass(frozen=True, slots=True)
class Pack:
    """One safetensors file in the store; ``push`` wrote it. ``header`` is the digest of all bytes
    before its data."""

    id: str
    key: str
    size: int
    push: str
    state: PackState = PackState.LIVE
    header: str = ""


@dataclass(frozen=True, slots=True)
class FinishedPack:
    """A pack whose bytes are durable and whose size was checked, with its chunks."""

    pack: Pack
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Environment:
    """What a push ran on; ``digest`` is the BLAKE3 of the canonical ``body``."""

    digest: str
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Proof:
    """How the first push of a structure was proven to rebuild.

    ``kind`` is ``fresh`` (in another interpreter), ``in-process`` or ``none``; ``reason`` says why
    it is not the one before, or what was found beside.
    """

    kind: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushFacts:
    """What a push says about its version beside the document; ``structure`` is the digest of its
    structure without values, of a module."""

    model: str
    digest: str
    document_digest: str
    nbytes: int
    step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    message: str | None = None
    parent: str | None = None
    run: str = "main"
    author: str = ""
    structure: str | None = None
    proof: Proof | None = None


# No dataclass: a page of a hundred is made at once, each in a fifth of the time.
class Version(msgspec.Struct, frozen=True, kw_only=True):
    """One immutable pushed state. Two records are of the same version if ``push`` is equal.

    Attributes:
        digest: BLAKE3 (64 hex) of the weights and the structure.
        document_digest: BLAKE3 (64 hex) of the document.
        state: ``module``, ``values`` or ``files``: what was pushed.
        run: the training job that it belongs to.
        environment: digest of what it was pushed on; ``repo.environment(ref)`` has that.
        nbytes: bytes of all tensors, ties once.
        new_bytes: bytes that the push added to the store.
        push: id of the push, unique for ever; numbers are unique within a model.
        parent: reference of the parent, or None; it may belong to another model.
        proof: of a module, how it was proven to rebuild.
    """

    model: str
    number: int
    digest: str
    document_digest: str
    state: str
    push: str
    created_at: datetime
    nbytes: int
    new_bytes: int
    step: int | None = None
    run: str = "main"
    parent: str | None = None
    metrics: Mapping[str, float] = msgspec.field(default_factory=dict)
    labels: Mapping[str, str] = msgspec.field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    message: str | None = None
    author: str = ""
    environment: str = ""
    proof: Proof | None = None

    @property
    def reference(self) -> str:
        """``model@number``."""
        return f"{self.model}@{self.number}"

    def __str__(self) -> str:
        return self.reference


@dataclass(frozen=True, slots=True)
class Added:
    """What became of the bytes of one push: ``new`` are those of its packs, headers included.

    Of its tensors' bytes ``shared`` were in the store already, or came twice; those that were
    written are smaller by ``by_differences`` to earlier chunks, and ``by_coding`` alone.
    """

    new: int
    shared: int
    by_differences: int = 0
    by_coding: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A named line of versions, with its newest."""

    name: str
    versions: int
    newest: Version | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassUse:
    """A class or function as some versions found it; ``versions`` are references, oldest first."""

    reference: str
    package: str | None
    version: str | None
    source_digest: str | None
    versions: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One act in the history; ``said`` is what its kind says beside, with ``version``, the
    reference, where it is of one that is there."""

    id: str
    kind: str
    model: str | None
    author: str
    time: datetime
    said: Mapping[str, Any]

    @property
    def text(self) -> str:
        """``said`` in one line, without what is empty."""
        said = dict(self.said)
        version = said.pop("version", None)
        if version is None and "number" in said:  # of one that was removed
            version = f"{self.model}@{said['number']}"
        if version is not None:
            said.pop("push", None)
            said.pop("number", None)
        words = [] if version is None else [str(version)]
        for name, value in said.items():
            if isinstance(value, Mapping):
                words += [f"{key}={one}" for key, one in value.items()]
            elif isinstance(value, list):
                words += [f"{name}={','.join(map(str, value))}"] if value else []
            else:
                words.append(f"{name}={value}")
        return " ".join(words)


class Point(NamedTuple):
    """A metric of one version; ``value`` may be NaN or infinite."""

    number: int
    step: int | None
    run: str
    value: float


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric of a model's versions, oldest first. ``aliases`` are those of any of its versions, by
    number; ``rules`` are the saved ones for pruning the model."""

    model: str
    metric: str
    points: tuple[Point, ...]
    aliases: Mapping[int, tuple[str, ...]]
    rules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unneeded:
    """A pack that nobody needs now; ``condemned_at`` in microseconds since 1970, or None while it
    is live. ``explained`` says whether an act or an aborted push is why."""

    pack: Pack
    condemned_at: int | None
    explained: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of the packs of one version: ``unique`` go when it goes, ``shared`` stay."""

    reference: str
    push: str
    unique: int
    shared: int


@dataclass(frozen=True, slots=True)
class DeadKey:
    """A key that may be deleted once its event is in the store; ``epoch`` is the registry's."""

    key: str
    event: str
    epoch: int


@dataclass(frozen=True, slots=True)
class StoreCopy:
    """An object that the store must hold because a row says so: a document or an event."""

    id: str  # of the push that made the version, or of the event
    key: str
    body: bytes
    is_document: bool


@dataclass(frozen=True, slots=True)
class KnownCopy:
    """What a registry says of a document or an event: what to call it, where it is copied to, and
    whether it is noted to be there."""

    said: str
    key: str
    noted: bool
