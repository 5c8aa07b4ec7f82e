"""Columns by their buffers are the columns that Arrow itself makes of the same values."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.arrow import column, integers

VALUES: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.string(): st.text(max_size=8),
    pa.binary(): st.binary(max_size=8),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.int8(): st.integers(-128, 127),
    pa.bool_(): st.booleans(),
}


@pytest.mark.parametrize("kind", VALUES, ids=str)
@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.data())
def test_as_arrow_makes_them(kind: pa.DataType, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.none() | VALUES[kind], max_size=20))
    ours = column(values, kind)
    ours.validate(full=True)
    assert ours.equals(pa.array(values, kind))
    assert ours.null_count == values.count(None)


def test_bytes_of_one_width() -> None:
    assert column([b"ab", b"cd"], pa.binary(2)).to_pylist() == [b"ab", b"cd"]
    with pytest.raises(AssertionError, match="another width"):
        column([b"abc", b"d"], pa.binary(3))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OverflowError):
        column([2**63], pa.int64())
    with pytest.raises(UnicodeEncodeError):
        column(["\ud800"], pa.string())


def test_integers_back() -> None:
    assert integers(pa.array([5, 6, 7, 8], pa.int32()).slice(1, 2)).tolist() == [6, 7]
    assert integers(column([1, 2], pa.int64())).tolist() == [1, 2]
