"""Who may do what: acts by impersonation against RBAC and admission of an overlay, with what must come of each.

A verdict is ALLOWED, NO_RIGHT (RBAC refuses) or words of the admission policy that refuses.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.k8s.manifests import Manifest, find, render
from tests.k8s.people import (
    ALICE,
    ARGO,
    BOB,
    CI,
    COLLECTOR,
    DRIVER,
    KUBERAY,
    KUEUE,
    OPS,
    OVERLAY,
    PREPARE,
    STRANGER,
    SUBMIT,
    group,
    head,
    job,
    pod,
    worker,
    workflow,
)
from tests.k8s.rbac import Request, User

ALLOWED, NO_RIGHT = "allowed", "no right"
RAY, KUEUE_GROUP, ARGO_GROUP = "ray.io", "kueue.x-k8s.io", "argoproj.io"
JOBS, SUBMIT_SPACE = "moonlight", "moonlight-submit"
EVIL = "docker.io/evil/miner@sha256:" + "a" * 64


class Act(NamedTuple):
    user: User
    what: str
    request: Request
    verdict: str
    sent: Manifest | None = None  # what admission sees; for delete what is there
    before: Manifest | None = None


def _plural(item: Manifest) -> tuple[str, str]:
    return item["apiVersion"].rpartition("/")[0], item["kind"].lower() + "s"


def sends(user: User, verb: str, what: str, sent: Manifest, verdict: str, before: Manifest | None = None) -> Act:
    group_, resource = _plural(sent)
    name = "" if verb == "create" else sent["metadata"]["name"]
    return Act(user, f"{verb} {what}", Request(verb, group_, resource, sent["metadata"].get("namespace"), name), verdict, sent, before)  # fmt: skip


def asks(
    user: User, verb: str, group_: str, resource: str, namespace: str | None, verdict: str, name: str = "x"
) -> Act:
    named = "" if verb in ("create", "list") and "/" not in resource else name
    return Act(user, f"{verb} {resource} {name} in {namespace or 'the cluster'}", Request(verb, group_, resource, namespace, named), verdict)  # fmt: skip


def template(stage: str) -> Manifest:
    return find(render(f"k8s/overlays/{OVERLAY.get()}"), "RayJob", f"template-{stage}")


def other_build() -> str:
    """An image of the registry that the overlay allows, by another digest."""
    container = template("publish")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    return str(container["image"]).partition("@")[0] + "@sha256:" + "b" * 64


def changed(item: Manifest, *path: str | int, to: object) -> Manifest:
    """The item with one place changed."""
    place = item
    for step in path[:-1]:
        place = place[step]  # type: ignore[index]
    place[path[-1]] = to  # type: ignore[index]
    return item


def _starting_runs() -> list[Act]:
    stages = ("prepare", "train", "evaluate", "publish")
    return [
        *(sends(DRIVER, "create", f"a {stage} of its workflow", job(stage), ALLOWED) for stage in stages),
        *(sends(SUBMIT, "create", f"an interactive {stage}", job(stage, owner=None), ALLOWED) for stage in stages),
        sends(DRIVER, "create", "a train at release priority", job("train", priority="moonlight-release"), ALLOWED),
        sends(SUBMIT, "create", "a train at release priority", job("train", owner=None, priority="moonlight-release"), "that you may `use`"),
        sends(SUBMIT, "create", "a train at scheduled priority", job("train", owner=None, priority="moonlight-scheduled"), "that you may `use`"),
        sends(SUBMIT, "create", "a job that somebody's workflow owns", job("train"), "without an owner"),
        sends(DRIVER, "create", "a job that nothing owns", job("train", owner=None), "its workflow owns"),
        *(sends(user, "create", "a RayJob by hand", job("train", owner=None), NO_RIGHT) for user in (ALICE, CI, OPS, PREPARE, STRANGER)),
        sends(ALICE, "create", "a workflow", workflow(ALICE), ALLOWED),
        sends(CI, "create", "a workflow", workflow(CI), ALLOWED),
        sends(OPS, "create", "a workflow at release priority", workflow(OPS, priority="moonlight-release"), ALLOWED),
        sends(ALICE, "create", "a workflow at release priority", workflow(ALICE, priority="moonlight-release"), "that you may `use`"),
        sends(CI, "create", "a workflow at scheduled priority", workflow(CI, priority="moonlight-scheduled"), "that you may `use`"),
        sends(ALICE, "create", "a workflow at a priority from a ConfigMap", workflow(ALICE, {"arguments": {"parameters": [{"name": "priority", "valueFrom": {"configMapKeyRef": {"name": "moonlight-runs", "key": "p"}}}]}}), "parameters with values"),
        sends(ALICE, "create", "a workflow in bob's name", workflow(BOB), "label moonlight.ai/owner must be"),
        sends(ALICE, "create", "a workflow in nobody's name", workflow(None), "label moonlight.ai/owner must be"),
        sends(ALICE, "create", "a workflow of her own templates", workflow(ALICE, {"templates": [], "entrypoint": "x"}), "may set only"),
        sends(ALICE, "create", "a workflow as another account", workflow(ALICE, {"serviceAccountName": "publish"}), "may set only"),
        sends(STRANGER, "create", "a workflow", workflow(STRANGER), NO_RIGHT),
        sends(DRIVER, "create", "a workflow", workflow(None), NO_RIGHT),
        sends(ARGO, "create", "the schedule's workflow", workflow(None, priority="moonlight-scheduled"), ALLOWED),
    ]  # fmt: skip


def _the_named_acts() -> list[Act]:
    """What the dry runs on a server let through before there was a wall, by the driver that a researcher is on the submit cluster."""

    def tries(what: str, sent: Manifest, verdict: str) -> Act:
        return sends(SUBMIT, "create", what, sent, verdict)

    def free(stage: str) -> Manifest:
        return job(stage, owner=None)

    secret = {"name": "x", "secret": {"secretName": "s3-access"}}
    everywhere = changed(free("train"), "spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "nodeSelector", to={})  # fmt: skip
    command = free("train")
    worker(command)["containers"][0].update(image=EVIL, command=["bash", "-c", "mine"])
    large = free("train")
    group(large).update(replicas=33, minReplicas=33, maxReplicas=33)
    mounted = free("publish")
    head(mounted)["volumes"].append(secret)
    swapped = free("publish")
    swapped["metadata"]["labels"]["moonlight.ai/stage"] = "prepare"
    first = "containers", 0
    return [
        tries("another image by digest with a command of its own", command, "ConfigMap moonlight-admission"),
        tries("our image at another digest", changed(free("train"), "spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", *first, "image", to=other_build()), "worker groups with their pods"),
        tries("publish under the label of prepare", swapped, "service account of their stage"),
        tries("a mounted Secret", mounted, "no Secret is mounted"),
        tries("a system priority", changed(free("train"), "spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "priorityClassName", to="system-node-critical"), "the head's pod"),
        tries("a place on any node", everywhere, "the head's pod"),
        tries("a deadline of 68 years", changed(free("train"), "spec", "activeDeadlineSeconds", to=2147483647), "at most 90 days"),
        tries("a deadline of 40 days", changed(free("train"), "spec", "activeDeadlineSeconds", to=3456000), "must be its template's"),
        tries("33 hosts", large, "at most the template's annotation"),
        tries("packages of its own", changed(free("prepare"), "spec", "runtimeEnvYAML", to="pip: [evil]"), "runtimeEnvYAML must be absent"),
        tries("another module as publish", changed(free("publish"), "spec", "entrypoint", to="python -m jobs.train"), "each service account has one program"),
        tries("a second command behind the entrypoint", changed(free("publish"), "spec", "entrypoint", to="python -m jobs.publish --config debug; id"), "a shell takes as they are"),
        tries("a substitution behind the entrypoint", changed(free("publish"), "spec", "entrypoint", to='python -m jobs.publish "$(id)"'), "a shell takes as they are"),
        tries("another queue", changed(free("prepare"), "metadata", "labels", "kueue.x-k8s.io/queue-name", to="gpu"), "must be the one that the template names"),
    ]  # fmt: skip


def _stopping_runs() -> list[Act]:
    running = workflow(ALICE)
    stopped = workflow(ALICE, {"shutdown": "Stop"})
    dearer = workflow(ALICE, priority="moonlight-release")
    taken = workflow(BOB)
    return [
        sends(ALICE, "patch", "her own workflow: stop", stopped, ALLOWED, running),
        sends(ALICE, "delete", "her own workflow", running, ALLOWED),
        sends(BOB, "patch", "alice's workflow: stop", stopped, "somebody else's", running),
        sends(BOB, "delete", "alice's workflow", running, "somebody else's"),
        sends(CI, "delete", "alice's workflow", running, "somebody else's"),
        sends(BOB, "delete", "the schedule's workflow", workflow(None), "somebody else's"),
        sends(BOB, "patch", "alice's workflow: take it", taken, "the owner of a workflow does not change", running),
        sends(ALICE, "patch", "her own workflow: another priority", dearer, "does not change: start another", running),
        sends(ALICE, "patch", "her own workflow: templates into its status", workflow(ALICE, status={"storedWorkflowTemplateSpec": {}}), "written by Argo's controller", running),
        sends(OPS, "patch", "alice's workflow: stop", stopped, ALLOWED, running),
        sends(OPS, "delete", "alice's workflow", running, ALLOWED),
        sends(ARGO, "delete", "a workflow past its time", running, ALLOWED),
        *(sends(user, "delete", "a RayJob", job("train"), NO_RIGHT) for user in (ALICE, BOB, CI)),
        sends(OPS, "delete", "a workflow's RayJob", job("train"), ALLOWED),
        sends(OPS, "delete", "an interactive RayJob", job("train", owner=None), ALLOWED),
        sends(DRIVER, "delete", "its workflow's RayJob", job("train"), ALLOWED),
        sends(DRIVER, "delete", "an interactive RayJob", job("train", owner=None), "a driver deletes only"),
        sends(SUBMIT, "delete", "an interactive RayJob", job("train", owner=None), ALLOWED),
        sends(SUBMIT, "delete", "a workflow's RayJob", job("train"), "a driver deletes only"),
        sends(COLLECTOR, "delete", "a RayJob whose workflow is gone", job("train"), ALLOWED),
    ]  # fmt: skip


def _templates_and_switches() -> list[Act]:
    objects = render(f"k8s/overlays/{OVERLAY.get()}")
    queue, schedule = find(objects, "ClusterQueue", "moonlight-gpu"), find(objects, "CronWorkflow", "moonlight-weekly")
    held = {**queue, "spec": {**queue["spec"], "stopPolicy": "Hold"}}
    larger = {**queue, "spec": {**queue["spec"], "resourceGroups": []}}
    on = {**schedule, "spec": {**schedule["spec"], "suspend": False}}
    hourly = {**schedule, "spec": {**schedule["spec"], "schedules": ["0 * * * *"]}}
    disguised = {**job("train"), "metadata": template("train")["metadata"]}
    return [
        *(sends(user, "delete", "a template", template("train"), verdict) for user, verdict in ((ALICE, NO_RIGHT), (OPS, "through Git"), (DRIVER, "through Git"), (SUBMIT, "through Git"))),
        *(sends(user, "update", "a template", template("train"), NO_RIGHT) for user in (ALICE, OPS, CI, DRIVER, SUBMIT)),
        sends(SUBMIT, "create", "a job dressed up as a template", disguised, "through Git"),
        sends(OPS, "patch", "a queue: hold", held, ALLOWED, queue),
        sends(OPS, "patch", "a queue: its quota", larger, "spec.stopPolicy only", queue),
        sends(ALICE, "patch", "a queue: hold", held, NO_RIGHT, queue),
        sends(KUEUE, "update", "a queue", queue, ALLOWED),
        sends(OPS, "patch", "the schedule: on", on, ALLOWED, schedule),
        sends(OPS, "patch", "the schedule: hourly", hourly, "spec.suspend only", schedule),
        sends(ALICE, "patch", "the schedule: on", on, NO_RIGHT, schedule),
        sends(CI, "patch", "the schedule: on", on, NO_RIGHT, schedule),
    ]  # fmt: skip


def _controllers() -> list[Act]:
    queued = job("train")
    queued["spec"]["suspend"] = True
    admitted = job("train")
    admitted["spec"]["suspend"] = False
    worker(admitted).setdefault("tolerations", []).append({"key": "nvidia.com/gpu", "operator": "Exists"})
    worker(admitted)["nodeSelector"] = {"moonlight.ai/node-pool": "gpu-train", "more": "labels"}
    turned = job("train")
    worker(turned)["containers"][0]["args"] = ["mine"]
    cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "x", "namespace": JOBS}, "spec": queued["spec"]["rayClusterSpec"]}  # fmt: skip
    own = {"env": [{"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": "first-train-1-x2k9q", "key": "auth_token"}}}]}  # fmt: skip
    labels = {"ray.io/cluster": "first-train-1-x2k9q"}
    return [
        sends(KUEUE, "update", "a job: admitted, with its flavor's labels", admitted, ALLOWED, queued),
        sends(KUEUE, "update", "a job: another program", turned, "containers do not change", queued),
        sends(KUBERAY, "create", "a job's cluster", cluster, ALLOWED),
        sends(KUBERAY, "create", "a node's pod with its cluster's token", pod(other_build(), labels=labels, container=own), ALLOWED),
        sends(KUBERAY, "create", "a pod with another cluster's token", pod(other_build(), labels={"ray.io/cluster": "other"}, container=own), "environment variables come from no Secret"),
        sends(KUBERAY, "create", "a pod of a foreign image", pod(EVIL, labels=labels), "registries"),
        sends(KUBERAY, "create", "a foreign pod on the submit cluster", pod(EVIL, SUBMIT_SPACE), "registries"),
        sends(ARGO, "create", "a step's pod", pod(other_build(), initContainers=[{"name": "init", "image": "quay.io/argoproj/argoexec:v4.0.6"}]), ALLOWED),
        sends(ARGO, "create", "a step with a Secret that is not listed", pod(other_build(), volumes=[{"name": "x", "secret": {"secretName": "moonlight-tls"}}]), "no Secret is mounted"),
    ]  # fmt: skip


def _looking_and_reaching() -> list[Act]:
    look = [
        (RAY, "rayjobs"), (RAY, "rayclusters"), (KUEUE_GROUP, "workloads"), (ARGO_GROUP, "workflows"), (ARGO_GROUP, "cronworkflows"), ("", "pods/log"),
    ]  # fmt: skip
    never = [
        ("get", "", "secrets", JOBS), ("list", "", "secrets", JOBS), ("create", "", "pods", JOBS), ("create", "", "pods/exec", JOBS),
        ("create", "", "pods/exec", SUBMIT_SPACE), ("create", "", "serviceaccounts/token", JOBS), ("patch", "", "configmaps", JOBS),
        ("update", ARGO_GROUP, "workflowtemplates", JOBS), ("create", ARGO_GROUP, "cronworkflows", JOBS),
        ("patch", "admissionregistration.k8s.io", "validatingadmissionpolicies", None),
        ("update", "rbac.authorization.k8s.io", "rolebindings", JOBS), ("patch", KUEUE_GROUP, "localqueues", JOBS),
        ("impersonate", "", "users", None), ("patch", "", "nodes", None), ("create", "", "pods/portforward", JOBS),
    ]  # fmt: skip
    return [
        *(asks(user, "list", group_, resource, JOBS, ALLOWED) for user in (ALICE, CI, OPS) for group_, resource in look),
        *(asks(STRANGER, "list", group_, resource, JOBS, NO_RIGHT) for group_, resource in look),
        *(asks(user, verb, group_, resource, space, NO_RIGHT, "moonlight-admission") for user in (ALICE, CI, OPS, DRIVER, SUBMIT, PREPARE) for verb, group_, resource, space in never),
        asks(ALICE, "patch", "", "configmaps", JOBS, ALLOWED, "moonlight-runs"),
        asks(CI, "patch", "", "configmaps", JOBS, NO_RIGHT, "moonlight-runs"),
        asks(ALICE, "ray:write", RAY, "rayclusters", SUBMIT_SPACE, ALLOWED, "submit"),
        asks(ALICE, "ray:write", RAY, "rayclusters", JOBS, NO_RIGHT, "first-train-1-x2k9q"),
        asks(CI, "ray:write", RAY, "rayclusters", SUBMIT_SPACE, NO_RIGHT, "submit"),
        asks(ALICE, "create", "", "pods/portforward", SUBMIT_SPACE, ALLOWED),
        asks(OPS, "delete", "", "pods", JOBS, ALLOWED),
        asks(OPS, "delete", "", "pods", SUBMIT_SPACE, ALLOWED),
        asks(ALICE, "delete", "", "pods", JOBS, NO_RIGHT),
        asks(DRIVER, "patch", ARGO_GROUP, "workflowtaskresults", JOBS, ALLOWED),
        asks(SUBMIT, "create", "authentication.k8s.io", "tokenreviews", None, ALLOWED),
        asks(DRIVER, "use", KUEUE_GROUP, "workloadpriorityclasses", None, ALLOWED, "moonlight-scheduled"),
        asks(ALICE, "use", KUEUE_GROUP, "workloadpriorityclasses", None, NO_RIGHT, "moonlight-release"),
    ]  # fmt: skip


def acts(overlay: str = "prod") -> list[Act]:
    """All of them, on the templates of this overlay."""
    token = OVERLAY.set(overlay)
    try:
        return [
            *_starting_runs(),
            *_the_named_acts(),
            *_stopping_runs(),
            *_templates_and_switches(),
            *_controllers(),
            *_looking_and_reaching(),
        ]
    finally:
        OVERLAY.reset(token)
