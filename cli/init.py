"""``ckpt init``: make a repository."""

from __future__ import annotations

import click

from ckpt.cli.command import Settings, command
from ckpt.cli.render import print_json
from ckpt.core.printable import escape


@command("init")
@click.argument("folder", required=False)
def init(settings: Settings, folder: str | None) -> None:
    """Make a repository in FOLDER/.ckpt (default: here), unless there is one."""
    from ckpt.service.config import locate
    from ckpt.service.opening import open_repository

    chosen = folder or settings.repo or "."
    existed = locate(chosen).exists
    with open_repository(chosen) as repository:
        root = repository.location.root.resolve()
    if settings.as_json:
        print_json({"repository": str(root), "created": not existed})
    else:
        click.echo(f"{'found' if existed else 'made'} the repository {escape(str(root), 4000)}")


COMMANDS = {"init": init}
