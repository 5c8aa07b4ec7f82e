"""How the pod of a workflow's step may end, and what Argo Workflows makes of it: what `lastRetry` holds in a retry expression.

Restated from workflow/controller/operator.go of Argo Workflows 4.0.6, which the pinned chart installs (`source`): `inferFailedReason` calls every pod whose status has a message Failed,
never Error; `buildRetryStrategyLocalScope` gives exit code -1 where the main container has none.
"""

from __future__ import annotations

from typing import NamedTuple


class Ending(NamedTuple):
    name: str
    status: str
    exit_code: str
    message: str
    retried: bool
    source: str


HAS_MESSAGE = "inferFailedReason: the pod's status has a message"
MAIN = "inferFailedReason: exit code of the main container"
WAITING = "inferFailedReason: a container that still waits"
OTHER = "inferFailedReason: exit code of init or wait"
UNREPORTED = "inferFailedReason: main or wait did not complete"
DELETED = "podReconciliation: the pod is gone"

ENDINGS = [
    Ending("evicted before its containers ran", "Failed", "-1", "The node was low on resource: ephemeral-storage.", True, HAS_MESSAGE),
    Ending("evicted while the driver ran, killed", "Failed", "137", "The node was low on resource: memory.", True, HAS_MESSAGE),
    Ending("evicted while the driver ran, told to leave", "Failed", "143", "The node was low on resource: memory.", True, HAS_MESSAGE),
    Ending("rejected by the kubelet", "Failed", "-1", "Pod was rejected: Node didn't have enough resource: cpu, requested: 350", True, HAS_MESSAGE),
    Ending("rejected: labels of the node changed", "Failed", "-1", "Pod was rejected: Predicate NodeAffinity failed", True, HAS_MESSAGE),
    Ending("preempted by a critical pod", "Failed", "-1", "Preempted in order to admit critical pod", True, HAS_MESSAGE),
    Ending("node shut down in order", "Failed", "143", "Pod was terminated in response to imminent node shutdown.", True, HAS_MESSAGE),
    Ending("deadline of the pod: the next one follows the same job", "Failed", "-1", "Pod was active on the node longer than the specified deadline", True, HAS_MESSAGE),
    Ending("out of memory", "Failed", "137", "main: OOMKilled (exit code 137)", True, MAIN),
    Ending("killed", "Failed", "137", "main: Error (exit code 137)", True, MAIN),
    Ending("told to leave", "Failed", "143", "main: Error (exit code 143)", True, MAIN),
    Ending("node restarted under it", "Failed", "255", "main: Unknown (exit code 255)", True, MAIN),
    Ending("node gone, the pod deleted", "Error", "-1", "pod deleted", True, DELETED),
    Ending("no status of any container", "Failed", "-1", "can't find failed message for pod x namespace moonlight", True, "inferFailedReason: no container status"),
    Ending("a container never started", "Error", "-1", "Pod failed before main container starts due to ContainerCreating: ", True, WAITING),
    Ending("init container failed", "Error", "-1", "init: Error (exit code 64)", True, OTHER),
    Ending("the executor was killed after the driver succeeded", "Error", "0", "wait: OOMKilled (exit code 137)", True, OTHER),
    Ending("the executor never reported", "Failed", "0", "pod failed: wait container did not complete successfully", True, UNREPORTED),
    Ending("the driver never reported", "Failed", "-1", "pod failed: main container did not complete successfully", True, UNREPORTED),
    Ending("neither reported", "Failed", "-1", "pod failed: neither main nor wait container completed successfully", True, UNREPORTED),
    Ending("driver: infrastructure", "Failed", "12", "main: Error (exit code 12)", True, MAIN),
    Ending("driver: usage", "Failed", "2", "main: Error (exit code 2)", False, MAIN),
    Ending("driver: the gate is closed", "Failed", "4", "main: Error (exit code 4)", False, MAIN),
    Ending("driver: the stage failed", "Failed", "10", "main: Error (exit code 10)", False, MAIN),
    Ending("driver: deadline of the stage", "Failed", "11", "main: Error (exit code 11)", False, MAIN),
    Ending("driver: refused", "Failed", "13", "main: Error (exit code 13)", False, MAIN),
    Ending("driver: stopped", "Failed", "14", "main: Error (exit code 14)", False, MAIN),
    Ending("driver: deleted", "Failed", "15", "main: Error (exit code 15)", False, MAIN),
    Ending("driver: no manifest", "Failed", "16", "main: Error (exit code 16)", False, MAIN),
    Ending("driver: Kueue gave up", "Failed", "17", "main: Error (exit code 17)", False, MAIN),
    Ending("driver: an error of its own", "Failed", "1", "main: Error (exit code 1)", False, MAIN),
    Ending("the command cannot be run", "Failed", "128", "main: StartError (exit code 128): exec: \"bash\": not found", False, MAIN),
    # An image that cannot be pulled ends nothing: the pod stays Pending with ImagePullBackOff until it can, or the workflow is stopped.
    Ending("image missing", "Pending", "-1", "ImagePullBackOff: Back-off pulling image", False, "getPendingReason"),
]  # fmt: skip
