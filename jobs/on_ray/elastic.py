"""Training on as many workers as the cluster has room for (`parallelism.elastic`).

Ray Train's elastic policy asks the autoscaler for the most workers, starts as soon as there is room for the least, starts again on
what is left when workers die, and looks from time to time whether there is room for more. It knows numbers of workers, not meshes, and it
grows by killing the group where it stands. Here it is taught the sizes that the run may have (`RunConfig.sizes`), and before it grows the
workers are asked for a checkpoint, so that growing loses no step. What is left over of the room stays idle.

A size is a mesh, and nothing else about the run depends on it: the order of data, the schedule and the global batch are the same, with more
micro-batches accumulated by fewer workers. Ray's policy is not part of its public API: tests/jobs/test_elastic.py holds what is used of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)

from jobs.on_ray.stop import beside_the_driver

LOOK_S = 1.0  # between two looks at the nodes while too few are there
ANSWER_S = 5.0  # for a small actor
SAVED_S = 600.0  # for the end of the step and a checkpoint, before the group grows without one


class Pause:
    """Workers are asked to commit a checkpoint and wait, because the group is to grow. A handle to an actor; picklable."""

    def __init__(self) -> None:
        self._actor: Any = ray.remote(_Pause).options(num_cpus=0, max_restarts=-1, **beside_the_driver()).remote()

    def ask(self) -> bool:
        return self._put("asked")

    def asked(self) -> bool:
        return self._state() != ""

    def saved(self) -> bool:
        return self._state() == "saved"

    def note_saved(self) -> None:
        self._put("saved")

    def end(self) -> bool:
        return self._put("")

    def _put(self, state: str) -> bool:
        ray.get(self._actor.put.remote(state), timeout=ANSWER_S)
        return True

    def _state(self) -> str:
        return str(ray.get(self._actor.get.remote(), timeout=ANSWER_S))


class _Pause:
    def __init__(self) -> None:
        self._state = ""

    def put(self, state: str) -> None:
        self._state = state

    def get(self) -> str:
        return self._state


class SizedPolicy(ElasticScalingPolicy):  # type: ignore[misc]
    """Ray's elastic policy over the sizes of a run. Lives in Ray Train's controller."""

    def __init__(self, scaling: ScalingConfig, sizes: tuple[int, ...], pause: Pause | None) -> None:
        super().__init__(cast(Any, scaling))
        self._sizes = sizes
        self._pause = pause
        self._growing: ResizeDecision | None = None  # as soon as the workers have saved
        self._patience = 0.0  # until when (time.monotonic)
        self._looked = float("-inf")

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._look()
        decision = super().make_decision_for_non_running_worker_group() if self._pause_ended() else NoopDecision()
        if isinstance(decision, NoopDecision):
            time.sleep(LOOK_S)  # Ray's loop would ask again at once, for as long as it takes
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        if self._growing is not None and self._pause is not None:
            grown, late = self._growing, time.monotonic() > self._patience
            saved = late or _answer(self._pause.saved)
            return grown if saved and self._pause_ended() else NoopDecision()
        self._maybe_send_resource_request()
        now = time.monotonic()
        latest = max(worker_group_state.start_time, self._latest_monitor_time)
        if now - latest < self.scaling_config.elastic_resize_monitor_interval_s:
            return NoopDecision()
        self._latest_monitor_time = now
        self._look()
        room = self._get_reserved_resources()
        size = 0 if room is None else self._count_possible_workers(room)
        if size in (0, worker_group_state.num_workers):
            return NoopDecision()
        resize = self._get_resize_decision(size)
        if size > worker_group_state.num_workers and self._pause is not None:
            if _answer(self._pause.ask):
                self._growing, self._patience = resize, now + SAVED_S
            return NoopDecision()
        return resize

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((size for size in self._sizes if size <= room), default=0)

    def _look(self) -> None:
        """Have Ray look which nodes live: by itself it does so every 20 s, and would start workers on nodes that are gone."""
        now = time.monotonic()
        if now - self._looked >= LOOK_S:
            self._looked = now
            asked = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            ray.wait([asked], timeout=ANSWER_S)

    def _pause_ended(self) -> bool:
        """The next group must not find that it is asked to pause."""
        if self._pause is not None and self._growing is not None and not _answer(self._pause.end):
            return False
        self._growing = None
        return True


def _answer(question: Callable[[], bool]) -> bool:
    """No, where the actor does not answer just now: Ray Train would give the run up for an error in its policy."""
    try:
        return question()
    except ray.exceptions.RayError:
        return False


class ElasticTrainer(TorchTrainer):  # type: ignore[misc]
    """A TorchTrainer whose policy knows the sizes of the run."""

    def __init__(self, *arguments: Any, sizes: tuple[int, ...], pause: Pause | None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._sizes, self._pause = sizes, pause

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        policy = SizedPolicy(self.scaling_config, self._sizes, self._pause)
        return super()._initialize_and_run_controller(**{**options, "scaling_policy": policy})  # type: ignore[misc]
