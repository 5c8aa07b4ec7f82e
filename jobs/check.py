"""What can be wrong with a run, and a look into its data, before anything is started. Writes nothing.

    moonlight check --config <preset or path> [--document] [section.key=value ...]

Exit code 0: nothing is wrong that can be known beforehand; 2: something is, in one line that names the key and the remedy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.first_line import say


def main(arguments: Sequence[str] | None = None) -> int:
    say(arguments)
    from jobs.views.check import command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
