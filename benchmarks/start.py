"""How long the command line takes to start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import ckpt
from benchmarks.measure import QUICK, Turns, take_turns
from benchmarks.table import Bar, Table, Target

_ROUNDS = 2 if QUICK else 15
_BOUNDS = {"ckpt --help": 0.15, "ckpt ls": 0.5}


def measure(folder: Path) -> Table:
    """Each command in a fresh process."""
    turns = _compare(folder)
    return Table(
        title="Start of the command line",
        compared=f"A fresh process each time, median of {_ROUNDS}, in a repository of 20 models.",
        columns=("", "of what is promised", "s", "promised, at most"),
        rows=tuple(
            (
                f"`{name}`",
                f"{turns[name] / _BOUNDS[name]:.2f}" if name in _BOUNDS else "",
                f"{turns[name]:.3f}",
                str(_BOUNDS.get(name, "")),
            )
            for name in turns.timings
        ),
        axis="seconds",
        bars=tuple(Bar(name, turns[name], _BOUNDS.get(name), True) for name in turns.timings),
        targets=tuple(
            Target(name, turns[name], bound, True, "s") for name, bound in _BOUNDS.items()
        ),
        packages=("SQLAlchemy", "click"),
    )


def _compare(folder: Path) -> Turns:
    with ckpt.open(folder) as repo:
        for number in range(20):
            repo.push({"w": torch.tensor(number)}, f"model-{number}")
    program = str(Path(sys.executable).with_name("ckpt"))
    environment = {**os.environ, "CKPT_REPO": str(folder)}

    def runner(*command: str) -> None:
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)

    contestants = {
        "ckpt --help": lambda: runner(program, "--help"),
        "ckpt ls": lambda: runner(program, "ls"),
        "python -c 'import sqlalchemy'": lambda: runner(sys.executable, "-c", "import sqlalchemy"),
        "python -c pass": lambda: runner(sys.executable, "-c", "pass"),
    }
    return take_turns(contestants, rounds=_ROUNDS)
