"""Durable push to a local disk, beside raw writes, safetensors, torch.save and DCP."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy
import torch
from blake3 import blake3
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_by_dcp

import ckpt
from benchmarks.measure import Turns, take_turns
from benchmarks.states import GIB, State, make_state, sync
from benchmarks.table import Bar, Table, Target, speed_bars, speed_rows
from ckpt.loader.sources import as_bytes

_OURS, _RAW = "ckpt push", "ceiling: raw write + fsync"
_MEMORY_CODE = "from benchmarks.push import print_peak; print_peak()"
_DCP_THREADS = (1, 2, 4)


def measure(folder: Path) -> Table:
    """The table of 1 GiB and 4 GiB."""
    rows: list[tuple[str, ...]] = []
    bars: list[Bar] = []
    targets = []
    threads = _best_threads(folder)
    for size, nbytes in (("1 GiB", GIB), ("4 GiB", 4 * GIB)):
        turns = _compare(folder, nbytes, threads, ceilings=nbytes == GIB)
        peers = ("safetensors.save_file + fsync", "torch.save + fsync", _dcp_name(threads))
        rows += speed_rows(turns, _OURS, nbytes, size)
        bounds = {**dict.fromkeys(peers, 1.0), _RAW: 0.9}
        bars += speed_bars(turns, _OURS, bounds, f"{size}: {{}}")
        best = turns.best(*peers) / turns[_OURS]
        targets.append(Target(f"{size}, speed over the best peer", best, 1.0))
        raw = turns[_RAW] / turns[_OURS]
        targets.append(Target(f"{size}, speed over raw write + fsync", raw, 0.9))
    peak = _peak_memory(folder) / 2**20
    targets.append(Target("peak memory beside a state of 1 GiB", peak, 128, True, "MiB"))
    return Table(
        title="Durable local push",
        compared="fp32 in 64 tensors, all values new. ckpt hashes every byte, looks it up, writes it and commits; everything is on the disk when a contestant returns. DCP has the best of 1, 2 and 4 threads, with fsync.",
        columns=("", "ckpt's speed over this", "size", "s", "GB/s"),
        rows=tuple(rows),
        axis="speed of ckpt push over this contestant's",
        bars=tuple(bars),
        targets=tuple(targets),
        absent=turns.absent,
        packages=("torch", "safetensors", "blake3"),
    )


def _dcp_name(threads: int) -> str:
    return f"dcp.save, {threads} thread{'s' if threads > 1 else ''}"


def _compare(folder: Path, nbytes: int, threads: int, *, ceilings: bool) -> Turns:
    """Seconds of each way to make a state durable."""
    state = make_state(nbytes)
    target, repository, parts = folder / "out", folder / "repository", folder / "dcp"
    numbers = count(1)

    def clean() -> None:
        for tree in (repository, parts):
            shutil.rmtree(tree, ignore_errors=True)
        target.unlink(missing_ok=True)
        os.sync()

    def push() -> None:
        with ckpt.open(repository) as repo:
            repo.push(state, "model", step=next(numbers))

    def raw() -> None:
        with target.open("wb", buffering=0) as file:
            for tensor in state.values():
                file.write(as_bytes(tensor))
            os.fsync(file.fileno())

    contestants: dict[str, Callable[[], object]] = {
        _OURS: push,
        "safetensors.save_file + fsync": lambda: _saved(save_file, state, target),
        "torch.save + fsync": lambda: _saved(torch.save, state, target),
        _dcp_name(threads): lambda: _save_by_dcp(state, parts, threads),
        _RAW: raw,
    }
    if ceilings:
        contestants["ceiling: BLAKE3, one thread"] = lambda: _hash(state)
        contestants["ceiling: copy into new memory"] = lambda: _copy(state)
    turns = take_turns(contestants, between=clean, memory=GIB)
    clean()
    return turns


def _best_threads(folder: Path) -> int:
    """The number of threads with which DCP is fastest."""
    state, parts = make_state(), folder / "dcp"
    seconds = {}
    for threads in _DCP_THREADS:
        start = time.perf_counter()
        _save_by_dcp(state, parts, threads)
        seconds[threads] = time.perf_counter() - start
        shutil.rmtree(parts)
        os.sync()
    return min(seconds, key=seconds.__getitem__)


def _save_by_dcp(state: State, parts: Path, threads: int) -> None:
    writer = FileSystemWriter(parts, thread_count=threads, sync_files=True)
    save_by_dcp(dict(state), storage_writer=writer, no_dist=True)


def _saved(save: Callable[..., object], state: State, target: Path) -> None:
    save(state, target)
    sync(target)


def _hash(state: State) -> None:
    for tensor in state.values():
        blake3(as_bytes(tensor)).digest()


def _copy(state: State) -> None:
    for tensor in state.values():
        numpy.frombuffer(as_bytes(tensor), numpy.uint8).copy()


def _peak_memory(folder: Path) -> int:
    """Bytes that a push of 1 GiB needs at its peak beside the state, in a process of its own."""
    command = [sys.executable, "-c", _MEMORY_CODE, str(folder)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(shown.stdout.split()[-1])


def print_peak() -> None:
    """The child process of :func:`_peak_memory`."""
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
