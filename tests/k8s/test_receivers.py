"""Where alerts go: Alertmanager's configuration by `amtool`, its Secret, and the volumes below Prometheus and Alertmanager."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.k8s.manifests import REPOSITORY
from tests.k8s.test_alerts import RULES

VALUES = yaml.safe_load((REPOSITORY / "k8s/gitops/operators/prometheus.yaml").read_text())["spec"]["source"]["helm"][
    "valuesObject"
]
ALERTMANAGER, CONFIG = VALUES["alertmanager"]["alertmanagerSpec"], VALUES["alertmanager"]["config"]
needs_amtool = pytest.mark.skipif(
    shutil.which("amtool") is None, reason="amtool is not installed (Debian: prometheus-alertmanager)"
)


@needs_amtool
def test_alertmanager_takes_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "alertmanager.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    done = subprocess.run(["amtool", "check-config", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(CONFIG['receivers'])} receivers" in done.stdout


@needs_amtool
@pytest.mark.parametrize("alert", [*RULES, "Watchdog"])
@pytest.mark.parametrize("receiver", [entry["name"] for entry in CONFIG["receivers"] if entry["name"] != "null"])
def test_every_alert_reaches_the_receiver_that_is_named(alert: str, receiver: str, tmp_path: Path) -> None:
    path = tmp_path / "alertmanager.yaml"
    path.write_text(re.sub(r"receiver: moonlight\b", f"receiver: {receiver}", yaml.safe_dump(CONFIG)))
    severity = RULES[alert]["labels"]["severity"] if alert in RULES else "none"
    command = [
        "amtool",
        "config",
        "routes",
        "test",
        "--config.file",
        path,
        f"alertname={alert}",
        f"severity={severity}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (receiver if alert in RULES else "null")


def test_credentials_are_files_of_the_one_optional_secret() -> None:
    (volume,), (mount,) = ALERTMANAGER["volumes"], ALERTMANAGER["volumeMounts"]
    assert volume["name"] == mount["name"]
    assert volume["secret"] == {
        "secretName": "moonlight-alerts",
        "optional": True,
    }  # without it Alertmanager still starts
    files = re.findall(r"\w+_file: (\S+)", yaml.safe_dump(CONFIG))
    assert len(files) == 3
    page = (REPOSITORY / "docs/kubernetes.md").read_text()
    for file in files:
        folder, _, key = file.rpartition("/")
        assert folder == mount["mountPath"]
        assert f"`{key}`" in page or f"--from-literal={key}=" in page
    assert "secret generic moonlight-alerts" in page


def test_data_outlives_the_pods() -> None:
    prometheus = VALUES["prometheus"]["prometheusSpec"]
    volume = prometheus["storageSpec"]["volumeClaimTemplate"]["spec"]["resources"]["requests"]["storage"]
    assert int(prometheus["retentionSize"].removesuffix("GB")) * 1e9 < int(volume.removesuffix("Gi")) * 2**30
    assert ALERTMANAGER["storage"]["volumeClaimTemplate"]["spec"]["resources"]["requests"]["storage"]
    # On AWS nothing makes volumes or a default class but the EBS add-on.
    infra = (REPOSITORY / "infra/main.tf").read_text()
    assert "aws-ebs-csi-driver" in infra
    assert "defaultStorageClass = { enabled = true }" in infra
