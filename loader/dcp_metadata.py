"""The pickles of ``torch.distributed.checkpoint``, read without any class of theirs.

A DCP folder has a pickle in ``.metadata``, and one beside each tensor in its ``.distcp`` files. The
unpickler here knows the exact names that torch writes there, and gives records of its own for
them: nothing that a file names is imported or called.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy

from ckpt.core.dtypes import ITEM_SIZES
from ckpt.core.errors import TrustError
from ckpt.core.printable import escape

# Where a piece of a tensor begins in it, and its shape.
Box = tuple[tuple[int, ...], tuple[int, ...]]
# The name of a value, and of a piece of a tensor also where it begins.
Key = tuple[str, tuple[int, ...] | None]
_LOCAL_HEADER = struct.Struct("<26xHH")


class _Record:
    """Stands for an object of torch: what it was made of, and its attributes."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        # Without this the attributes would be set one by one, on whatever was named.
        self.state = state

    def field(self, name: str) -> Any:
        """An attribute; ValueError when it has none of this name."""
        state = getattr(self, "state", None)
        if not isinstance(state, dict) or name not in state:
            raise ValueError(f"{type(self).__name__.strip('_')} without {name}")
        return state[name]


class _Metadata(_Record):
    pass


class _TensorMetadata(_Record):
    pass


class _BytesMetadata(_Record):
    pass


class _Chunk(_Record):
    pass


class _Properties(_Record):
    pass


class _Index(_Record):
    def __hash__(self) -> int:  # a key of a dict, before its attributes are known
        return id(self)


class _StorageInfo(_Record):
    pass


class _Rebuilt(_Record):
    """A call of ``torch._utils._rebuild_tensor_v2`` or ``_v3``."""


class _Ignored(_Record):
    pass


_CHECKPOINT = "torch.distributed.checkpoint"
_DTYPES = {("torch", name): name for name in ITEM_SIZES}
_METADATA: dict[tuple[str, str], Any] = {
    (f"{_CHECKPOINT}.metadata", "Metadata"): _Metadata,
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"): _TensorMetadata,
    (f"{_CHECKPOINT}.metadata", "BytesStorageMetadata"): _BytesMetadata,
    (f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata"): _Chunk,
    (f"{_CHECKPOINT}.metadata", "TensorProperties"): _Properties,
    (f"{_CHECKPOINT}.metadata", "MetadataIndex"): _Index,
    (f"{_CHECKPOINT}.metadata", "StorageMeta"): _Ignored,
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"): _Ignored,
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _Ignored,
    ("pathlib", "PosixPath"): _Ignored,
    ("pathlib", "WindowsPath"): _Ignored,
    ("pathlib._local", "PosixPath"): _Ignored,
    ("pathlib._local", "WindowsPath"): _Ignored,
    **_DTYPES,
}
_STORAGES = (
    *("Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double"),
    *("ComplexFloat", "ComplexDouble"),
)
_SHARD: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuilt,
    ("torch._utils", "_rebuild_tensor_v3"): _Rebuilt,
    ("torch.storage", "UntypedStorage"): _Ignored,
    ("collections", "OrderedDict"): _Ignored,
    **{("torch", f"{name}Storage"): _Ignored for name in _STORAGES},
    **_DTYPES,
}


