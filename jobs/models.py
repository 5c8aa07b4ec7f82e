"""The published versions of a model, and which one is in use.

    python -m jobs.models --config <preset or path> list               every version, the promoted one marked
    python -m jobs.models --config <preset or path> show [VERSION]     where it comes from: down to the raw files
    python -m jobs.models --config <preset or path> diff A [B]         settings, data, scores and tensors; B: the promoted one
    python -m jobs.models --config <preset or path> history            every move of the pointer, who and when
    python -m jobs.models --config <preset or path> promote VERSION    point latest.json at it, if the gates of the configuration are open
    python -m jobs.models --config <preset or path> rollback [VERSION] point it back, by default at the version promoted before

`--because TEXT` goes into the history; `--force` promotes past a closed gate and needs it. Exit codes: 2 wrong configuration; 4 a gate is closed.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    from jobs.drivers.models import command

    return command(arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is fine
    sys.exit(main())
