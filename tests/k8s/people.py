"""Who acts in the tests of the wall, and what they might send: a driver's RayJob, a workflow, and changes of both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from pipeline.config.load import load_config
from pipeline.config.schema import ParallelismConfig
from pipeline.workflow.rayjobs_template import instantiate
from tests.k8s.manifests import Manifest, find, render
from tests.k8s.rbac import User, service_account

EVERYBODY = "system:authenticated"
ALICE = User("arn:aws:sts::111122223333:assumed-role/researcher/alice", ("moonlight-researchers", EVERYBODY))
BOB = User("arn:aws:sts::111122223333:assumed-role/researcher/bob", ("moonlight-researchers", EVERYBODY))
CI = User("arn:aws:sts::111122223333:assumed-role/ci/build-17", ("moonlight-ci", EVERYBODY))
OPS = User("arn:aws:sts::111122223333:assumed-role/on-call/carol", ("moonlight-operators", EVERYBODY))
STRANGER = User("arn:aws:sts::111122223333:assumed-role/other/dave", (EVERYBODY,))
DRIVER = service_account("moonlight", "driver")
SUBMIT = service_account("moonlight-submit", "driver")
PREPARE = service_account("moonlight", "prepare")


def _rule(group: str, resources: list[str], verbs: list[str]) -> dict[str, Any]:
    return {"apiGroups": [group], "resources": resources, "verbs": verbs}


WRITE = ["get", "list", "watch", "create", "update", "patch", "delete"]
# What the operators' charts grant their controllers, as far as it matters here.
ARGO = service_account(
    "argo",
    "argo-workflows-workflow-controller",
    (_rule("", ["pods", "pods/exec"], WRITE), _rule("argoproj.io", ["workflows", "cronworkflows"], WRITE)),
)
KUEUE = service_account(
    "kueue-system",
    "kueue-controller-manager",
    (_rule("ray.io", ["rayjobs", "rayclusters"], ["get", "list", "watch", "update", "patch"]), _rule("kueue.x-k8s.io", ["clusterqueues"], WRITE)),
)  # fmt: skip
KUBERAY = service_account(
    "kuberay-system",
    "kuberay-operator",
    (_rule("ray.io", ["rayjobs", "rayclusters", "rayclusters/status"], WRITE), _rule("", ["pods"], WRITE)),
)
COLLECTOR = service_account("kube-system", "generic-garbage-collector", (_rule("*", ["*"], ["get", "delete"]),))

WORKFLOW = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "first", "uid": "0001"}
_DEBUG = load_config("debug")
_CLUSTER = _DEBUG.cluster.model_copy(update={"use_gpu": True})
CONFIG = _DEBUG.model_copy(update={"run_id": "first", "cluster": _CLUSTER, "parallelism": ParallelismConfig(shard=8)})
OVERLAY: ContextVar[str] = ContextVar("overlay", default="prod")  # whose templates are meant where none is named
Change = Callable[[Manifest], Any]


def job(
    stage: str,
    overlay: str | None = None,
    *,
    owner: dict[str, Any] | None = WORKFLOW,
    priority: str = "moonlight-interactive",
    change: Change | None = None,
) -> Manifest:
    """The RayJob that a driver makes of the overlay's template."""
    return job_of(
        render(f"k8s/overlays/{overlay or OVERLAY.get()}"), stage, owner=owner, priority=priority, change=change
    )


def job_of(
    objects: list[Manifest],
    stage: str,
    *,
    owner: dict[str, Any] | None = WORKFLOW,
    priority: str = "moonlight-interactive",
    change: Change | None = None,
) -> Manifest:
    """The same where these objects are."""
    template = find(objects, "RayJob", f"template-{stage}")
    arguments = ["--config", "debug", "run_id=first", 'schedule.learning_rate=[{"start": 1e-4}]', "data.note=it's"]
    made = instantiate(template, CONFIG, stage, 1, arguments, priority=priority, owner=owner)
    made = copy.deepcopy(made)
    if change is not None:
        change(made)
    return made


def head(manifest: Manifest) -> dict[str, Any]:
    return manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]


def group(manifest: Manifest) -> dict[str, Any]:
    return manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]


def worker(manifest: Manifest) -> dict[str, Any]:
    return group(manifest)["template"]["spec"]


def owner_label(user: User) -> str:
    """What `tr -c '[:alnum:]._' -` makes of the name, its last 63 characters (docs/kubernetes.md, "First run")."""
    return "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in user.name)[-63:].lstrip("-._")


def workflow(
    user: User | None = ALICE,
    spec: dict[str, Any] | None = None,
    *,
    status: dict[str, Any] | None = None,
    **parameters: str,
) -> Manifest:
    """A workflow as `argo submit --from workflowtemplate/moonlight-run` sends it."""
    given = [{"name": name.replace("_", "-"), "value": value} for name, value in parameters.items()]
    made: Manifest = {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Workflow",
        "metadata": {"name": "first", "namespace": "moonlight"},
        "spec": {"workflowTemplateRef": {"name": "moonlight-run"}, "arguments": {"parameters": given}, **(spec or {})},
    }
    if user is not None:
        made["metadata"]["labels"] = {"moonlight.ai/owner": owner_label(user)}
    return made if status is None else {**made, "status": status}


def pod(image: str, namespace: str = "moonlight", labels: dict[str, str] | None = None, **spec: Any) -> Manifest:
    metadata = {"name": "x", "namespace": namespace, "labels": labels or {}}
    containers = [{"name": "main", "image": image, **spec.pop("container", {})}]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": containers, **spec}}
