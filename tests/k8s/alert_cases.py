"""When each alert of k8s/monitoring rings and when it does not, in promtool's notation of series, one sample a minute.

`rings` maps minutes to what is firing then: labels (without severity) and summary; an empty list is silence.
"""

from __future__ import annotations

from typing import NamedTuple

Firing = tuple[dict[str, str], str]


class Case(NamedTuple):
    alert: str
    story: str
    series: dict[str, str]
    rings: dict[int, list[Firing]]


STEP, SKIPPED = 'ray_moonlight_step{ray_io_cluster="r-train-1-abcde", WorkerId="%s"}', 'ray_moonlight_skipped_steps{ray_io_cluster="r-train-1-abcde", WorkerId="%s"}'  # fmt: skip
SAVED = 'ray_moonlight_checkpoint_timestamp_seconds{ray_io_cluster="r-train-1-abcde", WorkerId="%s"}'
STARTS = 'ray_moonlight_attempts{ray_io_cluster="r-train-1-abcde"}'
STATUS = 'kuberay_job_deployment_status{namespace="moonlight", name="r-train-1", deployment_status="%s"}'
CLUSTER = 'kuberay_cluster_info{namespace="moonlight", name="r-train-1-%s", owner_kind="%s"}'
TRY = 'kuberay_job_execution_duration_seconds{namespace="moonlight", name="r-train-1", job_deployment_status="%s", retry_count="%s"}'
RESTARTS = 'kube_pod_container_status_restarts_total{namespace="moonlight", pod="%s", uid="a", container="%s"}'
POD = 'kube_pod_info{namespace="moonlight", pod="%s", uid="%s"}'
WORKFLOWS = 'argo_workflows_total_count{namespace="%s", phase="%s"}'
PENDING = 'kueue_pending_workloads{cluster_queue="moonlight-gpu", status="%s", replica_role="%s"}'
ACTIVE = 'kueue_admitted_active_workloads{cluster_queue="%s"}'
EVICTED = 'kueue_evicted_workloads_total{cluster_queue="%s", reason="%s"}'
QUEUE = 'kueue_cluster_queue_status{cluster_queue="moonlight-gpu", status="%s"}'

OF_RUN, OF_JOB = {"ray_io_cluster": "r-train-1-abcde"}, {"namespace": "moonlight", "name": "r-train-1"}
OF_QUEUE = {"cluster_queue": "moonlight-gpu"}
STALLED = (OF_RUN, "r-train-1-abcde has made no step for half an hour")
SILENT = ({"name": "r-train-1"}, "RayJob r-train-1 has been running for an hour without a training process that reports a step")  # fmt: skip
FAILED = (OF_JOB, "RayJob r-train-1 failed")
RESTARTED = ({"namespace": "moonlight", "cluster": "r-train-1-abcde"}, "the head of r-train-1-abcde restarted: its job is submitted again and resumes from the last checkpoint")  # fmt: skip
ORPHAN = ({"namespace": "moonlight", "rayjob": "r-train-1", "name": "r-train-1-abcde"}, "RayCluster r-train-1-abcde has stood for an hour and a half without a RayJob that uses it: hardware is leaking")  # fmt: skip
WAITS = (OF_QUEUE, "moonlight-gpu has had jobs waiting for half a day")
REFUSES = (OF_QUEUE, "moonlight-gpu admits none of its jobs although none of them runs: too large for its quota, no such flavor, or lent out")  # fmt: skip
EVICTS = (OF_QUEUE, "gangs of moonlight-gpu do not become ready in time")
STOPPED = (OF_QUEUE, "moonlight-gpu admits nothing (stopPolicy, or a missing flavor)")


def skipped(steps: int) -> Firing:
    return OF_RUN, f"r-train-1-abcde skipped {steps} non-finite steps in half an hour"


def unsaved(time: str) -> Firing:
    return OF_RUN, f"r-train-1-abcde would lose {time} of work: no checkpoint since"


