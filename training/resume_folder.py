"""The folder that a ``Trainer`` is resumed from: it goes when it was read, or its process is gone."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_PREFIX = ".ckpt-"
_LOCK = "lock"
_BEGINNING_SECONDS = 600.0  # one without a lock that is older was left by a process that died


class ResumeFolder:
    """A folder below another, locked while this process may still read it."""

    def __init__(self, outputs: Path) -> None:
        outputs.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=outputs))
        self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path)
        os.close(self._lock)


def remove_stale(outputs: Path) -> None:
    """Remove the folders that processes left which died before their first step."""
    for folder in outputs.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if _is_stale(folder):
                shutil.rmtree(folder)


def _is_stale(folder: Path) -> bool:
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return folder.is_dir() and time.time() - folder.stat().st_mtime > _BEGINNING_SECONDS
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True
