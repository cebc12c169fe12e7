"""Durations as a person writes them: ``7d``, ``12h``, ``0``."""

from __future__ import annotations

import re

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def seconds_of(text: str) -> int | None:
    """The seconds of a duration in s, m, h, d or w, or of ``0``; None when it is none."""
    if text == "0":
        return 0
    found = re.fullmatch(r"(\d{1,9})([smhdw])", text, re.ASCII)
    return None if found is None else int(found[1]) * _UNITS[found[2]]
