"""The parent's side of the child that unpickles: a checkpoint's document and its bytes, read
through pipes. Nothing is unpickled here, and torch is not imported.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from msgspec.structs import replace

from ckpt.core.documents import Document, Tensor, decode_document
from ckpt.core.dtypes import ITEM_SIZES
from ckpt.core.errors import (
    CkptError,
    ConflictError,
    IntegrityError,
    TrustError,
    UsageError,
    from_os_error,
)
from ckpt.core.printable import escape
from ckpt.core.tensors import TensorBytes, chunk_digests

_SECONDS = 300.0
# What the child may take beside the bytes of the checkpoint, and what may be left of it here.
_MEMORY_BYTES = 1 << 30
_DOCUMENT_BYTES = 128 << 20
_LINE_BYTES = 1 << 16
# The child's status when it was about to do what it never needs.
_FORBIDDEN = 9
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR", "LANG", "LC_ALL")
_ERRORS: dict[str, type[CkptError]] = {
    "trust": TrustError,
    "usage": UsageError,
    "integrity": IntegrityError,
}


class RemoteTensor:
    """The bytes of one tensor, which the child reads."""

    def __init__(self, unpickler: Unpickler, index: int, entry: Tensor) -> None:
        self.name = entry.name
        self.dtype = entry.dtype
        self.shape = entry.stored_shape
        self.nbytes = math.prod(self.shape) * ITEM_SIZES[entry.dtype]
        self._unpickler = unpickler
        self._index = index

    def read(self, offset: int, length: int) -> memoryview:
        return self._unpickler.read(self._index, offset, length)


@dataclass(frozen=True, slots=True)
class Unpickled:
    """A checkpoint as a document without digests, and its bytes; valid until the next one is
    opened by the same child. ``notes`` says what is lost of it."""

    path: Path
    document: Document
    sources: tuple[TensorBytes | None, ...]
    files: tuple[tuple[Path, tuple[int, int, int]], ...]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(source.nbytes for source in self.sources if source is not None)

    def with_digests(self) -> Document:
        """The document with the digests of all bytes, which are read for it."""
        tensors = tuple(
            entry if source is None else replace(entry, chunks=chunk_digests(source))
            for entry, source in zip(self.document.tensors, self.sources, strict=True)
        )
        return replace(self.document, tensors=tensors)

    def check_unchanged(self) -> None:
        """ConflictError ``file-changed`` when somebody wrote to the checkpoint meanwhile."""
        if _statuses(self.path) != self.files:
            raise ConflictError(
                "file-changed",
                f"{escape(str(self.path))} changed while it was read",
                hint="import it again when it is written completely",
            )


class Unpickler:
    """A child process that opens one checkpoint after the other; started when it is needed, and
    again after one that ended it. ``inherited`` are open files that it may name by
    ``/dev/fd``."""

    def __init__(self, inherited: Sequence[int] = ()) -> None:
        self._inherited = inherited
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def open(self, path: Path) -> Unpickled:
        """Open a checkpoint; what was open before can be read no more.

        Raises:
            TrustError: ``pickle-refused``; IntegrityError: ``checkpoint-damaged``; UsageError:
                ``cannot-store``; the message names the file.
        """
        files = _statuses(path)
        nbytes = sum(size for _, (size, _, _) in files)
        try:
            document, notes = self._document(path, nbytes)
            sources = tuple(
                RemoteTensor(self, index, entry) if entry.has_bytes else None
                for index, entry in enumerate(document.tensors)
            )
            opened = Unpickled(path, document, sources, files, notes)
            if opened.nbytes > 4 * nbytes:
                raise _damaged("its tensors are larger than the file")
        except CkptError as error:
            error.message = f"{escape(str(path))}: {error.message}"
            raise
        return opened

    def _document(self, path: Path, nbytes: int) -> tuple[Document, tuple[str, ...]]:
        with self._lock:
            process = self._running()
            timer = threading.Timer(_SECONDS, process.kill)
            timer.start()
            try:
                # Twice: a file is mapped once, and what it holds beside tensors may be read.
                self._ask("open", str(path.absolute()), 2 * nbytes + _MEMORY_BYTES)
                answer = self._answer()
                if "failed" in answer:
                    kind, code, message, hint = answer["failed"]
                    said = None if hint is None else escape(str(hint), 1000)
                    raise _ERRORS[kind](str(code), escape(str(message), 4000), hint=said)
                if not 0 < answer["document"] <= _DOCUMENT_BYTES:
                    raise _damaged("it holds too many values")
                notes = tuple(escape(str(note), 1000) for note in answer["notes"])
                document = decode_document(bytes(self._exactly(answer["document"])))
            except (IndexError, KeyError, TypeError, ValueError) as error:
                raise _damaged(f"it was answered with {error!r}") from None
            finally:
                timer.cancel()
        if document.state != "values" or document.modules or document.classes:
            raise _damaged("it is no state of plain values")
        return document, notes

    def read(self, index: int, offset: int, length: int) -> memoryview:
        """Bytes of one tensor of the checkpoint that is open; called from several threads."""
        with self._lock:
            self._ask("read", index, offset, length)
            return self._exactly(length)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = _start(self._inherited)
        return self._process

    def _ask(self, *request: str | int) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended; the missing answer tells why
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline(_LINE_BYTES)
        if not line.endswith(b"\n"):
            raise self._ended()
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise TypeError(type(answer).__name__)
        return answer

    def _exactly(self, length: int) -> memoryview:
        assert self._process is not None
        assert self._process.stdout is not None
        body = self._process.stdout.read(length)
        if len(body) != length:
            raise self._ended()
        return memoryview(body)

    def _ended(self) -> CkptError:
        """Why there is no answer."""
        assert self._process is not None
        self._process.kill()
        status = self._process.wait()
        if status == _FORBIDDEN:
            return TrustError(
                "pickle-refused",
                "reading it began to do what reading never needs, and was stopped there",
                hint="do not load it",
            )
        return _damaged(f"the process that read it ended with status {status}")

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _start(inherited: Sequence[int]) -> subprocess.Popen[bytes]:
    """A child with this interpreter's search path, and nothing of its environment that could be
    a secret or change how torch reads."""
    path = [os.path.abspath(entry) for entry in sys.path if entry]
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "ckpt.loader.unpickle"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment | {"PYTHONPATH": os.pathsep.join(path), "CUDA_VISIBLE_DEVICES": ""},
        pass_fds=inherited,
    )


def _statuses(path: Path) -> tuple[tuple[Path, tuple[int, int, int]], ...]:
    """Size, time and identity of a file, or of each file in a folder."""
    try:
        inside = path.iterdir() if path.is_dir() else [path]
        places = sorted(place for place in inside if not place.is_dir())
        found = [(place, os.stat(place)) for place in places]
    except OSError as error:
        raise from_os_error(error, f"reading {path}") from error
    irregular = [place for place, status in found if not stat.S_ISREG(status.st_mode)]
    if irregular:
        raise UsageError(
            "not-a-file", f"{escape(str(irregular[0]))} is not a file", hint="give another"
        )
    return tuple((place, (s.st_size, s.st_mtime_ns, s.st_ino)) for place, s in found)


def _damaged(reason: str) -> IntegrityError:
    return IntegrityError(
        "checkpoint-damaged",
        f"it cannot be read: {escape(reason, 300)}",
        hint="look for a better copy",
    )
