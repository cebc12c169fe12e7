"""A metric over steps: where its points lie, and how that is drawn in characters and as SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ckpt.cli.plot import Screen
from ckpt.cli.plot import draw as draw_text
from ckpt.core.records import Curve, Point
from ckpt.service.chart import lay_out
from ckpt.service.chart_picture import draw, write_chart

SVG = "{http://www.w3.org/2000/svg}"


def curve(
    values: Sequence[float],
    steps: Sequence[int | None] | None = None,
    runs: str | None = None,
    rules: tuple[str, ...] = (),
    aliases: Mapping[int, tuple[str, ...]] | None = None,
) -> Curve:
    """The values of versions 1, 2, 3 ... at these steps, by default 0, 10, 20 ..."""
    chosen = range(0, 10 * len(values), 10) if steps is None else steps
    points = [
        Point(number + 1, step, "main" if runs is None else runs[number], value)
        for number, (step, value) in enumerate(zip(chosen, values, strict=True))
    ]
    return Curve("gpt", "loss", tuple(points), aliases or {}, rules)


def _curve_of(drawn: list[tuple[float, int | None, str]]) -> Curve:
    values, steps, runs = zip(*drawn, strict=True)
    return curve(values, steps, "".join(runs))


any_curve = st.lists(
    st.tuples(
        st.floats() | st.sampled_from([0.0, 5e-324, 1e308, -1.7e308]),
        st.none() | st.integers(0, 2**63 - 1) | st.integers(0, 30),
        st.sampled_from("abcdefghijk"),
    ),
    min_size=1,
    max_size=40,
).map(_curve_of)


@given(any_curve)
def test_whatever_the_values_every_point_lies_between_axes_with_numbers(given: Curve) -> None:
    chart = lay_out(given, 160, 8, 5)
    points = [point for line in chart.lines for stroke in line.strokes for point in stroke]
    if not points:
        assert chart.x is None
        return
    assert chart.x is not None
    assert chart.y is not None
    for axis in (chart.x, chart.y):
        assert math.isfinite(axis.high - axis.low)
        assert axis.low < axis.high
        assert len({label for _, label in axis.ticks}) == len(axis.ticks) <= 20
        assert all(axis.low <= value <= axis.high for value, _ in axis.ticks)
    assert len(chart.y.ticks) >= 2
    room = 1e-8 * (chart.y.high - chart.y.low)
    assert chart.y.low - room <= max(min(point.value for point in points), -4e307)
    assert chart.y.high + room >= min(max(point.value for point in points), 4e307)


@example(
    Curve("gpt", "loss", (Point(1, 10_190_506_964_810, "a", -9.090909091818184e153),), {}, ()),
    *(1, 1, False),
)
@given(any_curve, st.integers(1, 200), st.integers(1, 60), st.booleans())
def test_no_line_is_wider_than_the_terminal(
    given: Curve, width: int, height: int, unicode: bool
) -> None:
    shown = draw_text(given, Screen(max(24, width), height, unicode=unicode))
    assert max(map(len, shown.splitlines())) <= max(24, width)
    assert "\x1b" not in shown
    if not unicode:
        assert shown.isascii()


@given(any_curve)
def test_a_picture_is_well_formed_whatever_the_values(given: Curve) -> None:
    root = ElementTree.fromstring(draw(given))
    numbers = " ".join(one.get("d", "") for one in root.iter(f"{SVG}path"))
    assert "nan" not in numbers
    assert "inf" not in numbers


def test_a_curve_is_drawn_with_title_axes_and_numbers() -> None:
    assert (
        draw_text(curve([4, 3, 2, 1, 0, 0, 0]), Screen(40, 16))
        == """\
gpt: loss over steps

4 ┤⠑⠢⢄
  │   ⠉⠒⠤⡀
  │      ⠈⠑⠢⣀
2 ┤          ⠉⠒⠤⡀
  │             ⠈⠉⠢⠤⡀
  │                 ⠈⠑⠢⢄⡀
0 ┤                     ⠈⠑⠢⢄⣀⣀⣀⣀⣀⣀⣀⣀⣀⣀⣀⣀
  └┬─────────────────────────────┬──────
   0                            50

