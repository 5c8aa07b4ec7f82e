"""The parts of `make e2e` that can be tried without a cluster: its objects, its script, and the check of the published model."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import yaml

from pipeline.config.load import load_config
from pipeline.workflow.rayjobs_template import _quantity
from tests.k8s import crds
from tests.k8s.manifests import REPOSITORY, Manifest, find, needs_kubectl, pod_templates, render, select
from tests.k8s.rules.gitops import PINNED
from tests.k8s.rules.policies import GIT, denials

E2E = REPOSITORY / "k8s/e2e"
SCRIPT = (E2E / "e2e.sh").read_text()


@needs_kubectl
@pytest.mark.parametrize("name", ["workflow.yaml", "retrain.yaml"])
def test_the_workflow_is_valid_and_admitted(name: str) -> None:
    workflow = yaml.safe_load((E2E / name).read_text())
    objects = render("k8s/overlays/kind")
    assert denials(objects, workflow, user=GIT) == []  # whoever runs it has installed everything
    assert crds.problems(workflow) == []
    template = find(objects, "WorkflowTemplate", workflow["spec"]["workflowTemplateRef"]["name"])
    known = {entry["name"] for entry in template["spec"]["arguments"]["parameters"]}
    given = {entry["name"]: entry["value"] for entry in workflow["spec"]["arguments"]["parameters"]}
    assert set(given) <= known
    service = find(objects, "Service", "s3", "moonlight-storage")
    assert f"http://s3.moonlight-storage.svc:{service['spec']['ports'][0]['port']}" in given["overrides"]


@needs_kubectl
@pytest.mark.parametrize(("weights", "passed"), [("", []), ("promoted", ["training.initial_weights=promoted"])])
def test_a_step_passes_on_what_the_schedule_says(weights: str, passed: list[str]) -> None:
    """The step's own shell, as Argo would start it, with a python that only shows its arguments."""
    objects = render("k8s/overlays/prod")
    parameters = find(objects, "CronWorkflow", "moonlight-weekly")["spec"]["workflowSpec"]["arguments"]["parameters"]
    overrides = next(entry["value"] for entry in parameters if entry["name"] == "overrides")
    templates = find(objects, "WorkflowTemplate", "moonlight-run")["spec"]["templates"]
    stage = next(template["container"] for template in templates if template["name"] == "stage")
    shell, option = stage["command"]
    values = {"CONFIG": "a preset", "STAGE": "train", "RUN_ID": "r", "OVERRIDES": overrides, "INITIAL_WEIGHTS": weights}
    assert {entry["name"] for entry in stage["env"]} >= values.keys()
    script = stage["args"][0].replace("exec python", "show") + "\n"
    done = subprocess.run(
        [shell, option, 'show() { printf "%s\\n" "$@"; };' + script],
        env=values,
        capture_output=True,
        text=True,
        check=True,
    )
    fixed = ["-m", "jobs.pipeline", "--config", "a preset", "--backend", "kuberay", "--only", "train", "run_id=r"]
    assert done.stdout.splitlines() == [*fixed, *passed, *overrides.split()]
    assert load_config("moonlight-16b-a3b", overrides.split()).schedule.total_tokens == 50331648000


def test_the_script_is_bash_and_names_real_files_and_versions() -> None:
    assert subprocess.run(["bash", "-n", str(E2E / "e2e.sh")], check=False).returncode == 0
    assert os.access(E2E / "e2e.sh", os.X_OK)
    for path in re.findall(r"\bk8s/[\w./-]+", SCRIPT):
        assert (REPOSITORY / path).exists(), path
    for chart, version in PINNED.items():
        assert re.search(rf"/?{chart}.* --version {re.escape(version)}", SCRIPT), chart
    steps = set(re.findall(r"^(\w+)\(\)", SCRIPT, re.M))
    makefile = (REPOSITORY / "k8s/k8s.mk").read_text()
    for line in re.findall(r"k8s/e2e/e2e\.sh (.+)", makefile):
        assert set(line.split()) <= steps


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def put(url: str, data: bytes = b"") -> None:
    import urllib.request

    headers = {"Content-Type": "application/octet-stream", "Authorization": "AWS local:local"}
    urllib.request.urlopen(urllib.request.Request(url, data, headers, method="PUT"), timeout=30).close()


