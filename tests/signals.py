"""Signals of processes that tests start."""

from __future__ import annotations

import signal


def heed_sigint() -> None:
    """For `preexec_fn`: a shell's background jobs, and all that they start, inherit that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
