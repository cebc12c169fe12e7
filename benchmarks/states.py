"""States to measure with, and what makes a comparison fair: durable files, an empty page cache."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch

from benchmarks.measure import QUICK
from ckpt.loader.sources import as_bytes

TENSORS = 64
GIB = 1 << (27 if QUICK else 30)  # what counts as a GiB; quick runs take an eighth

State = dict[str, torch.Tensor]


def make_state(nbytes: int = GIB, seed: int = 0) -> State:
    """fp32 in 64 tensors of equal size."""
    generator = torch.Generator().manual_seed(seed)
    count = nbytes // TENSORS // 4
    return {
        f"layer.{n:02d}.weight": torch.randn(count, generator=generator) for n in range(TENSORS)
    }


def change(state: State, names: Iterable[str] | None = None) -> None:
    """Give tensors new values, so that nothing of them is known."""
    for name in state if names is None else names:
        state[name].add_(1e-3)


def touch(state: Mapping[str, torch.Tensor]) -> None:
    """Read a byte of every page of a state, so that what was only mapped is read now."""
    for tensor in state.values():
        numpy.frombuffer(as_bytes(tensor), numpy.uint8)[::4096].sum()


def sync(path: Path) -> None:
    """Make a file and its name durable."""
    for each in (path, path.parent):
        handle = os.open(each, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def forget(paths: Iterable[Path]) -> None:
    """Drop files from the page cache."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def files_below(*folders: Path) -> list[Path]:
    """All files in these folders."""
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables that are set for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
