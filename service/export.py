"""A version as a ``.safetensors`` file: written beside its destination, checked, then named."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ckpt.core.documents import Tensor, canonical
from ckpt.core.dtypes import ITEM_SIZES, PACK_CODES
from ckpt.core.effects import perform
from ckpt.core.errors import (
    ConflictError,
    IntegrityError,
    NotFoundError,
    TrustError,
    from_os_error,
    no_room,
)
from ckpt.core.printable import escape, is_printable
from ckpt.service.fetch import Wanted, stored_size
from ckpt.storage.header import parse_header
from ckpt.storage.local import NO_LINKS, sync_folder


@dataclass(frozen=True, slots=True)
class FileSpace:
    """Room for one tensor in an open file; under several names it has several places."""

    handle: int
    starts: Sequence[int]

    def write(self, offset: int, data: memoryview) -> None:
        for start in self.starts:
            write_at(self.handle, start + offset, data)

    def view(self, offset: int, length: int) -> memoryview | None:
        return None


def write_at(handle: int, offset: int, data: memoryview | bytes) -> None:
    """Write all of ``data``; a disk may take it in parts."""
    view = memoryview(data)
    while view:
        count = perform("write", os.pwrite, handle, view, offset)
        view, offset = view[count:], offset + count


@contextmanager
def file_with(
    first: bytes,
    placed: Sequence[tuple[Tensor, Sequence[int]]],
    destination: Path,
    force: bool,
) -> Iterator[list[Wanted]]:
    """A new file with these first bytes, and what is wanted in it: each tensor at its places."""
    nbytes = sum(stored_size(tensor) * len(places) for tensor, places in placed)
    with new_file(destination, len(first) + nbytes, force=force) as handle:
        write_at(handle, 0, first)
        yield [
            Wanted(tensor.name, stored_size(tensor), tensor.chunks, FileSpace(handle, places))
            for tensor, places in placed
        ]


def file_header(
    first: bytes | None, tensors: Sequence[Tensor], path: Path
) -> tuple[bytes, list[int]]:
    """``(first bytes, start of each tensor)`` of a file that was pushed: its own header and where
    it puts each of ``tensors``, which are in the canonical order of their names; nothing and 0
    where the file had no header.

    Raises:
        IntegrityError: ``document-damaged``: the header and the tensors do not match.
    """
    if first is None:
        return b"", [0] * len(tensors)
    end = len(first) + sum(math.prod(t.shape) * ITEM_SIZES[t.dtype] for t in tensors)
    try:
        header = parse_header(first[8:], end)
    except IntegrityError as error:
        raise file_damaged(path, error.message) from None
    entries = sorted(header.entries, key=lambda entry: canonical(entry.name))
    if [(e.dtype, e.shape) for e in entries] != [(t.dtype, t.shape) for t in tensors]:
        raise file_damaged(path, "its header and its tensors do not match")
    return first, [header.data_start + entry.start for entry in entries]


def file_damaged(path: Path, reason: str) -> IntegrityError:
    """The error for a document by which a file cannot be written."""
    return IntegrityError(
        "document-damaged",
        f"the file {escape(path.name, 80)} cannot be written: {escape(reason)}",
        hint="run `ckpt fsck`",
    )


def made_header(tensors: Sequence[Tensor]) -> tuple[bytes, list[int]]:
    """``(first bytes, start of each tensor)`` of a new file with these tensors, by falling item
    size; a dtype that safetensors lacks becomes U8 with one more dimension."""
    order = sorted(range(len(tensors)), key=lambda place: -ITEM_SIZES[tensors[place].dtype])
    own = {tensor.name for tensor in tensors}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts = [0] * len(tensors)
    end = 0
    for place in order:
        tensor = tensors[place]
        name = tensor.name
        if name in header or not name or not is_printable(name):
            name = f"tensor-{place}"  # as in a pack: a header cannot carry every name
            while name in header or name in own:
                name += "-"
        shape = list(tensor.shape)
        if tensor.dtype not in PACK_CODES:
            shape.append(ITEM_SIZES[tensor.dtype])
        nbytes = math.prod(tensor.shape) * ITEM_SIZES[tensor.dtype]
        starts[place] = end
        header[name] = {
            "dtype": PACK_CODES.get(tensor.dtype, "U8"),
            "shape": shape,
            "data_offsets": [end, end + nbytes],
        }
        end += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text, [8 + len(text) + start for start in starts]


@contextmanager
def new_file(destination: Path, nbytes: int, *, force: bool) -> Iterator[int]:
    """A file that gets its name only when the block ends without an error; else it is removed.

    Raises:
        ConflictError: ``exists``; TrustError: ``symlink``; NotFoundError: ``no-folder``;
        SpaceError: ``no-space`` when ``nbytes`` do not fit.
    """
    # Not after the destination's own name, which may be as long as names can be.
    temporary = destination.with_name(f".ckpt-{secrets.token_hex(8)}.tmp")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        _check_destination(destination, force=force)
        _check_room(destination.parent, nbytes)
        handle = -1
        try:
            handle = perform("create", os.open, temporary, flags, 0o666)
            yield handle
            perform("fsync", os.fsync, handle)
            if force:
                perform("rename", os.replace, temporary, destination)
            else:
                _link(temporary, destination)
            sync_folder(destination.parent)
        finally:
            if handle >= 0:
                os.close(handle)
            with contextlib.suppress(FileNotFoundError):  # renamed, or never made
                perform("unlink", os.unlink, temporary)
    except FileExistsError:
        raise _exists(destination) from None
    except OSError as error:
        raise from_os_error(error, f"writing {destination}") from error


def _link(temporary: Path, destination: Path) -> None:
    """Give a file its name; FileExistsError when the name is taken."""
    try:
        perform("link", os.link, temporary, destination)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # Taken first: a rename alone would replace a file that got the name meanwhile.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(perform("create", os.open, destination, flags, 0o666))
        try:
            perform("rename", os.replace, temporary, destination)
        except BaseException:
            perform("unlink", os.unlink, destination)
            raise


def _check_destination(destination: Path, *, force: bool) -> None:
    if destination.is_symlink():
        raise TrustError(
            "symlink",
            f"{destination} is a symbolic link",
            hint="name the file that it points to, or another",
        )
    if destination.exists() and not force:
        raise _exists(destination)
    if destination.exists() and not destination.is_file():
        raise ConflictError(
            "exists", f"{destination} exists and is not a file", hint="give another name"
        )
    if not destination.parent.is_dir():
        raise NotFoundError(
            "no-folder", f"there is no folder {destination.parent}", hint="make it first"
        )


def _exists(destination: Path) -> ConflictError:
    return ConflictError(
        "exists", f"{destination} exists", hint="give another name, or --force to replace it"
    )


def _check_room(folder: Path, nbytes: int) -> None:
    free = perform("statvfs", shutil.disk_usage, folder).free
    if nbytes > free:
        raise no_room(str(folder), nbytes, free)
