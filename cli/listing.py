"""``ckpt ls`` and ``ckpt log``: models, and the versions of one."""

from __future__ import annotations

import click

from ckpt.cli.command import Settings, command
from ckpt.cli.render import age, metrics, print_json, size, table, version_json


@command("ls")
def ls(settings: Settings) -> None:
    """List the models, each with its newest version."""
    with settings.open() as repository:
        models = repository.models()
    if settings.as_json:
        print_json(
            [
                {
                    "name": model.name,
                    "versions": model.versions,
                    "newest": model.newest and version_json(model.newest),
                }
                for model in models
            ]
        )
        return
    rows = []
    for model in models:
        newest = model.newest
        cells = [model.name, str(model.versions)]
        if newest is None:
            cells += ["", "", "", ""]
        else:
            cells += [newest.reference, size(newest.nbytes), age(newest.created_at)]
            cells.append(" ".join(newest.aliases))
        rows.append(cells)
    if rows:
        head = ["MODEL", "VERSIONS", "NEWEST", "SIZE", "CREATED", "ALIASES"]
        click.echo(table(head, rows, right=["VERSIONS", "SIZE"]))
    else:
        settings.say("no models yet; begin with `ckpt push model.safetensors NAME`")


@command("log")
@click.argument("model")
@click.option("-n", "--number", "limit", default=20, show_default=True, help="How many.")
@click.option("--before", type=int, metavar="N", help="Only versions below number N.")
def log(settings: Settings, model: str, limit: int, before: int | None) -> None:
    """List the versions of MODEL, newest first."""
    for option, value in (("--number", limit), ("--before", before)):
        if value is not None and not 1 <= value < 2**63:
            raise click.BadParameter("must be at least 1 and fit 64 bits", param_hint=option)
    with settings.open() as repository:
        versions = repository.log(model, before=before, limit=limit)
    if settings.as_json:
        print_json([version_json(version) for version in versions])
        return
    rows = [
        [
            version.reference,
            "" if version.step is None else str(version.step),
            size(version.nbytes),
            size(version.new_bytes),
            age(version.created_at),
            " ".join(version.aliases),
            metrics(version.metrics),
            version.message or "",
        ]
        for version in versions
    ]
    head = ["VERSION", "STEP", "SIZE", "NEW", "CREATED", "ALIASES", "METRICS", "MESSAGE"]
    click.echo(table(head, rows, right=["STEP", "SIZE", "NEW"]))


COMMANDS = {"ls": ls, "log": log}
