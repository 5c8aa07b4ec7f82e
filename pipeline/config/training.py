"""Settings of the training job: meshes, steps, spikes, checkpoints."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Section
from pipeline.config.values import Count, NonNegativeFloat, OwnLocation, PositiveFloat, PositiveInt

MOST_PROFILED = 20  # steps of a profile


class ElasticConfig(Section):
    """A run under Ray that goes on smaller when nodes leave, and larger when they come (jobs/on_ray/elastic.py)."""

    min_workers: Count
    max_workers: Count | None = None  # None: replicate * shard
    look_every_s: PositiveFloat = 60.0  # for nodes that came; to grow is to take a checkpoint and to start again


class ParallelismConfig(Section):
    """Meshes: dense parameters on (replicate, shard); experts on (replicate, efsdp, ep) with efsdp * ep = shard."""

    replicate: Count = 1
    shard: Count = 1
    ep: Count = 1
    elastic: ElasticConfig | None = None  # None: replicate * shard workers, always

    @property
    def world_size(self) -> int:
        return self.replicate * self.shard

    @property
    def efsdp(self) -> int:
        return self.shard // self.ep

    def at(self, workers: int) -> ParallelismConfig | None:
        """The mesh of another number of workers: whole replicas while there is one, then multiples of ep. None: it has none."""
        if workers % self.shard == 0:
            changed = {"replicate": workers // self.shard}
        elif workers < self.shard and workers % self.ep == 0:
            changed = {"replicate": 1, "shard": workers}
        else:
            return None
        return self.model_copy(update={**changed, "elastic": None})

    @model_validator(mode="after")
    def _ep_divides_shard(self) -> ParallelismConfig:
        if self.shard % self.ep:
            raise ValueError(
                f"ep {self.ep} must divide shard {self.shard}: experts live on (efsdp, ep) with efsdp * ep = shard"
            )
        return self


class SpikeConfig(Section):
    """A finite loss or gradient norm far above the run's own (training/spikes.py)."""

    # skip: such a step changes nothing, like one that is not finite; go_back: the run returns to an earlier checkpoint and leaves the
    # data since then out (training/left_out.py)
    action: Literal["count", "skip", "go_back"] = "count"
    deviations: PositiveFloat = 10.0  # above the running mean, in running standard deviations
    horizon_steps: Annotated[int, Field(ge=10)] = 200  # of the running mean; as many steps are not judged at first
    stop_after: PositiveInt = 20  # spikes in a row end the run
    go_back_steps: PositiveInt = 1  # the checkpoint lies at least so many steps before the spike
    go_back_limit: PositiveInt = 3  # times in a run; the next spike ends it


class ProfileConfig(Section):
    """Steps that are looked at closely (training/profile.py)."""

    steps: tuple[PositiveInt, PositiveInt]  # the first and the last
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = (0,)

    @field_validator("steps")
    @classmethod
    def _few_and_in_order(cls, steps: tuple[int, int]) -> tuple[int, int]:
        first, last = steps
        if not first <= last < first + MOST_PROFILED:
            raise ValueError(
                f"[{first}, {last}] must be the first and the last step, at most {MOST_PROFILED} in all: a step's trace has tens of MB"
            )
        return steps


class TrainingConfig(Section):
    sequence_length: PositiveInt = 8192  # tokens; divides data.sequence_length
    micro_batch: Count = 1  # sequences per rank and forward pass
    compute_dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA, fp32 on CPU
    # What rows of routed experts and their gradients are multiplied in; fp8: e4m3 in tiles with scales (model/row_products.py), for GPUs of NVIDIA's
    # compute capability 8.9 on, and slowly for CPUs. Gradients of weights stay in compute_dtype. It decides the loss: part of what a run is.
    expert_products: Literal["compute_dtype", "fp8"] = "compute_dtype"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    offload_activations: bool = False  # what backward needs waits in the host's memory (model/offload.py)
    compile: bool = False  # torch.compile per block
    reshard_after_forward: bool = True
    gather_once: bool = (
        False  # weights stay whole, and gradients add up here, from a step's first micro-batch to its last
    )
    # With ep > 1: rows that ranks and their experts have room for, over those of even routing, so that the host waits once
    # a step, not for counts in every layer; a step that needs more is computed again with buffers that fit (training/room.py).
    expert_capacity: Annotated[float, Field(ge=1.0, le=64.0)] | None = None
    # With expert_capacity, what of that room travels. device: rows that are there, their number read on the device (parallel/symmetric.py,
    # CUDA with NVSHMEM); equal: all of it, in equal parts; auto: device where it can be.
    expert_splits: Literal["auto", "device", "equal"] = "auto"
    # With ep > 1: the two halves of a micro-batch take turns, and one computes while the other's rows travel; micro_batch is even
    interleave: bool = False
    document_mask: bool = False  # attention stays inside a document of a packed row
    loss_on: Literal["all", "answers"] = (
        "all"  # tokens that are labels; answers: what an assistant says in conversations
    )
    aux_loss_weight: NonNegativeFloat = 1e-4  # sequence-wise balance loss
    initial_weights: OwnLocation | None = (
        None  # a Hugging Face folder, promoted or promoted-or-fresh (training/initial.py)
    )
    start_from: str | None = None  # RUN@STEP: the whole state of that checkpoint, of a run below the same root
    start_position: Literal["parent", "zero"] = "parent"  # of such a run: where that one stood, or its own beginning
    skip_sequences: tuple[tuple[int, int], ...] = ()  # ranges [from, to) of global positions left out
    max_skipped_steps: PositiveInt = 10  # non-finite steps in a row before the run stops
    spikes: SpikeConfig = SpikeConfig()
    recompute_every: Annotated[int, Field(gt=0)] | None = (
        None  # steps: one in so many is computed twice, by other ranks
    )
    step_timeout_s: PositiveFloat = 1800.0  # heartbeat watchdog
    collect_every: PositiveInt | None = (
        50  # steps: Python's garbage collector, on all ranks at once; None: as Python does
    )
    log_every: Count = 10  # steps
    profile: ProfileConfig | None = None

    @field_validator("start_from")
    @classmethod
    def _names_run_and_step(cls, start_from: str | None) -> str | None:
        if start_from is not None and not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?@[1-9][0-9]{0,11}", start_from):
            raise ValueError(
                f"{start_from!r} must be RUN@STEP, a run_id and a step of it that has a checkpoint: base@4000"
            )
        return start_from

    @model_validator(mode="after")
    def _one_beginning(self) -> TrainingConfig:
        if self.start_from is not None and self.initial_weights is not None:
            raise ValueError("start_from and initial_weights both say where the weights come from: give one")
        if self.start_from is None and self.start_position != "parent":
            raise ValueError(
                "start_position is of a run that starts from another one: give start_from, or leave it out"
            )
        return self


class CheckpointConfig(Section):
    every_steps: PositiveInt = 1000
    keep: Count = 3  # newest checkpoints kept; the last one of a run is never deleted
    keep_every: PositiveInt | None = None  # those of steps that are multiples of it are kept as well
    async_save: bool = True
