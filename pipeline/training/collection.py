"""Python's garbage collector at the same steps on all ranks.

Left to itself it runs when a process has made so many objects, on each rank at another moment, and all other ranks wait for that
one in the next collective. So it is off while a run trains, objects that were there before are never looked at again, and
between steps that are multiples of `every` it runs once, everywhere. Nothing waits for it: a step leaves no tensor in a cycle
(a test holds that), so memory of the device comes back without it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collecting(every: int | None) -> Iterator[Callable[[int], None]]:
    """Yields what is to be called after each step. `every` None: Python's own way."""
    if every is None:
        yield lambda step: None
        return
    was_on, frozen = gc.isenabled(), gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    gc.disable()

    def after(step: int) -> None:
        if step % every == 0:
            gc.collect(1)  # what lives through a few of these is not looked at again, either

    try:
        yield after
    finally:
        if not frozen:  # who froze objects before wants them left alone
            gc.unfreeze()
        if was_on:
            gc.enable()
