"""Durations as a person writes them: ``7d``, ``12h``, ``0``."""

from __future__ import annotations

import re

from ckpt.core.errors import UsageError
from ckpt.core.printable import escape

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
# Some 285 years: what databases count in microseconds, and threads can wait.
_LONGEST_SECONDS = 9_000_000_000


def seconds_of(text: str) -> int | None:
    """The seconds of a duration in s, m, h, d or w, or of ``0``; None when it is none."""
    if text == "0":
        return 0
    found = re.fullmatch(r"(\d{1,9})([smhdw])", text, re.ASCII)
    return None if found is None else int(found[1]) * _UNITS[found[2]]


def check_duration(duration: float | str) -> float:
    """The seconds of a duration, given as such or as a person writes it.

    Raises:
        UsageError: ``duration-invalid``.
    """
    seconds = seconds_of(duration) if isinstance(duration, str) else duration
    if not isinstance(seconds, (int, float)) or not 0 <= seconds <= _LONGEST_SECONDS:
        raise UsageError(
            "duration-invalid",
            f'"{escape(str(duration), 40)}" is no duration',
            hint="write 7d, 12h, 30m or 0"
            if isinstance(duration, str)
            else "give seconds, or text such as 7d",
        )
    return float(seconds)
