"""checkov over the pods of every manifest, taken out of the RayJobs and workflows that hide them from it (fact 18).

It starts slowly, so it runs in `make k8s-check` (mark long) and only where `checkov` is on the path.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.k8s.manifests import needs_kubectl, pod_templates, render

SKIPPED = {
    "CKV_K8S_8": "liveness probe: KubeRay adds it; an Argo step has none",
    "CKV_K8S_9": "readiness probe: KubeRay adds it; an Argo step has none",
    "CKV_K8S_14": "image tag: digests are checked by our own rule and by admission",
    "CKV_K8S_43": "image digest: the same",
    "CKV_K8S_15": "imagePullPolicy Always: a digest cannot change",
    "CKV_K8S_21": "default namespace: the pods stand here without their object's namespace",
    "CKV_K8S_40": "uid over 10000: the Ray image's user is 1000",
    "CKV_K8S_38": "service account token: mounted only where a rule of ours asks for the label moonlight.ai/api-access",
    "CKV_K8S_13": "memory limit: Argo's script containers; a rule of ours checks them all",
    "CKV2_K8S_6": "network policy: they select by the labels that KubeRay adds",
}


@pytest.mark.long
@needs_kubectl
@pytest.mark.skipif(shutil.which("checkov") is None, reason="checkov is not installed")
def test_checkov_finds_nothing_in_the_unwrapped_pods(tmp_path: Path) -> None:
    count = 0
    for item in render("k8s/overlays/prod"):
        for place, pod in pod_templates(item).items():
            name = f"{item['metadata']['name']}-{place}".replace("[", "-").replace("]", "").replace(" ", "-").lower()
            manifest = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {**pod.get("metadata", {}), "name": name, "namespace": "moonlight"},
                "spec": pod["spec"],
            }
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(manifest))
            count += 1
    command = [
        "checkov",
        "-d",
        str(tmp_path),
        "--framework",
        "kubernetes",
        "-o",
        "json",
        "--compact",
        "--quiet",
        "--skip-check",
        ",".join(SKIPPED),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=None)
    report = json.loads(done.stdout)
    failed = {
        f"{entry['check_id']} {entry['check_name']} {entry['resource']}"
        for entry in report.get("results", {}).get("failed_checks", [])
    }
    assert failed == set()
    assert report["summary"]["passed"] > 10 * count
