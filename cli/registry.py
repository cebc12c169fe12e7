"""``ckpt registry rebuild``: make the registry anew from the store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckpt.cli.command import Settings, command
from ckpt.cli.confirm import confirm
from ckpt.cli.render import count, print_json
from ckpt.core.errors import IntegrityError
from ckpt.core.printable import escape, few

if TYPE_CHECKING:
    from ckpt.service.rebuild import Rebuilt


@click.group("registry")
def registry() -> None:
    """Work on the registry as a whole."""


@command("rebuild")
@click.option(
    "--lost", is_flag=True, help="The old registry, of an address that has none, is lost for good."
)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def rebuild(settings: Settings, lost: bool, yes: bool) -> None:
    """Make the registry anew from the store alone, and keep the old one beside it.

    Every version that was acknowledged comes back, and what was removed does not. Where a
    document or an event is missing or damaged nothing is replaced. Stop whatever uses the
    repository first: what it does meanwhile is refused or lost.
    """
    from ckpt.service.config import locate
    from ckpt.service.places import open_store
    from ckpt.service.rebuild import rebuild_registry

    location = locate(settings.repo)
    confirm("Make the registry anew from the store?", "the rebuild", yes=yes)
    store = open_store(location.store_place, location.options)
    try:
        found = rebuild_registry(location, store, lost=lost)
    finally:
        store.close()
    _tell(settings, found)
    if found.damaged:
        raise IntegrityError(
            "damaged",
            f"the store has not all bytes of {few(found.damaged)}",
            hint="put the packs back and run this again, or push the same content again, then run "
            "`ckpt fsck --repair`",
        )


def _tell(settings: Settings, found: Rebuilt) -> None:
    if settings.as_json:
        print_json(
            {
                "epoch": found.epoch,
                "versions": found.versions,
                "damaged": list(found.damaged),
                "unreadable": list(found.unreadable),
                "kept": found.kept,
            }
        )
        return
    click.echo(f"rebuilt: {count(found.versions, 'version')}, epoch {found.epoch}")
    for reference in found.damaged:
        settings.say(f"{reference} is damaged: not all of its bytes are in the store")
    for line in found.unreadable:
        settings.say(f"left alone: {escape(line)}")
    if found.kept is not None:
        settings.say(f"the old registry is {found.kept}")


registry.add_command(rebuild)
COMMANDS = {"registry": registry}
