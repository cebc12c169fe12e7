"""What to keep of a model's versions, as small rules: a version stays when any of them keeps it."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from ckpt.core.durations import seconds_of
from ckpt.core.errors import UsageError
from ckpt.core.printable import escape

_HINT = "write last:3, best:val_loss:min:2, every:1000 or within:7d"
_MOST = 999_999_999
_COUNTED = re.compile(r"(last|every):([1-9]\d{0,8})", re.ASCII)
_BEST = re.compile(r"best:(.+):(min|max):([1-9]\d{0,8})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Latest:
    """The newest ``count`` versions."""

    count: int

    def __post_init__(self) -> None:
        _check_count(self, self.count)

    def __str__(self) -> str:
        return f"last:{self.count}"


@dataclass(frozen=True, slots=True)
class Best:
    """The ``count`` versions with the best value of a metric; one that is not finite never is."""

    metric: str
    mode: Literal["min", "max"] = "min"
    count: int = 1

    def __post_init__(self) -> None:
        _check_count(self, self.count)
        if not isinstance(self.metric, str) or _BEST.fullmatch(str(self)) is None:
            _refuse(self)

    def __str__(self) -> str:
        return f"best:{self.metric}:{self.mode}:{self.count}"


@dataclass(frozen=True, slots=True)
class Every:
    """Of each interval of so many steps (``step // steps``) the first version that was saved, and
    versions whose step is a multiple of ``steps``: of a loop that saves at steps 99, 199 … and
    ``Every(1000)`` those of 99, 1099 …, of one that saves at 0, 100 … those of 0, 1000 …"""

    steps: int

    def __post_init__(self) -> None:
        _check_count(self, self.steps)

    def __str__(self) -> str:
        return f"every:{self.steps}"


@dataclass(frozen=True, slots=True)
class Within:
    """Versions that are no older than this: ``"7d"``, ``"12h"``."""

    duration: str

    def __post_init__(self) -> None:
        if not isinstance(self.duration, str) or seconds_of(self.duration) is None:
            _refuse(self)

    def __str__(self) -> str:
        return f"within:{self.duration}"


Rule = Latest | Best | Every | Within


def rule_of(text: str) -> Rule:
    """The rule that a text is.

    Raises:
        UsageError: ``rule-invalid``.
    """
    counted, best = _COUNTED.fullmatch(text), _BEST.fullmatch(text)
    if counted is not None:
        return (Latest if counted[1] == "last" else Every)(int(counted[2]))
    if best is not None:
        return Best(best[1], "min" if best[2] == "min" else "max", int(best[3]))
    if text.startswith("within:"):
        return Within(text.removeprefix("within:"))
    _refuse(text)


def _check_count(rule: Rule, count: Any) -> None:
    try:
        number = operator.index(count)
    except TypeError:
        _refuse(rule)
    if isinstance(count, bool) or not 1 <= number <= _MOST:
        _refuse(rule)


def _refuse(rule: object) -> NoReturn:
    raise UsageError("rule-invalid", f'"{escape(str(rule), 80)}" is no rule', hint=_HINT)
