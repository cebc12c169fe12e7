"""A store in a folder of a local disk: temporary file, fsync, publish by link, fsync the folder."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ckpt.core.effects import perform
from ckpt.core.errors import StorageError, from_os_error, no_room
from ckpt.storage.direct import BLOCK, DirectFile
from ckpt.storage.read_ahead import read_ahead
from ckpt.storage.store import (
    ObjectInfo,
    Store,
    Upload,
    check_key,
    differs,
    is_abandoned,
    missing,
    short,
)

_TEMPORARY = ".tmp"
# What a file system says that has no hard links, or none for this file.
NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})


class LocalStore(Store):
    """Objects as read-only files below ``root``, which is made on the first write."""

    is_near = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self._durable: set[Path] = set()

    @property
    def name(self) -> str:
        return str(self.root)

    def create(self, key: str) -> Upload:
        with _typed(f"writing {key} in {self.root}"):
            return _LocalUpload(self, key)

    def put(self, key: str, body: bytes) -> None:
        with _typed(f"writing {key} in {self.root}"):
            if self.size(key) is None:
                with _LocalUpload(self, key) as upload:
                    upload.write(0, body)
                    upload.link(len(body))
            if self.size(key) != len(body) or self.get(key) != body:
                raise differs(self, key)
            # Also when the key was there: whoever wrote it may not have synced its name yet.
            sync_folder(self.path(key).parent)

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        with _typed(f"reading {key} in {self.root}"):
            try:
                handle = perform("open", os.open, self.path(key), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise missing(self, key) from None
            try:
                read_ahead(handle, offset, len(view))
                done = 0
                while done < len(view):
                    count = perform("read", os.preadv, handle, [view[done:]], offset + done)
                    if not count:
                        raise short(self, key, offset + len(view))
                    done += count
            finally:
                os.close(handle)

    def map(self, key: str) -> memoryview | None:
        try:
            handle = perform("open", os.open, self.path(key), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # what is wrong, an ordinary read tells
            return None
        try:
            pages = perform("map", mmap.mmap, handle, 0, access=mmap.ACCESS_COPY)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without them
                    pages.madvise(mmap.MADV_HUGEPAGE)
            return memoryview(pages)
        except (OSError, ValueError):  # no memory for so much, or nothing in it
            return None
        finally:
            os.close(handle)

    def size(self, key: str) -> int | None:
        with _typed(f"looking at {key} in {self.root}"):
            try:
                return perform("stat", os.stat, self.path(key), follow_symlinks=False).st_size
            except (FileNotFoundError, NotADirectoryError):
                return None

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        start = prefix.rpartition("/")[0]
        with _typed(f"listing {prefix} in {self.root}"):
            yield from self._walk(f"{start}/" if start else "", prefix, after)

    def _walk(self, folder: str, prefix: str, after: str) -> Iterator[ObjectInfo]:
        try:
            with perform("list", os.scandir, self.root / folder) as entries:
                found = [(entry.name, entry) for entry in entries if entry.name != _TEMPORARY]
        except (FileNotFoundError, NotADirectoryError):
            return
        # A folder sorts as its keys do: with the slash that follows it.
        named = [(f"{name}/" if entry.is_dir() else name, entry) for name, entry in found]
        for name, entry in sorted(named, key=lambda pair: pair[0]):
            key = folder + name
            if name.endswith("/"):
                if (key.startswith(prefix) or prefix.startswith(key)) and not after > f"{key}\x7f":
                    yield from self._walk(key, prefix, after)
            elif key.startswith(prefix) and key > after:
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # a collector took it meanwhile
                    continue
                yield ObjectInfo(key, status.st_size, status.st_mtime)

    def delete(self, key: str) -> None:
        path = self.path(key)
        with _typed(f"deleting {key} in {self.root}"):
            try:
                perform("unlink", os.unlink, path)
            except FileNotFoundError:
                return
            sync_folder(path.parent)

    def discard_unfinished(self, is_over: Callable[[str], bool | None]) -> None:
        folder = self.root / _TEMPORARY
        with _typed(f"tidying {folder}"):
            try:
                entries = perform("list", os.listdir, folder)
            except FileNotFoundError:
                return
            for name in sorted(entries):
                path = folder / name
                with contextlib.suppress(FileNotFoundError):  # its writer lives, and was faster
                    # A pack's name begins with its push.
                    modified = path.stat().st_mtime
                    if is_abandoned(is_over(name.partition("-")[0]), modified):
                        perform("unlink", os.unlink, path)

    def check_room(self, nbytes: int) -> None:
        with _typed(f"looking at {self.root}"):
            folder = next(path for path in (self.root, *self.root.parents) if path.exists())
            free = perform("statvfs", shutil.disk_usage, folder).free
        if nbytes > free:
            raise no_room(self.name, nbytes, free)

    def path(self, key: str) -> Path:
        """Where the object lies."""
        return self.root / check_key(key)

    def make_folder(self, folder: Path) -> None:
        """Make ``folder`` and its parents; the names of all of them are durable afterwards."""
        if folder in self._durable:
            return
        above = folder.parent
        if folder != self.root:
            self.make_folder(above)
        elif not above.exists():
            missing = [path for path in (above, *above.parents) if not path.exists()]
            perform("mkdir", above.mkdir, parents=True, exist_ok=True)
            for path in missing:
                sync_folder(path.parent)
        with contextlib.suppress(FileExistsError):
            perform("mkdir", os.mkdir, folder)
        # Even a folder that was there: another process may have made it a moment ago.
        sync_folder(above)
        self._durable.add(folder)


class _LocalUpload(Upload):
    """A file in ``.tmp`` that no other writer shares, until it gets its name."""

    def __init__(self, store: LocalStore, key: str) -> None:
        self._store = store
        self._key = key
        self._final = store.path(key)
        store.make_folder(store.root / _TEMPORARY)
        store.make_folder(self._final.parent)
        name = f"{self._final.name}.{secrets.token_hex(8)}"
        self._path: Path | None = store.root / _TEMPORARY / name
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._handle = perform("create", os.open, self._path, flags, 0o600)
        except BaseException:  # the file may have been made all the same
            with contextlib.suppress(OSError):
                perform("unlink", os.unlink, self._path)
            raise
        self._direct = DirectFile(self._path)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        first = -offset % BLOCK
        with _typed(f"writing {self._key} in {self._store.root}"):
            done = self._direct.write(offset + first, view[first:])
            if done:
                self._write(offset, view[:first])
                view, offset = view[first + done :], offset + first + done
            self._write(offset, view)

    def _write(self, offset: int, view: memoryview) -> None:
        while view:
            count = perform("write", os.pwrite, self._handle, view, offset)
            view, offset = view[count:], offset + count

    def publish(self, size: int) -> None:
        with _typed(f"writing {self._key} in {self._store.root}"):
            if not self.link(size):
                raise differs(self._store, self._key)
            sync_folder(self._final.parent)
            if self._store.size(self._key) != size:
                raise short(self._store, self._key, size)

    def link(self, size: int) -> bool:
        """Sync the bytes and give them their name; False when the name is taken.

        A failed fsync is final: the kernel may have dropped the bytes, and a second fsync would
        succeed without them.
        """
        assert self._path is not None
        if os.fstat(self._handle).st_size != size:
            raise StorageError("io", f"{self._key} was not written completely")
        perform("fsync", os.fsync, self._handle)
        perform("chmod", os.fchmod, self._handle, 0o444)
        try:
            perform("link", os.link, self._path, self._final)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if self._final.exists():
                return False
            perform("rename", os.rename, self._path, self._final)
            self._path = None
        return True

    def abort(self) -> None:
        if self._handle < 0:
            return
        handle, self._handle = self._handle, -1
        path, self._path = self._path, None
        with _typed(f"removing a temporary file in {self._store.root}"):
            try:
                if path is not None:
                    with contextlib.suppress(FileNotFoundError):  # tidied away: its push is over
                        perform("unlink", os.unlink, path)
            finally:
                try:
                    self._direct.close()
                finally:
                    perform("close", os.close, handle)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        perform("fsync_folder", os.fsync, handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _typed(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise from_os_error(error, doing) from error
