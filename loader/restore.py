"""A document and its bytes to the live state that was captured."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from ckpt.core.documents import Document, Part, Tensor
from ckpt.core.dtypes import ITEM_SIZES
from ckpt.core.errors import IntegrityError, UsageError
from ckpt.core.printable import escape
from ckpt.core.tensors import CHUNK_BYTES
from ckpt.loader.capture import UNINITIALIZED
from ckpt.loader.geometry import contiguous_strides, is_dense
from ckpt.loader.huge_pages import use_huge_pages
from ckpt.loader.sources import as_bits, as_bytes, typed_view
from ckpt.loader.values import MALFORMED, Decoder, numpy_dtype

DeviceMap = str | torch.device | Mapping[str, str] | None


_UNINITIALIZED = {kind: made for made, kind in UNINITIALIZED.items()}
_QUANTIZED = ("quint8", "qint8", "qint32")
# Beyond any tensor; arithmetic on larger numbers would only take time.
_SHAPE_BITS = 4096
# An index that says more than this many times what is stored of it would only take time to check.
_REPEATS_LIMIT = 64


class CkptWarning(UserWarning):
    """Something that was done is not quite what was recorded."""


class MemorySpace:
    """Room for the bytes of one entry, on the CPU."""

    def __init__(self, entry: Tensor) -> None:
        nbytes = stored_nbytes(entry)
        try:
            if entry.align:
                room = torch.empty(entry.align + nbytes, dtype=torch.uint8)
                self.tensor = room[entry.align :]
            else:
                self.tensor = torch.empty(entry.stored_shape, dtype=dtype_of(entry))
                use_huge_pages(self.tensor)
        except (RuntimeError, TypeError, OverflowError) as error:
            raise _damaged(f'"{entry.name}": {error}') from None
        self._view = as_bytes(self.tensor)

    def write(self, offset: int, data: memoryview) -> None:
        self._view[offset : offset + len(data)] = data

    def view(self, offset: int, length: int) -> memoryview | None:
        return self._view[offset : offset + length]


class BoxSpace:
    """Room for those values of a tensor of ``shape`` that lie in a box from ``offset`` on, which
    ``target`` takes; what is written begins at byte ``start`` of the tensor, and may be more."""

    def __init__(
        self, target: torch.Tensor, shape: Sequence[int], offset: Sequence[int], start: int = 0
    ) -> None:
        self._target = as_bits(target)
        self._shape = tuple(shape)
        self._offset = tuple(offset)
        self._start = start
        whole = tuple(target.shape) == self._shape
        direct = whole and target.device.type == "cpu" and target.is_contiguous()
        self._view = as_bytes(target) if direct else None

    def write(self, offset: int, data: memoryview) -> None:
        values = torch.frombuffer(data, dtype=self._target.dtype)
        first = (self._start + offset) // self._target.element_size()
        _copy_box(values, first, self._shape, self._offset, self._target)

    def view(self, offset: int, length: int) -> memoryview | None:
        first = self._start + offset
        return None if self._view is None else self._view[first : first + length]


def _copy_box(
    values: torch.Tensor,
    first: int,
    shape: tuple[int, ...],
    offset: tuple[int, ...],
    target: torch.Tensor,
) -> None:
    """Of the elements of a tensor from ``first`` on, in C order, take those in the box."""
    if not shape:
        target.copy_(values[0])
        return
    row = math.prod(shape[1:])
    while values.numel():
        at, inside = divmod(first, row)
        rows = 0 if inside else values.numel() // row
        taken = rows * row or min(row - inside, values.numel())
        low, high = max(at, offset[0]), min(at + max(rows, 1), offset[0] + target.shape[0])
        if low < high and rows:
            block = values[:taken].view(rows, *shape[1:])[low - at : high - at]
            for dimension, place in enumerate(offset[1:], 1):
                block = block.narrow(dimension, place, target.shape[dimension])
            target[low - offset[0] : high - offset[0]] = block
        elif low < high:
            _copy_box(values[:taken], inside, shape[1:], offset[1:], target[low - offset[0]])
        values, first = values[taken:], first + taken


def part_spaces(
    entry: Tensor, whole: torch.Tensor
) -> Iterator[tuple[int, tuple[str, ...], BoxSpace]]:
    """Of each part the number of its bytes, its chunks, and its room in the whole tensor."""
    for part, chunks in entry.pieces():
        target = whole
        for dimension, (at, size) in enumerate(zip(part.offset, part.shape, strict=True)):
            target = target.narrow(dimension, at, size)
        nbytes = math.prod(part.shape) * whole.element_size()
        yield nbytes, chunks, BoxSpace(target, part.shape, (0,) * len(part.shape))


def dtype_of(entry: Tensor) -> torch.dtype:
    """torch's dtype of an entry; IntegrityError ``dtype-unknown``."""
    dtype = getattr(torch, entry.dtype, None) if entry.dtype in ITEM_SIZES else None
    if not isinstance(dtype, torch.dtype):
        raise IntegrityError(
            "dtype-unknown",
            f'"{escape(entry.name)}" has dtype {escape(entry.dtype, 80)}, which this torch lacks',
            hint="install a newer torch",
        )
    if entry.dtype in _QUANTIZED and entry.layout != "quantized":
        raise _damaged(f'"{entry.name}" has a quantised dtype and no scale')
    return dtype


