"""How tensors lie in memory: address intervals, dense layouts, and who shares bytes with whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SharedBytes:
    """Tensors whose intervals overlap, by index. ``host`` covers all of the bytes densely, and
    every member lies in it at a multiple of its item size; else it is None."""

    low: int
    high: int
    members: tuple[int, ...]
    host: int | None


def _span(tensor: torch.Tensor, index: int) -> tuple[str, int, int, int] | None:
    """Where a strided tensor lies: device, first byte, end and index; None without bytes. Of
    those that begin together the longest comes first, since ends are negative."""
    count = tensor.numel()
    if count == 0 or tensor.is_meta:
        return None
    low = tensor.data_ptr()
    if not tensor.is_contiguous():
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        count = 1 + sum((size - 1) * step for size, step in pairs)
    device = "cpu" if tensor.is_cpu else str(tensor.device)
    return device, low, -(low + count * tensor.element_size()), index


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill their interval without gaps and without overlap, in any order
    of the dimensions."""
    expected = 1
    dimensions = [(step, size) for size, step in zip(shape, strides, strict=True) if size != 1]
    for step, size in sorted(dimensions):
        if step != expected:
            return False
        expected *= size
    return True


def find_shared(tensors: Sequence[torch.Tensor | None]) -> list[SharedBytes]:
    """Groups of tensors with overlapping bytes; ``None`` entries take no part.

    By address and not by storage: two arrays over one memory have different storages. The sweep
    keeps the greatest end so far, so that a tensor inside an early, long one is not missed.
    """
    found = (tensor is not None and _span(tensor, index) for index, tensor in enumerate(tensors))
    spans = sorted(span for span in found if span)
    groups: list[list[tuple[str, int, int, int]]] = []
    device, end = "", 0
    for span in spans:
        if span[0] == device and span[1] < end:
            groups[-1].append(span)
            end = max(end, -span[2])
        else:
            groups.append([span])
            device, end = span[0], -span[2]
    return [_shared(group, tensors) for group in groups if len(group) > 1]


def _shared(
    group: Sequence[tuple[str, int, int, int]], tensors: Sequence[torch.Tensor | None]
) -> SharedBytes:
    low = group[0][1]
    high = max(-span[2] for span in group)
    members = tuple(sorted(span[3] for span in group))
    aligned = all(_lies_at_multiple(tensors[index], low) for index in members)
    hosts = [index for index in members if aligned and _covers(tensors[index], high - low)]
    # Rather one that lies as it is stored: other readers then see it as it is.
    hosts.sort(key=lambda index: not _is_contiguous(tensors[index]))
    return SharedBytes(low, high, members, hosts[0] if hosts else None)


def _lies_at_multiple(tensor: torch.Tensor | None, low: int) -> bool:
    return tensor is not None and (tensor.data_ptr() - low) % tensor.element_size() == 0


def _covers(tensor: torch.Tensor | None, nbytes: int) -> bool:
    assert tensor is not None
    fills = tensor.numel() * tensor.element_size() == nbytes
    return fills and is_dense(tensor.shape, tensor.stride())


def _is_contiguous(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and tensor.is_contiguous()


def stored_form(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...] | None]:
    """``(what is stored, strides to restore)``: a dimension of stride 0 is stored once, and a
    view with gaps is compacted. Strides are None when they are those of a new tensor."""
    # is_contiguous() ignores dimensions of size 1, whose strides tell kernels the memory format.
    if 1 not in tensor.shape and tensor.numel() and tensor.is_contiguous():
        return tensor, None
    strides = tensor.stride()
    if strides == contiguous_strides(tensor.shape):
        return tensor, None
    if tensor.numel() == 0:
        return tensor, strides
    repeated = [step == 0 and size > 1 for size, step in zip(tensor.shape, strides, strict=True)]
    once = tensor
    for dimension, is_repeated in enumerate(repeated):
        if is_repeated:
            once = once.narrow(dimension, 0, 1)
    if is_dense(once.shape, once.stride()):
        return once, strides
    if not any(repeated):
        return once, None
    compact = contiguous_strides(once.shape)
    pairs = zip(repeated, compact, strict=True)
    return once, tuple(0 if is_repeated else step for is_repeated, step in pairs)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a C-contiguous tensor of this shape."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(1, size))
    return tuple(reversed(strides)) if shape else ()
