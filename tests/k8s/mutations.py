"""One fault each: what somebody might edit, and the words of the rule that must catch it. All stand on the rendered prod overlay.

`at(objects, "RayJob/template-train", "spec.a.0.b")` walks to a place; `put` and `drop` change it there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tests.k8s.manifests import Manifest, find

HEAD = "spec.rayClusterSpec.headGroupSpec.template"
WORKER = "spec.rayClusterSpec.workerGroupSpecs.0.template"
TRAIN, PREPARE, EVALUATE, PUBLISH = (
    f"RayJob/template-{stage}" for stage in ("train", "prepare", "evaluate", "publish")
)
RUN, CRON = "WorkflowTemplate/moonlight-run", "CronWorkflow/moonlight-weekly"
GPU_QUEUE, CPU_QUEUE = "ClusterQueue/moonlight-gpu", "ClusterQueue/moonlight-cpu"


class Mutation(NamedTuple):
    change: Callable[[list[Manifest]], Any]
    caught_by: str  # words of the problem


def walk(objects: list[Manifest], item: str, path: str) -> tuple[Any, Any]:
    """The container of the last step, and that step."""
    kind, *namespace, name = item.split("/")
    node: Any = find(objects, kind, name, namespace[0] if namespace else None)
    *steps, last = path.replace("\\.", "\0").split(".")
    for step in steps:
        step = step.replace("\0", ".")
        node = node[int(step)] if isinstance(node, list) else node.setdefault(step, {})
    last = last.replace("\0", ".")
    return node, int(last) if isinstance(node, list) and last != "-" else last


def put(item: str, path: str, value: Any) -> Callable[[list[Manifest]], Any]:
    def change(objects: list[Manifest]) -> None:
        node, key = walk(objects, item, path)
        if key == "-":
            node.append(value)
        else:
            node[key] = value

    return change


def drop(item: str, path: str) -> Callable[[list[Manifest]], Any]:
    def change(objects: list[Manifest]) -> None:
        node, key = walk(objects, item, path)
        del node[key]

    return change


def remove(kind: str, name: str, namespace: str | None = None) -> Callable[[list[Manifest]], Any]:
    return lambda objects: objects.remove(find(objects, kind, name, namespace))


MAIN = f"{WORKER}.spec.containers.0"
MUTATIONS: dict[str, Mutation] = {
    # -- schemas ---------------------------------------------------------------------------------------------------
    "misspelt field deep in a worker pod": Mutation(put(TRAIN, f"{MAIN}.imagePulPolicy", "Always"), "Additional properties"),
    "misspelt field of a RayJob": Mutation(put(TRAIN, "spec.backofLimit", 3), "Additional properties"),
    "string where a number belongs": Mutation(put(TRAIN, "spec.backoffLimit", "3"), "is not of type"),
    "auth mode that does not exist": Mutation(put(TRAIN, "spec.rayClusterSpec.authOptions.mode", "tokens"), "is not one of"),
    "Kueue's old field cohort": Mutation(put(GPU_QUEUE, "spec.cohort", "moonlight"), "Additional properties"),
    "Argo 3's field schedule": Mutation(put(CRON, "spec.schedule", "0 3 * * 1"), "Additional properties"),
    "misspelt probe of a core object": Mutation(put("PodDisruptionBudget/ray-heads", "spec.minAvailible", 1), "minAvailible"),
    "core object of a version that is gone": Mutation(put("PodDisruptionBudget/ray-heads", "apiVersion", "policy/v1beta1"), "v1beta1"),
    "network policy with a misspelt rule": Mutation(put("NetworkPolicy/moonlight/dns", "spec.egres", []), "egres"),
    # -- CEL inside CRDs -------------------------------------------------------------------------------------------
    "flavor quota with borrowing but no cohort": Mutation(
        lambda objects: (drop(GPU_QUEUE, "spec.cohortName")(objects), put(GPU_QUEUE, "spec.resourceGroups.0.flavors.0.resources.0.borrowingLimit", "1")(objects)),
        "borrowingLimit",
    ),
    "flavor with a taint of a made-up effect": Mutation(put("ResourceFlavor/gpu-train", "spec.nodeTaints.0.effect", "Never"), "x.effect in ['NoSchedule'"),
    "flavor toleration with Exists and a value": Mutation(put("ResourceFlavor/cpu-spot", "spec.tolerations.0.value", "x"), "x.operator == 'Exists' ? !has(x.value)"),
    "node pool on a restricted label": Mutation(put("NodePool/cpu-spot", "spec.template.spec.requirements.0.key", "karpenter.sh/other"), 'endsWith("karpenter.sh")'),
    "node class that selects nothing": Mutation(put("EC2NodeClass/moonlight", "spec.subnetSelectorTerms.0", {}), "has(x.tags) || has(x.id)"),
    # -- KubeRay ---------------------------------------------------------------------------------------------------
    "made-up submission mode": Mutation(put(TRAIN, "spec.submissionMode", "Sidecar"), "does not exist"),
    "sidecar submission": Mutation(put(TRAIN, "spec.submissionMode", "SidecarMode"), "fact 12"),
    "default submission mode": Mutation(drop(TRAIN, "spec.submissionMode"), "K8sJobMode without"),
    "deletion rules beside shutdown": Mutation(put(TRAIN, "spec.deletionStrategy", {"deletionRules": [{"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED"}}]}), "fact 1"),
    "no Ray version with token auth": Mutation(drop(TRAIN, "spec.rayClusterSpec.rayVersion"), "rayVersion is required"),
    "another Ray version than the image's": Mutation(put(TRAIN, "spec.rayClusterSpec.rayVersion", "2.59.0"), "rayVersion is not"),
    "Kubernetes token auth on a RayJob": Mutation(put(TRAIN, "spec.rayClusterSpec.authOptions.enableK8sTokenAuth", True), "fact 13"),
    "no authentication on the submit cluster": Mutation(put("RayCluster/submit", "spec.authOptions.mode", "disabled"), "fact 14"),
    "alpha network policy without its gate": Mutation(put(TRAIN, "spec.rayClusterSpec.networkPolicy", {"mode": "DenyAll"}), "RayClusterNetworkPolicy"),
    "alpha history server without its gate": Mutation(put(TRAIN, "spec.rayClusterSpec.historyServerOptions", {"collectorOptions": {}}), "RayClusterHistoryServer"),
    "tasks on the head": Mutation(drop(TRAIN, "spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus"), "tasks would run on the head"),
    "worker group named head": Mutation(put(TRAIN, "spec.rayClusterSpec.workerGroupSpecs.0.groupName", "head"), "head"),
    "gang without maxReplicas": Mutation(drop(TRAIN, "spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas"), "maxReplicas"),
    "gang that could shrink": Mutation(put(TRAIN, "spec.rayClusterSpec.workerGroupSpecs.0.minReplicas", 1), "fixed size"),
    "replicas beyond the maximum": Mutation(put(PREPARE, "spec.rayClusterSpec.workerGroupSpecs.0.replicas", 99), "minReplicas <= replicas"),
    "group priority that Kueue drops": Mutation(put(TRAIN, "spec.rayClusterSpec.workerGroupSpecs.0.priority", 1), "fact 19"),
    "restart policy with autoscaler v2": Mutation(put(PREPARE, f"{WORKER}.spec.restartPolicy", "Always"), "restartPolicy must be Never"),
    "KubeRay's pod label overwritten": Mutation(put(TRAIN, f"{HEAD}.metadata.labels.app\\.kubernetes\\.io/name", "moonlight"), "services select"),
    "deadline that can never fire": Mutation(put(TRAIN, "spec.preRunningDeadlineSeconds", 9_999_999), "never fires"),
    "GCS fault tolerance on a job": Mutation(put(TRAIN, "spec.rayClusterSpec.gcsFaultToleranceOptions", {"redisAddress": "redis:6379"}), "GCS fault tolerance"),
    "name too long for a RayJob": Mutation(put(PUBLISH, "metadata.name", "template-publish-" + "x" * 40), "longer than 47"),
    "a RayCronJob": Mutation(
        lambda objects: objects.append({"apiVersion": "ray.io/v1", "kind": "RayCronJob", "metadata": {"name": "weekly", "namespace": "moonlight"}, "spec": {"schedule": "0 3 * * 1", "jobTemplate": {}}}),
        "facts 2, 3",
    ),
    # -- Kueue -----------------------------------------------------------------------------------------------------
    "no shutdown after the job": Mutation(put(TRAIN, "spec.shutdownAfterJobFinishes", False), "fact 1"),
    "autoscaling without the elastic annotation": Mutation(drop(PREPARE, "metadata.annotations.kueue\\.x-k8s\\.io/elastic-job"), "elastic-job"),
    "queue label on a pod": Mutation(put(TRAIN, f"{WORKER}.metadata.labels.kueue\\.x-k8s\\.io/queue-name", "gpu"), "on the RayJob only"),
    "queue that does not exist": Mutation(put(TRAIN, "metadata.annotations.moonlight\\.ai/queue", "gpus"), "no LocalQueue"),
    "local queue of a queue that does not exist": Mutation(put("LocalQueue/gpu", "spec.clusterQueue", "moonlight-gpus"), "no ClusterQueue"),
    "local queue named default": Mutation(put("LocalQueue/cpu", "metadata.name", "default"), "takes every unlabelled RayJob"),
    "resource that no queue covers": Mutation(put(TRAIN, f"{MAIN}.resources.requests.ephemeral-storage", "1Gi"), "not covered"),
    "gang larger than the quota": Mutation(
        lambda objects: [put(TRAIN, f"spec.rayClusterSpec.workerGroupSpecs.0.{key}", 33)(objects) for key in ("replicas", "minReplicas", "maxReplicas")],
        "fits no flavor",
    ),
    "GPU pod without toleration": Mutation(drop(TRAIN, f"{WORKER}.spec.tolerations"), "taint nvidia.com/gpu"),
    "node pool that no flavor has": Mutation(put(TRAIN, f"{WORKER}.spec.nodeSelector.moonlight\\.ai/node-pool", "gpu-big"), "fits no flavor"),
    "topology flavor, pods without topology": Mutation(drop(TRAIN, f"{WORKER}.metadata.annotations.kueue\\.x-k8s\\.io/podset-preferred-topology"), "exactly the pods that ask"),
    "topology level that does not exist": Mutation(put(TRAIN, f"{WORKER}.metadata.annotations.kueue\\.x-k8s\\.io/podset-preferred-topology", "topology.k8s.aws/rack"), "does not exist"),
    "topology group of head and workers": Mutation(put(TRAIN, f"{WORKER}.metadata.annotations.kueue\\.x-k8s\\.io/podset-group-name", "g"), "topology group"),
    "queue open to no namespace": Mutation(drop(GPU_QUEUE, "spec.namespaceSelector"), "selects nothing"),
    "kill switch left in Git": Mutation(put(GPU_QUEUE, "spec.stopPolicy", "HoldAndDrain"), "stopPolicy is committed"),
    "flavor that does not exist": Mutation(remove("ResourceFlavor", "gpu-small"), "no ResourceFlavor"),
    "priorities in the wrong order": Mutation(put("WorkloadPriorityClass/moonlight-release", "value", 50), "expected moonlight-interactive <"),
    # -- admission policies, pods ------------------------------------------------------------------------------------
    "public dashboard": Mutation(put(TRAIN, "spec.rayClusterSpec.headGroupSpec.serviceType", "LoadBalancer"), "ClusterIP"),
    "ingress to the dashboard": Mutation(put(TRAIN, "spec.rayClusterSpec.headGroupSpec.enableIngress", True), "ingress"),
    "template that runs": Mutation(drop(TRAIN, "spec.suspend"), "suspend"),
    "no deadline": Mutation(drop(TRAIN, "spec.activeDeadlineSeconds"), "activeDeadlineSeconds"),
    "no time for logs": Mutation(put(TRAIN, "spec.ttlSecondsAfterFinished", 0), "ttlSecondsAfterFinished"),
    "policy without binding": Mutation(remove("ValidatingAdmissionPolicyBinding", "moonlight-rayjob"), "not bound"),
    "policy that only warns": Mutation(put("ValidatingAdmissionPolicyBinding/moonlight-rayjob", "spec.validationActions", ["Warn"]), "does not deny"),
    "policy that fails open": Mutation(put("ValidatingAdmissionPolicy/moonlight-rayjob", "spec.failurePolicy", "Ignore"), "failurePolicy"),
    "image by tag": Mutation(put(TRAIN, f"{MAIN}.image", "moonlight-pipeline:latest"), "digest"),
    "privileged worker": Mutation(put(TRAIN, f"{MAIN}.securityContext.privileged", True), "privileged"),
    "IPC_LOCK for EFA": Mutation(put(TRAIN, f"{MAIN}.securityContext.capabilities.add", ["IPC_LOCK"]), "capabilities are added"),
    "host network for EFA": Mutation(put(TRAIN, f"{WORKER}.spec.hostNetwork", True), "hostNetwork"),
    "host path for EFA": Mutation(put(TRAIN, f"{WORKER}.spec.volumes.-", {"name": "ib", "hostPath": {"path": "/dev/infiniband"}}), "hostPath"),
    "runs as root": Mutation(put(EVALUATE, f"{WORKER}.spec.securityContext.runAsNonRoot", False), "runAsNonRoot"),
    "writable root": Mutation(put(EVALUATE, f"{MAIN}.securityContext.readOnlyRootFilesystem", False), "readOnlyRootFilesystem"),
    "read-only root without /tmp": Mutation(drop(EVALUATE, f"{MAIN}.volumeMounts.0"), "/tmp must be a volume"),
    "no shared memory": Mutation(drop(TRAIN, f"{MAIN}.volumeMounts.1"), "/dev/shm"),
    "unhardened autoscaler": Mutation(drop(PREPARE, "spec.rayClusterSpec.autoscalerOptions.securityContext"), "autoscalerOptions.securityContext"),
    "no memory limit": Mutation(drop(PUBLISH, f"{MAIN}.resources.limits.memory"), "memory limit"),
    "more EFA asked than limited": Mutation(put(TRAIN, f"{MAIN}.resources.limits.vpc\\.amazonaws\\.com/efa", "16"), "same in requests and limits"),
    "secret as a literal": Mutation(put(TRAIN, f"{MAIN}.env.-", {"name": "HF_TOKEN", "value": "x"}), "is a literal"),
    "token where none is needed": Mutation(put(TRAIN, f"{WORKER}.spec.automountServiceAccountToken", True), "a token is mounted"),
    "head that may be evicted": Mutation(drop(TRAIN, f"{HEAD}.metadata.annotations.karpenter\\.sh/do-not-disrupt"), "consolidation"),
    "workers that do not drain": Mutation(drop(TRAIN, f"{MAIN}.lifecycle"), "does not drain"),
    "drain longer than the grace period": Mutation(put(TRAIN, f"{WORKER}.spec.terminationGracePeriodSeconds", 120), "grace period"),
    "object store larger than /dev/shm": Mutation(put(TRAIN, "spec.rayClusterSpec.headGroupSpec.rayStartParams.object-store-memory", "9000000000"), "does not fit into /dev/shm"),
    "logs that go with the cluster": Mutation(drop(TRAIN, f"{HEAD}.spec.containers.1"), "no container logs"),
    "submit cluster without users' configurations": Mutation(drop("RayCluster/submit", "spec.headGroupSpec.template.spec.containers.0.volumeMounts.2"), "RayCluster/moonlight-submit/submit head: ray-head does not mount"),
    "submit cluster that waits for a ConfigMap": Mutation(drop("RayCluster/submit", "spec.headGroupSpec.template.spec.volumes.2.configMap.optional"), "no ConfigMap moonlight-runs"),
    "configurations from another ConfigMap": Mutation(put("RayCluster/submit", "spec.headGroupSpec.template.spec.volumes.2.configMap.name", "runs"), "ray-head does not mount"),
    "logs without users' configurations": Mutation(drop(TRAIN, f"{HEAD}.spec.containers.1.volumeMounts.2"), "head: logs does not mount"),
    "step at another path": Mutation(put(RUN, "spec.templates.1.container.volumeMounts.1.mountPath", "/etc/moonlight/run"), "templates[stage]: main does not mount"),
    "metrics port missing": Mutation(drop(TRAIN, f"{HEAD}.spec.containers.0.ports.3"), "ports for metrics"),
    # -- identities, rights, network ---------------------------------------------------------------------------------
    "stage under another stage's identity": Mutation(put(TRAIN, f"{WORKER}.spec.serviceAccountName", "publish"), "not as train"),
    "service account missing": Mutation(remove("ServiceAccount", "evaluate", "moonlight"), "no ServiceAccount"),
    "driver that reads Secrets": Mutation(put("Role/moonlight/driver", "rules.-", {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}), "a driver needs no"),
    "driver that may edit templates": Mutation(put("Role/moonlight/driver", "rules.0.verbs", ["get", "list", "watch", "create", "delete", "update"]), "protects the templates"),
    "driver that cannot watch": Mutation(put("Role/moonlight/driver", "rules.0.verbs", ["get", "list", "create", "delete"]), "calls watch"),
    "driver that cannot see why a job waits": Mutation(drop("Role/moonlight/driver", "rules.2"), "calls list on workloads"),
    "researchers who may write any ConfigMap": Mutation(drop("Role/moonlight/researcher", "rules.0.resourceNames"), "any ConfigMap"),
    "wildcard rights": Mutation(put("Role/moonlight/researcher", "rules.0.verbs", ["*"]), "wildcard"),
    "binding of a role that is gone": Mutation(remove("Role", "workflow-executor"), "no Role"),
    "unrestricted namespace": Mutation(put("Namespace/moonlight", "metadata.labels.pod-security\\.kubernetes\\.io/enforce", "baseline"), "pod security"),
    "no default deny": Mutation(remove("NetworkPolicy", "default-deny", "moonlight"), "no default deny"),
    "KubeRay shut out": Mutation(remove("NetworkPolicy", "operator-to-head", "moonlight"), "KubeRay cannot reach"),
    "metadata service open": Mutation(drop("NetworkPolicy/moonlight/storage", "spec.egress.0.to.0.ipBlock.except"), "metadata service"),
    "pod identity shut off": Mutation(drop("NetworkPolicy/moonlight/storage", "spec.egress.1"), "Pod Identity"),
    "dashboard open to the world": Mutation(put("NetworkPolicy/moonlight/operator-to-head", "spec.ingress.0.from.-", {"ipBlock": {"cidr": "0.0.0.0/0"}}), "ingress from addresses"),
    "budget that KubeRay's pods cannot have": Mutation(
        lambda objects: (drop("PodDisruptionBudget/ray-heads", "spec.minAvailable")(objects), put("PodDisruptionBudget/ray-heads", "spec.maxUnavailable", 0)(objects)),
        "whole minAvailable",
    ),
    # -- Argo, monitoring --------------------------------------------------------------------------------------------
    "runs that overlap": Mutation(put(CRON, "spec.concurrencyPolicy", "Allow"), "Forbid"),
    "schedule switched on in Git": Mutation(put(CRON, "spec.suspend", False), "must be suspended"),
    "schedule without a starting deadline": Mutation(drop(CRON, "spec.startingDeadlineSeconds"), "startingDeadlineSeconds"),
    "parameter that the template lacks": Mutation(put(CRON, "spec.workflowSpec.arguments.parameters.0.name", "conf"), "does not exist"),
    "retries that wait for hours": Mutation(drop(RUN, "spec.templates.1.retryStrategy.backoff.cap"), "backoff without cap"),
    "weights that are no answer": Mutation(put(CRON, "spec.workflowSpec.arguments.parameters.3.value", "latest"), "neither promoted nor"),
    "override that no configuration has": Mutation(put(CRON, "spec.workflowSpec.arguments.parameters.1.value", "schedule.total_token=1"), "schedule.total_token: unknown key"),
    "priority that does not exist": Mutation(put(CRON, "spec.workflowSpec.arguments.parameters.2.value", "moonlight-urgent"), "no WorkloadPriorityClass"),
    "task that depends on nothing known": Mutation(put(RUN, "spec.templates.0.dag.tasks.1.depends", "prepared"), "does not exist"),
    "tag that refers to nothing": Mutation(put(RUN, "spec.templates.1.container.env.1.value", "{{workflow.parameters.confg}}"), "refers to nothing"),
    "expression that does not close": Mutation(put(RUN, "spec.templates.1.retryStrategy.expression", "lastRetry.status == 'Error"), "does not close"),
    "retry of a failed stage": Mutation(put(RUN, "spec.templates.1.retryStrategy.expression", "asInt(lastRetry.exitCode) in [10, 12, 137, 143]"), "retries on"),
    "retry that forgets a rejected pod": Mutation(put(RUN, "spec.templates.1.retryStrategy.expression", "asInt(lastRetry.exitCode) in [0, 12, 137, 143, 255]"), "retries on"),
    "gate that an evicted pod ends": Mutation(put(RUN, "spec.templates.2.retryStrategy.expression", "asInt(lastRetry.exitCode) in [12, 137, 143]"), "gate retries on"),
    "notification that an evicted pod ends": Mutation(drop(RUN, "spec.templates.3.retryStrategy"), "no retryStrategy"),
    "gate without a default": Mutation(drop(RUN, "spec.templates.2.outputs.parameters.0.valueFrom.default"), "no default"),
    "deadline that counts the queue": Mutation(put(RUN, "spec.activeDeadlineSeconds", 3600), "time in the queue"),
    "retry limit that kills a waiting driver": Mutation(put(RUN, "spec.templates.1.retryStrategy.backoff.maxDuration", "24h"), "becomes a deadline"),
    "logs not archived": Mutation(put(RUN, "spec.archiveLogs", False), "archiveLogs"),
    "step that applies a RayJob": Mutation(
        put(RUN, "spec.templates.-", {"name": "direct", "resource": {"action": "apply", "manifest": "kind: RayJob"}}), "fact 8"
    ),
    "wait that takes Complete for success": Mutation(
        put(RUN, "spec.templates.-", {"name": "wait", "resource": {"action": "get", "successCondition": "status.jobDeploymentStatus == Complete"}}), "facts 4, 5"
    ),
    "wait that fails on a retry": Mutation(
        put(RUN, "spec.templates.-", {"name": "wait", "resource": {"action": "get", "failureCondition": "status.jobStatus == FAILED"}}), "fact 6"
    ),
    "PromQL that does not parse": Mutation(put("PrometheusRule/moonlight", "spec.groups.0.rules.0.expr", "max by (a (x)"), "MoonlightTrainingStalled"),
    "panel on a metric that nobody exports": Mutation(
        lambda objects: find(objects, "ConfigMap", "grafana-moonlight")["data"].update(
            {"training.json": find(objects, "ConfigMap", "grafana-moonlight")["data"]["training.json"].replace("moonlight_loss", "moonlight_los")}
        ),
        "Loss: no exporter has a metric ray_moonlight_los",
    ),
    "alert on a metric that we renamed": Mutation(put("PrometheusRule/moonlight", "spec.groups.0.rules.0.expr", "ray_moonlight_skipped_steps_total > 0"), "no exporter"),
    "alert on a metric that nobody exports": Mutation(put("PrometheusRule/moonlight", "spec.groups.0.rules.0.expr", "ray_moonlight_stepp > 0"), "no exporter"),
    "monitor of a port that nobody has": Mutation(put("PodMonitor/moonlight/ray-nodes", "spec.podMetricsEndpoints.0.port", "metrix"), "no container has a port"),
    "monitor that Prometheus does not see": Mutation(drop("PodMonitor/moonlight/ray-nodes", "metadata.labels.release"), "does not see it"),
}  # fmt: skip
