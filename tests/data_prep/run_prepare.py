"""The driver that fault tests kill: config as JSON on the command line, then `prepare` on a Ray of its own."""

from __future__ import annotations

import sys

import ray

from data_prep.mapping import map_on_ray
from data_prep.prepare import prepare
from pipeline.config.schema import RunConfig
from pipeline.storage import open_storage


def main() -> None:
    config = RunConfig.model_validate_json(sys.argv[1])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    dataset = prepare(
        config,
        open_storage(config.storage),
        map_units=map_on_ray(config.cluster),
        report=lambda progress: print(progress.line(), flush=True),
    )
    print("digest", dataset.digest, flush=True)


if __name__ == "__main__":
    main()
