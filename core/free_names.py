"""Names of tensors, no two of them equal: the second ``weight`` is ``weight~2``."""

from __future__ import annotations


class FreeNames:
    """The names that were taken so far."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def take(self, name: str) -> str:
        """``name``, with a number where it is taken."""
        free = name
        while free in self._counts:
            self._counts[name] += 1
            free = f"{name}~{self._counts[name]}"
        self._counts[free] = 1
        return free
