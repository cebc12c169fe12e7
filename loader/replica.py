"""A second module from a captured one: rebuilt like a loaded one, sharing nothing that a forward
may write to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from msgspec.structs import replace
from torch import nn

from ckpt.core.documents import FORMAT, Document, Tensor
from ckpt.core.tensors import TensorBytes, chunk_digests, chunk_spans
from ckpt.loader.capture import Captured
from ckpt.loader.devices import DeviceMap
from ckpt.loader.rebuild import rebuild
from ckpt.loader.restore import Restorer
from ckpt.loader.sources import MemoryTensor, as_bits
from ckpt.loader.spaces import MemorySpace, Space
from ckpt.loader.trust import Trust

# Up to this size a state is copied and proven in full (design, section 6).
FULL_BYTES = 256 << 20
_NO_DIGEST = "0" * 64

Spaces = dict[int, MemorySpace]


def drafted(captured: Captured, *, digests: bool) -> Document:
    """The document of a captured module before its push; without ``digests`` the chunks are only
    counted."""
    tensors = tuple(
        entry if source is None else replace(entry, chunks=_chunks(source, digests))
        for entry, source in zip(captured.tensors, captured.sources, strict=True)
    )
    return Document(
        format=FORMAT,
        state="module" if captured.modules else "values",
        root=captured.root,
        tensors=tensors,
        environment="",
        modules=captured.modules,
        classes=captured.classes,
        order=captured.order,
        dropped=captured.dropped,
    )


def _chunks(source: TensorBytes, digests: bool) -> tuple[str, ...]:
    if digests:
        return chunk_digests(source)
    return (_NO_DIGEST,) * len(chunk_spans(source.nbytes))


def copied(captured: Captured, document: Document) -> Spaces:
    """The bytes of a captured state, copied."""
    return {
        index: copy_of(document.tensors[index], source)
        for index, source in enumerate(captured.sources)
        if source is not None
    }


def copy_of(entry: Tensor, source: TensorBytes) -> MemorySpace:
    """The bytes of one entry, copied."""
    space = MemorySpace(entry)
    for offset, length in chunk_spans(source.nbytes):
        space.write(offset, source.read(offset, length))
    return space


def copied_again(document: Document, spaces: Mapping[int, Space]) -> Spaces:
    """Spaces of their own with the same bytes."""
    again = {index: MemorySpace(document.tensors[index]) for index in spaces}
    for index, space in again.items():
        as_bits(space.tensor).copy_(as_bits(spaces[index].tensor))
    return again


def replicate(
    document: Document, spaces: Mapping[int, Space], trust: Trust, device: DeviceMap = None
) -> nn.Module:
    """A module of its own from a document and bytes, which are not copied again on the CPU."""
    return rebuild(document, Restorer(document, spaces, device), trust)


def share(captured: Captured, document: Document, trust: Trust) -> nn.Module:
    """A module whose contiguous parameters are the captured ones' memory, and whose everything
    else is a copy: for states too large to copy whole."""
    shared = {}
    rest: Spaces = {}
    for index, source in enumerate(captured.sources):
        entry = document.tensors[index]
        if isinstance(source, MemoryTensor) and entry.kind == "parameter" and not entry.strides:
            shared[index] = source.values
        elif source is not None:
            rest[index] = copy_of(entry, source)
    return rebuild(document, _SharingRestorer(document, rest, shared=shared), trust)


@dataclass(slots=True)
class _SharingRestorer(Restorer):
    """Takes some tensors as they are."""

    shared: Mapping[int, torch.Tensor] = field(default_factory=dict)

    def _base(self, index: int) -> torch.Tensor:
        if index in self.shared:
            return self.shared[index]
        return super(_SharingRestorer, self)._base(index)


@dataclass(slots=True)
class WideRestorer(Restorer):
    """Widens every floating tensor to double precision, plain attributes included, which
    ``.double()`` would leave behind."""

    def _finish(self, entry: Tensor, tensor: torch.Tensor) -> Any:
        made = super(WideRestorer, self)._finish(entry, tensor)
        if not isinstance(made, torch.Tensor) or made.is_quantized:
            return made
        if made.is_floating_point():
            wide = torch.float64
        elif made.is_complex():
            wide = torch.complex128
        else:
            return made
        widened = _converted(made.detach(), wide)
        if isinstance(made, nn.Parameter):
            return nn.Parameter(widened, requires_grad=made.requires_grad)
        return widened


def _converted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Another dtype of a tensor. A dimension of stride 0 is converted once: written out, it may be
    larger than any memory."""
    if tensor.layout != torch.strided or 0 not in tensor.stride():
        return tensor.to(dtype)
    once = tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())
    return tensor[once].to(dtype).expand(tensor.shape)
