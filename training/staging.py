"""A live state into the arena: this is all that a save keeps the loop waiting for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from ckpt.core.tensors import TensorBytes, chunk_spans
from ckpt.loader.sources import MemoryTensor, copy_bytes
from ckpt.training.arena import PAGE, Arena


def stage(arena: Arena, sources: Sequence[TensorBytes]) -> list[int]:
    """Copy all sources into the arena as they are now; returns where each one begins."""
    sizes = [part for one in sources for part in (one.nbytes, -one.nbytes % PAGE)]
    places = list(accumulate(sizes, initial=0))[:-1:2]
    if not any(sizes):
        return places
    room = torch.frombuffer(arena.room(sum(sizes)), dtype=torch.uint8)
    in_memory: list[tuple[MemoryTensor, torch.Tensor]] = []
    for source, target in zip(sources, torch.split(room, sizes)[::2], strict=True):
        if isinstance(source, MemoryTensor):
            in_memory.append((source, target))
            continue
        for offset, length in chunk_spans(source.nbytes):
            part = torch.frombuffer(source.read(offset, length), dtype=torch.uint8)
            target[offset : offset + length] = part
    copy_bytes(in_memory)
    return places
