"""The train stage on a real Ray: a worker dies, the group restarts from the checkpoint, the run ends as it should."""

import json
import os
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray.train import PreemptionInfo

from data_prep.records import PrepareProgress
from jobs.on_ray.gauges import TRAINING, PrepareGauges
from jobs.on_ray.train import PreemptionNotice, train_with_ray
from pipeline.storage import Storage
from pipeline.training.commits import ForeignCheckpoint
from pipeline.training.metrics import TrainProgress
from tests.distributed import run_distributed
from tests.training.make import Watched, tiny, tiny_dataset

ROOT = Path(__file__).parents[2]
PARALLELISM = {"shard": 2, "ep": 2}


@pytest.fixture(scope="module")
def cluster():
    """A small local Ray, unless one is running already."""
    if ray.is_initialized():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        env = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
        ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=10**8, runtime_env=env)
        yield
        ray.shutdown()


class DiesOnce:
    """A `report` that kills its worker at step 3, the first time."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def __call__(self, progress: TrainProgress) -> None:
        with (self.folder / "seen").open("a") as seen:
            seen.write(f"{progress.step} ")
        died = self.folder / "died"
        if progress.step == 3 and not died.exists():
            died.touch()
            os._exit(1)


RUN = "scraped"  # of its own: the agent also serves, for a while, what workers of earlier runs have left


def exported() -> dict[str, float]:
    """The series of `RUN` as Prometheus would read them from this node."""
    port = ray.nodes()[0]["MetricsExportPort"]
    text = urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name: sample.value for sample in samples if sample.labels.get("run") == RUN}


class ScrapesAtTheEnd:
    """A `report` that looks at the metrics endpoint after the last step, while its worker still lives."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "exported.json"

    def __call__(self, progress: TrainProgress) -> None:
        if progress.step == progress.steps:
            deadline = time.monotonic() + 60
            while (found := exported()).get("ray_moonlight_step") != progress.steps and time.monotonic() < deadline:
                time.sleep(0.2)
            self.path.write_text(json.dumps(found))


def without_ray(root: str):
    return Watched().train(tiny(root, parallelism=PARALLELISM))


def test_a_dead_worker_costs_no_more_than_an_interval(tmp_path, cluster):
    config = tiny(str(tmp_path / "ray"), parallelism=PARALLELISM, cluster={"max_failures": 2})
    storage = Storage(config.storage)
    manifest = train_with_ray(config, tiny_dataset(storage), storage, DiesOnce(str(tmp_path)))
    assert (tmp_path / "seen").read_text().split() == ["1", "2", "3", "3", "4"]  # the checkpoint of step 2 was used
    assert manifest.digest == run_distributed(without_ray, 2, str(tmp_path / "plain"))[0].digest
    assert manifest.checkpoint.fence == 2  # the group that was started again holds the lease at once

    foreign = tiny(str(tmp_path / "ray"), parallelism=PARALLELISM, optimizer__weight_decay=0.3)
    with pytest.raises(ForeignCheckpoint, match=r"optimizer.weight_decay is 0.3 here and 0.1 there"):
        train_with_ray(foreign, tiny_dataset(storage), storage, print)


def test_prometheus_sees_the_run(tmp_path, cluster):
    started = time.time()
    config = tiny(str(tmp_path), run_id=RUN)
    storage = Storage(config.storage)
    train_with_ray(config, tiny_dataset(storage), storage, ScrapesAtTheEnd(str(tmp_path)))
    found = json.loads((tmp_path / "exported.json").read_text())
    assert found.keys() == {f"ray_moonlight_{name}" for name in TRAINING}
    last = json.loads(storage.read(f"runs/{RUN}/train/metrics/00001000.jsonl").splitlines()[-1])
    stored = {
        name: last[name] for name in ("step", "tokens", "loss", "learning_rate", "gradient_norm", "skipped_steps")
    }
    assert {name: found[f"ray_moonlight_{name}"] for name in stored} == pytest.approx(stored)
    assert found["ray_moonlight_expert_load"] == pytest.approx(max(last["load_imbalance"]))
    assert found["ray_moonlight_steps"] == 4
    assert started < found["ray_moonlight_checkpoint_timestamp_seconds"] < time.time()


def test_prometheus_sees_prepare(cluster):
    at = PrepareProgress("tokenize", 3, 8, 0, documents=5, text_bytes=7, tokens=11, seconds=1.0)
    gauges = PrepareGauges(RUN, then=lambda _: None)
    gauges(at)
    wanted = {
        "ray_moonlight_prepare_units": 8,
        "ray_moonlight_prepare_units_done": 3,
        "ray_moonlight_prepare_tokens": 11,
    }
    deadline = time.monotonic() + 60
    while not wanted.items() <= exported().items() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert wanted.items() <= exported().items()


def test_a_drain_notice_is_a_request_to_stop(monkeypatch):
    """Ray is asked at every third step, by all ranks alike: its answer is a barrier."""
    answers = iter([None, PreemptionInfo(deadline_ms=12_000, preempted_node_to_ranks={"node": [1]})])
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: next(answers))
    notice = PreemptionNotice(every=3)
    assert [notice() for _ in range(6)] == [False, False, False, False, False, True]
