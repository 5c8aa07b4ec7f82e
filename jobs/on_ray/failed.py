"""Workers that did not do their work, in one line: Ray's own error is a page of tracebacks, which it has logged before."""

from __future__ import annotations

from botocore.exceptions import BotoCoreError

from pipeline.storage import said_by_storage


class WorkersFailed(RuntimeError):
    """A stage ended without its result; the message says why."""


def told(error: Exception, restarts: int) -> str:
    """What Ray Train's error says. Its workers' exceptions are wrapped once."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    if not failures:
        return f"the workers failed: {' '.join(str(error).split())[:500]}"
    rank = min(failures, key=lambda rank: (not isinstance(_cause(failures[rank]), OSError | BotoCoreError), rank))
    cause = _cause(failures[rank])
    what = said_by_storage(cause) if isinstance(cause, OSError | BotoCoreError) else _line(cause)
    return f"the workers failed, after {restarts} restarts (cluster.max_failures); rank {rank}: {what}"


def _cause(error: Exception) -> BaseException:
    found = getattr(error, "_base_exc", error)
    assert isinstance(found, BaseException)
    return found


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1][:500]}; run the same command to go on"
