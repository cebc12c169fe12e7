"""The one seam: every act that changes or reads the outside world goes through ``perform``.

Tests put a hook here to count the acts of an operation and to stop before, after or in the
middle of each one. Without a hook the seam costs one attribute look-up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

Hook = Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]

_hook: Hook | None = None


def perform(kind: str, act: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run ``act(*args)``; ``kind`` names the act for a hook (``"fsync"``, ``"sql.commit"``)."""
    if _hook is None:
        return act(*args, **kwargs)
    result: T = _hook(kind, lambda *given: act(*given, **kwargs), args)
    return result


@contextmanager
def observed(hook: Hook) -> Iterator[None]:
    """Send every act of this process, from all threads, through ``hook(kind, act, args)``."""
    global _hook
    previous, _hook = _hook, hook
    try:
        yield
    finally:
        _hook = previous
