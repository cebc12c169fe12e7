"""What each rank says of the tensors and values that it stored, and the document made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from msgspec.structs import replace
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ckpt.core.documents import FORMAT, Document, Part, Tensor
from ckpt.core.errors import IntegrityError, UsageError
from ckpt.core.free_names import FreeNames
from ckpt.core.printable import escape
from ckpt.loader.capture import Captured, TensorTable, capture
from ckpt.loader.sources import MemoryTensor
from ckpt.loader.spaces import stored_nbytes
from ckpt.loader.values import Decoder, Encoder, Path, RefusedError
from ckpt.service.sharded import Shard, Written


@dataclass(frozen=True, slots=True)
class Box:
    """A box out of the tensor ``name`` that a rank stored."""

    name: str
    dtype: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    chunks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Value:
    """A value that is no tensor, and the entries of the tensors in it."""

    name: str
    root: Any
    order: tuple[tuple[int, tuple[int, ...]], ...]
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """All that one rank stored."""

    boxes: tuple[Box, ...]
    values: tuple[Value, ...]
    written: Written


@dataclass(slots=True)
class RankState:
    """What one rank is to store: tensors, whole or in boxes, and other values by name."""

    boxes: list[Box] = field(default_factory=list)
    _tensors: list[torch.Tensor] = field(default_factory=list)
    _values: dict[str, Any] = field(default_factory=dict)
    _encoder: Encoder = field(default_factory=lambda: Encoder(TensorTable()))

    def add_tensor(self, name: str, offset: Sequence[int], tensor: torch.Tensor) -> None:
        """A box with its values, or a whole tensor; what cannot be stored is told later."""
        tensor = tensor.detach()
        try:
            if tensor.is_quantized or tensor.layout != torch.strided:
                raise RefusedError("not a plain dense tensor; make it one, or use repo.push")
            TensorTable().take(tensor, (name,))
        except RefusedError as refused:
            self._encoder.refusals.append(((name,), str(refused)))
            return
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.boxes.append(Box(name, dtype, tuple(offset), tuple(tensor.shape)))
        self._tensors.append(tensor.resolve_conj().resolve_neg())

    def add_value(self, name: str, value: Any) -> None:
        """A value that is no tensor."""
        self._encoder.encode(value, (name,))
        self._values[name] = value

    def shards(self) -> tuple[list[Shard], list[Captured]]:
        """Everything that has bytes: the tensors, then those in the captured values.

        Raises:
            UsageError: ``cannot-store``, naming everything that cannot be stored.
        """
        self._encoder.raise_refusals()
        captured = [capture({name: value}) for name, value in self._values.items()]
        shards = [
            Shard(box.name, box.offset, MemoryTensor(_pack_name(box), box.dtype, tensor))
            for box, tensor in zip(self.boxes, self._tensors, strict=True)
        ]
        for one in captured:
            inner = zip(one.tensors, one.sources, strict=True)
            shards += [
                Shard(entry.name, (0,) * len(source.shape), source)
                for entry, source in inner
                if source is not None
            ]
        return shards, captured

    def report(self, captured: Sequence[Captured], written: Written) -> Report:
        """What to tell, now that the shards are written."""
        chunks = iter(written.chunks)
        boxes = tuple(
            Box(box.name, box.dtype, box.offset, box.shape, next(chunks)) for box in self.boxes
        )
        values = tuple(
            Value(
                name,
                one.root,
                one.order,
                tuple(
                    entry if source is None else replace(entry, chunks=next(chunks), device="cpu")
                    for entry, source in zip(one.tensors, one.sources, strict=True)
                ),
            )
            for name, one in zip(self._values, captured, strict=True)
        )
        return Report(boxes, values, written)


def _pack_name(box: Box) -> str:
    """Under which name a box lies in its pack: a whole tensor, or rank 0's part, under its own."""
    return f"{box.name}@{','.join(map(str, box.offset))}" if any(box.offset) else box.name


