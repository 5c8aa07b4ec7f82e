"""Ask a run that is training for a profile of some steps: torch's trace and a snapshot of memory, in the run's storage.

    python -m jobs.profile --config <preset or path> [--steps 3] [--ranks 0,8] [--at 1200] [section.key=value ...]

The run finds the request by itself, wherever it is, and says where the files are. Exit code 0 once it is asked; 2 for steps that are past.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    from jobs.views.profile import command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
