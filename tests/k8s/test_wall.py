"""Each sentence of the wall is needed: what it alone refuses, and what passes when it, its binding or a right is changed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from tests.k8s import rbac
from tests.k8s.acts import ALLOWED, NO_RIGHT, acts, changed, template
from tests.k8s.manifests import Manifest, find, needs_kubectl, render, select
from tests.k8s.mutations import drop, put, remove
from tests.k8s.people import ALICE, BOB, CI, DRIVER, KUEUE, SUBMIT, group, head, job, pod, worker, workflow
from tests.k8s.rules.policies import GIT, denials, person
from tests.k8s.test_acts import answer, answers, prod

pytestmark = needs_kubectl
WALL = (
    "moonlight-rayjob-stage", "moonlight-rayjob-unchanged", "moonlight-rayjob-origin", "moonlight-sources", "moonlight-queue-switch",
    "moonlight-schedule-switch", "moonlight-workflow", "moonlight-workflow-owner",
)  # fmt: skip


def _path(text: str, value: Any) -> Callable[[Manifest], Any]:
    """Set one place, e.g. `spec.backoffLimit`."""

    def change(item: Manifest) -> None:
        *steps, last = text.split(".")
        place: Any = item
        for step in steps:
            place = place[int(step)] if isinstance(place, list) else place.setdefault(step, {})
        place[last] = value

    return change


def _label(key: str, value: str) -> Callable[[Manifest], Any]:
    return lambda item: item["metadata"]["labels"].update({key: value})


def _annotation(key: str, value: str) -> Callable[[Manifest], Any]:
    return lambda item: item["metadata"]["annotations"].update({key: value})


HEAD_POD = "spec.rayClusterSpec.headGroupSpec.template"
# What a driver might put into a train of its own: every place that a run may not set, and the words of the one rule that is there for it.
NOT_THE_TEMPLATE: dict[str, tuple[Callable[[Manifest], Any], str]] = {
    "another name": (_path("metadata.name", "mine"), "named <run>-<stage>-<attempt>"),
    "a name of another attempt": (_path("metadata.name", "first-train-2"), "named <run>-<stage>-<attempt>"),
    "no run": (lambda j: j["metadata"]["labels"].pop("moonlight.ai/run-id"), "named <run>-<stage>-<attempt>"),
    "a finalizer": (_path("metadata.finalizers", ["mine.example.com/stay"]), "named <run>-<stage>-<attempt>"),
    "a label": (_label("team", "mine"), "beside the labels"),
    "a label of Kueue": (_label("kueue.x-k8s.io/max-exec-time-seconds", "1"), "beside the labels"),
    "a changed label": (_label("app.kubernetes.io/component", "prepare"), "beside the labels"),
    "another queue": (_label("kueue.x-k8s.io/queue-name", "cpu"), "must be the one that the template names"),
    "an annotation": (_annotation("ray.io/overwrite-container-cmd", "true"), "beside the annotations"),
    "retries": (_path("spec.backoffLimit", 100), "must be its template's"),
    "no retries": (lambda j: j["spec"].pop("backoffLimit"), "must be its template's"),
    "a shorter deadline": (_path("spec.activeDeadlineSeconds", 60), "must be its template's"),
    "a later clean-up": (_path("spec.ttlSecondsAfterFinished", 3600), "must be its template's"),
    "a number of CPUs for the entrypoint": (_path("spec.entrypointNumCpus", 4), "must be its template's"),
    "a pipe": (lambda j: j["spec"].update(entrypoint=j["spec"]["entrypoint"] + " | sh"), "a shell takes as they are"),
    "a variable": (lambda j: j["spec"].update(entrypoint=j["spec"]["entrypoint"] + " $HOME"), "a shell takes as they are"),
    "a variable in double quotes": (lambda j: j["spec"].update(entrypoint=j["spec"]["entrypoint"] + ' "$HOME"'), "a shell takes as they are"),
    "a line of its own": (lambda j: j["spec"].update(entrypoint=j["spec"]["entrypoint"] + "\nid"), "a shell takes as they are"),
    "an argument glued to the module": (_path("spec.entrypoint", "python -m jobs.train --config debug&id"), "a shell takes as they are"),
    "an open quote": (lambda j: j["spec"].update(entrypoint=j["spec"]["entrypoint"] + " 'x"), "a shell takes as they are"),
    "another Ray": (_path("spec.rayClusterSpec.rayVersion", "2.59.0"), "rayClusterSpec must be"),
    "autoscaling": (_path("spec.rayClusterSpec.enableInTreeAutoscaling", True), "rayClusterSpec must be"),
    "a token of somebody's": (_path("spec.rayClusterSpec.authOptions.secretName", "mine"), "rayClusterSpec must be"),
    "start parameters": (_path("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", "8"), "headGroupSpec must be"),
    "a label of the head's pod": (_path(f"{HEAD_POD}.metadata.labels.x", "y"), "labels and annotations of the head's pod"),
    "an annotation of the head's pod": (_path(f"{HEAD_POD}.metadata.annotations.x", "y"), "labels and annotations of the head's pod"),
    "another run's id on the head": (lambda j: j["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["labels"].update({"moonlight.ai/run-id": "other"}), "labels and annotations of the head's pod"),
    "another run's id on workers": (lambda j: group(j)["template"]["metadata"]["labels"].update({"moonlight.ai/run-id": "other"}), "worker groups with their pods"),
    "a worker's label": (lambda j: group(j)["template"]["metadata"]["labels"].update(x="y"), "worker groups with their pods"),
    "a worker's annotation": (lambda j: group(j)["template"]["metadata"]["annotations"].update(x="y"), "worker groups with their pods"),
    "a volume": (lambda j: head(j)["volumes"].append({"name": "x", "emptyDir": {}}), "the head's pod"),
    "a claim": (lambda j: head(j)["volumes"].append({"name": "x", "persistentVolumeClaim": {"claimName": "x"}}), "the head's pod"),
    "a place": (lambda j: head(j).pop("nodeSelector"), "the head's pod"),
    "a named node": (lambda j: head(j).update(nodeName="n1"), "the head's pod"),
    "a toleration": (lambda j: head(j).update(tolerations=[{"operator": "Exists"}]), "the head's pod"),
    "a scheduler": (lambda j: head(j).update(schedulerName="mine"), "the head's pod"),
    "a token of the API server": (lambda j: head(j).update(automountServiceAccountToken=True), "the head's pod"),
    "a priority class": (lambda j: head(j).update(priorityClassName="system-cluster-critical"), "the head's pod"),
    "no security context": (lambda j: head(j).pop("securityContext"), "the head's pod"),
    "a command": (lambda j: head(j)["containers"][0].update(command=["bash"]), "the head's containers"),
    "arguments of the head": (lambda j: head(j)["containers"][0].update(args=["x"]), "the head's containers"),
    "an environment": (lambda j: head(j)["containers"][0]["env"].append({"name": "LD_PRELOAD", "value": "/tmp/x"}), "the head's containers"),
    "more memory": (lambda j: head(j)["containers"][0]["resources"]["limits"].update(memory="512Gi"), "the head's containers"),
    "the logs' command": (lambda j: head(j)["containers"][1].update(command=["python", "-m", "jobs.publish"]), "the head's containers"),
    "no logs": (lambda j: head(j)["containers"].pop(1), "the head's containers"),
    "logs first": (lambda j: head(j)["containers"].reverse(), "the head's containers"),
    "the head twice": (lambda j: head(j)["containers"].append(head(j)["containers"][0]), "the head's containers"),
    "a worker's command": (lambda j: worker(j)["containers"][0].update(command=["bash"]), "worker groups with their pods"),
    "a worker's limits": (lambda j: worker(j)["containers"][0]["resources"]["limits"].update({"nvidia.com/gpu": "4"}), "worker groups with their pods"),
    "a worker's place": (lambda j: worker(j)["nodeSelector"].clear(), "worker groups with their pods"),
    "a group more": (lambda j: j["spec"]["rayClusterSpec"]["workerGroupSpecs"].append({**group(j), "groupName": "more"}), "worker groups with their pods"),
    "no workers": (lambda j: j["spec"]["rayClusterSpec"].pop("workerGroupSpecs"), "rayClusterSpec must be"),
    "a larger gang": (lambda j: group(j).update(replicas=33, minReplicas=33, maxReplicas=33), "at most the template's annotation"),
    "a gang that may grow": (lambda j: group(j).update(maxReplicas=8), "the gang has one size"),
    "an empty gang": (lambda j: group(j).update(replicas=0, minReplicas=0, maxReplicas=0), "the gang has one size"),
}  # fmt: skip


@functools.cache
def _refused(what: str) -> list[str]:
    return denials(prod(), job("train", change=NOT_THE_TEMPLATE[what][0]), user=DRIVER)


@pytest.mark.parametrize("what", NOT_THE_TEMPLATE)
def test_a_run_sets_nothing_but_its_places(what: str) -> None:
    found, words = _refused(what), NOT_THE_TEMPLATE[what][1]
    assert any(words in denial for denial in found), found or "admitted"


@pytest.mark.parametrize("overlay", ["kind", "dev", "prod"])
def test_every_overlays_drivers_can_run(overlay: str) -> None:
    """A gang of another size too, and an attempt that is not the first; kind has no GPUs to size a train by."""
    objects = render(f"k8s/overlays/{overlay}")
    for stage in ("prepare", "evaluate", "publish") + (() if overlay == "kind" else ("train",)):
        assert denials(objects, job(stage, overlay), user=DRIVER) == []
    if overlay == "prod":
        wide = job("train", change=lambda j: group(j).update(replicas=32, minReplicas=32, maxReplicas=32))
        assert denials(objects, wide, user=DRIVER) == []


def test_a_queued_job_outlives_a_change_of_its_template() -> None:
    """Admission by Kueue is an update, and the template may be another by then, or gone."""
    objects = [item for item in render("k8s/overlays/prod") if item["kind"] != "RayJob"]
    queued = job("train", change=_path("spec.suspend", True))
    admitted = job("train", change=_path("spec.suspend", False))
    assert denials(objects, admitted, operation="UPDATE", before=queued, user=KUEUE) == []
    missing = denials(objects, queued, user=DRIVER)
    assert missing == ["moonlight-rayjob-stage: failed to configure binding: no template-train found"]


def test_templates_can_be_made_where_there_are_none() -> None:
    objects = [item for item in render("k8s/overlays/prod") if item["kind"] != "RayJob"]
    for stage in ("prepare", "train", "evaluate", "publish"):
        assert denials(objects, template(stage), user=GIT) == []


def _updates() -> list[tuple[Manifest, Manifest]]:
    """Changes of a job that exists, each of one kind."""
    before = job("train")
    return [
        (job("train", change=change), before)
        for change in (
            lambda j: j["spec"].update(entrypoint="python -m jobs.train --config other"),
            _label("moonlight.ai/run-id", "other"),
            lambda j: worker(j)["volumes"].append({"name": "x", "emptyDir": {}}),
            lambda j: worker(j)["containers"][0]["env"].append({"name": "X", "value": "y"}),
        )
    ]


def _said() -> list[list[str]]:
    """What the policies say to everything that the tests of the wall send."""
    said = [_refused(what) for what in NOT_THE_TEMPLATE] + [found for _, found in answers()]
    said += [denials(prod(), now, operation="UPDATE", before=before, user=KUEUE) for now, before in _updates()]
    secret = {"env": [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "x", "key": "x"}}}]}
    image = head(job("train"))["containers"][0]["image"]
    said.append(denials(prod(), pod(image, container=secret), user=GIT))
    own, taken = workflow(ALICE, priority="moonlight-interactive"), workflow(BOB)
    for_artifacts = workflow(ALICE, {"arguments": {"artifacts": [{"name": "x"}]}})
    said.append(denials(prod(), for_artifacts, user=ALICE))
    taken["spec"] = own["spec"]
    said.append(denials(prod(), taken, operation="UPDATE", before=own, user=ALICE))
    said.append(
        denials(prod(), workflow(ALICE, {"workflowTemplateRef": {"name": "x", "clusterScope": True}}), user=ALICE)
    )
    return said


def test_every_sentence_refuses_something_that_nothing_else_does() -> None:
    """Which is the same as: with the sentence taken out, that would be admitted."""
    alone = {denials_[0] for denials_ in _said() if len(denials_) == 1}
    needless = [
        f"{name}: {validation['message']}"
        for name in WALL
        for validation in find(prod(), "ValidatingAdmissionPolicy", name)["spec"]["validations"]
        if not any(
            said.startswith(f"{name}: {validation['message']}")
            or ("messageExpression" in validation and said.startswith(f"{name}: label moonlight.ai/owner must be "))
            for said in alone
        )
    ]
    assert needless == []


def _allows(objects: list[Manifest], user: Any, item: Manifest, operation: str = "CREATE") -> bool:
    return denials(objects, item, operation=operation, user=user) == []


BINDINGS = "ValidatingAdmissionPolicyBinding"
HOLES: dict[str, tuple[Callable[[list[Manifest]], Any], Callable[[list[Manifest]], bool]]] = {
    "a stage that is not bound": (remove(BINDINGS, "moonlight-rayjob-train"), lambda o: _allows(o, DRIVER, job("train", change=_path("spec.backoffLimit", 9)))),
    "a stage bound to another's template": (put(f"{BINDINGS}/moonlight-rayjob-train", "spec.paramRef.name", "template-publish"), lambda o: not _allows(o, DRIVER, job("train"))),
    "templates held to themselves": (
        lambda o: [drop(f"{BINDINGS}/moonlight-rayjob-train", "spec.matchResources.objectSelector.matchExpressions")(o), remove("RayJob", "template-train")(o)],
        lambda o: not _allows(o, GIT, template("train")),
    ),
    "origins that are not bound": (remove(BINDINGS, "moonlight-rayjob-origin"), lambda o: _allows(o, SUBMIT, job("train", owner=None, priority="moonlight-release"))),
    "a driver of the submit cluster at any priority": (
        put("ClusterRoleBinding/moonlight-priority-any", "subjects.-", {"kind": "ServiceAccount", "name": "driver", "namespace": "moonlight-submit"}),
        lambda o: _allows(o, SUBMIT, job("train", owner=None, priority="moonlight-release")),
    ),
    "everybody's registry": (put("ConfigMap/moonlight/moonlight-admission", "data.registry-all", "docker.io/"), lambda o: _allows(o, GIT, pod("docker.io/x"))),
    "an empty registry admits nothing": (put("ConfigMap/moonlight/moonlight-admission", "data.registry-pipeline", ""), lambda o: not _allows(o, DRIVER, job("train"))),
    "no lists": (remove("ConfigMap", "moonlight-admission", "moonlight"), lambda o: not _allows(o, DRIVER, job("train"))),
    "a gang without a limit is the template's": (drop("RayJob/template-train", "metadata.annotations.moonlight\\.ai/max-workers"), lambda o: not _allows(o, DRIVER, job("train"))),
    "owners that are not bound": (remove(BINDINGS, "moonlight-workflow-owner"), lambda o: _allows(o, CI, workflow(ALICE), "DELETE")),
    "workflows that are not bound": (remove(BINDINGS, "moonlight-workflow"), lambda o: _allows(o, ALICE, workflow(ALICE, {"templates": []}))),
    "updates that are not bound": (remove(BINDINGS, "moonlight-rayjob-unchanged"), lambda o: denials(o, _updates()[0][0], operation="UPDATE", before=_updates()[0][1], user=KUEUE) == []),
    "images that are not bound": (remove(BINDINGS, "moonlight-sources"), lambda o: _allows(o, GIT, pod("docker.io/x"))),
}  # fmt: skip


@pytest.mark.parametrize("hole", HOLES)
def test_a_hole_in_the_wall_would_be_seen(hole: str) -> None:
    make, seen = HOLES[hole]
    assert not seen(prod())
    objects = render("k8s/overlays/prod")
    make(objects)
    assert seen(objects)


RIGHTS: dict[str, tuple[str, dict[str, Any]]] = {
    "researchers delete RayJobs": ("Role/moonlight/starter", {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["delete"]}),
    "researchers read Secrets": ("Role/moonlight/researcher", {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}),
    "researchers enter pods": ("Role/moonlight-submit/researcher", {"apiGroups": [""], "resources": ["pods/*", "pods/exec"], "verbs": ["create"]}),
    "everybody at release priority": ("ClusterRole/moonlight-priority-interactive", {"apiGroups": ["kueue.x-k8s.io"], "resources": ["workloadpriorityclasses"], "verbs": ["use"]}),
    "drivers read Secrets": ("Role/moonlight/driver", {"apiGroups": [""], "resources": ["secrets"], "verbs": ["list"]}),
    "viewers write lists of admission": ("Role/moonlight/viewer", {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["patch"]}),
    "starters reach every dashboard": ("Role/moonlight/starter", {"apiGroups": [""], "resources": ["pods/portforward"], "verbs": ["create"]}),
    "operators write policies": ("ClusterRole/moonlight-queue-operator", {"apiGroups": ["admissionregistration.k8s.io"], "resources": ["validatingadmissionpolicies"], "verbs": ["patch"]}),
}  # fmt: skip


@pytest.mark.parametrize("right", RIGHTS)
def test_a_right_too_many_is_seen_by_the_matrix(right: str) -> None:
    role, rule = RIGHTS[right]
    objects = render("k8s/overlays/prod")
    put(role, "rules.-", rule)(objects)
    refused = [act for act in acts() if act.verdict == NO_RIGHT]
    assert any(rbac.allowed(objects, act.user, act.request) for act in refused)
    assert not any(rbac.allowed(prod(), act.user, act.request) for act in refused)


@pytest.mark.parametrize("role", sorted({"driver", "starter", "viewer", "researcher", "operator", "workflow-executor"}))
def test_a_right_too_few_is_seen_by_the_matrix(role: str) -> None:
    objects = render("k8s/overlays/prod")
    for item in list(select(objects, "Role", role)):
        objects.remove(item)
    granted = [act for act in acts() if act.verdict != NO_RIGHT]
    assert not all(rbac.allowed(objects, act.user, act.request) for act in granted)


def test_the_matrix_compares_words() -> None:
    act = next(act for act in acts() if act.verdict == ALLOWED and act.sent is not None)
    assert answer(act) == []
    assert answer(act._replace(sent=changed(job("prepare"), "spec", "backoffLimit", to=99))) != []


def test_rights_are_matched_as_the_api_server_does() -> None:
    """Names, subresources and namespaces of RBAC, by its own rules."""
    named = rbac.User(
        "x", rules=({"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["a"], "verbs": ["get"]},)
    )
    assert rbac.allowed([], named, rbac.Request("get", "", "configmaps", "n", "a"))
    assert not rbac.allowed([], named, rbac.Request("get", "", "configmaps", "n", "b"))
    assert not rbac.allowed([], named, rbac.Request("list", "", "configmaps", "n"))
    assert not rbac.allowed([], person("get pods"), rbac.Request("get", "", "pods/log", "n", "a"))
    assert rbac.allowed([], person("get */log"), rbac.Request("get", "", "pods/log", "n", "a"))
    binding = {
        "kind": "RoleBinding",
        "metadata": {"name": "b", "namespace": "n"},
        "roleRef": {"kind": "ClusterRole", "name": "r"},
        "subjects": [{"kind": "Group", "name": "g"}],
    }
    role = {
        "kind": "ClusterRole",
        "metadata": {"name": "r"},
        "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["*"]}],
    }
    member = rbac.User("x", ("g",))
    assert rbac.allowed([binding, role], member, rbac.Request("delete", "", "pods", "n", "a"))
    assert not rbac.allowed([binding, role], member, rbac.Request("delete", "", "pods", "m", "a"))
    assert not rbac.allowed([binding, role], member, rbac.Request("delete", "", "pods", None, "a"))
