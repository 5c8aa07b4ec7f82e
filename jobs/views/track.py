"""`jobs.track`: a run's records to its trackers."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.cli import open_run, parser, refusing
from jobs.views.status import require_run
from pipeline.tracking.follow import Sender
from pipeline.tracking.tracker import check


@refusing
def command(arguments: Sequence[str] | None) -> int:
    """Returns the exit code."""
    given = parser("track", "Send a run's records to the trackers of tracking.trackers.").parse_args(arguments)
    config, storage = open_run(given.config, given.overrides)
    require_run(config, storage)
    if not config.tracking.trackers:
        raise ValueError("tracking.trackers: names none; add one of tensorboard, wandb, mlflow, trackio")
    check(config, storage, here=True)
    answered = True
    for name in config.tracking.trackers:
        sender = Sender(name, config, storage)
        done = sender.send()
        sender.close()
        answered &= done
        if done:
            print(f"{name}: {sender.sent:,} steps that it did not have", flush=True)
    return 0 if answered else 1
