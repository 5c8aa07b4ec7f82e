"""How the program of a stage ends that cannot go on: one line, and an exit code."""

from __future__ import annotations

import sys

from botocore.exceptions import BotoCoreError

from jobs.drivers.failures import CLOSED, HELD
from jobs.on_ray.failed import WorkersFailed
from jobs.on_ray.signals import Interrupted
from pipeline.lease import Held, LeaseLost
from pipeline.publishing.gate import GateError
from pipeline.storage import said_by_storage

ENDINGS = (Held, LeaseLost, Interrupted, WorkersFailed, OSError, BotoCoreError, ValueError)
"""Of which the message is the whole story; ValueError: ConfigError, StorageError, MissingInput, GateError."""


def ended(stage: str, error: BaseException) -> int:
    """Say which of `ENDINGS` it was. Returns the exit code."""
    of_storage = isinstance(error, OSError | BotoCoreError)
    print(f"{stage}: {said_by_storage(error) if of_storage else error}", file=sys.stderr)
    if isinstance(error, Held | LeaseLost):
        return HELD
    if isinstance(error, Interrupted):
        return error.exit_code
    if isinstance(error, GateError):
        return CLOSED
    return 1 if of_storage or isinstance(error, WorkersFailed) else 2
