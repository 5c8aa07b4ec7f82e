"""One stage by its name: what `python -m jobs.prepare`, `jobs.train`, `jobs.evaluate` and `jobs.publish` do."""

from __future__ import annotations

import time
from collections.abc import Sequence

from data_prep.handed_listing import handed
from jobs import stages
from jobs.cli import looking, open_run, parser
from jobs.drivers.ending import ENDINGS, ended
from jobs.on_ray.progress import ProgressLines, Work
from jobs.on_ray.signals import raise_on_signals
from jobs.stages.leases import refuse_held
from jobs.stages.records import Records, hold_dataset, keep_settings
from jobs.views.live import watched
from pipeline.training import initial


def main(stage: str, arguments: Sequence[str] | None = None) -> int:
    """Do one stage on the Ray cluster at RAY_ADDRESS, or on a local one. Returns the exit code."""
    given = parser(stage, stages.room(stage).SUMMARY).parse_args(arguments)
    try:
        with looking(given.config):
            config, storage = open_run(given.config, given.overrides)
            storage.check_writable()
            if stage == "train":
                config = initial.pin(config, storage)
            before = Records(listings=handed(config, storage))
            records = stages.find(config, storage, stage, before, until=stage)
            if records.done(stage):
                hold_dataset(config, storage, records.dataset)
                stages.confirm(stage, storage, records)
                print(f"{stage}: up to date")
                return 0
            stages.check([stage], config, storage, records)
            from jobs.on_ray.cluster import connect  # here: what is done needs no Ray
            from jobs.on_ray.demand import check_cluster

            check_cluster(config, [stage])
        refuse_held(stage, config, storage)
        keep_settings(config, storage)
        with (
            connect(config, [stage]),
            ProgressLines(storage, config.run_id, show=False) as lines,
            watched(stage, storage, config.run_id),
        ):
            raise_on_signals()
            lines.work = Work(stage, since=time.time())
            stages.run(stage, config, storage, records)
    except ENDINGS as error:
        return ended(stage, error)
    return 0
