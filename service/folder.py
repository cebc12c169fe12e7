"""A folder as a state: its ``.safetensors`` files as tensors, every other file as opaque bytes.

This is how a Hugging Face folder is kept: weights, in shards or not, beside configuration and
tokenizer. Nothing in it is interpreted, and torch is not imported.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ckpt.core.documents import Document, File, Tensor, canonical
from ckpt.core.effects import perform
from ckpt.core.errors import ConflictError, UsageError, from_os_error
from ckpt.core.free_names import FreeNames
from ckpt.core.printable import escape
from ckpt.core.records import Version
from ckpt.core.tensors import TensorBytes
from ckpt.registry.registry import Registry
from ckpt.service.export import file_damaged, file_header, file_with
from ckpt.service.fetch import Wanted, fetch
from ckpt.service.safetensors_file import OpenFile, open_file, open_plain
from ckpt.service.upload import Progress
from ckpt.storage.chunks import Places
from ckpt.storage.local import sync_folder
from ckpt.storage.store import Store

# Of a folder at once: a process may often have no more than 256 files open.
_OPEN_FILES = 64


@dataclass(slots=True)
class OpenFolder:
    """A folder that is being pushed, described."""

    tensors: list[Tensor] = field(default_factory=list)
    sources: list[TensorBytes] = field(default_factory=list)
    files: dict[str, File] = field(default_factory=dict)
    opened: list[OpenFile] = field(default_factory=list)
    _names: FreeNames = field(default_factory=FreeNames)

    @property
    def root(self) -> Any:
        """The weights by name, in canonical order."""
        pairs = [
            [tensor.name, {"$tensor": index}]
            for index, tensor in enumerate(self.tensors)
            if tensor.kind != "file"
        ]
        return {"$dict": sorted(pairs, key=lambda pair: canonical(pair[0]))}

    def add(self, name: str, file: OpenFile) -> None:
        """Take one more file; tensors of one name get numbers, as in any captured state."""
        indices = []
        for tensor, source in zip(file.tensors, file.sources, strict=True):
            unique = self._names.take(tensor.name)
            indices.append(len(self.tensors))
            self.tensors.append(
                Tensor(name=unique, dtype=tensor.dtype, shape=tensor.shape, kind=tensor.kind)
            )
            self.sources.append(source)
        header = None if file.header is None else file.header.header
        self.files[name] = File(tensors=tuple(indices), header=header)
        self.opened.append(file)

    def check_unchanged(self) -> None:
        """ConflictError ``file-changed`` when somebody wrote to a file meanwhile."""
        for file in self.opened:
            file.check_unchanged()


@contextmanager
def open_folder(path: Path, kept: Iterable[Path]) -> Iterator[OpenFolder]:
    """Open every file below a folder for a push; hidden folders are left out. ``kept`` is where
    the repository itself keeps its registry and its store.

    Raises:
        UsageError: ``no-weights`` when there is no ``.safetensors`` file, ``not-a-file``,
            ``holds-repository`` when the repository itself lies in it.
        IntegrityError: a header is refused; the message names the file.
    """
    for place in kept:
        inside = Path(os.path.relpath(place.resolve(), path.resolve()))
        if not any(part.startswith(".") for part in inside.parts):  # ".." is outside
            raise UsageError(
                "holds-repository",
                f"{escape(str(path))} holds the repository's {escape(str(place))}",
                hint="push the folder of the weights alone",
            )
    names = list(_names(path))
    if not any(name.endswith(".safetensors") for name in names):
        raise UsageError(
            "no-weights",
            f"{escape(str(path))} has no .safetensors file",
            hint="give a folder with weights, such as one that save_pretrained wrote",
        )
    folder = OpenFolder()
    with ExitStack() as stack:
        for count, name in enumerate(names):
            opened = open_file if name.endswith(".safetensors") else open_plain
            file = opened(path / name, keep_open=count < _OPEN_FILES)
            folder.add(name, stack.enter_context(file))
        yield folder


def _names(path: Path) -> Iterator[str]:
    """The files below a folder, sorted, with slashes; a link to a file counts as the file."""

    def fail(error: OSError) -> None:
        raise from_os_error(error, f"reading {path}") from error

    for place, folders, files in os.walk(path, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if os.path.islink(os.path.join(place, name)):
                raise UsageError(
                    "not-a-file",
                    f"{escape(os.path.join(place, name))} is a link to a folder",
                    hint="copy the folder there, or remove the link",
                )
        for name in sorted(files):
            yield check_name((Path(place) / name).relative_to(path).as_posix())


def check_name(name: str) -> str:
    """Refuse what is no plain relative path: it would be written somewhere else."""
    path = PurePosixPath(name)
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") for part in parts) and "\0" not in name
    try:
        name.encode()
    except UnicodeEncodeError:
        plain = False
    if path.is_absolute() or not plain or "\\" in name:
        raise UsageError(
            "name-invalid", f'"{escape(name, 80)}" cannot be the name of a file', hint="rename it"
        )
    return name


def pull_folder(
    store: Store,
    registry: Registry,
    version: Version,
    document: Document,
    destination: Path,
    progress: Progress | None = None,
) -> None:
    """Write a pushed folder again, every file byte for byte; the folder appears when it is whole.

    Raises:
        ConflictError: ``exists``; SpaceError: ``no-space``; IntegrityError.
    """
    if os.path.lexists(destination):
        raise ConflictError(
            "exists", f"{escape(str(destination))} exists", hint="give another name"
        )
    for name in document.files:
        check_name(name)
    temporary = destination.with_name(f".ckpt-{secrets.token_hex(8)}.tmp")
    try:
        perform("mkdir", os.mkdir, temporary)
        try:
            _write_files(store, registry, version, document, temporary, progress)
            for folder, below, _ in os.walk(temporary):
                if below:
                    sync_folder(Path(folder))  # the names of folders; new_file did those of files
            perform("rename", os.rename, temporary, destination)
            sync_folder(destination.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise from_os_error(error, f"writing {destination}") from error


def _write_files(
    store: Store,
    registry: Registry,
    version: Version,
    document: Document,
    folder: Path,
    progress: Progress | None,
) -> None:
    names, done = list(document.files), 0
    places = Places(*registry.books.read_plan(version.push))

    def report(more: int, _: int) -> None:
        if progress is not None:
            progress(done + more, version.nbytes)

    for first in range(0, len(names), _OPEN_FILES):
        with ExitStack() as stack:
            wanted: list[Wanted] = []
            for name in names[first : first + _OPEN_FILES]:
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                wanted += _opened(stack, document, document.files[name], path)
            fetch(store, registry, version, wanted, report, places)
        done += sum(one.nbytes for one in wanted)


def _opened(stack: ExitStack, document: Document, file: File, path: Path) -> Iterator[Wanted]:
    """The tensors of one file, each with its room in the open file."""
    try:
        tensors = [document.tensors[index] for index in file.tensors]
    except IndexError as error:
        raise file_damaged(path, str(error)) from None
    first, starts = file_header(file.header, tensors, path)
    placed = [(tensor, [start]) for tensor, start in zip(tensors, starts, strict=True)]
    yield from stack.enter_context(file_with(first, placed, path, force=False))
