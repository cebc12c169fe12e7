"""A live state into the arena: this is all that a save keeps the loop waiting for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from ckpt.core.tensors import TensorBytes, chunk_spans
from ckpt.loader.sources import MemoryTensor, as_copied
from ckpt.training.arena import PAGE, Arena
from ckpt.training.gpu_copies import GpuCopies, Wait

# Of each source its bytes, and as what it is copied.
_Layout = list[tuple[int, torch.dtype, tuple[int, ...]]]


class Stage:
    """Copies the states of a run into an arena. Most are laid out as the one before was, so the
    room of each tensor is kept ready."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._layout: _Layout = []
        self._places: list[int] = []
        self._rooms: list[torch.Tensor] = []
        self._whole = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._gpus = GpuCopies()

    @torch.no_grad()
    def copy(self, sources: Sequence[TensorBytes]) -> tuple[list[int], Wait | None]:
        """Copy all sources as they are now, of any device; returns where each one begins, and what
        waits for those that GPUs are still copying, if there are any.

        Tensors on the CPU by one call of torch, which has its own threads: for a state of many
        small ones, calls and hand-overs take longer than the copies.
        """
        copied = [
            as_copied(source.values) if isinstance(source, MemoryTensor) else None
            for source in sources
        ]
        layout: _Layout = [
            (source.nbytes, torch.uint8, (source.nbytes,))
            if values is None
            else (source.nbytes, values.dtype, values.shape)
            for source, values in zip(sources, copied, strict=True)
        ]
        if layout != self._layout:
            self._lay_out(layout)
        targets: list[torch.Tensor] = []
        tensors: list[torch.Tensor] = []
        gpu_targets: list[torch.Tensor] = []
        gpu_tensors: list[torch.Tensor] = []
        for source, values, room in zip(sources, copied, self._rooms, strict=True):
            if values is None:
                _copy_pieces(source, room)
            elif source.nbytes and self._gpus.takes(values):
                gpu_targets.append(room)
                gpu_tensors.append(values)
            elif source.nbytes:
                targets.append(room)
                tensors.append(values)
        wait = None
        try:
            if gpu_tensors:  # they copy while the processor does
                self._gpus.pin(self._whole, gpu_tensors[0].device)
                wait = self._gpus.begin(gpu_targets, gpu_tensors)
                self._gpus.await_loop(tensors)
            if tensors:
                torch._foreach_copy_(targets, tensors)
        except BaseException:  # the rooms may be those of other tensors next time
            self._gpus.settle()
            raise
        return self._places, wait

    def close(self) -> None:
        """Take the arena back from the GPUs."""
        self._gpus.unpin()

    @torch.inference_mode(False)  # its tensors would be of use in that mode alone
    def _lay_out(self, layout: _Layout) -> None:
        """One behind the other, each at the beginning of a page."""
        ends = accumulate((nbytes + -nbytes % PAGE for nbytes, _, _ in layout), initial=0)
        *places, total = ends
        room = self._arena.room(total)  # there may be none: then the layout stays that of before
        rooms = [
            torch.frombuffer(room, dtype=torch.uint8, count=nbytes, offset=place)
            .view(dtype)
            .view(shape)
            if nbytes
            else torch.empty(0, dtype=torch.uint8, device="cpu")
            for (nbytes, dtype, shape), place in zip(layout, places, strict=True)
        ]
        self._whole = torch.frombuffer(self._arena.whole(), dtype=torch.uint8)
        self._layout, self._places, self._rooms = layout, places, rooms


def _copy_pieces(source: TensorBytes, room: torch.Tensor) -> None:
    for offset, length in chunk_spans(source.nbytes):
        part = torch.frombuffer(source.read(offset, length), dtype=torch.uint8)
        room[offset : offset + length] = part
