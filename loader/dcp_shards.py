"""A folder of ``torch.distributed.checkpoint`` as a state with whole tensors.

The pieces of a tensor stay in their mapped files until they are read.
"""

from __future__ import annotations

import io
import math
import mmap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ckpt.core.documents import Tensor
from ckpt.core.dtypes import ITEM_SIZES, QUANTIZED
from ckpt.core.errors import UsageError
from ckpt.core.printable import escape
from ckpt.core.tensors import TensorBytes
from ckpt.loader.capture import Captured, capture
from ckpt.loader.dcp_metadata import Key, Metadata, ShardedShape, read_metadata, stored_tensor
from ckpt.loader.sources import MemoryTensor

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a tensor: where it begins in it, and its bytes; both have one dimension
    more than the tensor, the bytes of an item."""

    offsets: tuple[int, ...]
    values: torch.Tensor


class ShardedTensor:
    """The stored bytes of a tensor that lies in pieces; a read copies what it needs of them."""

    def __init__(self, entry: Tensor, pieces: Sequence[_Piece]) -> None:
        self.name = entry.name
        self.dtype = entry.dtype
        self.shape = entry.shape
        self.nbytes = math.prod(self.shape) * ITEM_SIZES[self.dtype]
        self._pieces = pieces

    def read(self, offset: int, length: int) -> memoryview:
        shape = (*self.shape, ITEM_SIZES[self.dtype])
        return _gather(self._pieces, shape, offset, offset + length).contiguous().numpy().data


def _gather(
    pieces: Sequence[_Piece], shape: tuple[int, ...], first: int, last: int
) -> torch.Tensor:
    """The elements ``[first, last)`` in C order of what the pieces make up."""
    row = math.prod(shape[1:])
    low, high = first // row, -(-last // row)
    if high - low == 1 and len(shape) > 1:
        inner = [
            _Piece(piece.offsets[1:], piece.values[low - piece.offsets[0]])
            for piece in pieces
            if piece.offsets[0] <= low < piece.offsets[0] + piece.values.shape[0]
        ]
        return _gather(inner, shape[1:], first - low * row, last - low * row)
    rows = torch.empty((high - low, *shape[1:]), dtype=torch.uint8, device="cpu")
    for piece in pieces:
        begin = max(piece.offsets[0], low)
        end = min(piece.offsets[0] + piece.values.shape[0], high)
        if begin < end:
            part = piece.values[begin - piece.offsets[0] : end - piece.offsets[0]]
            place = [slice(begin - low, end - low)]
            place += [
                slice(at, at + size)
                for at, size in zip(piece.offsets[1:], part.shape[1:], strict=True)
            ]
            rows[tuple(place)] = part
    return rows.reshape(-1)[first - low * row : last - low * row]


def open_shards(folder: Path) -> Captured:
    """What a DCP folder holds, described; ValueError and its kin when it is damaged.

    Raises:
        TrustError: ``pickle-refused``, naming what is no part of DCP; UsageError:
            ``cannot-store``.
    """
    metadata = read_metadata(folder / ".metadata")
    _check_dtypes(metadata.tensors)
    files = _Files(folder, metadata)
    values: dict[str, Any] = {}
    room = _placeholders(metadata.tensors)
    for name in metadata.names:
        values[name] = room[name] if name in room else files.plain(name)
    captured = capture(_nested(values, metadata.paths))
    # Each placeholder has an address of its own, by which its entry is found again.
    pieces = {
        room[name].data_ptr(): list(files.pieces(name, shape))
        for name, shape in metadata.tensors.items()
        if room[name].numel()
    }
    return _with_pieces(captured, pieces)


def _check_dtypes(shapes: Mapping[str, ShardedShape]) -> None:
    """Refuse quantised tensors: each piece has a scale of its own in a pickle, and to make such a
    tensor over a mapping ends the process."""
    found = [escape(name, 80) for name, shape in shapes.items() if shape.dtype in QUANTIZED]
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UsageError(
            "cannot-store",
            f"{found[0]}{more} is a quantised tensor, which cannot be read from a DCP folder",
            hint="load it with torch.distributed.checkpoint, and push what you get: "
            "repo.push(state, model)",
        )


def _with_pieces(captured: Captured, pieces: Mapping[int, Sequence[_Piece]]) -> Captured:
    sources: list[TensorBytes | None] = []
    for entry, source in zip(captured.tensors, captured.sources, strict=True):
        at = source.values.data_ptr() if isinstance(source, MemoryTensor) else None
        if at is not None and at in pieces:
            sources.append(ShardedTensor(entry, pieces[at]))
        else:
            sources.append(source)
    return replace(captured, sources=tuple(sources))


def _placeholders(shapes: Mapping[str, ShardedShape]) -> dict[str, torch.Tensor]:
    """A tensor for each, in memory that is reserved but never touched, so never there."""
    starts, end = {}, 0
    for name, shape in shapes.items():
        starts[name] = end
        end += -(-math.prod(shape.size) * ITEM_SIZES[shape.dtype] // _ALIGNMENT) * _ALIGNMENT
    made = {}
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, max(end, 1), flags=flags, prot=mmap.PROT_READ)
    for name, shape in shapes.items():
        count, dtype = math.prod(shape.size), getattr(torch, shape.dtype)
        flat = (
            _over(memory, dtype, count, starts[name])
            if count
            else torch.empty(0, dtype=dtype, device="cpu")
        )
        made[name] = flat.reshape(shape.size).requires_grad_(shape.requires_grad)
    return made


def _over(memory: Any, dtype: torch.dtype, count: int, offset: int = 0) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # read-only: nothing is written here
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)


class _Files:
    """The ``.distcp`` files of a folder, mapped."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        self._folder = folder
        self._places = metadata.places
        self._mapped: dict[str, mmap.mmap] = {}

    def plain(self, name: str) -> Any:
        """A value that is no tensor."""
        return torch.load(io.BytesIO(self._window((name, None))), weights_only=True)

    def pieces(self, name: str, shape: ShardedShape) -> Iterator[_Piece]:
        """The pieces of a tensor, in their mapped files."""
        item = ITEM_SIZES[shape.dtype]
        for offsets, sizes in shape.chunks:
            if not math.prod(sizes):
                continue
            window = self._window((name, offsets))
            stored = stored_tensor(window)
            first = stored.offset * item
            steps = [step * item for step in stored.strides]
            span = sum((n - 1) * step for n, step in zip(stored.shape, steps, strict=True))
            if stored.shape != sizes or first + span + item > stored.nbytes:
                raise ValueError(f"a piece of {escape(name, 80)} is not what the metadata says")
            data = window[stored.start : stored.start + stored.nbytes]
            whole = _over(data, torch.uint8, stored.nbytes)
            yield _Piece((*offsets, 0), whole.as_strided((*sizes, item), (*steps, 1), first))

    def _window(self, key: Key) -> memoryview:
        file, start, length = self._places[key]
        mapped = self._map(file)
        if not 0 <= start <= start + length <= len(mapped):
            raise ValueError(f"{escape(file, 80)} is shorter than its metadata says")
        return memoryview(mapped)[start : start + length]

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._mapped:
            with (self._folder / file).open("rb") as opened:
                self._mapped[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        return self._mapped[file]


def _nested(values: Mapping[str, Any], paths: Mapping[str, tuple[Any, ...]]) -> Any:
    """The state that was flattened into names; whole numbers in a path are places of a list."""
    root: dict[Any, Any] = {}
    inner = {id(root)}
    for name, value in values.items():
        path = paths[name]
        if type(path) is not tuple or not path:
            raise TypeError(f"{escape(name, 80)} has no path")
        node = root
        for part in path[:-1]:
            node = node.setdefault(part, {})
            inner.add(id(node))
        node[path[-1]] = value
    return _with_lists(root, inner)


def _with_lists(node: Any, inner: set[int]) -> Any:
    if id(node) not in inner:
        return node
    items = {key: _with_lists(value, inner) for key, value in node.items()}
    if items and all(type(key) is int for key in items) and sorted(items) == [*range(len(items))]:
        return [items[place] for place in range(len(items))]
    return items
