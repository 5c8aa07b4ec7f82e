"""Argo CD: pinned sources, a project that allows exactly them, waves in order, and no running job among what it owns."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from tests.k8s.manifests import REPOSITORY, Manifest, label, select
from tests.k8s.rules import pods

PINNED = {"kuberay-operator": "1.7.0", "kueue": "0.19.2"}  # a pair: Kueue 0.19 speaks KubeRay 1.6's types (fact 19)
HEAD_IS_BACK_S = 900  # a new on-demand node and the first pull of the image
SELECTS_ALL = "serviceMonitorSelectorNilUsesHelmValues"  # false: Prometheus takes every ServiceMonitor
GATES = {
    "RayClusterStatusConditions": True,
    "RayJobDeletionPolicy": True,
    "RayMultiHostIndexing": True,
    "RayServiceIncrementalUpgrade": True,
    "RayCronJob": False,
    "RayClusterMTLS": False,
    "RayClusterNetworkPolicy": False,
    "RayClusterHistoryServer": False,
}


def check(objects: list[Manifest]) -> list[str]:
    project = next(select(objects, "AppProject", "moonlight"), None)
    if project is None:
        return ["no AppProject moonlight"]
    found = [f"{label(project)}: {problem}" for problem in _project(project)]
    for application in select(objects, "Application"):
        found += [f"{label(application)}: {problem}" for problem in _application(application, project)]
    return found


def _project(project: Manifest) -> Iterator[str]:
    spec = project["spec"]
    if {"group": "argoproj.io", "kind": "Workflow"} not in spec.get("namespaceResourceBlacklist", []):
        yield "Workflows are runs: Argo CD must not own them"
    if "*" in spec["sourceRepos"] or any(
        "*" in (entry["namespace"], entry["server"]) for entry in spec["destinations"]
    ):
        yield "sources and destinations are named, not '*'"
    if {"group": "*", "kind": "*"} in spec.get("clusterResourceWhitelist", []):
        yield "every cluster resource is allowed"


def _application(application: Manifest, project: Manifest) -> Iterator[str]:
    spec, name = application["spec"], application["metadata"]["name"]
    source, chart = spec["source"], spec["source"].get("chart")
    if spec["project"] != "moonlight":
        yield f"project {spec['project']}"
    if source["repoURL"] not in project["spec"]["sourceRepos"]:
        yield f"the project does not allow {source['repoURL']}"
    if not any(entry["namespace"] == spec["destination"]["namespace"] for entry in project["spec"]["destinations"]):
        yield f"the project does not allow namespace {spec['destination']['namespace']}"
    if not re.fullmatch(r"v?\d+\.\d+\.\d+", source.get("targetRevision", "")):
        yield f"targetRevision {source.get('targetRevision')!r} is not a pinned version"
    if chart in PINNED and source["targetRevision"] != PINNED[chart]:
        yield f"{chart} {source['targetRevision']} is not the tested {PINNED[chart]}"
    if "ServerSideApply=true" not in spec["syncPolicy"].get("syncOptions", []):
        yield "ServerSideApply is off: CRDs do not fit into an annotation"
    wave = int(application["metadata"]["annotations"]["argocd.argoproj.io/sync-wave"])
    if (wave < 0) != (chart is not None):
        yield f"wave {wave}: operators come before the pipeline"
    values = source.get("helm", {}).get("valuesObject", {})
    if chart == "kuberay-operator":
        gates = {entry["name"]: entry["enabled"] for entry in values["featureGates"]}
        if gates != GATES:
            yield f"featureGates must be the whole list (an override replaces it): {sorted(set(gates.items()) ^ set(GATES.items()))}"
        env = {entry["name"]: entry["value"] for entry in values.get("env", [])}
        if not int(env.get("RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS", 300)) >= HEAD_IS_BACK_S:
            yield f"RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS is below {HEAD_IS_BACK_S}: a job dies with its head, because a new one needs a node and the image"
    if chart == "kueue":
        ours = yaml.safe_load((REPOSITORY / "k8s/queues/manager-config.yaml").read_text())
        if yaml.safe_load(values["managerConfig"]["controllerManagerConfigYaml"]) != ours:
            yield "Kueue's configuration differs from k8s/queues/manager-config.yaml"
        yield from _kueue_configuration(ours)
    if chart == "argo-workflows":
        yield from _argo_values(values)
        if values["controller"].get("metricsConfig", {}).get("honorLabels") is not True:
            yield "metricsConfig.honorLabels is off: the label namespace would be the controller's, and no alert would match"
    if chart == "kube-prometheus-stack" and values["prometheus"]["prometheusSpec"].get(SELECTS_ALL) is not False:
        yield "Kueue's ServiceMonitor has no release label: Prometheus would not scrape it"
    if name == "moonlight":
        if "automated" in spec["syncPolicy"]:
            yield "production is synced by hand"
        ignored = {
            (entry["kind"], path)
            for entry in spec["ignoreDifferences"]
            for path in entry.get("jsonPointers", entry.get("jqPathExpressions", []))
        }
        for wanted in (
            ("RayCluster", ".spec.workerGroupSpecs[]?.replicas"),
            ("ClusterQueue", "/spec/stopPolicy"),
            ("CronWorkflow", "/spec/suspend"),
        ):
            if wanted not in ignored:
                yield f"ignoreDifferences lacks {wanted}: a switch pulled by hand would be pushed back"
        if not (REPOSITORY / source["path"] / "kustomization.yaml").exists():
            yield f"no overlay {source['path']}"


def _argo_values(values: Manifest) -> Iterator[str]:
    ours = yaml.safe_load((REPOSITORY / "k8s/workflows/argo-values.yaml").read_text())
    for section, wanted in ours.items():
        for key, value in wanted.items():
            if values.get(section, {}).get(key) != value:
                yield f"{section}.{key} differs from k8s/workflows/argo-values.yaml"
    if ours["controller"]["workflowRestrictions"] != {"templateReferencing": "Strict"}:
        yield "templateReferencing is not Strict"
    pod = {"containers": [{"name": "wait", "securityContext": ours["executor"]["securityContext"]}]}
    yield from (f"executor.securityContext: {problem}" for problem in pods.restricted(pod))


def _kueue_configuration(config: Manifest) -> Iterator[str]:
    if set(config["integrations"]["frameworks"]) != {"ray.io/rayjob", "ray.io/raycluster"}:
        yield "frameworks: only Ray's kinds, so that Argo's pods are never gated"
    if config.get("manageJobsWithoutQueueName") is not False:
        yield "manageJobsWithoutQueueName must be false: templates carry no queue"
    ready = config.get("waitForPodsReady", {})
    if ready.get("blockAdmission") is not False or "timeout" not in ready or "recoveryTimeout" not in ready:
        yield "waitForPodsReady needs timeout, recoveryTimeout and blockAdmission: false"
    if "backoffLimitCount" not in ready.get("requeuingStrategy", {}):
        yield "requeuingStrategy.backoffLimitCount is missing: a broken gang would requeue for ever"
