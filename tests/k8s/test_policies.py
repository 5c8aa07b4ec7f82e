"""The admission policies against requests as they will come: jobs that drivers create, and what people might try."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.workflow.rayjobs_template import STAGES
from tests.k8s.manifests import Manifest, find, needs_kubectl, render
from tests.k8s.people import DRIVER, KUEUE, head, job, worker
from tests.k8s.rbac import User
from tests.k8s.rules.policies import KUBERAY, denials, person

pytestmark = needs_kubectl


@pytest.mark.parametrize("stage", STAGES)
def test_a_drivers_job_is_admitted_and_may_be_unsuspended_by_kueue(stage: str) -> None:
    objects = render("k8s/overlays/prod")
    created = job(stage)
    assert denials(objects, created, user=DRIVER) == []
    created["spec"]["suspend"] = False
    assert denials(objects, created, operation="UPDATE", user=KUEUE) == []
    assert denials(objects, created, operation="DELETE", user=DRIVER) == []


BAD: dict[str, tuple[Callable[[Manifest], Any], str]] = {
    "no queue": (lambda j: j["metadata"]["labels"].pop("kueue.x-k8s.io/queue-name"), "queue-name is required"),
    "empty queue": (lambda j: j["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": ""}), "queue-name is required"),
    "made-up priority": (lambda j: j["metadata"]["labels"].update({"kueue.x-k8s.io/priority-class": "urgent"}), "must be moonlight-interactive"),
    "no labels at all": (lambda j: j["metadata"].pop("labels"), "queue-name is required"),
    "dressed up as a template": (lambda j: j["metadata"]["labels"].update({"moonlight.ai/template": "true"}), "must be suspended and carry no queue label"),
    "somebody's cluster": (lambda j: j["spec"].update(clusterSelector={"ray.io/cluster": "x"}), "clusterSelector"),
    "no cluster": (lambda j: j["spec"].pop("rayClusterSpec"), "rayClusterSpec is required"),
    "cluster that stays": (lambda j: j["spec"].update(shutdownAfterJobFinishes=False), "shutdownAfterJobFinishes"),
    "deletion strategy": (lambda j: j["spec"].update(deletionStrategy={"deletionRules": []}), "deletionStrategy"),
    "long after-life": (lambda j: j["spec"].update(ttlSecondsAfterFinished=86400), "60-3600"),
    "no deadline": (lambda j: j["spec"].pop("preRunningDeadlineSeconds"), "preRunningDeadlineSeconds"),
    "managed elsewhere": (lambda j: j["spec"].update(managedBy="me"), "managedBy"),
    "sidecar": (lambda j: j["spec"].update(submissionMode="SidecarMode"), "HTTPMode"),
    "no auth": (lambda j: j["spec"]["rayClusterSpec"].pop("authOptions"), "must be token"),
    "auth off": (lambda j: j["spec"]["rayClusterSpec"]["authOptions"].update(mode="disabled"), "must be token"),
    "load balancer": (lambda j: j["spec"]["rayClusterSpec"]["headGroupSpec"].update(serviceType="LoadBalancer"), "ClusterIP"),
    "ingress": (lambda j: j["spec"]["rayClusterSpec"]["headGroupSpec"].update(enableIngress=True), "no ingress"),
    "own service": (lambda j: j["spec"]["rayClusterSpec"]["headGroupSpec"].update(headService={}), "no ingress and no custom"),
    "host network": (lambda j: worker(j).update(hostNetwork=True), "no host namespaces"),
    "host pid on the head": (lambda j: head(j).update(hostPID=True), "no host namespaces"),
    "host path": (lambda j: worker(j)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}), "no hostPath"),
    "privileged": (lambda j: worker(j)["containers"][0]["securityContext"].update(privileged=True), "no privileged"),
    "another identity": (lambda j: worker(j).update(serviceAccountName="driver"), "service account of their stage"),
    "default identity": (lambda j: head(j).pop("serviceAccountName"), "service account of their stage"),
    "image by tag": (lambda j: worker(j)["containers"][0].update(image="moonlight-pipeline:latest"), "by digest"),
    "init container by tag": (lambda j: worker(j).update(initContainers=[{"name": "x", "image": "busybox"}]), "init containers must be given by digest"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_job_is_denied_for_its_own_reason(name: str) -> None:
    change, words = BAD[name]
    bad = job("train")
    change(bad)
    found = denials(render("k8s/overlays/prod"), bad)
    assert any(words in denial for denial in found), found


def test_a_job_older_than_the_policies_can_be_deleted() -> None:
    """Seen on an API server: KubeRay's removal of its finalizer is an update, and the object hung for ever."""
    old = job("publish")
    head(old)["containers"][0]["image"] = "moonlight-pipeline:latest"
    old["spec"].pop("activeDeadlineSeconds")
    assert len(denials(render("k8s/overlays/prod"), old, operation="UPDATE")) == 3
    old["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert denials(render("k8s/overlays/prod"), old, operation="UPDATE") == []


def test_kind_takes_images_by_tag() -> None:
    assert denials(render("k8s/overlays/kind"), job("publish", "kind"), user=DRIVER) == []


@pytest.mark.parametrize("operation", ["CREATE", "UPDATE", "DELETE"])
def test_templates_are_changed_only_by_those_who_may_update_rayjobs(operation: str) -> None:
    objects = render("k8s/overlays/prod")
    template = find(objects, "RayJob", "template-train")
    assert denials(objects, template, operation=operation, user=person("update rayjobs")) == []
    assert any(
        "through Git" in denial
        for denial in denials(objects, template, operation=operation, user=person("create rayjobs", "delete rayjobs"))
    )
    assert (
        denials(
            objects, template, operation="DELETE", user=User("system:serviceaccount:kube-system:namespace-controller")
        )
        == []
    )


def test_clusters_of_the_job_workspace_are_kuberays() -> None:
    objects = render("k8s/overlays/prod")
    spec = job("train")["spec"]["rayClusterSpec"]
    cluster = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "x", "namespace": "moonlight"},
        "spec": spec,
    }
    assert denials(objects, cluster, user=KUBERAY) == []
    everything_else = person(*(f"{verb} rayjobs" for verb in ("create", "update", "delete")), "create rayclusters")
    assert any("made by KubeRay" in denial for denial in denials(objects, cluster, user=everything_else))


