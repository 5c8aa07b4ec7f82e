"""What is written is read back before it counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.writer import PackedWriter


def test_rows_are_read_back_after_writing(tmp_path: Path) -> None:
    """A file that is whole, but not what was meant, as a faulty disk or memory leaves it."""
    writers = []
    for fill in (1, 2):
        (tmp_path / str(fill)).mkdir()
        writer = PackedWriter(
            tmp_path / str(fill), "x", 64, "<u2", fill, rows_per_group=2, groups_per_file=4, zstd_level=3
        )
        writer.add([np.arange(30, dtype="<u2")], [30])
        writer.add([np.arange(7, dtype="<u2"), np.arange(50, dtype="<u2")], [7, 50])
        writers.append(writer)
    first, second = (tmp_path / str(fill) / "x-00000.parquet" for fill in (1, 2))
    writers[0].close()
    finish = writers[1]._writer.close

    def damaged() -> None:
        finish()
        second.write_bytes(first.read_bytes())

    writers[1]._writer.close = damaged
    with pytest.raises(OSError, match=r"x-00000\.parquet: what was read back differs from what was written"):
        writers[1].close()
