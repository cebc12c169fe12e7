"""``ckpt rm``: remove versions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from ckpt.cli.command import Settings, command, complete_models
from ckpt.cli.confirm import confirm
from ckpt.cli.render import print_json, version_json
from ckpt.core.errors import CkptError
from ckpt.core.records import Version

if TYPE_CHECKING:
    from ckpt.service.repository import Repository


@command("rm")
@click.argument(
    "references", shell_complete=complete_models, nargs=-1, required=True, metavar="REF..."
)
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def rm(settings: Settings, references: tuple[str, ...], dry_run: bool, yes: bool) -> None:
    """Remove the versions REF for ever. While an alias names one of them, none is removed."""
    with settings.open() as repository:
        # All are looked at before anything is removed: `net net` is one version, not two.
        foreseen = (repository.rm(reference, dry_run=True) for reference in references)
        versions = list({version.push: version for version in foreseen}.values())
        names = " ".join(version.reference for version in versions)
        if not dry_run:
            confirm(f"Remove {names} for ever?", names, yes=yes)
            _remove(repository, versions)
    if settings.as_json:
        print_json({"removed": not dry_run, "versions": [version_json(v) for v in versions]})
    else:
        settings.say(f"{'would remove' if dry_run else 'removed'} {names}")


def _remove(repository: Repository, versions: Sequence[Version]) -> None:
    for number, version in enumerate(versions):
        try:
            repository.rm(version)
        except CkptError as error:  # somebody else tagged or removed it meanwhile
            if number:
                gone = " ".join(one.reference for one in versions[:number])
                error.add_note(f"removed before that: {gone}")
            raise


COMMANDS = {"rm": rm}
