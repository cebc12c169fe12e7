"""``ckpt pull``: write a version to a file."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ckpt.cli.command import Settings, command
from ckpt.cli.render import print_json, progress, size, version_json


@command("pull")
@click.argument("reference", metavar="REF")
@click.argument("destination", metavar="[DEST]", required=False)
@click.option("-f", "--force", is_flag=True, help="Replace DEST if it exists.")
@click.option("--tensors", metavar="PATTERN", help="Only these, such as 'encoder.*'.")
def pull(
    settings: Settings, reference: str, destination: str | None, force: bool, tensors: str | None
) -> None:
    """Write the version REF to the file DEST, every byte checked.

    DEST is ./<model>-<number>.safetensors by default; a folder takes that name in it. A pushed
    .safetensors file comes back byte for byte, a pushed folder as the new folder DEST. Prints
    the path on stdout.
    """
    with settings.open() as repository:
        version = repository.get(reference)
        usual = f"{version.model.replace('/', '-')}-{version.number}"
        if version.state != "files" or tensors is not None:
            usual += ".safetensors"
        path = Path(destination or usual)
        if os.path.isdir(path):
            path = path / usual
        with progress(settings, f"pull {version.reference}") as meter:
            repository.pull_file(version, path, tensors=tensors, force=force, progress=meter)
        left = 0 if tensors is not None else repository.unnamed_values(version)
    if version.state == "module" and tensors is None:
        settings.say("the file has the weights alone; the module itself comes by load, from Python")
    elif left:
        settings.say(f"{left} plain values are not in the file; pull from Python to get them")
    pulled = version.nbytes if tensors is None else path.stat().st_size
    settings.say(f"{version.reference}: {size(pulled)}, every byte checked")
    if settings.as_json:
        print_json({"path": str(path), "version": version_json(version)})
    else:
        click.echo(os.fsencode(path))


COMMANDS = {"pull": pull}
