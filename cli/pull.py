"""``ckpt pull``: write a version to a file."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ckpt.cli.command import Settings, command, complete_models
from ckpt.cli.render import count, print_json, progress, version_json
from ckpt.core.errors import ConflictError, NotFoundError, UsageError
from ckpt.core.printable import escape
from ckpt.core.sizes import size


@command("pull", short_help="Write a version to a file, every byte checked.")
@click.argument("reference", shell_complete=complete_models, metavar="REF")
@click.argument("destination", type=click.Path(), metavar="[DEST]", required=False)
@click.option("-f", "--force", is_flag=True, help="Replace DEST if it exists.")
@click.option(
    "--tensors",
    "patterns",
    multiple=True,
    metavar="PATTERN",
    help="Only these, such as 'encoder.*'. Repeatable.",
)
def pull(
    settings: Settings,
    reference: str,
    destination: str | None,
    force: bool,
    patterns: tuple[str, ...],
) -> None:
    """Write the version REF to the file DEST, every byte checked.

    DEST is ./<model>-<number>.safetensors by default; a folder takes that name in it. A pushed
    .safetensors file comes back byte for byte, a pushed folder as the new folder DEST, which is
    never replaced. Prints the path on stdout.
    """
    tensors = patterns or None
    if destination == "-":
        raise UsageError("usage", "a version cannot be written to stdout", hint="name a file")
    with settings.open() as repository:
        version = repository.get(reference)
        usual = f"{version.model.replace('/', '-')}-{version.number}"
        if version.state != "files" or tensors is not None:
            usual += ".safetensors"
        elif destination is not None and destination.endswith(".safetensors"):
            raise UsageError(
                "is-folder",
                f"{version.reference} is a folder of files, and {escape(destination, 80)} would be one",
                hint="name a folder, or give --tensors '*' for one file",
            )
        path = _place(destination, usual, is_folder=not usual.endswith(".safetensors"), force=force)
        with progress(settings, f"pull {version.reference}") as meter:
            repository.pull_file(version, path, tensors=tensors, force=force, progress=meter)
        left = 0 if tensors is not None else repository.unnamed_values(version)
    if version.state == "module" and tensors is None:
        settings.say("the file has the weights alone; the module itself comes by load, from Python")
    elif left:
        settings.say(f"not in the file: {count(left, 'plain value')}; pull from Python to get all")
    pulled = version.nbytes if tensors is None else path.stat().st_size
    settings.say(f"{version.reference}: {size(pulled)}, every byte checked")
    if settings.as_json:
        print_json({"path": str(path), "version": version_json(version)})
    else:
        click.echo(os.fsencode(path))


def _place(destination: str | None, usual: str, *, is_folder: bool, force: bool) -> Path:
    """Where the file or folder goes: by its usual name into a folder that is there."""
    path = Path(destination or usual)
    if destination is None or not os.path.isdir(path):
        if destination is not None and destination.endswith("/") and not is_folder:
            raise NotFoundError(
                "no-folder", f"there is no folder {escape(destination)}", hint="make it first"
            )
        return path
    if is_folder and force:
        raise ConflictError(
            "exists",
            f"{escape(destination or usual)} exists, and a folder is not replaced in one step",
            hint="remove it first, or leave --force out to write into it",
        )
    return path / usual


COMMANDS = {"pull": pull}
