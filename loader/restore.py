"""A document and its bytes to the live state that was captured."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from ckpt.core.documents import Document, Tensor
from ckpt.core.errors import CkptWarning
from ckpt.loader.capture import UNINITIALIZED
from ckpt.loader.devices import DeviceMap, destination
from ckpt.loader.geometry import contiguous_strides, is_dense
from ckpt.loader.sources import as_bits, typed_view
from ckpt.loader.spaces import Space, check_shape, damaged, dtype_of, not_made
from ckpt.loader.values import MALFORMED, Decoder, numpy_dtype

_UNINITIALIZED = {kind: made for made, kind in UNINITIALIZED.items()}
# An index that says more than this many times what is stored of it would only take time to check.
_REPEATS_LIMIT = 64


@dataclass(slots=True)
class Restorer:
    """Builds live tensors from filled spaces; each entry becomes one object, however often the
    state refers to it."""

    document: Document
    spaces: Mapping[int, Space]
    devices: DeviceMap = None
    _built: dict[int, Any] = field(default_factory=dict)
    _bases: dict[int, torch.Tensor] = field(default_factory=dict)
    _absent: set[str] = field(default_factory=set)
    _open: set[int] = field(default_factory=set)

    def state(self) -> Any:
        """The state as it was pushed."""
        order = dict(self.document.order)
        decoder = Decoder(self.tensor, order, self.generator)
        state = decoder.decode(self.document.root)
        self.note_absent()
        return state

    def note_absent(self) -> None:
        """Warn of the recorded devices that are not here."""
        if self._absent:
            names = ", ".join(sorted(self._absent))
            warnings.warn(
                f"{names} is not available here; loaded on cpu", CkptWarning, stacklevel=5
            )

    def tensor(self, index: int) -> Any:
        """The live object of one entry.

        Raises:
            IntegrityError: ``document-damaged`` when the entry contradicts itself.
            SpaceError: ``no-memory`` when its device is full.
        """
        if index not in self._built:
            if not isinstance(index, int) or not 0 <= index < len(self.document.tensors):
                raise damaged(f"there is no tensor {index}")
            entry = self.document.tensors[index]
            if index in self._open:
                raise damaged(f'"{entry.name}" refers to itself')
            self._open.add(index)
            try:
                self._built[index] = self._finish(entry, self._build(index, entry))
            except MALFORMED as error:
                raise not_made(entry, error) from None
            self._open.discard(index)
        return self._built[index]

    def plain(self, names: Sequence[tuple[str, int]]) -> dict[str, Any]:
        """Tensors by name as ``state_dict()`` gives them: without what makes them parameters,
        one object where they are one."""
        made: dict[int, Any] = {}
        for _, index in names:
            if index not in made:
                value = self.tensor(index)
                bare = isinstance(value, torch.Tensor) and not torch.nn.parameter.is_lazy(value)
                made[index] = value.detach() if bare else value
        return {name: made[index] for name, index in names}

    def _build(self, index: int, entry: Tensor) -> torch.Tensor:
        check_shape(entry)
        if entry.kind in _UNINITIALIZED:
            return self._uninitialized(entry)
        if entry.region is not None:
            return self._view(entry)
        if entry.components is not None:
            return self._composed(entry)
        return self._base(index)

    def _uninitialized(self, entry: Tensor) -> torch.Tensor:
        made = _UNINITIALIZED[entry.kind](
            requires_grad=entry.requires_grad,
            device=self.device(entry.device),
            dtype=dtype_of(entry),
        )
        assert isinstance(made, torch.Tensor)
        return made

    def _base(self, index: int) -> torch.Tensor:
        """The tensor of an entry with bytes of its own, on its device."""
        if index not in self._bases:
            entry = self.document.tensors[index]
            if index not in self.spaces:
                raise damaged(f'"{entry.name}" has no bytes')
            self._bases[index] = self._placed(entry, self.spaces[index].tensor)
        return self._bases[index]

    def _placed(self, entry: Tensor, stored: torch.Tensor) -> torch.Tensor:
        device = self.device(entry.device)
        if entry.strides is None:
            if device.type == "cpu" or stored.device.type != "cpu":  # it was read to its device
                return stored
            room = torch.empty(entry.align + stored.numel(), dtype=stored.dtype, device=device)
            return room[entry.align :].view(stored.shape).copy_(stored)
        shape = stored.shape
        steps = [
            1 if step == 0 and size > 1 else step
            for size, step in zip(entry.shape, entry.strides, strict=True)
        ]
        if stored.numel() and not is_dense(shape, steps):
            raise ValueError("its strides leave gaps")
        out = torch.empty_strided(shape, steps, dtype=stored.dtype, device=device)
        as_bits(out).copy_(as_bits(stored))
        return out.as_strided(entry.shape, entry.strides)

    def _view(self, entry: Tensor) -> torch.Tensor:
        """A view into the bytes of another entry; as_strided checks its bounds."""
        assert entry.region is not None
        if not 0 <= entry.region < len(self.document.tensors) or entry.offset < 0:
            raise damaged(f'"{entry.name}" is a view of nothing')
        host = self.document.tensors[entry.region]
        base = self._base(entry.region).detach()
        align = 0
        if host.kind == "region":
            align = host.align
            # The region was allocated with its alignment in front; step back to the start.
            base = base.as_strided((base.numel() + align,), (1,), base.storage_offset() - align)
        flat = base.as_strided((base.numel(),), (1,)).view(torch.uint8)
        window = typed_view(flat, align + entry.offset, dtype_of(entry))
        strides = contiguous_strides(entry.shape) if entry.strides is None else entry.strides
        return window.as_strided(entry.shape, strides)

    def _composed(self, entry: Tensor) -> torch.Tensor:
        parts = {role: self.tensor(index) for role, index in (entry.components or {}).items()}
        details = entry.details or {}
        if entry.layout == "quantized":
            return _quantized(parts, details)
        shape = entry.shape
        if entry.layout == "sparse_coo":
            places, values = _index(parts["indices"]), parts["values"]
            coalesced = bool(details["coalesced"])
            return torch.sparse_coo_tensor(
                places, values, shape, check_invariants=True, is_coalesced=coalesced
            )
        layout, compressed, plain = _COMPRESSED[entry.layout]
        indices = _index(parts[compressed]), _index(parts[plain])
        return torch.sparse_compressed_tensor(
            *indices, parts["values"], shape, layout=layout, check_invariants=True
        )

    def _finish(self, entry: Tensor, tensor: torch.Tensor) -> Any:
        if entry.kind in _UNINITIALIZED:
            return tensor
        if tensor.shape != entry.shape or tensor.dtype != dtype_of(entry):
            raise ValueError(f"it is made of {tensor.dtype} {list(tensor.shape)}")
        if entry.kind == "ndarray":
            return _array(entry, tensor)
        if entry.kind == "parameter":
            return torch.nn.Parameter(tensor, requires_grad=entry.requires_grad)
        return tensor.requires_grad_() if entry.requires_grad else tensor

    def generator(self, device: str, state: torch.Tensor) -> torch.Generator:
        generator = torch.Generator(self.device(device))
        generator.set_state(state.cpu())
        return generator

    def device(self, recorded: str) -> torch.device:
        """Where a tensor that was on ``recorded`` goes now."""
        device = destination(recorded, self.devices)
        if device is None:
            self._absent.add(recorded)
            return torch.device("cpu")
        return device


_COMPRESSED = {
    "sparse_csr": (torch.sparse_csr, "crow_indices", "col_indices"),
    "sparse_csc": (torch.sparse_csc, "ccol_indices", "row_indices"),
    "sparse_bsr": (torch.sparse_bsr, "crow_indices", "col_indices"),
    "sparse_bsc": (torch.sparse_bsc, "ccol_indices", "row_indices"),
}


def _quantized(parts: Mapping[str, torch.Tensor], details: Mapping[str, Any]) -> torch.Tensor:
    integers = parts["integers"]
    if integers.numel() and not is_dense(integers.shape, integers.stride()):
        raise ValueError("its elements are not all stored")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch announces the end of these types
        if details["scheme"] == "per_tensor_affine":
            return torch._make_per_tensor_quantized_tensor(
                integers, details["scale"], details["zero_point"]
            )
        scales, axis = parts["scales"], details["axis"]
        if not 0 <= axis < integers.dim() or scales.shape != integers.shape[axis : axis + 1]:
            raise ValueError("its scales are not those of a dimension")
        return torch._make_per_channel_quantized_tensor(
            integers, scales, parts["zero_points"], axis
        )


def _index(part: torch.Tensor) -> torch.Tensor:
    """A component that torch reads whole, to check it."""
    if part.numel() * part.element_size() > _REPEATS_LIMIT * part.untyped_storage().nbytes():
        raise ValueError("its indices repeat without end")
    return part


def _array(entry: Tensor, tensor: torch.Tensor) -> numpy.ndarray:
    array = tensor.cpu().numpy()
    if not entry.details:
        return array
    if entry.strides is not None or entry.region is not None:
        raise ValueError("its bytes are not one after the other")
    descr = _as_descr(entry.details["numpy"])
    dtype = numpy.lib.format.descr_to_dtype(descr)
    if dtype.hasobject:
        raise ValueError("an array of Python objects")
    return array.view(dtype).reshape(entry.details["shape"])


def _as_descr(value: Any) -> Any:
    """A numpy dtype description, whose pairs JSON made lists."""
    if isinstance(value, str):
        return numpy_dtype(value).str
    return [
        tuple(
            _as_descr(part) if place == 1 else tuple(part) if isinstance(part, list) else part
            for place, part in enumerate(item)
        )
        for item in value
    ]
