"""``ckpt push``: store a file as a new version."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import click

from ckpt.cli.command import Settings, command, complete_models
from ckpt.cli.render import print_json, progress, version_json
from ckpt.core.errors import TrustError, UsageError, from_os_error
from ckpt.core.names import PICKLE_SUFFIXES, check_model, check_text
from ckpt.core.printable import escape
from ckpt.core.sizes import size


@command("push", short_help="Store a file or a folder as a new version.")
@click.argument("path", type=click.Path(), metavar="PATH")
@click.argument("model", shell_complete=complete_models, metavar="MODEL[:ALIAS]")
@click.option("--step", type=int, help="Training step.")
@click.option("-m", "--message", help="What this version is.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME=NUMBER", help="Repeatable.")
@click.option("--label", "labels", multiple=True, metavar="KEY=TEXT", help="Repeatable.")
@click.option("--alias", "aliases", multiple=True, help="Move this name here. Repeatable.")
@click.option("--parent", metavar="REF", help="Default: the run's previous version.")
@click.option("--run", help="Training job. Default: main.")
@click.option(
    "--compress",
    type=click.Choice(["auto", "max", "none"]),
    default="auto",
    help="auto: differences to the version before, where they save. max: as small as can be.",
)
def push(
    settings: Settings,
    path: str,
    model: str,
    step: int | None,
    message: str | None,
    metrics: tuple[str, ...],
    labels: tuple[str, ...],
    aliases: tuple[str, ...],
    parent: str | None,
    run: str | None,
    compress: str,
) -> None:
    """Store PATH as the newest version of MODEL: a .safetensors file, or a folder with some,
    such as save_pretrained writes; its other files are kept as they are, hidden folders left out.

    Prints the reference of the version, and nothing else, on stdout.
    """
    from ckpt.service.watching import newest_number

    file = Path(path)
    if path == "-":
        raise UsageError("usage", "a checkpoint cannot be read from stdin", hint="name a file")
    refuse_unfit(file)
    name, colon, alias = model.partition(":")
    check_model(name)
    given = (alias, *aliases) if colon else aliases
    with settings.open(create=True) as repository, progress(settings, f"push {file.name}") as meter:
        before = newest_number(repository, name)
        version = repository.push_file(
            file,
            name,
            step=step,
            metrics={key: number(key, text) for key, text in pairs(metrics, "--metric")},
            labels=dict(pairs(labels, "--label")),
            alias=given,
            message=message and check_text("the message", message),
            parent=parent,
            run=run,
            compress=compress,
            progress=meter,
        )
        root = repository.location.root
    if version.number <= before:
        lost = ", and the message is not kept" if message and message != version.message else ""
        said = f"{version.reference} in {root} was already committed, nothing is added{lost}"
        settings.say(said)
    else:
        settings.say(f"{size(version.nbytes)} in {root}, {size(version.new_bytes)} new")
    if settings.as_json:
        print_json(version_json(version))
    else:
        click.echo(version.reference)


def refuse_unfit(path: Path) -> None:
    """Refuse what only unpickling could read, folders without weights, and what is not there:
    before a repository is made for it."""
    if path.suffix.lower() in PICKLE_SUFFIXES and not path.is_dir():
        raise TrustError(
            "pickle-refused",
            f"{escape(str(path))} is a pickle, which can run code when it is read",
            hint=f"run `ckpt import {escape(str(path))} MODEL`, which reads it in a process of its "
            "own, with weights_only=True",
        )
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise from_os_error(error, f"reading {path}") from error
    if stat.S_ISDIR(mode) and not any(path.rglob("*.safetensors")):
        raise UsageError(
            "no-weights",
            f"{escape(str(path))} is a folder without .safetensors files",
            hint="give a .safetensors file, or a folder such as save_pretrained writes",
        )


def pairs(given: tuple[str, ...], option: str) -> list[tuple[str, str]]:
    """``KEY=VALUE`` arguments as pairs."""
    split = [text.partition("=") for text in given]
    for key, equals, _ in split:
        if not equals:
            raise UsageError(
                "usage", f'{option} "{escape(key)}" has no "="', hint="write KEY=VALUE"
            )
    return [(key, value) for key, _, value in split]


def number(key: str, text: str) -> float:
    """The number of a ``NAME=NUMBER`` argument."""
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            "metric-invalid", f'metric "{escape(key)}" is "{escape(text)}"', hint="give a number"
        ) from None


COMMANDS = {"push": push}
