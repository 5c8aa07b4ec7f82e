"""The memory column: a program's own peak, however large the one that started it."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.memory import peak_bytes

MIB = 1 << 20
CHILD = "import resource; from benchmarks.memory import peak_bytes; print(peak_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"


def test_a_child_does_not_count_its_parents_memory() -> None:
    block = bytearray(b"\1") * (256 * MIB)
    assert peak_bytes() >= len(block)
    ours, usage = map(
        int, subprocess.run([sys.executable, "-c", CHILD], capture_output=True, check=True).stdout.split()
    )
    assert ours < 100 * MIB
    assert usage >= len(block)  # what `ru_maxrss` says: the reason for reading something else


def test_the_peak_is_that_of_the_past() -> None:
    program = (
        f"from benchmarks.memory import peak_bytes; x = bytearray(b'\\1') * {64 * MIB}; del x; print(peak_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert int(done.stdout) >= 64 * MIB
