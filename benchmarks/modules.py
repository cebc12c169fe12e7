"""Modules of 1 GiB: loading one beside ``load_file``, pushing one beside its state_dict."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ckpt
from benchmarks.measure import Timing, take_turns

_LAYERS = 64
_WIDTH = 2048  # 16 MiB of fp32 a layer
_ROUNDS = 9


def make_module() -> nn.Sequential:
    """1 GiB of fp32 in 64 layers."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(_LAYERS)))


def compare_loads(folder: Path, *, cold: bool) -> dict[str, Timing]:
    """Seconds to load the module proven, and to fill a ready one from a file; ``cold`` reads from
    the disk, otherwise from the page cache."""
    net, ready = make_module(), make_module()
    path = folder / "module.safetensors"
    save_file(net.state_dict(), path)
    with ckpt.open(folder / "load") as repo:
        repo.push(net, "net")
        read = [path, *repo.location.store.glob("packs/*/*")]

        def between() -> None:
            gc.collect()
            for file in read if cold else ():
                _forget(file)

        def load() -> None:
            repo.load("net", require="structure")

        def fill() -> None:
            ready.load_state_dict(load_file(path), assign=False)

        contestants = {"repo.load": load, "load_file + load_state_dict": fill}
        return take_turns(contestants, rounds=_ROUNDS, between=between)


def _forget(path: Path) -> None:
    """Drop a file from the page cache."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def compare_pushes(folder: Path) -> dict[str, Timing]:
    """Seconds to push the module, whose structure is known, and to push its state_dict; all
    values are new each time."""
    net = make_module()
    with ckpt.open(folder / "push") as repo:
        repo.push(net, "net")

        def change() -> None:
            for path in repo.location.store.glob("packs/*/*"):
                path.unlink()  # only to save room: nothing of them is pushed again
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.add_(1e-3)
            os.sync()

        return take_turns(
            {
                "repo.push(net)": lambda: _push(repo, net),
                "repo.push(net.state_dict())": lambda: _push(repo, net.state_dict()),
            },
            rounds=_ROUNDS,
            between=change,
        )


def _push(repo: ckpt.Repository, state: object) -> None:
    repo.push(state, "net" if isinstance(state, nn.Module) else "state")
