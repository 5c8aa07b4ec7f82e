"""What Prometheus sees of a run: gauges that Ray exports on the node where the stage's driver is.

The driver sets them from the run's records (journal, scores), so they outlive the workers: a group that died and starts again leaves no
gap, and no series of its own. They end with the stage. Totals of a run (steps, tokens, skipped steps) live in its checkpoints, and
may go back to the last one: hence gauges, and no counters.

Ray puts `ray_` before a name and adds its own labels (SessionName, WorkerId, ...) to ours: `run` and `stage` always, and those in
`LABELS`. Every node serves its series on its metrics port (8080 under KubeRay). Alerts (k8s/monitoring) and boards (boards.py) use these names; a test
compares them with the tables here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from data_prep.records import PrepareProgress
from pipeline.manifest import EvaluationManifest
from pipeline.storage import Storage
from pipeline.training.goodput import goodput
from pipeline.training.journal import History, read_journal
from pipeline.training.times import PHASES

if TYPE_CHECKING:
    from pipeline.report.run import Run  # drivers have it; actors that unpickle a stage need none of it

PREFIX = "moonlight_"
LOGGED = {  # of the newest logged step, under the names of the journal
    "step": "Optimizer steps done since the run began.",
    "steps": "Optimizer steps of the whole run.",
    "tokens": "Tokens trained on since the run began.",
    "tokens_per_second": "Tokens per second over all ranks, between the last two logged steps.",
    "loss": "Cross-entropy of the last logged step that was not skipped, nats per token.",
    "gradient_norm": "Global gradient norm before clipping.",
    "learning_rate": "Learning rate of the last logged step.",
    "bias_rate": "Bias rate of the router.",
    "global_batch": "Sequences of a step.",
    "expert_load": "Tokens of the busiest expert of any layer over the mean of its layer; 1 is perfect balance.",
    "skipped_steps": "Steps skipped for a non-finite loss or gradient since the run began.",
    "spikes": "Steps with a loss or gradient norm far above the run's own since it began.",
    "flops_per_second": "FLOP/s of the model over all ranks (forward and backward).",
    "mfu": "Share of what the processors could do; none where that is not known.",
    "memory_peak_bytes": "Peak memory of the rank that has the most.",
}
TRAINING = LOGGED | {
    "step_seconds": "Seconds of a step by phase, mean over ranks and over the steps since the last logged one.",
    "slowest_rank_seconds": "Seconds of a step that the rank the others wait for takes more than they, by rank and by the phase it takes them in; 0 for others.",
    "goodput": "Share of the wall time since the run was asked for in which it made progress that lasts.",
    "goodput_seconds": "Wall time since the run was asked for by what became of it (pipeline/training/goodput.py).",
    "attempts": "Starts of the training group since the run began.",
    "checkpoint_timestamp_seconds": "UNIX time since when work would be lost: the newest checkpoint's, or the start of this attempt.",
}
SCORES = {
    "evaluation_step": "Step of the newest checkpoint that was judged.",
    "evaluation_loss": "Held-out cross-entropy of the newest judged checkpoint, nats per token, by source and over all.",
    "evaluation_bits_per_byte": "Held-out bits per byte of the newest judged checkpoint, by source and over all.",
}
PREPARING = {
    "prepare_units": "Units of work of the current phase.",
    "prepare_units_done": "Units of work done of the current phase.",
    "prepare_units_failed": "Units of the current phase that killed their worker and are quarantined.",
    "prepare_documents": "Documents read in the current phase by this attempt.",
    "prepare_text_bytes": "Bytes of text read in the current phase by this attempt.",
    "prepare_tokens": "Tokens made in the current phase by this attempt.",
}
LABELS = {
    "step_seconds": ("phase",),
    "slowest_rank_seconds": ("rank", "phase"),
    "goodput_seconds": ("state",),
    "evaluation_loss": ("source",),
    "evaluation_bits_per_byte": ("source",),
}
ALL = "all"  # the source that stands for all of them


class Gauges:
    """Creates the gauges of a table in the connected Ray process, all with the labels `run` and `stage`."""

    def __init__(self, table: Iterable[tuple[str, str]], run_id: str, stage: str) -> None:
        from ray.util.metrics import Gauge  # here: reading the tables needs no Ray

        default = {"run": run_id, "stage": stage}
        self._gauges = {
            name: Gauge(
                PREFIX + name, description=text, tag_keys=("run", "stage", *LABELS.get(name, ()))
            ).set_default_tags(default)
            for name, text in table
        }

    def set(self, name: str, value: Any, **labels: str) -> None:
        """What is no finite number keeps its last value: a skipped step has no loss."""
        if isinstance(value, int | float) and math.isfinite(value):
            self._gauges[name].set(float(value), tags=labels)


class TrainingGauges:
    """Of the stage `train`: told of every look at the run (views/live.py). Create it in the driver before training begins."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self._gauges = Gauges((TRAINING | SCORES).items(), run_id, "train")
        self._before = len(read_journal(storage, run_id).attempts)  # of other drivers
        self._slowest: dict[str, str] = {}  # labels

    def __call__(self, run: Run) -> None:
        attempts = run.history.attempts
        if len(attempts) <= self._before or not run.history.steps:  # nothing of this driver's training yet
            return
        last = run.history.steps[-1]
        for name in LOGGED:
            self._gauges.set(name, run.loss if name == "loss" else last.get(name))
        for phase in PHASES:
            self._gauges.set("step_seconds", last.get(f"seconds_{phase}"), phase=phase)
        self._set_slowest(last)
        spent = goodput(run.events, run.history.lines)
        if spent is not None and spent.useful:
            self._gauges.set("goodput", spent.share)
            for state, seconds in spent.seconds.items():
                self._gauges.set("goodput_seconds", seconds, state=state)
        self._gauges.set("attempts", len(attempts))
        self._gauges.set("checkpoint_timestamp_seconds", unsaved_since(run.history))
        set_scores(self._gauges, run.evaluations)

    def _set_slowest(self, last: Mapping[str, Any]) -> None:
        rank, seconds = last.get("slowest_rank"), last.get("slowest_seconds")
        if rank is None or rank < 0 or seconds is None:
            return
        labels = {"rank": str(rank), "phase": str(last["slowest_phase"])}
        if self._slowest and labels != self._slowest:
            self._gauges.set("slowest_rank_seconds", 0.0, **self._slowest)
        self._gauges.set("slowest_rank_seconds", seconds, **labels)
        self._slowest = labels


