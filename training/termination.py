"""SIGTERM while a run is open: it leaves the ``with`` block, and another one does not cut the wait."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn


class Termination:
    """How this process takes SIGTERM, where nobody else has said so."""

    def __init__(self) -> None:
        self._before: Any = None

    def begin(self) -> None:
        """Have SIGTERM leave the block."""
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        ):
            self._before = signal.signal(signal.SIGTERM, _leave)

    @contextmanager
    def put_off(self, *, is_leaving: bool) -> Iterator[None]:
        """Let nothing be cut, then take SIGTERM as before; one that came meanwhile is heeded then,
        unless an exception ``is_leaving`` the block anyway."""
        came: list[int] = []
        if self._before is not None:
            signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
        try:
            yield
        finally:
            if self._before is not None:
                signal.signal(signal.SIGTERM, self._before)
        if came and not is_leaving:
            raise SystemExit(128 + came[0])


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
