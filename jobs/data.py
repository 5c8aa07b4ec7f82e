"""What filters and rules would do to the sources of a run, before they are prepared. Writes nothing.

    moonlight data sample --config <preset or path> [--examples 10] [section.key=value ...]

Reads about 1,000 documents of each source, and shows of every threshold how many it drops, with examples; what is changed in those that stay,
languages, lengths before and after, and clusters of near-duplicates. A source without rules is shown with all of them. Exit code 2: wrong
configuration or input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.first_line import say


def main(arguments: Sequence[str] | None = None) -> int:
    say(arguments)
    from jobs.views.sample import command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
