"""PromQL of alerts and dashboards: every expression parses, and every metric is one that some exporter is known to have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser

from jobs.on_ray.gauges import PREFIX
from jobs.stages import STAGES
from tests.k8s.manifests import REPOSITORY, Manifest, label, select

# Exporter -> metrics, from the source of the version that we install.
METRICS = {
    "jobs/on_ray/gauges.py": {f"ray_{PREFIX}{name}" for stage in STAGES for name in stage.GAUGES},
    "Ray 2.60 dashboard/modules/reporter": {
        "ray_node_gpus_utilization",
        "ray_node_cpu_utilization",
        "ray_node_disk_utilization_percentage",
        "ray_node_mem_total",
        "ray_node_mem_used",
    },
    "Ray 2.60 data/_internal/stats.py": {"ray_data_num_tasks_running", "ray_data_output_rows"},
    "Ray 2.60 core_worker": {"ray_tasks"},
    "KubeRay 1.7.0 ray-operator/controllers/ray/metrics": {
        "kuberay_job_deployment_status",
        "kuberay_job_execution_duration_seconds",
        "kuberay_cluster_info",
    },
    "Kueue 0.19.2 pkg/metrics": {
        "kueue_pending_workloads",
        "kueue_admitted_active_workloads",
        "kueue_evicted_workloads_total",
        "kueue_cluster_queue_status",
    },
    "kube-state-metrics": {"kube_pod_container_status_restarts_total", "kube_pod_info"},
    "Argo Workflows 4": {"argo_workflows_total_count"},
}
KNOWN = set().union(*METRICS.values())


def check(objects: list[Manifest]) -> list[str]:
    found = []
    headings = (
        re.findall(r"^#+ (.*)$", (REPOSITORY / "docs/kubernetes.md").read_text(), re.M)
        if (REPOSITORY / "docs/kubernetes.md").exists()
        else None
    )
    for item in select(objects, "PrometheusRule"):
        for group in item["spec"]["groups"]:
            for rule in group["rules"]:
                where = f"{label(item)} {rule.get('alert') or rule.get('record')}"
                found += [f"{where}: {problem}" for problem in _expression(rule["expr"])]
                if rule.get("labels", {}).get("severity") not in ("critical", "warning"):
                    found.append(f"{where}: no severity")
                runbook = re.search(r'"(.*)"', rule.get("annotations", {}).get("runbook", ""))
                if runbook is None or (headings is not None and runbook.group(1) not in headings):
                    found.append(f"{where}: runbook names no section of docs/kubernetes.md")
    for item in select(objects, "ConfigMap"):
        if item["metadata"].get("labels", {}).get("grafana_dashboard") == "1":
            for name, text in item["data"].items():
                found += [f"{label(item)} {name}: {problem}" for problem in _dashboard(json.loads(text))]
    return found


def _dashboard(board: dict[str, Any]) -> Iterator[str]:
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield from (f"{panel['title']}: {problem}" for problem in _expression(target["expr"]))
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            metric = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            if metric is None or metric.group(1) not in KNOWN:
                yield f"variable {variable['name']}: no exporter has {variable['query']['query']}"


def _expression(text: str) -> Iterator[str]:
    try:
        promql_parser.parse(text)
    except ValueError as error:
        yield str(error)
        return
    for metric in sorted(_metrics(text) - KNOWN):
        yield f"no exporter has a metric {metric}"


def _metrics(expression: str) -> set[str]:
    """Metric names of an expression: identifiers with an exporter's prefix, outside of selectors and `by (...)`."""
    plain = re.sub(r'\b(by|on) \([^)]*\)|"[^"]*"', "", expression)
    plain = re.sub(r"\{[^}]*\}", "", plain)
    return set(re.findall(r"\b(?:ray|kuberay|kueue|kube|argo)_[a-z0-9_]+\b", plain))
