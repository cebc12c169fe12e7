"""Pull from a local disk and from the page cache, beside safetensors, torch.load and DCP."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict_loader import load as fill_by_dcp
from torch.distributed.checkpoint.state_dict_saver import save as save_by_dcp

import ckpt
from benchmarks.measure import Turns, take_turns
from benchmarks.states import GIB, State, files_below, forget, make_state, sync, touch
from benchmarks.table import Bar, Table, Target, speed_bars, speed_rows
from ckpt.loader.sources import as_bytes

_OURS, _MAPPED = "ckpt pull", "ckpt pull(mmap=True)"
_PEERS = ("safetensors.load_file", "torch.load", "torch.load(mmap=True)", "dcp.load")
_HASH, _COPY = "ceiling: BLAKE3, two threads", "ceiling: copy into new memory"
_READ = "ceiling: read into new memory"
_BOTH = "ceiling: the same, and BLAKE3, two threads"


def measure(folder: Path) -> Table:
    """The table: cold, then warm."""
    state = make_state()
    with ckpt.open(folder / "repository") as repo:
        repo.push(state, "model")
        save_file(state, folder / "state.safetensors")
        torch.save(state, folder / "state.pt")
        save_by_dcp(dict(state), checkpoint_id=folder / "dcp", no_dist=True)
        for path in files_below(folder):
            sync(path)
        cold = _compare(repo, folder, state, cold=True)
        warm = _compare(repo, folder, state, cold=False)
    bars: list[Bar] = speed_bars(cold, _OURS, dict.fromkeys(_PEERS, 1.2), "disk: {}")
    bars += speed_bars(warm, _OURS, {_HASH: 0.9, _COPY: 0.9}, "page cache: {}")
    slowest = max(warm[_HASH], warm[_COPY])
    best = cold.best(*_PEERS) / cold[_OURS]
    return Table(
        title="Local pull, 1 GiB",
        compared="fp32 in 64 tensors, into new tensors or, with `mmap=True`, left where they lie; ckpt checks every digest, its peers check nothing. After each load a byte of every page is read, because `load_file` and `mmap=True` only map. From the disk: the files are dropped from the page cache first.",
        columns=("", "ckpt's speed over this", "from", "s", "GB/s"),
        rows=(
            *speed_rows(cold, _OURS, GIB, "disk"),
            *speed_rows(warm, _OURS, GIB, "page cache"),
        ),
        axis="speed of ckpt pull over this contestant's",
        bars=tuple(bars),
        targets=(
            Target("from the disk, speed over the best peer", best, 1.2),
            Target(
                "from the page cache, speed over the slower of hash and copy",
                slowest / warm[_OURS],
                0.9,
            ),
            Target(
                "mmap=True from the page cache, speed over the slower of hash and copy",
                slowest / warm[_MAPPED],
                0.9,
            ),
        ),
        absent={**cold.absent, **warm.absent},
        packages=("torch", "safetensors", "blake3"),
    )


def _compare(repo: ckpt.Repository, folder: Path, state: State, *, cold: bool) -> Turns:
    names = list(state)
    count = state[names[0]].numel()
    read = [path for path in files_below(folder) if path.suffix != ".db"]

    def between() -> None:
        gc.collect()
        forget(read if cold else ())

    def load_by_dcp() -> None:
        into = {name: torch.empty(count) for name in names}
        fill_by_dcp(into, checkpoint_id=folder / "dcp", no_dist=True)
        touch(into)

    contestants: dict[str, Callable[[], object]] = {
        _OURS: lambda: touch(repo.pull("model")),
        _MAPPED: lambda: touch(repo.pull("model", mmap=True)),
        "safetensors.load_file": lambda: touch(load_file(folder / "state.safetensors")),
        "torch.load": lambda: touch(torch.load(folder / "state.pt")),
        "torch.load(mmap=True)": lambda: touch(torch.load(folder / "state.pt", mmap=True)),
        "dcp.load": load_by_dcp,
        _READ: lambda: _read(folder / "state.safetensors", _read_at),
        _BOTH: lambda: _read(folder / "state.safetensors", _read_and_hash),
    }
    if not cold:
        contestants |= {_HASH: lambda: _hash(state), _COPY: lambda: _copy(state)}
    return take_turns(contestants, between=between, memory=(2 if cold else 1) * GIB)


def _read(path: Path, read: Callable[[int, memoryview, int], None]) -> None:
    """Read a file by two threads in large pieces."""
    size = path.stat().st_size
    target = numpy.empty(size, numpy.uint8).data
    piece = 16 << 20
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(2) as pool:
        list(
            pool.map(
                lambda at: read(file.fileno(), target[at : at + piece], at),
                range(0, size, piece),
            )
        )


def _read_at(handle: int, target: memoryview, at: int) -> None:
    while target:
        got = os.preadv(handle, [target], at)
        target, at = target[got:], at + got


def _read_and_hash(handle: int, target: memoryview, at: int) -> None:
    _read_at(handle, target, at)
    blake3(target).digest()


def _hash(state: State) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda tensor: blake3(as_bytes(tensor)).digest(), state.values()))


def _copy(state: State) -> list[numpy.ndarray]:
    return [numpy.frombuffer(as_bytes(tensor), numpy.uint8).copy() for tensor in state.values()]
