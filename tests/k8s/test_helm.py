"""`make operators`: helm gets of every operator what Argo CD would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.k8s.manifests import REPOSITORY

OPERATORS = REPOSITORY / "k8s/gitops/operators"
HELM = '#!/usr/bin/env bash\necho "$*" >> "$CALLS"\ncat > "$CALLS.$(wc -l < "$CALLS")"\n[ "$4" != "${BROKEN:-}" ]\n'


def helm(folder: Path, *names: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "helm").write_text(HELM)
    (folder / "helm").chmod(0o755)
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "k8s/gitops/helm.py"), *names],
        env={"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_operator_in_the_order_of_the_makefile(tmp_path: Path) -> None:
    makefile = (REPOSITORY / "k8s/k8s.mk").read_text()
    found = re.search(r"^OPERATORS \?= (.*)$", makefile, re.M)
    assert found is not None
    names = found.group(1).split()
    assert names[0] == "prometheus"  # ServiceMonitor and PodMonitor are its kinds
    assert sorted(names) == sorted(path.stem for path in OPERATORS.glob("*.yaml"))
    done = helm(tmp_path, *names)
    assert done.returncode == 0, done.stderr
    for index, (name, call) in enumerate(zip(names, (tmp_path / "calls").read_text().splitlines(), strict=True), 1):
        spec = yaml.safe_load((OPERATORS / f"{name}.yaml").read_text())["spec"]
        source = spec["source"]
        assert f"--version {source['targetRevision']} --namespace {spec['destination']['namespace']} " in call
        https = source["repoURL"].startswith("https://")
        chart = (
            f"{source['chart']} --repo {source['repoURL']}" if https else f"oci://{source['repoURL']}/{source['chart']}"
        )
        assert call.startswith(f"upgrade --install {source['helm']['releaseName']} {chart} --version")
        assert yaml.safe_load(Path(f"{tmp_path / 'calls'}.{index}").read_text()) == source["helm"]["valuesObject"]


@pytest.mark.parametrize(
    ("names", "broken", "message", "calls"),
    [
        (["prometheus", "nothing"], "", "no operator nothing; there are argo-workflows, ", 0),
        (["kuberay", "kueue"], "kuberay-operator", "kuberay-operator", 1),
    ],
)
def test_what_is_wrong_ends_it(tmp_path: Path, names: list[str], broken: str, message: str, calls: int) -> None:
    done = helm(tmp_path, *names, BROKEN=broken)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    made = tmp_path / "calls"
    assert (len(made.read_text().splitlines()) if made.exists() else 0) == calls
