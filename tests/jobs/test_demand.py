"""What the stages ask of a cluster that answers, by Ray's state API."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jobs.on_ray.demand import Node, check_cluster, check_joined, check_nodes
from pipeline.config.load import ConfigError, load_config

STAGES = ("prepare", "train")
NODE = {"state": "ALIVE", "resources_total": {"CPU": 1.0, "memory": 8e9}}
DEAD = {"state": "DEAD", "resources_total": {"CPU": 64.0, "GPU": 8.0, "memory": 8e9}}


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """A dashboard with one small node; `code` and `rows` are what it answers."""
    said: dict[str, object] = {"code": 200, "rows": [NODE, DEAD]}

    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path.startswith("/api/v0/nodes?")
            self.send_response(int(str(said["code"])))
            self.end_headers()
            self.wfile.write(json.dumps({"data": {"result": {"result": said["rows"]}}}).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{server.server_port}")
    yield said
    server.shutdown()
    server.server_close()


def test_a_cluster_that_is_too_small(answer: dict[str, object]) -> None:
    with pytest.raises(
        ConfigError, match=r"cluster.cpus_per_worker 1: http://127.0.0.1:\d+ has room for 1 of 2 workers"
    ):
        check_cluster(load_config("debug"), STAGES)
    with pytest.raises(ConfigError, match=r"cluster.use_gpu: .* 2 workers want a GPU each, and .* has 0"):
        check_cluster(load_config("debug", ["cluster.use_gpu=true"]), STAGES)
    check_cluster(load_config("debug"), ["prepare"])
    check_cluster(load_config("debug", ["cluster.grows=true"]), STAGES)
    answer["rows"] = [NODE, NODE]
    check_cluster(load_config("debug"), STAGES)


@pytest.mark.parametrize(
    ("kind", "able"), [("H100", True), ("", True), ("A100", False), ("AMD-Instinct-MI300X-OAM", False)]
)
def test_fp8_asked_of_gpus_without_it(answer: dict[str, object], kind: str, able: bool) -> None:
    there: dict[str, float] = {
        "CPU": 4.0,
        "GPU": 2.0,
        "memory": 8e9,
        **({f"accelerator_type:{kind}": 1.0} if kind else {}),
    }
    answer["rows"] = [NODE, {"state": "ALIVE", "resources_total": there}]
    config = load_config("debug", ["cluster.use_gpu=true", "training.expert_products=fp8"])
    check_cluster(load_config("debug", ["cluster.use_gpu=true"]), STAGES)
    check_cluster(config, ["prepare", "evaluate"])
    if able:
        check_cluster(config, STAGES)
        return
    with pytest.raises(
        ConfigError,
        match=rf"^training.expert_products fp8: http\S+ has 0 GPUs of 2 that multiply it \({kind} do not\); set it to",
    ):
        check_cluster(config, STAGES)


def test_an_elastic_run_begins_on_the_least(answer: dict[str, object]) -> None:
    mesh = "parallelism={shard: 2, elastic: {min_workers: %d}}"
    check_cluster(load_config("debug", [mesh % 1]), STAGES)
    with pytest.raises(ConfigError, match=r"has room for 1 of 2 workers; lower it, or parallelism.elastic.min_workers"):
        check_cluster(load_config("debug", [mesh % 2]), STAGES)


def test_a_cluster_that_does_not_say(answer: dict[str, object]) -> None:
    answer["code"] = 401
    check_cluster(load_config("debug"), STAGES)


def test_a_node_must_hold_a_whole_task() -> None:
    config = load_config("debug", ["cluster.prepare_cpus=3", "cluster.prepare_memory_bytes=2GB"])
    with pytest.raises(ConfigError, match=r"cluster.prepare_cpus 3: no node of here has more than 2 CPUs"):
        check_nodes(config, [Node(2, 0, 4e9), Node(2, 0, 4e9)], "here", ["prepare"])
    with pytest.raises(
        ConfigError, match=r"cluster.prepare_memory_bytes 2,000,000,000: no node of here has more than 1,0"
    ):
        check_nodes(config, [Node(4, 0, 1e9)], "here", ["prepare"])


def test_classifiers_have_room_beside_a_task() -> None:
    section = '{"function": "quality.edu:score", "version": "1", "min_score": 0.5}'
    config = load_config(
        "debug",
        [f"corpus.sources.0.rules.classifier={section}", "cluster.classifier_gpus=0.5", "cluster.classifier_actors=3"],
    )
    check_nodes(config, [Node(4, 2, 8e9)], "here", ["prepare"])
    with pytest.raises(
        ConfigError, match=r"cluster.classifier_gpus 0.5: here has 1 GPUs, and 3 actors of classifiers have no room"
    ):
        check_nodes(config, [Node(4, 1, 8e9)], "here", ["prepare"])
    with pytest.raises(
        ConfigError,
        match=r"cluster.classifier_cpus 1: here has 3 CPUs, and 3 actors of classifiers and a task of 1 have no",
    ):
        check_nodes(config, [Node(3, 2, 8e9)], "here", ["prepare"])
    check_nodes(config, [Node(3, 2, 8e9)], "here", ["train"])


def test_a_cluster_that_was_joined_gets_time_to_have_its_nodes() -> None:
    config = load_config("debug", ["cluster.use_gpu=true"])
    small, whole = [Node(4, 0, 8e9)], [Node(4, 0, 8e9), Node(4, 2, 8e9)]
    coming, paused = iter([small, small, whole]), list[float]()
    check_joined(config, STAGES, nodes=lambda: next(coming), pause=paused.append)
    assert len(paused) == 2
    with pytest.raises(ConfigError, match=r"2 workers want a GPU each, and the Ray cluster \(within 60 s\) has 0"):
        check_joined(config, STAGES, nodes=lambda: small, pause=paused.append)
    assert sum(paused[2:]) == 60
    check_joined(load_config("debug", ["cluster.use_gpu=true", "cluster.grows=true"]), STAGES, nodes=lambda: [])
    check_joined(config, ["publish"], nodes=lambda: small, pause=paused.append)
