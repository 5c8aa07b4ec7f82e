"""The runs of a storage: state, step, loss, held-out loss, when there was news, by whom, what was used.

    python -m jobs.runs --config <preset or path> [--price PER_GPU_HOUR] [section.key=value ...]

The configuration only says which storage. Reads it, starts nothing, changes nothing. Damaged records are named on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    from jobs.views.runs import command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
