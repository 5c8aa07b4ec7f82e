"""From a suspended RayJob template to the RayJob of one stage attempt. Pure functions over plain objects.

A template (`k8s/stages/*.yaml`) is a complete RayJob that never runs: `suspend: true`, no queue label. An attempt is its
copy, as `kubectl create job --from` copies a CronJob: named `<run>-<stage>-<attempt>`, with the arguments, the labels and the
Kueue queue added and `suspend` left out (Kueue's webhook sets it at creation and is its only writer afterwards).

KubeRay names at most 47 characters; a longer one keeps its ends and gets 8 hex digits of sha256 in the middle, so it stays
a function of (run, stage, attempt) and two drivers meet at the same object.

What a template must hold for a copy to be safe is checked here once more although the admission policies check it too:
a cluster may lack them. Sources: KubeRay v1.7.0 `utils/validation.go`, Kueue v0.19.2 `rayjob_webhook.go`.
"""

from __future__ import annotations

import copy
import hashlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

from pipeline.config.schema import RunConfig

RayJob = dict[str, Any]  # a RayJob as the API server gives it

MAX_NAME = 47
STAGES = ("prepare", "train", "evaluate", "publish")
DOMAIN = "moonlight.ai"
TEMPLATE_LABEL = f"{DOMAIN}/template"
RUN_LABEL, STAGE_LABEL, ATTEMPT_LABEL = f"{DOMAIN}/run-id", f"{DOMAIN}/stage", f"{DOMAIN}/attempt"
QUEUE_ANNOTATION = f"{DOMAIN}/queue"
OVERRIDES_ANNOTATION = (
    f"{DOMAIN}/overrides"  # section.key=value ... that the stage's hardware needs, after the run's own
)
MAX_WORKERS_ANNOTATION = f"{DOMAIN}/max-workers"  # the largest gang that the admission policy takes
ARGUMENTS_ANNOTATION = f"{DOMAIN}/arguments"  # on a job: what it was asked for
QUEUE_LABEL, PRIORITY_LABEL = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
ELASTIC_ANNOTATION = "kueue.x-k8s.io/elastic-job"
GPU = "nvidia.com/gpu"
LOGS_CONTAINER = "logs"  # jobs.logs beside the head


def template_name(stage: str) -> str:
    return f"template-{stage}"


def job_name(run_id: str, stage: str, attempt: int) -> str:
    """`<run>-<stage>-<attempt>`, at most 47 characters, a DNS-1035 label."""
    ending = f"-{stage}-{attempt}"
    name = run_id + ending
    if len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(run_id.encode()).hexdigest()[:8]
    return f"{run_id[: MAX_NAME - len(ending) - 9].rstrip('-')}-{digest}{ending}"


def unsafe(template: RayJob) -> list[str]:
    """Why a copy of this template must not be run; empty when it may. Each entry names the field and the remedy."""
    found = []
    metadata, spec = template.get("metadata", {}), template.get("spec", {})
    cluster = spec.get("rayClusterSpec") or {}
    if metadata.get("labels", {}).get(TEMPLATE_LABEL) != "true":
        found.append(f"metadata.labels[{TEMPLATE_LABEL}] is not 'true': this object is not a template")
    if metadata.get("labels", {}).get(QUEUE_LABEL):
        found.append(f"metadata.labels[{QUEUE_LABEL}] is set: Kueue would start the template itself")
    if not metadata.get("annotations", {}).get(QUEUE_ANNOTATION):
        found.append(f"metadata.annotations[{QUEUE_ANNOTATION}] is missing: name the LocalQueue of the stage")
    if spec.get("suspend") is not True:
        found.append("spec.suspend is not true: KubeRay would run the template itself")
    if spec.get("shutdownAfterJobFinishes") is not True:
        found.append("spec.shutdownAfterJobFinishes is not true: Kueue refuses the job")
    if "deletionStrategy" in spec:
        found.append("spec.deletionStrategy is set: KubeRay refuses it beside shutdownAfterJobFinishes")
    if spec.get("submissionMode") != "HTTPMode":
        found.append(
            f"spec.submissionMode is {spec.get('submissionMode')!r}, not HTTPMode: other modes end a job with its log stream"
        )
    found += [
        f"spec.{key} is missing" for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds") if not spec.get(key)
    ]
    found += [
        f"spec.{key} is set: the job would escape Kueue" for key in ("managedBy", "clusterSelector") if spec.get(key)
    ]
    if cluster.get("authOptions", {}).get("mode") != "token":
        found.append("spec.rayClusterSpec.authOptions.mode is not token: anybody in reach could run code")
    if cluster.get("headGroupSpec", {}).get("serviceType", "ClusterIP") != "ClusterIP":
        found.append("spec.rayClusterSpec.headGroupSpec.serviceType is not ClusterIP")
    if cluster.get("headGroupSpec", {}).get("enableIngress"):
        found.append("spec.rayClusterSpec.headGroupSpec.enableIngress is set")
    elastic = metadata.get("annotations", {}).get(ELASTIC_ANNOTATION) == "true"
    if cluster.get("enableInTreeAutoscaling") and not elastic:
        found.append(f"spec.rayClusterSpec.enableInTreeAutoscaling needs the annotation {ELASTIC_ANNOTATION}: 'true'")
    return found


