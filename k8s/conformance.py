"""Is the cluster of KUBECONFIG what the guide says? `make conformance`: one table, one exit code, nothing left behind.

In order: versions of the server and of the operators, every object of the overlay (a dry run on the server), every act of the security
model that a dry run can play, by impersonation (`kubectl --as`), alerts that Prometheus has loaded, and then, unless `--only-look`, runs: a CPU-sized
RayJob of the overlay `kind` that is queued while its queue is held, starts when it opens, and is cancelled by deletion, all under a run id of
its own. A check that needs what is not there (no Prometheus, no templates) is named and skipped. The whole pipeline is `make e2e`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

OLDEST = (1, 34)
TESTED = {  # deployment -> namespace, versions that were tried together
    "kuberay-operator": ("kuberay-system", ("1.7.0",)),
    "kueue-controller-manager": ("kueue-system", ("0.19.2",)),
    "argo-workflows-workflow-controller": ("argo", ("4.0.6",)),
}
PATIENCE_S = 300.0
NAMESPACE = "moonlight"


class Answer(NamedTuple):
    code: int
    text: str  # stdout, or stderr where the command failed


class Row(NamedTuple):
    check: str
    verdict: str  # passed, FAILED, skipped
    detail: str = ""


Kubectl = Callable[[Sequence[str], str | None], Answer]


def kubectl(arguments: Sequence[str], given: str | None = None) -> Answer:
    done = subprocess.run(["kubectl", *arguments], input=given, capture_output=True, text=True, check=False)
    return Answer(done.returncode, done.stdout if done.returncode == 0 else done.stderr.strip())


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
    answer = ask(["get", "prometheusrules", "moonlight", "--namespace", NAMESPACE, "--output", "json"], None)
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


def wait_for(
    read: Callable[[], str], wanted: Callable[[str], bool], patience_s: float, pause: Callable[[float], None]
) -> str:
    """The last answer: one that is wanted, or what there was when patience ended."""
    seen, tries = read(), 0
    while not wanted(seen) and tries * 5.0 < patience_s:
        pause(5.0)
        seen, tries = read(), tries + 1
    return seen


def queueing(
    ask: Kubectl, job: dict[str, object], queue: str, pause: Callable[[float], None] = time.sleep
) -> Iterator[Row]:
    """Held, a job waits; opened, all of its pods start; deleted, they go. Whatever happens the queue opens and the job goes."""
    name = str(job["metadata"]["name"])  # type: ignore[index]

    def switch(policy: str) -> Answer:
        return ask(
            [
                "patch",
                "clusterqueue",
                queue,
                "--type",
                "merge",
                "--patch",
                json.dumps({"spec": {"stopPolicy": policy}}),
            ],
            None,
        )

    def state() -> str:
        return ask(
            ["get", "rayjob", name, "--namespace", NAMESPACE, "--output", "jsonpath={.status.jobDeploymentStatus}"],
            None,
        ).text

    def pods() -> str:
        return ask(
            [
                "get",
                "pods",
                "--namespace",
                NAMESPACE,
                "--selector",
                f"moonlight.ai/run-id={name.rsplit('-', 2)[0]}",
                "--output",
                "jsonpath={.items[*].status.phase}",
            ],
            None,
        ).text

    try:
        held = switch("Hold")
        made = ask(["create", "--filename", "-"], json.dumps(job))
        if held.code or made.code:
            yield Row("a job is queued", "FAILED", held.text if held.code else made.text)
            return
        pause(15.0)
        waiting, started = state(), pods()
        early = waiting not in ("", "Suspended") or started != ""
        yield Row("a held queue starts nothing", "FAILED" if early else "passed", f"{waiting} {started}".strip())
        switch("None")
        seen = wait_for(pods, lambda text: text != "" and set(text.split()) == {"Running"}, PATIENCE_S, pause)
        yield Row("an open queue starts the gang", "passed" if set(seen.split()) == {"Running"} else "FAILED", seen)
        ask(["delete", "rayjob", name, "--namespace", NAMESPACE, "--wait=false"], None)
        seen = wait_for(pods, lambda text: text == "", PATIENCE_S, pause)
        yield Row("a deleted job takes its pods with it", "FAILED" if seen else "passed", seen)
    finally:
        switch("None")
        ask(["delete", "rayjob", name, "--namespace", NAMESPACE, "--ignore-not-found", "--wait=false"], None)


def job_from(ask: Kubectl) -> dict[str, object] | None:
    """A RayJob as a driver makes it of the template for publish, which is the smallest; None where there is no template."""
    answer = ask(["get", "rayjob", "template-publish", "--namespace", NAMESPACE, "--output", "json"], None)
    if answer.code:
        return None
    from pipeline.config.load import load_config
    from pipeline.workflow.rayjobs_template import instantiate

    run = f"conformance-{uuid.uuid4().hex[:6]}"
    config = load_config("debug", [f"run_id={run}"])
    return instantiate(json.loads(answer.text), config, "publish", 1, ["--help"], priority="moonlight-interactive")


def show(rows: Sequence[Row]) -> int:
    width = max((len(row.check) for row in rows), default=0)
    for row in rows:
        print(f"{row.verdict:<8} {row.check:<{width}}  {row.detail}".rstrip(), flush=True)
    failed = sum(row.verdict == "FAILED" for row in rows)
    print(f"{len(rows)} checks, {failed} failed, {sum(row.verdict == 'skipped' for row in rows)} skipped")
    return 1 if failed else 0


def main(
    arguments: Sequence[str] | None = None, ask: Kubectl = kubectl, pause: Callable[[float], None] = time.sleep
) -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--overlay", default="prod")
    made.add_argument("--queue", default="moonlight-cpu", help="ClusterQueue that is held for a quarter of a minute")
    made.add_argument("--only-look", action="store_true", help="dry runs only: make nothing, switch nothing")
    given = made.parse_args(arguments)
    rows = list(versions(ask))
    if rows[0].verdict == "FAILED":
        return show(rows)
    rows += objects(ask, given.overlay)
    from tests.k8s.playable import tries

    rows += acts(ask, tries(given.overlay))
    rows += alerts(ask)
    if not given.only_look:
        job = job_from(ask)
        rows += (
            queueing(ask, job, given.queue, pause)
            if job
            else [Row("queueing", "skipped", "no RayJob template-publish")]
        )
    return show(rows)


if __name__ == "__main__":
    sys.exit(main())
