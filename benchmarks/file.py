"""From file to file by the command line: memory in all, and seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file

from benchmarks.measure import take_turns
from benchmarks.states import GIB, make_state, sync
from benchmarks.table import Bar, Table, Target

_BOUND = 256  # MiB
# A program begins with the memory of the process that starts it, so a small one does.
_WATCHER = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
_CKPT = str(Path(sys.executable).with_name("ckpt"))


def measure(folder: Path) -> Table:
    """Push and pull of a file of 2 GiB, each in a process of its own."""
    nbytes = 2 * GIB
    source, target = folder / "state.safetensors", folder / "pulled.safetensors"
    save_file(make_state(nbytes), source)
    sync(source)
    peaks: dict[str, list[int]] = {}
    repository = folder / "repository"
    environment = {**os.environ, "CKPT_REPO": str(repository)}

    def runner(name: str, *command: str) -> Callable[[], None]:
        def run() -> None:
            peaks.setdefault(name, []).append(_run(command, environment))

        return run

    def pull() -> None:
        target.unlink(missing_ok=True)
        runner("ckpt pull", _CKPT, "-q", "pull", "state", str(target))()

    def push() -> None:
        shutil.rmtree(repository, ignore_errors=True)
        runner("ckpt push", _CKPT, "-q", "push", str(source), "state")()

    copied = folder / "copied"
    contestants = {
        "ckpt push": push,
        "ckpt pull": pull,
        "ceiling: cp + sync": lambda: _copy(source, copied),
        "an empty Python": runner("an empty Python", sys.executable, "-c", "pass"),
    }
    turns = take_turns(contestants, between=os.sync, memory=GIB)
    largest = {name: max(values) / 2**20 for name, values in peaks.items()}
    ours = ("ckpt push", "ckpt pull")
    return Table(
        title="From file to file",
        compared="`ckpt push` and `ckpt pull` of a `.safetensors` file of 2 GiB: resident memory of the whole process at its peak, the largest of all rounds.",
        columns=("", f"of {_BOUND} MiB", "MiB", "s"),
        rows=tuple(
            (
                name,
                f"{largest[name] / _BOUND:.2f}" if name in largest else "",
                f"{largest[name]:.0f}" if name in largest else "",
                f"{turns[name]:.2f}",
            )
            for name in turns.timings
        ),
        axis="MiB at the peak",
        bars=tuple(Bar(name, largest[name], _BOUND, True) for name in ours),
        targets=tuple(
            Target(f"memory of {name}", largest[name], _BOUND, True, "MiB") for name in ours
        ),
        packages=("safetensors",),
    )


def _run(command: tuple[str, ...], environment: dict[str, str]) -> int:
    """Run a program; the bytes that it had in memory at its peak."""
    said = subprocess.run(
        [sys.executable, "-c", _WATCHER, *command],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return int(said.stdout) * 1024


def _copy(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    subprocess.run(["cp", source, target], check=True)
    sync(target)