def emptied(server: str) -> None:
    bucket = [sys.executable, "-", server, "moonlight"]
    subprocess.run(bucket, input=(E2E / "bucket.py").read_text(), text=True, check=True)


def verify(server: str, root: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-", server, "moonlight", root],
        input=(E2E / "verify.py").read_text(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_verify_wants_every_file_whole(server: str) -> None:
    emptied(server)
    assert "0 promoted models" in verify(server, "e2e").stderr
    model = f"{server}/moonlight/e2e/models/moonlight-debug"
    config = {"training": {"initial_weights": "models/moonlight-debug/v0@sha256:12"}}
    files = [{"path": "config.json", "bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}]
    put(f"{model}/v1/config.json", b"{}")
    put(
        f"{model}/v1/manifest.json",
        json.dumps(
            {"name": "moonlight-debug", "files": files, "loss": 3.0, "bits_per_byte": 1.5, "config": config}
        ).encode(),
    )
    put(f"{model}/latest.json", json.dumps({"version": "v1"}).encode())
    done = verify(server, "e2e")
    assert (done.returncode, done.stdout.split(",")[0], done.stderr) == (0, "published: moonlight-debug v1", "")
    assert "started from models/" in done.stdout  # what the step retrain looks for
    put(f"{model}/v1/config.json", b"[]")
    done = verify(server, "e2e")
    assert done.returncode == 1
    assert "config.json: sha256" in done.stderr
    emptied(server)
    assert "0 promoted models" in verify(server, "e2e").stderr


@needs_kubectl
def test_a_laptop_can_hold_it() -> None:
    """Requests of everything of ours that runs at once, the largest stage with all its workers among it: under 4 CPUs and 10 GiB."""
    objects = render("k8s/overlays/kind")
    always = [find(objects, "Deployment", "s3", "moonlight-storage"), find(objects, "RayCluster", "submit")]
    steps = pod_templates(find(objects, "WorkflowTemplate", "moonlight-run"))
    driver = np.max([requests(pod["spec"]["containers"]) for pod in steps.values()], axis=0)
    stages = []
    for job in select(objects, "RayJob"):
        cluster = job["spec"]["rayClusterSpec"]
        (group,) = cluster["workerGroupSpecs"]
        head = list(cluster["headGroupSpec"]["template"]["spec"]["containers"])
        if cluster["enableInTreeAutoscaling"]:
            head.append({"resources": cluster["autoscalerOptions"]["resources"]})
        workers = requests(group["template"]["spec"]["containers"])
        stages.append(requests(head) + workers * group["maxReplicas"])
    fixed = [requests(pod["spec"]["containers"]) for item in always for pod in pod_templates(item).values()]
    cpu, memory = sum([*fixed, driver, np.max(stages, axis=0)])
    assert (len(stages), cpu < 4, memory < 10) == (4, True, True), (cpu, memory)


def requests(containers: list[Manifest]) -> np.ndarray:
    """CPUs and GiB."""
    asked = [container["resources"]["requests"] for container in containers]
    gib = {"Mi": 1 / 1024, "Gi": 1.0}
    return np.array(
        [
            sum(_quantity(each["cpu"]) for each in asked),
            sum(float(m[:-2]) * gib[m[-2:]] for m in (e["memory"] for e in asked)),
        ]
    )


@needs_kubectl
def test_every_image_of_kind_is_in_the_node_or_pinned() -> None:
    """Our image is loaded, never pulled; the others have a version."""
    for item in render("k8s/overlays/kind"):
        for pod in pod_templates(item).values():
            for container in pod["spec"]["containers"]:
                if container["name"] == "autoscaler":  # the image and policy of the head, KubeRay says
                    continue
                assert container["imagePullPolicy"] == "IfNotPresent"
                assert re.search(r":(e2e|\d+\.\d+\.\d+)$", container["image"])
