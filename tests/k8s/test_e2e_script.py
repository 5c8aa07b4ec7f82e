"""The steps of k8s/e2e/e2e.sh against stand-ins for kubectl, helm, kind and docker that write down how they were called.

A stand-in for kubectl answers what the case says: lines of `<beginning of the arguments>|<exit code>|<output>`, the first that fits.
A `~N` after the exit code means: only the first N times.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.k8s.manifests import REPOSITORY

KUBECTL = r"""#!/usr/bin/env bash
echo "kubectl $*" >> "$CALLS"
case "$*" in *--filename\ -*) cat > "$STDIN" ;; esac
while IFS='|' read -r start code output; do
  case "$*" in "$start"*)
    times=${code#*~}
    code=${code%~*}
    if [ "$times" != "$code" ]; then
      [ "$(grep -cF "kubectl $start" "$CALLS")" -le "$times" ] || continue
    fi
    printf '%s\n' "$output"
    exit "$code" ;;
  esac
done < "$ANSWERS"
"""
OTHER = '#!/usr/bin/env bash\necho "${0##*/} $*" >> "$CALLS"\n[ "${0##*/} $1 $2" != "kind get clusters" ] || echo "${KIND:-}"\n'
PHASE = "--namespace moonlight get workflow e2e"
APPLY = "apply --server-side"


@dataclass
class Stage:
    folder: Path

    def __call__(self, *steps: str, answers: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "answers").write_text(answers)
        (self.folder / "calls").write_text("")
        return subprocess.run(
            ["bash", str(REPOSITORY / "k8s/e2e/e2e.sh"), *steps],
            env={
                "PATH": f"{self.folder}:{os.environ['PATH']}",
                "CALLS": str(self.folder / "calls"),
                "ANSWERS": str(self.folder / "answers"),
                "STDIN": str(self.folder / "stdin"),
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )

    def calls(self, start: str = "") -> list[str]:
        return [line for line in (self.folder / "calls").read_text().splitlines() if line.startswith(start)]


@pytest.fixture
def e2e(tmp_path: Path) -> Stage:
    for name, text in {"kubectl": KUBECTL, **dict.fromkeys(("helm", "kind", "docker", "sleep"), OTHER)}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return Stage(tmp_path)


def test_everything_in_order(e2e: Stage) -> None:
    answers = f"{PHASE}|0~2|Running\n{PHASE}|0|Succeeded\nkustomize|0|image: moonlight-pipeline:e2e\n"
    done = e2e(answers=answers, IMAGE="registry/moonlight@sha256:12")
    assert done.returncode == 0, done.stderr
    order = [
        "kubectl apply --filename k8s/base/namespaces.yaml",
        "helm upgrade --install kuberay-operator",
        "helm upgrade --install kueue",
        "helm upgrade --install argo-workflows",
        f"kubectl {APPLY}",  # of what comes through a pipe from `kubectl kustomize`, which starts at the same time
        "kubectl wait clusterqueues --all --for condition=Active",
        "kubectl --namespace moonlight delete workflow e2e --ignore-not-found",
        "kubectl --namespace moonlight delete rayjobs --selector moonlight.ai/run-id=e2e",
        "kubectl --namespace moonlight-storage exec --stdin deployment/s3 -- python - http://localhost:5000 moonlight",
        "kubectl create --filename k8s/e2e/workflow.yaml",
        f"kubectl {PHASE}",
        "kubectl --namespace moonlight-storage exec --stdin deployment/s3 -- python - http://localhost:5000 moonlight e2e",
    ]
    calls = e2e.calls()
    positions = [next(index for index, call in enumerate(calls) if call.startswith(start)) for start in order[:-1]]
    assert sorted(positions) == positions
    assert calls[-1] == order[-1]
    assert len(e2e.calls(f"kubectl {PHASE}")) == 3
    assert (e2e.folder / "stdin").read_text() == "image: registry/moonlight@sha256:12\n"
    assert not e2e.calls("kind")
    assert not e2e.calls("docker")


@pytest.mark.parametrize("phase", ["Failed", "Error"])
def test_a_failed_run_is_a_failure_that_shows_logs(e2e: Stage, phase: str) -> None:
    done = e2e("run", "verify", answers=f"{PHASE}|0|{phase}\n--namespace kuberay-system logs|1|\n")
    assert done.returncode == 1
    assert done.stderr.endswith(f"error: workflow e2e: {phase}\n")
    assert "== what went wrong with e2e" in done.stdout
    assert e2e.calls("kubectl --namespace moonlight logs --selector workflows.argoproj.io/workflow=e2e")
    assert e2e.calls("kubectl --namespace moonlight logs --selector ray.io/is-ray-node=yes")
    assert e2e.calls(
        "kubectl --namespace argo logs deployment/argo-workflows-workflow-controller"
    )  # after one that failed
    assert not any("moonlight e2e" in call for call in e2e.calls("kubectl --namespace moonlight-storage"))


def test_a_run_that_never_ends_is_given_up(e2e: Stage) -> None:
    done = e2e("run", answers=f"{PHASE}|0|Running\n", TIMEOUT="1")
    assert done.returncode == 1
    assert "workflow e2e: Running after 1 s" in done.stderr
    assert "== what went wrong with e2e" in done.stdout


def test_an_image_that_cannot_be_pulled_ends_the_run_early(e2e: Stage) -> None:
    pods = "--namespace moonlight get pods --output jsonpath"
    done = e2e("run", answers=f"{PHASE}|0|Running\n{pods}|0|ErrImagePull ContainerCreating\n", IMAGE="registry/wrong:1")
    assert done.returncode == 1
    assert "cannot pull an image; is it IMAGE=registry/wrong:1?" in done.stderr
    assert len(e2e.calls(f"kubectl {pods}")) == 15
    answers = f"{PHASE}|0~30|Running\n{PHASE}|0|Succeeded\n{pods}|0~14|ImagePullBackOff\n"  # slow, but it came
    assert e2e("run", answers=answers).returncode == 0


def test_an_api_server_that_is_away_for_a_moment_does_not_end_the_run(e2e: Stage) -> None:
    assert e2e("run", answers=f"{PHASE}|1~2|\n{PHASE}|0|Succeeded\n").returncode == 0


def test_webhooks_may_be_late_but_not_for_ever(e2e: Stage) -> None:
    assert e2e("pipeline", answers=f"{APPLY}|1~2|no endpoints\n").returncode == 0
    assert len(e2e.calls(f"kubectl {APPLY}")) == 3
    done = e2e("pipeline", answers=f"{APPLY}|1|no endpoints\n")
    assert done.returncode == 1
    assert "refused six times" in done.stderr
    assert len(e2e.calls(f"kubectl {APPLY}")) == 6
    assert not e2e.calls("kubectl wait")


def test_operators_that_are_left_alone_must_be_there(e2e: Stage) -> None:
    assert e2e("operators", INSTALL_OPERATORS="no").returncode == 0
    done = e2e("operators", "pipeline", answers="get crd clusterqueues|1|\n", INSTALL_OPERATORS="no")
    assert done.returncode == 1
    assert "the cluster has no clusterqueues.kueue.x-k8s.io" in done.stderr
    assert not e2e.calls("helm")
    assert not e2e.calls("kubectl kustomize")


@pytest.mark.parametrize(("there", "made"), [("other", 1), ("moonlight", 0)])
def test_a_kind_cluster_is_made_once(e2e: Stage, there: str, made: int) -> None:
    assert e2e("cluster", "image", KIND=there).returncode == 0
    assert len(e2e.calls("kind create cluster --config k8s/e2e/kind.yaml")) == made
    assert e2e.calls("kind export kubeconfig --name moonlight")
    assert e2e.calls("docker build --tag moonlight-pipeline:e2e")
    assert e2e.calls("kind load docker-image moonlight-pipeline:e2e --name moonlight")


def test_retraining_must_start_from_the_published_model(e2e: Stage) -> None:
    verify = "--namespace moonlight-storage exec --stdin deployment/s3 -- python - http://localhost:5000 moonlight e2e"
    phase = "--namespace moonlight get workflow e2e-retrain|0|Succeeded\n"
    assert e2e("retrain", answers=f"{phase}{verify}|0|published: m 2, started from models/m/1\n").returncode == 0
    assert e2e("retrain", answers=f"{phase}{verify}|0|published: m 1, started from drawn weights\n").returncode == 1


def test_clean_takes_everything_out(e2e: Stage) -> None:
    assert e2e("clean", answers="kustomize|0|kind: Namespace\n").returncode == 0
    assert e2e.calls("kubectl delete --ignore-not-found --filename -")
