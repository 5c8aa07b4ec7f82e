"""How a process works on a unit: on one thread, and with a garbage collector that looks only at what the unit makes.

The imports leave a hundred thousand objects that live as long as the process; a collection that a unit's records set off
would walk them all, 4 % of the unit's CPU.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import pyarrow as pa


@contextlib.contextmanager
def working() -> Iterator[None]:
    pa.set_cpu_count(1)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
