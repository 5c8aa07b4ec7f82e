"""The answer of the gate before publishing, for a workflow's step outputs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from botocore.exceptions import BotoCoreError

from jobs.cli import locate
from jobs.stages import publish


def write(config_name: str, overrides: Sequence[str], output: Path) -> int:
    """Write the files `gate` and `reason` into the folder. Returns the exit code: a closed gate is an answer, not a failure."""
    try:
        config, storage = locate(config_name, overrides)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        gate, reason, table = publish.gate(config, storage)
    except (OSError, BotoCoreError) as error:
        from pipeline.workflow.rayjobs import Outcome  # here: it loads the Kubernetes client

        print(f"{config.storage.root} does not answer ({type(error).__name__}: {error})", file=sys.stderr)
        return int(Outcome.INFRASTRUCTURE)
    except ValueError as error:  # a damaged record, or a checkpoint that is not there
        print(error, file=sys.stderr)
        return 2
    (output / "gate").write_text(gate)
    (output / "reason").write_text(reason)
    print(f"gate {gate}: {reason}")
    if table:
        print(table)
    return 0
