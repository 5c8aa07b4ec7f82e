"""Several Rays in one process, one after the other, as tests have them."""

from __future__ import annotations

import gc


def forget_handles() -> None:
    """Before the next Ray begins. Actors of two Rays may have the same ids, so a handle that only a cycle keeps alive would, when it is
    collected at last, take the reference to another Ray's actor with it, which then dies before it runs."""
    gc.collect()
