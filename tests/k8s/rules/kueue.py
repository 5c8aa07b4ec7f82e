"""What Kueue 0.19.2 refuses or never admits, beyond its schema: webhook rules, coverage, and whether each stage fits its queue.

The placement is Kueue's in small: for each pod set the first flavor of the queue whose labels do not contradict the pod's
nodeSelector, whose taints are tolerated, and whose quota (own and the cohort's) holds the set. Sources:
`pkg/controller/jobs/raycluster/{common,raycluster_webhook}.go`, `pkg/cache/.../flavorassigner`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from pipeline.workflow.rayjobs_template import ELASTIC_ANNOTATION, QUEUE_ANNOTATION, QUEUE_LABEL
from tests.k8s.manifests import Manifest, label, pod_templates, quantity, select

MAX_PODSETS = 18
TOPOLOGY = ("kueue.x-k8s.io/podset-required-topology", "kueue.x-k8s.io/podset-preferred-topology")
DEFAULT_QUEUE = "default"


def check(objects: list[Manifest]) -> list[str]:
    found = []
    for job in select(objects, "RayJob"):
        found += [f"{label(job)}: {problem}" for problem in [*_webhook(job), *_fits(objects, job)]]
    for queue in select(objects, "LocalQueue"):
        if queue["metadata"]["name"] == DEFAULT_QUEUE:
            found.append(
                f"{label(queue)}: a LocalQueue named default takes every unlabelled RayJob, templates included"
            )
        if not list(select(objects, "ClusterQueue", queue["spec"]["clusterQueue"])):
            found.append(f"{label(queue)}: no ClusterQueue {queue['spec']['clusterQueue']}")
    for queue in select(objects, "ClusterQueue"):
        found += [f"{label(queue)}: {problem}" for problem in _cluster_queue(objects, queue)]
    for check_ in select(objects, "AdmissionCheck"):
        parameters = check_["spec"].get("parameters", {})
        if not list(select(objects, parameters.get("kind", ""), parameters.get("name", ""))):
            found.append(f"{label(check_)}: no {parameters.get('kind')} {parameters.get('name')}")
    return found


def _webhook(job: Manifest) -> Iterator[str]:
    """As if it were queued: templates are judged by what their copies will be."""
    spec, annotations = job["spec"], job["metadata"].get("annotations", {})
    cluster = spec.get("rayClusterSpec") or {}
    if not spec.get("shutdownAfterJobFinishes"):
        yield "a queued RayJob needs shutdownAfterJobFinishes (fact 1)"
    if spec.get("clusterSelector"):
        yield "clusterSelector: the job would not be tracked"
    if spec.get("managedBy"):
        yield "managedBy is for MultiKueue only"
    groups = cluster.get("workerGroupSpecs", [])
    if 1 + len(groups) > MAX_PODSETS:
        yield f"{1 + len(groups)} pod sets are more than {MAX_PODSETS}"
    if any(group["groupName"] == "head" for group in groups):
        yield "a worker group may not be called head"
    elastic = annotations.get(ELASTIC_ANNOTATION) == "true"
    if cluster.get("enableInTreeAutoscaling") and not elastic:
        yield f"autoscaling needs the annotation {ELASTIC_ANNOTATION}"
    if elastic and not cluster.get("enableInTreeAutoscaling"):
        yield f"{ELASTIC_ANNOTATION} without autoscaling"
    for place, pod in pod_templates(job).items():
        annotations = pod.get("metadata", {}).get("annotations", {})
        if QUEUE_LABEL in pod.get("metadata", {}).get("labels", {}):
            yield f"{place}: the queue label belongs on the RayJob only"
        if all(key in annotations for key in TOPOLOGY):
            yield f"{place}: both required and preferred topology"
        if "kueue.x-k8s.io/podset-group-name" in annotations:
            yield f"{place}: head and workers have different flavors and cannot be one topology group"


def _cluster_queue(objects: list[Manifest], queue: Manifest) -> Iterator[str]:
    spec = queue["spec"]
    selector = spec.get("namespaceSelector")
    if not selector:
        yield "namespaceSelector is missing: the default selects nothing"
    elif not any(_selects(selector, item["metadata"].get("labels", {})) for item in select(objects, "Namespace")):
        yield "namespaceSelector selects none of our namespaces"
    if spec.get("stopPolicy", "None") != "None":
        yield "stopPolicy is committed: the queue would admit nothing"
    for group in spec.get("resourceGroups", []):
        for flavor in group["flavors"]:
            if not list(select(objects, "ResourceFlavor", flavor["name"])):
                yield f"no ResourceFlavor {flavor['name']}"
            if [resource["name"] for resource in flavor["resources"]] != group["coveredResources"]:
                yield f"flavor {flavor['name']} must list exactly the covered resources, in their order"
    for entry in spec.get("admissionChecksStrategy", {}).get("admissionChecks", []):
        if not list(select(objects, "AdmissionCheck", entry["name"])):
            yield f"no AdmissionCheck {entry['name']}"


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


# -- does it fit? ----------------------------------------------------------------------------------------------------


def _fits(objects: list[Manifest], job: Manifest) -> Iterator[str]:
    metadata = job["metadata"]
    name = metadata.get("labels", {}).get(QUEUE_LABEL) or metadata.get("annotations", {}).get(QUEUE_ANNOTATION)
    local = next(select(objects, "LocalQueue", name, metadata.get("namespace")), None)
    if local is None:
        yield f"no LocalQueue {name!r} in namespace {metadata.get('namespace')}"
        return
    queue = next(select(objects, "ClusterQueue", local["spec"]["clusterQueue"]), None)
    if queue is None:
        return
    used: dict[tuple[str, str], float] = defaultdict(float)
    counts = {
        f"worker group {group['groupName']}": group.get("maxReplicas", 1)
        for group in job["spec"]["rayClusterSpec"].get("workerGroupSpecs", [])
    }
    for place, pod in pod_templates(job).items():
        wants = _requests(pod["spec"])
        refused = []
        for flavor in _flavors(objects, queue):
            reason = _try(
                objects, queue, flavor, pod, {key: value * counts.get(place, 1) for key, value in wants.items()}, used
            )
            if reason is None:
                break
            refused.append(f"{flavor['metadata']['name']}: {reason}")
        else:
            yield f"{place} fits no flavor of {queue['metadata']['name']} ({'; '.join(refused)})"


def _requests(pod: dict[str, Any]) -> dict[str, float]:
    """Requests of a pod: the sum of its containers, or the largest init container if that is more."""
    total: dict[str, float] = defaultdict(float)
    for container in pod["containers"]:
        resources = container.get("resources", {})
        for key, value in {**resources.get("limits", {}), **resources.get("requests", {})}.items():
            total[key] += quantity(value)
    for container in pod.get("initContainers", []):
        for key, value in container.get("resources", {}).get("requests", {}).items():
            total[key] = max(total[key], quantity(value))
    return dict(total)


def _flavors(objects: list[Manifest], queue: Manifest) -> Iterator[Manifest]:
    for group in queue["spec"]["resourceGroups"]:
        for flavor in group["flavors"]:
            yield from select(objects, "ResourceFlavor", flavor["name"])


def _try(
    objects: list[Manifest],
    queue: Manifest,
    flavor: Manifest,
    pod: dict[str, Any],
    wants: dict[str, float],
    used: dict[tuple[str, str], float],
) -> str | None:
    """Why the pod set cannot take this flavor; None if it can, and then its share is taken."""
    name, spec = flavor["metadata"]["name"], flavor["spec"]
    labels, selector = spec.get("nodeLabels", {}), pod["spec"].get("nodeSelector", {})
    if any(key in labels and labels[key] != value for key, value in selector.items()):
        return "nodeSelector"
    tolerations = pod["spec"].get("tolerations", []) + spec.get("tolerations", [])
    for taint in spec.get("nodeTaints", []):
        if not any(_tolerates(toleration, taint) for toleration in tolerations):
            return f"taint {taint['key']}"
    annotations = pod.get("metadata", {}).get("annotations", {})
    level = next((annotations[key] for key in TOPOLOGY if key in annotations), None)
    if (level is None) != ("topologyName" not in spec):
        return "a flavor with a topology takes exactly the pods that ask for one"
    if level is not None:
        topology = next(select(objects, "Topology", spec["topologyName"]), None)
        if topology is None or level not in [entry["nodeLabel"] for entry in topology["spec"]["levels"]]:
            return f"topology level {level} does not exist"
    quota = _quota(objects, queue, name)
    for resource, amount in wants.items():
        if resource not in quota:
            return f"{resource} is not covered"
        if used[name, resource] + amount > quota[resource]:
            return f"{resource}: {amount:g} of {quota[resource]:g}"
    for resource, amount in wants.items():
        used[name, resource] += amount
    return None


def _tolerates(toleration: dict[str, str], taint: dict[str, str]) -> bool:
    same_key = toleration.get("key") in (None, taint["key"])
    same_value = toleration.get("operator") == "Exists" or toleration.get("value") == taint.get("value")
    return same_key and same_value and toleration.get("effect") in (None, taint["effect"])


def _quota(objects: list[Manifest], queue: Manifest, flavor: str) -> dict[str, float]:
    """Nominal quota of the flavor, the cohort's own and its other queues' included; only resources that this queue covers."""
    cohort = queue["spec"].get("cohortName")
    shares = [
        each for each in select(objects, "ClusterQueue") if each["spec"].get("cohortName") == cohort or each is queue
    ]
    shares += select(objects, "Cohort", cohort) if cohort else []
    covered: dict[str, float] = {}
    for share in shares:
        for group in share["spec"].get("resourceGroups", []):
            for entry in group["flavors"]:
                if entry["name"] == flavor:
                    for resource in entry["resources"]:
                        covered[resource["name"]] = covered.get(resource["name"], 0) + quantity(
                            resource["nominalQuota"]
                        )
    own = {name for group in queue["spec"]["resourceGroups"] for name in group["coveredResources"]}
    return {name: value for name, value in covered.items() if name in own}
