"""The geometry of a metric over steps: axes, lines and what is marked, for any way to draw it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ckpt.core.printable import escape, few
from ckpt.core.records import Curve, Point

# More lines than these are no picture; the runs that saved last are drawn.
_LINES = 8
# Beyond this the length of an axis would be no finite number.
_LARGEST = 4e307
# What lies closer together, beside its size, is drawn as flat: labels would need more digits.
_FLAT = 1e-9


@dataclass(frozen=True, slots=True)
class Axis:
    """From ``low`` to ``high``, with labels at some values."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def place(self, value: float) -> float:
        """Where a value lies, from 0 at the low end to 1 at the high one."""
        inside = min(max(value, self.low), self.high)
        return (inside - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True)
class Line:
    """One run. ``strokes`` are its points to connect, thinned where they are dense; a new one
    begins where the step goes back, and after a value that is not finite. ``lowest`` and
    ``highest`` are None where no value is finite, ``last`` is as it is."""

    run: str
    versions: int
    strokes: tuple[tuple[Point, ...], ...]
    lowest: Point | None
    highest: Point | None
    last: Point


@dataclass(frozen=True, slots=True)
class Chart:
    """A metric over the steps of its versions, or over their numbers where none has a step.

    Attributes:
        x, y: None where there is nothing to draw.
        marked: the best version, where a saved rule of the model says which way is better, else
            the lowest and the highest; each with that word.
        named: versions with aliases, and these.
        notes: what is not drawn, in words.
    """

    title: str
    across: str
    x: Axis | None
    y: Axis | None
    lines: tuple[Line, ...]
    marked: tuple[tuple[Point, str], ...]
    named: tuple[tuple[Point, str], ...]
    notes: tuple[str, ...]

    def across_of(self, point: Point) -> float:
        """The value of a point on the x axis."""
        return _across(point, self.across)


def lay_out(curve: Curve, columns: int, x_ticks: int, y_ticks: int) -> Chart:
    """The chart of a metric, for a drawing of so many columns; about so many ticks."""
    across = "version" if all(point.step is None for point in curve.points) else "step"
    by_run: dict[str, list[Point]] = {}
    for point in curve.points:
        by_run.setdefault(point.run, []).append(point)
    newest = sorted(by_run, key=lambda run: -by_run[run][-1].number)[:_LINES]
    chosen = {run: points for run, points in by_run.items() if run in newest}
    drawn = [point for points in chosen.values() for point in points if _is_drawn(point, across)]
    x = y = None
    if drawn:
        x = _axis_of_steps([_across(point, across) for point in drawn], x_ticks)
        y = _axis_of_values([point.value for point in drawn], y_ticks)
    return Chart(
        title=f"{curve.model}: {curve.metric} over {across}s",
        across=across,
        x=x,
        y=y,
        lines=tuple(_line(run, points, across, x, columns) for run, points in chosen.items()),
        marked=tuple(_marked(curve, drawn)),
        named=tuple(
            (point, escape(" ".join(curve.aliases[point.number])))
            for point in drawn
            if point.number in curve.aliases
        ),
        notes=tuple(_notes(curve, across, [run for run in by_run if run not in chosen])),
    )


def _across(point: Point, across: str) -> float:
    return float(point.number if across == "version" or point.step is None else point.step)


def _is_drawn(point: Point, across: str) -> bool:
    return math.isfinite(point.value) and (across == "version" or point.step is not None)


def _line(run: str, points: Sequence[Point], across: str, x: Axis | None, columns: int) -> Line:
    finite = [point for point in points if math.isfinite(point.value)]
    return Line(
        run=escape(run),
        versions=len(points),
        strokes=() if x is None else _strokes(points, across, x, columns),
        lowest=min(finite, key=lambda point: point.value, default=None),
        highest=max(finite, key=lambda point: point.value, default=None),
        last=points[-1],
    )


def _strokes(
    points: Sequence[Point], across: str, x: Axis, columns: int
) -> tuple[tuple[Point, ...], ...]:
    """The points to connect: in the order of the saves, or, where that goes to and fro too often
    to be drawn, in the order of their steps."""

    def column(point: Point) -> int:
        return int(x.place(_across(point, across)) * columns)

    thinned = [tuple(_thinned(one, column)) for one in _separate(points, across)]
    if sum(map(len, thinned)) <= 8 * (columns + 1):
        return tuple(thinned)
    drawn = [point for point in points if _is_drawn(point, across)]
    drawn.sort(key=lambda point: _across(point, across))
    return (tuple(_thinned(drawn, column)),)


