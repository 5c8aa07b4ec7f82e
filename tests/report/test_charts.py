"""Charts: the drawn coordinates are the data, the ticks enclose it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.report.charts import (
    MOST_POINTS,
    UNITS,
    Axis,
    Mark,
    Moment,
    Series,
    clock,
    compact,
    histogram,
    plot,
    thin,
    ticks,
    time_ticks,
)

NUMBERS = st.floats(-1e3, 1e3)


@given(NUMBERS, st.floats(1e-3, 1e6), st.integers(3, 8))
@settings(max_examples=200, derandomize=True, deadline=None)
def test_ticks_are_even_round_and_enclose_the_data(low: float, span: float, about: int):
    found = ticks(low, low + span, about)
    step = found[1] - found[0]
    assert found[0] <= low + 1e-6 * step
    assert found[-1] >= low + span - 1e-6 * step
    assert found == pytest.approx([found[0] + index * step for index in range(len(found))], abs=1e-6 * step)
    assert float(f"{step:.1e}".split("e")[0]) in (1.0, 2.0, 2.5, 5.0)
    assert 2 <= len(found) <= about + 2


def test_ticks_of_a_constant():
    assert ticks(3.0, 3.0, 5)[0] <= 3.0 < ticks(3.0, 3.0, 5)[-1]
    assert len(ticks(0.0, 0.0, 5)) > 1


X, Y = Axis("tokens trained on"), Axis("nats per token")


def parsed(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart)


def test_what_is_drawn_is_linear_in_the_data():
    points = [(0.0, 2.0), (50.0, 4.0), (100.0, 3.0)]
    moments = [Moment("restart", 50.0), Moment("gone", 101.0)]
    drawn = parsed(plot([Series("a <b>", points, dots=True)], [Mark("end", 3.5)], moments, label="x & y", x=X, y=Y))
    path = next(node for node in drawn.iter("path"))
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", path.get("d"))]
    assert (x0, x1, x2) == (0, UNITS / 2, UNITS)
    assert y0 - y1 == pytest.approx(2 * (y2 - y1), abs=0.2)
    assert y0 > y2 > y1  # downwards on the screen
    strokes = [node.attrib for node in drawn.iter("line") if node.get("class") == "moment"]
    assert [float(stroke["x1"]) for stroke in strokes] == [UNITS / 2]
    [across] = [node for node in drawn.iter("line") if node.get("class") == "reference"]
    assert float(across.get("y1")) == pytest.approx((y1 + y2) / 2, abs=0.2)
    dots = [re.findall(r"[\d.]+(?=%)", node.get("style")) for node in drawn.iter("i")]
    assert [float(left) * 10 for left, _ in dots] == [x0, x1, x2]
    assert [float(top) * 10 for _, top in dots] == pytest.approx([y0, y1, y2], abs=0.1)


def test_a_chart_carries_its_values_and_the_titles_of_its_axes():
    points = [(0.0, 2.0), (50.0, 4.0)]
    drawn = parsed(plot([Series('a "<b>"', points, "red")], moments=[Moment("<1>", 7.0)], label="x & y", x=X, y=Y))
    values = json.loads(drawn.get("data-values"))
    assert values["series"] == [['a "<b>"', "red", [0, 50], [2, 4]]]
    assert values["moments"] == [["<1>", 7.0]]
    assert values["x"] == [0, 50]
    assert [node.text for node in drawn.iter("span")] == ["nats per token", "tokens trained on"]
    assert next(node.get("aria-label") for node in drawn.iter("div") if node.get("role")) == "x & y"


def test_no_letters_lie_in_the_plot():
    """They are beside the axes: to the left of the plot or below it (page.css); the stretched SVG has none."""
    drawn = parsed(plot([Series("a", [(0.0, 2.0), (5.0, 4.0)])], [Mark("unigram", 3.0)], label="", x=X, y=Y))
    [svg] = drawn.iter("svg")
    assert {node.tag for node in svg.iter()} == {"svg", "line", "path"}
    assert {node.get("class").split()[0] for node in drawn.iter("b")} == {"x", "y"}


def test_nothing_to_draw():
    assert plot([Series("empty", [])], [Mark("line", 1.0)], label="x", x=X, y=Y) == ""
    assert histogram([("1 B", 0)], label="", x_title="", y_title="", colour="red") == ""


@pytest.mark.parametrize("value", [0.0, 16.0, -3.0])
def test_what_is_constant_is_inside_the_plot(value: float):
    drawn = parsed(plot([Series("a", [(0.0, value), (5.0, value)])], label="", x=X, y=Y))
    low, high = json.loads(drawn.get("data-values"))["y"]
    assert low <= value < high


def test_bars_are_as_high_as_their_counts():
    drawn = parsed(
        histogram([("1 B", 5), ("2 B", 20), ("4 B", 0)], label="l", x_title="bytes", y_title="n", colour="red")
    )
    assert [float(re.search(r"height:([\d.]+)%", bar.get("style"))[1]) for bar in drawn.iter("i")] == [25, 100, 0]
    assert [bar.get("title") for bar in drawn.iter("i")] == ["1 B: 5", "2 B: 20", "4 B: 0"]


@pytest.mark.parametrize("count", [0, 1, MOST_POINTS, MOST_POINTS + 1, 100_003])
def test_thinning_keeps_the_ends_and_every_spike(count: int):
    points = [(float(i), 9.0 if i == count // 3 else 0.0) for i in range(count)]
    kept = thin(points)
    assert len(kept) <= MOST_POINTS + 3
    assert kept[:1] == points[:1]
    assert kept[-1:] == points[-1:]
    assert kept == sorted(set(kept))
    assert max((y for _, y in kept), default=9.0) == 9.0


@given(st.floats(0.5, 1e9), st.integers(3, 8))
@settings(max_examples=200, derandomize=True, deadline=None)
def test_ticks_of_times_are_inside_and_few(high: float, about: int):
    found = time_ticks(high, about)
    assert found[0] == 0.0
    assert found[-1] <= high
    assert len(found) <= about + 1


def test_times_on_an_axis():
    assert [clock(each) for each in (0, 45, 95, 7200, 200_000)] == ["0", "45 s", "1:35 min", "2:00 h", "2.31 d"]


def test_compact_numbers():
    found = [compact(n) for n in (0, 4.2e-4, 999, 12_800, 1.6e10, 5.7e12, -1500)]
    assert found == ["0", "0.00042", "999", "12.8k", "16B", "5.7T", "-1.5k"]
