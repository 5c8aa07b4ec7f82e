"""Argo CD's health scripts (fact 20), run in Lua over the states that the controllers write."""

from __future__ import annotations

from typing import Any

import lupa
import pytest
import yaml

from tests.k8s.manifests import REPOSITORY

SCRIPTS = yaml.safe_load((REPOSITORY / "k8s/gitops/argocd-cm.yaml").read_text())["data"]
TEMPLATE = {"labels": {"moonlight.ai/template": "true"}}


def health(kind: str, item: dict[str, Any]) -> str:
    runtime = lupa.LuaRuntime(unpack_returned_tuples=True)

    def table(value: Any) -> Any:
        if isinstance(value, dict):
            return runtime.table_from({key: table(below) for key, below in value.items()})
        if isinstance(value, list):
            return runtime.table_from([table(below) for below in value])
        return value

    runtime.globals().obj = table({"metadata": {}, "spec": {}, **item})
    return str(runtime.execute(SCRIPTS[f"resource.customizations.health.{kind}"])["status"])


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"metadata": TEMPLATE, "spec": {"suspend": True}, "status": {"jobDeploymentStatus": "Suspended"}}, "Healthy"),
        ({"metadata": TEMPLATE, "spec": {}}, "Degraded"),
        ({}, "Progressing"),
        ({"status": {"jobDeploymentStatus": "Suspended"}}, "Suspended"),
        ({"status": {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}}, "Progressing"),
        ({"status": {"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED"}}, "Progressing"),  # fact 6
        ({"status": {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}}, "Healthy"),
        ({"status": {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}}, "Degraded"),  # fact 5
        ({"status": {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "x"}}, "Degraded"),
        ({"status": {"jobDeploymentStatus": "ValidationFailed"}}, "Degraded"),
    ],
)
def test_rayjob(item: dict[str, Any], expected: str) -> None:
    assert health("ray.io_RayJob", item) == expected


@pytest.mark.parametrize(
    ("state", "expected"),
    [("ready", "Healthy"), ("failed", "Degraded"), ("suspended", "Suspended"), ("", "Progressing")],
)
def test_raycluster(state: str, expected: str) -> None:
    assert health("ray.io_RayCluster", {"status": {"state": state}}) == expected


@pytest.mark.parametrize("kind", ["ClusterQueue", "LocalQueue", "AdmissionCheck"])
@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({"type": "Active", "status": "True"}, "Healthy"),
        ({"type": "Active", "status": "False", "reason": "Stopped"}, "Suspended"),
        ({"type": "Active", "status": "False", "reason": "FlavorNotFound"}, "Degraded"),
        ({"type": "Other", "status": "True"}, "Progressing"),
    ],
)
def test_kueue(kind: str, condition: dict[str, str], expected: str) -> None:
    assert health(f"kueue.x-k8s.io_{kind}", {"status": {"conditions": [condition]}}) == expected


@pytest.mark.parametrize(
    ("status", "expected"), [({}, "Progressing"), ({"health": {"status": "Degraded"}}, "Degraded")]
)
def test_application(status: dict[str, Any], expected: str) -> None:
    assert health("argoproj.io_Application", {"status": status}) == expected
