"""How much each layer changed, as bars: what they say, and a picture of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from xml.sax.saxutils import escape as as_xml

from ckpt.core.printable import escape
from ckpt.service.diff import Diff
from ckpt.service.pictures import document, text

# More bars than this are no picture; then layers are taken together by shorter prefixes.
_LIMIT = 40
_NAME_LIMIT = 44
# In pixels.
_LEFT, _WIDTH, _RIGHT, _TOP, _ROW = 330, 480, 110, 76, 22

_LIGHT = "  .bar { fill: #0969da }\n"
_DARK = "  .bar { fill: #4493f8 }\n"


@dataclass(frozen=True, slots=True)
class Bar:
    """One layer; ``value`` is None where it could not be measured."""

    name: str
    value: float | None
    text: str


@dataclass(frozen=True, slots=True)
class Bars:
    """What is shown of a comparison: of every layer the share of its bytes that differ, or with
    statistics its relative change. The scale ends at ``top``."""

    title: str
    axis: str
    rows: tuple[Bar, ...]
    top: float = 1.0
    in_percent: bool = False


def bars(diff: Diff) -> Bars:
    """The layers of a comparison, at most about 40."""
    pair = f"{diff.before.reference} and {diff.after.reference}"
    layers = diff.layers(_LIMIT)
    names = [escape(layer.name) or "<root>" for layer in layers]
    if not diff.with_statistics:
        rows = [
            Bar(name, layer.share, percent(layer.share))
            for name, layer in zip(names, layers, strict=True)
        ]
        return Bars(
            f"How much of {pair} differs",
            "share of the bytes that differ",
            tuple(rows),
            in_percent=True,
        )
    rows = [
        Bar(name, x, "not comparable" if x is None else f"{x:.2g}")
        for name, x in zip(names, (layer.relative for layer in layers), strict=True)
    ]
    top = max((row.value or 0.0 for row in rows), default=0.0)
    axis = "norm of the difference / norm before"
    return Bars(f"How far {pair} lie apart", axis, tuple(rows), top or 1.0)


def percent(share: float) -> str:
    """``12 %``, ``0.3 %``; never 0 or 100 for what is not."""
    value = 100 * share
    if 0 < value < 0.1:
        return "<0.1 %"
    if 99 < value < 100:
        return f"{math.floor(10 * value) / 10:.1f} %"
    return f"{value:.0f} %" if value >= 10 or value == 0 else f"{value:.1f} %"


def draw(shown: Bars) -> str:
    """The bars as an SVG document, in the colours of a light or a dark page."""
    width, bottom = _LEFT + _WIDTH + _RIGHT, _TOP + _ROW * len(shown.rows)
    height = bottom + 56
    shapes = [
        text(_LEFT - 12, _TOP - 14, "layer", "axis", "end"),
        text(_LEFT + _WIDTH / 2, bottom + 44, shown.axis, "axis", "middle"),
        *_scale(shown, bottom),
    ]
    for number, row in enumerate(shown.rows):
        shapes += _bar(row, _TOP + _ROW * number, shown.top)
    return document(shown.title, width, height, _LIGHT, _DARK, shapes)


def _scale(shown: Bars, bottom: int) -> Iterator[str]:
    """A line and a number at 0, and at every step up to the top."""
    rough = shown.top / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = max(n * power for n in (1, 2, 2.5, 5) if n * power <= rough)
    for number in range(int(shown.top / step + 1e-9) + 1):
        value = number * step
        x = _LEFT + _WIDTH * value / shown.top
        yield f'<line class="grid" x1="{x:.1f}" y1="{_TOP - 4}" x2="{x:.1f}" y2="{bottom + 4}"/>'
        said = f"{100 * value:.0f} %" if shown.in_percent else f"{value:.3g}"
        yield text(x, bottom + 22, said, "axis", "middle")


def _bar(row: Bar, y: int, top: float) -> Iterator[str]:
    length = max(_WIDTH * row.value / top, 1.0) if row.value else 0.0
    name = row.name if len(row.name) <= _NAME_LIMIT else f"…{row.name[1 - _NAME_LIMIT :]}"
    yield text(_LEFT - 12, y + 16, name, anchor="end")
    yield (
        f'<rect class="bar" x="{_LEFT}" y="{y + 4}" width="{length:.1f}" height="{_ROW - 8}">'
        f"<title>{as_xml(row.name)}: {as_xml(row.text)}</title></rect>"
    )
    yield text(_LEFT + length + 8, y + 16, row.text)
