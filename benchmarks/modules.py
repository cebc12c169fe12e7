"""Modules of 1 GiB: loading one beside ``load_file``, pushing one beside its state_dict."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ckpt
from benchmarks.measure import QUICK, Turns, take_turns
from benchmarks.states import GIB, forget
from benchmarks.table import Bar, Table, Target

_LAYERS = 8 if QUICK else 64
_WIDTH = 2048  # 16 MiB of fp32 a layer
_ROUNDS = 2 if QUICK else 7
_LOAD, _FILL = "ckpt: repo.load", "load_file + load_state_dict"
_MODULE, _STATE = "ckpt: repo.push(net)", "ckpt: repo.push(net.state_dict())"
_BOUND = 1.3


def measure(folder: Path) -> Table:
    """Loading from the page cache and from the disk, and pushing."""
    rows: list[tuple[str, ...]] = []
    bars: list[Bar] = []
    targets = []
    for cold in (False, True):
        turns = _compare_loads(folder, cold=cold)
        where = "disk" if cold else "page cache"
        over = turns[_LOAD] / turns[_FILL]
        rows += [
            (name, f"{turns[name] / turns[_FILL]:.2f}", where, f"{turns[name]:.2f}")
            for name in (_LOAD, _FILL)
        ]
        bars.append(Bar(f"load from the {where}, over load_file", over, _BOUND, True))
        targets.append(Target(f"load from the {where}, time over the peer's", over, _BOUND, True))
        shutil.rmtree(folder / "load")
    turns = _compare_pushes(folder)
    over = turns[_MODULE] / turns[_STATE]
    rows += [
        (name, f"{turns[name] / turns[_STATE]:.2f}", "", f"{turns[name]:.2f}")
        for name in (_MODULE, _STATE)
    ]
    bars.append(Bar("push of a known module, over its state_dict", over, 1.05, True))
    targets.append(Target("push of a known module, time over its state_dict's", over, 1.05, True))
    return Table(
        title="A module of 1 GiB in 64 layers",
        compared="`repo.load` allocates, reads, hashes every byte, rebuilds and proves the structure; its peer fills a module that is ready, which in memory is one copy: hashing alone takes longer than that copy on two cores. Then pushes of a module whose structure is known, beside its state_dict, all values new.",
        columns=("", "time over the peer's", "from", "s"),
        rows=tuple(rows),
        axis="time over the peer's",
        bars=tuple(bars),
        targets=tuple(targets),
        packages=("torch", "safetensors"),
    )


def _make_module() -> nn.Sequential:
    """1 GiB of fp32 in 64 layers."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(_LAYERS)))


def _compare_loads(folder: Path, *, cold: bool) -> Turns:
    """Seconds to load the module proven, and to fill a ready one from a file; ``cold`` reads from
    the disk, otherwise from the page cache."""
    net, ready = _make_module(), _make_module()
    path = folder / "module.safetensors"
    save_file(net.state_dict(), path)
    with ckpt.open(folder / "load") as repo:
        repo.push(net, "net")
        read = [path, *repo.location.store.glob("packs/*/*")]

        def between() -> None:
            gc.collect()
            forget(read if cold else ())

        def load() -> None:
            repo.load("net", require="structure")

        def fill() -> None:
            ready.load_state_dict(load_file(path), assign=False)

        contestants = {_LOAD: load, _FILL: fill}
        return take_turns(contestants, rounds=_ROUNDS, between=between, memory=GIB)


def _compare_pushes(folder: Path) -> Turns:
    """Seconds to push the module, whose structure is known, and to push its state_dict; all
    values are new each time."""
    net = _make_module()
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
                _MODULE: lambda: _push(repo, net),
                _STATE: lambda: _push(repo, net.state_dict()),
            },
            rounds=_ROUNDS,
            between=change,
        )


def _push(repo: ckpt.Repository, state: object) -> None:
    repo.push(state, "net" if isinstance(state, nn.Module) else "state")
