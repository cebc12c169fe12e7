"""Who does something: the name that versions and events carry."""

from __future__ import annotations

import getpass
import os


def author() -> str:
    """The name of the user, or the number where it has no name."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())
