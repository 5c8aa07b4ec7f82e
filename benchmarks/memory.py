"""Peak memory of this program, and of no other."""

from __future__ import annotations

from pathlib import Path


def peak_bytes() -> int:
    """The largest resident size so far. Not `ru_maxrss`, which execve keeps: a program that another one starts would begin
    with the other's peak."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024
