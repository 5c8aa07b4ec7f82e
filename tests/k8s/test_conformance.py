"""The conformance kit: its throw-away copies against the evaluator of policies, its questions and judgements against a played cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from k8s.conformance import __main__ as kit
from k8s.conformance import look, play, throwaway
from k8s.conformance.kubectl import Answer, Row, judged, wait_for
from k8s.conformance.look import Try
from tests.k8s.acts import EVIL
from tests.k8s.manifests import (
    REPOSITORY,
    Manifest,
    find,
    label,
    needs_kubectl,
    pod_templates,
    quantity,
    render,
    select,
)
from tests.k8s.people import ALICE, BOB, job, pod, workflow
from tests.k8s.playable import tries
from tests.k8s.played_cluster import Cluster
from tests.k8s.rbac import User, service_account
from tests.k8s.rules.kueue import _requests
from tests.k8s.rules.policies import denials
from tests.signals import heed_sigint

IMAGE = "registry.example.com/moonlight@sha256:" + "c" * 64


def no_pause(seconds: float) -> None:
    pass


def verdicts(rows: list[Row]) -> dict[str, str]:
    return {row.check: row.verdict for row in rows}


# -- what can be seen without making anything ------------------------------------------------------------------------


def test_versions_that_were_tried_pass() -> None:
    assert set(verdicts([*look.versions(Cluster())]).values()) == {"passed"}


@pytest.mark.parametrize(
    ("broken", "check", "words"),
    [
        ("old", "server", "older than 1.34"),
        ("other KubeRay", "kuberay-operator", "1.6.2; tested with 1.7.0"),
        ("no Kueue", "kueue-controller-manager", "not in namespace kueue-system"),
    ],
)
def test_other_versions_are_named(broken: str, check: str, words: str) -> None:
    rows = {row.check: row for row in look.versions(Cluster(broken))}
    assert rows[check].verdict == "FAILED"
    assert words in rows[check].detail


def test_tested_versions_are_those_that_git_installs() -> None:
    facts = json.loads((REPOSITORY / "tests/k8s/third_parties.json").read_text())
    assert look.TESTED["kuberay-operator"][1] == (facts["charts"]["kuberay-operator"]["version"],)
    assert look.TESTED["kueue-controller-manager"][1] == (facts["charts"]["kueue"]["version"],)
    assert look.TESTED["argo-workflows-workflow-controller"][1] == (
        facts["charts"]["argo-workflows"]["app"].removeprefix("v"),
    )


@pytest.mark.parametrize(
    ("answer", "allowed", "words", "verdict"),
    [
        (Answer(0, "created (dry run)"), True, "", "passed"),
        (Answer(1, "denied: a policy's words"), False, "policy's words", "passed"),
        (Answer(0, "created (dry run)"), False, "", "FAILED"),
        (Answer(1, "denied: other words"), False, "policy's words", "FAILED"),
        (Answer(1, "denied"), True, "", "FAILED"),
    ],
)
def test_a_creation_is_judged_by_its_words(answer: Answer, allowed: bool, words: str, verdict: str) -> None:
    asked = []

    def ask(arguments: Sequence[str], given: str | None) -> Answer:
        asked.append((" ".join(arguments), given))
        return answer

    sent = {"metadata": {"name": "first-publish-1"}}
    act = Try("a job", "x/alice", ("g", "h"), allowed, created=sent, words=words)
    assert [row.verdict for row in look.acts(ask, [act])] == [verdict]
    assert asked == [("create --dry-run=server --filename - --as x/alice --as-group g --as-group h", json.dumps(sent))]


def test_a_right_is_asked_for() -> None:
    act = Try("Secrets", "x/alice", ("g",), False, can_i=("get", "secrets", "--namespace=moonlight"))
    assert [row.verdict for row in look.acts(lambda arguments, given: Answer(1, "no"), [act])] == ["passed"]
    assert [row.verdict for row in look.acts(lambda arguments, given: Answer(0, "yes"), [act])] == ["FAILED"]


def test_alerts_that_are_not_loaded_are_named() -> None:
    assert verdicts([*look.alerts(Cluster())]) == {"alerts": "passed"}
    assert [row.detail for row in look.alerts(Cluster("alerts"))] == ["not loaded: B"]


@needs_kubectl
def test_acts_that_a_cluster_is_asked_about() -> None:
    found = tries("prod")
    created = [each for each in found if each.created is not None]
    assert len(found) >= 120
    assert len(created) >= 35
    assert {each.allowed for each in created} == {each.allowed for each in found} == {True, False}
    assert all(each.words or each.allowed for each in created)
    assert ("get", "secrets/moonlight-admission", "--namespace=moonlight") in {each.can_i for each in found}


# -- the throw-away copy ---------------------------------------------------------------------------------------------


def copy_of(overlay: str) -> list[Manifest]:
    objects = render(f"k8s/overlays/{overlay}")
    return throwaway.priorities(objects, "zz") + throwaway.copied(objects, "zz")


@needs_kubectl
def test_a_copy_has_names_of_its_own_and_can_be_found() -> None:
    objects, copy = render("k8s/overlays/prod"), throwaway.copied(render("k8s/overlays/prod"), "zz")
    assert {label(item) for item in copy}.isdisjoint({label(item) for item in objects})
    assert {item["metadata"]["labels"][throwaway.LABEL] for item in copy} == {"zz"}
    kinds = {item["kind"] for item in copy}
    assert kinds == throwaway.IN_A_NAMESPACE - {"Secret"} | throwaway.ON_THE_CLUSTER | {
        "Namespace"
    }  # prod has no Secret
    assert {item["metadata"].get("namespace") for item in copy} == {None, "moonlight-zz", "moonlight-submit-zz"}
    on_the_cluster = {
        f"{item['kind'].lower()}s".replace("policys", "policies")
        for item in copy
        if "namespace" not in item["metadata"]
    }
    assert on_the_cluster - {"namespaces"} <= {kind.partition(".")[0] for kind in throwaway.KINDS.split(",")}


@needs_kubectl
def test_a_copy_gives_and_refuses_nobody_else_anything() -> None:
    real, copy = render("k8s/overlays/prod"), throwaway.copied(render("k8s/overlays/prod"), "zz")
    ours = {item["metadata"]["namespace"] for item in copy if item["kind"] == "RoleBinding"}
    subjects = [each for item in copy for each in item.get("subjects", [])]
    assert ours == {"moonlight-zz", "moonlight-submit-zz"}
    assert all(each["name" if each["kind"] == "Group" else "namespace"].endswith("-zz") for each in subjects)
    everything = [*real, *copy]
    for item in (workflow(BOB), pod(EVIL), job("train", priority="moonlight-release")):
        assert denials(everything, item, user=ALICE) == denials(real, item, user=ALICE) != []
    queue = find(real, "ClusterQueue", "moonlight-gpu")
    larger = {**queue, "spec": {**queue["spec"], "resourceGroups": []}}
    operator = User("x", rules=({"apiGroups": ["*"], "resources": ["clusterqueues"], "verbs": ["patch"]},))
    assert denials(real, larger, operation="UPDATE", before=queue, user=operator) != []
    assert denials(copy, larger, operation="UPDATE", before=queue, user=operator) == []
    own = find(copy, "ClusterQueue", "moonlight-gpu-zz")
    assert denials(copy, {**own, "spec": larger["spec"]}, operation="UPDATE", before=own, user=operator) != []


@needs_kubectl
def test_queues_of_a_copy_stand_alone() -> None:
    copy = copy_of("kind")
    flavors = {item["metadata"]["name"] for item in select(copy, "ResourceFlavor")}
    queues = {item["metadata"]["name"]: item["spec"] for item in select(copy, "ClusterQueue")}
    for spec in queues.values():
        assert "cohortName" not in spec
        assert spec["namespaceSelector"]["matchLabels"][throwaway.LABEL] == "zz"
        assert {flavor["name"] for group in spec["resourceGroups"] for flavor in group["flavors"]} <= flavors
    assert {item["spec"]["clusterQueue"] for item in select(copy, "LocalQueue")} == set(queues)


# -- runs ------------------------------------------------------------------------------------------------------------


@needs_kubectl
def test_jobs_that_are_played_pass_the_copys_own_policies_and_quota() -> None:
    objects = play.prepared(render("k8s/overlays/kind"), IMAGE)
    copy = throwaway.priorities(objects, "zz") + throwaway.copied(objects, "zz")
    sent: list[Manifest] = []

    def ask(arguments: Sequence[str], given: str | None) -> Answer:
        if given:
            assert arguments[-1] == "system:serviceaccount:moonlight-submit-zz:driver"
            sent.append(json.loads(given))
        return Answer(0, "Complete " if "rayjob" in arguments else "")

    [*play.paths(play.Stage(ask, copy, "zz", no_pause))]
    assert [made["metadata"]["name"] for made in sent] == ["zz-a-evaluate-1", "zz-b-evaluate-1", "zz-c-publish-1", "zz-d-publish-1"]  # fmt: skip
    for made in sent:
        assert denials(copy, made, user=service_account("moonlight-submit-zz", "driver")) == []
        assert IMAGE in json.dumps(made)
        assert 1 <= _room(copy, made) < 2


def _room(objects: list[Manifest], item: Manifest) -> float:
    """How many such jobs the queue holds at once, by the scarcest resource."""
    local = find(objects, "LocalQueue", item["metadata"]["labels"]["kueue.x-k8s.io/queue-name"])
    resources = find(objects, "ClusterQueue", local["spec"]["clusterQueue"])["spec"]["resourceGroups"][0]["flavors"][0]["resources"]  # fmt: skip
    wanted = [_requests(each["spec"]) for each in pod_templates(item).values()]
    return min(
        quantity(each["nominalQuota"]) / sum(needs.get(each["name"], 0.0) for needs in wanted) for each in resources
    )


@pytest.mark.parametrize(
    ("broken", "failed"),
    [
        ("", set()),
        ("no job", {"a driver's job is admitted"}),
        ("no gate", {"a held queue starts nothing"}),
        ("no gang", {"an open queue starts the whole gang", "a job that finds no room for all of it starts no pod", "an evicted job resumes", "a lost head comes back"}),
        ("no quota", {"a job that finds no room for all of it starts no pod"}),
        ("no drain", {"a drained queue evicts the gang"}),
        ("no resume", {"an evicted job resumes", "a lost head comes back"}),
        ("no head", {"a lost head comes back"}),
        ("leak", {"a job that finds no room for all of it starts no pod", "a cancelled job takes its pods with it"}),
        ("no retry", {"a failed program is tried again on a new cluster"}),
        ("bad end", {"a program that ends well completes"}),
    ],
)  # fmt: skip
@needs_kubectl
def test_every_path_is_played_and_judged(broken: str, failed: set[str]) -> None:
    cluster = Cluster(broken)
    made = throwaway.copied(render("k8s/overlays/kind"), "zz")
    rows = [*play.paths(play.Stage(cluster, made, "zz", no_pause))]
    assert {row.check for row in rows if row.verdict == "FAILED"} == failed
    assert len(rows) == (1 if broken == "no job" else 10)


@needs_kubectl
def test_ray_keeps_a_job_pending_that_asks_for_too_much_for_a_quarter_of_an_hour() -> None:
    """By which the waiting job is still there when its queue is drained and its head is lost; a new cluster begins anew."""
    from ray.dashboard.consts import DEFAULT_JOB_START_TIMEOUT_SECONDS

    assert DEFAULT_JOB_START_TIMEOUT_SECONDS == 15 * 60
    template = find(play.prepared(render("k8s/overlays/kind"), IMAGE), "RayJob", f"template-{play.WAITS}")
    assert template["spec"]["entrypointNumCpus"] == play.CPUS


def test_waiting_has_an_end() -> None:
    waited: list[float] = []
    assert wait_for(lambda: "x", lambda text: text == "y", 12.0, waited.append) == "x"
    assert waited == [5.0, 5.0, 5.0]
    assert judged("a", True) == Row("a", "passed")


# -- the whole -------------------------------------------------------------------------------------------------------


@needs_kubectl
def test_one_table_one_exit_code_and_nothing_left(capsys: pytest.CaptureFixture[str]) -> None:
    """In the copy every act ends as the security model says, by the evaluators of rights and policies."""
    cluster = Cluster()
    assert kit.main(["--image", IMAGE], ask=cluster, pause=no_pause) == 0, capsys.readouterr().out
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("passed   ") for line in lines[:-1])
    assert sum(line.startswith("passed   nothing of") for line in lines) == 2
    assert sum("an evicted job resumes" in line for line in lines) == 1
    assert sum("alice: " in line for line in lines) >= 20
    assert cluster.copies == []
    assert cluster.jobs == {}
    assert lines[-1] == f"{len(lines) - 1} checks, 0 failed, 0 skipped"


@needs_kubectl
def test_a_copy_that_cannot_be_made_is_said_and_what_there_is_of_it_removed(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster("no copy")
    assert kit.main([], ask=cluster, pause=no_pause) == 1
    assert "FAILED   the kit itself" in capsys.readouterr().out
    assert any(words.startswith("delete namespaces") for words in cluster.asked)


def test_what_stays_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster("stays")
    cluster.copies = ["aa"]
    assert kit.main(["--clean", "aa"], ask=cluster, pause=no_pause) == 1
    assert "namespace/moonlight-aa" in capsys.readouterr().out


def test_only_looking_makes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster()
    kit.main(["--only-look"], ask=cluster, pause=no_pause)
    made = [words for words in cluster.asked if words.startswith(("apply", "create", "patch", "delete"))]
    assert made
    assert all("--dry-run=server" in words for words in made)


def test_an_old_server_is_asked_nothing_more(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster("old")
    assert kit.main([], ask=cluster) == 1
    assert not any(words.startswith(("apply", "create", "patch")) for words in cluster.asked)
    assert "older than 1.34" in capsys.readouterr().out


def test_what_a_killed_one_left_can_be_removed(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster()
    cluster.copies = ["aa", "bb"]
    assert kit.main(["--clean", "aa", "bb"], ask=cluster, pause=no_pause) == 0
    assert cluster.copies == []
    assert capsys.readouterr().out.splitlines()[-1] == "2 checks, 0 failed, 0 skipped"


STAND_IN = """#!/usr/bin/env bash
case "$1" in
  kustomize) exec {kubectl} "$@" ;;
  version) echo '{{"serverVersion": {{"major": "1", "minor": "34", "gitVersion": "v1.34.1"}}}}' ;;
  get) [ "$2" != prometheusrules ] || exit 1 ;;
  apply) cat > /dev/null; case "$*" in *--dry-run*) ;; *) made=yes ;; esac ;;
esac
echo "$*" >> "$CALLS"
[ -z "${{made:-}}" ] || kill -TERM "$PPID"
"""


@needs_kubectl
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_in_the_middle_leaves_nothing(name: str, tmp_path: Path) -> None:
    """The whole program, stopped as soon as its first copy stands."""
    (tmp_path / "kubectl").write_text(STAND_IN.format(kubectl=shutil.which("kubectl")).replace("-TERM", f"-{name[3:]}"))
    (tmp_path / "kubectl").chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "k8s.conformance"],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, check=False,
        preexec_fn=heed_sigint,
    )  # fmt: skip
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert "the kit itself" in done.stdout
    assert "stopped" in done.stdout
    ident = done.stderr.rpartition("--clean ")[2].split()[0]
    after = (tmp_path / "calls").read_text().splitlines()
    after = after[after.index("apply --server-side --filename -") :]
    assert f"delete namespaces moonlight-{ident} moonlight-submit-{ident} --ignore-not-found --wait=false" in after
    assert any(line.startswith("delete validatingadmissionpolicybindings") and ident in line for line in after)
    assert f"passed   nothing of {ident} is left" in done.stdout
