"""What the stages ask of a Ray cluster, and whether it is there: a task that no node can run waits for ever, in silence."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from pipeline.config.load import ConfigError
from pipeline.config.schema import RunConfig
from pipeline.reach import PATIENCE_S, answers

# Kinds of GPUs, as Ray calls them, that multiply no e4m3 (fn); of one that is not told here a worker finds out (pipeline/model/devices.py).
WITHOUT_FP8 = frozenset({"K80", "P4", "P100", "V100", "T4", "A10", "A10G", "A30", "A40", "A100", "A800"})
OTHER_MAKERS = ("AMD-", "Intel-")
KIND = "accelerator_type:"
JOIN_S, PAUSE_S = 60.0, 2.0  # for the nodes of a cluster that has just been started


@dataclass(frozen=True)
class Node:
    cpus: float
    gpus: float
    memory: float  # bytes
    kind: str = ""  # of its GPUs, as Ray calls them; empty: not told

    @property
    def lacks_fp8(self) -> bool:
        return self.kind in WITHOUT_FP8 or self.kind.startswith(OTHER_MAKERS)


def this_machine(config: RunConfig) -> Node:
    """As the local cluster will be: its CPUs may be more than there are cores, its GPUs and memory may not."""
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    workers = config.cluster.cpus_per_worker * config.parallelism.world_size
    wanted = config.cluster.use_gpu or config.cluster.classifier_gpus > 0
    gpus = NvidiaGPUAcceleratorManager.get_current_node_num_accelerators() if wanted else 0
    kind = (NvidiaGPUAcceleratorManager.get_current_node_accelerator_type() if gpus else None) or ""
    return Node(max(workers, os.cpu_count() or 1), gpus, float(psutil.virtual_memory().total), kind)


def check_nodes(config: RunConfig, nodes: Sequence[Node], where: str, stages: Sequence[str]) -> None:
    """Raises ConfigError for the first thing that the stages want and the nodes do not have."""
    cluster, world = config.cluster, config.sizes[0]  # an elastic run begins with the least
    largest = max((node.cpus for node in nodes), default=0)
    if "prepare" in stages:
        if cluster.prepare_cpus > largest:
            raise ConfigError(
                f"cluster.prepare_cpus {cluster.prepare_cpus:g}: no node of {where} has more than {largest:g} CPUs; lower it"
            )
        memory = max((node.memory for node in nodes), default=0)
        if cluster.prepare_memory_bytes > memory:
            raise ConfigError(
                f"cluster.prepare_memory_bytes {cluster.prepare_memory_bytes:,}: no node of {where} has more than {memory:,.0f} bytes; lower it"
            )
        _check_classifiers(config, nodes, where)
    if not {"train", "evaluate"} & set(stages):
        return
    if cluster.use_gpu:
        gpus = int(sum(node.gpus for node in nodes))
        if gpus < world:
            raise ConfigError(
                f"cluster.use_gpu: {_workers(config)} = {world} workers want a GPU each, and {where} has {gpus}; "
                "lower them, set cluster.use_gpu=false, or use a cluster that has them (RAY_ADDRESS)"
            )
        lacking = {node.kind for node in nodes if node.gpus and node.lacks_fp8}
        able = int(sum(node.gpus for node in nodes if not node.lacks_fp8))
        if "train" in stages and config.training.expert_products == "fp8" and able < world:
            raise ConfigError(
                f"training.expert_products fp8: {where} has {able} GPUs of {world} that multiply it ({', '.join(sorted(lacking))} do not); set it "
                "to compute_dtype, or use a cluster of H100, H200, B200 or L40S"
            )
    room = sum(int(node.cpus // cluster.cpus_per_worker) for node in nodes)
    if room < world:
        raise ConfigError(
            f"cluster.cpus_per_worker {cluster.cpus_per_worker:g}: {where} has room for {room} of {world} workers; "
            f"lower it, or {_workers(config).replace(' * ', ' or ')}, or use a larger cluster"
        )


def _check_classifiers(config: RunConfig, nodes: Sequence[Node], where: str) -> None:
    """That their actors have room, and a task that reads units beside them."""
    functions = {source.rules.classifier.function for source in config.corpus.sources if source.rules.classifier}
    cluster, actors = config.cluster, len(functions) * config.cluster.classifier_actors
    if not actors:
        return
    for wanted, each, there, beside in (
        ("gpus", cluster.classifier_gpus, [node.gpus for node in nodes], 0.0),
        ("cpus", cluster.classifier_cpus, [node.cpus for node in nodes], cluster.prepare_cpus),
    ):
        room = sum(int(has / each + 1e-9) if each else actors for has in there)
        if room < actors or actors * each + beside > sum(there) + 1e-9:
            raise ConfigError(
                f"cluster.classifier_{wanted} {each:g}: {where} has {sum(there):g} {wanted[:-1].upper()}s, and {actors} actors of classifiers"
                f"{f' and a task of {beside:g}' if beside else ''} have no room; lower it, or cluster.classifier_actors, or use a larger cluster"
            )


def _workers(config: RunConfig) -> str:
    """What says how many there must be."""
    return "parallelism.replicate * shard" if config.parallelism.elastic is None else "parallelism.elastic.min_workers"


def check_joined(
    config: RunConfig,
    stages: Sequence[str],
    *,
    nodes: Callable[[], list[Node]],
    patience_s: float = JOIN_S,
    pause: Callable[[float], object] = time.sleep,
) -> None:
    """Of a cluster that this process has joined, whose nodes may still be coming. Raises ConfigError after `patience_s` seconds."""
    if config.cluster.grows:
        return
    waited = 0.0
    while True:
        try:
            return check_nodes(config, nodes(), f"the Ray cluster (within {patience_s:.0f} s)", stages)
        except ConfigError:
            if waited >= patience_s:
                raise
        pause(PAUSE_S)
        waited += PAUSE_S


def joined_nodes() -> list[Node]:
    """The live nodes of the Ray cluster of this process."""
    import ray

    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [_node(resources) for resources in found]


def check_cluster(config: RunConfig, stages: Sequence[str]) -> None:
    """Ask the cluster that a driver would use, at RAY_ADDRESS or of this machine. Raises ConfigError within seconds.

    Of a cluster that grows by itself (`cluster.grows`) only an answer is wanted; one that has to be joined to be asked is
    asked once it is (`check_joined`).
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        check_nodes(config, [this_machine(config)], "this machine", stages)
    elif address.startswith("http"):
        nodes = _nodes(address)
        if nodes is not None and not config.cluster.grows:
            check_nodes(config, nodes, address, stages)
    elif address not in ("auto", "local"):
        answers(
            address if "://" in address else f"ray://{address}",
            "RAY_ADDRESS",
            "the address of a running Ray cluster, or unset it",
        )


def _nodes(address: str) -> list[Node] | None:
    """The live nodes, by Ray's state API; None where it answers but does not say: behind a proxy, or with a token that only Ray's client reads."""
    answers(address, "RAY_ADDRESS", "the address of a running Ray dashboard (http://head:8265), or unset it")
    headers = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"} if os.environ.get("RAY_AUTH_TOKEN") else {}
    request = urllib.request.Request(f"{address.rstrip('/')}/api/v0/nodes?limit=10000&detail=1", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            found: Any = json.load(answer)
        rows = found["data"]["result"]["result"]
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"RAY_ADDRESS {address}: no Ray dashboard answers there ({type(error).__name__}: {error}); correct or unset it"
        ) from None
    resources = [row.get("resources_total") or {} for row in rows if row.get("state") == "ALIVE"]
    return [_node(each) for each in resources]


def _node(resources: dict[str, float]) -> Node:
    kind = next((name.removeprefix(KIND) for name in resources if name.startswith(KIND)), "")
    return Node(resources.get("CPU", 0), resources.get("GPU", 0), resources.get("memory", 0), kind)
