"""Breadth-first search over the states of a model, with the shortest run to a violation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Protocol

Step = tuple[str, bytes]


class Model(Protocol):
    """A protocol as states, which are bytes, and the steps between them."""

    def begin(self) -> bytes:
        """The first state."""

    def steps(self, state: bytes) -> Iterable[Step]:
        """What may happen next: the name of each step and the state after it."""

    def violation(self, state: bytes) -> str | None:
        """The promise that is broken in this state, if any."""


@dataclass(frozen=True)
class Explored:
    """What a search found.

    Attributes:
        violation: the promise that was broken first, None when all states were seen.
        run: the names of the steps of the shortest run to it.
    """

    states: int
    violation: str | None = None
    run: tuple[str, ...] = ()


def explore(model: Model) -> Explored:
    """See every state that can be reached, or stop at the first one that breaks a promise."""
    return search(model)[0]


def search(model: Model) -> tuple[Explored, dict[bytes, bytes | None]]:
    """Like :func:`explore`; also every state that was seen, with the one it was reached from."""
    first = model.begin()
    parents: dict[bytes, bytes | None] = {first: None}
    level = [first]
    while level:
        following = []
        for state in level:
            for _, after in model.steps(state):
                if after not in parents:
                    parents[after] = state
                    broken = model.violation(after)
                    if broken is not None:
                        return Explored(len(parents), broken, _run(model, parents, after)), parents
                    following.append(after)
        level = following
    return Explored(len(parents)), parents


def _run(model: Model, parents: dict[bytes, bytes | None], last: bytes) -> tuple[str, ...]:
    names: list[str] = []
    before = parents[last]
    while before is not None:
        names.append(next(name for name, after in model.steps(before) if after == last))
        last, before = before, parents[before]
    return tuple(reversed(names))


def walk(model: Model, random: Random, most: int) -> Explored:
    """One random run of at most so many steps; ``states`` counts the steps."""
    state = model.begin()
    names: list[str] = []
    while len(names) < most:
        following = list(model.steps(state))
        if not following:
            break
        name, state = random.choice(following)
        names.append(name)
        broken = model.violation(state)
        if broken is not None:
            return Explored(len(names), broken, tuple(names))
    return Explored(len(names))


def run_only(model: Model, state: bytes, kinds: tuple[str, ...]) -> bytes:
    """Take steps whose names begin with one of ``kinds`` until there are none that change it.

    Raises:
        AssertionError: they go on for ever.
    """
    for _ in range(500):
        chosen = (
            after for name, after in model.steps(state) if name.startswith(kinds) and after != state
        )
        following = next(chosen, None)
        if following is None:
            return state
        state = following
    raise AssertionError(f"{kinds} go on for ever")


def changed(state: bytes, *changes: tuple[int, int]) -> bytes:
    """The state with other values in some places."""
    copy = bytearray(state)
    for place, value in changes:
        copy[place] = value
    return bytes(copy)


def bits(mask: int) -> Iterable[int]:
    """The numbers of the bits that are set."""
    return _BITS[mask]


_BITS = tuple(tuple(bit for bit in range(8) if mask >> bit & 1) for mask in range(256))
