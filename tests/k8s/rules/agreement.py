"""Names that must agree between objects: identities, queues, priorities, volumes, ports, labels, and the driver's own constants."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipeline.workflow.rayjobs import Outcome
from pipeline.workflow.rayjobs_template import STAGES, TEMPLATE_LABEL, template_name, unsafe
from tests.k8s.manifests import Manifest, canonical, label, pod_templates, select

# Infrastructure, SIGTERM, SIGKILL; and what is no verdict of the driver: nothing ran, its executor died, its node restarted.
RETRIED = {int(Outcome.INFRASTRUCTURE), int(Outcome.DETACHED), 137, -1, 0, 255}
PRIORITIES = ["moonlight-interactive", "moonlight-scheduled", "moonlight-release"]
RAY_VERSION = "2.60.0"
RUNS = {"mountPath": "/etc/moonlight/runs", "readOnly": True}
OF_OPERATORS = {"monitoring", "argo"}  # namespaces that their charts' applications make
FORBIDDEN_TO_DRIVERS = {"secrets", "pods", "pods/exec", "clusterqueues"}


def check(objects: list[Manifest]) -> list[str]:
    return [
        *_stages(objects),
        *_identities(objects),
        *_rights(objects),
        *_references(objects),
        *_configurations(objects),
        *_priorities(objects),
        *_common(objects),
        *_budgets(objects),
    ]


def _stages(objects: list[Manifest]) -> Iterator[str]:
    for stage in STAGES:
        template = next(select(objects, "RayJob", template_name(stage), "moonlight"), None)
        if template is None:
            yield f"no RayJob {template_name(stage)}"
            continue
        yield from (f"{label(template)}: {problem}" for problem in unsafe(template))
        spec = template["spec"]
        if spec["entrypoint"] != f"python -m jobs.{stage}":
            yield f"{label(template)}: entrypoint {spec['entrypoint']!r}"
        if spec["rayClusterSpec"].get("rayVersion") != RAY_VERSION:
            yield f"{label(template)}: rayVersion is not {RAY_VERSION}"
        if not 60 <= spec.get("ttlSecondsAfterFinished", 0) <= 3600:
            yield f"{label(template)}: ttlSecondsAfterFinished is not 60-3600: no time for logs, or the object lingers"
        for place, pod in pod_templates(template).items():
            if pod["spec"].get("serviceAccountName") != stage:
                yield f"{label(template)} {place}: runs as {pod['spec'].get('serviceAccountName')!r}, not as {stage}"
            if pod["metadata"]["labels"].get("moonlight.ai/stage") != stage:
                yield f"{label(template)} {place}: label moonlight.ai/stage is not {stage}"
        if spec.get("backoffLimit", 0) < 1:
            yield f"{label(template)}: no backoffLimit: one lost head would fail the stage"
    for job in select(objects, "RayJob"):
        if job["metadata"].get("labels", {}).get(TEMPLATE_LABEL) != "true":
            yield f"{label(job)}: only templates are in Git"


def _identities(objects: list[Manifest]) -> Iterator[str]:
    for item in objects:
        for place, pod in pod_templates(item).items():
            name = pod["spec"].get("serviceAccountName")
            if (
                item["kind"] == "Deployment"
                and name is None
                and pod["spec"].get("automountServiceAccountToken") is False
            ):
                continue
            if not list(select(objects, "ServiceAccount", name, item["metadata"].get("namespace"))):
                yield f"{label(item)} {place}: no ServiceAccount {name!r} in its namespace"
    for account in select(objects, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"{label(account)}: mounts its token by default"
    for kind in ("RoleBinding", "ClusterRoleBinding"):
        for binding in select(objects, kind):
            role, namespace = binding["roleRef"], binding["metadata"].get("namespace")
            if not list(select(objects, role["kind"], role["name"], namespace if role["kind"] == "Role" else None)):
                yield f"{label(binding)}: no {role['kind']} {role['name']}"
            for subject in binding.get("subjects", []):
                known = subject["kind"] != "ServiceAccount" or list(
                    select(objects, "ServiceAccount", subject["name"], subject["namespace"])
                )
                if not known:
                    yield f"{label(binding)}: no ServiceAccount {subject['namespace']}/{subject['name']}"


def _rights(objects: list[Manifest]) -> Iterator[str]:
    for kind in ("Role", "ClusterRole"):
        for role in select(objects, kind):
            for rule in role["rules"]:
                if "*" in [*rule.get("verbs", []), *rule.get("resources", []), *rule.get("apiGroups", [])]:
                    yield f"{label(role)}: wildcard"
                if set(rule.get("verbs", [])) & {"escalate", "bind", "impersonate"}:
                    yield f"{label(role)}: {rule['verbs']}"
                if "configmaps" in rule["resources"] and not rule.get("resourceNames"):
                    yield f"{label(role)}: any ConfigMap, also the one that says where logs go"
                if role["metadata"]["name"] == "driver" and set(rule["resources"]) & FORBIDDEN_TO_DRIVERS:
                    yield f"{label(role)}: a driver needs no {sorted(set(rule['resources']) & FORBIDDEN_TO_DRIVERS)}"
                if (
                    role["metadata"]["name"] == "driver"
                    and "rayjobs" in rule["resources"]
                    and "update" in rule["verbs"]
                ):
                    yield f"{label(role)}: update is what protects the templates (policies/rayjob-template.yaml)"
    needed = [("rayjobs", verb) for verb in ("get", "list", "watch", "create", "delete")] + [
        ("localqueues", "get"),
        ("workloads", "list"),
    ]
    role = next(select(objects, "Role", "driver", "moonlight"), {"rules": []})
    for resource, verb in needed:
        if not any(resource in rule["resources"] and verb in rule["verbs"] for rule in role["rules"]):
            yield f"Role/moonlight/driver: the driver calls {verb} on {resource}"


def _references(objects: list[Manifest]) -> Iterator[str]:
    for item in objects:
        namespace = item["metadata"].get("namespace")
        if namespace and namespace not in OF_OPERATORS and not list(select(objects, "Namespace", namespace)):
            yield f"{label(item)}: no Namespace {namespace}"
        for place, pod in pod_templates(item).items():
            for volume in pod["spec"].get("volumes", []):
                for kind, key in (("ConfigMap", "configMap"), ("Secret", "secret")):
                    source = volume.get(key, {})
                    name = source.get("name") or source.get("secretName")
                    if name and not source.get("optional") and not list(select(objects, kind, name, namespace)):
                        yield f"{label(item)} {place}: no {kind} {name}"
            for container in pod["spec"]["containers"]:
                for source in container.get("envFrom", []):
                    name = source.get("secretRef", {}).get("name")
                    if name and not list(select(objects, "Secret", name, namespace)):
                        yield f"{label(item)} {place}: no Secret {name}"
    ports = {
        port["name"]
        for item in objects
        for pod in pod_templates(item).values()
        for container in pod["spec"]["containers"]
        for port in container.get("ports", [])
    }
    for monitor in select(objects, "PodMonitor"):
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            if endpoint["port"] not in ports:
                yield f"{label(monitor)}: no container has a port {endpoint['port']}"
    for kind in ("PodMonitor", "PrometheusRule"):
        for item in select(objects, kind):
            if item["metadata"].get("labels", {}).get("release") != "kube-prometheus-stack":
                yield f"{label(item)}: without the label release Prometheus does not see it"


def _configurations(objects: list[Manifest]) -> Iterator[str]:
    """A path that a user gives as --config is the same file wherever it is opened: in every driver, stage and collector of logs."""
    for item in objects:
        for place, pod in pod_templates(item).items():
            volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
            for container in pod["spec"]["containers"]:
                ray = container["name"] in ("ray-head", "ray-worker", "logs")
                if not ray and "--config" not in " ".join(container.get("args", [])):
                    continue
                mounts = {mount["mountPath"]: mount for mount in container.get("volumeMounts", [])}
                mount = mounts.get(RUNS["mountPath"], {})
                source = volumes.get(mount.get("name", ""), {}).get("configMap", {})
                if not RUNS.items() <= mount.items() or source != {"name": "moonlight-runs", "optional": True}:
                    yield (
                        f"{label(item)} {place}: {container['name']} does not mount the users' configurations "
                        f"(ConfigMap moonlight-runs, optional, at {RUNS['mountPath']})"
                    )


def _priorities(objects: list[Manifest]) -> Iterator[str]:
    values = {item["metadata"]["name"]: item["value"] for item in select(objects, "WorkloadPriorityClass")}
    if sorted(values, key=lambda name: values[name]) != PRIORITIES or len(set(values.values())) < 3:
        yield f"WorkloadPriorityClass: expected {' < '.join(PRIORITIES)}, found {values}"
    for kind in ("WorkflowTemplate", "CronWorkflow"):
        for item in select(objects, kind):
            for name in re.findall(r'"name": "priority", "value": "([^"]*)"', canonical(item)):
                if name not in values:
                    yield f"{label(item)}: no WorkloadPriorityClass {name}"
    for item in select(objects, "WorkflowTemplate"):
        for template in item["spec"]["templates"]:
            if "retryStrategy" not in template:
                continue
            listed = re.search(r"exitCode\) in \[([^]]*)\]", template["retryStrategy"].get("expression", ""))
            codes = {int(code) for code in re.findall(r"-?\d+", listed.group(1))} if listed else set()
            if codes != RETRIED:
                yield f"{label(item)}: {template['name']} retries on {sorted(codes)}, not on {sorted(RETRIED)}"


def _common(objects: list[Manifest]) -> Iterator[str]:
    for item in objects:
        if item["metadata"].get("labels", {}).get("app.kubernetes.io/part-of") != "moonlight-pipeline":
            yield f"{label(item)}: label app.kubernetes.io/part-of is missing"
    for space in select(objects, "Namespace"):
        if space["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
            yield f"{label(space)}: pod security is not restricted"
    for limit in ("services.loadbalancers", "services.nodeports"):
        quota = next(select(objects, "ResourceQuota", "objects", "moonlight"), {"spec": {"hard": {}}})
        if quota["spec"]["hard"].get(limit) != "0":
            yield f"ResourceQuota: {limit} is not 0"


def _budgets(objects: list[Manifest]) -> Iterator[str]:
    protected = set()
    for budget in select(objects, "PodDisruptionBudget"):
        spec = budget["spec"]
        if "maxUnavailable" in spec or not isinstance(spec.get("minAvailable"), int):
            yield f"{label(budget)}: Ray's pods have no built-in controller: only a whole minAvailable works"
        elif spec["minAvailable"] < 1000:
            yield f"{label(budget)}: minAvailable {spec['minAvailable']} lets some be evicted"
        protected.add((budget["metadata"]["namespace"], spec["selector"]["matchLabels"].get("ray.io/node-type")))
    for wanted in (("moonlight", "head"), ("moonlight", "worker"), ("moonlight-submit", "head")):
        if wanted not in protected:
            yield f"no PodDisruptionBudget for {wanted[1]}s in {wanted[0]}"
