"""How long something takes, for people."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """95 -> '1 min 35 s'; 7300 -> '2 h 2 min'."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600:,} h {total % 3600 // 60} min"
