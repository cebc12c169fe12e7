"""Durable push of 1 GiB to a local disk, beside raw writes, safetensors and torch.save."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from blake3 import blake3
from safetensors.torch import save_file

import ckpt
from benchmarks.measure import Timing, take_turns
from ckpt.loader.sources import as_bytes

TENSORS = 64
TENSOR_BYTES = 16 << 20
_MEMORY_CODE = "from benchmarks.push import print_peak; print_peak()"


def make_state() -> dict[str, torch.Tensor]:
    """1 GiB of fp32 in 64 tensors."""
    generator = torch.Generator().manual_seed(0)
    count = TENSOR_BYTES // 4
    return {
        f"layer.{n:02d}.weight": torch.randn(count, generator=generator) for n in range(TENSORS)
    }


def compare(folder: Path) -> dict[str, Timing]:
    """Seconds of each way to make 1 GiB durable, and of hashing it."""
    state = make_state()
    target = folder / "out"
    count = 0

    def clean() -> None:
        shutil.rmtree(folder / "repository", ignore_errors=True)
        target.unlink(missing_ok=True)
        os.sync()

    def push() -> None:
        nonlocal count
        count += 1
        with ckpt.open(folder / "repository") as repo:
            repo.push(state, "model", step=count)

    def raw() -> None:
        with target.open("wb", buffering=0) as file:
            for tensor in state.values():
                file.write(as_bytes(tensor))
            os.fsync(file.fileno())

    def hash_all() -> None:
        for tensor in state.values():
            blake3(as_bytes(tensor)).digest()

    contestants: dict[str, Callable[[], None]] = {
        "ckpt push": push,
        "safetensors.save_file + fsync": lambda: _saved(save_file, state, target),
        "torch.save + fsync": lambda: _saved(torch.save, state, target),
        "raw write + fsync": raw,
        "BLAKE3, one thread": hash_all,
    }
    return take_turns(contestants, between=clean)


def _saved(save: Callable[..., object], state: dict[str, torch.Tensor], target: Path) -> None:
    save(state, target)
    for path in (target, target.parent):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def peak_memory(folder: Path) -> int:
    """Bytes that a push of 1 GiB needs at its peak beside the state, in a process of its own."""
    command = [sys.executable, "-c", _MEMORY_CODE, str(folder)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(shown.stdout.split()[-1])


def print_peak() -> None:
    """The child process of :func:`peak_memory`."""
    state = make_state()
    with ckpt.open(Path(sys.argv[1]) / "memory") as repo:
        repo.push({"warm": torch.ones(10)}, "warm")  # imports are not the push's memory
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
        before = _memory("VmRSS")
        repo.push(state, "model")
    print(_memory("VmHWM") - before)


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
