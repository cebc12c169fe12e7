"""``ckpt diff``: what differs between two versions."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckpt.cli.command import Settings, command, complete_models
from ckpt.cli.render import cells_of, count, print_json, progress, table, version_json
from ckpt.core.json_numbers import json_number
from ckpt.core.printable import escape
from ckpt.core.sizes import size

if TYPE_CHECKING:
    from ckpt.core.documents import Tensor
    from ckpt.service.diff import Diff, TensorDifference
    from ckpt.service.diff_contents import Difference

_BAR = 24
_SIGNS = {"changed": "~", "added": "+", "removed": "-"}


@command("diff", short_help="Show what differs between two versions.")
@click.argument("before", shell_complete=complete_models, metavar="A")
@click.argument("after", shell_complete=complete_models, metavar="B")
@click.option("--stats", is_flag=True, help="Read the tensors that changed, and say how far.")
@click.option(
    "--output", type=click.Path(), metavar="FILE.svg", help="Write a picture of the layers, too."
)
def diff(settings: Settings, before: str, after: str, stats: bool, output: str | None) -> None:
    """Show what differs between the versions A and B, also of different models.

    The registry alone says which tensors, ties, modules, values and metrics do; no tensor is
    read. With --stats the tensors whose values changed are. Exits with 0 whether or not there
    are differences.
    """
    from ckpt.service.diff_picture import bars, draw
    from ckpt.service.pictures import check_output, write_picture

    if output is not None:
        check_output(Path(output))
    with settings.open() as repository, progress(settings, "diff") as meter:
        found = repository.diff(before, after, stats=stats, progress=meter)
    if output is not None:
        write_picture(draw(bars(found)), Path(output))
    if settings.as_json:
        print_json(_as_json(found))
    else:
        _show(found)


def _show(found: Diff) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    click.echo(f"{found.before.reference} -> {found.after.reference}")
    if found.identical:
        click.echo("their content is the same")
    else:
        _show_tensors(found, width)
    for title, rows in _sections(found):
        if rows:
            click.echo(f"\n{title}")
            for row in rows:
                click.echo(_fitted(f"  {escape(row)}", width))


def _show_tensors(found: Diff, width: int | None) -> None:
    from ckpt.service.diff import CHANGES

    rows = [[change, *_counted(found, change)] for change in CHANGES]
    click.echo(f"\n{table(['', 'TENSORS', 'BYTES'], rows, right=['TENSORS', 'BYTES'])}")
    differing = [tensor for tensor in found.tensors if tensor.change != "same"]
    if not differing:
        return
    _show_bars(found, width)
    rows = [
        [_SIGNS[one.change], size(one.nbytes), ", ".join(_what(one)), one.name]
        for one in differing
        if one.statistics is None or one.what != ("values",)  # those have a row of numbers
    ]
    if rows:
        _show_table(["", "SIZE", "DIFFERS IN", "TENSOR"], rows, ["SIZE"], width)
    measured = [tensor for tensor in differing if tensor.statistics is not None]
    if measured:
        head = ["NORM A", "NORM B", "|B-A|", "MAX", "COSINE", "CHANGED", "TENSOR"]
        _show_table(head, [_statistics_row(one) for one in measured], head[:-1], width)
        for tensor in measured:
            for note in _notes(tensor):
                click.echo(_fitted(f"{escape(tensor.name)}: {note}", width))
    left = len([one for one in differing if "values" in one.what and one.statistics is None])
    if found.with_statistics and left:
        click.echo(f"{count(left, 'changed tensor')} without statistics: no plain numbers")


def _counted(found: Diff, change: str) -> list[str]:
    number, nbytes = found.total(change)
    return [str(number), size(nbytes)]


def _what(one: TensorDifference) -> list[str]:
    """What differs, with both sides where they are short."""
    if one.before is None or one.after is None:
        entry = one.after or one.before
        assert entry is not None
        return [f"{entry.dtype} {_shape(entry)}"]
    said = []
    for field in one.what:
        if field == "shape":
            said.append(f"shape {_shape(one.before)} -> {_shape(one.after)}")
        elif field in ("dtype", "kind", "layout"):
            said.append(f"{field} {getattr(one.before, field)} -> {getattr(one.after, field)}")
        else:
            said.append(field.replace("_", " "))
    return said


def _shape(entry: Tensor) -> str:
    return "x".join(map(str, entry.shape)) or "scalar"


def _statistics_row(one: TensorDifference) -> list[str]:
    from ckpt.service.diff_picture import percent

    found = one.statistics
    assert found is not None
    return [
        *(f"{norm:.3g}" for norm in found.norms),
        _number(found.difference),
        _number(found.largest),
        "" if found.cosine is None else f"{found.cosine:.6f}",
        "" if found.share is None else percent(found.share),
        one.name,
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _notes(one: TensorDifference) -> list[str]:
    """What the numbers leave out."""
    found = one.statistics
    assert found is not None
    pairs = (("NaN", found.nans), ("infinite", found.infinities))
    return [f"{a} elements are {what} in A, {b} in B" for what, (a, b) in pairs if a or b]


def _show_bars(found: Diff, width: int | None) -> None:
    from ckpt.service.diff_picture import bars

    shown = bars(found)
    rows = [row for row in shown.rows if row.value != 0]
    room = None if width is None else width - _BAR - 18
    names = [_shortened(row.name, room) for row in rows]
    longest = max(map(cells_of, (*names, "LAYER")))
    block = _block()
    click.echo(f"\n{'LAYER'.ljust(longest)}  {shown.axis.upper()}")
    for name, row in zip(names, rows, strict=True):
        filled = math.ceil(_BAR * (row.value or 0.0) / shown.top)
        blanks = " " * (longest - cells_of(name))
        click.echo(f"{name}{blanks}  {(block * filled).ljust(_BAR)}  {row.text}")
    if len(rows) < len(shown.rows):
        click.echo(f"and {count(len(shown.rows) - len(rows), 'layer')} whose bytes are the same")


def _block() -> str:
    try:
        "█".encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return "#"
    return "█"


def _show_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str], width: int | None
) -> None:
    """A table whose last cells are shortened at their beginning to fit."""
    if width is not None:
        used = [
            max(cells_of(row[place]) for row in (head, *rows)) for place in range(len(head) - 1)
        ]
        room = width - sum(used) - 2 * len(used)
        rows = [[*row[:-1], _shortened(escape(row[-1]), room)] for row in rows]
    click.echo(f"\n{table(head, rows, right=right)}")


def _shortened(name: str, room: int | None) -> str:
    """The end of a name, which tells the most, in this room; never less than 16 characters."""
    if room is None or len(name) <= max(16, room):
        return name
    return "..." + name[3 - max(16, room) :].lstrip(".")


def _fitted(line: str, width: int | None) -> str:
    return line if width is None or len(line) <= width else f"{line[: width - 3]}..."


def _sections(found: Diff) -> list[tuple[str, list[str]]]:
    """Everything beside the tensors, in lines."""
    ties = [f"+ {place} is {name}" for place, name in found.ties_appeared]
    ties += [f"- {place} was {name}" for place, name in found.ties_vanished]
    return [
        ("TIES", ties),
        ("STRUCTURE", list(map(_line, found.structure))),
        ("VALUES", list(map(_line, found.values))),
        ("FACTS", list(map(_line, found.facts))),
    ]


def _line(one: Difference) -> str:
    path = one.path or "<root>"
    name = path if one.what in ("value", "step") else f"{path} {one.what}"
    sides = {"changed": f"{_text(one.before)} -> {_text(one.after)}"}
    sides |= {"added": _text(one.after), "removed": _text(one.before)}
    return f"{_SIGNS[one.change]} {name}: {sides[one.change]}"


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _as_json(found: Diff) -> dict[str, Any]:
    return {
        "before": version_json(found.before),
        "after": version_json(found.after),
        "identical": found.identical,
        "totals": _totals(found),
        "tensors": [_tensor_json(one) for one in found.tensors],
        "ties": {"appeared": found.ties_appeared, "vanished": found.ties_vanished},
        "structure": [asdict(one) for one in found.structure],
        "values": [asdict(one) for one in found.values],
        "facts": [asdict(one) for one in found.facts],
        "layers": [
            {
                "name": layer.name,
                "nbytes": layer.nbytes,
                "changed_bytes": layer.changed_bytes,
                "share": layer.share,
                "relative": layer.relative if found.with_statistics else None,
            }
            for layer in found.layers()
        ],
    }


def _totals(found: Diff) -> dict[str, Any]:
    from ckpt.service.diff import CHANGES

    totals = {change: found.total(change) for change in CHANGES}
    return {change: {"tensors": n, "nbytes": nbytes} for change, (n, nbytes) in totals.items()}


def _tensor_json(one: TensorDifference) -> dict[str, Any]:
    found = one.statistics
    return {
        "name": one.name,
        "change": one.change,
        "what": one.what,
        "before": _entry_json(one.before),
        "after": _entry_json(one.after),
        "nbytes": one.nbytes,
        "changed_bytes": one.changed_bytes,
        "statistics": found
        and {
            "norms": list(map(json_number, found.norms)),
            "difference": found.difference and json_number(found.difference),
            "largest": found.largest and json_number(found.largest),
            "cosine": found.cosine,
            "changed": found.changed,
            "elements": found.elements,
            "nans": found.nans,
            "infinities": found.infinities,
        },
    }


def _entry_json(entry: Tensor | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    return {
        "name": entry.name,
        "dtype": entry.dtype,
        "shape": entry.shape,
        "device": entry.device,
        "kind": entry.kind,
        "layout": entry.layout,
    }


COMMANDS = {"diff": diff}
