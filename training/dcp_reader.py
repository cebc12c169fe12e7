"""``torch.distributed.checkpoint`` out of a repository: each rank reads what its shards need."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ckpt.core.documents import Document, Part, Tensor
from ckpt.core.errors import ConflictError, IntegrityError, UsageError
from ckpt.core.printable import escape
from ckpt.core.state_dict import state_dict_names
from ckpt.core.tensors import CHUNK_BYTES
from ckpt.loader.restore import Restorer
from ckpt.loader.spaces import BoxSpace, dtype_of, stored_nbytes
from ckpt.loader.values import Decoder
from ckpt.service.fetch import Wanted
from ckpt.service.lookup import VersionLike
from ckpt.service.repository import Repository
from ckpt.service.sharded import read_wanted, restorer_of

_Target = tuple[ReadItem, torch.Tensor]


def dcp_reader(repo: Repository, ref: VersionLike) -> DcpReader:
    """A reader for ``dcp.load(state, storage_reader=…)``, of any version: one that was saved by
    :func:`~ckpt.dcp_writer` on any number of ranks, or pushed.

    Each rank reads the chunks that its own shards need, and every one of them is checked.
    Nothing is cast: a tensor of another dtype is refused.

    Raises:
        NotFoundError: ``model-missing``, ``version-missing``.
        UsageError: ``no-state-dict`` when the version's state has no names.
        IntegrityError: ``document-damaged``.
    """
    return DcpReader(repo, ref)


class DcpReader(StorageReader):
    """Gives DCP what a version has; made by :func:`dcp_reader`."""

    def __init__(self, repo: Repository, ref: VersionLike) -> None:
        self._repo = repo
        self.version = repo.get(ref)
        self._document = repo.document(self.version)
        self._contents = _contents(self._document, self.version.reference)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            raise UsageError(
                "usage", "a version has no checkpoint_id", hint="name it in dcp_reader"
            )

    def read_metadata(self) -> Metadata:
        """What DCP plans by, made from the version's document."""
        known: dict[str, STORAGE_TYPES] = dict.fromkeys(
            self._contents.values, BytesStorageMetadata()
        )
        for name, index in self._contents.tensors.items():
            known[name] = _describe(self._document.tensors[index])
        return Metadata(known, planner_data=self._contents.paths)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """There is nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        plan.storage_data = (self.version.push, self.version.reference)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Refuse to go on when a reference meant different versions on different ranks."""
        found = sorted({plan.storage_data for plan in plans})
        if len(found) > 1:
            names = " and ".join(reference for _, reference in found)
            raise ConflictError(
                "version-moved", f"the ranks would read {names}", hint="name one version by number"
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        targets = [
            (item, self._target(item, planner))
            for item in plan.items
            if item.type == LoadItemType.TENSOR
        ]
        direct: list[_Target] = []
        others: list[_Target] = []
        for item, target in targets:
            (direct if _is_direct(self._entry(item)) else others).append((item, target))
        wanted = [self._wanted(item, target) for item, target in direct]
        read_wanted(self._repo, self.version, wanted)
        self._fill_others(others)
        for item, target in targets:
            planner.commit_tensor(item, target)
        self._load_values(
            [item for item in plan.items if item.type != LoadItemType.TENSOR], planner
        )
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _entry(self, item: ReadItem) -> Tensor:
        return self._document.tensors[self._contents.tensors[item.storage_index.fqn]]

    def _target(self, item: ReadItem, planner: LoadPlanner) -> torch.Tensor:
        """Where the values of an item go, in the state that is being loaded."""
        target, entry = planner.resolve_tensor(item).detach(), self._entry(item)
        if target.dtype != dtype_of(entry):
            raise IntegrityError(
                "dtype-mismatch",
                f'"{escape(item.dest_index.fqn)}" is {target.dtype} here, and {entry.dtype} in '
                f"{self.version.reference}",
                hint="load into the stored dtype, then convert",
            )
        return target

    def _wanted(self, item: ReadItem, target: torch.Tensor) -> Wanted:
        """The chunks from the first to the last that have a value of the item."""
        entry, start = self._entry(item), tuple(item.storage_offsets)
        part, chunks = next(
            (part, chunks)
            for part, chunks in entry.pieces()
            if part.offset == tuple(item.storage_index.offset or ())
        )
        low, high = _chunk_range(part, start, tuple(item.lengths), target.element_size())
        nbytes = math.prod(part.shape) * target.element_size()
        first = low * CHUNK_BYTES
        length = min(nbytes, high * CHUNK_BYTES) - first
        return Wanted(
            entry.name, length, chunks[low:high], BoxSpace(target, part.shape, start, first)
        )

    def _fill_others(self, targets: Sequence[_Target]) -> None:
        """Views and expanded tensors, which are rebuilt whole."""
        if not targets:
            return
        places = [self._contents.tensors[item.storage_index.fqn] for item, _ in targets]
        restorer = restorer_of(self._repo, self.version, self._document, set(places))
        for place, (item, target) in zip(places, targets, strict=True):
            whole = restorer.tensor(place).detach()
            if whole.layout != torch.strided or whole.is_quantized:
                raise UsageError(
                    "cannot-load",
                    f'"{escape(item.storage_index.fqn)}" is not a plain dense tensor',
                    hint="use repo.pull",
                )
            for dimension, at in enumerate(item.storage_offsets):
                whole = whole.narrow(dimension, at, item.lengths[dimension])
            target.copy_(whole)

    def _load_values(self, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        """DCP takes a value pickled: one that was decoded here, nothing from the store."""
        values = self._contents.values
        if items and self._contents.inner:
            inner, reference = self._contents.inner, self.version.reference
            restorer = restorer_of(self._repo, self.version, self._document, inner)
            values = _contents(self._document, reference, restorer, inner).values
        for item in items:
            pickled = io.BytesIO()
            torch.save(values[item.storage_index.fqn], pickled)
            pickled.seek(0)
            planner.load_bytes(item, pickled)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class _Contents:
    """What DCP sees in a version: tensor entries and other values by name, the path of each name,
    and the entries of tensors inside of values."""

    tensors: Mapping[str, int]
    values: Mapping[str, Any]
    paths: Mapping[str, tuple[str | int, ...]]
    inner: frozenset[int] = frozenset()


def _contents(
    document: Document,
    reference: str,
    restorer: Restorer | None = None,
    inner: Collection[int] = (),
) -> _Contents:
    """With a restorer of the inner tensors the values are real; else these have stand-ins."""
    if document.state == "module":
        names = dict(state_dict_names(document))
        return _Contents(names, {}, {name: (name,) for name in names})
    stand_ins = _StandIns(document, restorer, inner)
    generator: Any = stand_ins.generator if restorer is None else restorer.generator
    state = Decoder(stand_ins.place, dict(document.order), generator).decode(document.root)
    if not isinstance(state, dict):
        raise _no_names(reference, "is no dict")
    try:
        leaves, paths = flatten_state_dict(state)
    except ValueError as error:
        raise _no_names(reference, f"has two values of one name: {error}") from None
    tensors = {
        name: stand_ins.places[id(leaf)]
        for name, leaf in leaves.items()
        if id(leaf) in stand_ins.places and isinstance(leaf, torch.Tensor)
    }
    shown = {id(leaves[name]) for name in tensors}
    hidden = frozenset(index for key, index in stand_ins.places.items() if key not in shown)
    values = {name: leaf for name, leaf in leaves.items() if name not in tensors}
    return _Contents(tensors, values, paths, hidden)


class _StandIns:
    """Empty objects in the places of tensors, as DCP tells tensors from values by their type."""

    def __init__(
        self, document: Document, restorer: Restorer | None, inner: Collection[int]
    ) -> None:
        self.places: dict[int, int] = {}
        self._document = document
        self._restorer = restorer
        self._inner = inner
        self._alive: list[Any] = []  # an id is only unique while its object lives

    def place(self, index: int) -> Any:
        if index in self._inner and self._restorer is not None:
            return self._restorer.tensor(index)
        kind = self._document.tensors[index].kind
        made: Any = numpy.empty(0) if kind == "ndarray" else torch.empty(0, device="meta")
        self._alive.append(made)
        self.places[id(made)] = index
        return made

    def generator(self, device: str, state: Any) -> None:
        """Its state is an inner tensor."""


def _no_names(reference: str, reason: str) -> UsageError:
    return UsageError(
        "no-state-dict", f"the state of {reference} {escape(reason)}", hint="use repo.pull"
    )


def _describe(entry: Tensor) -> TensorStorageMetadata:
    """An entry as DCP plans with it."""
    if entry.has_bytes:
        stored_nbytes(entry)  # refuses one that contradicts itself
    pieces = [
        ChunkStorageMetadata(torch.Size(part.offset), torch.Size(part.shape))
        for part, _ in entry.pieces()
    ]
    properties = TensorProperties(dtype_of(entry), requires_grad=entry.requires_grad)
    return TensorStorageMetadata(properties, torch.Size(entry.shape), pieces)


def _is_direct(entry: Tensor) -> bool:
    """Whether the stored bytes are the values, in C order."""
    return entry.has_bytes and 0 not in (entry.strides or ())


def _chunk_range(
    part: Part, start: Sequence[int], lengths: Sequence[int], size: int
) -> tuple[int, int]:
    """The chunks of a part from the first to the last that have a value of a box in it."""
    if 0 in lengths:
        return 0, 0
    first = last = 0
    for whole, at, length in zip(part.shape, start, lengths, strict=True):
        first, last = first * whole + at, last * whole + at + length - 1
    return first * size // CHUNK_BYTES, -(-(last + 1) * size // CHUNK_BYTES)
