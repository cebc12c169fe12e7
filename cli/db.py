"""``ckpt db upgrade``: bring a registry's schema up to date."""

from __future__ import annotations

import click

from ckpt.cli.command import Settings, command
from ckpt.cli.render import print_json


@click.group("db")
def db() -> None:
    """Work on the registry's schema."""


@command("upgrade")
def upgrade(settings: Settings) -> None:
    """Bring the registry's schema up to date; harmless when it is."""
    from ckpt.service.opening import upgrade_registry

    where = upgrade_registry(settings.repo)
    settings.say(f"{where} is up to date")
    if settings.as_json:
        print_json({"registry": where})


db.add_command(upgrade)
COMMANDS = {"db": db}
