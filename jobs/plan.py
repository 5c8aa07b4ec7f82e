"""What a run will need, before it is started: memory, traffic, time and cost, prepare and storage. Needs no GPU; lists data, reads none.

    python -m jobs.plan --config moonlight-16b-a3b [--mfu 0.39] [--price 2.5] [section.key=value ...]
    python -m jobs.plan --config moonlight-16b-a3b --rehearse [--chip h100] [--trace step.json] [section.key=value ...]

Try `parallelism.shard=32`, `training.micro_batch=2` or `training.activation_checkpointing=full`. The figures and what
they leave out: pipeline/planner/. `--rehearse` runs one whole step of one rank without a GPU (pipeline/rehearsal/, a minute or two): every
allocation, collective, wait of the host and kernel, and from a chip's rates what hides behind what, so MFU is a result. Exit code 0: it
fits; 1: it does not fit into a GPU's memory, with what would help; 2: wrong configuration.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs.first_line import say


def main(arguments: Sequence[str] | None = None) -> int:
    say(arguments, "planning")
    from jobs.views.plan import command

    return command(arguments)


if __name__ == "__main__":
    sys.exit(main())
