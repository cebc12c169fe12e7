"""``ckpt rm``: remove versions."""

from __future__ import annotations

import click

from ckpt.cli.command import Settings, command
from ckpt.cli.confirm import confirm
from ckpt.cli.render import print_json, version_json


@command("rm")
@click.argument("references", nargs=-1, required=True, metavar="REF...")
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def rm(settings: Settings, references: tuple[str, ...], dry_run: bool, yes: bool) -> None:
    """Remove the versions REF for ever. One that an alias names is kept."""
    with settings.open() as repository:
        # Resolved before anything is removed: `net net` is one version, not two.
        versions = list({v.push: v for v in map(repository.get, references)}.values())
        names = " ".join(version.reference for version in versions)
        if not dry_run:
            confirm(f"Remove {names} for ever?", names, yes=yes)
            for version in versions:
                repository.rm(version)
    if settings.as_json:
        print_json({"removed": not dry_run, "versions": [version_json(v) for v in versions]})
    else:
        settings.say(f"{'would remove' if dry_run else 'removed'} {names}")


COMMANDS = {"rm": rm}
