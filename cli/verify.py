"""``ckpt verify``: load a version as a module, and say what was proven."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from ckpt.cli.command import Settings, command, complete_models, paths_option
from ckpt.cli.render import print_json, table
from ckpt.core.json_numbers import json_number
from ckpt.core.printable import escape

if TYPE_CHECKING:
    from ckpt.core.records import Version
    from ckpt.loader.outputs import Comparison
    from ckpt.loader.verify import Report


@command("verify", short_help="Rebuild a module, and prove it.")
@click.argument("reference", shell_complete=complete_models, metavar="REF")
@click.option("--trust", multiple=True, metavar="MODULE", help="May be imported. Repeatable.")
@paths_option("Look for modules here too.")
@click.option("--require", metavar="VERDICT", help="Fail below this verdict.")
def verify(
    settings: Settings,
    reference: str,
    trust: tuple[str, ...],
    paths: tuple[str, ...],
    require: str | None,
) -> None:
    """Rebuild the module REF, and prove that it is the one that was pushed.

    Nothing is imported but torch.nn and what --trust names. The verdicts, from the strongest:
    outputs-exact, outputs-close, structure, weights.
    """
    sys.path[:0] = [os.path.abspath(path) for path in paths]
    with settings.open() as repository:
        version = repository.get(reference)
        report = repository.verify(version, trust=trust, require=require)
    if settings.as_json:
        print_json(_as_json(version, report))
        return
    click.echo(f"{version.reference}: {report.verdict}")
    if report.outputs and not settings.quiet:
        head = ["OUTPUT", "DTYPE", "SHAPE", "DIFFERENCE"]
        click.echo(table(head, [_output_row(output) for output in report.outputs]), err=True)
    if report.dropped:
        settings.say(f"left out at the push: {', '.join(report.dropped)}")
    for line in (report.reason, *report.drift):
        if line:
            settings.say(escape(line))


def _output_row(output: Comparison) -> list[str]:
    shape = "x".join(map(str, output.shape)) or "scalar"
    difference = "none, bit for bit" if output.equal else str(output).partition(": ")[2]
    return [output.name, output.dtype, shape, difference]


def _as_json(version: Version, report: Report) -> dict[str, Any]:
    return {
        "reference": version.reference,
        "verdict": report.verdict,
        "reason": report.reason,
        "drift": list(report.drift),
        "wrappers": {path: list(names) for path, names in (report.wrappers or {}).items()},
        "dropped": list(report.dropped),
        "outputs": [
            {
                "name": output.name,
                "dtype": output.dtype,
                "shape": list(output.shape),
                "equal": output.equal,
                "close": output.close,
                "largest": json_number(output.largest),
                "error": json_number(output.error),
                "allowed": json_number(output.allowed),
            }
            for output in report.outputs
        ],
    }


COMMANDS = {"verify": verify}
