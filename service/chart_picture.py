"""A metric over steps as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from xml.sax.saxutils import escape as as_xml

from ckpt.core.printable import escape
from ckpt.core.records import Curve, Point
from ckpt.service.chart import Axis, Chart, Line, lay_out
from ckpt.service.pictures import document, text, write_picture

# In pixels.
_WIDTH, _LEFT, _RIGHT, _TOP, _HEIGHT = 920, 84, 40, 92, 320
_ACROSS = _WIDTH - _LEFT - _RIGHT
_ROW = 20
_LETTER = 6.4
# Of a line with more points, these are not drawn one by one.
_DOTS = 100
_NAME = 28
_ALIASES = 24
_BEST, _NAMED = 5, 4
_CELL = 4

_COLOURS = (
    ("#0969da", "#4493f8"),
    ("#bc4c00", "#f0883e"),
    ("#1a7f37", "#3fb950"),
    ("#8250df", "#ab7df8"),
    ("#cf222e", "#f85149"),
    ("#1b7c83", "#39c5cf"),
    ("#bf3989", "#db61a2"),
    ("#9a6700", "#d29922"),
)


def write_chart(curve: Curve, destination: Path) -> None:
    """Write a metric as an SVG file, in place of one that is there."""
    write_picture(draw(curve), destination)


def draw(curve: Curve) -> str:
    """A metric as an SVG document, in the colours of a light or a dark page."""
    chart = lay_out(curve, columns=_ACROSS // 2, x_ticks=8, y_ticks=5)
    bottom = _TOP + _HEIGHT
    shapes = [*_legend(chart)]
    if chart.x is not None and chart.y is not None:
        shapes += _axes(chart.x, chart.y, bottom)
        shapes.append(text(_LEFT + _ACROSS / 2, bottom + 46, chart.across, "axis", "middle"))
        canvas = _Canvas(chart, chart.x, chart.y)
        for place, line in enumerate(chart.lines):
            shapes += canvas.line(place, line)
        shapes += canvas.marks()
    else:
        shapes.append(text(_WIDTH / 2, _TOP + _HEIGHT / 2, "nothing to draw", "axis", "middle"))
    for row, note in enumerate(chart.notes):
        shapes.append(text(_LEFT, bottom + 70 + _ROW * row, _shortened(note, 110), "small axis"))
    height = bottom + 62 + _ROW * len(chart.notes)
    light, dark = (_rules(shade) for shade in (0, 1))
    return document(_shortened(chart.title, 96), _WIDTH, height, _FIXED + light, dark, shapes)


_FIXED = """  .small { font-size: 11px }
  .line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
  .mark { stroke-width: 2.5 }
