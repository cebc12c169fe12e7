"""What a disk may hold after the power fails: acts recorded, and the states built from them.

A file keeps what was written before its last ``fsync``, a folder the names that it had at its own
last one. Of everything later any part may be there: pages of a file whole, torn or not at all,
names made, replaced or removed independently of each other. SQLite's writes, syncs and deletions
are taken from its VFS, everything else from the seam of ``ckpt.core.effects``.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import itertools
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckpt.core.effects import observed

PAGE = 4096
SYNCS = ("fsync", "fsync_folder")
# They change nothing on the disk that SQLite's own acts do not tell.
_QUIET = ("sql", "sql.begin", "stat", "statvfs", "open", "read", "list")

ROOT = 0

# sqlite3.h
_OPEN_CREATE, _OPEN_MAIN_JOURNAL, _OPEN_WAL = 0x4, 0x800, 0x80000
_CLOSE, _WRITE, _TRUNCATE, _SYNC, _METHODS = 1, 3, 4, 5, 19

_Pointer = ctypes.c_void_p
_Integer = ctypes.c_int
_Long = ctypes.c_int64
_Open = ctypes.CFUNCTYPE(_Integer, _Pointer, _Pointer, _Pointer, _Integer, _Pointer)
_Delete = ctypes.CFUNCTYPE(_Integer, _Pointer, _Pointer, _Integer)
_Close = ctypes.CFUNCTYPE(_Integer, _Pointer)
_Write = ctypes.CFUNCTYPE(_Integer, _Pointer, _Pointer, _Integer, _Long)
_Truncate = ctypes.CFUNCTYPE(_Integer, _Pointer, _Long)
_Sync = ctypes.CFUNCTYPE(_Integer, _Pointer, _Integer)
Tree = dict[str, bytes | None]


@dataclass(frozen=True, slots=True)
class Write:
    """At most one page of a file."""

    thing: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Resize:
    """A file was cut to this size, or made with it."""

    thing: int
    size: int


@dataclass(frozen=True, slots=True)
class Name:
    """A name in the folder ``thing`` now means ``target``, or nothing; atomic by itself."""

    thing: int
    name: str
    target: int | None
    is_folder: bool = False


@dataclass(frozen=True, slots=True)
class Sync:
    """A file or folder is durable as it is."""

    thing: int


@dataclass(frozen=True, slots=True)
class Mark:
    """A step of the operation returned to its caller."""


Change = Write | Resize | Name
Act = Change | Sync | Mark


@dataclass(slots=True)
class Disk:
    """Files and folders by a number of their own, and the names in each folder."""

    files: dict[int, bytes] = field(default_factory=dict)
    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})

    def copy(self) -> Disk:
        return Disk(dict(self.files), {key: dict(names) for key, names in self.folders.items()})

    def apply(self, changes: Iterable[Change]) -> None:
        """All of them, in this order."""
        bodies: dict[int, bytearray] = {}
        for change in changes:
            if isinstance(change, Name):
                self._name(change)
                continue
            if change.thing not in bodies:
                bodies[change.thing] = bytearray(self.files.get(change.thing, b""))
            body = bodies[change.thing]
            if isinstance(change, Resize):
                del body[change.size :]
                body.extend(bytes(change.size - len(body)))
            else:
                body.extend(bytes(max(0, change.offset - len(body))))
                body[change.offset : change.offset + len(change.data)] = change.data
        self.files |= {thing: bytes(body) for thing, body in bodies.items()}

    def _name(self, change: Name) -> None:
        names = self.folders.setdefault(change.thing, {})
        if change.target is None:
            names.pop(change.name, None)
            return
        names[change.name] = change.target
        if change.is_folder:
            self.folders.setdefault(change.target, {})

    def tree(self) -> Tree:
        """What can be reached from the root: the bytes of a file by path, None for a folder."""
        found: Tree = {}
        waiting = [("", ROOT)]
        while waiting:
            prefix, folder = waiting.pop()
            for name, thing in self.folders.get(folder, {}).items():
                is_folder = thing in self.folders
                found[prefix + name] = None if is_folder else self.files.get(thing, b"")
                if is_folder:
                    waiting.append((f"{prefix}{name}/", thing))
        return found


class Recorder:
    """A hook that writes down what changes below ``root``, and what is synced.

    Syncs of a path that matches ``dropped`` do not happen. Nothing is really synced: the power
    does not fail.
    """

    def __init__(self, root: Path, dropped: str = "") -> None:
        self.base = Disk()
        self.acts: list[Act] = []
        self._root = root
        self._dropped = re.compile(dropped or r"\Z.")
        self._numbers = itertools.count(ROOT + 1)
        self._things: dict[int, int] = {root.stat().st_ino: ROOT}
        self._paths: dict[int, str] = {ROOT: "."}
        self._lock = threading.RLock()
        self._now = Disk()
        self._look(include_sqlite=True)
        self.base = self._now.copy()
        self.acts.clear()

    def __call__(self, kind: str, act: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        with self._lock:
            if kind in _QUIET:
                return act(*args)
            self._look()
            if kind in SYNCS:
                self._note_sync(os.fstat(args[0]).st_ino)
                return None
            try:
                return act(*args)
            finally:
                self._look()

    def record(self, steps: Sequence[Callable[[], object]]) -> None:
        """Do all steps, with a mark after each."""
        with observed(self), _observed_sqlite(self):
            for step in steps:
                step()
                with self._lock:
                    self._look()
                    self.acts.append(Mark())

    def opened(self, path: str) -> None:
        """SQLite has opened, and perhaps made, a file."""
        folder, name, thing = self._of_sqlite(path)
        if name not in self._now.folders[folder]:
            self._paths[thing] = name
            self._change(Resize(thing, 0))
            self._change(Name(folder, name, thing))

    def written(self, path: str, offset: int, data: bytes) -> None:
        _, _, thing = self._of_sqlite(path)
        for piece in _pieces(thing, offset, data):
            self._change(piece)

    def resized(self, path: str, size: int) -> None:
        self._change(Resize(self._of_sqlite(path)[2], size))

    def synced(self, path: str, *, with_folder: bool) -> None:
        folder, _, thing = self._of_sqlite(path)
        self.acts.append(Sync(thing))
        if with_folder:
            self.acts.append(Sync(folder))

    def deleted(self, path: str, *, with_folder: bool) -> None:
        found = Path(path)
        folder = self._things[found.parent.stat().st_ino]
        thing = self._now.folders[folder].get(found.name)
        if thing is not None:
            self._change(Name(folder, found.name, None))
            self._things = {ino: known for ino, known in self._things.items() if known != thing}
        if with_folder:
            self.acts.append(Sync(folder))

    def _of_sqlite(self, path: str) -> tuple[int, str, int]:
        self._look()  # for the folder that it lies in
        found = Path(path)
        folder = self._things[found.parent.stat().st_ino]
        return folder, found.name, self._thing(found.stat().st_ino)

    def _note_sync(self, ino: int) -> None:
        thing = self._things[ino]
        if not self._dropped.fullmatch(self._paths[thing]):
            self.acts.append(Sync(thing))

    def _thing(self, ino: int) -> int:
        if ino not in self._things:
            self._things[ino] = next(self._numbers)
        return self._things[ino]

    def _change(self, change: Change) -> None:
        self._now.apply([change])
        self.acts.append(change)

    def _look(self, *, include_sqlite: bool = False) -> None:
        """Compare the disk with what was last seen of it."""
        seen: set[int] = set()
        waiting = [(self._root, ROOT)]
        changes: list[Change] = []
        while waiting:
            path, folder = waiting.pop()
            seen.add(folder)
            before = dict(self._now.folders.get(folder, {}))
            there: dict[str, int] = {}
            folders: set[int | None] = set()
            for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
                if is_sqlite(entry.name) and not include_sqlite:
                    if entry.name in before:
                        there[entry.name] = before[entry.name]
                        seen.add(before[entry.name])
                    continue
                thing = there[entry.name] = self._thing(entry.inode())
                self._paths[thing] = os.path.relpath(entry.path, self._root)
                seen.add(thing)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((Path(entry.path), thing))
                    folders.add(thing)
                else:
                    changes += self._content(thing, Path(entry.path).read_bytes())
            changes += [
                Name(folder, name, there.get(name), is_folder=there.get(name) in folders)
                for name in sorted({*before, *there}, key=lambda name: (name not in there, name))
                if before.get(name) != there.get(name)
            ]
        for change in changes:
            self._change(change)
        self._things = {ino: thing for ino, thing in self._things.items() if thing in seen}

    def _content(self, thing: int, body: bytes) -> Iterator[Change]:
        before = self._now.files.get(thing)
        if before is None or len(body) < len(before):
            before = (before or b"")[: len(body)]
            yield Resize(thing, len(before))
        if before != body:
            for at in range(0, len(body), PAGE):
                if before[at : at + PAGE] != body[at : at + PAGE]:
                    yield Write(thing, at, body[at : at + PAGE])


def is_sqlite(name: str) -> bool:
    """Whether a file is SQLite's, so that nobody else may open and close it in this process."""
    return name.startswith("registry.db")


