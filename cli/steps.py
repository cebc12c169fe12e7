"""``--verbose``: what the layers below log, as lines on stderr, with the seconds since the start."""

from __future__ import annotations

import logging
import sys

from ckpt.core.printable import escape


class _Steps(logging.Handler):
    """Asks for stderr anew each time: a progress bar puts itself in its place while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        text = escape(record.getMessage(), limit=4000)
        try:
            print(f"{record.relativeCreated / 1000:7.3f} s  {text}", file=sys.stderr)
        except OSError:  # nobody reads any more: no reason to stop in the middle of an act
            self.handleError(record)


def tell_steps() -> None:
    """Print each step from now on."""
    logger = logging.getLogger("ckpt")
    logger.setLevel(logging.DEBUG)
    logger.handlers = [_Steps()]
