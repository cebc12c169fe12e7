"""``ckpt export``: a version in the formats of other programs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from ckpt.cli.command import Settings, command, complete_models
from ckpt.cli.render import count, print_json, progress, version_json
from ckpt.core.sizes import size

if TYPE_CHECKING:
    from ckpt.service.exporting import ExportFormat

_FORMATS = ("pt", "safetensors", "dcp", "hf")


@command("export", short_help="Write a version for other programs.")
@click.argument("reference", shell_complete=complete_models, metavar="REF")
@click.argument("destination", type=click.Path(), metavar="DEST")
@click.option("--format", "form", type=click.Choice(_FORMATS), help="Default: by DEST's suffix.")
@click.option("-f", "--force", is_flag=True, help="Replace the file DEST if it exists.")
def export(
    settings: Settings, reference: str, destination: str, form: ExportFormat | None, force: bool
) -> None:
    """Write the version REF to DEST for other programs, and read it back.

    pt is one file of torch.save that loads with weights_only=True; safetensors has the tensors
    alone; dcp is a folder of torch.distributed.checkpoint; hf a folder as it was pushed. Prints
    the path on stdout.
    """
    with settings.open() as repository:
        version = repository.get(reference)
        with progress(settings, f"export {version.reference}") as meter:
            done = repository.export_file(
                version, destination, format=form, force=force, progress=meter
            )
        left = 0 if done.exact or version.state == "files" else repository.unnamed_values(version)
    said = "importing it gives the same digest" if done.exact else "every tensor in it bit for bit"
    settings.say(f"{version.reference}: {size(version.nbytes)}, {said}")
    if version.state == "module":
        settings.say("the module itself comes by load, from Python")
    elif left and done.format != "pt":
        settings.say(f"not in it: {count(left, 'plain value')}, which a .pt file would have")
    if settings.as_json:
        print_json(
            {
                "path": str(done.path),
                "format": done.format,
                "exact": done.exact,
                "version": version_json(version),
            }
        )
    else:
        click.echo(os.fsencode(done.path))


COMMANDS = {"export": export}