def _pieces(thing: int, offset: int, data: bytes) -> Iterator[Write]:
    """A write in pieces that each lie in one page."""
    at = 0
    while at < len(data):
        length = PAGE - (offset + at) % PAGE
        yield Write(thing, offset + at, data[at : at + length])
        at += length


class _Vfs(ctypes.Structure):
    """The first fields of ``struct sqlite3_vfs``."""

    _fields_ = (
        ("version", _Integer),
        ("file_size", _Integer),
        ("longest_path", _Integer),
        ("next", _Pointer),
        ("name", ctypes.c_char_p),
        ("data", _Pointer),
        ("open", _Open),
        ("delete", _Delete),
    )


class _Watch:
    """The functions that stand in for those of SQLite's VFS and of the files that it opens."""

    def __init__(self, vfs: _Vfs, listener: Recorder | None) -> None:
        self.listener = listener
        self.open_file = vfs.open
        self.delete_file = vfs.delete
        self._paths: dict[int, str] = {}
        self._new_journals: set[int] = set()
        self._methods: dict[int, tuple[Any, ...]] = {}  # by the address of SQLite's own
        self.open = _Open(self._open)
        self.delete = _Delete(self._delete)

    def _open(self, vfs: int, name: int | None, file: int, flags: int, answer: int) -> int:
        code: int = self.open_file(vfs, name, file, flags, answer)
        if code == 0 and name and self.listener is not None:
            path = self._paths[file] = ctypes.string_at(name).decode()
            if flags & _OPEN_CREATE and flags & (_OPEN_MAIN_JOURNAL | _OPEN_WAL):
                self._new_journals.add(file)
            place = ctypes.cast(file, ctypes.POINTER(_Pointer))
            place[0] = self._watched(place[0])
            self.listener.opened(path)
        return code

    def _watched(self, methods: int) -> int:
        """The address of a copy of a table of methods, with ours in it."""
        if methods not in self._methods:
            own = list((_Pointer * _METHODS).from_address(methods))
            table = (_Pointer * _METHODS)(*own)
            close = ctypes.cast(own[_CLOSE], _Close)
            write = ctypes.cast(own[_WRITE], _Write)
            truncate = ctypes.cast(own[_TRUNCATE], _Truncate)
            sync = ctypes.cast(own[_SYNC], _Sync)
            made: dict[int, Any] = {
                _CLOSE: _Close(lambda file: self._close(close, file)),
                _WRITE: _Write(lambda *given: self._write(write, *given)),
                _TRUNCATE: _Truncate(lambda *given: self._truncate(truncate, *given)),
                _SYNC: _Sync(lambda *given: self._sync(sync, *given)),
            }
            for slot, function in made.items():
                table[slot] = ctypes.cast(function, _Pointer)
            self._methods[methods] = (table, made)
        return ctypes.addressof(self._methods[methods][0])

    def _close(self, close: Any, file: int) -> int:
        self._paths.pop(file, None)
        self._new_journals.discard(file)
        return int(close(file))

    def _write(self, write: Any, file: int, data: int, length: int, offset: int) -> int:
        code = int(write(file, data, length, offset))
        if code == 0 and self.listener is not None:
            self.listener.written(self._paths[file], offset, ctypes.string_at(data, length))
        return code

    def _truncate(self, truncate: Any, file: int, size: int) -> int:
        code = int(truncate(file, size))
        if code == 0 and self.listener is not None:
            self.listener.resized(self._paths[file], size)
        return code

    def _sync(self, sync: Any, file: int, flags: int) -> int:
        code = int(sync(file, flags))
        if code == 0 and self.listener is not None:
            # os_unix.c: the first sync of a journal that it made syncs the folder as well.
            self.listener.synced(self._paths[file], with_folder=file in self._new_journals)
            self._new_journals.discard(file)
        return code

    def _delete(self, vfs: int, name: int, sync_folder: int) -> int:
        code: int = self.delete_file(vfs, name, sync_folder)
        if code == 0 and self.listener is not None:
            path = ctypes.string_at(name).decode()
            self.listener.deleted(path, with_folder=bool(sync_folder & 1))
        return code


_kept: list[_Watch] = []  # for connections that outlive the watch: their files still call it


@contextmanager
def _observed_sqlite(listener: Recorder) -> Iterator[None]:
    """Tell ``listener`` of every act on the files of connections that are opened meanwhile."""
    sqlite3.connect(":memory:").close()
    library = ctypes.CDLL(_sqlite3.__file__)
    library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
    vfs = library.sqlite3_vfs_find(None).contents
    watch = _Watch(_Vfs.from_buffer_copy(vfs), listener)
    _kept.append(watch)
    vfs.open, vfs.delete = watch.open, watch.delete
    try:
        yield
    finally:
        vfs.open, vfs.delete = watch.open_file, watch.delete_file
        watch.listener = None
