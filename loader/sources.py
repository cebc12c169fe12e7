"""Tensors in memory as ``TensorBytes``: read in pieces, without a second copy of the whole."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy
import torch

from ckpt.core.errors import SpaceError
from ckpt.core.printable import escape

# Integers of each item size: bits are moved as these, because few kernels know every dtype.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
# The characters of the numpy dtypes that torch has, in native byte order.
_NUMPY_CHARS = "?bBhHiIlLqQefdFD"
_COPIED_AS_THEY_ARE = frozenset({torch.float32, torch.int32})


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements as plain bits, not copied."""
    return tensor.detach().view(_BITS[tensor.element_size()])


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied; writable where the tensor is."""
    if tensor.numel() == 0:
        return memoryview(bytearray())
    # as_strided: a dimension of size 1 may carry any stride, which view would refuse.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return flat.numpy().data


def has_torch_dtype(array: numpy.ndarray) -> bool:
    """Whether torch has a dtype for the elements of an array as they lie there."""
    return array.dtype.isnative and array.dtype.char in _NUMPY_CHARS


def from_array(array: numpy.ndarray) -> torch.Tensor:
    """A tensor over the memory of an array, or a copy where torch cannot describe that; its plain
    bytes where torch has no such dtype."""
    if not has_torch_dtype(array):
        array = numpy.frombuffer(array.tobytes(), numpy.uint8)
    elif any(step < 0 or step % array.itemsize for step in array.strides):
        array = numpy.ascontiguousarray(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # read-only arrays: nothing is written here
        return torch.from_numpy(array)


class MemoryTensor:
    """The stored bytes of one tensor: its logical values in C order. ``values`` is the tensor."""

    def __init__(self, name: str, dtype: str, tensor: torch.Tensor) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = tuple(tensor.shape)
        self.nbytes = tensor.numel() * tensor.element_size()
        self.values = tensor
        self._view: memoryview | None = None

    def read(self, offset: int, length: int) -> memoryview:
        if self._view is None and self.values.is_contiguous() and self.values.device.type == "cpu":
            self._view = as_bytes(self.values)
        if self._view is not None:
            return self._view[offset : offset + length]
        bits = as_bits(self.values)
        size = bits.element_size()
        first, last = offset // size, -(-(offset + length) // size)
        part = _logical_elements(bits, first, last)
        start = offset - first * size
        return as_bytes(part)[start : start + length]


def as_copied(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory as elements that torch copies fast and bit for bit."""
    if not tensor.is_contiguous():
        return as_bits(tensor)
    if tensor.dtype in _COPIED_AS_THEY_ARE:
        return tensor
    begins = tensor.storage_offset() * tensor.element_size()
    word = torch.int32 if tensor.nbytes % 4 == begins % 4 == 0 else torch.uint8
    return tensor.as_strided((tensor.numel(),), (1,)).view(word)


def laid_out(name: str, value: Any) -> MemoryTensor:
    """Any restored tensor or array as plain values in C order; sparse and quantised ones dense.

    Raises:
        SpaceError: ``no-memory`` when what is sparse or repeated is too large for that.
    """
    tensor = value if isinstance(value, torch.Tensor) else from_array(value)
    tensor = tensor.detach()
    try:
        if tensor.is_quantized:
            tensor = tensor.dequantize()
        elif tensor.layout != torch.strided:
            tensor = tensor.to_dense()
        plain = tensor.contiguous()
    except RuntimeError as error:
        raise no_room(name, error) or error from None
    return MemoryTensor(name, str(tensor.dtype).removeprefix("torch."), plain)


def no_room(name: str, error: Exception) -> SpaceError | None:
    """The error for a tensor that torch found no memory for, if that is what it says."""
    if not isinstance(error, RuntimeError) or "tried to allocate" not in str(error).lower():
        return None
    return SpaceError(
        "no-memory",
        f'there is no room for "{escape(name)}" ({escape(str(error).splitlines()[0])})',
        hint="free some memory, or give device= another one",
    )


class RegionTensor:
    """The bytes that several overlapping tensors lie in; those that none covers are zero, so
    that no stale memory is stored and equal tensors give equal bytes."""

    dtype = "uint8"

    def __init__(
        self, name: str, nbytes: int, align: int, views: Sequence[tuple[int, torch.Tensor]]
    ) -> None:
        self.name = name
        self.nbytes = nbytes
        self.shape = (nbytes,)
        self._align = align
        self._views = views
        self._bytes: memoryview | None = None

    def read(self, offset: int, length: int) -> memoryview:
        if self._bytes is None:
            self._bytes = as_bytes(self._gather())
        return self._bytes[offset : offset + length]

    def _gather(self) -> torch.Tensor:
        region = torch.zeros(self._align + self.nbytes, dtype=torch.uint8, device="cpu")
        for offset, view in self._views:
            bits = as_bits(view)
            window = typed_view(region, self._align + offset, bits.dtype)
            # By index: a view may refer to one byte twice, where copy_ would refuse.
            window[_element_offsets(view)] = bits.reshape(-1).cpu()
        return region[self._align :]


def typed_view(region: torch.Tensor, offset: int, dtype: torch.dtype) -> torch.Tensor:
    """The elements of ``dtype`` that lie in a flat uint8 tensor from byte ``offset`` on.

    The byte address must be a multiple of the item size, or torch raises.
    """
    room = (region.numel() - offset) // dtype.itemsize * dtype.itemsize
    return region[offset : offset + room].view(dtype)


def _element_offsets(view: torch.Tensor) -> torch.Tensor:
    """The distance of each logical element from the first one, in elements."""
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for size, step in zip(view.shape, view.stride(), strict=True):
        offsets = offsets.unsqueeze(-1) + torch.arange(size, device="cpu") * step
    return offsets.reshape(-1)


def _logical_elements(tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Elements ``[first, last)`` in C order, contiguous on the CPU; copies no more than the rows
    that they lie in."""
    if tensor.dim() > 1:
        row = math.prod(tensor.shape[1:])
        low, high = first // row, -(-last // row)
        if high - low == 1:
            return _logical_elements(tensor[low], first - low * row, last - low * row)
        part = tensor[low:high].cpu().contiguous().reshape(-1)
        return part[first - low * row : last - low * row]
    return tensor.reshape(-1)[first:last].cpu().contiguous()
