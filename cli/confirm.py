"""Asking before what cannot be undone."""

from __future__ import annotations

import sys

import click

from ckpt.core.errors import CkptError, UsageError


def confirm(question: str, what: str, *, yes: bool) -> None:
    """Return when the person says yes, or did with ``--yes``; ``what`` the question is about.

    Raises:
        UsageError: ``not-confirmed`` where nobody can be asked.
        CkptError: ``declined`` when the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("not-confirmed", f"nobody to ask about {what}", hint="add --yes")
    if not click.confirm(question, err=True):
        raise CkptError("declined", "you said no; nothing was changed")
