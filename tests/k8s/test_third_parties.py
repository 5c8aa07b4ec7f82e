"""Every chart key, variable and flag of other projects' software that we set is one that its pinned release knows (third_parties.json).

A chart takes any key and ignores those it has no template for, a container any variable: what is misspelt, or was renamed by a release, does
nothing and says nothing. The file holds, with its source, the release's own list: of charts the keys of each level that we touch ("*": free).
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.scripts import scripts

from tests.k8s.manifests import OVERLAYS, REPOSITORY, Manifest, needs_kubectl, pod_templates, render, select
from tests.k8s.test_overlays import overlay_of_somebody

FACTS = json.loads(Path(__file__).with_name("third_parties.json").read_text())
OPERATORS = {path.stem: path for path in (REPOSITORY / "k8s/gitops/operators").glob("*.yaml")}
CHARTS = {"kuberay": "kuberay-operator", "prometheus": "kube-prometheus-stack"}
FREE = {"resources", "nodeSelector", "labels", "annotations", "requests", "limits", "additionalLabels"}
# Chart's or image's version in the tree of the release's tag, where the project sets it when it publishes.
PUBLISHED_AS = {"karpenter": "1.14.1", "gpu-operator": "26.7.0"}
OURS = ("MOONLIGHT_",)
# What our own images and templates read: jobs/, the scripts of k8s/workflows, the shell of their commands.
OWN = {
    "STAGE", "CONFIG", "OVERRIDES", "RUN_ID", "INITIAL_WEIGHTS", "RUN", "STATUS", "SECONDS_TAKEN", "FAILURES", "CLUSTER", "POD", "HOME",
}  # fmt: skip
RUNS = {  # which programs' variables a container may set, by its name
    "ray-head": ("Ray", "PyTorch ProcessGroupNCCL", "NCCL", "libfabric"),
    "ray-worker": ("Ray", "PyTorch ProcessGroupNCCL", "NCCL", "libfabric"),
    "history-collector": ("KubeRay history collector",),
    "history-server": ("KubeRay history server",),
}


def unknown_keys(ours: Any, levels: dict[str, list[str]], where: str = "") -> Iterator[str]:
    if not isinstance(ours, dict) or where.rpartition(".")[2] in FREE:
        return
    known = levels.get(where)
    if known is None:
        yield f"{where or 'values'}: no fact about this level"
        return
    if known == ["*"]:
        return
    for key, value in ours.items():
        path = f"{where}.{key}".lstrip(".")
        if key not in known:
            yield f"{path}: the chart has no such key"
        elif isinstance(value, dict):
            yield from unknown_keys(value, levels, path)


def values(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(OPERATORS[name].read_text())["spec"]["source"]["helm"]["valuesObject"]
    return found


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_values_of_charts_are_keys_of_the_pinned_chart(name: str) -> None:
    assert list(unknown_keys(values(name), FACTS["charts"][CHARTS.get(name, name)]["keys"])) == []


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_facts_are_of_the_pinned_version(name: str) -> None:
    facts = FACTS["charts"][CHARTS.get(name, name)]
    pinned = yaml.safe_load(OPERATORS[name].read_text())["spec"]["source"]["targetRevision"].removeprefix("v")
    assert pinned in (facts["version"].removeprefix("v"), PUBLISHED_AS.get(name))
    assert pinned in facts["source"] or facts["version"].removeprefix("v") == pinned


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("argo-workflows", "controller.workflowNamespace"),
        ("argo-workflows", "controller.metricsConfig.honourLabels"),
        ("prometheus", "prometheus.prometheusSpec.storage"),
        ("kuberay", "metrics.serviceMonitors"),
        ("kueue", "managerConfig.controllerManagerConfig"),
    ],
)
def test_a_misspelt_key_is_found(name: str, path: str) -> None:
    changed = copy.deepcopy(values(name))
    *steps, last = path.split(".")
    place = changed
    for step in steps:
        place = place[step]
    place[last] = {}
    assert list(unknown_keys(changed, FACTS["charts"][CHARTS.get(name, name)]["keys"])) == [
        f"{path}: the chart has no such key"
    ]


def test_variables_of_operators_are_the_releases_own() -> None:
    for name, key, program in (
        ("kuberay", "env", "KubeRay operator"),
        ("argo-workflows", "controller.extraEnv", "Argo Workflows controller"),
    ):
        place: Any = values(name)
        for step in key.split("."):
            place = place[step]
        assert place
        for entry in place:
            assert entry["name"] in FACTS["programs"][program]["variables"], entry["name"]


@functools.cache
def _objects() -> list[Manifest]:
    """Every overlay, and the history server on prod."""
    digest = "0" * 64
    images = [f"{{name: kuberay-history-{name}, digest: 'sha256:{digest}'}}" for name in ("collector", "server")]
    lines = [
        "resources: [../overlays/prod]",
        "components: [../components/history-server]",
        f"images: [{', '.join(images)}]",
    ]
    found = [item for overlay in OVERLAYS for item in render(f"k8s/overlays/{overlay}")]
    with overlay_of_somebody("third-parties", lines) as folder:
        return found + render(folder)


def _set(objects: list[Manifest]) -> Iterator[tuple[str, str]]:
    """(container, variable) of everything that is set."""
    for item in objects:
        space = item["metadata"].get("namespace")
        for pod in pod_templates(item).values():
            for container in pod["spec"]["containers"] + pod["spec"].get("initContainers", []):
                for entry in container.get("env", []):
                    yield container["name"], entry["name"]
                for source in container.get("envFrom", []):
                    name = source.get("configMapRef", {}).get("name")
                    for config in select(objects, "ConfigMap", name, space) if name else ():
                        yield from ((container["name"], key) for key in config["data"])


@needs_kubectl
def test_variables_of_containers_are_their_programs_own() -> None:
    found = set(_set(_objects()))
    assert {name for name, _ in found} >= {"ray-head", "ray-worker", "logs", "history-collector", "history-server"}
    wrong = []
    for container, variable in sorted(found):
        known = OWN | {name for program in RUNS.get(container, ()) for name in FACTS["programs"][program]["variables"]}
        if variable not in known and not variable.startswith(OURS):
            wrong.append(f"{container}: {variable}")
    assert wrong == []


@needs_kubectl
def test_flags_of_the_history_server_are_the_releases_own() -> None:
    known = FACTS["programs"]["KubeRay history server"]["flags"]
    given = [
        argument.removeprefix("--").split("=")[0]
        for item in select(_objects(), "Deployment", "history-server")
        for argument in item["spec"]["template"]["spec"]["containers"][0]["args"]
    ]
    assert given
    assert set(given) <= set(known)


@needs_kubectl
def test_start_parameters_and_drain_flags_are_those_of_the_installed_ray() -> None:
    assert ray.__version__ == FACTS["programs"]["Ray"]["version"]

    def flags(command: Any) -> set[str]:
        return {name for parameter in command.params for name in parameter.opts}

    given = {
        f"--{key}"
        for item in _objects()
        if item["kind"] in ("RayJob", "RayCluster")
        for cluster in [item["spec"].get("rayClusterSpec") or item["spec"]]
        for group in [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
        for key in group["rayStartParams"]
    }
    assert given
    assert given <= flags(scripts.start)
    text = (REPOSITORY / "k8s/stages/train.yaml").read_text()
    hook = text[text.index("ray drain-node") : text.index("|| exit 0")]
    used = {word for word in hook.split() if word.startswith("--")}
    assert len(used) == 4
    assert used <= flags(scripts.drain_node)


@pytest.mark.parametrize("program", ["Ray", "PyTorch ProcessGroupNCCL"])
def test_facts_about_installed_packages_are_still_true(program: str) -> None:
    import torch

    if program == "Ray":
        root = Path(ray.__file__).parent
        text = "".join(
            path.read_text()
            for path in (
                root / "dashboard/modules/job/job_supervisor.py",
                *(root / "dashboard/modules/aggregator").rglob("*.py"),
            )
        )
        wanted = [name for name in FACTS["programs"]["Ray"]["variables"] if "AGGREGATOR" in name or "JOB_STOP" in name]
    else:
        header = Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp"
        text, wanted = header.read_text(), FACTS["programs"][program]["variables"]
    assert wanted
    assert [name for name in wanted if name not in text] == []
