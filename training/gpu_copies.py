"""Copies from GPUs into the arena, by a stream of their own: neither the loop nor Python waits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

Wait = Callable[[], None]

_cuda: Any = torch.cuda  # its functions have no types
_PORTABLE = 1  # cudaHostRegisterPortable: for every GPU of the process


class GpuCopies:
    """A copying stream per GPU, and the memory that GPUs may write into by themselves.

    A copy has the values at the call: it waits for what the current stream of its GPU was given
    before, and what that is given afterwards waits for it.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pinned: torch.Tensor | None = None

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on a GPU."""
        return tensor.is_cuda

    def pin(self, room: torch.Tensor) -> None:
        """Let GPUs write into ``room``, which is on the CPU, in place of what was pinned before.
        Where the system refuses, copies are made by way of the driver's own memory."""
        known = self._pinned
        if known is not None and (known.data_ptr(), known.nbytes) == (room.data_ptr(), room.nbytes):
            return
        self.unpin()
        answer = _cuda.cudart().cudaHostRegister(room.data_ptr(), room.nbytes, _PORTABLE)
        if int(answer) == 0:
            self._pinned = room  # which keeps the memory mapped
            return
        with contextlib.suppress(RuntimeError):  # CUDA tells it once more at the next kernel
            torch.zeros(1, device="cuda")

    def unpin(self) -> None:
        """Take back what GPUs may write into, when they have written."""
        if self._pinned is not None:
            for stream in self._streams.values():
                stream.synchronize()
            _cuda.cudart().cudaHostUnregister(self._pinned.data_ptr())
            self._pinned = None

    def begin(self, targets: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> Wait:
        """Begin to copy ``tensors`` into ``targets``, which are pinned; returns what waits for the
        end, and raises RuntimeError when a GPU failed."""
        ends = []
        for device in dict.fromkeys(tensor.device for tensor in tensors):
            loop = torch.cuda.current_stream(device)
            own = self._streams.get(device)
            if own is None:
                own = self._streams[device] = _cuda.Stream(device)
            own.wait_stream(loop)
            with torch.cuda.stream(own):
                for target, tensor in zip(targets, tensors, strict=True):
                    if tensor.device == device:
                        target.copy_(tensor, non_blocking=True)
                        tensor.record_stream(own)  # its memory is nobody else's until then
            end = own.record_event()
            loop.wait_event(end)
            ends.append(end)

        def wait() -> None:
            for end in ends:
                end.synchronize()

        return wait
