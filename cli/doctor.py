"""``ckpt doctor``: look at what the repository rests on."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from ckpt.cli.command import Settings, command
from ckpt.cli.render import print_json, table
from ckpt.core.errors import AccessError, StorageError


@command("doctor", short_help="Look at what the repository rests on.")
def doctor(settings: Settings) -> None:
    """Look at the repository, versions, permissions, clock and server, and say what to do.

    Ends with 1 when something is not well.
    """
    from ckpt.service.config import locate
    from ckpt.service.doctor import examine_unopened

    try:
        repository = settings.open()
    except (StorageError, AccessError) as error:
        location = locate(settings.repo)
        if not location.exists:
            raise
        found = examine_unopened(location, error)
    else:
        with repository:
            found = repository.doctor()
    if settings.as_json:
        print_json([asdict(one) for one in found])
    else:
        rows: list[list[str]] = []
        for one in found:
            rows.append(["ok" if one.fine else "LOOK", one.name, one.seen])
            rows += [["", "", f"to do: {one.todo}"]] if one.todo else []
        click.echo(table(["", "WHAT", "SEEN"], rows))
    if not all(one.fine for one in found):
        sys.exit(1)


COMMANDS = {"doctor": doctor}
