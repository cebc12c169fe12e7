"""Pull: a version's bytes, every one checked, into live tensors or into a file."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from ckpt.core.documents import Document, Tensor
from ckpt.core.errors import CkptWarning, IntegrityError, UsageError
from ckpt.core.names import PICKLE_SUFFIXES
from ckpt.core.printable import escape, few
from ckpt.core.records import Version
from ckpt.core.state_dict import state_dict_names
from ckpt.core.tensors import TensorBytes
from ckpt.registry.registry import Registry
from ckpt.service.export import file_header, file_with, made_header, new_file, write_at
from ckpt.service.fetch import Wanted, fetch
from ckpt.service.folder import pull_folder
from ckpt.service.selection import Patterns, chosen_tensors
from ckpt.service.upload import Progress
from ckpt.storage.store import Store

if TYPE_CHECKING:
    from ckpt.loader.devices import DeviceMap
    from ckpt.loader.spaces import MemorySpace, Space


def pull_state(
    store: Store,
    registry: Registry,
    version: Version,
    device: DeviceMap = None,
    everything: bool = False,
    progress: Progress | None = None,
    mmap: bool = False,
) -> Any:
    """The state as it was pushed, rebuilt from checked bytes."""
    from ckpt.loader.devices import check_devices
    from ckpt.loader.restore import Restorer

    check_devices(device)
    document = registry.queries.document(version)
    if document.state == "module":
        return _pull_weights(store, registry, version, document, device, everything, progress, mmap)
    own = [index for index, tensor in enumerate(document.tensors) if tensor.has_bytes]
    filled = fill(store, registry, version, document, own, progress, mmap, device)
    return Restorer(document, filled, device).state()


def _pull_weights(
    store: Store,
    registry: Registry,
    version: Version,
    document: Document,
    device: DeviceMap,
    everything: bool,
    progress: Progress | None,
    mmap: bool,
) -> dict[str, Any]:
    """Of a module, what ``state_dict()`` gave, and with ``everything`` the tensors that it left
    out, by canonical name; imports nothing that the document names."""
    from ckpt.loader.restore import Restorer

    names = state_dict_names(document)
    known = {index for _, index in names}
    left = [
        (tensor.name, index)
        for index, tensor in enumerate(document.tensors)
        if index not in known and tensor.has_values
    ]
    if everything:
        names += left
    elif left:
        shown = few([escape(name, 80) for name, _ in left])
        warnings.warn(
            f"{version.reference} has tensors outside its state_dict: {shown}; "
            "all=True brings them",
            CkptWarning,
            stacklevel=4,
        )
    needed = sorted(with_bytes(document, [index for _, index in names]))
    filled = fill(store, registry, version, document, needed, progress, mmap, device)
    return Restorer(document, filled, device).plain(names)


def pull_tensors(
    store: Store,
    registry: Registry,
    version: Version,
    patterns: Patterns,
    device: DeviceMap = None,
    progress: Progress | None = None,
    mmap: bool = False,
) -> dict[str, Any]:
    """Only the tensors whose names match one of the patterns, by name, tied ones under each; only their
    bytes are read.

    Raises:
        NotFoundError: ``tensor-missing`` when none matches.
    """
    from ckpt.loader.devices import check_devices
    from ckpt.loader.restore import Restorer

    check_devices(device)
    document = registry.queries.document(version)
    chosen = chosen_tensors(version, document, patterns)
    needed = sorted(with_bytes(document, chosen.values()))
    filled = fill(store, registry, version, document, needed, progress, mmap, device)
    restorer = Restorer(document, filled, device)
    if document.state == "module":
        return restorer.plain(list(chosen.items()))
    return {name: restorer.tensor(index) for name, index in chosen.items()}


def pull_file(
    store: Store,
    registry: Registry,
    version: Version,
    destination: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the version as a ``.safetensors`` file: a pushed file byte for byte, any other state
    as its tensors under their canonical names; a pushed folder as a folder.

    Raises:
        ConflictError: ``exists``; TrustError: ``symlink``; SpaceError: ``no-space``.
    """
    document = registry.queries.document(version)
    if document.state == "files":
        pull_folder(store, registry, version, document, destination, progress)
        return
    _check_suffix(version, destination)
    if not all(_is_whole(tensor) for tensor in document.tensors):
        _pull_file_by_torch(store, registry, version, document, destination, force, progress)
        return
    if document.safetensors is None:
        first, starts = made_header(document.tensors)
    else:
        first, starts = file_header(document.safetensors.header, document.tensors, destination)
    placed = [(tensor, [start]) for tensor, start in zip(document.tensors, starts, strict=True)]
    with file_with(first, placed, destination, force) as wanted:
        fetch(store, registry, version, wanted, progress)


