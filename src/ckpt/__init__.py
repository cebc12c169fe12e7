"""A checkpoint manager for PyTorch: ``repo = ckpt.open()``, ``repo.push(…)``, ``repo.pull(…)``.

Names are loaded on use, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckpt.core.errors import CkptError, CkptWarning
    from ckpt.core.records import Version
    from ckpt.core.rules import Best, Every, Latest, Within
    from ckpt.service.opening import open_repository as open
    from ckpt.service.repository import Repository
    from ckpt.training.dcp import dcp_writer
    from ckpt.training.dcp_reader import dcp_reader
    from ckpt.training.run import Run

__all__ = [
    "Best",
    "CkptError",
    "CkptWarning",
    "Every",
    "Latest",
    "Repository",
    "Run",
    "Version",
    "Within",
    "dcp_reader",
    "dcp_writer",
    "open",
]

_HOMES = {
    "Best": ("ckpt.core.rules", "Best"),
    "CkptError": ("ckpt.core.errors", "CkptError"),
    "CkptWarning": ("ckpt.core.errors", "CkptWarning"),
    "Every": ("ckpt.core.rules", "Every"),
    "Latest": ("ckpt.core.rules", "Latest"),
    "Repository": ("ckpt.service.repository", "Repository"),
    "Run": ("ckpt.training.run", "Run"),
    "Version": ("ckpt.core.records", "Version"),
    "Within": ("ckpt.core.rules", "Within"),
    "dcp_reader": ("ckpt.training.dcp_reader", "dcp_reader"),
    "dcp_writer": ("ckpt.training.dcp", "dcp_writer"),
    "open": ("ckpt.service.opening", "open_repository"),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
