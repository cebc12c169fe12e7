"""Conditions on versions: ``val_loss < 0.3 and step >= 1000``, parsed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ckpt.core.errors import UsageError
from ckpt.core.names import check_key
from ckpt.core.printable import escape

_AND = re.compile(r"\s+and\s+", re.IGNORECASE)
_COMPARISON = re.compile(r"\s*([^\s<>=!]+)\s*(<=|>=|!=|==|=|<|>)\s*(\S+)\s*\Z")


@dataclass(frozen=True, slots=True)
class Comparison:
    """A metric, or ``step``, beside a finite number; what a version lacks, or is not finite, never
    matches. ``operator`` is one of ``< <= = != >= >``."""

    name: str
    operator: str
    value: float


def parse_comparisons(text: str) -> tuple[Comparison, ...]:
    """Comparisons joined by ``and``; of none when ``text`` is blank.

    Raises:
        UsageError: ``where-invalid``.
    """
    return tuple(map(_parse, _AND.split(text))) if text.strip() else ()


def check_order(name: str) -> str:
    """Return ``name`` if versions can be ordered by it: a metric or ``step``, descending after a
    ``-``; UsageError ``name-invalid``."""
    check_key("metric", name.removeprefix("-"))
    return name


def _parse(text: str) -> Comparison:
    found = _COMPARISON.match(text)
    if found is None:
        raise _invalid(text, "is no comparison")
    name, operator, number = found.groups()
    check_key("metric", name)
    try:
        value = float(number)
    except ValueError:
        raise _invalid(text, f'"{escape(number, 40)}" is no number') from None
    if not math.isfinite(value):
        raise _invalid(text, "only finite metrics compare")
    return Comparison(name, "=" if operator == "==" else operator, value)


def _invalid(text: str, reason: str) -> UsageError:
    return UsageError(
        "where-invalid",
        f'"{escape(text.strip(), 80)}": {reason}',
        hint='write comparisons joined by "and", such as "val_loss < 0.3 and step >= 1000"',
    )
