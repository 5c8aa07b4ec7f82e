"""Network policies: everything shut by default, every needed hole there, no hole wider than listed."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Any

from tests.k8s.manifests import Manifest, label, select

METADATA_SERVICE = ipaddress.ip_address("169.254.169.254")
POD_IDENTITY = ipaddress.ip_address("169.254.170.23")
WORKSPACES = ("moonlight", "moonlight-submit")


def check(objects: list[Manifest]) -> list[str]:
    found = []
    for namespace in WORKSPACES:
        policies = list(select(objects, "NetworkPolicy", None, namespace))
        found += [f"NetworkPolicy/{namespace}: {problem}" for problem in _workspace(policies)]
        for policy in policies:
            found += [f"{label(policy)}: {problem}" for problem in _policy(policy["spec"])]
    return found


def _workspace(policies: list[Manifest]) -> Iterator[str]:
    specs = [policy["spec"] for policy in policies]
    if not any(
        spec["podSelector"] == {}
        and set(spec["policyTypes"]) == {"Ingress", "Egress"}
        and not spec.get("ingress")
        and not spec.get("egress")
        for spec in specs
    ):
        yield "no default deny of ingress and egress"
    head, nodes = {"ray.io/node-type": "head"}, {"ray.io/is-ray-node": "yes"}
    if not _opens(specs, "ingress", head, 8265, "kuberay-system"):
        yield "KubeRay cannot reach the head's port 8265: no job would ever be submitted"
    for port in (8080, 44217, 44227):
        if not _opens(specs, "ingress", nodes, port, "monitoring"):
            yield f"Prometheus cannot reach port {port}"
    for protocol in ("UDP", "TCP"):
        if not _opens(specs, "egress", {}, 53, "kube-system", protocol):
            yield f"no DNS over {protocol}"
    if not any(
        spec["podSelector"].get("matchLabels") == nodes and spec.get("ingress") and spec.get("egress") for spec in specs
    ):
        yield "Ray's nodes cannot talk to each other"
    if not any(
        _reaches(peer, POD_IDENTITY) and 80 in _ports(rule)
        for spec in specs
        for rule in spec.get("egress", [])
        for peer in rule.get("to", [])
    ):
        yield "the Pod Identity agent cannot be reached: no stage would have its role"
    if not any(443 in _ports(rule) for spec in specs for rule in spec.get("egress", [])):
        yield "object storage cannot be reached"
    if not any(
        spec["podSelector"].get("matchLabels") == {"moonlight.ai/api-access": "true"}
        and any(6443 in _ports(rule) for rule in spec.get("egress", []))
        for spec in specs
    ):
        yield "pods with a token cannot reach an API server on 6443"


def _opens(
    specs: list[dict[str, Any]], direction: str, pods: dict[str, str], port: int, namespace: str, protocol: str = "TCP"
) -> bool:
    peers = "from" if direction == "ingress" else "to"
    return any(
        spec["podSelector"].get("matchLabels", {}) == pods
        and {"protocol": protocol, "port": port} in rule.get("ports", [])
        and any(
            peer.get("namespaceSelector", {}).get("matchLabels", {}).get("kubernetes.io/metadata.name") == namespace
            for peer in rule.get(peers, [])
        )
        for spec in specs
        for rule in spec.get(direction, [])
    )


def _ports(rule: dict[str, Any]) -> set[int]:
    return {entry["port"] for entry in rule.get("ports", [])}


def _reaches(peer: dict[str, Any], address: Any) -> bool:
    block = peer.get("ipBlock")
    if block is None:
        return False
    return address in ipaddress.ip_network(block["cidr"]) and not any(
        address in ipaddress.ip_network(hole) for hole in block.get("except", [])
    )


def _policy(spec: dict[str, Any]) -> Iterator[str]:
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        for rule in spec.get(direction, []):
            if not rule.get(peers):
                yield f"{direction} without {peers}: open to everybody"
            inside = all("podSelector" in peer and "namespaceSelector" not in peer for peer in rule.get(peers, []))
            if not rule.get("ports") and not inside:
                yield f"{direction} on every port"
            for peer in rule.get(peers, []):
                if _reaches(peer, METADATA_SERVICE):
                    yield "the node's metadata service can be reached: its role is the node's"
                if direction == "ingress" and "ipBlock" in peer:
                    yield "ingress from addresses: dashboards are reached by port-forward"
                if peer.get("namespaceSelector") == {}:
                    yield f"{direction} {peers} every namespace"
