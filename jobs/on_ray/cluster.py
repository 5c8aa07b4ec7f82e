"""The Ray cluster a command uses: the one at RAY_ADDRESS, or a local one that lives as long as the command.

Environment variables are read and set here and in local.py and nowhere below: RAY_AUTH_MODE is always explicit (Ray's default moves),
usage statistics are off, and a lasting cluster keeps the state of training runs for its API. The processes of a local cluster inherit
what is set here.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs.on_ray.demand import check_joined, joined_nodes
from jobs.on_ray.local import local_cluster, with_this_code
from pipeline.config.schema import RunConfig
from pipeline.workflow.heartbeat import Heartbeat

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULTS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints each line to the worker's log and once more through a logger
    "RAY_DEDUP_LOGS": "0",
}
OWN = {  # for a cluster of this machine alone, which has to leave its memory to training
    "MALLOC_ARENA_MAX": "2",  # forward, backward and checkpoint threads use the same freed memory instead of an arena each
    # A step's tensors stay in the heap for the next: 2,600 page faults or fewer, not 43,000, at the same peak (benchmarks/README.md)
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "268435456",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # its only node cannot be drained: a process less (110 MB)
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",  # read by an API, no page of the dashboard: a process less (250 MB)
}
OBJECT_STORE_BYTES = 200_000_000  # rows are descriptions of work and records: kilobytes


@contextlib.contextmanager
def connect(
    config: RunConfig, stages: Sequence[str] = (), *, dashboard: bool = False, job_name: str = ""
) -> Iterator[str]:
    """Initialise Ray, saying so, and yield the dashboard's URL ('' without one). Raises ConfigError if a cluster that was joined
    has not what the stages want."""
    own = not os.environ.get("RAY_ADDRESS")
    what = "Ray       starting on this machine" if own else f"Ray       joining {os.environ['RAY_ADDRESS']}"
    print(what, flush=True)
    for name, value in {**DEFAULTS, **(OWN if own else {})}.items():
        os.environ.setdefault(name, value)
    with contextlib.ExitStack() as stack, Heartbeat(what) as heartbeat:
        import ray
        from ray.job_config import JobConfig

        options: dict[str, Any] = {"log_to_driver": True, "configure_logging": True, "logging_level": "WARNING"}
        if own:
            wanted = config.cluster.cpus_per_worker * config.parallelism.world_size
            cpus = max(math.ceil(wanted), os.cpu_count() or 1)
            options |= {
                "address": stack.enter_context(local_cluster(cpus, OBJECT_STORE_BYTES, dashboard=dashboard)),
                "job_config": JobConfig(metadata={"job_name": job_name} if job_name else None),
                "runtime_env": code_environment(),
            }
        context = ray.init(**options)
        stack.callback(ray.shutdown)
        if not own and stages:
            heartbeat.begin(f"{what}, which has not yet what {' and '.join(stages)} want")
            check_joined(config, stages, nodes=joined_nodes)
        heartbeat.begin("")
        url = getattr(context, "dashboard_url", "") or ""
        yield url if not url or "://" in url else f"http://{url}"


def in_a_ray_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def code_environment(*, stop_wait_s: int = 0) -> dict[str, Any]:
    """The runtime environment that brings this code to a job or worker, and gives a job that is stopped these seconds to end.

    Inside a Ray job: the same uploaded folder as this job's. With a cluster elsewhere: this checkout, uploaded. On a cluster of this
    machine or in the image: the folder as it is.
    """
    env_vars = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    if stop_wait_s:
        env_vars["RAY_JOB_STOP_WAIT_TIME_S"] = str(stop_wait_s)  # Ray's 3 s are too few for a checkpoint
    if in_a_ray_job():
        own = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"]).get("runtime_env", {})
        if own.get("working_dir"):
            return {"working_dir": own["working_dir"], "env_vars": env_vars}
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("http") and "127.0.0.1" not in address and "localhost" not in address:
        return {"working_dir": str(REPOSITORY), "excludes": [".git", ".venv", "store", "runs"], "env_vars": env_vars}
    return {"env_vars": {**env_vars, "PYTHONPATH": with_this_code()}}


# Not credentials: a job's runtime environment is shown on the dashboard. Nodes bring their own.
_PASSED_ON = ("MOONLIGHT_GIT_COMMIT", *DEFAULTS)


def python() -> str:
    """The interpreter for a stage job: this one where the job runs on this machine, else whatever the cluster's PATH has."""
    return "python" if os.environ.get("RAY_ADDRESS", "").startswith("http") and not in_a_ray_job() else sys.executable
