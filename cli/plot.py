"""A metric over steps, drawn in characters."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import click

from ckpt.cli.render import table
from ckpt.core.records import Curve, Point
from ckpt.service.chart import Axis, Chart, Line, lay_out

_LETTERS = "ABCDEFGH"
_COLOURS = ("blue", "yellow", "green", "magenta", "red", "cyan", "bright_blue", "bright_magenta")
# Of a cell's dots, by their place in it, the bits that Unicode gives them above U+2800.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_MOST_ROWS, _LEAST_ROWS, _LEAST_COLUMNS = 20, 5, 8
# So far apart lie the letters that tell one run's line from another's.
_EVERY = 16


@dataclass(frozen=True, slots=True)
class Screen:
    """What is drawn on: its size in characters, and whether it shows colours and all of Unicode."""

    width: int
    height: int
    coloured: bool = False
    unicode: bool = True

    @classmethod
    def of_output(cls) -> Screen:
        """The standard output; 80 by 24 where it is no terminal and ``COLUMNS`` does not say."""
        width, height = shutil.get_terminal_size()
        coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        try:
            "⣿●│└┴┤".encode(getattr(sys.stdout, "encoding", None) or "ascii")
        except UnicodeEncodeError:
            return cls(width, height, coloured, unicode=False)
        return cls(width, height, coloured)

    @property
    def best(self) -> str:
        return "●" if self.unicode else "O"


def draw(curve: Curve, screen: Screen) -> str:
    """The chart with its title, its numbers, and what it leaves out."""
    y_ticks = 5 if screen.height >= 20 else 3
    chart = lay_out(curve, 2 * screen.width, max(1, screen.width // 14), y_ticks)
    below = [*_numbers(chart, screen), *chart.notes]
    lines = [_fitted(chart.title, screen), ""]
    if chart.x is not None and chart.y is not None:
        rows = min(_MOST_ROWS, max(_LEAST_ROWS, screen.height - len(below) - 7))
        lines += [*_Canvas(chart, chart.x, chart.y, screen, rows).lines(), ""]
    return "\n".join([*lines, *(_fitted(line, screen) for line in below)])


def _numbers(chart: Chart, screen: Screen) -> Iterator[str]:
    """The lowest, the highest and the last value of each run."""
    several = len(chart.lines) > 1
    rows = []
    for letter, line in zip(_LETTERS, chart.lines, strict=False):
        cells = [f"{letter} {line.run}" if several else line.run, str(line.versions)]
        cells += [_valued(point) for point in (line.lowest, line.highest, line.last)]
        rows.append(cells)
    head = ["RUN", "VERSIONS", "MIN", "MAX", "LAST"]
    yield from table(head, rows, right=["VERSIONS"]).splitlines()
    for point, word in chart.marked:
        if word == "best":
            yield f"{screen.best} best: {_valued(point)}"


def _valued(point: Point | None) -> str:
    return "" if point is None else f"{point.value:.6g} @{point.number}"


def _fitted(line: str, screen: Screen) -> str:
    return line if len(line) <= screen.width else f"{line[: max(0, screen.width - 3)]}..."


@dataclass
class _Canvas:
    """A grid of cells, each with dots of a line, or a character, and the number of its line."""

    chart: Chart
    x: Axis
    y: Axis
    screen: Screen
    rows: int
    columns: int = 0
    dots: dict[tuple[int, int], int] = field(default_factory=dict)
    letters: dict[tuple[int, int], str] = field(default_factory=dict)
    owners: dict[tuple[int, int], int] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """The rows of the grid between their axes."""
        said = max(len(label) for _, label in self.y.ticks)
        self.columns = max(_LEAST_COLUMNS, self.screen.width - said - 2)
        for number, line in enumerate(self.chart.lines):
            self._draw(number, line)
        if len(self.chart.lines) > 1:
            for number, line in enumerate(self.chart.lines):
                self._name(number, line)
        for point, word in self.chart.marked:
            if word == "best":
                self.letters[self._cell(*self._place(point))] = self.screen.best
        upright, knot, corner, flat, tick = "│┤└─┬" if self.screen.unicode else "|++-+"
        labels = {self._row(value): label for value, label in self.y.ticks}
        for row in range(self.rows):
            edge = knot if row in labels else upright
            yield f"{labels.get(row, '').rjust(said)} {edge}{self._text(row)}".rstrip()
        places = {self._column(value): label for value, label in self.x.ticks}
        edge = "".join(tick if column in places else flat for column in range(self.columns))
        yield f"{'':{said}} {corner}{edge}"
        yield f"{'':{said}}  {self._below(places)}".rstrip()

    def _row(self, value: float) -> int:
        return round((1 - self.y.place(value)) * (4 * self.rows - 1)) // 4

    def _column(self, value: float) -> int:
        return round(self.x.place(value) * (2 * self.columns - 1)) // 2

    def _place(self, point: Point) -> tuple[int, int]:
        """In dots, from the left and from the top."""
        across = self.x.place(self.chart.across_of(point))
        down = 1 - self.y.place(point.value)
        return round(across * (2 * self.columns - 1)), round(down * (4 * self.rows - 1))

    @staticmethod
    def _cell(x: int, y: int) -> tuple[int, int]:
        return x // 2, y // 4

    def _draw(self, number: int, line: Line) -> None:
        for stroke in line.strokes:
            places = [self._place(point) for point in stroke]
            for (x, y), (right, down) in pairwise([places[0], *places]):
                parts = max(abs(right - x), abs(down - y), 1)
                for part in range(parts + 1):
                    dot = (
                        x + round((right - x) * part / parts),
                        y + round((down - y) * part / parts),
                    )
                    self._ink(*dot, number)
            if len(places) == 1 and self.screen.unicode:
                self.letters[self._cell(*places[0])] = "•"

    def _ink(self, x: int, y: int, number: int) -> None:
        cell = self._cell(x, y)
        self.dots[cell] = self.dots.get(cell, 0) | _DOTS[x % 2][y % 4]
        self.owners[cell] = number

    def _name(self, number: int, line: Line) -> None:
        """Put the letter of a run on its line, now and then and at its end."""
        mine: dict[int, tuple[int, int]] = {}
        for stroke in line.strokes:
            for point in stroke:
                cell = self._cell(*self._place(point))
                mine[cell[0]] = cell
        ends = [] if not mine else [max(mine)]
        for column in [*ends, *range(4 + 5 * number, self.columns, _EVERY)]:
            near = min(mine, key=lambda one: abs(one - column), default=None)
            if near is not None and abs(near - column) < _EVERY // 2:
                self.letters[mine[near]] = _LETTERS[number]
                self.owners[mine[near]] = number

    def _text(self, row: int) -> str:
        """The cells of a row; neighbours of one colour together."""
        cells = [(column, row) for column in range(self.columns)]
        several = len(self.chart.lines) > 1
        parts = []
        for owner, group in groupby(cells, key=lambda cell: self.owners.get(cell, -1)):
            said = "".join(map(self._character, group))
            if owner >= 0 and several and self.screen.coloured:
                said = click.style(said, fg=_COLOURS[owner])
            parts.append(said)
        return "".join(parts)

    def _character(self, cell: tuple[int, int]) -> str:
        if cell in self.letters:
            return self.letters[cell]
        if cell not in self.dots:
            return " "
        if self.screen.unicode:
            return chr(0x2800 + self.dots[cell])
        return _LETTERS[self.owners[cell]].lower() if len(self.chart.lines) > 1 else "*"

    def _below(self, places: dict[int, str]) -> str:
        """The labels of the steps, each under its tick where the one before leaves room, and the
        screen: a part of a number would be another one."""
        line = ""
        for column, label in places.items():
            start = min(max(0, column - len(label) // 2), max(0, self.columns - len(label)))
            if len(label) <= self.columns and (not line or start > len(line)):
                line = line.ljust(start) + label
        return line
