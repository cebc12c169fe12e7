"""What an operation reads from the store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ckpt.core.effects import observed


@contextmanager
def reads() -> Iterator[list[int]]:
    """The bytes of every read from the store; anything else but SQL and opening fails."""
    counted: list[int] = []

    def hook(kind: str, act: Any, args: tuple[Any, ...]) -> Any:
        found = act(*args)
        if kind == "read":
            counted.append(found)
        else:
            assert kind == "open" or kind.startswith("sql"), kind
        return found

    with observed(hook):
        yield counted