def stored_nbytes(entry: Tensor) -> int:
    """How many bytes an entry with chunks has; IntegrityError unless its chunks are as many."""
    _check_shape(entry)
    if entry.strides is not None and len(entry.strides) != len(entry.shape):
        raise _damaged(f'"{entry.name}" has {len(entry.strides)} strides')
    if not 0 <= entry.align < 16 or (entry.align and entry.kind != "region"):
        raise _damaged(f'"{entry.name}" has alignment {entry.align}')
    shape = entry.stored_shape
    nbytes = math.prod(shape) * dtype_of(entry).itemsize
    if entry.parts:
        _check_parts(entry)
        return nbytes
    # Before anything is allocated: the chunks are in the store, a shape is only a claim.
    if min(shape, default=0) < 0 or -(-nbytes // CHUNK_BYTES) != len(entry.chunks):
        raise _damaged(f'"{entry.name}" has {len(entry.chunks)} chunks for {nbytes} bytes')
    return nbytes


def _check_parts(entry: Tensor) -> None:
    """Refuse parts that do not make up the tensor, without gap and without overlap."""
    size = dtype_of(entry).itemsize
    fits = entry.strides is None and sum(part.chunks for part in entry.parts) == len(entry.chunks)
    for part in entry.parts:
        fits &= len(part.offset) == len(part.shape) == len(entry.shape)
        places = zip(part.offset, part.shape, entry.shape, strict=False)
        fits &= all(0 <= at < at + own <= whole for at, own, whole in places)
        fits &= part.chunks == -(-math.prod(part.shape) * size // CHUNK_BYTES)
    volume = sum(math.prod(part.shape) for part in entry.parts)
    if not fits or volume != math.prod(entry.shape) or _overlap(entry.parts):
        raise _damaged(f'"{entry.name}" is not made up of its parts')


def _overlap(parts: Sequence[Part]) -> bool:
    """Whether two parts share an element; compares those whose ranges meet in the dimension that
    tells most of them apart."""
    low = numpy.array([part.offset for part in parts], numpy.int64).reshape(len(parts), -1)
    high = low + numpy.array([part.shape for part in parts], numpy.int64).reshape(low.shape)
    if not low.shape[1]:
        return len(parts) > 1
    axis = max(range(low.shape[1]), key=lambda number: len({*low[:, number]}))
    order = numpy.argsort(low[:, axis], kind="stable")
    low, high = low[order], high[order]
    ends = numpy.searchsorted(low[:, axis], high[:, axis])
    for at, end in enumerate(ends):
        after = slice(at + 1, end)
        if ((low[after] < high[at]) & (low[at] < high[after])).all(axis=1).any():
            return True
    return False


def _check_shape(entry: Tensor) -> None:
    if sum(size.bit_length() for size in entry.shape if size not in (0, 1)) > _SHAPE_BITS:
        raise _damaged(f'"{entry.name}" has a shape that no tensor has')


@dataclass(slots=True)
class Restorer:
    """Builds live tensors from filled spaces; each entry becomes one object, however often the
    state refers to it."""

    document: Document
    spaces: Mapping[int, MemorySpace]
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
        """
        if index not in self._built:
            if not isinstance(index, int) or not 0 <= index < len(self.document.tensors):
                raise _damaged(f"there is no tensor {index}")
            entry = self.document.tensors[index]
            if index in self._open:
                raise _damaged(f'"{entry.name}" refers to itself')
            self._open.add(index)
            try:
                self._built[index] = self._finish(entry, self._build(index, entry))
            except MALFORMED as error:
                raise _damaged(f'"{entry.name}": {error}') from None
            self._open.discard(index)
        return self._built[index]

    def _build(self, index: int, entry: Tensor) -> torch.Tensor:
        _check_shape(entry)
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
                raise _damaged(f'"{entry.name}" has no bytes')
            self._bases[index] = self._placed(entry, self.spaces[index].tensor)
        return self._bases[index]

    def _placed(self, entry: Tensor, stored: torch.Tensor) -> torch.Tensor:
        device = self.device(entry.device)
        if entry.strides is None:
            if device.type == "cpu":
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
            raise _damaged(f'"{entry.name}" is a view of nothing')
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
            return _quantized(parts, details, dtype_of(entry))
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
        wanted = self.devices
        if isinstance(wanted, Mapping):
            wanted = wanted.get(recorded)
        if wanted is not None:
            return parse_device(wanted)
        device = parse_device(recorded)
        if _is_available(device):
            return device
        self._absent.add(recorded)
        return torch.device("cpu")


def parse_device(name: str | torch.device) -> torch.device:
    """torch's device of this name; UsageError ``device-invalid``."""
    try:
        return torch.device(name)
    except (RuntimeError, TypeError):
        raise UsageError(
            "device-invalid", f"{name!r} is not a device", hint='use "cpu" or "cuda:0"'
        ) from None


def check_devices(devices: DeviceMap) -> None:
    """Refuse a device that is unknown or absent before any byte is read.

    Raises:
        UsageError: ``device-invalid``, ``device-absent``.
    """
    wanted = devices.values() if isinstance(devices, Mapping) else [devices]
    for name in wanted:
        if name is not None and not _is_available(parse_device(name)):
            raise UsageError(
                "device-absent", f"{name} is not available here", hint='use device="cpu"'
            )


def check_mapping(devices: DeviceMap, document: Document) -> None:
    """Refuse one device for a module that was on several; UsageError ``device-ambiguous``."""
    recorded = sorted({tensor.device for tensor in document.tensors if tensor.has_values})
    if devices is None or isinstance(devices, Mapping) or len(recorded) < 2:
        return
    mapping = ", ".join(f'"{escape(name, 20)}": …' for name in recorded)
    raise UsageError(
        "device-ambiguous",
        f"the module was on {' and '.join(escape(name, 20) for name in recorded)}",
        hint=f"say where each part goes: device={{{mapping}}}",
    )


def _is_available(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    module: Any = getattr(torch, device.type, None)
    if module is None or not module.is_available():
        return False
    return device.index is None or device.index < int(module.device_count())


_COMPRESSED = {
    "sparse_csr": (torch.sparse_csr, "crow_indices", "col_indices"),
    "sparse_csc": (torch.sparse_csc, "ccol_indices", "row_indices"),
    "sparse_bsr": (torch.sparse_bsr, "crow_indices", "col_indices"),
    "sparse_bsc": (torch.sparse_bsc, "ccol_indices", "row_indices"),
}


def _quantized(
    parts: Mapping[str, torch.Tensor], details: Mapping[str, Any], dtype: torch.dtype
) -> torch.Tensor:
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


def _damaged(reason: str) -> IntegrityError:
    shown = escape(reason.partition("\n")[0])  # torch adds lines of its own
    return IntegrityError(
        "document-damaged", f"the document contradicts itself: {shown}", hint="run `ckpt fsck`"
    )
