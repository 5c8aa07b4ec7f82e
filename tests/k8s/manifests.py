"""The manifests as kustomize renders them, and the small helpers that every rule uses."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

Manifest = dict[str, Any]
REPOSITORY = Path(__file__).parents[2]
OVERLAYS = ("kind", "dev", "prod")
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@functools.cache
def _rendered(folder: str) -> str:
    done = subprocess.run(["kubectl", "kustomize", folder], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"kubectl kustomize {folder}: {done.stderr}"
    return done.stdout


@functools.cache
def _parsed(folder: str) -> list[Manifest]:
    return [item for item in yaml.load_all(_rendered(folder), Loader=yaml.CSafeLoader) if item]


def render(folder: str) -> list[Manifest]:
    """The objects of a kustomization, e.g. `k8s/overlays/prod`; the caller's to change."""
    return copy.deepcopy(_parsed(folder))


def find(objects: list[Manifest], kind: str, name: str | None = None, namespace: str | None = None) -> Manifest:
    """The one object of this kind and name."""
    found = list(select(objects, kind, name, namespace))
    assert len(found) == 1, f"{len(found)} objects {kind} {name} {namespace}"
    return found[0]


def select(
    objects: list[Manifest], kind: str, name: str | None = None, namespace: str | None = None
) -> Iterator[Manifest]:
    for item in objects:
        metadata = item["metadata"]
        if item["kind"] == kind and name in (None, metadata["name"]) and namespace in (None, metadata.get("namespace")):
            yield item


def label(item: Manifest) -> str:
    """Kind/namespace/name, as it is shown in problems."""
    metadata = item["metadata"]
    return "/".join(part for part in (item["kind"], metadata.get("namespace"), metadata["name"]) if part)


def is_custom(item: Manifest) -> bool:
    group = item["apiVersion"].split("/")[0] if "/" in item["apiVersion"] else ""
    return group.endswith((".io", ".sh", ".aws", ".com")) and not group.endswith(
        ("authorization.k8s.io", "networking.k8s.io", "registration.k8s.io")
    )


def pod_templates(item: Manifest) -> dict[str, dict[str, Any]]:
    """Every pod that an object leads to, by where it stands, as {"metadata", "spec"}. Argo's become what its controller makes of them."""
    kind, spec = item["kind"], item.get("spec", {})
    if kind == "RayJob":
        return _ray_pods(spec.get("rayClusterSpec") or {})
    if kind == "RayCluster":
        return _ray_pods(spec)
    if kind == "Deployment":
        return {"template": spec["template"]}
    if kind == "WorkflowTemplate":
        return {
            f"templates[{template['name']}]": {
                "metadata": copy.deepcopy(spec.get("podMetadata", {})),
                "spec": {
                    "serviceAccountName": spec.get("serviceAccountName"),
                    "automountServiceAccountToken": spec.get("automountServiceAccountToken"),
                    "securityContext": spec.get("securityContext", {}),
                    "volumes": spec.get("volumes", []),
                    "containers": [template.get("container") or template["script"]],
                },
            }
            for template in spec.get("templates", [])
            if "container" in template or "script" in template
        }
    return {}


def _ray_pods(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """With the containers that KubeRay v1.7.0 adds: wait-gcs-ready (copies the security context) and the autoscaler."""
    head = copy.deepcopy(cluster["headGroupSpec"]["template"])
    if cluster.get("enableInTreeAutoscaling"):
        options = cluster.get("autoscalerOptions", {})
        wanted = ("resources", "securityContext", "volumeMounts", "env")
        container = {key: options[key] for key in wanted if key in options}
        head["spec"]["containers"].append(
            {"name": "autoscaler", "image": head["spec"]["containers"][0]["image"], **container}
        )
    head.setdefault("metadata", {}).setdefault("labels", {}).update(
        {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head"}
    )
    pods = {"head": head}
    for group in cluster.get("workerGroupSpecs", []):
        pod = copy.deepcopy(group["template"])
        main = pod["spec"]["containers"][0]
        small = {"cpu": "200m", "memory": "256Mi"}
        wait = {"name": "wait-gcs-ready", "image": main["image"], "resources": {"limits": small, "requests": small}}
        pod["spec"].setdefault("initContainers", []).append(
            {**wait, **{key: main[key] for key in ("securityContext", "volumeMounts") if key in main}}
        )
        pod.setdefault("metadata", {}).setdefault("labels", {}).update(
            {"ray.io/is-ray-node": "yes", "ray.io/node-type": "worker"}
        )
        pods[f"worker group {group['groupName']}"] = pod
    return pods


def quantity(text: str | int | float) -> float:
    """A Kubernetes quantity as a number."""
    value = str(text)
    for suffix, factor in {
        "Ki": 2**10,
        "Mi": 2**20,
        "Gi": 2**30,
        "Ti": 2**40,
        "m": 1e-3,
        "k": 1e3,
        "M": 1e6,
        "G": 1e9,
    }.items():
        if value.endswith(suffix):
            return float(value.removesuffix(suffix)) * factor
    return float(value)


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
