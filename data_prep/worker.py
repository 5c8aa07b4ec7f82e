"""How a process works on a unit: on one thread, in memory that it keeps, with a garbage collector that looks only at what the unit makes.

The imports leave a hundred thousand objects that live as long as the process; a collection that a unit's records set off
would walk them all, 4 % of the unit's CPU. Arrow's own allocator gives every column's memory back to the kernel, which
clears each page for the next one: 5 %; the C library's keeps what is freed.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import pyarrow as pa


@contextlib.contextmanager
def working() -> Iterator[None]:
    pa.set_cpu_count(1)
    pool = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        pa.set_memory_pool(pool)
