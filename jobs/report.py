"""The page of a run, or several runs laid over each other.

    python -m jobs.report --config <preset or path> [RUN ...] [--output FILE] [section.key=value ...]

Without a RUN that of the configuration; of one RUN its page is written anew; of several their curves in one page, with a table of
exactly the settings in which they differ. FILE is a copy on this machine. Exit code 2: no such run, a record that is
damaged, or runs that share nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    from jobs.views.report import command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
