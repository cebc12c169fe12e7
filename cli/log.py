"""``ckpt log``: the versions of a model, or one metric of them drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckpt.cli.command import Settings, command
from ckpt.cli.render import age, metrics, point_json, print_json, size, table, version_json

if TYPE_CHECKING:
    from ckpt.core.records import Version

_LISTED = 20


@command("log")
@click.argument("model")
@click.option(
    "-n", "--number", "limit", type=int, help=f"How many.  [default: {_LISTED}; with --plot: all]"
)
@click.option("--before", type=int, metavar="N", help="Only versions below number N.")
@click.option("--plot", "metric", metavar="METRIC", help="Draw this metric over the steps.")
@click.option("--output", metavar="FILE.svg", help="With --plot: write a picture of it, too.")
@click.option("-f", "--follow", is_flag=True, help="Go on with new versions, until Ctrl-C.")
def log(
    settings: Settings,
    model: str,
    limit: int | None,
    before: int | None,
    metric: str | None,
    output: str | None,
    follow: bool,
) -> None:
    """List the versions of MODEL, newest first, or draw a metric of them.

    With --follow they come oldest first, one on a line, and new ones as they are committed; a
    drawing is made anew. What is not there yet is waited for.
    """
    for option, value in (("--number", limit), ("--before", before)):
        if value is not None and not 1 <= value < 2**63:
            raise click.BadParameter("must be at least 1 and fit 64 bits", param_hint=option)
    if output is not None:
        from ckpt.service.pictures import check_output

        if metric is None:
            raise click.UsageError("--output needs --plot METRIC")
        check_output(Path(output))
    if follow and before is not None:
        raise click.UsageError("--follow and --before exclude each other")
    listed = _LISTED if limit is None else limit
    if follow:
        from ckpt.cli.follow import follow_curve, follow_versions

        if metric is None:
            follow_versions(settings, model, listed)
        else:
            follow_curve(settings, model, metric, limit, output)
        return
    with settings.open() as repository:
        if metric is None:
            _show_versions(settings, repository.log(model, before=before, limit=listed))
            return
        from ckpt.service.watching import read_curve

        curve = read_curve(repository, model, metric, before, limit)
    if settings.as_json:
        points = [point_json(curve, point) for point in curve.points]
        print_json({"model": curve.model, "metric": metric, "points": points})
    else:
        from ckpt.cli.plot import Screen, draw

        click.echo(draw(curve, Screen.of_output()))
    if output is not None:
        from ckpt.service.chart_picture import write_chart

        write_chart(curve, Path(output))


def _show_versions(settings: Settings, versions: Sequence[Version]) -> None:
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


COMMANDS = {"log": log}
