"""Floats as JSON can carry them."""

from __future__ import annotations

import math
from collections.abc import Mapping


def json_number(value: float) -> float | str:
    """The number, or ``nan``, ``inf``, ``-inf``, which are no JSON."""
    return value if math.isfinite(value) else str(value)


def json_numbers(values: Mapping[str, float]) -> dict[str, float | str]:
    """Such as metrics, by name."""
    return {name: json_number(value) for name, value in values.items()}
