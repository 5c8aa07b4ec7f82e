"""The rules themselves: each listed fault, put into the rendered prod overlay, is caught by the rule that is there for it."""

from __future__ import annotations

import pytest
import yaml

from tests.k8s.manifests import REPOSITORY, find, needs_kubectl, render
from tests.k8s.mutations import MUTATIONS, drop, put
from tests.k8s.rules import gitops_problems, problems

pytestmark = needs_kubectl


@pytest.mark.parametrize("name", MUTATIONS)
def test_fault_is_caught(name: str) -> None:
    mutation = MUTATIONS[name]
    objects = render("k8s/overlays/prod")
    mutation.change(objects)
    found = problems(objects, digests=True)
    assert any(mutation.caught_by in problem for problem in found), found or "nothing was found"


GITOPS = {
    "chart that is not pinned": (put("Application/kuberay-operator", "spec.source.targetRevision", "1.*"), "not a pinned version"),
    "KubeRay that was not tested with this Kueue": (put("Application/kuberay-operator", "spec.source.targetRevision", "1.8.0"), "not the tested"),
    "gate switched on": (put("Application/kuberay-operator", "spec.source.helm.valuesObject.featureGates.4.enabled", True), "featureGates"),
    "no patience with a lost head": (drop("Application/kuberay-operator", "spec.source.helm.valuesObject.env"), "a job dies with its head"),
    "gate forgotten": (drop("Application/kuberay-operator", "spec.source.helm.valuesObject.featureGates.1"), "featureGates"),
    "source outside the project": (put("Application/kueue", "spec.source.repoURL", "https://example.com/charts"), "does not allow"),
    "client-side apply of CRDs": (put("Application/kuberay-operator", "spec.syncPolicy.syncOptions", []), "ServerSideApply"),
    "pipeline before its operators": (put("Application/moonlight", "metadata.annotations.argocd\\.argoproj\\.io/sync-wave", "-30"), "operators come before"),
    "production synced by itself": (put("Application/moonlight", "spec.syncPolicy.automated", {}), "by hand"),
    "Argo CD owning runs": (put("AppProject/moonlight", "spec.namespaceResourceBlacklist", []), "must not own"),
    "Argo CD pushing the kill switch back": (drop("Application/moonlight", "spec.ignoreDifferences.1"), "ignoreDifferences"),
    "alerts on a namespace that Prometheus renames": (drop("Application/argo-workflows", "spec.source.helm.valuesObject.controller.metricsConfig.honorLabels"), "honorLabels"),
    "Kueue's metrics unseen": (drop("Application/kube-prometheus-stack", "spec.source.helm.valuesObject.prometheus.prometheusSpec.serviceMonitorSelectorNilUsesHelmValues"), "would not scrape"),
    "Argo's own containers unhardened": (drop("Application/argo-workflows", "spec.source.helm.valuesObject.executor.securityContext"), "executor.securityContext differs"),
    "retries that wait for a dead executor": (drop("Application/argo-workflows", "spec.source.helm.valuesObject.controller.extraEnv"), "controller.extraEnv differs"),
    "templates of anybody's making": (put("Application/argo-workflows", "spec.source.helm.valuesObject.controller.workflowRestrictions.templateReferencing", "Secure"), "controller.workflowRestrictions differs"),
}  # fmt: skip


@pytest.mark.parametrize("name", GITOPS)
def test_gitops_fault_is_caught(name: str) -> None:
    change, words = GITOPS[name]
    objects = render("k8s/gitops")
    change(objects)
    found = gitops_problems(objects)
    assert any(words in problem for problem in found), found or "nothing was found"


def test_kueue_configuration_of_gitops_is_ours() -> None:
    objects = render("k8s/gitops")
    values = find(objects, "Application", "kueue")["spec"]["source"]["helm"]["valuesObject"]["managerConfig"]
    changed = yaml.safe_load(values["controllerManagerConfigYaml"]) | {"manageJobsWithoutQueueName": True}
    values["controllerManagerConfigYaml"] = yaml.safe_dump(changed)
    assert any("differs from" in problem for problem in gitops_problems(objects))
    assert (REPOSITORY / "k8s/queues/manager-config.yaml").exists()


def test_the_list_is_long_enough() -> None:
    assert len(MUTATIONS) >= 60
