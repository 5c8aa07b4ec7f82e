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
from jobs.on_ray.gauges import LABELS, PREPARING, SCORES, TRAINING, PrepareGauges
from jobs.on_ray.train import PreemptionNotice, train_with_ray
from jobs.views.live import watched
from pipeline.storage import Storage
from pipeline.training.commits import ForeignCheckpoint
from pipeline.training.metrics import TrainProgress
from pipeline.training.times import PHASES
from tests.distributed import run_distributed
from tests.report.make import score, settings
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
Series = dict[tuple[str, ...], float]  # by name and the values of its labels


def exported() -> Series:
    """The series of `RUN` as Prometheus would read them from this node."""
    port = ray.nodes()[0]["MetricsExportPort"]
    text = urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        (name, *(sample.labels[label] for label in LABELS.get(name, ()))): sample.value
        for sample in samples
        if sample.labels.get("run") == RUN
        for name in [sample.name.removeprefix("ray_moonlight_")]
    }


def exports(wanted: Series) -> Series:
    """What is exported once all of `wanted` is."""
    deadline = time.monotonic() + 240
    while not wanted.items() <= (found := exported()).items() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert wanted.items() <= found.items()
    return found


def without_ray(root: str):
    return Watched().train(tiny(root, run_id=RUN, parallelism=PARALLELISM))


def test_a_dead_worker_costs_no_more_than_an_interval(tmp_path, cluster):
    config = tiny(str(tmp_path / "ray"), run_id=RUN, parallelism=PARALLELISM, cluster={"max_failures": 2})
    storage = Storage(config.storage)
    manifest = train_with_ray(config, tiny_dataset(storage), storage, DiesOnce(str(tmp_path)))
    assert (tmp_path / "seen").read_text().split() == ["1", "2", "3", "3", "4"]  # the checkpoint of step 2 was used
    assert manifest.digest == run_distributed(without_ray, 2, str(tmp_path / "plain"))[0].digest
    assert manifest.checkpoint.fence == 2  # the group that was started again holds the lease at once

    foreign = tiny(str(tmp_path / "ray"), run_id=RUN, parallelism=PARALLELISM, optimizer__weight_decay=0.3)
    with pytest.raises(ForeignCheckpoint, match=r"optimizer.weight_decay is 0.3 here and 0.1 there"):
        train_with_ray(foreign, tiny_dataset(storage), storage, print)


def test_gauges_outlive_the_workers(tmp_path, cluster):
    """Both groups of workers are gone, and Prometheus sees the run still: the driver lives."""
    started = time.time()
    config = tiny(str(tmp_path / "ray"), run_id=RUN, parallelism=PARALLELISM, cluster={"max_failures": 2})
    storage = Storage(config.storage)
    with watched("train", storage, RUN):
        train_with_ray(config, tiny_dataset(storage), storage, DiesOnce(str(tmp_path)))
    found = exports({("step",): 4, ("attempts",): 2, ("steps",): 4})
    last = json.loads(storage.read(f"runs/{RUN}/train/metrics/00001000.jsonl").splitlines()[-1])
    names = ("tokens", "loss", "learning_rate", "bias_rate", "global_batch", "gradient_norm", "skipped_steps", "spikes")
    assert {name: found[name,] for name in names} == pytest.approx({name: last[name] for name in names})
    assert found["expert_load",] == pytest.approx(max(last["load_imbalance"]))
    assert started < found["checkpoint_timestamp_seconds",] < time.time()
    assert {phase for name, *labels in found if name == "step_seconds" for phase in labels} == set(PHASES)
    assert sum(name == "slowest_rank_seconds" for name, *_ in found) >= 1
    assert sum(value for (name, *_), value in found.items() if name == "goodput_seconds") > 0
    known_here = {*TRAINING} - {"mfu"}  # no processor of a test has a peak that is known
    assert {name for name, *_ in found} - {"mfu"} == known_here


def test_prometheus_sees_prepare_and_scores(cluster, tmp_path):
    at = PrepareProgress("tokenize", 3, 8, 0, documents=5, text_bytes=7, tokens=11, seconds=1.0)
    PrepareGauges(RUN, then=lambda _: None)(at)
    storage = Storage(tiny(str(tmp_path)).storage)
    settings(storage, RUN)
    score(storage, RUN, 40, 5.2)
    with watched("evaluate", storage, RUN):
        score(storage, RUN, 80, 4.7)
    wanted = {"units": 8, "units_done": 3, "units_failed": 0, "documents": 5, "text_bytes": 7, "tokens": 11}
    series = {(f"prepare_{name}",): float(value) for name, value in wanted.items()}
    series |= {("evaluation_step",): 80, ("evaluation_loss", "all"): 4.7, ("evaluation_loss", "code"): 4.7}
    found = exports(series)
    assert {*PREPARING, *SCORES} <= {name for name, *_ in found}


def test_a_drain_notice_is_a_request_to_stop(monkeypatch):
    """Ray is asked at every third step, by all ranks alike: its answer is a barrier."""
    answers = iter([None, PreemptionInfo(deadline_ms=12_000, preempted_node_to_ranks={"node": [1]})])
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: next(answers))
    notice = PreemptionNotice(every=3)
    assert [notice() for _ in range(6)] == [False, False, False, False, False, True]