def test_clusters_of_the_submit_workspace_are_authenticated() -> None:
    objects = render("k8s/overlays/prod")
    cluster = find(objects, "RayCluster", "submit")
    assert denials(objects, cluster) == []
    cluster["spec"]["authOptions"]["mode"] = "disabled"
    for operation in ("CREATE", "UPDATE"):  # nor may one that runs lose its token
        assert any("must be token" in denial for denial in denials(objects, cluster, operation=operation))


def workflow(spec: dict[str, Any], status: dict[str, Any] | None = None) -> Manifest:
    manifest: Manifest = {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Workflow",
        "metadata": {"name": "x", "namespace": "moonlight", "labels": {"moonlight.ai/owner": "somebody"}},
        "spec": {"workflowTemplateRef": {"name": "moonlight-run"}, **spec},
    }
    return manifest if status is None else {**manifest, "status": status}


def test_workflows_come_from_templates() -> None:
    objects = render("k8s/overlays/prod")
    submitted = workflow(
        {"arguments": {"parameters": []}}, {"startedAt": None, "finishedAt": None}
    )  # as the CLI sends it
    assert denials(objects, submitted) == []
    assert denials(objects, workflow({"shutdown": "Stop"}), operation="UPDATE", before=workflow({})) == []
    free = workflow({})
    free["spec"] = {"entrypoint": "x", "templates": []}
    assert any("must refer to a WorkflowTemplate" in denial for denial in denials(objects, free))


@pytest.mark.parametrize(
    "field", ["templates", "podSpecPatch", "serviceAccountName", "volumes", "hooks", "podMetadata"]
)
@pytest.mark.parametrize("operation", ["CREATE", "UPDATE"])
def test_workflows_bring_nothing_that_runs(field: str, operation: str) -> None:
    found = denials(
        render("k8s/overlays/prod"),
        workflow({field: "x"}),
        operation=operation,
        before=workflow({}),
        user=person("create pods"),
    )
    assert any("may set only" in denial for denial in found)


def test_the_templates_that_argo_has_stored_stay_argos() -> None:
    objects = render("k8s/overlays/prod")
    stored = {"storedWorkflowTemplateSpec": {"templates": [{"name": "stage", "container": {"image": "reviewed"}}]}}
    forged = {"storedWorkflowTemplateSpec": {"templates": [{"name": "stage", "container": {"image": "mine"}}]}}
    for operation, before in (("CREATE", None), ("UPDATE", workflow({})), ("UPDATE", workflow({}, stored))):
        request = {"operation": operation, "before": before}
        found = denials(objects, workflow({}, forged), **request, user=person("patch workflows"))
        assert any("written by Argo's controller" in denial for denial in found)
        assert denials(objects, workflow({}, forged), **request, user=person("create pods")) == []
    assert any(
        "Argo" in denial for denial in denials(objects, workflow({}), operation="UPDATE", before=workflow({}, stored))
    )
    kept = denials(objects, workflow({"suspend": True}, stored), operation="UPDATE", before=workflow({}, stored))
    assert kept == []