"""


def _rules(shade: int) -> str:
    ground = ("#ffffff", "#0d1117")[shade]
    rules = [
        f"  .mark {{ fill: {ground} }}",
        f"  .label {{ stroke: {ground}; stroke-width: 3; paint-order: stroke }}",
    ]
    for place, colours in enumerate(_COLOURS):
        rules.append(f"  .line{place} {{ stroke: {colours[shade]} }}")
        rules.append(f"  .dot{place} {{ fill: {colours[shade]} }}")
    return "\n".join(rules) + "\n"


def _legend(chart: Chart) -> Iterator[str]:
    """Of one run its numbers, of several their names."""
    if len(chart.lines) == 1:
        (line,) = chart.lines
        yield text(20, 56, _summary(line), "axis")
        return
    x, y = 20.0, 56
    for place, line in enumerate(chart.lines):
        name = _shortened(line.run, _NAME)
        length = 26 + 7.5 * len(name) + 22
        if x + length > _WIDTH:
            x, y = 20.0, y + 18
        yield f'<path class="line line{place}" d="M{x:.1f} {y - 4}h18"/>'
        yield text(x + 26, y, name, "run")
        x += length


def _summary(line: Line) -> str:
    said = [f"{line.versions} version{'' if line.versions == 1 else 's'}"]
    for word, point in (("lowest", line.lowest), ("highest", line.highest), ("last", line.last)):
        if point is not None:
            said.append(f"{word} {point.value:.4g} at @{point.number}")
    return " · ".join(said)


def _axes(x: Axis, y: Axis, bottom: int) -> Iterator[str]:
    for value, label in y.ticks:
        down = bottom - _HEIGHT * y.place(value)
        yield (
            f'<line class="grid" x1="{_LEFT}" y1="{down:.1f}" x2="{_LEFT + _ACROSS}" y2="{down:.1f}"/>'
        )
        yield text(_LEFT - 12, down + 4, label, "axis", "end")
    for value, label in x.ticks:
        right = _LEFT + _ACROSS * x.place(value)
        yield (
            f'<line class="grid" x1="{right:.1f}" y1="{bottom}" x2="{right:.1f}" y2="{bottom + 6}"/>'
        )
        yield text(right, bottom + 24, label, "axis", "middle")


_Box = tuple[float, float, float, float]


@dataclass
class _Canvas:
    """Where the points lie, and where there are lines and text already."""

    chart: Chart
    x: Axis
    y: Axis
    taken: list[_Box] = field(default_factory=list)
    inked: set[tuple[int, int]] = field(default_factory=set)

    def place(self, point: Point) -> tuple[float, float]:
        across = self.x.place(self.chart.across_of(point))
        return _LEFT + _ACROSS * across, _TOP + _HEIGHT * (1 - self.y.place(point.value))

    def line(self, place: int, line: Line) -> Iterator[str]:
        """The strokes of a run, and its points where these are few."""
        path = []
        for stroke in line.strokes:
            places = [self.place(point) for point in stroke]
            for pair in pairwise(places):
                self.inked.update(_cells(*pair))
            corners = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            path.append(f"M{corners}{'h0' if len(stroke) == 1 else ''}")
        if path:
            yield f'<path class="line line{place}" d="{"".join(path)}"/>'
        points = [point for stroke in line.strokes for point in stroke]
        if len(points) <= _DOTS:
            for point in points:
                yield self._dot(f"dot{place}", point, 3)

    def marks(self) -> Iterator[str]:
        """The best version, and those with aliases whose label has room."""
        runs = {line.run: place for place, line in enumerate(self.chart.lines)}
        labels = [(point, f"{word} {point.value:.4g}", _BEST) for point, word in self.chart.marked]
        for point, names in reversed(self.chart.named[-_ALIASES:]):
            labels.append((point, _shortened(names, _NAME), _NAMED))
        for point, said, radius in labels:
            label = self._label(point, said, may_cross=radius == _BEST)
            if label is not None:
                yield self._dot(f"mark line{runs[escape(point.run)]}", point, radius)
                yield label

    def _dot(self, name: str, point: Point, radius: int) -> str:
        x, y = self.place(point)
        told = f"{self.chart.across} {self.chart.across_of(point):.0f}: {point.value:.6g}"
        if self.chart.across == "step":
            told = f"@{point.number}, {told}"
        return (
            f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
            f"<title>{as_xml(told)}</title></circle>"
        )

    def _label(self, point: Point, said: str, may_cross: bool) -> str | None:
        """Small text beside a point, best where no line is; None where there is no room."""
        x, y = self.place(point)
        half = _LETTER * len(said) / 2
        places = [(x + shift * (half + 10), y + 4 + down) for shift, down in _AROUND]
        boxes = [(middle - half, low - 10, middle + half, low + 3) for middle, low in places]
        free = [box for box in boxes if _is_inside(box) and not self._is_taken(box)]
        clear = [box for box in free if self.inked.isdisjoint(_cells_of(box))]
        if not (clear or (free and may_cross)):
            return None
        box = (clear or free)[0]
        self.taken.append(box)
        return text((box[0] + box[2]) / 2, box[3] - 3, said, "small axis label", "middle")

    def _is_taken(self, box: _Box) -> bool:
        return any(
            box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
            for other in self.taken
        )


# Where a label may lie: in halves of its own width to the right, and pixels down.
_AROUND = (
    *((0, -15), (0, 15), (1, -9), (1, 9), (-1, -9), (-1, 9), (1, 0), (-1, 0)),
    *((0, -29), (0, 29), (-1, -23), (-1, 23), (1, -23), (1, 23)),
)


def _is_inside(box: _Box) -> bool:
    across = box[0] >= _LEFT and box[2] <= _LEFT + _ACROSS
    return across and box[1] >= _TOP - 16 and box[3] <= _TOP + _HEIGHT


def _cells(start: tuple[float, float], end: tuple[float, float]) -> Iterator[tuple[int, int]]:
    """The cells of a coarse grid that a straight line passes."""
    (x, y), (right, down) = start, end
    parts = int(max(abs(right - x), abs(down - y)) / _CELL) + 1
    for part in range(parts + 1):
        share = part / parts
        yield int((x + (right - x) * share) / _CELL), int((y + (down - y) * share) / _CELL)


def _cells_of(box: _Box) -> Iterator[tuple[int, int]]:
    left, top, right, bottom = (int(edge / _CELL) for edge in box)
    yield from product(range(left, right + 1), range(top, bottom + 1))


def _shortened(said: str, limit: int) -> str:
    return said if len(said) <= limit else f"{said[: limit - 1]}…"
