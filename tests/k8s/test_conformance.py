"""The conformance kit against a played kubectl: what it asks, how it judges the answers, and that it leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from tests.k8s.manifests import REPOSITORY, needs_kubectl
from tests.k8s.playable import module, tries

KIT = module()
Answer, Try = KIT.Answer, KIT.Try


class Cluster:
    """Answers as a cluster with our overlay would; `broken` names what is wrong with it."""

    def __init__(self, broken: str = "") -> None:
        self.broken, self.asked = broken, []
        self.policy, self.job, self.switches = "None", False, []

    def __call__(self, arguments: Sequence[str], given: str | None = None) -> Any:
        words = " ".join(arguments)
        self.asked.append(words)
        if words.startswith("version"):
            minor = "33+" if self.broken == "old" else "34"
            return Answer(
                0, json.dumps({"serverVersion": {"major": "1", "minor": minor, "gitVersion": f"v1.{minor}.1"}})
            )
        if words.startswith("get deployment"):
            if self.broken == "no Kueue" and "kueue" in words:
                return Answer(1, "NotFound")
            tag = {
                "kuberay": "v1.6.2" if self.broken == "other KubeRay" else "v1.7.0",
                "kueue": "v0.19.2",
                "argo": "v4.0.6",
            }
            return Answer(0, next(f"registry.example.com/x:{value}" for key, value in tag.items() if key in words))
        if words.startswith(("kustomize", "apply")):
            return Answer(1, "denied") if self.broken == "objects" and words.startswith("apply") else Answer(0, "a\nb")
        if words.startswith("get prometheusrules"):
            return Answer(
                0, json.dumps({"spec": {"groups": [{"rules": [{"alert": "A"}, {"alert": "B"}, {"record": "r"}]}]}})
            )
        if words.startswith("get --raw"):
            names = ["A"] if self.broken == "alerts" else ["A", "B"]
            return Answer(0, json.dumps({"data": {"groups": [{"rules": [{"name": name} for name in names]}]}}))
        if words.startswith("patch clusterqueue"):
            self.policy = json.loads(arguments[-1])["spec"]["stopPolicy"]
            self.switches.append(self.policy)
            return Answer(0, "")
        if words.startswith("create --filename"):
            self.job = True
            return Answer(1, "denied") if self.broken == "no job" else Answer(0, "")
        if words.startswith("get rayjob first"):
            return Answer(0, "Suspended" if self.policy == "Hold" else "Running")
        if words.startswith("get pods"):
            if self.broken == "leak":
                return Answer(0, "" if self.policy == "Hold" else "Running")
            runs = self.job and (self.policy == "None" or self.broken == "no gate")
            return Answer(0, ("Running Pending" if self.broken == "no gang" else "Running Running") if runs else "")
        if words.startswith("delete rayjob"):
            self.job = False
            return Answer(0, "")
        raise AssertionError(words)


JOB = {"metadata": {"name": "first-publish-1"}}


def verdicts(rows: Any) -> dict[str, str]:
    return {row.check: row.verdict for row in rows}


def test_versions_that_were_tried_pass() -> None:
    assert set(verdicts(KIT.versions(Cluster())).values()) == {"passed"}


@pytest.mark.parametrize(
    ("broken", "check", "words"),
    [
        ("old", "server", "older than 1.34"),
        ("other KubeRay", "kuberay-operator", "1.6.2; tested with 1.7.0"),
        ("no Kueue", "kueue-controller-manager", "not in namespace kueue-system"),
    ],
)
def test_other_versions_are_named(broken: str, check: str, words: str) -> None:
    rows = {row.check: row for row in KIT.versions(Cluster(broken))}
    assert rows[check].verdict == "FAILED"
    assert words in rows[check].detail


def test_tested_versions_are_those_that_git_installs() -> None:
    facts = json.loads((REPOSITORY / "tests/k8s/third_parties.json").read_text())
    assert KIT.TESTED["kuberay-operator"][1] == (facts["charts"]["kuberay-operator"]["version"],)
    assert KIT.TESTED["kueue-controller-manager"][1] == (facts["charts"]["kueue"]["version"],)
    assert KIT.TESTED["argo-workflows-workflow-controller"][1] == (
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
def test_a_creation_is_judged_by_its_words(answer: Any, allowed: bool, words: str, verdict: str) -> None:
    asked = []

    def ask(arguments: Sequence[str], given: str | None) -> Any:
        asked.append((" ".join(arguments), given))
        return answer

    act = Try("a job", "x/alice", ("g", "h"), allowed, created=JOB, words=words)
    assert [row.verdict for row in KIT.acts(ask, [act])] == [verdict]
    assert asked == [("create --dry-run=server --filename - --as x/alice --as-group g --as-group h", json.dumps(JOB))]


def test_a_right_is_asked_for() -> None:
    act = Try("Secrets", "x/alice", ("g",), False, can_i=("get", "secrets", "--namespace=moonlight"))
    assert [row.verdict for row in KIT.acts(lambda arguments, given: Answer(1, "no"), [act])] == ["passed"]
    assert [row.verdict for row in KIT.acts(lambda arguments, given: Answer(0, "yes"), [act])] == ["FAILED"]


@pytest.mark.parametrize(
    ("broken", "failed"),
    [
        ("", set()),
        ("no gate", {"a held queue starts nothing"}),
        ("no gang", {"an open queue starts the gang"}),
        ("leak", {"a deleted job takes its pods with it"}),
        ("no job", {"a job is queued"}),
    ],
)
def test_queueing_is_played_and_cleaned_up(broken: str, failed: set[str]) -> None:
    cluster = Cluster(broken)
    rows = list(KIT.queueing(cluster, JOB, "moonlight-cpu", pause=lambda seconds: None))
    assert {row.check for row in rows if row.verdict == "FAILED"} == failed
    assert cluster.switches[-1] == "None"
    assert not cluster.job
    assert cluster.asked[-1].startswith("delete rayjob first-publish-1")


def test_alerts_that_are_not_loaded_are_named() -> None:
    assert verdicts(KIT.alerts(Cluster())) == {"alerts": "passed"}
    assert [row.detail for row in KIT.alerts(Cluster("alerts"))] == ["not loaded: B"]


def test_one_table_and_one_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert KIT.show([KIT.Row("a", "passed"), KIT.Row("b", "skipped", "why")]) == 0
    assert KIT.show([KIT.Row("a", "passed"), KIT.Row("bcd", "FAILED", "why")]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "passed   a", "skipped  b  why", "2 checks, 0 failed, 1 skipped",
        "passed   a", "FAILED   bcd  why", "2 checks, 1 failed, 0 skipped",
    ]  # fmt: skip


def test_an_old_server_is_asked_nothing_more(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster("old")
    assert KIT.main([], ask=cluster) == 1
    assert not any(words.startswith(("apply", "create", "patch")) for words in cluster.asked)
    assert "older than 1.34" in capsys.readouterr().out


@needs_kubectl
def test_acts_that_a_cluster_is_asked_about() -> None:
    found = tries("prod")
    created = [each for each in found if each.created is not None]
    assert len(found) >= 120
    assert len(created) >= 35
    assert {each.allowed for each in created} == {each.allowed for each in found} == {True, False}
    assert all(each.words or each.allowed for each in created)
    assert ("get", "secrets/moonlight-admission", "--namespace=moonlight") in {each.can_i for each in found}
