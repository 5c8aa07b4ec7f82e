"""The answer of the gate before publishing, for a workflow's step outputs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from botocore.exceptions import BotoCoreError

from jobs.cli import locate, parser, refusing
from jobs.stages import publish


@refusing
def command(arguments: Sequence[str] | None) -> int:
    """`jobs.gate`. Returns the exit code: a closed gate is an answer, not a failure."""
    made = parser("gate", "May this run be published? Asks all gates about its evaluation.")
    made.add_argument("--output", required=True, type=Path, help="folder for the files gate and reason")
    given = made.parse_args(arguments)
    config, storage = locate(given.config, given.overrides)
    try:
        gate, reason, table = publish.gate(config, storage)
    except (OSError, BotoCoreError) as error:
        from pipeline.workflow.rayjobs import Outcome  # here: it loads the Kubernetes client

        print(f"{config.storage.root} does not answer ({type(error).__name__}: {error})", file=sys.stderr)
        return int(Outcome.INFRASTRUCTURE)
    (given.output / "gate").write_text(gate)
    (given.output / "reason").write_text(reason)
    print(f"gate {gate}: {reason}")
    if table:
        print(table)
    return 0
