"""Files that are pushed: a ``.safetensors`` file described from its header, any other as bytes;
without importing torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ckpt.core.documents import SafetensorsFile, Tensor, canonical
from ckpt.core.effects import perform
from ckpt.core.errors import ConflictError, IntegrityError, UsageError, from_os_error
from ckpt.core.tensors import TensorBytes
from ckpt.storage.header import Entry, Header, header_length, parse_header


class FileTensor:
    """The bytes of one tensor of an open file."""

    def __init__(self, path: Path, handle: int, start: int, entry: Entry) -> None:
        self.name = entry.name
        self.dtype = entry.dtype
        self.shape = entry.shape
        self.nbytes = entry.nbytes
        self._path = path
        self._handle = handle
        self._start = start + entry.start

    def read(self, offset: int, length: int) -> memoryview:
        data = bytearray(length)
        _read(self._path, self._handle, self._start + offset, memoryview(data))
        return memoryview(data)


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file that is being pushed, described."""

    tensors: tuple[Tensor, ...]
    sources: tuple[TensorBytes, ...]
    root: object
    header: SafetensorsFile | None
    path: Path
    handle: int
    status: tuple[int, int, int]

    def check_unchanged(self) -> None:
        """ConflictError ``file-changed`` when somebody wrote to the file meanwhile."""
        if _status(self.handle) != self.status:
            raise ConflictError(
                "file-changed",
                f"{self.path} changed while it was pushed",
                hint="push it again when it is written completely",
            )


@contextmanager
def open_file(path: Path) -> Iterator[OpenFile]:
    """Open a ``.safetensors`` file for a push, its header checked strictly.

    Raises:
        NotFoundError, AccessError: the file cannot be read.
        IntegrityError: its header is refused; the message names the file.
    """
    with _opened(path) as handle:
        yield _describe(path, handle)


@contextmanager
def open_plain(path: Path) -> Iterator[OpenFile]:
    """Open any other file for a push, as one tensor of its bytes."""
    with _opened(path) as handle:
        status = _status(handle)
        entry = Entry(path.name, "U8", (status[0],), 0, status[0])
        tensor = Tensor(name=path.name, dtype="uint8", shape=(status[0],), kind="file")
        sources = (FileTensor(path, handle, 0, entry),)
        yield OpenFile((tensor,), sources, None, None, path, handle, status)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The handle of a regular file."""
    try:
        # Without waiting for the other end, should it be a pipe.
        handle = perform("open", os.open, path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, f"reading {path}") from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UsageError(
                "not-a-file", f"{path} is not a file", hint="remove it, or give another"
            )
        yield handle
    finally:
        os.close(handle)


def _describe(path: Path, handle: int) -> OpenFile:
    status = _status(handle)
    try:
        header, first = _read_header(path, handle, status[0])
    except IntegrityError as error:
        error.message = f"{path}: {error.message}"
        raise
    # The order in which a dict of these tensors would be captured: equal content, equal digest.
    entries = sorted(header.entries, key=lambda entry: canonical(entry.name))
    tensors = tuple(Tensor(name=e.name, dtype=e.dtype, shape=e.shape) for e in entries)
    return OpenFile(
        tensors,
        tuple(FileTensor(path, handle, header.data_start, entry) for entry in entries),
        {"$dict": [[entry.name, {"$tensor": index}] for index, entry in enumerate(entries)]},
        SafetensorsFile(header=first),
        path,
        handle,
        status,
    )


def _read_header(path: Path, handle: int, size: int) -> tuple[Header, bytes]:
    first = bytearray(min(8, size))
    _read(path, handle, 0, memoryview(first))
    length = header_length(bytes(first), size)
    whole = bytearray(8 + length)
    _read(path, handle, 0, memoryview(whole))
    return parse_header(bytes(whole[8:]), size), bytes(whole)


def _read(path: Path, handle: int, offset: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        try:
            count = perform("read", os.preadv, handle, [view[done:]], offset + done)
        except OSError as error:
            raise from_os_error(error, f"reading {path}") from error
        if not count:
            raise ConflictError(
                "file-changed", f"{path} became shorter while it was pushed", hint="push it again"
            )
        done += count


def _status(handle: int) -> tuple[int, int, int]:
    status = os.fstat(handle)
    return status.st_size, status.st_mtime_ns, status.st_ino
