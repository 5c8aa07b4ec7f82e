"""What can be wrong with a run, and a look into its data, before anything is started. Writes nothing.

    moonlight check --config <preset or path> [--document] [section.key=value ...]

Exit code 0: nothing is wrong that can be known beforehand; 2: something is, in one line that names the key and the remedy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs import stages
from jobs.cli import open_run, parser
from jobs.on_ray.demand import check_cluster
from jobs.views.check import lines


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("check", "What can be wrong with a run, and a look into its data, before anything is started.")
    made.add_argument("--document", action="store_true", help="print one document, and its tokens")
    given = made.parse_args(arguments)
    try:
        config, storage = open_run(given.config, given.overrides)
        records = stages.find(config, storage)
        todo = [stage for stage in stages.names() if not records.done(stage)]
        stages.check(todo, config, storage, records)
        for line in lines(config, storage, records, document=given.document):
            print(line, flush=True)
        check_cluster(config, todo)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("nothing is wrong that can be known beforehand")
    return 0


if __name__ == "__main__":
    sys.exit(main())
