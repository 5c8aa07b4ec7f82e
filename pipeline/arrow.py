"""Arrow columns of Python values and back, by their buffers.

`pa.array`, `to_numpy` and whatever calls them import pandas where that is installed, to ask whether it was given a series: 0.4 CPU
seconds and 40 MB in every process that writes a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa


def column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Of strings, bytes, integers or booleans; None is null. Raises UnicodeEncodeError for a string that is no text, OverflowError
    for an integer that does not fit."""
    count = len(values)
    validity, nulls = None, 0
    if None in values:
        valid = np.array([value is not None for value in values])
        validity, nulls = _bits(valid), count - int(valid.sum())
        blank: Any = "" if kind == pa.string() else b"" if kind == pa.binary() else 0
        values = [blank if value is None else value for value in values]
    if kind in (pa.string(), pa.binary()):
        data = [value.encode() for value in values] if kind == pa.string() else values
        offsets = np.zeros(count + 1, np.int64)
        np.cumsum([len(value) for value in data], out=offsets[1:])
        if offsets[-1] > np.iinfo(np.int32).max:
            raise OverflowError(f"{offsets[-1]:,} bytes in one column of {kind}; at most 2 GiB fit")
        buffers = [validity, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(b"".join(data))]
    elif isinstance(kind, pa.FixedSizeBinaryType):
        assert not nulls, "no nulls among bytes of one width"
        data = b"".join(values)
        assert len(data) == count * kind.byte_width, f"values of another width than {kind.byte_width} bytes"
        buffers = [None, pa.py_buffer(data)]
    elif kind == pa.bool_():
        buffers = [validity, _bits(np.array(values, bool))]
    else:
        buffers = [validity, pa.py_buffer(np.array(values, kind.to_pandas_dtype()))]
    return pa.Array.from_buffers(kind, count, buffers, nulls)


def integers(values: pa.Array) -> np.ndarray:
    """A column of integers without nulls; not copied, so not to be written to."""
    found = np.frombuffer(values.buffers()[1], values.type.to_pandas_dtype())
    return found[values.offset : values.offset + len(values)]


def _bits(values: np.ndarray) -> pa.Buffer:
    return pa.py_buffer(np.packbits(values, bitorder="little"))
