"""What to keep of a model's versions, as small rules: a version stays when any of them keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Latest:
    """The newest ``count`` versions."""

    count: int

    def __str__(self) -> str:
        return f"last:{self.count}"


@dataclass(frozen=True, slots=True)
class Best:
    """The ``count`` versions with the best value of a metric; one that is not finite never is."""

    metric: str
    mode: Literal["min", "max"] = "min"
    count: int = 1

    def __str__(self) -> str:
        return f"best:{self.metric}:{self.mode}:{self.count}"


@dataclass(frozen=True, slots=True)
class Every:
    """Versions whose step is a multiple of ``steps``."""

    steps: int

    def __str__(self) -> str:
        return f"every:{self.steps}"


@dataclass(frozen=True, slots=True)
class Within:
    """Versions that are no older than this: ``"7d"``, ``"12h"``."""

    duration: str

    def __str__(self) -> str:
        return f"within:{self.duration}"


Rule = Latest | Best | Every | Within
