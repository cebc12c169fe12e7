"""Files that are pushed: a ``.safetensors`` file described from its header, any other as bytes;
without importing torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ckpt.core.documents import SafetensorsFile, Tensor, canonical
from ckpt.core.effects import perform
from ckpt.core.errors import ConflictError, IntegrityError, UsageError, from_os_error
from ckpt.core.tensors import TensorBytes
from ckpt.storage.header import Entry, Header, header_length, parse_header


@dataclass(frozen=True, slots=True)
class FileBytes:
    """The bytes of a file that is being pushed; without a handle it is opened for each read."""

    path: Path
    status: tuple[int, int, int]
    handle: int | None

    @property
    def size(self) -> int:
        """How many bytes there were when it was described."""
        return self.status[0]

    def read(self, offset: int, length: int) -> bytearray:
        """``length`` bytes from ``offset``."""
        data = bytearray(length)
        if self.handle is not None:
            _read(self.path, self.handle, offset, memoryview(data))
        else:
            with _opened(self.path) as handle:
                self._check(handle)  # it may be another file of the same name
                _read(self.path, handle, offset, memoryview(data))
        return data

    def check_unchanged(self) -> None:
        """ConflictError ``file-changed`` when somebody wrote to the file meanwhile."""
        if self.handle is not None:
            self._check(self.handle)
        else:
            with _opened(self.path) as handle:
                self._check(handle)

    def _check(self, handle: int) -> None:
        if _status(handle) != self.status:
            raise ConflictError(
                "file-changed",
                f"{self.path} changed while it was pushed",
                hint="push it again when it is written completely",
            )


class FileTensor:
    """The bytes of one tensor of a file."""

    def __init__(self, file: FileBytes, start: int, entry: Entry) -> None:
        self.name = entry.name
        self.dtype = entry.dtype
        self.shape = entry.shape
        self.nbytes = entry.nbytes
        self._file = file
        self._start = start + entry.start

    def read(self, offset: int, length: int) -> memoryview:
        return memoryview(self._file.read(self._start + offset, length))


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file that is being pushed, described."""

    tensors: tuple[Tensor, ...]
    sources: tuple[TensorBytes, ...]
    root: object
    header: SafetensorsFile | None
    file: FileBytes

    def check_unchanged(self) -> None:
        """ConflictError ``file-changed`` when somebody wrote to the file meanwhile."""
        self.file.check_unchanged()


@contextmanager
def open_file(path: Path, *, keep_open: bool = True) -> Iterator[OpenFile]:
    """Open a ``.safetensors`` file for a push, its header checked strictly.

    Args:
        keep_open: otherwise it is opened for each read, as a process may have few files open.

    Raises:
        NotFoundError, AccessError: the file cannot be read.
        IntegrityError: its header is refused; the message names the file.
    """
    with _bytes_of(path, keep_open) as file:
        yield _describe(file)


@contextmanager
def open_plain(path: Path, *, keep_open: bool = True) -> Iterator[OpenFile]:
    """Open any other file for a push, as one tensor of its bytes."""
    with _bytes_of(path, keep_open) as file:
        entry = Entry(path.name, "U8", (file.size,), 0, file.size)
        tensor = Tensor(name=path.name, dtype="uint8", shape=(file.size,), kind="file")
        yield OpenFile((tensor,), (FileTensor(file, 0, entry),), None, None, file)


@contextmanager
def _bytes_of(path: Path, keep_open: bool) -> Iterator[FileBytes]:
    with ExitStack() as stack:
        handle = stack.enter_context(_opened(path))
        status = _status(handle)
        if not keep_open:
            stack.close()
        yield FileBytes(path, status, handle if keep_open else None)


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


def _describe(file: FileBytes) -> OpenFile:
    try:
        header, first = _read_header(file)
    except IntegrityError as error:
        error.message = f"{file.path}: {error.message}"
        raise
    # The order in which a dict of these tensors would be captured: equal content, equal digest.
    entries = sorted(header.entries, key=lambda entry: canonical(entry.name))
    tensors = tuple(Tensor(name=e.name, dtype=e.dtype, shape=e.shape) for e in entries)
    return OpenFile(
        tensors,
        tuple(FileTensor(file, header.data_start, entry) for entry in entries),
        {"$dict": [[entry.name, {"$tensor": index}] for index, entry in enumerate(entries)]},
        SafetensorsFile(header=first),
        file,
    )


def _read_header(file: FileBytes) -> tuple[Header, bytes]:
    length = header_length(bytes(file.read(0, min(8, file.size))), file.size)
    whole = bytes(file.read(0, 8 + length))
    return parse_header(whole[8:], file.size), whole


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
