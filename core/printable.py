"""Text from outside, made safe to show in a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

_FEW = 6

# Controls, format characters (bidi, zero width), surrogates, private use, unassigned, separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def is_printable(text: str) -> bool:
    """Whether a terminal shows ``text`` as it is, with nothing hidden in it."""
    return (text.isascii() and text.isprintable()) or not any(map(_is_hidden, text))


def escape(text: str, limit: int = 400) -> str:
    """``text`` with every hidden character as an escape, cut after ``limit`` characters."""
    shown = text if is_printable(text) else "".join(map(_escape_character, text))
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown, left = ", ".join(names[:_FEW]), len(names) - _FEW
    return f"{shown} and {left} more" if left > 0 else shown


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN


def _escape_character(character: str) -> str:
    if not _is_hidden(character):
        return character
    return ascii(character)[1:-1]