class ScoreGauges:
    """Of the stage `evaluate`."""

    def __init__(self, storage: Storage, run_id: str) -> None:
        self._gauges = Gauges(SCORES.items(), run_id, "evaluate")

    def __call__(self, run: Run) -> None:
        set_scores(self._gauges, run.evaluations)


class PrepareGauges:
    """A `report` of prepare that passes on to `then`; create it in the driver, where units are counted."""

    def __init__(self, run_id: str, then: Callable[[PrepareProgress], None]) -> None:
        self._gauges, self._then = Gauges(PREPARING.items(), run_id, "prepare"), then

    def __call__(self, at: PrepareProgress) -> None:
        values = {
            "units": at.units_total,
            "units_done": at.units_done,
            "units_failed": at.units_failed,
            "documents": at.documents,
            "text_bytes": at.text_bytes,
            "tokens": at.tokens,
        }
        for name, value in values.items():
            self._gauges.set(f"prepare_{name}", value)
        self._then(at)


WATCHERS: dict[
    str, Callable[[Storage, str], Callable[[Run], None]]
] = {  # stages whose gauges come from the run's records
    "train": TrainingGauges,
    "evaluate": ScoreGauges,
}


def unsaved_since(history: History) -> float:
    """UNIX time: when the newest checkpoint was known to be committed, or when this attempt began. There must be an attempt."""
    since = history.attempts[-1].time
    for before, line in zip(history.steps, history.steps[1:]):
        if line.get("checkpoint_step", 0) > before.get("checkpoint_step", 0):
            since = max(since, line["time"])
    return since


def set_scores(gauges: Gauges, evaluations: Iterable[EvaluationManifest]) -> None:
    newest = max(evaluations, key=lambda each: each.step, default=None)
    if newest is not None:
        gauges.set("evaluation_step", newest.step)
        for source, score in {ALL: newest.overall, **newest.sources}.items():
            gauges.set("evaluation_loss", score.loss, source=source)
            gauges.set("evaluation_bits_per_byte", score.bits_per_byte, source=source)
