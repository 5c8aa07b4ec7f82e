"""A scaling ladder of a recipe: sizes as Ray tasks, Muon and AdamW at their best settings, several seeds; what the fit says.

    python -m jobs.ladder --config <preset or path> --sizes 64,128,192,256 [--seeds 3] [--rates 0.5,1,2] [--batches 1]
                          [--tokens-per-parameter 1] [section.key=value ...]

The run's dataset must be prepared. Runs that are done are found again. In <root>/ladders/<run_id>/ are the figures and a plot.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    from jobs.drivers.ladder import command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
