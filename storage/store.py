"""The ``Store`` interface: what ckpt asks of a place that keeps bytes by key."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Self

from ckpt.core.errors import ConflictError, IntegrityError, UsageError
from ckpt.core.printable import escape

_ABANDONED_SECONDS = 86400
_KEY = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]*/)*[A-Za-z0-9_-][A-Za-z0-9._-]*\Z")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as a listing shows it; ``modified`` is in seconds since 1970, the store's clock."""

    key: str
    size: int
    modified: float


class Upload(ABC):
    """One object that is being written. Invisible until published; leaving the context without
    ``publish`` removes every trace of it."""

    @abstractmethod
    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put ``data`` at ``offset``. Any order, from several threads; ranges never overlap."""

    @abstractmethod
    def publish(self, size: int) -> None:
        """Make the object of ``size`` bytes durable, then visible, then check its size.

        All bytes up to ``size`` have been written. When this returns, the object survives a
        crash. A key that exists already is a :class:`ConflictError`.
        """

    @abstractmethod
    def abort(self) -> None:
        """Remove what was written; harmless after ``publish`` and when repeated."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()


class Store(ABC):
    """Bytes by key. An object appears whole and durable, never changes, and may be deleted.

    Keys match ``[A-Za-z0-9_-][A-Za-z0-9._-]*`` between slashes; anything else is a UsageError.
    Every method may be called from any thread. Failures of the system are typed: AccessError,
    SpaceError, StorageError.
    """

    is_near: ClassVar[bool] = False  # whether reading costs no more than computing

    @property
    @abstractmethod
    def name(self) -> str:
        """The place, printable, without secrets."""

    @abstractmethod
    def create(self, key: str) -> Upload:
        """Begin to write the object ``key``, which only one push ever writes."""

    @abstractmethod
    def put(self, key: str, body: bytes) -> None:
        """Write a small object whole, durably. A key that holds the same bytes counts as
        written; other bytes are a ConflictError ``object-differs`` and stay as they are."""

    @abstractmethod
    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset`` of the object; IntegrityError ``object-missing`` or
        ``object-short`` when it is not there or ends too early."""

    def map(self, key: str) -> memoryview | None:
        """The object's bytes where they lie, as memory of the caller's own: what it writes there
        nobody else sees. None where there is no such object, or no such memory."""
        return None

    @abstractmethod
    def size(self, key: str) -> int | None:
        """The object's exact size in bytes, or None when there is no such object."""

    @abstractmethod
    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key begins with ``prefix`` and is greater than ``after``, sorted by key;
        never one that is being written."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; one that is absent is fine."""

    @abstractmethod
    def check_room(self, nbytes: int) -> None:
        """SpaceError ``no-space`` when ``nbytes`` more surely do not fit."""

    @abstractmethod
    def discard_unfinished(self, is_over: Callable[[str], bool | None]) -> None:
        """Remove what writers that died left of objects that never appeared; ``is_over`` says of
        a push whether it ended, or None where nobody knows it: then a day must have passed."""

    def close(self) -> None:  # noqa: B027 -- most stores hold nothing open
        """End what the store holds open; it cannot be used afterwards."""

    def get(self, key: str) -> bytes:
        """The whole of a small object; IntegrityError ``object-missing`` when absent."""
        size = self.size(key)
        if size is None:
            raise missing(self, key)
        body = bytearray(size)
        self.read_into(key, 0, memoryview(body))
        return bytes(body)


def is_abandoned(is_over: bool | None, since: float) -> bool:
    """Whether what was begun, or written last, at ``since`` has no writer any more. Nothing unfinished was
    ever acknowledged: whoever still writes it after a day is refused, and can begin again."""
    if is_over is None:
        return time.time() - since > _ABANDONED_SECONDS
    return is_over


def check_key(key: str) -> str:
    """Return ``key`` if it is one, so that no key ever leaves the store."""
    if not _KEY.match(key):
        raise UsageError("key-invalid", f'"{escape(key, 80)}" is not a key of a store')
    return key


def missing(store: Store, key: str) -> IntegrityError:
    """The error for an object that should be there."""
    return IntegrityError(
        "object-missing", f"{key} is missing in {store.name}", hint="run `ckpt fsck`"
    )


def short(store: Store, key: str, needed: int) -> IntegrityError:
    """The error for an object that ends before byte ``needed``."""
    return IntegrityError(
        "object-short", f"{key} in {store.name} ends before byte {needed}", hint="run `ckpt fsck`"
    )


def differs(store: Store, key: str) -> ConflictError:
    """The error for a key that holds other bytes than it must."""
    return ConflictError(
        "object-differs",
        f"{key} in {store.name} exists and holds other bytes",
        hint="another registry may be using this store; run `ckpt doctor`",
    )
