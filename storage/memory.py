"""A store in memory, for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from ckpt.core.errors import StorageError
from ckpt.storage.store import ObjectInfo, Store, Upload, check_key, differs, missing, short


class MemoryStore(Store):
    """Objects in a dict; gone with the process."""

    is_near = True

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.lock = threading.Lock()

    @property
    def name(self) -> str:
        return "memory"

    def create(self, key: str) -> Upload:
        return _MemoryUpload(self, check_key(key))

    def put(self, key: str, body: bytes) -> None:
        if not self.add(check_key(key), body) and self.objects[key][0] != body:
            raise differs(self, key)

    def add(self, key: str, body: bytes) -> bool:
        """Keep ``body`` under ``key``; False when the key is taken."""
        with self.lock:
            if key in self.objects:
                return False
            self.objects[key] = (body, time.time())
            return True

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        if check_key(key) not in self.objects:
            raise missing(self, key)
        part = self.objects[key][0][offset : offset + len(view)]
        if len(part) < len(view):
            raise short(self, key, offset + len(view))
        view[:] = part

    def size(self, key: str) -> int | None:
        found = self.objects.get(check_key(key))
        return None if found is None else len(found[0])

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        for key, (body, modified) in sorted(self.objects.items()):
            if key.startswith(prefix) and key > after:
                yield ObjectInfo(key, len(body), modified)

    def delete(self, key: str) -> None:
        self.objects.pop(check_key(key), None)

    def discard_unfinished(self, is_over: Callable[[str], bool | None]) -> None:
        pass  # nothing outlives its writer here

    def check_room(self, nbytes: int) -> None:
        """Memory has no limit that could be asked for."""


class _MemoryUpload(Upload):
    def __init__(self, store: MemoryStore, key: str) -> None:
        self._store = store
        self._key = key
        self._body = bytearray()
        self._lock = threading.Lock()

    def write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        end = offset + len(view)
        with self._lock:
            self._body.extend(bytes(max(0, end - len(self._body))))
            self._body[offset:end] = view

    def publish(self, size: int) -> None:
        if len(self._body) != size:
            raise StorageError("io", f"{self._key} was not written completely")
        if not self._store.add(self._key, bytes(self._body)):
            raise differs(self._store, self._key)

    def abort(self) -> None:
        self._body = bytearray()
