"""The plot of a table: a bar for each ratio, a line where its target is."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.table import Bar, Table

_HOLDS, _FAILS, _PLAIN, _LINE = "#4c8c6b", "#c8743c", "#a9b4bf", "#22303c"
_WIDE = 12  # from this spread on, the axis is logarithmic


def draw(table: Table, path: Path) -> None:
    """Write the plot as SVG; equal tables give equal files."""
    settings = {"svg.hashsalt": table.title, "svg.fonttype": "none", "font.size": 9}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(7.2, 0.9 + 0.27 * len(table.bars)), layout="constrained")
        axes = figure.subplots()
        _draw_bars(axes, table.bars)
        axes.set_xlabel(table.axis)
        axes.set_title(table.title, loc="left", fontsize=10)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def _draw_bars(axes: Axes, bars: tuple[Bar, ...]) -> None:
    places = list(range(len(bars)))[::-1]  # the first one on top
    axes.barh(places, [bar.ratio for bar in bars], height=0.68, color=[_color(one) for one in bars])
    for place, bar in zip(places, bars, strict=True):
        axes.annotate(
            f"{bar.ratio:.3g}",
            (bar.ratio, place),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
        if bar.target is not None:
            axes.plot([bar.target] * 2, [place - 0.5, place + 0.5], color=_LINE, linewidth=1.6)
    axes.set_yticks(places, [bar.label for bar in bars])
    axes.tick_params(axis="y", length=0)
    known = [bar.ratio for bar in bars] + [bar.target for bar in bars if bar.target is not None]
    smallest, largest = min(known), max(known)
    if smallest > 0 and largest / smallest > _WIDE:
        axes.set_xscale("log")
        axes.set_xlim(smallest / 2, largest * 2)
        axes.xaxis.set_major_locator(LogLocator(numticks=8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, largest * 1.12)
    axes.grid(axis="x", color="#e3e7ea", linewidth=0.6)
    axes.set_axisbelow(True)


def _color(bar: Bar) -> str:
    if bar.target is None:
        return _PLAIN
    holds = bar.ratio <= bar.target if bar.at_most else bar.ratio >= bar.target
    return _HOLDS if holds else _FAILS
