"""Since when events are asked for."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime

from ckpt.core.errors import UsageError
from ckpt.core.printable import escape

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def read_since(text: str | None) -> int:
    """Microseconds since 1970 of ``7d`` ago or of an ISO date; UsageError ``time-invalid``."""
    if text is None:
        return 0
    ago = re.fullmatch(r"(\d{1,9})([smhdw])", text)
    if ago is not None:
        return int((time.time() - int(ago[1]) * _UNITS[ago[2]]) * 1e6)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            "time-invalid", f'"{escape(text, 40)}" is no time', hint="write 7d, 12h or 2026-11-24"
        ) from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1e6)