def instantiate(
    template: RayJob,
    config: RunConfig,
    stage: str,
    attempt: int,
    arguments: Sequence[str],
    *,
    priority: str,
    owner: dict[str, Any] | None = None,
) -> RayJob:
    """The RayJob to create. Raises ValueError where the template cannot hold the run (see `size_workers`)."""
    namespace = template["metadata"]["namespace"]
    spec = copy.deepcopy(template["spec"])
    spec.pop("suspend", None)
    annotations = dict(template["metadata"].get("annotations", {}))
    overrides = shlex.split(annotations.pop(OVERRIDES_ANNOTATION, ""))
    most = int(annotations.pop(MAX_WORKERS_ANNOTATION, 0))
    spec["entrypoint"] = " ".join([spec["entrypoint"], shlex.join([*arguments, *overrides])]).strip()
    job_metadata = {
        "job_name": f"{config.run_id}: {stage}",
        "run_id": config.run_id,
        "stage": stage,
        "attempt": str(attempt),
    }
    spec["metadata"] = {**spec.get("metadata", {}), **job_metadata}
    for container in spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]:
        if container["name"] == LOGS_CONTAINER:
            container["args"] = ["--name", job_name(config.run_id, stage, attempt), *arguments]
    if stage == "train":
        size_workers(spec["rayClusterSpec"], config, most)
    cluster = spec["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])):  # by which costs are split
        group["template"].setdefault("metadata", {}).setdefault("labels", {})[RUN_LABEL] = config.run_id
    labels = dict(template["metadata"].get("labels", {}))
    labels.pop(TEMPLATE_LABEL, None)
    labels |= {
        "app.kubernetes.io/managed-by": "moonlight-driver",
        "app.kubernetes.io/instance": config.run_id,
        RUN_LABEL: config.run_id,
        STAGE_LABEL: stage,
        ATTEMPT_LABEL: str(attempt),
        QUEUE_LABEL: annotations.pop(QUEUE_ANNOTATION),
        PRIORITY_LABEL: priority,
    }
    kept = {
        key: value
        for key, value in annotations.items()
        if not key.startswith(("kubectl.kubernetes.io/", "argocd.argoproj.io/"))
    }
    metadata: dict[str, Any] = {
        "name": job_name(config.run_id, stage, attempt),
        "namespace": namespace,
        "labels": {key: value for key, value in labels.items() if not key.startswith("argocd.argoproj.io/")},
        "annotations": {**kept, ARGUMENTS_ANNOTATION: shlex.join(arguments)},
    }
    if owner:
        metadata["ownerReferences"] = [owner]
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def size_workers(cluster: dict[str, Any], config: RunConfig, most: int = 0) -> None:
    """Set the training gang's pods to world size / ranks of a pod, in place.

    Of an elastic run: room for its most workers. Kueue admits the whole gang or none of it, without an autoscaler KubeRay makes each lost pod
    anew, and meanwhile training goes on with those that are there: minReplicas would say nothing to anybody.

    Ranks of a pod: its GPUs, or with `cluster.use_gpu: false` its CPUs / cpus_per_worker. Raises ValueError if the world
    does not fill whole pods, the pod cannot hold a rank, or more than `most` pods would be needed (0: any number).
    """
    group = cluster["workerGroupSpecs"][0]
    limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
    world = config.sizes[-1]
    cpus = _quantity(limits.get("cpu", "0"))
    ranks = int(limits.get(GPU, 0)) if config.cluster.use_gpu else int(cpus // config.cluster.cpus_per_worker)
    kind = GPU if config.cluster.use_gpu else f"cpu / cluster.cpus_per_worker {config.cluster.cpus_per_worker:g}"
    if ranks < 1:
        raise ValueError(
            f"{template_name('train')}: a worker holds no rank ({kind} of limits {limits}); raise its limits or change cluster.use_gpu"
        )
    if config.cluster.use_gpu and cpus < ranks * config.cluster.cpus_per_worker:
        raise ValueError(
            f"{template_name('train')}: a worker has {cpus:g} CPUs for {ranks} ranks of cluster.cpus_per_worker {config.cluster.cpus_per_worker:g}"
        )
    ranks = min(ranks, world)
    if world % ranks:
        raise ValueError(
            f"parallelism: {world} ranks do not fill whole workers of {ranks} ranks; change replicate or shard"
            + (", or elastic.max_workers" if config.parallelism.elastic else "")
        )
    pods = world // ranks
    if most and pods > most:
        raise ValueError(
            f"parallelism: {world} ranks need {pods} workers, {template_name('train')} allows {most} ({MAX_WORKERS_ANNOTATION}); "
            "lower replicate or shard, or have the template changed"
        )
    group["replicas"] = group["minReplicas"] = group["maxReplicas"] = pods


def attempt_of(job: RayJob) -> int:
    """The attempt number of a stage's RayJob."""
    label = job["metadata"].get("labels", {}).get(ATTEMPT_LABEL, "")
    return int(label) if re.fullmatch(r"[1-9]\d*", label) else 0


def _quantity(text: str | int | float) -> float:
    """A Kubernetes CPU quantity in cores."""
    value = str(text)
    return float(value[:-1]) / 1000 if value.endswith("m") else float(value)
