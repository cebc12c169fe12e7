"""A live state to a document and the bytes of its tensors."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from msgspec.structs import replace

from ckpt.core.documents import ModelClass, Module, Tensor
from ckpt.core.dtypes import ITEM_SIZES
from ckpt.core.free_names import FreeNames
from ckpt.core.printable import escape, few
from ckpt.core.tensors import TensorBytes
from ckpt.loader.geometry import SharedBytes, find_shared, stored_form
from ckpt.loader.sources import MemoryTensor, RegionTensor, from_array, has_torch_dtype
from ckpt.loader.values import Encoder, Path, RefusedError, check_portable

_SPARSE = {
    torch.sparse_coo: ("indices", "values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}

# What the address of a region is remembered of. Kernels differ in the last bits by an address
# modulo 16; allocators align to that at least, so equal states give equal digests.
_ALIGNMENT = 16

# Kinds of entries that have no shape and no bytes yet.
UNINITIALIZED = {
    torch.nn.UninitializedParameter: "uninitialized-parameter",
    torch.nn.UninitializedBuffer: "uninitialized-buffer",
}


_MADE_ON_TENSORS = {"_is_hf_initialized", "_is_param", "_is_buffer", "persistent"}


@dataclass(frozen=True, slots=True)
class Captured:
    """A state, described. ``sources[i]`` has the bytes of ``tensors[i]``; None where that entry
    has none of its own. The entries have no chunks yet. Only a module has ``modules`` to
    ``dropped``; ``notes`` says what its user should know."""

    root: Any
    tensors: tuple[Tensor, ...]
    sources: tuple[TensorBytes | None, ...]
    order: tuple[tuple[int, tuple[int, ...]], ...]
    modules: tuple[Module, ...] = ()
    classes: tuple[ModelClass, ...] = ()
    wrappers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(source.nbytes for source in self.sources if source is not None)


def capture(state: Any) -> Captured:
    """Describe any nesting of plain values with tensors in it; copies no tensor.

    Raises:
        UsageError: ``cannot-store``, naming everything that cannot be stored.
    """
    table = TensorTable()
    encoder = Encoder(table)
    root = encoder.encode_root(state)
    for path, reason in table.share():
        encoder.refusals.append((path, reason))
    encoder.raise_refusals()
    entries, sources = table.finish()
    return Captured(root, entries, sources, tuple(encoder.order), notes=table.all_notes())


@dataclass(slots=True)
class _Item:
    """One tensor entry in the making; ``tensor`` is None where others hold its bytes, ``stored``
    is what of it is written."""

    path: Path
    entry: Tensor
    tensor: torch.Tensor | None
    stored: torch.Tensor | None = None


@dataclass(slots=True)
class TensorTable:
    """The tensors of a state, each once, in the order in which they were met. With ``lazy``,
    the uninitialized parameters of lazy modules have entries too."""

    lazy: bool = False
    notes: list[str] = field(default_factory=list)
    recomputed: set[int] = field(default_factory=set)  # ids of what a stored hook makes again
    _detached: list[str] = field(default_factory=list)
    _items: list[_Item] = field(default_factory=list)
    _known: dict[int, int] = field(default_factory=dict)
    _alive: list[Any] = field(default_factory=list)  # an id is only unique while its object lives
    _names: FreeNames = field(default_factory=FreeNames)
    _quantized: list[tuple[Path, torch.Tensor]] = field(default_factory=list)
    _resolved: dict[int, torch.Tensor] = field(default_factory=dict)  # as they were, by entry
    _regions: dict[int, RegionTensor] = field(default_factory=dict)

    def take(self, value: Any, path: Path) -> int:
        """The index of the entry of a tensor or array; the same object has one entry."""
        index = self._known.get(id(value))
        if index is None:
            if self.lazy and isinstance(value, torch.Tensor) and torch.nn.parameter.is_lazy(value):
                index = self._add_uninitialized(value, path)
            else:
                _check_kind(value)
                index = self._add(value, path)
            if isinstance(value, torch.Tensor):
                self._note_own(value, path)
            self._known[id(value)] = index
            self._alive.append(value)
        return index

    def _note_own(self, tensor: torch.Tensor, path: Path) -> None:
        """What somebody hung on a tensor changes no values: it is left out, and named."""
        where = escape(".".join(path), 80)
        if tensor.requires_grad and not tensor.is_leaf and id(tensor) not in self.recomputed:
            self._detached.append(where or "the tensor")
        for name in sorted(vars(tensor).keys() - _MADE_ON_TENSORS):
            self.notes.append(f"{where}: its attribute {escape(name, 80)} is not stored")

    def all_notes(self) -> tuple[str, ...]:
        """What the user of the state should know."""
        if not self._detached:
            return tuple(self.notes)
        one = len(self._detached) == 1
        said = "is a result of other tensors" if one else "are results of other tensors"
        back = "it comes back detached" if one else "they come back detached"
        return (*self.notes, f"{few(self._detached)} {said}, which is not stored: {back}")

    def _add(self, value: Any, path: Path) -> int:
        if isinstance(value, numpy.ndarray):
            return self._add_array(value, path)
        kind = "parameter" if type(value) is torch.nn.Parameter else "tensor"
        entry = Tensor(
            name=self._name(path),
            dtype=_dtype_name(value.dtype),
            shape=tuple(value.shape),
            kind=kind,
            device="cpu" if value.is_cpu else str(value.device),
            requires_grad=value.requires_grad and value.is_leaf,
        )
        if value.layout in _SPARSE:
            return self._add_parts(path, _sparse_entry(value, entry), _sparse_parts(value))
        if value.is_quantized:
            self._quantized.append((path, value))
            return self._add_parts(path, _quantized_entry(value, entry), _quantized_parts(value))
        index = self._append(_Item(path, entry, _plain(value)))
        if value.is_conj() or value.is_neg():
            self._resolved[index] = value
        return index

    def _add_uninitialized(self, value: torch.Tensor, path: Path) -> int:
        entry = Tensor(
            name=self._name(path),
            dtype=_dtype_name(value.dtype),
            shape=(),
            kind=UNINITIALIZED[type(value)],
            device=str(value.device),
            requires_grad=value.requires_grad,
        )
        return self._append(_Item(path, entry, None))

    def mark_buffer(self, index: int) -> None:
        """Note that a module registered this tensor as a buffer."""
        item = self._items[index]
        if item.entry.kind == "tensor":
            item.entry = replace(item.entry, kind="buffer")

    def _add_array(self, value: numpy.ndarray, path: Path) -> int:
        details = None
        if not has_torch_dtype(value):
            details = {"numpy": _descr(value.dtype), "shape": list(value.shape)}
        tensor = from_array(value)
        entry = Tensor(
            name=self._name(path),
            dtype=_dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            kind="ndarray",
            details=details,
        )
        return self._append(_Item(path, entry, tensor))

    def _add_parts(self, path: Path, entry: Tensor, parts: Iterable[tuple[str, Any]]) -> int:
        index = self._append(_Item(path, entry, None))
        roles = {}
        for role, part in parts:
            component = Tensor(
                name=self._name((*path, role)),
                dtype=_dtype_name(part.dtype),
                shape=tuple(part.shape),
                kind="component",
                device=str(part.device),
            )
            roles[role] = self._append(_Item((*path, role), component, _plain(part)))
        self._items[index].entry = replace(entry, components=roles)
        return index

    def _append(self, item: _Item) -> int:
        self._items.append(item)
        return len(self._items) - 1

    def _name(self, path: Path) -> str:
        """The canonical name: the path, made unique."""
        base = ".".join(path) or "tensor"
        if not base.isascii():
            base = base.encode("utf-8", "backslashreplace").decode()
        return self._names.take(base)

    def share(self) -> Iterator[tuple[Path, str]]:
        """Find the tensors that share bytes, and make views of them; yields refusals."""
        for item in self._items:
            if item.tensor is not None:
                item.stored, strides = stored_form(item.tensor)
                if strides is not None:
                    item.entry = replace(item.entry, strides=strides)
        for group in find_shared([tensor for _, tensor in self._quantized]):
            first, *others = (self._quantized[index][0] for index in group.members)
            shared = escape(".".join(first), 80)
            for path in others:
                yield (
                    path,
                    f"shares quantized memory with {shared}, and would not again; clone() it",
                )
        self._note_resolved()
        for group in find_shared([item.tensor for item in self._items]):
            align = 0 if group.host is not None else group.low % _ALIGNMENT
            for index in group.members:
                tensor = self._items[index].tensor
                assert tensor is not None
                if (tensor.data_ptr() - group.low + align) % tensor.element_size():
                    yield self._items[index].path, "shares memory at an odd address; clone() it"
                    break
            else:
                self._make_views(group, align)

    def _note_resolved(self) -> None:
        """A conjugation or negation that was put off is carried out in a copy, which shares memory
        with nothing: where the view did, it is named."""
        if not self._resolved:
            return
        entries = enumerate(self._items)
        for group in find_shared([self._resolved.get(i, item.tensor) for i, item in entries]):
            for index in sorted(self._resolved.keys() & set(group.members)):
                where = escape(".".join(self._items[index].path), 80)
                self.notes.append(
                    f"{where}: a conjugate or negative view of memory that it shares; "
                    "it comes back with memory of its own"
                )

    def _make_views(self, group: SharedBytes, align: int) -> None:
        members = [(index, self._items[index]) for index in group.members]
        host = group.host
        if host is None:
            host = len(self._items)
            views = [
                (item.tensor.data_ptr() - group.low, item.tensor)
                for _, item in members
                if item.tensor is not None
            ]
            name = self._name((f"region-{host}",))
            region = RegionTensor(name, group.high - group.low, align, views)
            entry = Tensor(
                name=name,
                dtype="uint8",
                shape=(region.nbytes,),
                kind="region",
                device=members[0][1].entry.device,
                align=align,
            )
            self._append(_Item((), entry, None))
            self._regions[host] = region
        for index, item in members:
            if index == host:
                continue
            assert item.tensor is not None
            offset = item.tensor.data_ptr() - group.low
            strides = tuple(item.tensor.stride())
            item.entry = replace(item.entry, region=host, offset=offset, strides=strides)
            item.tensor = None

    def finish(self) -> tuple[tuple[Tensor, ...], tuple[TensorBytes | None, ...]]:
        """The entries, and the bytes of those that have their own."""
        sources: list[TensorBytes | None] = []
        for index, item in enumerate(self._items):
            if item.tensor is None:
                sources.append(self._regions.get(index))
            else:
                assert item.stored is not None
                sources.append(MemoryTensor(item.entry.name, item.entry.dtype, item.stored))
        return tuple(item.entry for item in self._items), tuple(sources)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The values without their history, and without a conjugation or negation put off."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


def _check_kind(value: Any) -> None:
    """Refuse what is no plain tensor or array."""
    if isinstance(value, numpy.ndarray):
        if type(value) is not numpy.ndarray:
            raise RefusedError(f"an array of type {type(value).__qualname__}; use numpy.asarray(x)")
        return
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.is_nested:
        raise RefusedError(_reason_of_kind(value))
    if value.is_meta:
        raise RefusedError("on device meta, it has no bytes; materialise it first")
    if value.layout == torch.strided:
        if value._is_zerotensor() or (value.numel() and not value.untyped_storage().nbytes()):
            raise RefusedError("it has no memory, or its memory was freed; make a new tensor of it")
    elif value.layout not in _SPARSE:
        raise RefusedError(f"layout {value.layout} is not supported; use to_dense()")


def _reason_of_kind(value: torch.Tensor) -> str:
    kind = type(value)
    if kind.__name__ == "DTensor":
        return "a DTensor; gather it first with full_tensor()"
    if torch.nn.parameter.is_lazy(value):
        return "an uninitialized parameter of a lazy module; run one forward first"
    if kind is torch.Tensor:
        return "a nested tensor; keep its parts, unbind()"
    way = "; keep its parts, unbind()" if value.is_nested else ""
    return f"tensor subclass {kind.__module__}.{kind.__qualname__} is not supported{way}"


def _descr(dtype: numpy.dtype[Any]) -> Any:
    """What describes a numpy dtype completely, if anything does."""
    check_portable(dtype)
    try:
        descr = numpy.lib.format.dtype_to_descr(dtype)
        complete = dtype.itemsize and numpy.lib.format.descr_to_dtype(descr) == dtype
    except ValueError:  # fields that overlap
        complete = False
    if not complete:
        raise RefusedError(f"an array of dtype {dtype}; use plain numbers")
    return descr


@functools.cache
def _dtype_name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_SIZES:
        raise RefusedError(f"dtype {name} is not supported; convert it")
    return name


def _sparse_entry(value: torch.Tensor, entry: Tensor) -> Tensor:
    layout = str(value.layout).removeprefix("torch.")
    coalesced = {"coalesced": value.is_coalesced()} if layout == "sparse_coo" else None
    return replace(entry, layout=layout, details=coalesced)


def _sparse_parts(value: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    value = value.detach()
    if value.layout == torch.sparse_coo:
        return [("indices", value._indices()), ("values", value._values())]
    return [(role, getattr(value, role)()) for role in _SPARSE[value.layout]]


def _quantized_entry(value: torch.Tensor, entry: Tensor) -> Tensor:
    if value.qscheme() == torch.per_tensor_affine:
        details: dict[str, Any] = {
            "scheme": "per_tensor_affine",
            "scale": value.q_scale(),
            "zero_point": value.q_zero_point(),
        }
    elif value.qscheme() == torch.per_channel_affine:
        details = {"scheme": "per_channel_affine", "axis": value.q_per_channel_axis()}
    else:
        raise RefusedError(f"quantised by {value.qscheme()}; dequantize() it")
    return replace(entry, layout="quantized", details=details)


def _quantized_parts(value: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    parts = [("integers", value.int_repr())]
    if value.qscheme() == torch.per_channel_affine:
        parts.append(("scales", value.q_per_channel_scales()))
        parts.append(("zero_points", value.q_per_channel_zero_points()))
    return parts
