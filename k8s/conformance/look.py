"""What can be seen of a cluster without making anything: versions, objects and acts as dry runs, alerts that are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from k8s.conformance.kubectl import Kubectl, Row

OLDEST = (1, 34)
TESTED = {  # deployment -> namespace, versions that were tried together
    "kuberay-operator": ("kuberay-system", ("1.7.0",)),
    "kueue-controller-manager": ("kueue-system", ("0.19.2",)),
    "argo-workflows-workflow-controller": ("argo", ("4.0.6",)),
}


def versions(ask: Kubectl) -> Iterator[Row]:
    """The server's and the operators'. Another version is no failure of the cluster, but nobody tried it: it is named."""
    answer = ask(["version", "--output", "json"], None)
    if answer.code:
        yield Row("server", "FAILED", answer.text)
        return
    server = json.loads(answer.text)["serverVersion"]
    found = int(server["major"]), int("".join(filter(str.isdigit, server["minor"])))
    old = found < OLDEST
    yield Row(
        "server",
        "FAILED" if old else "passed",
        server["gitVersion"] + (f", older than {OLDEST[0]}.{OLDEST[1]}" if old else ""),
    )
    for name, (namespace, tested) in TESTED.items():
        answer = ask(
            [
                "get",
                "deployment",
                name,
                "--namespace",
                namespace,
                "--output",
                "jsonpath={.spec.template.spec.containers[0].image}",
            ],
            None,
        )
        if answer.code:
            yield Row(name, "FAILED", f"not in namespace {namespace}: {answer.text}")
            continue
        tag = answer.text.split("@")[0].rpartition(":")[2].removeprefix("v")
        wrong = "" if tag in tested else f"; tested with {', '.join(tested)}"
        yield Row(name, "FAILED" if wrong else "passed", tag + wrong)


def objects(ask: Kubectl, overlay: str) -> Iterator[Row]:
    rendered = ask(["kustomize", f"k8s/overlays/{overlay}"], None)
    if rendered.code:
        yield Row("overlay builds", "FAILED", rendered.text)
        return
    answer = ask(["apply", "--server-side", "--force-conflicts", "--dry-run=server", "--filename", "-"], rendered.text)
    detail = answer.text if answer.code else f"{len(answer.text.splitlines())} objects"
    yield Row(f"objects of {overlay} are accepted", "FAILED" if answer.code else "passed", detail)


class Try(NamedTuple):
    """One act: who, what is asked of `kubectl auth can-i`, or the object whose creation is tried; and whether it must be let."""

    name: str
    user: str
    groups: tuple[str, ...]
    allowed: bool
    can_i: tuple[str, ...] = ()
    created: dict[str, object] | None = None
    words: str = ""  # of the refusal


def acts(ask: Kubectl, tries: Sequence[Try]) -> Iterator[Row]:
    """Creations are dry runs: policies and rights answer, nothing is made."""
    for each in tries:
        who = ["--as", each.user, *(word for group in each.groups for word in ("--as-group", group))]
        if each.created is None:
            answer = ask(["auth", "can-i", *each.can_i, *who], None)
            let = answer.text.strip().startswith("yes")
        else:
            answer = ask(["create", "--dry-run=server", "--filename", "-", *who], json.dumps(each.created))
            let = answer.code == 0
        wrong = let != each.allowed or (not let and each.words not in answer.text)
        detail = (
            f"{'let' if let else 'refused'}: {answer.text.splitlines()[0][:160] if answer.text else ''}"
            if wrong
            else ""
        )
        yield Row(f"{each.user.split('/')[-1]}: {each.name}", "FAILED" if wrong else "passed", detail)


def alerts(ask: Kubectl) -> Iterator[Row]:
    answer = ask(["get", "prometheusrules", "moonlight", "--namespace", "moonlight", "--output", "json"], None)
    if answer.code:
        yield Row("alerts", "skipped", "no PrometheusRule moonlight")
        return
    expected = {
        rule["alert"]
        for group in json.loads(answer.text)["spec"]["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }
    path = "/api/v1/namespaces/monitoring/services/kube-prometheus-stack-prometheus:9090/proxy/api/v1/rules"
    answer = ask(["get", "--raw", path], None)
    if answer.code:
        yield Row("alerts", "skipped", f"Prometheus cannot be asked: {answer.text}")
        return
    loaded = {rule["name"] for group in json.loads(answer.text)["data"]["groups"] for rule in group["rules"]}
    missing = sorted(expected - loaded)
    yield Row(
        "alerts",
        "FAILED" if missing else "passed",
        f"not loaded: {', '.join(missing)}" if missing else f"{len(expected)} loaded",
    )
