"""The Ray cluster a command uses: the one at RAY_ADDRESS, or a local one that lives as long as the command.

Environment variables are read and set here and nowhere below: RAY_AUTH_MODE is always explicit (a local cluster without a
token would otherwise ask for one), usage statistics are off, and a lasting cluster keeps the state of training runs for its
API. The processes of a local cluster inherit what is set here.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config.load import ConfigError
from pipeline.config.schema import RunConfig

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULTS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_DEDUP_LOGS": "0",
}
OWN = {  # for a cluster of this machine alone, which has to leave its memory to training
    "MALLOC_ARENA_MAX": "2",  # forward, backward and checkpoint threads use the same freed memory instead of an arena each
    "MALLOC_MMAP_THRESHOLD_": "8388608",  # large tensors go back at once
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # its only node cannot be drained: a process less (110 MB)
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",  # read by an API, no page of the dashboard: a process less (250 MB)
}
AGENT_PORT = 52365  # ray/_private/ray_constants.py; `ray.init` cannot choose another
OBJECT_STORE_BYTES = 200_000_000  # rows are descriptions of work and records: kilobytes


@contextlib.contextmanager
def connect(config: RunConfig, *, dashboard: bool = False, job_name: str = "") -> Iterator[str]:
    """Initialise Ray and yield the dashboard's URL ('' without one)."""
    own = not os.environ.get("RAY_ADDRESS")
    for name, value in {**DEFAULTS, **(OWN if own else {})}.items():
        os.environ.setdefault(name, value)
    import ray
    from ray.job_config import JobConfig

    options: dict[str, Any] = {"log_to_driver": True, "configure_logging": True, "logging_level": "WARNING"}
    folder = None
    if not own:
        context = ray.init(**options)
    else:
        _check_agent_port()
        # A folder of its own, and the address in it as `ray start` writes it: a job's driver looks up its cluster there, and
        # would otherwise join any other one that runs on this machine (ray/_private/services.py).
        folder = tempfile.mkdtemp(prefix="moonlight-ray-")
        wanted = config.cluster.cpus_per_worker * config.parallelism.world_size
        context = ray.init(
            address="local",
            num_cpus=max(math.ceil(wanted), os.cpu_count() or 1),
            include_dashboard=dashboard,
            object_store_memory=OBJECT_STORE_BYTES,
            job_config=JobConfig(metadata={"job_name": job_name} if job_name else None),
            runtime_env=code_environment(),
            _temp_dir=folder,
            **options,
        )
        Path(folder, "ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)
    try:
        url = getattr(context, "dashboard_url", "") or ""
        yield url if not url or "://" in url else f"http://{url}"
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _check_agent_port() -> None:
    """Ray's job agents share one fixed port: a second cluster on this machine would take no jobs."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", AGENT_PORT))
        except OSError:
            raise ConfigError(
                f"port {AGENT_PORT} is taken, most likely by another Ray cluster on this machine; "
                "use that one (RAY_ADDRESS=auto) or stop it (ray stop)"
            ) from None


def in_a_ray_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def code_environment() -> dict[str, Any]:
    """The runtime environment that brings this code to a job or worker.

    Inside a Ray job: the same uploaded folder as this job's. With a cluster elsewhere: this checkout, uploaded. On a cluster of this
    machine or in the image: the folder as it is.
    """
    env_vars = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    if in_a_ray_job():
        own = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"]).get("runtime_env", {})
        if own.get("working_dir"):
            return {"working_dir": own["working_dir"], "env_vars": env_vars}
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("http") and "127.0.0.1" not in address and "localhost" not in address:
        return {"working_dir": str(REPOSITORY), "excludes": [".git", ".venv", "runs"], "env_vars": env_vars}
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"env_vars": {**env_vars, "PYTHONPATH": path}}


# Not credentials: a job's runtime environment is shown on the dashboard. Nodes bring their own.
_PASSED_ON = ("MOONLIGHT_GIT_COMMIT", *DEFAULTS)


def python() -> str:
    """The interpreter for a stage job: this one where the job runs on this machine, else whatever the cluster's PATH has."""
    return "python" if os.environ.get("RAY_ADDRESS", "").startswith("http") and not in_a_ray_job() else sys.executable
