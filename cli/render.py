"""How things look: tables, sizes, times, JSON, progress. Text from outside is always escaped."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import click

from ckpt.cli.command import Settings
from ckpt.core.json_numbers import json_number, json_numbers
from ckpt.core.printable import escape
from ckpt.core.records import Curve, Point, Version
from ckpt.core.sizes import size

_PROGRESS_BYTES = 64 << 20
_LINE_SECONDS = 5.0


def count(number: int, noun: str) -> str:
    """``1 pack``, ``2 packs``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def age(moment: datetime) -> str:
    """How long ago, in one unit."""
    seconds = max(0, int((datetime.now(UTC) - moment).total_seconds()))
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"


def metrics(values: Mapping[str, float]) -> str:
    """``loss=0.31 acc=0.9``."""
    return " ".join(f"{name}={value:.6g}" for name, value in values.items())


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Aligned columns without lines; an empty last cell leaves no blanks behind it."""
    cells = [head, *([escape(cell) for cell in row] for row in rows)]
    widths = [max(cells_of(row[column]) for row in cells) for column in range(len(head))]
    lines = []
    for row in cells:
        padded = []
        for cell, width, title in zip(row, widths, head, strict=True):
            blanks = " " * (width - cells_of(cell))
            padded.append(blanks + cell if title in right else cell + blanks)
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def cells_of(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def version_json(version: Version) -> dict[str, Any]:
    """The stable JSON of a version; numbers that JSON lacks are text."""
    return {
        "reference": version.reference,
        "model": version.model,
        "number": version.number,
        "digest": version.digest,
        "state": version.state,
        "step": version.step,
        "run": version.run,
        "parent": version.parent,
        "metrics": json_numbers(version.metrics),
        "labels": dict(version.labels),
        "aliases": list(version.aliases),
        "message": version.message,
        "author": version.author,
        "created_at": version.created_at.isoformat(),
        "nbytes": version.nbytes,
        "new_bytes": version.new_bytes,
        "push": version.push,
        "proof": None if version.proof is None else asdict(version.proof),
    }


def point_json(curve: Curve, point: Point) -> dict[str, Any]:
    """The stable JSON of one version's metric."""
    return {
        "version": f"{curve.model}@{point.number}",
        "step": point.step,
        "run": point.run,
        "value": json_number(point.value),
    }


def print_json(value: Any, *, on_one_line: bool = False) -> None:
    """Print one JSON document."""
    indent = None if on_one_line else 2
    click.echo(json.dumps(value, indent=indent, ensure_ascii=True, allow_nan=False))


@contextmanager
def progress(settings: Settings, what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A callback that shows progress on stderr: a bar in a terminal, a line now and then
    elsewhere, nothing for what is done in a moment anyway."""
    if settings.quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar(what) as update:
            yield update
    else:
        yield _lines(what)


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    bars: list[Any] = []
    lock = threading.Lock()  # progress comes from several threads

    def update(done: int, total: int) -> None:
        if total < _PROGRESS_BYTES:
            return
        with lock:
            if not bars:
                bars.append(_rich_bar(what, total))
            bars[0].update(bars[0].task_ids[0], completed=done)

    try:
        yield update
    finally:
        for bar in bars:
            bar.stop()


def _rich_bar(what: str, total: int) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task(what, total=total)
    bar.start()
    return bar


def _lines(what: str) -> Callable[[int, int], None]:
    said = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal said
        if total >= _PROGRESS_BYTES and time.monotonic() - said > _LINE_SECONDS:
            said = time.monotonic()
            click.echo(f"{what}: {size(done)} of {size(total)}", err=True)

    return update
