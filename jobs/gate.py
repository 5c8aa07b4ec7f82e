"""May this run be published? Asks all gates about the evaluation of the checkpoint that is meant, and says `open` or `closed` with a table.

`python -m jobs.gate --config <preset or path> --output <folder> [section.key=value ...]` writes the files `gate` and `reason` into the
folder, for a workflow's step outputs. Without an evaluation the gate stays closed. The exit code is 0 either way: a closed gate is an
answer, not a failure. 2: wrong configuration; 12: the storage does not answer, ask again. Publishing asks the same gates again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    from jobs.views.gate import command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
