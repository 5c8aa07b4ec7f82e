"""Runs played in a throw-away copy of the overlay `kind`: RayJobs as a driver makes them, by its own service account, without GPUs.

Two programs, both a stage's own: `jobs.evaluate` in a template that asks for more CPUs than the cluster has (`waiting`), so that Ray keeps the job
pending, for a quarter of an hour, while its pods run; and `jobs.publish`, which ends at once, well (`--help`) or badly (a run that has no records).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

from k8s.conformance.kubectl import Answer, Kubectl, Pause, Row, judged, wait_for
from pipeline.config.load import load_config
from pipeline.workflow.rayjobs_template import instantiate

Manifest = dict[str, Any]
PATIENCE_S = 900.0  # a first pull of the image
SETTLE_S = 20.0  # long enough for what must not start to start
CPUS = 100_000
WAITS, ENDS = "evaluate", "publish"


def prepared(objects: list[Manifest], image: str) -> list[Manifest]:
    """The overlay's objects for playing: the given image, a job of `WAITS` that waits, and queues that hold one job and not two."""
    for item in objects:
        if item["kind"] == "ConfigMap" and item["metadata"]["name"] == "moonlight-admission":
            item["data"]["registry-pipeline"] = image
        if item["kind"] == "ClusterQueue":
            for flavor in item["spec"]["resourceGroups"][0]["flavors"]:
                flavor["resources"] = [
                    {"name": "cpu", "nominalQuota": "2"}, {"name": "memory", "nominalQuota": "6Gi"},
                ]  # fmt: skip
        if item["kind"] != "RayJob":
            continue
        if item["metadata"]["labels"]["moonlight.ai/stage"] == WAITS:
            item["spec"]["entrypointNumCpus"] = CPUS
        cluster = item["spec"]["rayClusterSpec"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            for container in group["template"]["spec"]["containers"]:
                container["image"] = image
    return objects


class Stage:
    """The copy's namespace and queue, and how its jobs are made and looked at."""

    def __init__(self, ask: Kubectl, made: list[Manifest], ident: str, pause: Pause) -> None:
        self.ask, self.ident, self.pause = ask, ident, pause
        self.namespace = f"moonlight-{ident}"
        self.driver = (
            f"system:serviceaccount:moonlight-submit-{ident}:driver"  # of interactive runs, whose jobs nothing owns
        )
        self.templates = {
            item["metadata"]["labels"]["moonlight.ai/stage"]: item for item in made if item["kind"] == "RayJob"
        }
        local = self.templates[WAITS]["metadata"]["annotations"]["moonlight.ai/queue"]
        self.queue = next(
            item["spec"]["clusterQueue"]
            for item in made
            if item["kind"] == "LocalQueue" and item["metadata"]["name"] == local
        )

    def start(self, stage: str, run: str, arguments: list[str]) -> Answer:
        job = instantiate(
            self.templates[stage], load_config("debug", [f"run_id={run}"]), stage, 1, arguments, priority="moonlight-interactive"
        )  # fmt: skip
        return self.ask(["create", "--filename", "-", "--as", self.driver], json.dumps(job))

    def switch(self, policy: str) -> Answer:
        patch = json.dumps({"spec": {"stopPolicy": policy}})
        return self.ask(["patch", "clusterqueue", self.queue, "--type", "merge", "--patch", patch], None)

    def state(self, job: str) -> str:
        """`<deployment status> <failed attempts>`"""
        path = "jsonpath={.status.jobDeploymentStatus} {.status.failed}"
        return self.ask(["get", "rayjob", job, "--namespace", self.namespace, "--output", path], None).text.strip()

    def pods(self, run: str, path: str = "{.items[*].status.phase}", selector: str = "") -> str:
        labels = f"moonlight.ai/run-id={run}{selector}"
        return self.ask(
            ["get", "pods", "--namespace", self.namespace, "--selector", labels, "--output", f"jsonpath={path}"], None
        ).text.strip()

    def until(self, read: Callable[[], str], wanted: Callable[[str], bool]) -> str:
        return wait_for(read, wanted, PATIENCE_S, self.pause)

    def delete(self, job: str) -> None:
        self.ask(["delete", "rayjob", job, "--namespace", self.namespace, "--wait=false", "--as", self.driver], None)


def whole(phases: str) -> bool:
    """Head and worker, both running."""
    return phases.split() == ["Running", "Running"]


def paths(stage: Stage) -> Iterator[Row]:
    """Admission, queueing, gang start, eviction and resume, a lost head, cancel, retry, success, in this order."""
    first, second = f"{stage.ident}-a", f"{stage.ident}-b"
    held = stage.switch("Hold")
    made = stage.start(WAITS, first, [])
    yield judged("a driver's job is admitted", held.code == made.code == 0, held.text if held.code else made.text)
    if held.code or made.code:
        return
    stage.pause(SETTLE_S)
    state, started = stage.state(f"{first}-{WAITS}-1"), stage.pods(first)
    yield judged("a held queue starts nothing", state in ("", "Suspended") and not started, f"{state} {started}")
    stage.switch("None")
    seen = stage.until(lambda: stage.pods(first), whole)
    yield judged("an open queue starts the whole gang", whole(seen), seen)

    stage.start(WAITS, second, [])
    stage.pause(SETTLE_S)
    seen = stage.pods(second)
    yield judged("a job that finds no room for all of it starts no pod", seen == "" and whole(stage.pods(first)), seen)
    stage.delete(f"{second}-{WAITS}-1")

    stage.switch("HoldAndDrain")
    seen = stage.until(lambda: stage.pods(first), lambda text: text == "")
    yield judged("a drained queue evicts the gang", seen == "", seen)
    stage.switch("None")
    seen = stage.until(lambda: stage.pods(first), whole)
    yield judged("an evicted job resumes", whole(seen), seen)

    head = ",ray.io/node-type=head"
    lost = stage.pods(first, "{.items[*].metadata.uid}", head)
    stage.ask(
        ["delete", "pods", "--namespace", stage.namespace, "--selector", f"moonlight.ai/run-id={first}{head}"], None
    )
    back = stage.until(lambda: stage.pods(first, "{.items[*].metadata.uid}", head), lambda text: text not in ("", lost))
    seen = stage.until(lambda: stage.pods(first), whole)
    yield judged("a lost head comes back", back not in ("", lost) and whole(seen), seen)

    stage.delete(f"{first}-{WAITS}-1")
    seen = stage.until(lambda: stage.pods(first), lambda text: text == "")
    yield judged("a cancelled job takes its pods with it", seen == "", seen)

    for run, what, arguments, wanted in (
        ("c", "a failed program is tried again on a new cluster", ["--config", "debug"], "Failed 2"),
        ("d", "a program that ends well completes", ["--help"], "Complete"),
    ):
        run = f"{stage.ident}-{run}"
        made = stage.start(ENDS, run, arguments)
        seen = made.text if made.code else stage.until(functools.partial(stage.state, f"{run}-{ENDS}-1"), _ended)
        yield judged(what, made.code == 0 and seen.startswith(wanted), seen)
        stage.delete(f"{run}-{ENDS}-1")


def _ended(state: str) -> bool:
    return state.startswith(("Failed", "Complete", "ValidationFailed"))
