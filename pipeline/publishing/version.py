"""The name of a published version, which follows from its inputs, and how far its making is.

No torch in here: asking whether a version is published costs the reading of one small file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import TASK_SETTINGS, RunConfig
from pipeline.manifest import CheckpointManifest, DatasetManifest, EvaluationManifest, digest_of
from pipeline.training.identity import MECHANICS_OF_MUON, as_before

FORMAT = 5  # enters the version's name: raise it when the same inputs would publish other bytes
MECHANICS = {  # of training: how the same steps are computed and watched
    "micro_batch", "activation_checkpointing", "offload_activations", "compile", "reshard_after_forward", "gather_once", "collect_every",
    "expert_capacity", "expert_splits", "interleave", "recompute_every", "profile", "max_skipped_steps", "step_timeout_s", "log_every",
}  # fmt: skip


@dataclass(frozen=True)
class PublishProgress:
    """What has been written, in bytes of weights; `doing` names the file or step at hand."""

    doing: str
    done_bytes: int
    total_bytes: int


def identity(
    config: RunConfig, checkpoint: CheckpointManifest, evaluation: EvaluationManifest, dataset: DatasetManifest
) -> str:
    """Digest of everything that decides the published bytes."""
    return digest_of(
        {
            "format": FORMAT,
            "checkpoint": checkpoint.digest,
            "evaluation": evaluation.digest,
            "dataset": dataset.digest,
            "config": published_config(config),
        }
    )


def lease_path(run_id: str) -> str:
    """Of the record that says who publishes the run (pipeline/lease.py)."""
    return f"runs/{run_id}/publish/writer.json"


def version_name(
    config: RunConfig, checkpoint: CheckpointManifest, evaluation: EvaluationManifest, dataset: DatasetManifest
) -> str:
    """`step-00000120-1a2b3c4d`: sorts by step, differs with any input."""
    return f"step-{checkpoint.step:08d}-{identity(config, checkpoint, evaluation, dataset)[:8]}"


def published_config(config: RunConfig) -> dict[str, Any]:
    """The run's configuration without what only says where and how it runs, and whether it is promoted, and without
    settings of tasks where there are none. Such settings may change at any start of a run, and the file of today may say
    other things than those that were in force; the same weights are one version whatever it says."""
    unused = {"task_folder"} if config.evaluation.tasks else set(TASK_SETTINGS)
    found = config.model_dump(
        mode="json",
        exclude={
            "storage": True,
            "cluster": True,
            "parallelism": True,
            "checkpoint": True,
            "tracking": True,
            "optimizer": {"muon": MECHANICS_OF_MUON},
            "training": MECHANICS,
            "data": {"cache_bytes", "max_padding"},
            "publishing": {"promote", "max_loss", "gates", "beats_frequencies", "workers", "revisions", "hub"},
            "evaluation": {"batch", "follow", "waiting", "tasks_every", "scoring_tasks", "task_preset", *unused},
        },
    )
    return found | {"training": as_before(found["training"])}
