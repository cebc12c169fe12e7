"""The child that unpickles, so that no other process has to: ``python -m ckpt.loader.unpickle``.

It reads requests from its standard input, one line of JSON each, and answers on its standard
output; it ends with its input. ``["open", path, bytes of memory]`` is answered by one line of JSON,
``{"document": length, "notes": [what its user should know]}`` and the document, or
``{"failed": [kind, code, message, hint]}``. Then ``["read", index, offset, length]`` is answered by
exactly these bytes of that tensor. Nothing is loaded whole: tensors stay in the mapped file until
they are read.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from ckpt.core.documents import encode_document
from ckpt.core.errors import CkptError, IntegrityError, TrustError, UsageError
from ckpt.core.printable import escape
from ckpt.loader.capture import Captured, capture
from ckpt.loader.dcp_shards import open_shards
from ckpt.loader.replica import drafted

# What torch says of a class that it refuses; the name stands first in each.
_REFUSED = re.compile(
    r"(?:Unsupported global: GLOBAL|Trying to load unsupported GLOBAL|Unsupported class) (\S+)"
    r"|execute unsupported code of function (\S+)|but got <class '([^']+)'>"
)
_DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
# Events of the audit hook that nothing here has a reason for, once everything is imported.
_FORBIDDEN = (
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.startfile",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.kill",
    "subprocess.",
    "socket.",
    "pty.",
    "shutil.",
    "ctypes.dlopen",
)
_VALUES = 10_000_000
_NOTES = 20  # more than anybody reads, and few enough for a line
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def open_checkpoint(path: Path) -> Captured:
    """What a checkpoint holds, described: a zip file of ``torch.save``, or a folder of
    ``torch.distributed.checkpoint``.

    Raises:
        TrustError: ``pickle-refused``, naming the class that is no plain value.
        IntegrityError: ``checkpoint-damaged``; UsageError: ``cannot-store``.
    """
    try:
        if path.is_dir():
            return open_shards(path)
        _check_zip(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _check_values(state)
        return capture(state)
    except CkptError:
        raise
    except RecursionError:
        raise damaged("it is nested too deeply") from None
    except _DAMAGED as error:
        raise _explained(error) from None


def damaged(reason: str) -> IntegrityError:
    """The error for a checkpoint that is not what it should be."""
    return IntegrityError(
        "checkpoint-damaged", f"it cannot be read: {reason}", hint="look for a better copy"
    )


def _check_zip(path: Path) -> None:
    """Refuse what is no archive as ``torch.save`` writes it. Its records are stored as they are
    and lie one after the other, so that nothing in it can unfold to more than the file."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise _refused_format("it is no zip archive, as torch.save has written since torch 1.6")
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise _refused_format("its records are compressed, which torch.save never does")
    if sum(record.file_size for record in records) > path.stat().st_size:
        raise damaged("its records are larger than the file")
    if any(record.filename.endswith("/constants.pkl") for record in records):
        raise _refused_format("it is a TorchScript archive, which is a program")


def _check_values(state: Any) -> None:
    """Refuse lists of lists of one list, which are few bytes and more values than time lasts."""
    waiting, count = [state], 0
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
        else:
            continue
        count += len(value)
        if count > _VALUES:
            raise damaged("it holds too many values, or one of them itself")


def _refused_format(reason: str) -> TrustError:
    return TrustError(
        "pickle-refused",
        reason,
        hint="load it yourself if you trust it, and push what you get: repo.push(state, model)",
    )


def _explained(error: BaseException) -> CkptError:
    """One line for what torch says in many."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return damaged("it asks for more memory than a checkpoint of its size needs")
    found = _REFUSED.search(str(error))
    if isinstance(error, pickle.UnpicklingError) and found is not None:
        name = escape(next(group for group in found.groups() if group).rstrip(".,"), 200)
        return _refused_format(f"it names {name}, which weights_only=True does not allow")
    said = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    first = said.strip().partition("\n")[0] or type(error).__name__
    return damaged(escape(first, 300))


class _Session:
    """What one parent asks for, answered in order."""

    def __init__(self, requests: BinaryIO, answers: BinaryIO) -> None:
        self._requests = requests
        self._answers = answers
        self._captured: Captured | None = None

    def serve(self) -> None:
        """Answer until there are no more requests."""
        for line in self._requests:
            match json.loads(line):
                case ["open", str(path), int(memory)]:
                    self._open(Path(path), memory)
                case ["read", int(index), int(offset), int(length)]:
                    assert self._captured is not None
                    source = self._captured.sources[index]
                    assert source is not None
                    self._answers.write(source.read(offset, length))
            self._answers.flush()

    def _open(self, path: Path, memory: int) -> None:
        self._captured = None  # what was open before gives its memory back first
        _limit_memory(memory)
        try:
            self._captured = open_checkpoint(path)
            body = encode_document(drafted(self._captured, digests=False))
        except CkptError as error:
            failed = [_kind(error), error.code, error.message, error.hint]
            self._answers.write(json.dumps({"failed": failed}).encode() + b"\n")
            return
        answer = {"document": len(body), "notes": _first(self._captured.notes)}
        self._answers.write(json.dumps(answer).encode() + b"\n" + body)


def _first(notes: Sequence[str]) -> list[str]:
    """The first notes, and how many more there are."""
    more = [f"{len(notes) - _NOTES} more like these"] if len(notes) > _NOTES else []
    return [escape(note, 1000) for note in notes[:_NOTES]] + more


def _kind(error: CkptError) -> str:
    if isinstance(error, TrustError):
        return "trust"
    return "usage" if isinstance(error, UsageError) else "integrity"


def _limit_memory(nbytes: int) -> None:
    """Let this process have so many bytes of memory and of private mappings more, as far as
    whoever started it lets it have them."""
    if sys.platform == "linux":  # elsewhere mappings do not count, or nothing does
        text = Path("/proc/self/statm").read_text()
        used = int(text.split()[5]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = used + nbytes
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def _forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """End this process when it is about to do what reading a checkpoint never needs."""
    if event == "open":
        flags = arguments[2]
        if isinstance(flags, int) and flags & _WRITING:
            _end(event)
    elif event.startswith(_FORBIDDEN):
        _end(event)


def _end(event: str) -> NoReturn:
    os.write(2, f"forbidden: {event}\n".encode())
    os._exit(9)


def main() -> None:
    """Answer one parent; whatever torch prints stays out of the answers."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.serialization.clear_safe_globals()
    sys.addaudithook(_forbid)
    _Session(sys.stdin.buffer, answers).serve()
    answers.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
