"""The last two stages on a real Ray give what the library gives, and its errors."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from jobs.on_ray.evaluate import evaluate_with_ray
from jobs.on_ray.publish import publish_with_ray
from pipeline.evaluation.heldout import evaluate
from pipeline.evaluation.result import manifest_path
from pipeline.lease import Held, hold
from pipeline.publishing.export import GateError
from pipeline.publishing.version import lease_path
from tests.evaluation.make import make_run, run_config
from tests.evaluation.make_tasks import TASKS, write_tasks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A small local Ray, unless one is running already."""
    if ray.is_initialized():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        env = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
        ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=10**8, runtime_env=env)
        yield
        ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_both_stages(tmp_path, capfd):
    made = make_run(run_config(str(tmp_path)))
    tasks = {"tasks": TASKS, "task_folder": str(write_tasks(tmp_path / "tasks", tmp_path / "cache"))}
    section = made.config.evaluation.model_copy(update=tasks)
    made = replace(made, config=made.config.model_copy(update={"evaluation": section}))
    here = evaluate(made.config, made.dataset, made.checkpoint, made.storage, report=lambda _: None)
    made.storage.delete(manifest_path(made.config, made.checkpoint))
    there = evaluate_with_ray(made.config, made.dataset, made.checkpoint, made.storage, print)
    assert there == here
    assert set(TASKS) < there.tasks.keys()

    manifest = publish_with_ray(made.config, made.train, there, made.dataset, git_commit="abc", report=print)
    assert manifest.git_commit == "abc"
    assert (tmp_path / "models/tiny" / manifest.version / "manifest.json").exists()

    with hold(made.storage, lease_path(made.config.run_id), what="", beat_s=0.2), pytest.raises(Held) as held:
        publish_with_ray(made.config, made.train, there, made.dataset, report=print)
    assert str(held.value).startswith(f"the model of run {made.config.run_id} is being written by ")

    section = made.config.publishing.model_copy(update={"max_loss": 0.5})
    gated = made.config.model_copy(update={"publishing": section})
    with pytest.raises(GateError, match=r"^publishing.max_loss: the held-out loss .* is over 0.5"):
        publish_with_ray(gated, made.train, there, made.dataset, report=print)
