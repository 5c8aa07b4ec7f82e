"""Charts: the drawn coordinates are the data, the ticks enclose it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.charts import MOST_POINTS, Mark, Series, compact, line_chart, thin, ticks

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


def test_the_path_is_linear_in_the_data():
    points = [(0.0, 2.0), (50.0, 4.0), (100.0, 3.0)]
    svg = ElementTree.fromstring(line_chart([Series("a <b>", points)], [Mark("end", 3.5, 100.0)], label="x & y"))
    path = next(node for node in svg.iter() if node.tag.endswith("path"))
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", path.get("d"))]
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y1 == pytest.approx(2 * (y2 - y1), abs=0.2)
    assert y0 > y2 > y1  # downwards on the screen
    titles = [node.text for node in svg.iter() if node.tag.endswith("title")]
    assert titles == ["a <b>: 2 after 0 tokens", "a <b>: 4 after 50 tokens", "a <b>: 3 after 100 tokens", "end: 3.5"]
    assert svg.get("aria-label") == "x & y"


def test_nothing_to_draw():
    assert line_chart([Series("empty", [])], [Mark("line", 1.0)], label="x") == ""


@pytest.mark.parametrize("count", [0, 1, MOST_POINTS, MOST_POINTS + 1, 100_003])
def test_thinning_keeps_the_ends(count: int):
    points = [(float(i), 0.0) for i in range(count)]
    kept = thin(points)
    assert len(kept) <= MOST_POINTS + 1
    assert kept[:1] == points[:1]
    assert kept[-1:] == points[-1:]
    assert kept == sorted(set(kept))


def test_compact_numbers():
    found = [compact(n) for n in (0, 4.2e-4, 999, 12_800, 1.6e10, 5.7e12, -1500)]
    assert found == ["0", "0.00042", "999", "12.8k", "16B", "5.7T", "-1.5k"]
