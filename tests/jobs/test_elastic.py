"""An elastic run on a real Ray of several nodes: two of four workers leave with their node, and come back later."""

from __future__ import annotations

import json
import socket
import threading
import time
import traceback
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision

from jobs.on_ray.elastic import SizedPolicy
from jobs.on_ray.train import train_with_ray
from pipeline.config.schema import RunConfig
from pipeline.storage import Storage
from pipeline.training.commits import train_folder
from pipeline.training.metrics import TrainProgress
from pipeline.workflow.record import read_events
from tests.distributed import run_distributed
from tests.training.make import Watched, tiny, tiny_dataset

ROOT = Path(__file__).parents[2]
STEPS, LEAVE, RETURN = 30, 9, 17
MESH = {"shard": 4, "ep": 2}
STEP_S = 110  # below what the watchdog allows
TIMEOUT_S = 280


class Told:
    """A `report` that meets the test at two steps: rank 0 says how far it is, and waits for what the test does to the cluster."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def __call__(self, progress: TrainProgress) -> None:
        world = ray.train.get_context().get_world_size()
        with (self.folder / "seen").open("a") as seen:
            seen.write(f"{progress.step}:{world} ")
        if (progress.step, world) == (LEAVE, 4) and not (self.folder / "gone").exists():
            (self.folder / "leave").touch()
            time.sleep(STEP_S)  # the group is killed meanwhile
        if progress.step >= RETURN and world == 2:
            (self.folder / "return").touch()
            wait_for(self.folder / "back", STEP_S)
            time.sleep(
                1.5
            )  # a slow step: the policy looks every half second, and one of the next is the last of this group


def wait_for(path: Path, seconds: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def cluster(monkeypatch):
    if ray.is_initialized():
        ray.shutdown()
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    head = {"num_cpus": 2, "include_dashboard": False, "dashboard_agent_listen_port": free_port()}
    made = Cluster(shutdown_at_exit=False, initialize_head=True, head_node_args=head)
    env = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    try:
        ray.init(address=made.address, runtime_env=env)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def curve(storage: Storage) -> list[float]:
    lines = storage.read(f"{train_folder('tiny')}/metrics/00001000.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    return [json.loads(line)["loss"] for line in lines]


def run_of(root: str, mesh: dict[str, object]) -> RunConfig:
    """At a third of the usual rate: at a higher one this smallest of networks makes 1e-4 of the last bits of a sum within 30 steps."""
    schedule = tiny(root, steps=STEPS).schedule.model_dump()
    schedule["learning_rate"] = [{**schedule["learning_rate"][0], "start": 0.003, "end": 0.0003}]
    return tiny(root, steps=STEPS, schedule=schedule, parallelism=mesh, training__micro_batch=1)


def undisturbed(root: str) -> None:
    Watched().train(run_of(root, MESH))


class Asked:
    """Stands in for the actor through which workers are asked to save."""

    def __init__(self) -> None:
        self.state, self.there = "", True

    def _put(self, state: str) -> bool:
        if not self.there:
            raise ray.exceptions.ActorUnavailableError("", None)
        self.state = state
        return True

    def ask(self) -> bool:
        return self._put("asked")

    def end(self) -> bool:
        return self._put("")

    def saved(self) -> bool:
        return self.state == "saved"


class Running:
    """What the policy is told of a group that trains."""

    def __init__(self, workers: int) -> None:
        self.num_workers, self.start_time = workers, 0.0


@pytest.fixture
def policy(monkeypatch):
    """For nodes of 4 CPUs; `policy.nodes` of them are there."""
    made = SizedPolicy(
        ScalingConfig(num_workers=(2, 12), elastic_resize_monitor_interval_s=0.0), (2, 4, 8, 12), Asked()
    )
    made.nodes = 2
    monkeypatch.setattr(made, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(made, "_look", lambda: None)
    monkeypatch.setattr(
        made, "_get_reserved_resources", lambda: {str(node): {"CPU": 4.0} for node in range(made.nodes)}
    )
    monkeypatch.setattr("jobs.on_ray.elastic.LOOK_S", 0.0)
    return made


def test_the_largest_size_that_fits_is_taken(policy):
    sizes = []
    for nodes in range(5):
        policy.nodes = nodes
        decision = policy.make_decision_for_non_running_worker_group()
        sizes.append(None if isinstance(decision, NoopDecision) else decision.num_workers)
    assert sizes == [None, 4, 8, 12, 12]
    policy.nodes = 3
    policy.scaling_config.resources_per_worker = {"CPU": 3}
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2  # one a node: three, of which one idles


def test_a_group_grows_when_it_has_saved(policy):
    def decide():
        decision = policy.make_decision_for_running_worker_group(Running(4), None)
        return None if isinstance(decision, NoopDecision) else decision.num_workers

    policy.nodes = 1
    assert (decide(), policy._pause.state) == (None, "")  # nothing has changed
    policy.nodes, policy._pause.there = 2, False
    assert (decide(), policy._pause.state) == (None, "")  # they cannot be asked just now
    policy._pause.there = True
    assert (decide(), policy._pause.state) == (None, "asked")
    assert (decide(), policy._pause.state) == (None, "asked")
    policy._pause.state, policy._pause.there = "saved", False
    assert decide() is None  # the next group would find that it is asked to pause
    policy._pause.there = True
    assert (decide(), policy._pause.state) == (8, "")


def test_workers_that_die_while_they_save_start_again(policy):
    policy.make_decision_for_running_worker_group(Running(4), None)
    assert policy._pause.state == "asked"
    policy._pause.there = False
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
    policy._pause.there = True
    assert policy.make_decision_for_non_running_worker_group().num_workers == 8
    assert policy._pause.state == ""


def test_a_group_that_does_not_answer_grows_without_a_checkpoint(policy, monkeypatch):
    monkeypatch.setattr("jobs.on_ray.elastic.SAVED_S", -1.0)
    assert isinstance(policy.make_decision_for_running_worker_group(Running(4), None), NoopDecision)
    assert policy.make_decision_for_running_worker_group(Running(4), None).num_workers == 8


def test_a_group_whose_room_shrank_is_made_smaller_at_once(policy):
    policy.nodes = 1
    assert policy.make_decision_for_running_worker_group(Running(8), None).num_workers == 4
    policy.nodes = 0
    assert isinstance(policy.make_decision_for_running_worker_group(Running(8), None), NoopDecision)


@pytest.mark.long
def test_two_of_four_workers_leave_and_come_back(tmp_path, cluster):
    config = run_of(str(tmp_path / "elastic"), {**MESH, "elastic": {"min_workers": 2, "look_every_s": 0.5}})
    assert config.sizes == (2, 4)
    storage = Storage(config.storage)
    dataset = tiny_dataset(storage)
    other = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    errors: list[BaseException] = []

    def change_the_cluster() -> None:
        try:
            wait_for(tmp_path / "leave")
            (tmp_path / "gone").touch()
            cluster.remove_node(other)
            wait_for(tmp_path / "return")
            cluster.add_node(num_cpus=3)  # room for five
            (tmp_path / "back").touch()
        except BaseException as error:
            errors.append(error)
            traceback.print_exc()
            (tmp_path / "back").touch()

    hand = threading.Thread(target=change_the_cluster, daemon=True)
    hand.start()
    manifest = train_with_ray(config, dataset, storage, Told(str(tmp_path)))
    hand.join(10)
    assert not errors
    seen = [tuple(map(int, each.split(":"))) for each in (tmp_path / "seen").read_text().split()]
    sizes = [
        size for size, before in zip([size for _, size in seen], [None, *(size for _, size in seen)]) if size != before
    ]
    assert sizes == [4, 2, 4]
    assert [event["workers"] for event in read_events(storage, "tiny") if event["event"] == "sized"] == [4, 2, 4]
    grown = [step for step, size in seen if size == 2][-1]
    assert [step for step, size in seen if size == 4 and step > LEAVE] == list(range(grown + 1, STEPS + 1))  # none lost
    run_distributed(undisturbed, 4, str(tmp_path / "whole"))
    whole = Storage(tiny(str(tmp_path / "whole")).storage)
    assert curve(storage) == pytest.approx(curve(whole), abs=1e-4)
    assert manifest.steps == STEPS
