"""Export: a version in the formats of other programs, read back before it gets its name."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from msgspec.structs import replace

from ckpt.core.digests import digest_of
from ckpt.core.documents import Document, identity_bytes
from ckpt.core.effects import perform
from ckpt.core.errors import (
    CkptError,
    ConflictError,
    IntegrityError,
    TrustError,
    UsageError,
    from_os_error,
)
from ckpt.core.printable import escape
from ckpt.core.records import Version
from ckpt.registry.registry import Registry
from ckpt.service.export import new_file
from ckpt.service.pull import pull_file, pull_state
from ckpt.service.safetensors_file import open_file
from ckpt.service.unpickling import Unpickler
from ckpt.service.upload import Progress
from ckpt.storage.local import sync_folder
from ckpt.storage.store import Store

ExportFormat = Literal["pt", "safetensors", "dcp", "hf"]

FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
_SUFFIXES: dict[str, ExportFormat] = {
    ".pt": "pt",
    ".pth": "pt",
    ".bin": "pt",
    ".ckpt": "pt",
    ".safetensors": "safetensors",
}


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written. ``exact`` says that importing it gives a version of the same digest;
    otherwise every tensor has the same bits, and something around them could not be carried."""

    version: Version
    path: Path
    format: ExportFormat
    exact: bool


def export_version(
    store: Store,
    registry: Registry,
    version: Version,
    destination: Path,
    form: ExportFormat | None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a version in a format; by default the one that the name of ``destination`` says.

    Raises:
        UsageError: ``cannot-export`` when the format cannot carry the state.
        ConflictError: ``exists``; SpaceError; IntegrityError: ``export-differs``.
    """
    document = registry.queries.document(version)
    chosen = form or _usual_format(document, destination)
    if (chosen == "hf") != (document.state == "files") and chosen in ("hf", "safetensors"):
        other = "hf" if document.state == "files" else "safetensors"
        raise _cannot(version, f"is no {chosen}", f"give --format {other}, pt or dcp")
    if chosen in ("hf", "safetensors"):
        pull_file(store, registry, version, destination, force=force, progress=progress)
        exact = chosen == "hf" or _is_same(document, destination)
        return Exported(version, destination, chosen, exact)
    state = pull_state(store, registry, version, "cpu", progress=progress)
    try:
        if chosen == "pt":
            digest = _write_file(version, state, destination, force)
        else:
            digest = _write_shards(version, state, destination)
    except OSError as error:
        raise from_os_error(error, f"writing {destination}") from error
    return Exported(version, destination, chosen, digest == version.digest)


def _usual_format(document: Document, destination: Path) -> ExportFormat:
    if destination.suffix.lower() in _SUFFIXES:
        return _SUFFIXES[destination.suffix.lower()]
    if document.state == "files":
        return "hf"
    raise UsageError(
        "no-format",
        f"the name {escape(destination.name, 80)} does not say in which format",
        hint=f"give --format {', '.join(FORMATS)}",
    )


def _is_same(document: Document, path: Path) -> bool:
    """Whether a file just written describes the state as the document does."""
    with open_file(path) as file:
        bare = [replace(entry, chunks=(), device="cpu") for entry in document.tensors]
        return file.root == document.root and list(file.tensors) == bare


def _write_file(version: Version, state: Any, destination: Path, force: bool) -> str:
    """Write a ``.pt`` file; returns the digest of what it holds."""
    from ckpt.loader.saving import UnwritableError, save_file, state_digest

    with new_file(destination, version.nbytes, force=force) as handle:
        try:
            with os.fdopen(os.dup(handle), "wb") as file:
                save_file(state, file)
        except UnwritableError as error:
            reason = f"is nothing that torch.save can write: {escape(str(error))}"
            raise _cannot(version, reason, "give --format safetensors") from error
        with _readable(version), Unpickler(inherited=(handle,)) as unpickler:
            written = unpickler.open(Path(f"/dev/fd/{handle}")).with_digests()
        digest = digest_of(identity_bytes(written))
        if digest != state_digest(state):
            raise _differs(version)
    return digest


def _write_shards(version: Version, state: Any, destination: Path) -> str:
    """Write a DCP folder; returns the digest of what it holds."""
    from ckpt.loader.saving import named_values

    if type(state) is not dict or not all(isinstance(key, str) for key in state):
        raise _cannot(version, "is no dict with names, as a DCP folder needs", "give --format pt")
    if os.path.lexists(destination):  # with force too: a folder is not replaced in one step
        raise ConflictError("exists", f"{escape(str(destination))} exists", hint="remove it first")
    temporary = destination.with_name(f".ckpt-{secrets.token_hex(8)}.tmp")
    perform("mkdir", os.mkdir, temporary)
    try:
        _save_shards(version, state, temporary)
        with _readable(version), Unpickler() as unpickler:
            written = unpickler.open(temporary).with_digests()
        found = {entry.name: (entry.dtype, entry.shape, entry.chunks) for entry in written.tensors}
        known = named_values(state)
        # A tensor that stands in a state twice may be one there.
        if not found.items() <= known.items() or {*found.values()} != {*known.values()}:
            raise _differs(version)
        sync_folder(temporary)
        perform("rename", os.rename, temporary, destination)
        sync_folder(destination.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return digest_of(identity_bytes(written))


def _save_shards(version: Version, state: dict[str, Any], folder: Path) -> None:
    from ckpt.loader.saving import UnwritableError, save_shards

    try:
        save_shards(state, folder)
    except UnwritableError as error:
        reason = f"is nothing that a DCP folder can hold: {escape(str(error))}"
        raise _cannot(version, reason, "give --format pt") from error


@contextmanager
def _readable(version: Version) -> Iterator[None]:
    """Say of what cannot be read back that it cannot be exported."""
    try:
        yield
    except (TrustError, UsageError, IntegrityError) as error:
        reason = error.message.partition(": ")[2] or error.message
        raise _cannot(
            version, f"cannot be carried by this format: {reason}", "pull it from Python"
        ) from None


def _cannot(version: Version, reason: str, hint: str) -> CkptError:
    return UsageError("cannot-export", f"{version.reference} {reason}", hint=hint)


def _differs(version: Version) -> IntegrityError:
    return IntegrityError(
        "export-differs",
        f"{version.reference} was written, but does not read back as it is; nothing is left of it",
        hint="pull it from Python, and report this",
    )
