"""Since when events are asked for."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from ckpt.core.durations import seconds_of
from ckpt.core.errors import UsageError
from ckpt.core.printable import escape


def read_since(text: str | None) -> int:
    """Microseconds since 1970 of ``7d`` ago or of an ISO date; UsageError ``time-invalid``."""
    if text is None:
        return 0
    ago = seconds_of(text)
    if ago is not None:
        return max(0, int((time.time() - ago) * 1e6))
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            "time-invalid", f'"{escape(text, 40)}" is no time', hint="write 7d, 12h or 2026-11-24"
        ) from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1e6)
