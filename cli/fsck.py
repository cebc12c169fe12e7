"""``ckpt fsck``: compare the store with the registry, and repair what can be."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from ckpt.cli.command import Settings, command
from ckpt.cli.render import count, print_json
from ckpt.core.errors import IntegrityError, UsageError
from ckpt.core.printable import escape, few

if TYPE_CHECKING:
    from ckpt.service.fsck import Checked


@command("fsck", short_help="Check the store against the registry; repair.")
@click.option(
    "--read-data",
    is_flag=False,
    flag_value="100%",
    metavar="[=N%]",
    help="Also read and hash every byte, or that of N% of the packs, taken at random.",
)
@click.option("--repair", is_flag=True, help="Write copies again; move versions to whole packs.")
def fsck(settings: Settings, read_data: str | None, repair: bool) -> None:
    """Check that the store has what the registry says. No pack is ever deleted.

    A pack that is missing or wrong is marked: the next push of its content writes it again, and
    --repair then moves the versions that need it.
    """
    with settings.open() as repository:
        found = repository.fsck(read_data=_share(read_data), repair=repair)
    _tell(settings, found)
    if found.damaged or found.copies:
        raise _damaged(found)
    if found.unmarked is not None:
        raise found.unmarked


def _tell(settings: Settings, found: Checked) -> None:
    if settings.as_json:
        print_json(
            {
                "packs": found.packs,
                "chunks": found.chunks,
                "broken": found.broken,
                "healed": found.healed,
                "damaged": found.damaged,
                "copies": found.copies,
                "rewritten": found.rewritten,
                "repaired": found.repaired,
                "unmarked": None if found.unmarked is None else found.unmarked.message,
            }
        )
        return
    for pack, reason in found.broken.items():
        click.echo(f"broken pack {pack}: {escape(reason)}")
    for reference in found.damaged:
        click.echo(f"damaged: {reference}")
    for key in found.copies:
        click.echo(f"missing or wrong: {key}")
    for key in found.rewritten:
        click.echo(f"written again: {key}")
    for reference in found.repaired:
        click.echo(f"repaired {reference}")
    for pack in found.healed:
        click.echo(f"whole again: {pack}")
    well = ", found nothing wrong" if found.is_clean and not found.broken else ""
    settings.say(
        f"looked at {count(found.packs, 'pack')}, read {count(found.chunks, 'chunk')}{well}"
    )


def _damaged(found: Checked) -> IntegrityError:
    shown = few([*found.damaged, *found.copies])
    first = "push the same content again, then " if found.damaged else ""
    hint = f"{first}run `ckpt fsck --repair`"
    error = IntegrityError("damaged", f"damaged: {shown}", hint=hint)
    if found.unmarked is not None:
        error.add_note(f"nothing could be marked: {found.unmarked.message}")
    return error


def _share(text: str | None) -> float:
    """``25%`` as 0.25; UsageError ``share-invalid``."""
    if text is None:
        return 0.0
    found = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)%?", text)
    if found is None or not 0 <= float(found[1]) <= 100:
        raise UsageError("share-invalid", f'"{escape(text, 20)}" is no share', hint="write 25%")
    return float(found[1]) / 100


COMMANDS = {"fsck": fsck}
