"""Timing: the contestants of a comparison take turns, and the median of each counts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


def take_turns(
    contestants: Mapping[str, Callable[[], None]],
    rounds: int = ROUNDS,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time every contestant once a round; ``between`` runs, untimed, before each one."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, act in contestants.items():
            between()
            start = time.perf_counter()
            act()
            taken = time.perf_counter() - start
            if turn:  # the first round warms up
                seconds[name].append(taken)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
