"""``ckpt copy``: a version into another repository."""

from __future__ import annotations

import click

from ckpt.cli.command import Settings, command, complete_models
from ckpt.cli.render import print_json, progress, version_json
from ckpt.core.names import check_model
from ckpt.core.sizes import size


@command("copy", short_help="Copy a version into another repository.")
@click.argument("reference", shell_complete=complete_models, metavar="REF")
@click.argument("target", type=click.Path(), metavar="REPO")
@click.option("--model", metavar="NAME", help="Its model there; default: as here.")
def copy(settings: Settings, reference: str, target: str, model: str | None) -> None:
    """Copy the version REF into the repository REPO, every byte checked on the way.

    Chunks that are there already are shared. Its number, time and aliases do not come along; a
    version that REPO's model has with the same run, content, step, metrics and labels is answered
    instead of a new one. Prints the reference there on stdout.
    """
    from ckpt.service.opening import open_repository
    from ckpt.service.watching import newest_number

    with settings.open() as here:
        # All that can be refused is, before a repository is made for it.
        version = here.get(reference)
        name = version.model if model is None else check_model(model)
        with open_repository(target) as there:
            before = newest_number(there, name)
            with progress(settings, f"copy {version.reference}") as meter:
                copied = there.copy(here, version, model=name, progress=meter)
    if copied.number <= before:
        settings.say(f"{copied.reference} was there already, nothing is added")
    else:
        settings.say(f"{size(copied.nbytes)}, {size(copied.new_bytes)} new there")
    if settings.as_json:
        print_json(version_json(copied))
    else:
        click.echo(copied.reference)


COMMANDS = {"copy": copy}
