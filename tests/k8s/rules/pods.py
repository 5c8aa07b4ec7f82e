"""Pods, unwrapped from whatever makes them: the restricted Pod Security Standard, and what we ask beyond it.

Other scanners see nothing inside a RayJob (fact 18), so the pods are taken out first (`manifests.pod_templates`).
Source: kubernetes.io/docs/concepts/security/pod-security-standards, profile restricted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.k8s.manifests import Manifest, label, pod_templates

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
CAPABILITIES = {"NET_BIND_SERVICE"}
DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")


def check(objects: list[Manifest], digests: bool = False) -> list[str]:
    found = []
    for item in objects:
        for place, pod in pod_templates(item).items():
            found += [
                f"{label(item)} {place}: {problem}"
                for problem in [*restricted(pod["spec"]), *_ours(pod, item, place, digests)]
            ]
    return found


def _containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("containers", []), *pod.get("initContainers", [])]


def restricted(pod: dict[str, Any]) -> Iterator[str]:
    """What the restricted profile refuses in a pod's spec."""
    security = pod.get("securityContext", {})
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(key):
            yield f"{key} is set"
    for volume in pod.get("volumes", []):
        if kinds := set(volume) - {"name"} - VOLUMES:
            yield f"volume {volume['name']}: {', '.join(kinds)} is not allowed"
    for container in _containers(pod):
        own, name = container.get("securityContext", {}), container["name"]
        if own.get("privileged"):
            yield f"{name}: privileged"
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{name}: allowPrivilegeEscalation is not false"
        if "ALL" not in own.get("capabilities", {}).get("drop", []):
            yield f"{name}: capabilities are not dropped"
        if set(own.get("capabilities", {}).get("add", [])) - CAPABILITIES:
            yield f"{name}: capabilities are added"
        if own.get("runAsNonRoot", security.get("runAsNonRoot")) is not True:
            yield f"{name}: runAsNonRoot is not true"
        if own.get("runAsUser", security.get("runAsUser")) == 0:
            yield f"{name}: runs as root"
        if own.get("seccompProfile", security.get("seccompProfile", {})).get("type") not in (
            "RuntimeDefault",
            "Localhost",
        ):
            yield f"{name}: no seccomp profile"
        if own.get("procMount", "Default") != "Default":
            yield f"{name}: procMount"
        if any("hostPort" in port for port in container.get("ports", [])):
            yield f"{name}: hostPort"


def _ours(pod: dict[str, Any], item: Manifest, place: str, digests: bool) -> Iterator[str]:
    spec = pod["spec"]
    mounts_token = spec.get("automountServiceAccountToken")
    if mounts_token is None:
        yield "automountServiceAccountToken is not said"
    wants_api = pod.get("metadata", {}).get("labels", {}).get("moonlight.ai/api-access") == "true"
    if mounts_token and not wants_api:
        yield "a token is mounted but the label moonlight.ai/api-access is missing: the network policy would shut the pod off"
    if wants_api and not mounts_token:
        yield "moonlight.ai/api-access without a token"
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    for container in _containers(spec):
        name = container["name"]
        if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
            yield f"{name}: readOnlyRootFilesystem is not true"
        mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
        if "/tmp" not in mounts:
            yield f"{name}: with a read-only root /tmp must be a volume"
        for mount in set(mounts.values()) - volumes:
            yield f"{name}: no volume {mount}"
        resources = container.get("resources", {})
        if not {"cpu", "memory"} <= set(resources.get("requests", {})) or "memory" not in resources.get("limits", {}):
            yield f"{name}: requests (cpu, memory) and a memory limit are required"
        for key in ("nvidia.com/gpu", "vpc.amazonaws.com/efa"):
            if resources.get("requests", {}).get(key) != resources.get("limits", {}).get(key):
                yield f"{name}: {key} must be the same in requests and limits"
        if digests and not DIGEST.search(container["image"]):
            yield f"{name}: image {container['image']} is not given by digest"
        for entry in container.get("env", []):
            if re.search(r"TOKEN|PASSWORD|SECRET|ACCESS_KEY", entry["name"]) and entry.get("value", "true") != "true":
                yield f"{name}: {entry['name']} is a literal"
    if item["kind"] in ("RayJob", "RayCluster"):
        yield from _ray(pod, item, place)


def _ray(pod: dict[str, Any], item: Manifest, place: str) -> Iterator[str]:
    spec, labels = pod["spec"], pod.get("metadata", {}).get("labels", {})
    annotations = pod.get("metadata", {}).get("annotations", {})
    main = spec["containers"][0]
    if {mount["mountPath"]: mount["name"] for mount in main["volumeMounts"]}.get("/dev/shm") is None:
        yield "/dev/shm is not a volume: 64 MiB are too few for Ray's object store and NCCL"
    shm = next((volume for volume in spec["volumes"] if volume["name"] == "shared-memory"), {})
    if shm.get("emptyDir", {}).get("medium") != "Memory" or "sizeLimit" not in shm.get("emptyDir", {}):
        yield "shared-memory must be a memory emptyDir with a size limit"
    if "moonlight.ai/stage" not in labels:
        yield "label moonlight.ai/stage is missing"
    if spec.get("terminationGracePeriodSeconds", 0) < 60:
        yield "terminationGracePeriodSeconds is under 60"
    fixed = not (item["spec"].get("rayClusterSpec") or {}).get("enableInTreeAutoscaling")
    if place == "head" or fixed:
        for key, value in (
            ("karpenter.sh/do-not-disrupt", "true"),
            ("cluster-autoscaler.kubernetes.io/safe-to-evict", "false"),
        ):
            if annotations.get(key) != value:
                yield f"annotation {key}: {value!r} is missing: consolidation would evict it"
    if place == "head":
        ports = {port["name"]: port["containerPort"] for port in main.get("ports", [])}
        wanted = {"metrics": 8080, "as-metrics": 44217, "dash-metrics": 44227}
        if wanted.items() - ports.items():
            yield f"ports for metrics are missing: {sorted(dict(wanted.items() - ports.items()))}"
    if (
        place == "head"
        and item["kind"] == "RayJob"
        and "logs" not in [container["name"] for container in spec["containers"]]
    ):
        yield "no container logs: Ray's logs would go with the cluster"
    if labels.get("moonlight.ai/stage") in ("prepare", "train") and place != "head":
        hook = " ".join(main.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", []))
        if "ray drain-node" not in hook:
            yield "preStop does not drain the node"
        seconds = [int(number) for number in re.findall(r"deadline-remaining-seconds (\d+)", hook)]
        if seconds and seconds[0] >= spec["terminationGracePeriodSeconds"]:
            yield "the drain deadline does not fit into the grace period"
