"""``ckpt verify``: load a version as a module, and say what was proven."""

from __future__ import annotations

import os
import sys

import click

from ckpt.cli.command import Settings, command
from ckpt.cli.render import print_json
from ckpt.core.printable import escape


@command("verify")
@click.argument("reference", metavar="REF")
@click.option("--trust", multiple=True, metavar="MODULE", help="May be imported. Repeatable.")
@click.option("--path", "paths", multiple=True, metavar="DIR", help="Look for modules here too.")
def verify(
    settings: Settings, reference: str, trust: tuple[str, ...], paths: tuple[str, ...]
) -> None:
    """Rebuild the module REF, and prove that it is the one that was pushed.

    Nothing is imported but torch.nn and what --trust names.
    """
    sys.path[:0] = [os.path.abspath(path) for path in paths]
    with settings.open() as repository:
        version = repository.get(reference)
        report = repository.verify(version, trust=trust)
    if settings.as_json:
        print_json(
            {
                "reference": version.reference,
                "verdict": report.verdict,
                "reason": report.reason,
                "drift": list(report.drift),
                "wrappers": {path: list(names) for path, names in (report.wrappers or {}).items()},
            }
        )
        return
    click.echo(f"{version.reference}: {report.verdict}")
    for line in (report.reason, *report.drift):
        if line:
            settings.say(escape(line))


COMMANDS = {"verify": verify}
