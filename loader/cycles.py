"""Modules that are children of themselves, which no module tree may have."""

from __future__ import annotations

from collections.abc import Sequence

from ckpt.core.documents import Module


def find_cycle(modules: Sequence[Module]) -> str | None:
    """The path of a module that is a child of itself, at any depth: no state_dict can have it."""
    done: set[int] = set()

    def visit(index: int, above: frozenset[int]) -> str | None:
        if index in above:
            return modules[index].path
        if index in done or not 0 <= index < len(modules):
            return None
        for _, child in modules[index].children:
            found = None if child is None else visit(child, above | {index})
            if found is not None:
                return found
        done.add(index)
        return None

    for index in range(len(modules)):
        found = visit(index, frozenset())
        if found is not None:
            return found
    return None