def assemble(metadata: Metadata, reports: Sequence[Report], environment: str) -> Document:
    """The document of the whole state, nested as it was before DCP named its values.

    Raises:
        UsageError: ``cannot-store`` when the boxes of a tensor are not all of it.
    """
    boxes: dict[str, list[Box]] = {}
    leaves: dict[str, Any] = {}
    for report in reports:
        for box in report.boxes:
            boxes.setdefault(box.name, []).append(box)
        for value in report.values:
            leaves |= _with_places(value)
    for name, found in metadata.state_dict_metadata.items():
        if isinstance(found, TensorStorageMetadata):
            leaves[name] = _Placed((_entry(name, found, boxes.get(name, ())),), 0)
    paths = metadata.planner_data or {name: (name,) for name in leaves}
    nested = unflatten_state_dict({name: leaves[name] for name in paths}, paths)
    encoder = _RootEncoder(TensorTable())
    root = encoder.encode(nested)
    encoder.raise_refusals()
    return Document(
        format=FORMAT,
        state="values",
        root=root,
        tensors=tuple(encoder.entries),
        environment=environment,
        order=tuple(encoder.order),
    )


def _entry(name: str, found: TensorStorageMetadata, boxes: Sequence[Box]) -> Tensor:
    """The entry of a tensor that lies in boxes; empty ones are left out."""
    filled = sorted((box for box in boxes if math.prod(box.shape)), key=lambda box: box.offset)
    shape = tuple(found.size)
    whole = len(filled) < 2 and all(box.shape == shape for box in filled)
    entry = Tensor(
        name=name,
        dtype=str(found.properties.dtype).removeprefix("torch."),
        shape=shape,
        requires_grad=found.properties.requires_grad,
        chunks=tuple(chunk for box in filled for chunk in box.chunks),
        parts=()
        if whole
        else tuple(
            Part(offset=box.offset, shape=box.shape, chunks=len(box.chunks)) for box in filled
        ),
    )
    try:
        stored_nbytes(entry)
    except IntegrityError:
        raise UsageError(
            "cannot-store",
            f'the shards of "{escape(name)}" are not all of it, each element once',
            hint="save it from every rank that has a part of it",
        ) from None
    return entry


@dataclass(frozen=True, slots=True)
class _Placed:
    """Stands for a tensor: one of some entries that refer to each other by their places."""

    entries: tuple[Tensor, ...]
    index: int


@dataclass(frozen=True, slots=True)
class _PlacedGenerator:
    """Stands for a random generator."""

    device: str
    state: _Placed


def _with_places(value: Value) -> Mapping[str, Any]:
    """A value by its name, as it was but for the tensors in it."""

    def place(index: int) -> _Placed:
        return _Placed(value.tensors, index)

    generator: Any = _PlacedGenerator
    decoded: Mapping[str, Any] = Decoder(place, dict(value.order), generator).decode(value.root)
    return decoded


class _RootEncoder(Encoder):
    """Encodes a state in which tensors are placed already; ``entries`` are those that it met."""

    def __init__(self, tensors: TensorTable) -> None:
        super().__init__(tensors)
        self.entries: list[Tensor] = []
        self._first: dict[int, int] = {}
        self._names = FreeNames()

    def _encode_other(self, value: Any, path: Path) -> Any:
        if isinstance(value, _Placed):
            return {"$tensor": self._index(value)}
        if isinstance(value, _PlacedGenerator):
            return {"$generator": [value.device, self._index(value.state)]}
        return super()._encode_other(value, path)

    def _index(self, placed: _Placed) -> int:
        key = id(placed.entries)
        if key not in self._first:
            first = self._first[key] = len(self.entries)
            for entry in placed.entries:
                self.entries.append(
                    replace(_moved(entry, first), name=self._names.take(entry.name))
                )
        return self._first[key] + placed.index


def _moved(entry: Tensor, first: int) -> Tensor:
    """An entry whose neighbours begin at ``first`` and not at 0."""
    if entry.region is not None:
        entry = replace(entry, region=entry.region + first)
    if entry.components is not None:
        places = {role: index + first for role, index in entry.components.items()}
        entry = replace(entry, components=places)
    return entry
