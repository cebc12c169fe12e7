"""Room for the bytes of tensors that are being pulled, and how many bytes an entry may claim."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import numpy
import torch

from ckpt.core.documents import Part, Tensor
from ckpt.core.dtypes import ITEM_SIZES, QUANTIZED
from ckpt.core.errors import CkptError, IntegrityError
from ckpt.core.printable import escape
from ckpt.core.tensors import CHUNK_BYTES
from ckpt.loader.devices import DeviceMap, destination
from ckpt.loader.huge_pages import use_huge_pages
from ckpt.loader.sources import as_bits, as_bytes, no_room

# Beyond any tensor; arithmetic on larger numbers would only take time.
_SHAPE_BITS = 4096


class MemorySpace:
    """Room for the bytes of one entry, on the CPU."""

    def __init__(self, entry: Tensor) -> None:
        nbytes = stored_nbytes(entry)
        try:
            if entry.align:
                room = torch.empty(entry.align + nbytes, dtype=torch.uint8, device="cpu")
                self.tensor = room[entry.align :]
            else:
                self.tensor = torch.empty(entry.stored_shape, dtype=dtype_of(entry), device="cpu")
                use_huge_pages(self.tensor)
        except (RuntimeError, TypeError, OverflowError) as error:
            raise not_made(entry, error) from None
        self._view = as_bytes(self.tensor)

    def write(self, offset: int, data: memoryview) -> None:
        self._view[offset : offset + len(data)] = data

    def view(self, offset: int, length: int) -> memoryview | None:
        return self._view[offset : offset + length]

    def adopt(self, memory: memoryview) -> bool:
        """Take ``memory`` in place of the room made here, if it is as long."""
        if len(memory) != len(self._view):
            return False
        dtype, shape = self.tensor.dtype, self.tensor.shape
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
        self._view = as_bytes(self.tensor)
        return True


class DeviceSpace:
    """Room for the bytes of one entry on a GPU, where pieces are copied as they come: the whole of
    it is never in memory here."""

    @torch.inference_mode(False)  # threads that write to it are never in that mode
    def __init__(self, entry: Tensor, device: torch.device) -> None:
        stored_nbytes(entry)
        try:
            self.tensor = torch.empty(entry.stored_shape, dtype=dtype_of(entry), device=device)
        except (RuntimeError, TypeError, OverflowError) as error:
            raise not_made(entry, error) from None
        flat = self.tensor.as_strided((self.tensor.numel(),), (1,))
        self._bytes = flat.view(torch.uint8)
        # Whoever had this memory before may still use it on the stream that it came from.
        self._stream = torch.cuda.current_stream(device) if self.tensor.is_cuda else None

    def write(self, offset: int, data: memoryview) -> None:
        piece = torch.frombuffer(data, dtype=torch.uint8)
        with torch.cuda.stream(self._stream):
            with contextlib.suppress(RuntimeError):  # there may be none to pin
                piece = torch.empty_like(piece, pin_memory=True).copy_(piece)
            self._bytes[offset : offset + len(data)] = piece

    def view(self, offset: int, length: int) -> memoryview | None:
        return None


Space = MemorySpace | DeviceSpace


def space_for(entry: Tensor, devices: DeviceMap) -> Space:
    """Room on the GPU that the tensor goes to, where its bytes are its elements in order; else
    here."""
    device = destination(entry.device, devices)
    if device is not None and device.type == "cuda" and is_in_order(entry):
        return DeviceSpace(entry, device)
    return MemorySpace(entry)


def is_in_order(entry: Tensor) -> bool:
    """Whether the bytes of an entry are all that its tensor has, one after the other."""
    plain = entry.kind in ("tensor", "parameter", "buffer")
    return plain and entry.strides is None and not entry.parts


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
    if entry.dtype in QUANTIZED and entry.layout != "quantized":
        raise damaged(f'"{entry.name}" has a quantised dtype and no scale')
    return dtype


def stored_nbytes(entry: Tensor) -> int:
    """How many bytes an entry with chunks has; IntegrityError unless its chunks are as many."""
    check_shape(entry)
    if entry.dtype in QUANTIZED:
        raise damaged(f'"{entry.name}" is quantised and has bytes of its own')
    if entry.strides is not None and len(entry.strides) != len(entry.shape):
        raise damaged(f'"{entry.name}" has {len(entry.strides)} strides')
    if not 0 <= entry.align < 16 or (entry.align and entry.kind != "region"):
        raise damaged(f'"{entry.name}" has alignment {entry.align}')
    shape = entry.stored_shape
    nbytes = math.prod(shape) * dtype_of(entry).itemsize
    if entry.parts:
        _check_parts(entry)
        return nbytes
    # Before anything is allocated: the chunks are in the store, a shape is only a claim.
    if min(shape, default=0) < 0 or -(-nbytes // CHUNK_BYTES) != len(entry.chunks):
        raise damaged(f'"{entry.name}" has {len(entry.chunks)} chunks for {nbytes} bytes')
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
        raise damaged(f'"{entry.name}" is not made up of its parts')


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


def check_shape(entry: Tensor) -> None:
    if sum(size.bit_length() for size in entry.shape if size not in (0, 1)) > _SHAPE_BITS:
        raise damaged(f'"{entry.name}" has a shape that no tensor has')


def not_made(entry: Tensor, error: Exception) -> CkptError:
    """The error for a tensor that torch could not make: there was no room, or it cannot be one."""
    return no_room(entry.name, error) or damaged(f'"{entry.name}": {error}')


def damaged(reason: str) -> IntegrityError:
    shown = escape(reason.partition("\n")[0])  # torch adds lines of its own
    return IntegrityError(
        "document-damaged", f"the document contradicts itself: {shown}", hint="run `ckpt fsck`"
    )
