"""`jobs.pipeline --backend kuberay` from its command line to a RayJob, by a kubeconfig, against the fake API server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from jobs.pipeline import main
from pipeline.workflow.rayjobs import Outcome
from tests.workflow.driver import filled, job_appears
from tests.workflow.fake_kubernetes import FakeKubernetes


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKubernetes]:
    fake = filled()
    server = f"http://127.0.0.1:{fake.server.server_port}"
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "fake",
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "me"}}],
        "clusters": [{"name": "fake", "cluster": {"server": server}}],
        "users": [{"name": "me", "user": {"token": "t"}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    yield fake
    fake.close()


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, Outcome.STOPPED),
        (
            {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"},
            Outcome.NO_MANIFEST,
        ),  # nobody prepared anything
        ({"jobDeploymentStatus": "ValidationFailed", "message": "no"}, Outcome.VALIDATION),
    ],
)
def test_the_exit_code_is_the_truth(
    cluster: FakeKubernetes, tmp_path: Path, status: dict[str, str], expected: Outcome
) -> None:
    codes: list[int] = []
    arguments = ["--backend", "kuberay", "--only", "prepare", "--config", "debug", f"storage.root={tmp_path / 'runs'}"]
    driver = threading.Thread(target=lambda: codes.append(main(arguments)), daemon=True)
    driver.start()
    name = job_appears(cluster, "debug-prepare-1")
    job = cluster.get(name)
    assert job is not None
    assert job["spec"]["entrypoint"] == f"python -m jobs.prepare --config debug storage.root={tmp_path / 'runs'}"
    cluster.set_status(name, **status)
    driver.join(60)
    assert codes == [int(expected)]