def _separate(points: Iterable[Point], across: str) -> Iterator[list[Point]]:
    """The drawn points of a run, apart where the step goes back or one between is not drawn."""
    stroke: list[Point] = []
    for point in points:
        is_drawn = _is_drawn(point, across)
        goes_on = is_drawn and (not stroke or _across(point, across) >= _across(stroke[-1], across))
        if stroke and not goes_on:
            yield stroke
            stroke = []
        if is_drawn:
            stroke.append(point)
    if stroke:
        yield stroke


def _thinned(points: Iterable[Point], column: Callable[[Point], int]) -> Iterator[Point]:
    """Of the points in a column the first, the lowest, the highest and the last: more would draw
    the same."""
    for _, group in groupby(points, key=column):
        some = list(group)
        if len(some) <= 4:
            yield from some
            continue
        values = [point.value for point in some]
        low, high = values.index(min(values)), values.index(max(values))
        for place in sorted({0, low, high, len(some) - 1}):
            yield some[place]


def _marked(curve: Curve, drawn: Sequence[Point]) -> Iterator[tuple[Point, str]]:
    """Of equal ones the newest, as the rule has it."""
    if not drawn:
        return
    lowest = min(drawn, key=lambda point: (point.value, -point.number))
    highest = max(drawn, key=lambda point: (point.value, point.number))
    for rule in curve.rules:
        word, *said = rule.split(":")
        if word == "best" and said[0] == curve.metric:
            yield highest if said[1] == "max" else lowest, "best"
            return
    yield lowest, "lowest"
    if lowest.value < highest.value:
        yield highest, "highest"


def _notes(curve: Curve, across: str, left_out: Sequence[str]) -> Iterator[str]:
    strange = [point for point in curve.points if not math.isfinite(point.value)]
    if strange:
        shown = few([f"{point.value} at @{point.number}" for point in strange])
        yield f"{_count(len(strange), 'value is', 'values are')} not finite: {shown}"
    stepless = [point for point in curve.points if point.step is None]
    if stepless and across == "step":
        shown = few([f"@{point.number}" for point in stepless])
        yield f"{_count(len(stepless), 'version has', 'versions have')} no step: {shown}"
    if left_out:
        shown = few([escape(run) for run in left_out])
        yield f"{_count(len(left_out), 'older run is', 'older runs are')} not drawn: {shown}"


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def _axis_of_steps(values: Sequence[float], ticks: int) -> Axis:
    """From the first to the last; labels at whole numbers."""
    low, high = min(values), max(values)
    if high - low < max(1.0, _FLAT * high):
        low, high = low - max(0.5, _FLAT * high), high + max(0.5, _FLAT * high)
    step = max(1.0, _step((high - low) / ticks))
    if step == 2.5:
        step = 5.0
    first = math.ceil(low / step)
    places = [step * number for number in range(first, math.floor(high / step) + 1)]
    return Axis(low, high, _labelled(places, step))


def _axis_of_values(values: Sequence[float], ticks: int) -> Axis:
    """From the label below the lowest to the one above the highest."""
    low, high = (min(max(end, -_LARGEST), _LARGEST) for end in (min(values), max(values)))
    size = max(abs(low), abs(high))
    if high - low <= max(_FLAT * size, 1e-300):
        room = 0.1 * size if size > 1e-290 else 1.0
        low, high = low - room, high + room
    step = _step((high - low) / ticks)
    first, last = math.floor(low / step + _FLAT), math.ceil(high / step - _FLAT)
    places = [step * number for number in range(first, last + 1)]
    return Axis(places[0], places[-1], _labelled(places, step))


def _step(least: float) -> float:
    """The next of 1, 2, 2.5, 5, 10 times a power of ten."""
    power = float(f"1e{math.floor(math.log10(least))}")
    return next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= least * (1 - _FLAT))


def _labelled(places: Sequence[float], step: float) -> tuple[tuple[float, str], ...]:
    largest = max(map(abs, places), default=0.0)
    return tuple((place, _label(place, step, largest)) for place in places)


def _label(value: float, step: float, largest: float) -> str:
    """``0.25``, ``1500``, ``20k``, ``1.5M``, ``2e-07``: as many digits as tell it from the next."""
    if value == 0:
        return "0"
    power = math.floor(math.log10(step) + _FLAT)
    digits = -power + (0 if step / 10.0**power < 2.4 or step / 10.0**power > 2.6 else 1)
    if 1e4 <= largest < 1e15 and step / largest >= 1e-3:
        for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= unit:
                return f"{value / unit:.7g}{letter}"
    if 1e-4 <= largest < 1e15:
        return f"{value:.{max(digits, 0)}f}"
    return f"{value:.{digits + math.floor(math.log10(largest)) + 1}g}"