RUN   VERSIONS  MIN   MAX   LAST
main         7  0 @5  4 @1  0 @7"""
    )


def test_without_unicode_it_is_drawn_in_ascii() -> None:
    shown = draw_text(curve([0, 1]), Screen(24, 12, unicode=False))
    assert shown.splitlines()[2:9] == [
        "1.0 +               ****",
        "    |           *****",
        "0.5 +       *****",
        "    |   *****",
        "  0 +****",
        "    ++-----------------+",
        "     0                10",
    ]


def test_dense_points_are_thinned_to_what_would_look_the_same() -> None:
    values = [math.sin(number / 50) for number in range(100_000)]
    values[41_234], values[70_001] = 7.0, -7.0
    chart = lay_out(curve(values), 160, 8, 5)
    (line,) = chart.lines
    (stroke,) = line.strokes
    assert len(stroke) <= 4 * 161
    assert {values[41_234], values[70_001]} <= {point.value for point in stroke}
    assert (stroke[0].number, stroke[-1].number) == (1, 100_000)
    assert line.versions == 100_000


def test_steps_that_go_to_and_fro_all_the_time_are_thinned_too() -> None:
    values = [float(number % 7) for number in range(20_000)]
    steps = [number // 2 + (9_000 if number % 2 else 0) for number in range(20_000)]
    (line,) = lay_out(curve(values, steps), 160, 8, 5).lines
    assert sum(map(len, line.strokes)) <= 4 * 161


def test_a_line_ends_where_the_step_goes_back_or_a_value_is_not_finite() -> None:
    chart = lay_out(curve([5, 4, 3, math.nan, 2, 1], [0, 10, 5, 7, 8, 8]), 160, 8, 5)
    strokes = [[point.number for point in stroke] for stroke in chart.lines[0].strokes]
    assert strokes == [[1, 2], [3], [5, 6]]


def test_what_is_not_finite_is_told_and_not_drawn() -> None:
    given = curve([1, math.nan, 2, math.inf, -math.inf])
    chart = lay_out(given, 160, 8, 5)
    assert chart.notes == ("3 values are not finite: nan at @2, inf at @4, -inf at @5",)
    assert chart.y is not None
    assert (chart.y.low, chart.y.high) == (1, 2)
    for shown in (draw_text(given, Screen(80, 24)), draw(given)):
        assert chart.notes[0] in shown
    assert "-inf @5" in draw_text(given, Screen(80, 24))


def test_where_nothing_is_finite_that_is_all_there_is_to_tell() -> None:
    given = curve([math.nan])
    assert "1 value is not finite: nan at @1" in draw_text(given, Screen(80, 24))
    assert "nothing to draw" in draw(given)


def test_versions_without_a_step_are_told_and_without_any_the_numbers_count() -> None:
    assert lay_out(curve([1, 2, 3], [0, None, 5]), 160, 8, 5).notes == (
        "1 version has no step: @2",
    )
    chart = lay_out(curve([1, 2, 3], [None, None, None]), 160, 8, 5)
    assert (chart.title, chart.notes) == ("gpt: loss over versions", ())
    assert chart.x is not None
    assert [label for _, label in chart.x.ticks] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.25, 2.3], "0 0.5 1.0 1.5 2.0 2.5"),
        ([0.5], "0.44 0.46 0.48 0.50 0.52 0.54 0.56"),
        ([0.0], "-1.0 -0.5 0 0.5 1.0"),
        ([1e-7, 5e-7], "1e-07 2e-07 3e-07 4e-07 5e-07"),
        ([12_000, 61_000], "10k 20k 30k 40k 50k 60k 70k"),
        ([0, 1.2e6], "0 250k 500k 750k 1M 1.25M"),
        ([1e20, 2e20], "1e+20 1.2e+20 1.4e+20 1.6e+20 1.8e+20 2e+20"),
        ([12_345.0, 12_349.0], "12345 12346 12347 12348 12349"),
    ],
)
def test_an_axis_has_round_numbers(values: list[float], labels: str) -> None:
    chart = lay_out(curve(values), 160, 8, 5)
    assert chart.y is not None
    assert " ".join(label for _, label in chart.y.ticks) == labels


def test_each_run_has_a_letter_and_numbers_and_in_a_terminal_a_colour() -> None:
    given = curve([1, 2, 3, 4, 5, 6], [0, 0, 50, 50, 90, 90], "ababab")
    plain = draw_text(given, Screen(80, 24))
    assert re.search(r"^A a +3  1 @1 +5 @5  5 @5$", plain, re.MULTILINE)
    assert re.search(r"^B b +3  2 @2 +6 @6  6 @6$", plain, re.MULTILINE)
    drawn = "".join(line for line in plain.splitlines() if "│" in line or "┤" in line)
    assert drawn.count("A") >= 2
    assert drawn.count("B") >= 2
    coloured = draw_text(given, Screen(80, 24, coloured=True))
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain
    assert len(set(re.findall(r"\x1b\[(3\d)m", coloured))) == 2


def test_of_very_many_runs_the_older_ones_are_told() -> None:
    runs = "abcdefghijk"
    chart = lay_out(curve([float(n) for n in range(11)], runs=runs), 160, 8, 5)
    assert [line.run for line in chart.lines] == list("defghijk")
    assert chart.notes == ("3 older runs are not drawn: a, b, c",)


@pytest.mark.parametrize(
    ("rules", "marked"),
    [
        (("last:3", "best:loss:max:2"), [("best", 3)]),
        (("best:loss:min:1",), [("best", 4)]),
        (("best:acc:max:1",), [("lowest", 4), ("highest", 3)]),
    ],
)
def test_the_best_version_is_marked_as_the_saved_rule_has_it(
    rules: tuple[str, ...], marked: list[tuple[str, int]]
) -> None:
    given = curve([3, 1, 3, 1], rules=rules)
    chart = lay_out(given, 160, 8, 5)
    assert [(word, point.number) for point, word in chart.marked] == marked
    shown = draw_text(given, Screen(80, 24))
    assert ("● best: " in shown) == (marked[0][0] == "best")


def test_a_picture_has_a_point_for_each_version_and_their_aliases() -> None:
    given = curve([3, 2, math.nan, 1], rules=("best:loss:min:1",), aliases={2: ("early", "kept")})
    picture = draw(given)
    root = ElementTree.fromstring(picture)
    assert root.tag == f"{SVG}svg"
    circles = [one.get("class") for one in root.iter(f"{SVG}circle")]
    assert circles.count("dot0") == 3
    assert circles.count("mark line0") == 2
    texts = {one.text for one in root.iter(f"{SVG}text")}
    assert {"gpt: loss over steps", "step", "early kept", "best 1"} <= texts
    assert "prefers-color-scheme: dark" in picture
    titles = {one.text for one in root.iter(f"{SVG}title")}
    assert {"gpt: loss over steps", "@4, step 30: 1"} <= titles


def test_labels_in_a_picture_never_cover_each_other() -> None:
    names = {number: (f"checkpoint-{number}",) for number in range(1, 41)}
    root = ElementTree.fromstring(draw(curve([1.0 + n % 3 / 9 for n in range(40)], aliases=names)))
    boxes = [
        (float(one.get("x", "")), float(one.get("y", "")), 3.2 * len(one.text or ""))
        for one in root.iter(f"{SVG}text")
        if "label" in one.get("class", "")
    ]
    assert len(boxes) >= 5
    for place, (x, y, half) in enumerate(boxes):
        for other_x, other_y, other in boxes[:place]:
            assert abs(y - other_y) >= 13 or abs(x - other_x) >= half + other - 0.2


def test_a_picture_of_very_many_versions_stays_small() -> None:
    values = [math.sin(number) for number in range(50_000)]
    names = {number: (f"a{number}",) for number in range(1, 50_000, 50)}
    assert len(draw(curve(values, aliases=names))) < 60_000


def test_several_runs_have_a_legend_in_the_picture() -> None:
    root = ElementTree.fromstring(draw(curve([1, 2, 3, 4], runs="abab")))
    assert [one.text for one in root.iter(f"{SVG}text") if one.get("class") == "run"] == ["a", "b"]
    lines = {one.get("class") for one in root.iter(f"{SVG}path")}
    assert lines == {"line line0", "line line1"}


def test_a_picture_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "loss.svg"
    path.write_text("older")
    write_chart(curve([1, 2]), path)
    assert ElementTree.parse(path).getroot().tag == f"{SVG}svg"
    assert list(tmp_path.iterdir()) == [path]
