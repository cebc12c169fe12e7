"""A training loop that saves in the background: what a save costs it, beside DCP and moonclip."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Self

from benchmarks.measure import Turns, take_turns
from benchmarks.stall_loop import (
    MOONCLIP,
    NAMES,
    NONE,
    OURS,
    PROCESS,
    RAW,
    SAVE,
    SAVES,
    STEPS,
    THREAD,
    Trainer,
)
from benchmarks.table import Bar, Table, Target


def measure(folder: Path) -> Table:
    """Call time and added time of each way to save."""
    calls: dict[str, list[float]] = {name: [] for name in NAMES}
    with ExitStack() as stack:
        loops = {
            name: stack.enter_context(_Loop(name, folder / str(place)))
            for place, name in enumerate(NAMES)
        }
        alone = take_turns({name: partial(loop.train, "") for name, loop in loops.items()}, 3)
        turns = take_turns({name: _saving(loops[name], calls[name]) for name in alone.timings})
    names = [name for name in NAMES if name in turns.timings]
    call = {name: median(calls[name][len(SAVES) :]) for name in names if name != NONE}
    added = {name: (turns[name] - alone[name]) / len(SAVES) for name in names}
    nbytes = sum(one.nbytes for one in Trainer().tensors())
    return Table(
        title="Stall of background saving",
        compared=f"A GPT of 10.9 M parameters with AdamW, {nbytes / 1e6:.0f} MB of state, {STEPS} steps on two threads, {len(SAVES)} saves, durable; each way in a process of its own, because threads of DCP slow torch's own for as long as their process lives, and all that is saved is kept. *Call* is how long a save keeps the loop; *added* is how much longer the loop takes than it did in the same process before anything there saved (processes differ by more than a save takes), with the wait for the last save, per save. What is added by no saving is how far these figures can be trusted. DCP has a stager that is used again (with shared memory for the process), cached plans, two threads and fsync; moonclip its own settings.",
        columns=(
            "",
            "call, over ckpt's",
            "added, over ckpt's",
            "call, ms",
            "added, ms",
            "loop alone, s",
            "loop, s",
        ),
        rows=tuple(_rows(alone, turns, call, added)),
        axis="over the peer's (call: dcp.async_save; added: the best)",
        bars=tuple(_bars(call, added)),
        targets=tuple(_targets(call, added)),
        absent={**alone.absent, **turns.absent},
        packages=("torch", "moonclip"),
        remark=f"A step takes {turns[NONE] / STEPS * 1e3:.0f} ms. Whatever saves in the background shares the two cores with the training, so that added time is not less than the processor time that the save takes.",
    )


class _Loop:
    """The process of one way to save, which waits between its turns."""

    def __init__(self, name: str, folder: Path) -> None:
        self._name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.stall_loop", name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()

    def train(self, what: str) -> list[float]:
        """Have it train once, and save if that is ``what``; the seconds that each save kept it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._name} ended with status {self._process.wait()}")
        calls: list[float] = json.loads(answer)
        return calls


def _saving(loop: _Loop, calls: list[float]) -> Callable[[], object]:
    return lambda: calls.extend(loop.train(SAVE))


def _rows(
    alone: Turns, turns: Turns, call: dict[str, float], added: dict[str, float]
) -> Iterator[tuple[str, ...]]:
    for name, kept in call.items():
        yield (
            name,
            f"{kept / call[OURS]:.2f}",
            f"{added[name] / added[OURS]:.2f}",
            f"{kept * 1e3:.0f}",
            f"{added[name] * 1e3:.0f}",
            f"{alone[name]:.2f}",
            f"{turns[name]:.2f}",
        )
    drift = f"{added[NONE] / added[OURS]:.2f}", "", f"{added[NONE] * 1e3:.0f}"
    yield NONE, "", *drift, f"{alone[NONE]:.2f}", f"{turns[NONE]:.2f}"


def _best(values: dict[str, float], *names: str) -> float:
    return min(values[name] for name in names if name in values)


def _targets(call: dict[str, float], added: dict[str, float]) -> Iterator[Target]:
    best_call = _best(call, THREAD, PROCESS)
    yield Target("call over dcp.async_save's", call[OURS] / best_call, 0.25, True)
    best_added = _best(added, THREAD, PROCESS, MOONCLIP)
    yield Target("added time over the best peer's", added[OURS] / best_added, 0.5, True)


def _bars(call: dict[str, float], added: dict[str, float]) -> Iterator[Bar]:
    for ours in (OURS, RAW):
        for peer in (THREAD, PROCESS):
            if peer in call:
                yield Bar(f"call, {ours} over {peer}", call[ours] / call[peer], 0.25, True)
        for peer in (THREAD, PROCESS, MOONCLIP):
            if peer in added:
                yield Bar(f"added, {ours} over {peer}", added[ours] / added[peer], 0.5, True)