def restarts(times: int) -> Firing:
    return OF_RUN, f"r-train-1-abcde: the training group restarted {times} times in six hours"


def retried(count: int) -> Firing:
    return {**OF_JOB, "retry_count": str(count)}, "RayJob r-train-1 starts again on a new cluster"


def workflows(count: int) -> Firing:
    return {}, f"workflows failed in the last quarter of an hour: {count}"


CASES = [
    Case("MoonlightTrainingStalled", "steps come", {STEP % 1: "10+10x120"}, {5: [], 40: [], 120: []}),
    Case("MoonlightTrainingStalled", "no step after minute 20, then they go on", {STEP % 1: "0+10x20 200x50 210+10x20"}, {45: [], 49: [], 54: [STALLED], 70: [STALLED], 73: []}),
    Case("MoonlightTrainingStalled", "a first step that is slow to be followed", {STEP % 1: "10x25 20+10x30"}, {12: [], 20: [], 29: [], 50: []}),
    Case("MoonlightTrainingStalled", "a first step that nothing follows", {STEP % 1: "10x60"}, {30: [], 34: [STALLED]}),
    Case("MoonlightTrainingStalled", "a step every 25 minutes", {STEP % 1: "0x24 10x24 20x24 30x24 40x24"}, {35: [], 60: [], 90: [], 110: []}),
    Case("MoonlightTrainingStalled", "a new process's first report is a step", {STEP % 1: "0+10x10 100x15 stale", STEP % 2: "_x30 90x19 100+10x20"}, {43: [], 47: [], 65: []}),
    Case("MoonlightTrainingStalled", "the process is gone: another alert's", {STEP % 1: "0+10x10 stale"}, {30: [], 60: []}),

    Case("MoonlightTrainingSilent", "running with steps", {STATUS % "Running": "1x120", STEP % 1: "_x20 0+1x100"}, {59: [], 61: [], 120: []}),
    Case("MoonlightTrainingSilent", "running without", {STATUS % "Running": "1x90 stale", STATUS % "Complete": "_x91 1x30"}, {59: [], 61: [SILENT], 90: [SILENT], 92: []}),
    Case("MoonlightTrainingSilent", "the process goes and comes again", {STATUS % "Running": "1x200", STEP % 1: "0+1x9 stale _x100 0+1x50"}, {69: [], 71: [SILENT], 110: [SILENT], 113: []}),
    Case("MoonlightTrainingSilent", "another run's steps do not count", {STATUS % "Running": "1x90", 'ray_moonlight_step{ray_io_cluster="q-train-1-abcde"}': "0+1x90"}, {59: [], 61: [SILENT]}),
    Case("MoonlightTrainingSilent", "waiting, and a stage that trains nothing", {STATUS % "Suspended": "1x90", STATUS.replace("train", "prepare") % "Running": "1x90"}, {61: [], 90: []}),

    Case("MoonlightLossNotFinite", "none skipped", {SKIPPED % 1: "7x90"}, {1: [], 40: []}),
    Case("MoonlightLossNotFinite", "three are borne, also soon after a start", {SKIPPED % 1: "0 1 2 3x60"}, {2: [], 3: [], 10: [], 30: []}),
    Case("MoonlightLossNotFinite", "the fourth rings, for half an hour", {SKIPPED % 1: "0x9 1 2 3 4x60"}, {11: [], 12: [], 13: [skipped(4)], 38: [skipped(4)], 44: []}),
    Case("MoonlightLossNotFinite", "a restart goes back to the checkpoint's total", {SKIPPED % 1: "50x20 stale", SKIPPED % 2: "_x22 40x60"}, {21: [], 24: [], 50: []}),

    Case("MoonlightCheckpointTooOld", "a checkpoint an hour", {SAVED % 1: "0x60 3600x60 7200x60 10800x60 14400x60"}, {170: [], 200: [], 290: []}),
    Case("MoonlightCheckpointTooOld", "none for three hours, then one", {SAVED % 1: "0x200 12000x30"}, {180: [], 181: [unsaved("3h 1m 0s")], 200: [unsaved("3h 20m 0s")], 202: []}),
    Case("MoonlightCheckpointTooOld", "the newest of two processes counts", {SAVED % 1: "0x300", SAVED % 2: "_x100 6000x200"}, {190: [], 280: [], 281: [unsaved("3h 1m 0s")]}),
    Case("MoonlightCheckpointTooOld", "the run has ended", {SAVED % 1: "0x100 stale"}, {182: [], 300: []}),

    Case("MoonlightTrainingRestartsOften", "the first start", {STARTS: "_x5 12x300"}, {6: [], 100: []}),
    Case("MoonlightTrainingRestartsOften", "five restarts are borne", {STARTS: "10x9 20x9 30x9 40x9 50x9 60x300"}, {45: [], 60: [], 200: []}),
    Case("MoonlightTrainingRestartsOften", "the sixth rings, until they are six hours past", {STARTS: "10x9 20x9 30x9 40x9 50x9 60x9 70x500"}, {59: [], 60: [restarts(6)], 369: [restarts(6)], 372: []}),

    Case("MoonlightStageFailed", "success", {STATUS % "Running": "1x10 stale", STATUS % "Complete": "_x11 1x100"}, {5: [], 12: [], 100: []}),
    Case("MoonlightStageFailed", "failure, for half a day", {STATUS % "Running": "1x10 stale", STATUS % "Failed": "_x11 1x1000"}, {10: [], 11: [FAILED], 700: [FAILED], 735: []}),
    Case("MoonlightStageFailed", "refused by KubeRay", {STATUS % "ValidationFailed": "_x3 1x100"}, {2: [], 3: [FAILED]}),
    Case("MoonlightStageFailed", "a retry is no failure", {STATUS % "Retrying": "1x10"}, {1: [], 9: []}),
    Case("MoonlightStageFailed", "a team's", {STATUS.replace('"moonlight"', '"moonlight-team-north"') % "Failed": "1x10"}, {0: [({**OF_JOB, "namespace": "moonlight-team-north"}, FAILED[1])]}),
    Case("MoonlightStageFailed", "another workspace's", {STATUS.replace('"moonlight"', '"other"') % "Failed": "1x10"}, {5: []}),

    Case("MoonlightStageRetries", "success at once", {TRY % ("Complete", 0): "_x9 600x60"}, {5: [], 20: []}),
    Case("MoonlightStageRetries", "the first retry, its status never seen", {TRY % ("Retrying", 0): "_x9 600x120"}, {8: [], 9: [retried(0)], 60: [retried(0)], 75: []}),
    Case("MoonlightStageRetries", "each retry rings", {TRY % ("Retrying", 0): "_x9 600x300", TRY % ("Retrying", 1): "_x100 300x200"}, {80: [], 100: [retried(1)], 150: [retried(1)], 170: []}),
    Case("MoonlightStageRetries", "the last failure is another alert's", {TRY % ("Failed", 2): "600x60"}, {5: [], 50: []}),

    Case("MoonlightHeadRestarted", "a head that stays", {RESTARTS % ("r-train-1-abcde-head", "ray-head"): "0x90", POD % ("r-train-1-abcde-head", "a"): "1x90"}, {5: [], 60: []}),
    Case("MoonlightHeadRestarted", "its container restarts, for half an hour", {RESTARTS % ("r-train-1-abcde-head", "ray-head"): "0x9 1x90", POD % ("r-train-1-abcde-head", "a"): "1x90"}, {9: [], 10: [RESTARTED], 35: [RESTARTED], 45: []}),
    Case("MoonlightHeadRestarted", "a new pod takes its place", {POD % ("r-train-1-abcde-head", "a"): "1x9 stale", POD % ("r-train-1-abcde-head", "b"): "_x12 1x90"}, {11: [], 12: [RESTARTED], 38: [RESTARTED], 45: []}),
    Case("MoonlightHeadRestarted", "a new pod with a name of its own", {POD % ("r-train-1-abcde-head-vwxyz", "a"): "1x9 stale", POD % ("r-train-1-abcde-head-bcdfg", "b"): "_x12 1x90"}, {11: [], 12: [RESTARTED]}),
    Case("MoonlightHeadRestarted", "a new cluster is a retry; workers and sidecars come and go", {POD % ("r-train-1-abcde-head", "a"): "1x9 stale", POD % ("r-train-1-fghij-head", "b"): "_x12 1x90", POD % ("r-train-1-abcde-workers-worker-x", "c"): "1x9 stale", POD % ("r-train-1-abcde-workers-worker-y", "d"): "_x12 1x90", RESTARTS % ("r-train-1-fghij-head", "autoscaler"): "_x12 0x5 1x60"}, {12: [], 25: [], 60: []}),

    Case("MoonlightOrphanCluster", "a running job's", {CLUSTER % ("abcde", "RayJob"): "1x200", STATUS % "Running": "1x200"}, {31: [], 95: [], 190: []}),
    Case("MoonlightOrphanCluster", "its job is gone, then the cluster", {CLUSTER % ("abcde", "RayJob"): "1x150 stale", STATUS % "Running": "1x20 stale"}, {60: [], 110: [], 112: [ORPHAN], 150: [ORPHAN], 152: []}),
    Case("MoonlightOrphanCluster", "among records of many finished jobs", {CLUSTER % ("abcde", "RayJob"): "1x150", **{STATUS.replace("r-train-1", f"q{n}-train-1") % "Complete": "1x150" for n in range(3)}}, {89: [], 91: [ORPHAN]}),
    Case("MoonlightOrphanCluster", "beside a job that runs", {CLUSTER % ("abcde", "RayJob"): "1x150", STATUS.replace("r-train-1", "q-train-1") % "Running": "1x150"}, {89: [], 91: [ORPHAN]}),
    Case("MoonlightOrphanCluster", "its job has finished and left it", {CLUSTER % ("abcde", "RayJob"): "1x200", STATUS % "Running": "1x20 stale", STATUS % "Failed": "_x21 1x180"}, {80: [], 110: [], 112: [ORPHAN]}),
    Case("MoonlightOrphanCluster", "an hour after the end is allowed", {CLUSTER % ("abcde", "RayJob"): "1x80 stale", STATUS % "Running": "1x20 stale", STATUS % "Complete": "_x21 1x180"}, {60: [], 80: [], 120: []}),
    Case("MoonlightOrphanCluster", "the submit cluster has no job", {CLUSTER % ("abcde", "None"): "1x200"}, {31: [], 150: []}),

    Case("MoonlightWorkflowFailed", "success only", {WORKFLOWS % ("moonlight", "Succeeded"): "_x5 1x30 2x30"}, {6: [], 40: []}),
    Case("MoonlightWorkflowFailed", "the first since the controller began", {WORKFLOWS % ("moonlight", "Failed"): "_x30 1x60"}, {29: [], 30: [workflows(1)], 44: [workflows(1)], 52: []}),
    Case("MoonlightWorkflowFailed", "a later one", {WORKFLOWS % ("moonlight", "Error"): "3x40 4x60"}, {40: [], 41: [workflows(1)], 54: [workflows(1)], 58: []}),
    Case("MoonlightWorkflowFailed", "one of each kind", {WORKFLOWS % ("moonlight", "Error"): "_x30 1x60", WORKFLOWS % ("moonlight", "Failed"): "3x32 4x60"}, {29: [], 35: [workflows(2)]}),
    Case("MoonlightWorkflowFailed", "another namespace's", {WORKFLOWS % ("other", "Failed"): "_x30 1x60"}, {31: [], 40: []}),

    Case("MoonlightQueuePending", "nothing waits", {PENDING % ("active", "leader"): "0x800", PENDING % ("inadmissible", "leader"): "0x800"}, {10: [], 730: []}),
    Case("MoonlightQueuePending", "half a day, then admitted", {PENDING % ("active", "leader"): "0x9 1x800 0x20"}, {720: [], 729: [], 731: [WAITS], 810: [WAITS], 812: []}),
    Case("MoonlightQueuePending", "set aside and tried again in turn", {PENDING % ("active", "leader"): "1x300 0x300 1x300", PENDING % ("inadmissible", "leader"): "0x300 1x300 0x300"}, {719: [], 721: [WAITS]}),
    Case("MoonlightQueuePending", "a wait of eleven hours", {PENDING % ("active", "leader"): "1x660 0x200"}, {600: [], 700: [], 800: []}),
    Case("MoonlightQueuePending", "seen by two replicas", {PENDING % ("active", "leader"): "1x800", PENDING % ("active", "follower"): "0x800"}, {719: [], 721: [WAITS]}),

    Case("MoonlightQueueInadmissible", "waiting for its own running jobs", {PENDING % ("inadmissible", "leader"): "1x90", ACTIVE % "moonlight-gpu": "2x90"}, {31: [], 80: []}),
    Case("MoonlightQueueInadmissible", "nothing runs and it is not admitted", {PENDING % ("inadmissible", "leader"): "0x9 1x60 0x10", ACTIVE % "moonlight-gpu": "0x90"}, {38: [], 39: [], 41: [REFUSES], 69: [REFUSES], 72: []}),
    Case("MoonlightQueueInadmissible", "nothing ever ran", {PENDING % ("inadmissible", "leader"): "1x60", ACTIVE % "moonlight-cpu": "5x60"}, {29: [], 31: [REFUSES]}),
    Case("MoonlightQueueInadmissible", "in turn, not set aside", {PENDING % ("active", "leader"): "1x60", ACTIVE % "moonlight-gpu": "0x60"}, {31: [], 60: []}),

    Case("MoonlightGangEvictedOften", "preempted", {EVICTED % ("moonlight-gpu", "Preempted"): "_x10 1x30 5x90"}, {20: [], 60: []}),
    Case("MoonlightGangEvictedOften", "twice is borne", {EVICTED % ("moonlight-gpu", "PodsReadyTimeout"): "_x10 1x30 2x500"}, {20: [], 60: [], 370: [], 390: []}),
    Case("MoonlightGangEvictedOften", "the third rings, the first counted", {EVICTED % ("moonlight-gpu", "PodsReadyTimeout"): "_x10 1x30 2x30 3x500"}, {71: [], 72: [EVICTS], 360: [EVICTS], 440: []}),
    Case("MoonlightGangEvictedOften", "three more of a counter that is old", {EVICTED % ("moonlight-gpu", "PodsReadyTimeout"): "9x420 10x30 11x30 12x500"}, {420: [], 482: [], 484: [EVICTS], 780: [EVICTS], 850: []}),
    Case("MoonlightGangEvictedOften", "two more of a counter that is old are borne", {EVICTED % ("moonlight-gpu", "PodsReadyTimeout"): "9x121 _ 9x297 10x30 11x500"}, {420: [], 482: [], 600: []}),

    Case("MoonlightQueueStopped", "active", {QUEUE % "active": "1x60", QUEUE % "terminating": "0x60"}, {16: [], 60: []}),
    Case("MoonlightQueueStopped", "held, then opened", {QUEUE % "active": "1x9 0x30 1x20", QUEUE % "pending": "0x9 1x30 0x20"}, {24: [], 26: [STOPPED], 40: [STOPPED], 42: []}),
    Case("MoonlightQueueStopped", "a short stop", {QUEUE % "active": "1x9 0x12 1x30"}, {20: [], 26: [], 40: []}),
]  # fmt: skip
