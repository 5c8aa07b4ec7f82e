"""Look at what training sees.

    python -m jobs.inspect --config <preset or path> step 120        which rows and documents formed optimizer step 120
    python -m jobs.inspect --config <preset or path> sequence 5000   the same of one training sequence
    python -m jobs.inspect --config <preset or path> position 5000   the same of one that the run may have left out (skip_sequences)
    python -m jobs.inspect --config <preset or path> mixture         what the run would draw from each source
    python -m jobs.inspect --config <preset or path> row web-en 17   row 17 of a source, as text
    python -m jobs.inspect --config <preset or path> duplicates      the largest clusters of near-duplicates, and who of them stays

Each takes `--dataset <identity>` (default: the dataset of this configuration) and `section.key=value ...`. Other weights can
be tried with `mixture`: they decide neither the tokenizer nor the dataset. Exit code 2: wrong configuration, or nothing of that name.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    from jobs.views.provenance import command

    return command(arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is fine
    sys.exit(main())
