"""The page of benchmarks: every table as it was measured last, rendered from ``benchmarks.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from benchmarks.plot import draw
from benchmarks.table import Measured, Target

Results = dict[str, Measured]

_HEAD = """\
# Benchmarks

<!-- Written by `make bench`; do not edit. -->

Contestants take turns in one run, after one round to warm up; medians count, of five rounds or more. The ratio comes first: how much faster ckpt is than the contestant of that row, or what the column says. Rows that begin with *ceiling* are
what the machine itself gives in the same run. Where states are large, everyone begins with free memory at hand, ceilings too: a host that took it back from its virtual machine makes whoever touches it first wait twenty times as long. Everything is a ratio within one run on one machine: seconds of different tables do not compare.
"""


def read_results(folder: Path) -> Results:
    """What was measured so far, by the name of its table."""
    file = folder / "benchmarks.json"
    return msgspec.json.decode(file.read_bytes(), type=Results) if file.exists() else {}


def write_results(folder: Path, results: Mapping[str, Measured]) -> None:
    """Keep what was measured, and write the page and its plots."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = msgspec.json.format(msgspec.json.encode(results), indent=1)
    (folder / "benchmarks.json").write_bytes(kept + b"\n")
    for name, measured in results.items():
        draw(measured.table, folder / "benchmarks" / f"{name}.svg")
    (folder / "benchmarks.md").write_text(render(results), encoding="utf-8")


def render(results: Mapping[str, Measured]) -> str:
    """The whole page."""
    parts = [_HEAD, _summary(results)]
    parts += [render_table(name, measured) for name, measured in results.items()]
    return "\n".join(parts)


def _summary(results: Mapping[str, Measured]) -> str:
    rows = [
        f"| [{measured.table.title}](#{_anchor(measured.table.title)}) | {target.what} |"
        f" {_figure(target.measured)} | {_bound(target)} | {_verdict(target)} |"
        for measured in results.values()
        for target in measured.table.targets
    ]
    targets = [target for one in results.values() for target in one.table.targets]
    held = sum(target.holds for target in targets)
    machines = "; ".join(dict.fromkeys(measured.machine for measured in results.values()))
    return (
        f"Machine: {machines}.\n\n## Targets\n\n{held} of {len(targets)} hold.\n\n"
        "| table | what | measured | target | |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def render_table(name: str, measured: Measured) -> str:
    """The section of one table."""
    table = measured.table
    lines = [f"## {table.title}", "", table.compared, ""]
    lines += [_row(table.columns), "|" + "---|" * len(table.columns)]
    lines += [_row(cells) for cells in table.rows]
    lines += ["", f"![{table.title}](benchmarks/{name}.svg)", ""]
    lines += [
        f"- {target.what}: {_figure(target.measured)} {target.unit} (target:"
        f" {_bound(target)}) {_verdict(target)}"
        for target in table.targets
    ]
    lines += [f"- Not measured: {peer}: {reason}" for peer, reason in table.absent.items()]
    if table.targets or table.absent:
        lines.append("")
    if table.remark:
        lines += [table.remark, ""]
    versions = ", ".join(f"{package} {number}" for package, number in measured.versions.items())
    lines += [f"Measured {measured.day} in {measured.seconds:.0f} s; {versions}.", ""]
    return "\n".join(lines)


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _figure(number: float) -> str:
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


def _bound(target: Target) -> str:
    return f"at {'most' if target.at_most else 'least'} {_figure(target.bound)}"


def _verdict(target: Target) -> str:
    return "holds" if target.holds else "**does not hold**"


def _anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")
