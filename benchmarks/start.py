"""How long the command line takes to start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import ckpt
from benchmarks.measure import Timing, take_turns

ROUNDS = 15


def compare(folder: Path) -> dict[str, Timing]:
    """Seconds of ``ckpt --help`` and ``ckpt ls`` in a fresh process, beside an empty Python."""
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
    return take_turns(contestants, rounds=ROUNDS)
