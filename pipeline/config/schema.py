"""The schema of a run: one YAML file, one `RunConfig`.

Strict on purpose: an unknown key, a string where a number belongs or a mesh that cannot exist is refused here, in one
line that names the key, before any process starts. Fields are named as the field names them (the network's as in
Hugging Face's `DeepseekV3Config`). Units are in the field's comment: tokens, sequences, bytes, seconds.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from pipeline.config.corpus import (
    DEFAULT_EOS,
    DEFAULT_SPECIAL_TOKENS,
    CorpusConfig,
    DataConfig,
    FilterConfig,
    MixtureStage,
    SourceConfig,
    TokenizerConfig,
)
from pipeline.config.decontamination import Decontamination
from pipeline.config.gates import GateConfig
from pipeline.config.near import NearDuplicates
from pipeline.config.network import ModelConfig
from pipeline.config.optimizer import AdamWConfig, MuonConfig, OptimizerConfig
from pipeline.config.outcome import TASK_SETTINGS, CardConfig, EvaluationConfig, HubConfig, PublishingConfig
from pipeline.config.paragraphs import DuplicateParagraphs
from pipeline.config.places import places
from pipeline.config.rules import Rules
from pipeline.config.schedule import BatchStage, BiasRateStage, LearningRateStage, ScheduleConfig
from pipeline.config.section import Section
from pipeline.config.sizes import refused_sizes, valid_sizes
from pipeline.config.tracking import TrackingConfig
from pipeline.config.training import (
    CheckpointConfig,
    ElasticConfig,
    ParallelismConfig,
    ProfileConfig,
    SpikeConfig,
    TrainingConfig,
)
from pipeline.config.values import Bytes, Count, Endpoint, Location

__all__ = [
    "DEFAULT_EOS",
    "DEFAULT_SPECIAL_TOKENS",
    "TASK_SETTINGS",
    "AdamWConfig",
    "BatchStage",
    "BiasRateStage",
    "CardConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "CorpusConfig",
    "DataConfig",
    "Decontamination",
    "DuplicateParagraphs",
    "ElasticConfig",
    "EvaluationConfig",
    "FilterConfig",
    "GateConfig",
    "HubConfig",
    "LearningRateStage",
    "MixtureStage",
    "ModelConfig",
    "MuonConfig",
    "NearDuplicates",
    "OptimizerConfig",
    "ParallelismConfig",
    "ProfileConfig",
    "PublishingConfig",
    "Rules",
    "RunConfig",
    "ScheduleConfig",
    "Section",
    "SourceConfig",
    "SpikeConfig",
    "StorageConfig",
    "TokenizerConfig",
    "TrackingConfig",
    "TrainingConfig",
]


class StorageConfig(Section):
    """Where every byte goes: a folder or `s3://bucket/prefix`."""

    root: Location = "store"
    endpoint_url: Endpoint | None = None  # an S3-compatible server; None means AWS
    region: str | None = None

    @property
    def is_s3(self) -> bool:
        return self.root.startswith("s3://")


Cpus = Annotated[float, Field(gt=0.0, le=10_000.0)]


class ClusterConfig(Section):
    """What the stages ask of Ray."""

    use_gpu: bool = False
    cpus_per_worker: Cpus = 1.0
    grows: bool = False  # nodes come when they are asked for: what is not there yet is no mistake
    prepare_cpus: Cpus = 1.0  # per unit task
    prepare_memory_bytes: Bytes = 1_000_000_000  # per unit task; 2 GB where Parquet has pages of hundreds of MB
    classifier_actors: Count = 1  # processes of each function of `rules.classifier`
    classifier_cpus: Annotated[float, Field(ge=0.0, le=10_000.0)] = 1.0  # of each of them
    classifier_gpus: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.0  # 0.5: two of them share one
    max_failures: Annotated[int, Field(ge=-1)] = 3  # restarts of the training group


class RunConfig(Section):
    """One run. `run_id` names it: the same run_id and settings continue, never repeat, what is already done."""

    run_id: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    storage: StorageConfig = StorageConfig()
    tokenizer: TokenizerConfig
    corpus: CorpusConfig
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    parallelism: ParallelismConfig = ParallelismConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    publishing: PublishingConfig = PublishingConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of workers that training may have, ascending: one, unless `parallelism.elastic` is set."""
        return valid_sizes(self.parallelism, self.model, self.training, self.schedule)

    def at_size(self, workers: int) -> RunConfig:
        """The run with the mesh of so many workers, where it may have that number; else as it is."""
        if self.parallelism.elastic is None or workers not in self.sizes:
            return self
        return self.model_copy(update={"parallelism": self.parallelism.at(workers)})

    @field_validator("run_id")
    @classmethod
    def _run_id_is_a_name(cls, run_id: str) -> str:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", run_id):
            raise ValueError(
                f"run_id {run_id!r} must be 1-40 lower-case letters, digits or '-', starting with a letter (it names Kubernetes objects)"
            )
        return run_id

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        problems = list(_disagreements(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _disagreements(run: RunConfig) -> list[str]:
    """What no section can see alone. Each message starts with the key to change."""
    found = []
    unknown = sorted(set(run.tokenizer.sources) - {source.name for source in run.corpus.sources})
    if unknown:
        found.append(f"tokenizer.sources: no source of the corpus is named {unknown[0]!r}")
    for index, gate in enumerate(run.publishing.gates):
        if gate.source is not None and gate.source not in {source.name for source in run.corpus.sources}:
            found.append(f"publishing.gates[{index}].source: no source of the corpus is named {gate.source!r}")
        if gate.task is not None and not run.evaluation.tasks:
            found.append(
                f"publishing.gates[{index}].task {gate.task}: evaluation.tasks is empty, so nobody computes it; add it there"
            )
    looked_for = run.corpus.decontamination
    if looked_for is not None and not (looked_for.tasks or run.evaluation.tasks or looked_for.questions):
        found.append(
            "corpus.decontamination: there is no task whose questions to look for; name some in evaluation.tasks, or in "
            "corpus.decontamination.tasks"
        )
    again = sorted(set(looked_for.tasks) & set(run.evaluation.tasks)) if looked_for is not None else []
    if again:
        found.append(
            f"corpus.decontamination.tasks: {again[0]!r} is in evaluation.tasks, so it is looked for already; leave it out"
        )
    model, training, parallelism = run.model, run.training, run.parallelism
    if training.sequence_length > model.max_position_embeddings:
        found.append(
            f"training.sequence_length {training.sequence_length} exceeds model.max_position_embeddings {model.max_position_embeddings}"
        )
    if run.data.sequence_length % training.sequence_length:
        found.append(
            f"training.sequence_length {training.sequence_length} must divide data.sequence_length {run.data.sequence_length}: rows are cut into equal parts"
        )
    if run.evaluation.sequence_length and run.evaluation.sequence_length > model.max_position_embeddings:
        found.append(
            f"evaluation.sequence_length {run.evaluation.sequence_length} exceeds model.max_position_embeddings {model.max_position_embeddings}"
        )
    if model.n_routed_experts % parallelism.ep:
        found.append(f"parallelism.ep {parallelism.ep} must divide model.n_routed_experts {model.n_routed_experts}")
    if run.tokenizer.path is None and run.tokenizer.vocab_size != model.vocab_size:
        found.append(f"tokenizer.vocab_size {run.tokenizer.vocab_size} must equal model.vocab_size {model.vocab_size}")
    where, used = run.storage, [place.path for place in places(RunConfig, run.model_dump(mode="json"))]
    if where.endpoint_url is not None and not any(path.startswith("s3://") for path in used):
        found.append(
            f"storage.endpoint_url {where.endpoint_url}: nothing here is on S3; leave it out, or set storage.root to s3://bucket/prefix"
        )
    talks = [source.name for source in run.corpus.sources if source.conversations]
    if talks and run.data.packing != "whole":
        found.append(
            f"data.packing {run.data.packing}: source {talks[0]!r} holds conversations, and an answer without its question teaches "
            "nothing; set it to whole"
        )
    if talks and run.tokenizer.path is None and (not run.tokenizer.sources or set(talks) & set(run.tokenizer.sources)):
        found.append(
            f"tokenizer.sources: a tokenizer is not trained on conversations ({talks[0]!r}); name other sources, or load one "
            "(tokenizer.path)"
        )
    if training.loss_on == "answers" and len(talks) < len(run.corpus.sources):
        found.append(
            "training.loss_on answers: every source has to hold conversations (corpus.sources[].conversations); of other text nothing "
            "would be learned"
        )
    if training.loss_on == "answers" and training.sequence_length != run.data.sequence_length:
        found.append(
            f"training.sequence_length {training.sequence_length} must be data.sequence_length {run.data.sequence_length} with "
            "training.loss_on answers: a row that is cut leaves answers without their beginning"
        )
    if training.start_from is not None and training.start_from.rpartition("@")[0] == run.run_id:
        found.append(
            f"training.start_from {training.start_from}: a run cannot start from itself; choose another run_id"
        )
    if training.profile is not None and max(training.profile.ranks, default=0) >= parallelism.world_size:
        found.append(
            f"training.profile.ranks {list(training.profile.ranks)}: the run has ranks 0 to {parallelism.world_size - 1}"
        )
    if training.interleave and (training.micro_batch % 2 or parallelism.ep == 1):
        found.append(
            f"training.interleave takes turns between the two halves of a micro-batch while rows travel between ep ranks: it needs an even "
            f"training.micro_batch (now {training.micro_batch}) and parallelism.ep above 1 (now {parallelism.ep})"
        )
    if training.expert_splits == "device" and (training.expert_capacity is None or not run.cluster.use_gpu):
        found.append(
            "training.expert_splits device: rows whose number the device reads travel in buffers of fixed size between GPUs; give "
            "training.expert_capacity, 1.25 say, and cluster.use_gpu true, or leave it at auto"
        )
    per_step = parallelism.world_size * training.micro_batch
    for index, stage in enumerate(run.schedule.global_batch):
        if stage.sequences % per_step:
            found.append(
                f"schedule.global_batch[{index}].sequences {stage.sequences} must be a multiple of replicate * shard * micro_batch = {per_step}"
            )
    return found or refused_sizes(parallelism, model, training, run.schedule)