def pull_tensors_file(
    store: Store,
    registry: Registry,
    version: Version,
    destination: Path,
    patterns: Patterns,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Like :func:`pull_file`, only the tensors whose names match a pattern, tied ones under each
    name; returns how many. Only their bytes are read."""
    _check_suffix(version, destination)
    document = registry.queries.document(version)
    chosen = chosen_tensors(version, document, patterns)
    tensors = document.tensors
    if not all(_is_whole(tensors[index]) for index in chosen.values()):
        pulled = pull_tensors(store, registry, version, patterns, "cpu", progress)
        from ckpt.loader.sources import laid_out

        _write_file(destination, [laid_out(name, one) for name, one in pulled.items()], force)
        return len(chosen)
    first, starts = made_header([replace(tensors[i], name=name) for name, i in chosen.items()])
    places: dict[int, list[int]] = {}
    for index, start in zip(chosen.values(), starts, strict=True):
        places.setdefault(index, []).append(start)
    placed = [(tensors[index], where) for index, where in places.items()]
    with file_with(first, placed, destination, force) as wanted:
        fetch(store, registry, version, wanted, progress)
    return len(chosen)


def _check_suffix(version: Version, destination: Path) -> None:
    """Refuse a name by which everybody would take the file for one of ``torch.save``."""
    if destination.suffix.lower() in PICKLE_SUFFIXES:
        raise UsageError(
            "pickle-name",
            f"what is pulled is a safetensors file, and {escape(str(destination))} the name of a "
            "pickle",
            hint=f"run `ckpt export {version.reference} {escape(str(destination))}`, or give "
            "another name",
        )


def _pull_file_by_torch(
    store: Store,
    registry: Registry,
    version: Version,
    document: Document,
    destination: Path,
    force: bool,
    progress: Progress | None,
) -> None:
    """Views, sparse and quantised tensors have to be laid out first."""
    from ckpt.loader.restore import Restorer
    from ckpt.loader.sources import laid_out

    own = [index for index, tensor in enumerate(document.tensors) if tensor.has_bytes]
    filled = fill(store, registry, version, document, own, progress)
    restorer = Restorer(document, filled, "cpu")
    plain = [
        laid_out(tensor.name, restorer.tensor(index))
        for index, tensor in enumerate(document.tensors)
        if tensor.has_values
    ]
    _write_file(destination, plain, force)


def _write_file(destination: Path, plain: Sequence[TensorBytes], force: bool) -> None:
    tensors = [Tensor(name=one.name, dtype=one.dtype, shape=one.shape) for one in plain]
    first, starts = made_header(tensors)
    nbytes = len(first) + sum(one.nbytes for one in plain)
    with new_file(destination, nbytes, force=force) as handle:
        write_at(handle, 0, first)
        for one, start in zip(plain, starts, strict=True):
            write_at(handle, start, one.read(0, one.nbytes))


def unnamed_values(document: Document) -> int:
    """How many plain values of the state a ``.safetensors`` file cannot carry."""
    return _count_values(document.root)


def _count_values(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_count_values, value))
    if isinstance(value, dict):
        ((tag, content),) = value.items()
        if tag == "$tensor":
            return 0
        if tag in ("$dict", "$odict", "$state_dict"):
            pairs = content[0] if tag == "$state_dict" else content
            return sum(_count_values(item) for _, item in pairs)
        return _count_values(content) if tag == "$tuple" else 1
    return 1


def fill_document(
    store: Store,
    registry: Registry,
    version: Version,
    document: Document,
    device: DeviceMap,
) -> tuple[dict[int, Space], dict[int, MemorySpace]]:
    """The bytes of all entries, on the devices that they go to, and of the probe's, read at once
    and checked."""
    from ckpt.loader.spaces import MemorySpace, space_for

    own = {
        index: space_for(tensor, device)
        for index, tensor in enumerate(document.tensors)
        if tensor.has_bytes
    }
    probed = {
        index: MemorySpace(tensor)
        for index, tensor in enumerate(document.probe_tensors)
        if tensor.has_bytes
    }
    wanted = [
        *_wanted(document.tensors, own),
        *_wanted(document.probe_tensors, probed),
    ]
    fetch(store, registry, version, wanted)
    return own, probed


def _wanted(
    tensors: Sequence[Tensor], spaces: Mapping[int, Space], mmap: bool = False
) -> Iterator[Wanted]:
    from ckpt.loader.spaces import MemorySpace, part_spaces, stored_nbytes

    for index, space in spaces.items():
        tensor = tensors[index]
        nbytes = stored_nbytes(tensor)
        if tensor.parts:
            for room in part_spaces(tensor, space.tensor):
                yield Wanted(tensor.name, *room)
        else:
            adopt = None
            if mmap and not tensor.align and isinstance(space, MemorySpace):
                adopt = space.adopt
            yield Wanted(tensor.name, nbytes, tensor.chunks, space, adopt)


def fill(
    store: Store,
    registry: Registry,
    version: Version,
    document: Document,
    indices: Iterable[int],
    progress: Progress | None,
    mmap: bool = False,
    device: DeviceMap = "cpu",
) -> dict[int, Space]:
    """Read the bytes of these entries, checked, into memory or to the device that they go to; with
    ``mmap`` they may stay in the store's."""
    from ckpt.loader.spaces import space_for

    filled = {index: space_for(document.tensors[index], device) for index in indices}
    fetch(store, registry, version, list(_wanted(document.tensors, filled, mmap)), progress)
    return filled


def with_bytes(document: Document, chosen: Iterable[int]) -> set[int]:
    """The entries whose bytes these ones need: their own, their host's, their components'."""
    needed: set[int] = set()
    waiting, seen = list(chosen), set(chosen)
    while waiting:
        index = waiting.pop()
        if not 0 <= index < len(document.tensors):
            raise IntegrityError(
                "document-damaged",
                f"the document refers to tensor {index}, which is not there",
                hint="run `ckpt fsck`",
            )
        tensor = document.tensors[index]
        if tensor.has_bytes:
            needed.add(index)
        others = [] if tensor.region is None else [tensor.region]
        others += (tensor.components or {}).values()
        waiting += [other for other in others if other not in seen]
        seen.update(others)
    return needed


def _is_whole(tensor: Tensor) -> bool:
    """Whether the stored bytes are all of the tensor's values, in C order."""
    plain = tensor.has_bytes and tensor.kind in ("tensor", "parameter", "buffer", "ndarray")
    return plain and not tensor.parts and 0 not in (tensor.strides or ())
