"""``ckpt log --follow``: new versions, or the drawing made anew, as they are committed."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from ckpt.cli.command import Settings
from ckpt.cli.render import metrics, point_json, print_json, version_json
from ckpt.core.errors import NotFoundError
from ckpt.core.names import check_key, check_model
from ckpt.core.printable import escape
from ckpt.core.sizes import size

if TYPE_CHECKING:
    from ckpt.core.records import Curve, Version
    from ckpt.service.repository import Repository

T = TypeVar("T")

_POLL_SECONDS = 1.0
# What a job that has just begun makes in a while.
_COMING = ("no-repository", "model-missing", "metric-missing")


def follow_versions(settings: Settings, model: str, listed: int) -> None:
    """Print the newest versions of a model, oldest first, then those that come."""
    from ckpt.service.watching import follow

    check_model(model)
    waiting = _Waiting(settings)
    with waiting.until(settings.open) as repository:
        newest = waiting.attempt(lambda: repository.log(model, limit=listed)) or []
        after = newest[0].number if newest else 0
        if not settings.as_json:
            head = ["VERSION", "STEP", "SIZE", "NEW", "CREATED", "ALIASES", "METRICS", "MESSAGE"]
            click.echo(_row(model, head))
        for page in chain([newest[::-1]], follow(repository, model, after, waiting.pause)):
            for version in page:
                if settings.as_json:
                    print_json(version_json(version), on_one_line=True)
                else:
                    click.echo(_row(model, _cells(version)))


def _cells(version: Version) -> list[str]:
    return [
        version.reference,
        "" if version.step is None else str(version.step),
        size(version.nbytes),
        size(version.new_bytes),
        f"{version.created_at.astimezone():%Y-%m-%d %H:%M:%S}",
        " ".join(version.aliases),
        metrics(version.metrics),
        version.message or "",
    ]


def _row(model: str, cells: list[str]) -> str:
    """Columns that what is not known yet should fit."""
    name, step, nbytes, new, *rest = map(escape, cells)
    created, aliases, measured, message = rest
    start = f"{name:<{len(model) + 6}}  {step:>8}  {nbytes:>10}  {new:>10}  {created:<19}"
    return f"{start}  {aliases:<8}  {measured:<16}  {message}".rstrip()


def follow_curve(
    settings: Settings, model: str, metric: str, limit: int | None, picture: Path | None
) -> None:
    """Draw a metric of a model, and again whenever there are new versions; as JSON one line for
    each version that has it."""
    from ckpt.cli.plot import Screen, draw
    from ckpt.service.chart_picture import write_chart
    from ckpt.service.watching import read_curve

    check_model(model)
    check_key("metric", metric)
    waiting = _Waiting(settings)
    told = 0
    with waiting.until(settings.open) as repository:
        for _ in _changes(repository, model, waiting.pause):
            curve = waiting.attempt(lambda: read_curve(repository, model, metric, limit=limit))
            if curve is None or curve.points[-1].number <= told:
                continue
            if settings.as_json:
                _print_points(curve, told)
            else:
                click.clear()  # of a terminal; in a file the drawings follow each other
                click.echo(f"{draw(curve, Screen.of_output())}\n")
            if picture is not None:
                write_chart(curve, picture)
            told = curve.points[-1].number


def _print_points(curve: Curve, told: int) -> None:
    for point in curve.points:
        if point.number > told:
            print_json(point_json(curve, point), on_one_line=True)


def _changes(repository: Repository, model: str, pause: Callable[[], None]) -> Iterator[None]:
    """Now, and after each arrival of new versions."""
    from ckpt.service.watching import follow, newest_number

    after = newest_number(repository, model)
    yield
    for _ in follow(repository, model, after, pause):
        yield


class _Waiting:
    """Waits for what is coming, and says once for what; ends when nobody reads any more."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._said = ""

    def pause(self) -> None:
        """Let some time pass. A closed pipe is noticed at once, not at the next line."""
        try:
            poll = select.poll()
            poll.register(sys.stdout.fileno(), 0)  # errors alone
        except (OSError, ValueError):
            time.sleep(_POLL_SECONDS)
            return
        if poll.poll(1000 * _POLL_SECONDS):
            raise BrokenPipeError

    def attempt(self, act: Callable[[], T]) -> T | None:
        """What ``act`` gives, or None, told on stderr, where that is still to come."""
        try:
            return act()
        except NotFoundError as error:
            if error.code not in _COMING:
                raise
            if error.message != self._said:
                self._settings.say(f"{error}; waiting for it")
            self._said = error.message
            return None

    def until(self, act: Callable[[], T]) -> T:
        """What ``act`` gives once it is there."""
        while (given := self.attempt(act)) is None:
            self.pause()
        return given
