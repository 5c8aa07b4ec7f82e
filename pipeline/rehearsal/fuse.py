"""What compilation makes of a tape: runs of elementwise work become one kernel that reads and writes what crosses its border."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.rehearsal.tape import Begin, Entry, Kernel

PHASES = frozenset({"forward", "backward"})  # the optimizer's kernels take whole lists as they are


def fuse(entries: Sequence[Entry]) -> list[Entry]:
    """Kernels of kind `memory` that follow each other on a stream, with nothing between them, as one.

    A result counts as written if something after the run reads it, or if it lay in memory before.
    """
    last_read: dict[int, int] = {}
    made_at: dict[int, int] = {}
    for index, entry in enumerate(entries):
        if isinstance(entry, Kernel):
            for storage, _ in entry.reads:
                last_read[storage] = index
            for storage, _ in entry.writes:
                made_at.setdefault(storage, index)
    found: list[Entry] = []
    run: list[Kernel] = []
    start = 0
    for index, entry in enumerate([*entries, Begin(-1)]):
        fits = isinstance(entry, Kernel) and entry.kind == "memory" and entry.phase in PHASES
        if fits and (not run or (run[-1].stream, run[-1].phase) == (entry.stream, entry.phase)):  # type: ignore[union-attr]
            start = start if run else index
            run.append(entry)  # type: ignore[arg-type]
            continue
        if run:
            found.append(_as_one(run, start, index, last_read, made_at))
            run = []
        if fits:
            start, run = index, [entry]  # type: ignore[list-item]
        else:
            found.append(entry)
    return found[:-1]


def _as_one(run: Sequence[Kernel], start: int, end: int, last_read: dict[int, int], made_at: dict[int, int]) -> Kernel:
    if len(run) == 1:
        return run[0]
    reads: dict[int, int] = {}
    writes: dict[int, int] = {}
    for kernel in run:
        for storage, size in kernel.reads:
            if storage not in writes:
                reads[storage] = max(size, reads.get(storage, 0))
        for storage, size in kernel.writes:
            writes[storage] = max(size, writes.get(storage, 0))
    kept = {s: size for s, size in writes.items() if last_read.get(s, -1) >= end or made_at[s] < start}
    first = run[0]
    names = sorted({kernel.name for kernel in run})
    return Kernel(
        f"fused {len(run)}: {' '.join(names)}"[:80], "memory", first.stream, first.phase, first.where, 0,
        tuple(reads.items()), tuple(kept.items()),
    )  # fmt: skip
