"""Timing: the contestants of a comparison take turns, and the median of each counts."""

from __future__ import annotations

import mmap
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy

from benchmarks import QUICK_VARIABLE

# Small sizes and two rounds, to see that everything works; such figures are never kept.
QUICK = bool(os.environ.get(QUICK_VARIABLE))
ROUNDS = 2 if QUICK else 5
_REASON_LENGTH = 200


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


@dataclass(frozen=True, slots=True)
class Turns:
    """What a comparison gave: timings by contestant, and why some peers have none."""

    timings: Mapping[str, Timing]
    absent: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """The median of one contestant, in seconds."""
        return self.timings[name].median

    def best(self, *names: str) -> float:
        """The median of the fastest of these that were measured; infinite when none was."""
        return min((self[name] for name in names if name in self.timings), default=float("inf"))


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int = ROUNDS,
    between: Callable[[], None] = lambda: None,
    memory: int = 0,
    each_round: Callable[[], None] = lambda: None,
) -> Turns:
    """Time every contestant once a round, in another order each time: who comes after whom decides
    whose memory and page cache are fresh. Untimed, ``each_round`` runs before each round and
    ``between`` before each contestant. Each one begins with ``memory`` bytes, about what it takes,
    :func:`at hand <bring_in>`; they are held between the turns, so that no host takes them.

    The first round only warms up. A peer that fails in it takes part no more, and is absent with
    the reason; ckpt may not fail.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    absent: dict[str, str] = {}
    order, chance = list(contestants), random.Random(0)
    held = _hold(memory)
    for turn in range(rounds + 1):
        each_round()
        for name in order:
            act = contestants[name]
            if name in absent:
                continue
            between()
            held.close()
            start = time.perf_counter()
            try:
                act()
            except Exception as error:
                if turn or name.startswith("ckpt"):
                    raise
                absent[name] = shown_reason(error)
            else:
                seconds[name].append(time.perf_counter() - start)
            held = _hold(memory)
        chance.shuffle(order)
    timings = {name: Timing(tuple(values[1:])) for name, values in seconds.items() if values}
    return Turns(timings, absent)


def bring_in(nbytes: int) -> None:
    """Have so much free memory at hand. A host takes the free memory of its virtual machines back,
    by 2 MiB; who touches that first waits twenty times as long as who comes next."""
    _hold(nbytes).close()


def _hold(nbytes: int) -> mmap.mmap:
    """Take so much memory, and at least a page."""
    size = max(nbytes, mmap.PAGESIZE)
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room.madvise(mmap.MADV_HUGEPAGE)
    numpy.frombuffer(room, numpy.uint8)[:: mmap.PAGESIZE] = 1
    return room


def shown_reason(error: BaseException) -> str:
    """Why a peer could not be measured, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:_REASON_LENGTH] if lines else type(error).__name__
