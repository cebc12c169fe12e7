"""``ckpt log``: the versions of a model, those that match, or one metric of them drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckpt.cli.command import Settings, command, complete_models
from ckpt.cli.render import age, metrics, point_json, print_json, table, version_json
from ckpt.core.sizes import size

if TYPE_CHECKING:
    from ckpt.core.records import Curve, Version

_LISTED = 20


@command("log", short_help="List versions, or draw a metric of them.")
@click.argument("model", shell_complete=complete_models)
@click.option(
    "-n",
    "--number",
    "limit",
    type=int,
    metavar="N",
    help=f"How many.  [default: {_LISTED}; with --plot: all]",
)
@click.option("--before", type=int, metavar="N", help="Only versions below number N.")
@click.option("--where", metavar="TEXT", help="Only what matches: 'loss < 0.3 and step >= 100'.")
@click.option("--order-by", metavar="METRIC", help="Lowest first; -METRIC: highest first.")
@click.option("--plot", "metric", metavar="METRIC", help="Draw this metric over the steps.")
@click.option(
    "--output",
    type=click.Path(),
    metavar="FILE.svg",
    help="With --plot: write a picture of it, too.",
)
@click.option("-f", "--follow", is_flag=True, help="Go on with new versions, until Ctrl-C.")
def log(
    settings: Settings,
    model: str,
    limit: int | None,
    before: int | None,
    where: str | None,
    order_by: str | None,
    metric: str | None,
    output: str | None,
    follow: bool,
) -> None:
    """List the versions of MODEL, newest first, or draw a metric of them.

    --where and --order-by compare metrics, and "step", of all versions; what a version lacks
    never matches.

    With --follow they come oldest first, one on a line, and new ones as they are committed; a
    drawing is made anew. What is not there yet is waited for.
    """
    _check_numbers(limit, before)
    for option, text in (("--where", where), ("--order-by", order_by)):
        if text is not None and (follow or metric is not None or before is not None):
            raise click.UsageError(f"{option} excludes --follow, --plot and --before")
    if follow and before is not None:
        raise click.UsageError("--follow and --before exclude each other")
    picture = _picture(output, metric)
    listed = _LISTED if limit is None else limit
    if follow:
        from ckpt.cli.follow import follow_curve, follow_versions

        if metric is None:
            follow_versions(settings, model, listed)
        else:
            follow_curve(settings, model, metric, limit, picture)
        return
    with settings.open() as repository:
        if metric is not None:
            from ckpt.service.watching import read_curve

            _show_curve(settings, read_curve(repository, model, metric, before, limit), picture)
        elif where is None and order_by is None:
            found = repository.log(model, before=before, limit=listed)
            _show_versions(settings, found)
            if not found:
                below = "" if before is None else f" below {before}"
                settings.say(f"{model} has no versions{below}")
            elif limit is None and len(found) == listed and found[-1].number > 1:
                settings.say(f"older ones: ckpt log {model} --before {found[-1].number}")
        else:
            found = repository.find(model, where or "", order_by=order_by, limit=listed)
            _show_versions(settings, found)
            if not found:
                settings.say(f"no version of {model} matches")


def _check_numbers(limit: int | None, before: int | None) -> None:
    for option, value in (("--number", limit), ("--before", before)):
        if value is not None and not 1 <= value < 2**63:
            raise click.BadParameter("must be at least 1 and fit 64 bits", param_hint=option)


def _picture(output: str | None, metric: str | None) -> Path | None:
    """The file of ``--output``, where one can be written."""
    if output is None:
        return None
    from ckpt.service.pictures import check_output

    if metric is None:
        raise click.UsageError("--output needs --plot METRIC")
    path = Path(output)
    check_output(path)
    return path


def _show_curve(settings: Settings, curve: Curve, picture: Path | None) -> None:
    if settings.as_json:
        points = [point_json(curve, point) for point in curve.points]
        print_json({"model": curve.model, "metric": curve.metric, "points": points})
    else:
        from ckpt.cli.plot import Screen, draw

        click.echo(draw(curve, Screen.of_output()))
    if picture is not None:
        from ckpt.service.chart_picture import write_chart

        write_chart(curve, picture)


def _show_versions(settings: Settings, versions: Sequence[Version]) -> None:
    if settings.as_json:
        print_json([version_json(version) for version in versions])
        return
    if not versions:
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
