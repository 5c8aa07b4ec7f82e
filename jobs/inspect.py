"""Look at what training sees.

    python -m jobs.inspect --config <preset or path> step 120        which rows and documents formed optimizer step 120
    python -m jobs.inspect --config <preset or path> sequence 5000   the same of one training sequence
    python -m jobs.inspect --config <preset or path> mixture         what the run would draw from each source
    python -m jobs.inspect --config <preset or path> row web-en 17   row 17 of a source, as text

Each takes `--dataset <identity>` (default: the dataset of this configuration) and `section.key=value ...`. Other weights can
be tried with `mixture`: they decide neither the tokenizer nor the dataset. Exit code 2: wrong configuration, or no such dataset,
step, sequence, source or row.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from jobs.cli import locate
from jobs.stages.records import open_dataset
from jobs.views.provenance import lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.inspect", description="Look at what training sees.")
    parser.add_argument("--config", required=True, help="preset or path")
    parser.add_argument("--dataset", help="identity; default: the dataset of this configuration")
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("step", help="rows and documents of an optimizer step").add_argument("number", type=int)
    what.add_parser("sequence", help="rows and documents of a training sequence").add_argument("number", type=int)
    what.add_parser("mixture", help="what the run draws from each source")
    row = what.add_parser("row", help="a packed row as text")
    row.add_argument("source")
    row.add_argument("number", type=int)
    for command in what.choices.values():
        command.add_argument("overrides", nargs="*", metavar="section.key=value")
    given = parser.parse_args(arguments)
    try:
        config, storage = locate(given.config, given.overrides)
        for line in lines(given, config, open_dataset(config, storage, given.dataset), storage):
            print(line)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is fine
    sys.exit(main())
