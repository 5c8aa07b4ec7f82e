"""Look at what training sees.

    python -m jobs.inspect --config <preset or path> step 120        which rows and documents formed optimizer step 120
    python -m jobs.inspect --config <preset or path> sequence 5000   the same of one training sequence
    python -m jobs.inspect --config <preset or path> position 5000   the same of one that the run may have left out (skip_sequences)
    python -m jobs.inspect --config <preset or path> mixture         what the run would draw from each source
    python -m jobs.inspect --config <preset or path> row web-en 17   row 17 of a source, as text

Each takes `--dataset <identity>` (default: the dataset of this configuration) and `section.key=value ...`. Other weights can
be tried with `mixture`: they decide neither the tokenizer nor the dataset. Exit code 2: wrong configuration, or no such dataset,
step, sequence, source or row.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from jobs.cli import locate, parser
from jobs.stages.records import open_dataset
from jobs.views.provenance import WHAT, lines, understood


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser("inspect", "Look at what training sees.")
    made.add_argument("--dataset", help="identity; default: the dataset of this configuration")
    made.usage = f"{made.prog} --config CONFIG [--dataset ID] [section.key=value ...] {WHAT}"
    given = made.parse_args(arguments)
    what = [word for word in given.overrides if "=" not in word]
    overrides = [word for word in given.overrides if "=" in word]
    if not understood(what):
        made.error(f"{' '.join(what) or 'nothing'} is asked for; ask for {WHAT}")
    try:
        config, storage = locate(given.config, overrides)
        for line in lines(what, config, open_dataset(config, storage, given.dataset), storage):
            print(line)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is fine
    sys.exit(main())
