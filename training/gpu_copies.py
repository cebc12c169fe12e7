"""Copies from GPUs into the arena, by a stream of their own: neither the loop nor Python waits."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

Wait = Callable[[], None]

_cuda: Any = torch.cuda  # its functions have no types
_PORTABLE = 1  # cudaHostRegisterPortable: for every GPU of the process
_REFUSED = (2, 801)  # cudaErrorMemoryAllocation, cudaErrorNotSupported


class GpuCopies:
    """A copying stream per GPU, and the memory that GPUs may write into by themselves.

    A copy has the values at the call: it waits for what the current stream of its GPU was given
    before, and what that is given afterwards waits for it.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pinned: torch.Tensor | None = None
        self._undo: Callable[[], object] | None = None

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on a GPU."""
        return tensor.is_cuda

    def pin(self, room: torch.Tensor, device: torch.device) -> None:
        """Let GPUs write into ``room``, which is on the CPU, in place of what was pinned before;
        ``device`` is one of them. Where the system has no memory to pin, copies are made by way of
        the driver's own.

        Raises:
            RuntimeError: any other answer of CUDA.
        """
        if _covers(self._pinned, room):
            return
        self.unpin()
        undo = weakref.finalize(room, _unregister, room.data_ptr(), device, os.getpid())
        undo.atexit = False  # CUDA may be gone by then, and the memory goes with the process
        # Before it is done: Ctrl-C may come as the call returns.
        self._pinned, self._undo = room, undo
        with torch.cuda.device(device):
            runtime = _cuda.cudart()
            answer = runtime.cudaHostRegister(room.data_ptr(), room.nbytes, _PORTABLE)
        if int(answer) == 0:
            return
        undo.detach()
        self._pinned = self._undo = None
        _forget_error(device)
        if int(answer) not in _REFUSED:
            raise RuntimeError(f"cudaHostRegister: {runtime.cudaGetErrorString(answer)}")

    def unpin(self) -> None:
        """Take back what GPUs may write into, when they have written."""
        if self._undo is not None:
            self.settle()
            self._undo()
        self._pinned = self._undo = None

    def settle(self) -> None:
        """Return when nothing is being copied; a GPU that failed has told it elsewhere."""
        for stream in self._streams.values():
            with contextlib.suppress(RuntimeError):
                stream.synchronize()

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
            ends.append((device, end))

        def wait() -> None:
            for device, end in ends:
                with torch.cuda.device(device):  # a thread's own is the first, whatever the loop's
                    end.synchronize()

        return wait

    def await_loop(self, tensors: Sequence[torch.Tensor]) -> None:
        """Wait for what the loop itself copies into these tensors of the CPU: into pinned ones a
        copy may still be under way."""
        if any(tensor.is_pinned() for tensor in tensors):
            for device in self._streams:
                torch.cuda.current_stream(device).synchronize()


def _covers(pinned: torch.Tensor | None, room: torch.Tensor) -> bool:
    if pinned is None or pinned.data_ptr() != room.data_ptr():
        return False
    return pinned.nbytes >= room.nbytes


def _unregister(address: int, device: torch.device, process: int) -> None:
    if process != os.getpid():  # a child that was forked has the mapping, and no CUDA
        return
    with contextlib.suppress(RuntimeError), torch.cuda.device(device):
        torch.cuda.synchronize()  # whoever lets go of a run may not have waited for its copies
        if int(_cuda.cudart().cudaHostUnregister(address)) != 0:
            _forget_error(device)


def _forget_error(device: torch.device) -> None:
    """Have CUDA tell an error that is dealt with now, and not at the loop's next kernel."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)
