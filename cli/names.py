"""``ckpt tag``, ``untag`` and ``label``: what a version is called and what is said of it."""

from __future__ import annotations

import click

from ckpt.cli.command import Settings, command, complete_models
from ckpt.cli.push import number, pairs
from ckpt.cli.render import print_json, version_json
from ckpt.core.errors import UsageError
from ckpt.core.names import check_key


@command("tag", short_help="Make an alias name a version.")
@click.argument("reference", shell_complete=complete_models, metavar="REF")
@click.argument("alias")
@click.option("--expect", metavar="REF", help="Only if the alias names this version now.")
def tag(settings: Settings, reference: str, alias: str, expect: str | None) -> None:
    """Make ALIAS name the version REF, whatever it named before."""
    with settings.open() as repository:
        version = repository.tag(reference, alias, expect=expect)
    if settings.as_json:
        print_json(version_json(version))
    else:
        settings.say(f"{version.model}:{alias} is {version.reference}")


@command("untag")
@click.argument("reference", shell_complete=complete_models, metavar="MODEL:ALIAS")
def untag(settings: Settings, reference: str) -> None:
    """Remove an alias; the version stays."""
    with settings.open() as repository:
        version = repository.get(reference)
        repository.untag(reference)
        version = repository.get(version)
    if settings.as_json:
        print_json(version_json(version))
    else:
        settings.say(f"{reference} is gone; {version.reference} stays")


@command("label", short_help="Set labels and metrics, or remove some.")
@click.argument("reference", shell_complete=complete_models, metavar="REF")
@click.argument("labels", nargs=-1, metavar="[KEY=TEXT]...")
@click.option("--metric", "metrics", multiple=True, metavar="NAME=NUMBER", help="Repeatable.")
@click.option("--remove", multiple=True, metavar="KEY", help="Repeatable.")
def label(
    settings: Settings,
    reference: str,
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
    remove: tuple[str, ...],
) -> None:
    """Set labels and metrics of a version, or remove some."""
    if not labels and not metrics and not remove:
        raise UsageError("usage", "nothing to set or remove", hint="write KEY=TEXT")
    for key in remove:
        check_key("label", key)
    with settings.open() as repository:
        version = repository.annotate(
            reference,
            labels=dict(pairs(labels, "label")),
            metrics={key: number(key, text) for key, text in pairs(metrics, "--metric")},
            remove=remove,
        )
    if settings.as_json:
        print_json(version_json(version))
    else:
        settings.say(f"labelled {version.reference}")


COMMANDS = {"tag": tag, "untag": untag, "label": label}
