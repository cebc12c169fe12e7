"""What a measurement gives: the rows of a table, the bars of its plot, the targets, as records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from benchmarks.measure import Turns


@dataclass(frozen=True, slots=True)
class Target:
    """A promise: what was measured, beside the bound that it is to reach."""

    what: str
    measured: float
    bound: float
    at_most: bool = False
    unit: str = "times"

    @property
    def holds(self) -> bool:
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a plot; ``target`` is drawn across it as a line."""

    label: str
    ratio: float
    target: float | None = None
    at_most: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """One comparison: its first column names the contestant, its second is the ratio."""

    title: str
    compared: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    axis: str
    bars: tuple[Bar, ...]
    targets: tuple[Target, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Measured:
    """A table with the day, the machine, the versions and the seconds that it took."""

    table: Table
    day: str
    machine: str
    versions: Mapping[str, str]
    seconds: float


Measure = Callable[[Path], Table]


def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    """The installed version of each package."""
    return {name: version(name) for name in names}


def speed_rows(
    turns: Turns, ours: str, nbytes: int, *lead: str, ceilings: Mapping[str, float] | None = None
) -> list[tuple[str, ...]]:
    """A row for each contestant: name, ckpt's speed over this one's, seconds, GB/s; cells of
    ``lead`` come after the name. ``ceilings`` are seconds that were measured elsewhere."""
    medians = {name: timing.median for name, timing in turns.timings.items()}
    medians |= ceilings or {}
    return [
        (
            name,
            *lead,
            f"{seconds / turns[ours]:.2f}",
            f"{seconds:.3f}",
            f"{nbytes / seconds / 1e9:.2f}",
        )
        for name, seconds in medians.items()
    ]


def speed_bars(
    turns: Turns, ours: str, targets: Mapping[str, float], label: str = "{}"
) -> list[Bar]:
    """A bar for each other contestant: ckpt's speed over this one's; ``targets`` by name."""
    return [
        Bar(label.format(name), turns[name] / turns[ours], targets.get(name))
        for name in turns.timings
        if name != ours
    ]
