"""What Prometheus sees of a run: gauges that Ray exports on the node where the work is done.

Ray puts `ray_` before a name and adds its own labels (SessionName, WorkerId, ...) to our `run`; every node serves its series on its
metrics port (8080 under KubeRay), and a series ends with its process. Hence no counters: totals of a run (steps, tokens,
skipped steps) live in its checkpoints, go on after a restart in a new process, and may go back to the last checkpoint.

Alerts (k8s/monitoring) and the dashboard use these names; a test compares them with the tables here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from data_prep.records import PrepareProgress
from pipeline.training.metrics import TrainProgress

PREFIX = "moonlight_"
TRAINING = {
    "step": "Optimizer steps done since the run began.",
    "steps": "Optimizer steps of the whole run.",
    "tokens": "Tokens trained on since the run began.",
    "tokens_per_second": "Tokens per second over all ranks, between the last two logged steps.",
    "loss": "Cross-entropy of the last logged step that was not skipped, nats per token.",
    "gradient_norm": "Global gradient norm before clipping.",
    "learning_rate": "Learning rate of the last logged step.",
    "expert_load": "Tokens of the busiest expert of any layer over the mean of its layer; 1 is perfect balance.",
    "skipped_steps": "Steps skipped for a non-finite loss or gradient since the run began.",
    "checkpoint_timestamp_seconds": "UNIX time since when work would be lost: the newest checkpoint's, or the start of this attempt.",
}
PREPARING = {
    "prepare_units": "Units of work of the current phase.",
    "prepare_units_done": "Units of work done of the current phase.",
    "prepare_tokens": "Tokens made in the current phase by this attempt.",
}


class Gauges:
    """Creates the gauges of a table in the connected Ray process, all tagged with the run."""

    def __init__(self, table: dict[str, str], run_id: str) -> None:
        from ray.util.metrics import Gauge  # here: reading the tables needs no Ray

        self._gauges = {
            name: Gauge(PREFIX + name, description=text, tag_keys=("run",)).set_default_tags({"run": run_id})
            for name, text in table.items()
        }

    def set(self, **values: float) -> None:
        """What is not finite keeps its last value: a skipped step has no loss."""
        for name, value in values.items():
            if math.isfinite(value):
                self._gauges[name].set(float(value))


class TrainingGauges:
    """A `report` of training that passes on to `then`; create it in the worker of rank 0 when its attempt starts."""

    def __init__(self, run_id: str, then: Callable[[TrainProgress], None]) -> None:
        self._gauges, self._then = Gauges(TRAINING, run_id), then
        self._checkpoint_step: int | None = None
        self._gauges.set(checkpoint_timestamp_seconds=time.time())

    def __call__(self, at: TrainProgress) -> None:
        self._gauges.set(**{name: getattr(at, name) for name in TRAINING if name != "checkpoint_timestamp_seconds"})
        if self._checkpoint_step not in (None, at.checkpoint_step):
            self._gauges.set(checkpoint_timestamp_seconds=time.time())
        self._checkpoint_step = at.checkpoint_step
        self._then(at)


class PrepareGauges:
    """A `report` of prepare that passes on to `then`; create it in the driver, where units are counted."""

    def __init__(self, run_id: str, then: Callable[[PrepareProgress], None]) -> None:
        self._gauges, self._then = Gauges(PREPARING, run_id), then

    def __call__(self, at: PrepareProgress) -> None:
        self._gauges.set(prepare_units=at.units_total, prepare_units_done=at.units_done, prepare_tokens=at.tokens)
        self._then(at)
