"""PromQL: every expression parses, and every metric is one that some exporter of ours is known to have."""

from __future__ import annotations

import re

import promql_parser

from tests.k8s.manifests import REPOSITORY, Manifest, label, select

# Exporter -> metrics, from the source of the version that we install.
METRICS = {
    "jobs.train (ray.util.metrics)": {
        "ray_moonlight_step",
        "ray_moonlight_skipped_steps_total",
        "ray_moonlight_checkpoint_timestamp_seconds",
    },
    "Ray Train 2.60": {"ray_train_worker_group_start_total_time_s"},
    "KubeRay 1.7.0 ray-operator/controllers/ray/metrics": {"kuberay_job_deployment_status", "kuberay_cluster_info"},
    "Kueue 0.19.2 pkg/metrics": {
        "kueue_pending_workloads",
        "kueue_evicted_workloads_total",
        "kueue_cluster_queue_status",
    },
    "kube-state-metrics": {"kube_pod_container_status_restarts_total"},
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
                try:
                    promql_parser.parse(rule["expr"])
                except ValueError as error:
                    found.append(f"{where}: {error}")
                    continue
                for metric in _metrics(rule["expr"]) - KNOWN:
                    found.append(f"{where}: no exporter has a metric {metric}")
                if rule.get("labels", {}).get("severity") not in ("critical", "warning"):
                    found.append(f"{where}: no severity")
                runbook = re.search(r'"(.*)"', rule.get("annotations", {}).get("runbook", ""))
                if runbook is None or (headings is not None and runbook.group(1) not in headings):
                    found.append(f"{where}: runbook names no section of docs/kubernetes.md")
    return found


def _metrics(expression: str) -> set[str]:
    """Metric names of an expression: identifiers with an exporter's prefix, outside of selectors and `by (...)`."""
    plain = re.sub(r"\bby \([^)]*\)|\{[^}]*\}", "", expression)
    return set(re.findall(r"\b(?:ray|kuberay|kueue|kube|argo)_[a-z0-9_]+\b", plain))
