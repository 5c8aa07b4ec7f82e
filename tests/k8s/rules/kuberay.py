"""What KubeRay v1.7.0 refuses or silently does, beyond its schema (`ray-operator/controllers/ray/utils/validation.go`, `common/pod.go`).

Fact numbers, here and in the other rules, are rows of docs/kubernetes-facts.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.k8s.manifests import Manifest, label, quantity, select

MODES = {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"}
LONGEST = {"RayJob": 47, "RayCluster": 53, "RayService": 47, "RayCronJob": 36}
START_RESOURCES = {"num-cpus", "num-gpus", "memory", "resources"}
GATED = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}


def check(objects: list[Manifest]) -> list[str]:
    found = []
    for kind in LONGEST:
        for item in select(objects, kind):
            found += [f"{label(item)}: {problem}" for problem in _name(item, kind)]
    for item in select(objects, "RayJob"):
        found += [f"{label(item)}: {problem}" for problem in _rayjob(item)]
    for item in select(objects, "RayCluster"):
        found += [f"{label(item)}: {problem}" for problem in _cluster(item["spec"])]
    found += [
        f"{label(item)}: RayCronJob loses Kueue's labels and replays missed ticks (facts 2, 3)"
        for item in select(objects, "RayCronJob")
    ]
    return found


def _name(item: Manifest, kind: str) -> Iterator[str]:
    name = item["metadata"]["name"]
    if len(name) > LONGEST[kind]:
        yield f"name is longer than {LONGEST[kind]} characters"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield "name is not a DNS-1035 label"


def _rayjob(item: Manifest) -> Iterator[str]:
    spec = item["spec"]
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in MODES:
        yield f"submissionMode {mode!r} does not exist (the schema lets it pass, fact 16)"
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "a suspended RayJob needs shutdownAfterJobFinishes"
    if spec.get("shutdownAfterJobFinishes") and "deletionRules" in spec.get("deletionStrategy", {}):
        yield "deletionRules are refused beside shutdownAfterJobFinishes (fact 1)"
    if spec.get("ttlSecondsAfterFinished", 0) and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("clusterSelector") and spec.get("backoffLimit", 0) > 0:
        yield "backoffLimit is refused with clusterSelector"
    if not spec.get("rayClusterSpec") and not spec.get("clusterSelector"):
        yield "one of rayClusterSpec and clusterSelector is needed"
    if mode == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        yield "backoffLimit is refused in InteractiveMode"
    if mode == "SidecarMode" and {"submitterPodTemplate", "submitterConfig", "clusterSelector"} & set(spec):
        yield "SidecarMode takes no submitterPodTemplate, submitterConfig or clusterSelector"
    if mode == "SidecarMode":
        yield "SidecarMode's container has no security context: refused by restricted pod security (fact 12)"
    if mode == "K8sJobMode" and "submitterPodTemplate" not in spec:
        yield "K8sJobMode without a hardened submitterPodTemplate is refused by restricted pod security (fact 12)"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if key in spec and spec[key] <= 0:
            yield f"{key} must be positive"
    if spec.get("backoffLimit", 0) < 0 or spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "backoffLimit and ttlSecondsAfterFinished must not be negative"
    if spec.get("preRunningDeadlineSeconds", 0) > spec.get("activeDeadlineSeconds", 10**12):
        yield "preRunningDeadlineSeconds beyond activeDeadlineSeconds never fires (both count from the same start, fact 9)"
    cluster = spec.get("rayClusterSpec") or {}
    if cluster.get("authOptions", {}).get("enableK8sTokenAuth"):
        yield "enableK8sTokenAuth is refused for RayJobs (fact 13)"
    if "upgradeStrategy" in cluster:
        yield "upgradeStrategy is refused on a RayJob's cluster"
    if "gcsFaultToleranceOptions" in cluster:
        yield "GCS fault tolerance does not save a job's driver: use it for long-lived clusters only"
    if cluster:
        yield from _cluster(cluster)


def _cluster(cluster: dict[str, Any]) -> Iterator[str]:
    autoscaled = bool(cluster.get("enableInTreeAutoscaling"))
    for key, gate in GATED.items():
        if key in cluster:
            yield f"{key} needs the alpha gate {gate} (fact 15)"
    auth = cluster.get("authOptions", {})
    if auth.get("mode") == "token" and not re.fullmatch(r"\d+\.\d+\.\d+", str(cluster.get("rayVersion", ""))):
        yield "rayVersion is required with token auth"
    if auth.get("mode") != "token":
        yield "authOptions.mode is not token: `ray start` only warns (fact 14)"
    if auth.get("enableK8sTokenAuth") and auth.get("secretName"):
        yield "enableK8sTokenAuth and secretName exclude each other"
    head = cluster["headGroupSpec"]
    if head.get("rayStartParams", {}).get("num-cpus") != "0":
        yield "headGroupSpec.rayStartParams.num-cpus is not '0': tasks would run on the head"
    if autoscaled and "securityContext" not in cluster.get("autoscalerOptions", {}):
        yield "autoscalerOptions.securityContext is missing: the pod is refused by restricted pod security (fact 12)"
    groups = [("head", head), *((group["groupName"], group) for group in cluster.get("workerGroupSpecs", []))]
    names = [name for name, _ in groups]
    if len(set(names)) < len(names):
        yield f"group names must differ and none may be 'head': {names}"
    for name, group in groups:
        yield from (f"{name}: {problem}" for problem in _group(group, autoscaled))
    for name, group in groups[1:]:
        yield from (f"{name}: {problem}" for problem in _replicas(group, autoscaled))


def _group(group: dict[str, Any], autoscaled: bool) -> Iterator[str]:
    params, pod = group.get("rayStartParams", {}), group["template"]["spec"]
    if START_RESOURCES & set(params) and group.get("resources"):
        yield "resources stand both in rayStartParams and in resources"
    if "labels" in params:
        yield "rayStartParams.labels is refused"
    if not pod.get("containers"):
        yield "no container"
        return
    if autoscaled and pod.get("restartPolicy", "Never") != "Never":
        yield "restartPolicy must be Never or unset with autoscaler v2"
    env = {entry["name"]: entry.get("value") for entry in pod["containers"][0].get("env", [])}
    for name in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_gcs_storage"):
        if name in env:
            yield f"{name} may not be set by hand"
    if not autoscaled and env.get("RAY_enable_autoscaler_v2") in ("1", "true"):
        yield "RAY_enable_autoscaler_v2 without enableInTreeAutoscaling is refused"
    shm = next(
        (
            volume.get("emptyDir", {}).get("sizeLimit", 0)
            for volume in pod.get("volumes", [])
            if volume["name"] == "shared-memory"
        ),
        0,
    )
    if not 0 < int(params.get("object-store-memory", 0)) <= quantity(shm):
        yield "rayStartParams.object-store-memory is not said or does not fit into /dev/shm: Ray would put the store on disk"
    if "app.kubernetes.io/name" in group["template"].get("metadata", {}).get("labels", {}):
        yield "app.kubernetes.io/name in a pod template replaces KubeRay's own label, on which services select"
    ports = [port["name"] for container in pod["containers"] for port in container.get("ports", [])]
    if any(len(port) > 15 for port in ports) or len(set(ports)) < len(ports):
        yield f"port names must differ and have at most 15 characters: {ports}"


def _replicas(group: dict[str, Any], autoscaled: bool) -> Iterator[str]:
    low, high = group.get("minReplicas"), group.get("maxReplicas")
    if low is None or high is None:
        if not autoscaled:
            yield "minReplicas and maxReplicas are required without autoscaling"
        return
    if not 0 <= low <= group.get("replicas", low) <= high:
        yield f"0 <= minReplicas <= replicas <= maxReplicas does not hold: {low}, {group.get('replicas')}, {high}"
    if not autoscaled and low != high:
        yield "a gang has a fixed size: minReplicas must equal maxReplicas without autoscaling"
    if "priority" in group:
        yield "priority is lost when Kueue 0.19 admits the job (fact 19)"
