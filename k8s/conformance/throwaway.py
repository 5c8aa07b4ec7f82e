"""A copy of an overlay in namespaces of its own, gone afterwards whatever happens in between.

Every object of the copy carries the label `moonlight.ai/conformance` with the copy's id, which also ends the names of its namespaces and of
what is not in a namespace. Its policies, queues and rights reach nothing without that label: bindings and queues select it, groups are renamed
(nobody is in them who is not impersonated), queues borrow from nobody. WorkloadPriorityClasses are the cluster's, since policies know them by
name; one that is missing is made and taken away again.
"""

from __future__ import annotations

import contextlib
import copy
import json
import signal
from collections.abc import Callable, Iterator
from typing import Any

from k8s.conformance.kubectl import Kubectl, Pause, Row, judged, wait_for

Manifest = dict[str, Any]
LABEL = "moonlight.ai/conformance"
SPACES = ("moonlight", "moonlight-submit")
IN_A_NAMESPACE = {
    "ServiceAccount", "Role", "RoleBinding", "ConfigMap", "Secret", "LimitRange", "ResourceQuota", "NetworkPolicy", "PodDisruptionBudget",
    "LocalQueue", "RayJob", "WorkflowTemplate",
}  # fmt: skip
ON_THE_CLUSTER = {
    "ValidatingAdmissionPolicyBinding", "ValidatingAdmissionPolicy", "ClusterRoleBinding", "ClusterRole", "ClusterQueue", "ResourceFlavor",
}  # fmt: skip
# The rest is left out: the submit cluster and node pools cost hardware, the schedule could be switched on, monitors would scrape.
PATIENCE_S = 300.0
KINDS = ",".join(
    f"{kind}.{group}"
    for group, kinds in {
        "admissionregistration.k8s.io": ("validatingadmissionpolicybindings", "validatingadmissionpolicies"),
        "rbac.authorization.k8s.io": ("clusterrolebindings", "clusterroles"),
        "kueue.x-k8s.io": ("clusterqueues", "resourceflavors", "workloadpriorityclasses"),
    }.items()
    for kind in kinds
)


def copied(objects: list[Manifest], ident: str) -> list[Manifest]:
    """The objects of the copy, in the order given."""
    found = []
    for item in objects:
        kind, metadata = item["kind"], item["metadata"]
        if kind in IN_A_NAMESPACE and metadata.get("namespace") in SPACES:
            made = copy.deepcopy(item)
            made["metadata"]["namespace"] += f"-{ident}"
        elif kind in ON_THE_CLUSTER or (kind == "Namespace" and metadata["name"] in SPACES):
            made = copy.deepcopy(item)
            made["metadata"]["name"] += f"-{ident}"
        else:
            continue
        made["metadata"].setdefault("labels", {})[LABEL] = ident
        _point(made, ident)
        found.append(made)
    return found


def priorities(objects: list[Manifest], ident: str) -> list[Manifest]:
    """The priority classes that the copy needs, under their own names."""
    found = [copy.deepcopy(item) for item in objects if item["kind"] == "WorkloadPriorityClass"]
    for item in found:
        item["metadata"].setdefault("labels", {})[LABEL] = ident
    return found


def _point(item: Manifest, ident: str) -> None:
    """References lead to what the copy has, selectors to nothing else."""
    kind, spec = item["kind"], item.get("spec", {})
    for subject in item.get("subjects", []):
        subject["name" if subject["kind"] == "Group" else "namespace"] += f"-{ident}"
    if item.get("roleRef", {}).get("kind") == "ClusterRole":
        item["roleRef"]["name"] += f"-{ident}"
    if kind == "ValidatingAdmissionPolicyBinding":
        spec["policyName"] += f"-{ident}"
        selector = "namespaceSelector" if "namespaceSelector" in spec.get("matchResources", {}) else "objectSelector"
        spec.setdefault("matchResources", {}).setdefault(selector, {}).setdefault("matchLabels", {})[LABEL] = ident
    if kind == "LocalQueue":
        spec["clusterQueue"] += f"-{ident}"
    if kind == "ClusterQueue":
        spec.pop("cohortName", None)
        spec.get("preemption", {}).pop("reclaimWithinCohort", None)
        spec["namespaceSelector"].setdefault("matchLabels", {})[LABEL] = ident
        for group in spec["resourceGroups"]:
            for flavor in group["flavors"]:
                flavor["name"] += f"-{ident}"
    if kind == "ResourceFlavor":
        spec.pop("topologyName", None)  # the copy has no Topology; dry runs ask for none


@contextlib.contextmanager
def throwaway(
    ask: Kubectl, objects: list[Manifest], ident: str, say: Callable[[Row], None], pause: Pause
) -> Iterator[list[Manifest]]:
    """The copy while it stands. `say` hears how its making and its removal went; raises RuntimeError if it cannot be made."""
    made = copied(objects, ident)
    try:
        present = ask(["get", "workloadpriorityclasses", "--output", "name"], None).text.split()
        there = {name.rpartition("/")[2] for name in present}
        made = [item for item in priorities(objects, ident) if item["metadata"]["name"] not in there] + made
        answer = ask(
            ["apply", "--server-side", "--filename", "-"],
            json.dumps({"apiVersion": "v1", "kind": "List", "items": made}),
        )
        say(judged(f"throw-away copy {ident} is made", answer.code == 0, answer.text if answer.code else ""))
        if answer.code:
            raise RuntimeError(answer.text)
        pause(10.0)  # the server learns of its policies by watches
        yield made
    finally:
        with _undisturbed():
            say(clean(ask, ident, pause))


def clean(ask: Kubectl, ident: str, pause: Pause) -> Row:
    """Take everything with this id away. Jobs first, while their operators may still let go of them, and templates before the policies on them."""
    spaces = [f"{space}-{ident}" for space in SPACES]
    ask(["delete", "rayjobs", "--all", "--namespace", spaces[0], "--ignore-not-found", "--wait=false"], None)

    def jobs() -> str:
        return ask(["get", "rayjobs", "--namespace", spaces[0], "--output", "name", "--ignore-not-found"], None).text

    wait_for(jobs, lambda text: not text.strip(), PATIENCE_S, pause)
    ask(["delete", "namespaces", *spaces, "--ignore-not-found", "--wait=false"], None)
    ask(["delete", KINDS, "--selector", f"{LABEL}={ident}", "--ignore-not-found", "--wait=false"], None)

    def left() -> str:
        answer = ask(
            ["get", f"namespaces,{KINDS}", "--selector", f"{LABEL}={ident}", "--output", "name", "--ignore-not-found"],
            None,
        )
        return " ".join(answer.text.split())

    remains = wait_for(left, lambda text: text == "", PATIENCE_S, pause)
    return judged(f"nothing of {ident} is left", remains == "", remains)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not leave half of it behind."""
    names = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(name, signal.SIG_IGN) for name in names]
    try:
        yield
    finally:
        for name, handler in zip(names, before, strict=True):
            signal.signal(name, handler)
