"""Has archives keep a trained series, in turns: seconds of each save and load, and the bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.archives import Archive
from benchmarks.codec_states import train_series
from benchmarks.measure import QUICK, bring_in, shown_reason
from benchmarks.states import State

OURS = "ckpt max"
WHOLE, WEIGHTS = "checkpoints", "bf16 weights"
CHECKPOINTS = 3 if QUICK else 10

Makers = Mapping[str, Callable[[], Archive]]


@dataclass(slots=True)
class Kept:
    """What one archive did with a series."""

    saves: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """All archives of a series, and why some peers have none."""

    raw: int
    kept: dict[str, Kept]
    absent: Mapping[str, str]


def keep(series: str, kind: str, makers: Makers) -> Outcome:
    """Have every archive save and load every checkpoint, whole or its weights in bfloat16."""
    archives: dict[str, Archive] = {}
    kept: dict[str, Kept] = {}
    absent: dict[str, str] = {}
    for name, make in makers.items():
        try:
            archives[name] = make()
        except (ImportError, OSError) as error:
            absent[name] = shown_reason(error)
    raw = 0
    for path in train_series(series)[:CHECKPOINTS]:
        state = _fp32(path) if kind == WHOLE else _bf16(path)
        raw += sum(tensor.nbytes for tensor in state.values())
        for name, archive in archives.items():
            _turn(archive, state, kept.setdefault(name, Kept()), check=name == OURS)
    for name, archive in archives.items():
        kept[name].nbytes = archive.nbytes()
    return Outcome(raw, kept, absent)


def _bf16(path: Path) -> State:
    return {
        name.removeprefix("weights/"): tensor.to(torch.bfloat16)
        for name, tensor in load_file(path).items()
        if name.startswith("weights/")
    }


def _fp32(path: Path) -> State:
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _turn(archive: Archive, state: State, kept: Kept, *, check: bool) -> None:
    nbytes = sum(tensor.nbytes for tensor in state.values())
    bring_in(nbytes)
    start = time.perf_counter()
    archive.save(state)
    kept.saves.append(time.perf_counter() - start)
    bring_in(nbytes)
    start = time.perf_counter()
    loaded: Mapping[str, Any] = archive.load()
    kept.loads.append(time.perf_counter() - start)
    if check and not all(torch.equal(loaded[name], state[name]) for name in state):
        raise AssertionError("a checkpoint did not come back")