class _ExactUnpickler(pickle.Unpickler):
    """Gives a record for each known name, and refuses every other."""

    def __init__(self, file: IO[bytes], known: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(file)
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise TrustError(
                "pickle-refused",
                f"it names {escape(f'{module}.{name}', 200)}, which no DCP folder needs",
                hint="load it with torch.distributed.checkpoint if you trust it, and push what "
                "you get: repo.push(state, model)",
            )
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        return pid


@dataclass(frozen=True, slots=True)
class Metadata:
    """What ``.metadata`` says: the names of all values in order, the tensors among them, where
    each lies as ``(file, offset, length)``, and the path that each had before it was named."""

    names: tuple[str, ...]
    tensors: Mapping[str, ShardedShape]
    places: Mapping[Key, tuple[str, int, int]]
    paths: Mapping[str, tuple[Any, ...]]


def read_metadata(path: Path) -> Metadata:
    """The metadata of a DCP folder; ValueError, TypeError and their kin when it is damaged.

    Raises:
        TrustError: ``pickle-refused``, naming what is no part of DCP.
    """
    with path.open("rb") as file:
        found = _ExactUnpickler(file, _METADATA).load()
    if not isinstance(found, _Metadata):
        raise TypeError("its .metadata is none of torch.distributed.checkpoint")
    entries = found.field("state_dict_metadata")
    paths = found.field("planner_data")
    return Metadata(
        names=tuple(entries),
        tensors={
            name: ShardedShape.of(entry)
            for name, entry in entries.items()
            if isinstance(entry, _TensorMetadata)
        },
        places=dict(_place(*pair) for pair in found.field("storage_data").items()),
        paths=paths if paths else {name: (name,) for name in entries},
    )


def _place(index: _Index, info: _StorageInfo) -> tuple[Key, tuple[str, int, int]]:
    offset = index.state.get("offset")
    if info.state.get("transform_descriptors"):
        raise ValueError("its files are compressed by an extension")
    file, start, length = (info.field(name) for name in ("relative_path", "offset", "length"))
    if type(file) is not str or Path(file).name != file or type(start) is not int:
        raise ValueError(f'"{escape(str(file), 80)}" is no file of the folder')
    return (index.field("fqn"), None if offset is None else _whole_numbers(offset)), (
        file,
        start,
        length,
    )


@dataclass(frozen=True, slots=True)
class ShardedShape:
    """What the metadata says of a tensor; ``chunks`` are the places and shapes of its pieces."""

    dtype: str
    size: tuple[int, ...]
    requires_grad: bool
    chunks: tuple[Box, ...]

    @classmethod
    def of(cls, entry: _TensorMetadata) -> ShardedShape:
        """ValueError unless the pieces make up the tensor, without gap and without overlap."""
        dtype, _, requires_grad, *_ = entry.field("properties").state
        size = _whole_numbers(entry.field("size"))
        chunks = tuple(
            (_whole_numbers(chunk.field("offsets")), _whole_numbers(chunk.field("sizes")))
            for chunk in entry.field("chunks")
        )
        if dtype not in ITEM_SIZES or type(requires_grad) is not bool:
            raise ValueError("a tensor of no dtype")
        if any(not len(offsets) == len(size) == len(sizes) for offsets, sizes in chunks):
            raise ValueError("a piece of a tensor has other dimensions")
        _check_tiles(size, chunks)
        return cls(dtype, size, requires_grad, chunks)


def _whole_numbers(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple or any(type(v) is not int or v < 0 for v in values):
        raise ValueError("a shape that is none")
    return values


def _check_tiles(size: tuple[int, ...], chunks: Sequence[Box]) -> None:
    if sum(math.prod(sizes) for _, sizes in chunks) != math.prod(size):
        raise ValueError("the pieces of a tensor are not all of it")
    low = numpy.array([offsets for offsets, _ in chunks], numpy.int64).reshape(
        len(chunks), len(size)
    )
    high = low + numpy.array([sizes for _, sizes in chunks], numpy.int64).reshape(low.shape)
    if (high > numpy.array(size, numpy.int64)).any():
        raise ValueError("a piece lies outside its tensor")
    filled: Any = (high > low).all(axis=1)
    for at in numpy.flatnonzero(filled):
        over = (low[at + 1 :] < high[at]) & (low[at] < high[at + 1 :])
        if (over.all(axis=1) & filled[at + 1 :]).any():
            raise ValueError("two pieces of a tensor overlap")


class _Window(io.RawIOBase):
    """Bytes as a file, not copied."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, len(self._view))[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = self._view[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in bytes that ``torch.save`` wrote: where its storage begins in them, how long
    that is, and how the tensor lies in it, in elements."""

    start: int
    nbytes: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def stored_tensor(window: memoryview) -> StoredTensor:
    """Read the description of one tensor; ValueError and its kin when it is damaged."""
    with zipfile.ZipFile(_Window(window)) as archive:
        records = {name.partition("/")[2]: name for name in archive.namelist()}
        if archive.read(records["byteorder"]) != b"little":
            raise ValueError("its tensors are not little-endian")
        with archive.open(records["data.pkl"]) as file:
            rebuilt = _ExactUnpickler(file, _SHARD).load()
        if not isinstance(rebuilt, _Rebuilt):
            raise TypeError("a piece of a tensor is none")
        storage, offset, shape, strides, *_ = rebuilt.arguments
        data = archive.getinfo(records[f"data/{storage[2]}"])
    if data.compress_type != zipfile.ZIP_STORED:
        raise ValueError("its tensors are compressed")
    header = window[data.header_offset : data.header_offset + _LOCAL_HEADER.size]
    at = data.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header))
    if at + data.file_size > len(window):
        raise ValueError("the bytes of a tensor are not all there")
    shape, strides, (offset,) = map(_whole_numbers, (shape, strides, (offset,)))
    return StoredTensor(at, data.file_size, offset, shape, strides)
