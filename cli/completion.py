"""``ckpt completion``: the script that makes a shell complete ckpt's commands."""

from __future__ import annotations

import click

from ckpt.cli.command import Settings, command
from ckpt.cli.render import print_json


@command("completion", short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(settings: Settings, shell: str) -> None:
    """Print the completion script for SHELL, e.g. eval "$(ckpt completion bash)"."""
    from click.shell_completion import get_completion_class

    from ckpt.cli.main import ckpt

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(ckpt, {}, "ckpt", "_CKPT_COMPLETE").source()
    if settings.as_json:
        print_json({"shell": shell, "script": script})
    else:
        click.echo(script)


COMMANDS = {"completion": completion}
